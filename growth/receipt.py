"""The receipt of a growth: its logits as stored, and where that is in 16 bits, beside those of the same
growth in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from outgrow.growth.engine.rows import Reader
from outgrow.growth.engine.stream import write_model
from outgrow.growth.passage import Passage
from outgrow.growth.plan import Plan
from outgrow.growth.verify import Meter, Receipt
from outgrow.model.dtypes import is_short

# the folder, inside the unfinished one, that the same growth in float32 lies in while it is measured
WIDE = "float32"


def measure_growth(
    plan: Plan,
    reader: Reader,
    source: Path,
    folder: Path,
    *,
    threads: int = 2,
    passage: Passage | None = None,
) -> Receipt:
    """Measure a grown folder against its source.

    Weights of 16 bits are rounded by growth, as they are by casting. So three things are measured: the folder
    as it is stored (which is what the receipt's own numbers say), the same plan followed in float32
    (`exact_delta`, which a lossless certificate must hold), and the source with every weight rounded once
    more (`cast_delta`), as casting does it.

    Args:
        folder: complete but for its config and recipe; the growth in float32 lies in it for a while.
        passage: real text to measure on instead of random tokens.

    Raises:
        UserError: a model does not load or run.
    """
    meter = Meter.of(source, folder, passage=passage)
    config = plan.target_config
    norm = plan.family.norm
    stored = meter.receipt(folder, config=config, norm=norm)
    formats = set(filter(is_short, map(plan.dtype, plan.steps)))
    if not formats or plan.lesson is not None:  # what was learned is not in the plan's steps
        return stored
    with _in_float32(plan, reader, folder, threads) as wide:
        exact = meter.delta(wide, config=plan.target_config)
    format_name = "float16" if "F16" in formats else "bfloat16"
    cast = meter.cast(format_name)
    note = (
        f"stored in {format_name}; grown in float32 the logits move by {exact:.3g}, and rounding every "
        f"weight of the source once to {format_name}, as casting does, moves them by {cast.max_delta:.3g} "
        f"(KL {cast.kl:.3g})"
    )
    if stored.note:
        note = f"{note}; {stored.note}"
    return replace(
        stored,
        exact_delta=exact,
        cast_delta=cast.max_delta,
        cast_kl=cast.kl,
        cast_loss=cast.loss_target,
        note=note,
    )


@contextmanager
def _in_float32(plan: Plan, reader: Reader, folder: Path, threads: int) -> Iterator[Path]:
    """The same growth with weights in float32, in a folder that goes away."""
    wide = folder / WIDE
    wide_plan = replace(plan, growth=replace(plan.growth, dtype="float32"))
    shutil.rmtree(wide, ignore_errors=True)  # a killed worker's
    try:
        write_model(wide_plan, reader, wide, threads=threads)
        yield wide
    finally:
        shutil.rmtree(wide, ignore_errors=True)
