"""Remarks on a plan: notes for its user that are no reason against its certificate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from outgrow.growth.decision import Decision, Step
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.model.dtypes import is_short

NAMES = {"F16": "float16", "BF16": "bfloat16"}
WIDTH, HEAD_DIM = 64, 8  # multiples that matrix units and attention kernels take without padding
DEVICES = (2, 4, 8)
SIZES = ("hidden_size", "intermediate_size")
COUNTED = ("num_attention_heads", "num_key_value_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def remarks(plan: Decision, *, lossless: bool) -> tuple[str, ...]:
    """Write one line each: rounding, copies that stay equal, bad starts, sizes that hardware dislikes."""
    rounding = _rounding(plan) if lossless else ()
    return (*rounding, *_equal_copies(plan), *_starts(plan), *_sizes(plan))


def _rounding(plan: Decision) -> Iterator[str]:
    """Name what the stored format rounds in a plan that is lossless in exact arithmetic."""
    short = [step for step in plan.steps if is_short(plan.dtype(step))]
    formats = sorted({NAMES[plan.dtype(step)] for step in short})
    if not formats:
        return
    gains = sum(1 for step in short if step.source is not None and _rounds(step))
    causes = (
        [f"{gains} of {len(plan.steps)} tensors are scaled by gains that are no power of two"]
        if gains
        else []
    )
    causes += ["noise is rounded too, once in the sum over copies"] if plan.is_noisy else []
    if causes:
        yield (
            "rounding: the certificate speaks of exact arithmetic, the weights are stored in "
            f"{' and '.join(formats)}, where {'; '.join(causes)} (dtype=float32 stores the result without "
            "that)"
        )


def _rounds(step: Step) -> bool:
    """Check whether scaling rounds entries: some gain is no power of two, or a mean is taken."""
    mantissas = [np.frexp(np.abs(_gains(axis)))[0] for axis in step.maps]
    scaled = any(bool((mantissa != 0.5).any()) for mantissa in mantissas)
    if scaled:
        return True
    return any(bool((axis.fill == Fill.MEAN).any()) for axis in step.maps)


def _gains(axis: AxisMap) -> np.ndarray:
    """The gains on copied indices that are not zero."""
    gain = axis.gain[axis.copies]
    return gain[gain != 0]


def _equal_copies(plan: Decision) -> Iterator[str]:
    """Name copies that are written alike and read alike, and so get equal gradients in every step.

    Dropout sets apart only what it falls on: of attention weights the heads, of the residual stream its own
    copies, and neither of them the feed-forward units.
    """
    if plan.noise or plan.recipe.flat is not None or not plan.recipe.inherits:
        return
    counts = {}
    for space, expansion in plan.recipe.expansions.items():
        if space in ("vocab", "pos", "expert"):
            continue
        if plan.growth.grows(space) and plan.family.uses(space):
            counts[space] = _evenly_read(expansion.write, expansion.read)
    listing = ", ".join(f"{space} {count}" for space, count in counts.items() if count)
    if not listing:
        return
    named = ", ".join(_dropout_rates(plan))
    here = f" (here {named}, which sets apart only what it falls on)" if named else ""
    yield (
        f"{sum(counts.values())} copies are read evenly ({listing}); without dropout on them{here} or "
        "noise they stay equal, and training uses no more than the source's width (growth.noise=0.5 sets "
        "them apart)"
    )


def _dropout_rates(plan: Decision) -> Iterator[str]:
    """Name the dropout of a config that the language model may have, with its rate."""
    for key, rate in plan.target_config.items():
        if "drop" in key and "summary" not in key and isinstance(rate, int | float) and rate > 0:
            yield f"{key} {rate:g}"


def _evenly_read(write: AxisMap, read: AxisMap) -> int:
    """Count target indices that share their source index and gains with an earlier one."""
    copies = np.flatnonzero(write.copies & read.copies)
    columns = (write.index, write.gain, read.gain)
    kinds = set(zip(*(column[copies].tolist() for column in columns), strict=True))
    return len(copies) - len(kinds)


def _starts(plan: Decision) -> Iterator[str]:
    """Name growths whose start is worse than their name promises."""
    layers, growth = plan.layers, plan.growth
    widened = [
        space for space in growth.source if space not in ("layer", "vocab", "pos") and growth.grows(space)
    ]
    if plan.operator == "zero_pad" and widened:
        yield (
            "zero_pad is a null control: nothing ever learns to read its new entries, whose gradients stay "
            "exactly 0"
        )
    if layers.rule == "stack" and layers.target % layers.source:
        yield (
            f"depth 'stack': {layers.target} layers are no whole multiple of {layers.source}, so the last "
            f"copy of the network is cut off after layer {layers.layers[-1]}, and the output head follows "
            "a layer that it does not know"
        )
    if plan.operator == "tile" and growth.tied and growth.grows("residual"):
        yield (
            "tile on tied embeddings: the head repeats the embedding unscaled, so logits are too large and "
            "the loss starts above ln(vocabulary)"
        )


def _sizes(plan: Decision) -> Iterator[str]:
    """Name sizes that the growth chose and that hardware pays for."""
    family, growth, config = plan.family, plan.growth, plan.target_config
    source = plan.source_config
    keys = [key for key in map(family.field_name, SIZES) if _off(plan, key, WIDTH)]
    widths = [f"{key} {config[key]}" for key in keys]
    if widths:
        yield f"sizes: {', '.join(widths)}: no multiple of {WIDTH}, which matrix units pad"
    head = growth.target.get("qk")
    if head and growth.grows("qk") and head % HEAD_DIM:
        yield (
            f"sizes: head dim {head} is no multiple of {HEAD_DIM}, which fused attention kernels pad or "
            "refuse"
        )
    for key in (*map(family.field_name, COUNTED), *EXPERTS):
        count = config.get(key)
        if type(count) is not int or count == source.get(key):
            continue
        if uneven := [str(number) for number in DEVICES if count % number]:
            yield (
                f"sizes: {key} {count} cannot be shared evenly by {', '.join(uneven)} devices (tensor or "
                "expert parallelism)"
            )


def _off(plan: Decision, key: str, multiple: int) -> bool:
    """Check whether a size that grows is no multiple."""
    size = plan.target_config.get(key)
    grows = size != plan.source_config.get(key)
    return grows and type(size) is int and size % multiple != 0
