"""The decayed ends of runs: what each came to, which may be compared, and a study's record of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from outgrow.experiments.grown_run import Growth, read_growth
from outgrow.experiments.run_start import RunStart, read_start
from outgrow.experiments.runs import RUN_AGAIN, SCRATCH, Run, listed
from outgrow.model.base.errors import UserError
from outgrow.train.machine.regime import multiplied
from outgrow.train.run.folder import METRICS
from outgrow.train.run.record import read_known

RECORD = "ends.json"  # the small record of a study's runs: what every table and picture is made of
OPTIONAL = ("growth", "active", "start", "precision")  # left out of the record where an end has none
POSITIVE = ("learning_rate", "batch_tokens", "parameters", "tokens", "flops", "val_loss", "eval_tokens")


@dataclass(frozen=True)
class End:
    """The decayed end of one run.

    FLOPs count from its very beginning, the trunk included; the source's stand apart.
    """

    name: str
    arm: str
    optimizer: str
    learning_rate: float
    batch_tokens: int
    seed: int
    parameters: int  # in matrices and the head: an embedding table multiplies nothing
    tokens: int
    flops: float
    source_flops: float
    val_loss: float
    eval_tokens: int
    device: str
    data: str  # fingerprint of the text
    growth: Growth | None = None  # inside the run, if it grew on its way
    active: int | None = None  # of the parameters, in a mixture of experts: those that each token meets
    start: RunStart | None = None  # and what it read; None in older records
    precision: str | None = None  # of products of matrices, "fp32" or "bf16"; None in older records

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens per parameter that a token meets, all of them but in a mixture of experts."""
        return self.tokens / (self.active or self.parameters)

    @property
    def paid(self) -> float:
        """FLOPs with the source's training included."""
        return self.flops + self.source_flops

    @property
    def rereads(self) -> bool | None:
        """Whether the text is the one that its source was trained on; None where nobody knows."""
        if self.start is None or self.start.source_data is None:
            return None
        return self.start.source_data == self.data


def end_of(run: Run) -> End:
    """The end of a complete run.

    Raises:
        UserError: it has not decayed, its source's cost is unknown, or its record lacks a number.
    """
    record = run.record
    is_wsd = record.setting("schedule.name") == "wsd"
    decays = is_wsd and record.setting("schedule.decay_fraction")
    if not decays or record.setting("schedule.floor") != 0.0:
        raise UserError(
            f"{run.folder}: its learning rate does not decay to zero, so its end is no end of a horizon "
            "(schedule=wsd)",
        )
    if run.source_flops is None:
        raise UserError(f"{run.folder}: nobody counted the FLOPs of its source; give source_tokens")
    summary = run.summary
    config = record.target_config
    is_sparse = record.active < record.parameters
    active = multiplied(config, record.active) if is_sparse else None
    return End(
        name=run.name,
        arm=run.arm,
        optimizer=str(record.setting("optimizer.name")),
        learning_rate=run.learning_rate,
        batch_tokens=int(run.number("train.batch_tokens")),
        seed=run.seed,
        parameters=multiplied(config, record.parameters),
        tokens=summary.tokens,
        flops=summary.flops + run.operator_flops,
        source_flops=run.source_flops,
        val_loss=summary.final_val_loss,
        eval_tokens=int(run.number("train.eval_tokens")),
        device=str(record.device),
        data=record.data.fingerprint,
        growth=read_growth(run.folder / METRICS, RUN_AGAIN),
        active=active,
        start=read_start(run),
        precision=record.precision,
    )


def each_once(pairs: Iterable[tuple[str, End]]) -> list[End]:
    """The ends of several inputs, each once: a run has the same end as the record that was made of it, which
    may tell less of its start, and not its precision.

    Args:
        pairs: (input, end) pairs.

    Raises:
        UserError: two ends of one arm, rate, batch, seed and budget are not the same: a folder that was
            copied, or a run that was trained anew after its record. They would count as two seeds.
    """
    firsts: dict[tuple[Any, ...], tuple[str, End]] = {}
    faults = []
    for where, end in pairs:
        there, first = firsts.setdefault(_point(end), (where, end))
        first = replace(first, start=first.start or end.start, precision=first.precision or end.precision)
        firsts[_point(end)] = there, first
        other = replace(end, start=first.start, precision=end.precision or first.precision)
        if first != other:
            differing = _differing(first, other)
            faults.append(
                f"{there} and {where} both hold {end.arm} with {end.optimizer}, learning rate "
                f"{end.learning_rate:g}, seed {end.seed}, {end.tokens:,} tokens, and differ in {differing}: "
                "leave one out"
            )
    UserError.collect(faults)
    return [end for _, end in firsts.values()]


def _point(end: End) -> tuple[Any, ...]:
    """What only one end of a comparison may have: where it stands, whatever it reached."""
    of_network = end.arm, end.optimizer, end.learning_rate, end.batch_tokens, end.parameters
    return *of_network, end.seed, end.tokens, end.data, end.eval_tokens


def _differing(one: End, other: End) -> str:
    """The entries in which two ends differ, with both values."""
    after = asdict(other)
    parts = [f"{key} ({value} and {after[key]})" for key, value in asdict(one).items() if value != after[key]]
    return ", ".join(parts)


def check_alike(ends: Sequence[End]) -> None:
    """Refuse ends that were not measured alike, or lack an arm that a headline needs.

    Raises:
        UserError: naming what differs, and what is missing.
    """
    faults = unlike_faults(ends)
    arms = {end.arm for end in ends}
    if SCRATCH not in arms:
        faults.append(
            f"no {SCRATCH} arm: there is no curve to hold the others against; run growth=scratch at two "
            "horizons or more",
        )
    faults += size_faults(ends)
    faults += batch_faults(ends)
    if SCRATCH in arms and lacks_control(ends):
        faults.append(
            "no control: every arm has as many parameters as scratch, so nothing tells a bigger network from "
            "one that was only trained longer; run the small network alone too (growth=scratch with the "
            "small target)",
        )
    UserError.collect(faults)


def unlike_faults(ends: Sequence[End]) -> list[str]:
    """List how the texts of the ends differ, or their precision as far as it is known, and an end of each."""
    faults = []
    for key in ("data", "eval_tokens", "precision"):
        names: dict[str, str] = {}
        for end in ends:
            value = getattr(end, key)
            if value is not None:
                names.setdefault(str(value), end.name)
        count = len(names)
        if count > 1:
            examples = [f"{value[:12]} of {names[value]}" for value in sorted(names)]
            listed = ", ".join(examples)
            common = "precision" if key == "precision" else "text"
            faults.append(f"{key}: {count} different ones ({listed}); compare runs on one {common} only")
    return faults


def size_faults(ends: Sequence[End]) -> list[str]:
    """Tell of scratch runs of several sizes: one curve through them would be no network's."""
    sizes = {end.parameters for end in ends if end.arm == SCRATCH}
    if len(sizes) < 2:
        return []
    return [
        f"{SCRATCH}: networks of {_listed(sizes)} parameters, through which there is no one curve; give the "
        "ends of one size, or, where every size is a product, count them together (outgrow family)"
    ]


def batch_faults(ends: Sequence[End]) -> list[str]:
    """List the arms with batches of a size that scratch was not given: it would be a baseline untuned."""
    scratch = {end.batch_tokens for end in ends if end.arm == SCRATCH}
    others: dict[str, set[int]] = defaultdict(set)
    for end in ends:
        if scratch and end.batch_tokens not in scratch:
            others[end.arm].add(end.batch_tokens)
    of_scratch = _listed(scratch)
    return [
        f"{arm}: batches of {_listed(sizes)} tokens, {SCRATCH}'s are of {of_scratch}; run {SCRATCH} with "
        f"train.batch_tokens={min(sizes)} too"
        for arm, sizes in others.items()
    ]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def lacks_control(ends: Sequence[End]) -> bool:
    """Check whether arms grew, and the small network was not trained on beside them."""
    largest = max(end.parameters for end in ends)
    has_small = any(end.parameters < largest for end in ends)
    grown = {end.arm for end in ends if end.parameters == largest} - {SCRATCH}
    return bool(grown) and not has_small


def write_ends(path: Path, ends: Iterable[End]) -> None:
    """The ends as JSON, sorted, so that a study's record changes by what was added."""
    order = attrgetter("arm", "optimizer", "tokens", "name")
    ordered = sorted(ends, key=order)
    rows = list(map(_row, ordered))
    text = json.dumps(rows, indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def _row(end: End) -> dict[str, Any]:
    row = asdict(end)
    for key in OPTIONAL:
        if row[key] is None:
            del row[key]
    return row


def _impossible(end: End) -> list[str]:
    """List the numbers that no run ends with."""
    wrong = [key for key in POSITIVE if getattr(end, key) <= 0]
    faults = [f"{key} {getattr(end, key):g}, expected more than 0" for key in wrong]
    if end.source_flops < 0:
        faults.append(f"source_flops {end.source_flops:g}, expected 0 or more")
    return faults


def read_ends(path: Path) -> list[End]:
    """The ends that `write_ends` wrote.

    Raises:
        UserError: the file is something else.
    """
    faults: list[str] = []
    rows: list[Any] = []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        faults.append(str(error))
    if not isinstance(rows, list):
        faults.append(f"expected a list, found {type(rows).__name__}")
        rows = []
    ends = [read_known(End, row, f"[{number}].", faults) for number, row in enumerate(rows)]
    known = [end for end in ends if end is not None]
    for end in known:
        faults += [f"{end.name}: {fault}" for fault in _impossible(end)]
    if faults:
        raise UserError(
            f"{path}: not a record of runs ({listed(faults, 3)}); expected what `outgrow horizons` writes"
        )
    return known
