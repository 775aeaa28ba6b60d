"""A finished run as a frozen value: read from its folder, checked against itself.

The folder is written by `train`: `run.json` at the start, `metrics.jsonl` on the way, `summary.json` when
complete. Nothing here computes a comparison; a number that contradicts another number of the same folder
stops here.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from outgrow.experiments.cost import Curve
from outgrow.model.base.errors import UserError, reading
from outgrow.model.keys import is_number
from outgrow.train.run.record import RunRecord, SourceCost, Summary, read_evaluations

RUN_AGAIN = "the folder was edited or damaged: run it again in a new one"
ArmRate = tuple[str, float]  # an arm and one of its learning rates
SCRATCH = "scratch"
SOURCE = "source"  # the control arm: the source itself, trained on, "trained longer, not bigger"
NULL_CONTROL = "null_control"  # the same with its norm scales × √(N/n): as a growth into dead units
CONTROLS = (SOURCE, NULL_CONTROL)  # they train the source's own network, for the FLOPs of the others


@dataclass(frozen=True)
class Run:
    """One complete run.

    `curve` holds its validation losses over its own training; what came before it is apart.
    """

    folder: Path
    study: str
    arm: str
    seed: int
    learning_rate: float
    curve: Curve
    record: RunRecord = field(repr=False)
    summary: Summary = field(repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def point(self) -> ArmRate:
        """The arm and its learning rate, which runs of several seeds share."""
        return self.arm, self.learning_rate

    @property
    def final_loss(self) -> float:
        """The last validation loss, nats/token."""
        return self.curve.losses[-1]

    @property
    def flops(self) -> float:
        """FLOPs of its own training."""
        return self.curve.flops[-1]

    @property
    def operator_flops(self) -> float:
        """FLOPs of the operator's own steps; 0 where nothing was learned."""
        return self.record.start.operator_flops

    @property
    def source(self) -> SourceCost | None:
        """The checkpoint that it started from."""
        return self.record.start.source

    @property
    def source_flops(self) -> float | None:
        """FLOPs of the source before this run began: 0 without a source, None where nobody counted them."""
        return 0.0 if self.source is None else self.source.flops

    def number(self, path: str) -> float:
        """The number at a dotted `path` of its settings.

        Raises:
            UserError: there is none.
        """
        return _number(self.folder, self.record, path)


@dataclass(frozen=True)
class LeftOut:
    """A folder that is not compared, and why."""

    folder: Path
    reason: str

    @property
    def note(self) -> str:
        """A line for who reads the comparison."""
        return f"left out: {self.folder.name}, {self.reason}"


def read_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[LeftOut]]:
    """Read every folder once.

    Incomplete and diverged runs, and what else lies beside runs (comparisons, logs), are left out by name.

    Raises UserError when a path does not exist, a run is damaged or contradicts itself, or when no complete
    run remains.
    """
    runs = []
    left_out = []
    faults = []
    for folder in dict.fromkeys(map(resolved, folders)):
        try:
            with reading(folder):
                run = read_run(folder)
        except UserError as error:
            faults.append((folder, str(error)))
            continue
        if isinstance(run, Run):
            runs.append(run)
        else:
            left_out.append(run)
    UserError.collect(grouped(faults))
    if not runs:
        reasons = [(item.folder, f"{item.folder}: {item.reason}") for item in left_out]
        listing = "; ".join(grouped(reasons)) or "no folder was given"
        raise UserError(
            f"no complete run to compare ({listing}). Finish a run with the command that started it: it "
            "resumes",
        )
    return _told_apart(runs), left_out


def resolved(name: str | Path) -> Path:
    """The folder that a path leads to.

    Raises:
        UserError: it is no path that can be followed.
    """
    try:
        folder = Path(name).resolve()
        folder.exists()
    except (OSError, RuntimeError) as error:  # too long a name, links in a circle, no permission
        raise UserError(f"{name}: cannot be read ({error}); give a run's folder") from None
    return folder


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs with what they change against their experiment in the names of their arms, as far as not all
    of them do.

    The control arm's budget is no change: it is what makes its FLOPs equal. Nor is what all scratch runs
    change: there is one arm to hold the others against, and the comparison tells its settings
    (`experiments.comparable`).
    """
    changed = list(map(_changes, runs))
    shared = set.intersection(*map(set, changed)) if changed else set()
    own = {}  # the labels of each run that not all have, by its number
    for number, labels in enumerate(changed):
        own[number] = [label for label in labels if label not in shared]
    of_scratch = [number for number, run in enumerate(runs) if run.arm == SCRATCH]
    if len({tuple(own[number]) for number in of_scratch}) == 1:
        own |= {number: [] for number in of_scratch}
    renamed = []
    for number, run in enumerate(runs):
        arm = "-".join([run.arm, *own[number]])
        renamed.append(replace(run, arm=arm))
    return renamed


def _changes(run: Run) -> list[str]:
    """The changes that tell the run's arm apart.

    None where growth.name was given by hand, which says so by naming the leaf beside it.
    """
    labels = run.record.changes
    by_hand = any(label.startswith("growth_") for label in labels)
    return [] if by_hand else [label for label in labels if not _of_control(run, label)]


def _of_control(run: Run, label: str) -> bool:
    return run.arm in CONTROLS and label.startswith("budget_tokens")


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - most
    rest = f" and {more} more" if more > 0 else ""
    return ", ".join(names[:most]) + rest


def grouped(faults: Sequence[tuple[Path, str]]) -> list[str]:
    """One sentence for each fault, however many folders have it: the fault of sixteen runs is one line."""
    folders: dict[str, list[Path]] = defaultdict(list)
    for folder, fault in faults:
        same = fault.replace(str(folder), "…")
        folders[same].append(folder)
    alone, several = [], []
    for fault, having in folders.items():
        names = listed([folder.name for folder in having])
        if len(having) == 1:
            alone.append(fault.replace("…", str(having[0])))
        else:
            several.append(f"{len(having)} runs ({names}): {fault}")
    return alone + several


def read_run(folder: Path) -> Run | LeftOut:
    """The run in `folder`, or why it is left out.

    Raises UserError when nothing is there, it is damaged or contradicts itself.
    """
    if not folder.exists():
        raise UserError(f"{folder}: there is nothing; expected a folder that `outgrow train` wrote")
    if not (folder / "run.json").is_file():
        return LeftOut(
            folder,
            "a comparison" if (folder / "comparison.json").is_file() else "no run: it has no run.json",
        )
    record = RunRecord.read(folder / "run.json", RUN_AGAIN)
    if not (folder / "summary.json").exists():
        return LeftOut(folder, f"incomplete: no summary.json, {_progress(folder, record)}")
    curve = _read_curve(folder / "metrics.jsonl")
    if not all(map(math.isfinite, curve.losses)):
        return LeftOut(folder, "diverged: its validation loss is not finite")
    summary = Summary.read(folder / "summary.json", RUN_AGAIN)
    if summary.metrics not in (None, sha256((folder / "metrics.jsonl").read_bytes()).hexdigest()):
        raise UserError(f"{folder / 'metrics.jsonl'}: it is not what it was when the run ended; {RUN_AGAIN}")
    run = Run(
        folder=folder,
        study=record.study,
        arm=record.arm,
        seed=record.seed,
        learning_rate=_number(folder, record, "optimizer.learning_rate"),
        curve=curve,
        record=record,
        summary=summary,
    )
    check_run(run)
    return run


def _number(folder: Path, record: RunRecord, path: str) -> float:
    """The number at a dotted `path` of the settings of a record."""
    value = record.setting(path)
    if not is_number(value):
        raise UserError(f"{folder}: settings.{path} is {value!r}; expected what `outgrow train` writes")
    return float(value)


def check_run(run: Run) -> None:
    """Check the folder's three files against each other.

    Raises UserError with every contradiction at once.
    """
    summary = run.summary
    flops = run.flops
    first = run.curve.losses[0]
    last = run.final_loss
    begin = run.curve.tokens[0]
    tokens = run.curve.tokens[-1]
    planned = run.record.planned_flops(tokens)
    pairs = [
        ("evaluations begin at token", begin, "a curve begins at", 0),
        ("summary.json's start_val_loss is", summary.start_val_loss, "the first evaluation says", first),
        ("summary.json's final_val_loss is", summary.final_val_loss, "the last evaluation says", last),
        ("summary.json's tokens are", summary.tokens, "the last evaluation was at", tokens),
        ("summary.json's FLOPs are", summary.flops, "the last evaluation was at", flops),
        ("the FLOPs counted are", flops, "tokens × FLOPs per token give", planned),
    ]
    faults = []
    for claim, value, other, expected in pairs:
        if not math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9):
            faults.append(f"{claim} {value:.10g}, but {other} {expected:.10g}")
    if faults:
        listing = "; ".join(faults)
        raise UserError(
            f"{run.folder} contradicts itself: {listing}. Its files were edited or mixed; run it "
            "again elsewhere",
        )


def _read_curve(path: Path) -> Curve:
    evaluations = read_evaluations(path, RUN_AGAIN)
    if len(evaluations) < 2:
        raise UserError(
            f"{path}: {len(evaluations)} evaluations; a curve needs one at step 0 and one at the end; "
            f"{RUN_AGAIN}",
        )
    tokens = tuple(evaluation.tokens for evaluation in evaluations)
    flops = tuple(evaluation.flops for evaluation in evaluations)
    losses = tuple(evaluation.val_loss for evaluation in evaluations)
    if any(after <= before for before, after in itertools.pairwise(tokens)):
        raise UserError(
            f"{path}: tokens do not increase from evaluation to evaluation; two runs were written into one "
            f"file; {RUN_AGAIN}",
        )
    return Curve(tokens, flops, losses)


def _progress(folder: Path, record: RunRecord) -> str:
    """The progress of an incomplete run."""
    evaluations = read_evaluations(folder / "metrics.jsonl", RUN_AGAIN)
    tokens = evaluations[-1].tokens if evaluations else 0
    return f"last evaluated at {tokens:,.0f} of {record.budget_tokens:,} tokens"
