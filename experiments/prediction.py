"""A prediction in writing: when to grow for a horizon, and what it will be worth, before it is measured.

Two grown arms or more give t_mix, the tokens after a growth until a decayed end is within EPSILON of
scratch's (experiments/recovery.py). A growth that shall have caught up at a horizon of T tokens comes at
T − t_mix, a share τ of it. With a small network that costs r of the large one for a token, the whole run then
costs τ·r + 1 − τ of scratch's, and

    S = 1 / (τ·r + 1 − τ)

A bound on t_mix is one on τ and S, and the prediction says so. t_mix is taken to be the same whenever the
network grows; where a later growth takes longer to catch up, S is too high. The prediction is written once:
with its date and commit, and not where a horizon that it is about has been measured already.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from outgrow.experiments.ends import RECORD as ENDS
from outgrow.experiments.ends import End, check_alike, read_ends
from outgrow.experiments.horizon_report import markdown_table, millions, read_inputs
from outgrow.experiments.horizons import Point, Worth, best_points, worths
from outgrow.experiments.recovery import EPSILON, MixingTime, recoveries
from outgrow.experiments.runs import SCRATCH, listed
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import read_object, write_text
from outgrow.train.run.record import read_known

RECORD, PAGE = "prediction.json", "prediction.md"
WAY_OUT = "write it with `outgrow predict`, or move it away"
Bound = Literal["", "≤", "≥"]
HEADINGS = ("horizon", "bound", "grow after", "τ", "S")
MEASURED = ("horizon", "arm", "τ predicted", "τ measured", "S predicted", "S measured")


@dataclass(frozen=True)
class Row:
    """The prediction for one horizon. `grow_tokens` 0: catching up takes the whole horizon, so growth does
    not pay there.
    """

    tokens: int
    grow_tokens: int
    share: float  # τ
    speedup: float  # S, the source's cost being that of the small network before the growth


@dataclass(frozen=True)
class Prediction:
    """A prediction with what it was made of. `bound` of τ and S: "≤" where t_mix is only known to be longer,
    "≥" where only to be shorter.
    """

    optimizer: str
    mixing_tokens: float
    bound: Bound
    relative_cost: float  # r
    arms: tuple[str, ...]  # that t_mix was measured on
    rows: tuple[Row, ...]
    date: str
    commit: str | None


def predict(ends: Sequence[End], horizons: Sequence[int], optimizer: str) -> Prediction:
    """The prediction for `horizons`, from the ends of one optimizer.

    Raises:
        UserError: a horizon is no number of tokens, the ends cannot be compared, fewer than two growths of
            known t_mix, no control of the same optimizer, or a horizon that a grown arm has been measured at.
    """
    if min(horizons) <= 0:
        raise UserError(f"--horizons {min(horizons)}: expected tokens, more than 0")
    check_alike(ends)
    points = [point for point in best_points(ends) if point.optimizer == optimizer]
    mixing, arms = _mixing(points, optimizer)
    _check_unmeasured(points, horizons)
    cost = relative_cost(points, optimizer)
    rows = tuple(_row(tokens, mixing.tokens, cost) for tokens in sorted(horizons))
    bounds: dict[str, Bound] = {"": "", ">": "≤", "≤": "≥"}
    bound = bounds[mixing.bound]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Prediction(optimizer, mixing.tokens, bound, cost, arms, rows, date, _commit())


def _mixing(points: Sequence[Point], optimizer: str) -> tuple[MixingTime, tuple[str, ...]]:
    """The longest t_mix of the growths of `points`; a bound from below where one of them has one that is
    longer.
    """
    measured = recoveries(points, SCRATCH) if points else []
    by_arm = {}
    moments = set()
    for recovery in measured:
        if recovery.mixing is not None:
            by_arm[recovery.point.arm] = recovery.mixing
            moments.add(recovery.growth.tokens)
    if len(moments) < 2:
        raise UserError(
            f"{optimizer}: t_mix of {len(moments)} moments of growth is known, and a prediction needs two: "
            "arms that grew in their run (growth.stages) with ends where scratch has some too"
        )
    times = list(by_arm.values())
    longest = max(times, key=lambda time: time.tokens)
    return longest, tuple(sorted(by_arm))


def _check_unmeasured(points: Iterable[Point], horizons: Sequence[int]) -> None:
    measured = {point.tokens for point in points if point.ends[0].growth is not None}
    late = sorted(measured & set(horizons))
    if late:
        listed = ", ".join(map(str, late))
        raise UserError(
            f"grown arms have ends at {listed} tokens already: a prediction is written before the measurement"
        )


def relative_cost(points: Sequence[Point], optimizer: str) -> float:
    """r: FLOPs of a token of the small network, relative to the large one's."""
    largest = max(point.parameters for point in points)
    own = [point for point in points if point.parameters < largest]
    scratch = [point for point in points if point.arm == SCRATCH]
    if not own or not scratch:
        raise UserError(f"{optimizer}: no control and scratch, whose costs of a token are compared")
    small = own[0]
    large = scratch[0]
    small_token = small.flops / small.tokens
    large_token = large.flops / large.tokens
    return small_token / large_token


def _row(tokens: int, mixing: float, cost: float) -> Row:
    grow = max(0, round(tokens - mixing))
    share = grow / tokens
    paid = share * cost + 1.0 - share  # of scratch's FLOPs
    return Row(tokens, grow, share, 1.0 / paid)


def _commit() -> str | None:
    """The commit of the working directory's clone; None outside of one."""
    try:
        process = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


def write(inputs: Sequence[str], horizons: Sequence[int], optimizer: str, out: Path) -> list[str]:
    """Write the prediction into `out`, once, and return what a reader should see.

    Raises:
        UserError: `out` holds a prediction, or none can be made of `inputs`.
    """
    record = out / RECORD
    if record.exists():
        raise UserError(f"{record}: a prediction is written once; choose another --out for a new one")
    _, ends, left_out = read_inputs(inputs)
    prediction = predict(ends, horizons, optimizer)
    write_text(out / PAGE, markdown(prediction))
    text = json.dumps(asdict(prediction), indent=1, ensure_ascii=False)
    write_text(record, f"{text}\n")
    notes = [folder.note for folder in left_out]
    return [markdown(prediction), *notes, f"  {out / PAGE}", f"  {record}"]


def markdown(prediction: Prediction) -> str:
    """The page of a prediction."""
    bound = {"": "=", "≤": ">", "≥": "≤"}[prediction.bound]
    rows = [
        [
            millions(row.tokens),
            prediction.bound,
            millions(row.grow_tokens) if row.grow_tokens else "never",
            f"{row.share:.2f}",
            f"{row.speedup:.2f}",
        ]
        for row in prediction.rows
    ]
    return (
        f"Predicted on {prediction.date} at commit {prediction.commit or 'unknown'}, with "
        f"{prediction.optimizer}: t_mix {bound} {millions(prediction.mixing_tokens)} tokens until within "
        f"{EPSILON} nats (the longest of {', '.join(prediction.arms)}); a token of the small network costs "
        f"{prediction.relative_cost:.2f} of one of the large.\n\n{markdown_table(HEADINGS, rows)}"
    )


def read_prediction(path: Path) -> Prediction:
    """The prediction that `write` wrote.

    Raises:
        UserError: the file is something else.
    """
    faults: list[str] = []
    values = read_object(path, WAY_OUT)
    prediction = read_known(Prediction, values, "", faults)
    if prediction is not None:
        faults += [
            f"rows: {row.tokens} tokens, expected more than 0" for row in prediction.rows if row.tokens <= 0
        ]
    if prediction is None or faults:
        raise UserError(f"{path}: no prediction ({listed(faults, 3)}); {WAY_OUT}")
    return prediction


def measured_beside(prediction: Prediction, rows: Sequence[Worth]) -> str | None:
    """A table of the predicted and the measured: at each horizon the arm that grew nearest to the predicted
    moment. None where no arm that grew has been measured there yet.
    """
    lines = []
    for row in prediction.rows:
        own = [worth for worth in rows if _is_measured(worth, row, prediction.optimizer)]
        if not own:
            continue
        nearest = min(own, key=lambda worth: abs(_grown_after(worth) - row.grow_tokens))
        speedup = nearest.speedup_included
        lines.append(
            [
                millions(row.tokens),
                nearest.point.arm,
                f"{row.share:.2f}",
                f"{_grown_after(nearest) / row.tokens:.2f}",
                f"{prediction.bound} {row.speedup:.2f}".strip(),
                "out of range" if speedup is None else f"{speedup:.2f}",
            ]
        )
    return f"Predicted on {prediction.date}:\n\n{markdown_table(MEASURED, lines)}" if lines else None


def write_measured(folder: Path) -> str:
    """Put what was measured since beside the prediction in `folder`, whose record of ends is there, into its
    page; return that table.

    Raises:
        UserError: a record is damaged.
    """
    prediction = read_prediction(folder / RECORD)
    table = measured_beside(prediction, worths(read_ends(folder / ENDS)))
    page = markdown(prediction)
    write_text(folder / PAGE, page if table is None else f"{page}\n{table}")
    return table or f"{folder / RECORD}: none of its horizons has been measured yet"


def _grown_after(worth: Worth) -> int:
    """The tokens after which a run grew, the last time if several."""
    growth = worth.point.ends[0].growth
    assert growth is not None
    return growth.tokens


def _is_measured(worth: Worth, row: Row, optimizer: str) -> bool:
    point = worth.point
    is_grown = point.ends[0].growth is not None
    is_asked = point.optimizer == optimizer and point.tokens == row.tokens
    return is_grown and is_asked
