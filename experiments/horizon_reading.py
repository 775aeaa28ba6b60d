"""The reading of a comparison that its picture shows: how the source is counted, where each end stands, and
which lines answer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from outgrow.experiments.horizon_answer import best_grown, control_of, is_control, is_grown, merit
from outgrow.experiments.horizons import Speedup, Worth
from outgrow.experiments.runs import SCRATCH

FEW, FEWER = 4, 3  # grown lines that stand out, and how many do among more than MANY lines
MANY = 12
SAME = 0.02  # of a horizon: the control's budgets are whole steps, so that it comes near the others' only

Line = tuple[str, str]  # arm, optimizer


@dataclass(frozen=True)
class Reading:
    """The rows of a comparison, read with the source's training counted, or left out."""

    rows: Sequence[Worth]
    source_paid: bool

    def speedup(self, row: Worth) -> Speedup:
        return row.speedup(source_paid=self.source_paid)

    def merit(self, row: Worth) -> tuple[bool, int, float, float]:
        return merit(row, source_paid=self.source_paid)

    def teraflop(self, row: Worth) -> float:
        return row.point.cost(source_paid=self.source_paid) / 1e12

    def horizon(self, row: Worth) -> float:
        """Tokens a parameter; of the control those that scratch reads for its FLOPs, so that ends of one cost
        stand above each other.
        """
        point = row.point
        if not is_control(row, self.rows):
            return point.tokens_per_parameter
        scratch = next(other.point for other in self.rows if other.point.arm == SCRATCH)
        own = point.flops / scratch.flops * scratch.tokens_per_parameter
        nearest = min(self.horizons, key=lambda horizon: abs(horizon - own))
        return nearest if abs(nearest - own) < SAME * own else own

    @cached_property
    def horizons(self) -> set[float]:
        """Tokens a parameter at which scratch and what grew have ends."""
        large = [row.point for row in self.rows if not is_control(row, self.rows)]
        return {point.tokens_per_parameter for point in large}

    @property
    def best(self) -> Worth | None:
        """The end that the headline is about."""
        return best_grown(self.rows, source_paid=self.source_paid)


def by_line(rows: Sequence[Worth]) -> dict[Line, list[Worth]]:
    """The ends of each line in the order of their tokens; lines by name."""
    lines: dict[Line, list[Worth]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.point.tokens):
        lines[line_of(row)].append(row)
    return dict(sorted(lines.items()))


def line_of(row: Worth) -> Line:
    """The line that an end belongs to."""
    return row.point.arm, row.point.optimizer


def lines_that_answer(reading: Reading, lines: dict[Line, list[Worth]]) -> set[Line]:
    """The lines that stand out: scratch's, that of the control in the answer, the grown one of the headline,
    and the grown ones that are worth most at the longest horizon that half of them share.
    """
    best = reading.best
    if best is None:
        return set(lines)
    control = control_of(best, reading.rows, source_paid=reading.source_paid)
    scratch = {line for line in lines if line[0] == SCRATCH}
    few = FEW if len(lines) <= MANY else FEWER
    chosen = list(dict.fromkeys(map(line_of, _by_worth(reading, lines))))
    return scratch | set(chosen[:few]) | {(control.arm, control.optimizer)}


def _by_worth(reading: Reading, lines: dict[Line, list[Worth]]) -> list[Worth]:
    """Ends of the grown lines, first those that answer: the headline's, then the best of the shared horizon,
    then the last ends of all.
    """
    grown = [ends for ends in lines.values() if is_grown(ends[-1], reading.rows)]
    having = Counter(row.point.tokens for ends in grown for row in ends)
    common = [tokens for tokens, count in having.items() if 2 * count >= len(grown)]
    shared = max(common, default=0)
    there = [row for ends in grown for row in ends if row.point.tokens == shared]
    last = [ends[-1] for ends in grown]
    there.sort(key=reading.merit, reverse=True)
    last.sort(key=reading.merit, reverse=True)
    return [last[0], *there, *last]
