"""A finished run as a frozen value: read from its folder, checked against itself.

The folder is written by `train`: `run.json` at the start, `metrics.jsonl` on the way, `summary.json` when complete.
Nothing here computes a comparison; a number that contradicts another number of the same folder stops here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outgrow.experiments.cost import Curve
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import read_object
from outgrow.train.start.stages import Span, flops_after

RUN_AGAIN = "the folder was edited or damaged: run it again in a new one"
SCRATCH = "scratch"
SOURCE = "source"  # the control arm: the source itself, trained on, "trained longer, not bigger"


@dataclass(frozen=True)
class Run:
    """One complete run. `curve` holds its validation losses over its own training; what came before it is apart."""

    folder: Path
    study: str
    arm: str
    seed: int
    learning_rate: float
    curve: Curve
    operator_flops: float  # the operator's own steps; 0 where nothing was learned
    source: dict[str, Any] | None  # {"path", "tokens", "flops", "val_loss"} of the checkpoint it started from
    receipt: float | None  # max |Δlogit| against the source, where it was measured
    lossless: bool | None
    record: dict[str, Any] = field(repr=False)  # run.json, whole
    summary: dict[str, Any] = field(repr=False)  # summary.json, whole

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def source_flops(self) -> float | None:
        """What the source cost before this run began: 0 without a source, None where nobody counted it."""
        return 0.0 if self.source is None else self.source.get("flops")


@dataclass(frozen=True)
class LeftOut:
    """A folder that is not compared, and why."""

    folder: Path
    reason: str


def read_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[LeftOut]]:
    """Read every folder once. Incomplete and diverged runs, and what else lies beside runs (comparisons, logs), are left out by name.

    Raises UserError when a path does not exist, a run is damaged or contradicts itself, or when no complete run remains.
    """
    runs, left_out, faults = [], [], []
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        try:
            found = read_run(folder)
        except UserError as error:
            faults.append((folder, str(error)))
            continue
        if isinstance(found, Run):
            runs.append(found)
        else:
            left_out.append(found)
    UserError.collect(grouped(faults))
    if not runs:
        named = "; ".join(grouped([(item.folder, f"{item.folder}: {item.reason}") for item in left_out])) or "no folder was given"
        raise UserError(f"no complete run to compare ({named}). Finish a run with the command that started it: it resumes")
    return _told_apart(runs), left_out


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs with what they change against their experiment in the names of their arms, as far as not all of them do.

    The control arm's budget is no change: it is what makes its FLOPs equal. Nor is what all scratch runs change: there is one arm to hold
    the others against, and the comparison tells its settings (`experiments.comparable`).
    """
    changed = [_changes(run) for run in runs]
    shared = set.intersection(*map(set, changed)) if changed else set()
    own = [[label for label in labels if label not in shared] for labels in changed]
    scratch = {tuple(labels) for run, labels in zip(runs, own, strict=True) if run.arm == SCRATCH}
    if len(scratch) == 1:
        own = [[] if run.arm == SCRATCH else labels for run, labels in zip(runs, own, strict=True)]
    return [replace(run, arm="-".join((run.arm, *labels))) for run, labels in zip(runs, own, strict=True)]


def _changes(run: Run) -> list[str]:
    """The changes that tell the run's arm apart; none where growth.name was given by hand, which says so by naming the leaf beside it."""
    labels = run.record.get("changes", ())
    by_hand = any(label.startswith("growth_") for label in labels)
    return [] if by_hand else [label for label in labels if not _of_control(run, label)]


def _of_control(run: Run, label: str) -> bool:
    return run.arm == SOURCE and label.startswith("budget_tokens")


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def grouped(faults: Sequence[tuple[Path, str]]) -> list[str]:
    """One sentence for each fault, however many folders have it: the fault of sixteen runs is one line."""
    folders: dict[str, list[Path]] = {}
    for folder, fault in faults:
        folders.setdefault(fault.replace(str(folder), "…"), []).append(folder)
    alone = {fault: has[0] for fault, has in folders.items() if len(has) == 1}
    several = [f"{len(has)} runs ({listed([folder.name for folder in has])}): {fault}" for fault, has in folders.items() if len(has) > 1]
    return [fault.replace("…", str(folder)) for fault, folder in alone.items()] + several


def read_run(folder: Path) -> Run | LeftOut:
    """The run in `folder`, or why it is left out. Raises UserError when nothing is there, it is damaged or contradicts itself."""
    if not folder.exists():
        raise UserError(f"{folder}: there is nothing; expected a folder that `outgrow train` wrote")
    if not (folder / "run.json").is_file():
        return LeftOut(folder, "a comparison" if (folder / "comparison.json").is_file() else "no run: it has no run.json")
    record = read_object(folder / "run.json", RUN_AGAIN)
    if not (folder / "summary.json").exists():
        return LeftOut(folder, f"incomplete: no summary.json, {_progress(folder, record)}")
    summary = read_object(folder / "summary.json", RUN_AGAIN)
    curve = _read_curve(folder / "metrics.jsonl")
    if not all(map(math.isfinite, curve.losses)):
        return LeftOut(folder, "diverged: its validation loss is not finite")
    try:
        run = _assemble(folder, record, summary, curve)
        check_run(run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: the entry {error} is missing or malformed; expected what `outgrow train` writes") from error
    return run


def check_run(run: Run) -> None:
    """Hold the folder's three files against each other. Raises UserError with every contradiction at once."""
    first, last, summary = run.curve.losses[0], run.curve.losses[-1], run.summary
    tokens, flops = run.curve.tokens[-1], run.curve.flops[-1]
    pairs = [
        ("evaluations begin at token", run.curve.tokens[0], "a curve begins at", 0),
        ("summary.json's start_val_loss is", summary["start_val_loss"], "the first evaluation says", first),
        ("summary.json's final_val_loss is", summary["final_val_loss"], "the last evaluation says", last),
        ("summary.json's tokens are", summary["tokens"], "the last evaluation was at", tokens),
        ("summary.json's FLOPs are", summary["flops"], "the last evaluation was at", flops),
        ("the FLOPs counted are", flops, "tokens × FLOPs per token give", planned_flops(run.record, tokens)),
    ]
    faults = [f"{a} {x:.10g}, but {b} {y:.10g}" for a, x, b, y in pairs if not math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9)]
    if faults:
        raise UserError(f"{run.folder} contradicts itself: {'; '.join(faults)}. Its files were edited or mixed; run it again elsewhere")


def planned_flops(record: dict[str, Any], tokens: float) -> float:
    """What `tokens` should have cost: the same for each token, unless the network grew on its way or was taught for a while."""
    per_step = record["tokens_per_step"]
    spans = [Span(**span) for span in record.get("spans", ())]
    return flops_after(spans, round(tokens / per_step), per_step) if spans else tokens * record["flops_per_token"]


def setting(record: dict[str, Any], path: str) -> Any:
    """The value at a dotted `path` of a run's settings, or None."""
    value: Any = record["settings"]
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _assemble(folder: Path, record: dict[str, Any], summary: dict[str, Any], curve: Curve) -> Run:
    start = record["start"]
    receipt = start.get("receipt")
    return Run(
        folder=folder,
        study=record["study"],
        arm=record["arm"],
        seed=int(record["seed"]),
        learning_rate=float(record["settings"]["optimizer"]["learning_rate"]),
        curve=curve,
        operator_flops=float(start.get("operator_flops") or 0.0),
        source=start.get("source"),
        receipt=None if receipt is None else float(receipt["max_delta"]),
        lossless=start.get("lossless"),
        record=record,
        summary=summary,
    )


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The `eval` lines of a metrics file, in order; a last line cut off in the writing is skipped.

    Raises:
        UserError: a line is no JSON object, or has no number where one should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {RUN_AGAIN}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = _evaluation(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a JSON object ({error}); {RUN_AGAIN}") from error
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: no row of a run's metrics ({error}); {RUN_AGAIN}") from error
        if entry is not None:
            entries.append(entry)
    return entries


def _evaluation(row: Any) -> dict[str, Any] | None:
    """An `eval` row with its numbers as numbers; what is not finite is NaN, whether it was written as null or as a bare NaN."""
    if not isinstance(row, dict):
        raise TypeError(f"expected an object, found {type(row).__name__}")
    if row.get("kind") != "eval":
        return None
    for key in ("tokens", "flops"):
        float(row[key])
    return row | {"val_loss": math.nan if row["val_loss"] is None else float(row["val_loss"])}


def _read_curve(path: Path) -> Curve:
    entries = read_evaluations(path)
    if len(entries) < 2:
        raise UserError(f"{path}: {len(entries)} evaluations; a curve needs one at step 0 and one at the end")
    columns: list[Sequence[float]] = [[float(entry[key]) for entry in entries] for key in ("tokens", "flops", "val_loss")]
    tokens, flops, losses = map(tuple, columns)
    if any(b <= a for a, b in itertools.pairwise(tokens)):
        raise UserError(f"{path}: tokens do not increase from evaluation to evaluation; two runs were written into one file")
    return Curve(tokens, flops, losses)


def _progress(folder: Path, record: dict[str, Any]) -> str:
    entries = read_evaluations(folder / "metrics.jsonl")
    done = entries[-1]["tokens"] if entries else 0
    return f"last evaluated at {done:,.0f} of {record.get('budget_tokens', 0):,} tokens"
