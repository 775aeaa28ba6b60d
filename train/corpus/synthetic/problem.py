"""A problem: one to three operations in a row on a value of a theme, with cases whose results come from the
other way of writing them."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random
from textwrap import indent
from typing import Any

from outgrow.train.corpus.synthetic.operation import KINDS, Operation, fill, read_operations
from outgrow.train.corpus.synthetic.themes import AUDIENCES, EMPTY, THEMES, Audience, Theme

FILES = ("lists.yaml", "sums.yaml", "digits.yaml", "texts.yaml", "dictionaries.yaml")
OPERATIONS = tuple(operation for file in FILES for operation in read_operations(file))
TAKING = {kind: tuple(operation for operation in OPERATIONS if operation.takes == kind) for kind in KINDS}
LENGTHS = (1, 2, 2, 3, 3, 3)  # of a chain of operations, drawn evenly
LARGEST = 110  # characters of a value that is shown
OTHER = {"loop": "short", "short": "loop"}


@dataclass(frozen=True)
class Step:
    """An operation with its parameters, and the names it reads and writes."""

    operation: Operation
    given: Mapping[str, Any]
    x: str
    y: str

    def says(self, items: str) -> str:
        return fill(
            self.operation.says,
            items=items,
            it=items,
            **{name: repr(value) for name, value in self.given.items()},
        )


@dataclass(frozen=True)
class Problem:
    """What an exercise is about. `cases` are (argument, results of each step)."""

    theme: Theme
    audience: Audience
    steps: tuple[Step, ...]
    style: str  # in which it is solved: "loop" or "short"
    cases: tuple[tuple[Any, tuple[Any, ...]], ...]

    @property
    def takes(self) -> str:
        return self.steps[0].operation.takes

    @property
    def gives(self) -> str:
        return self.steps[-1].operation.gives

    @property
    def name(self) -> str:
        return "_then_".join(step.operation.name for step in self.steps)

    @property
    def parameter(self) -> str:
        return self.steps[0].x

    @property
    def signature(self) -> str:
        takes = KINDS[self.takes]
        gives = KINDS[self.gives]
        return f"def {self.name}({self.parameter}: {takes}) -> {gives}:"

    @property
    def level(self) -> int:
        """1 (one easy step) to 5."""
        hardest = max(step.operation.level for step in self.steps)
        return min(5, hardest + len(self.steps) - 1)

    def tasks(self) -> list[str]:
        """What each step does, as an instruction."""
        first = self.theme.parameter(self.takes)[1].split(",")[0]
        return [
            step.says(first if i == 0 else _later(step.operation.takes)) for i, step in enumerate(self.steps)
        ]

    def whys(self, style: str | None = None) -> list[str]:
        """A sentence about each step, true beside the program in this style."""
        return [step.operation.why[style or self.style] for step in self.steps]

    def code(self, style: str | None = None, *, wrong: int | None = None) -> str:
        """The statements of the function's body; step `wrong` with its slip."""
        parts = []
        for number, step in enumerate(self.steps):
            write = step.operation.short_code
            if number == wrong:
                write = step.operation.slipped_code
            elif (style or self.style) == "loop":
                write = step.operation.loop_code
            parts.append(write(step.x, step.y, step.given))
        return "\n".join([*parts, f"return {self.steps[-1].y}"])

    def function(self, style: str | None = None, *, doc: str = "", wrong: int | None = None) -> str:
        """The function, after the imports that it needs."""
        needed = sorted(
            {
                step.operation.module
                for step in self.steps
                if step.operation.module and (style or self.style) == "short"
            }
        )
        body = (f'"""{doc}"""\n' if doc else "") + self.code(style, wrong=wrong)
        imports = "".join(f"import {name}\n" for name in needed)
        return f"{imports}{self.signature}\n{indent(body, '    ')}"

    def call(self, case: int) -> str:
        return f"{self.name}({self.cases[case][0]!r})"

    def result(self, case: int) -> Any:
        return self.cases[case][1][-1]

    def asserts(self) -> str:
        numbers = range(len(self.cases))
        return "\n".join(f"assert {self.call(case)} == {self.result(case)!r}" for case in numbers)


def draw_problem(random: Random) -> Problem:
    """A problem that is worth setting: each step changes the result, and no value is too large to show."""
    while True:
        theme = random.choice(THEMES)
        style = random.choice(("loop", "short"))
        steps = _draw_steps(theme, random.choice(LENGTHS), random)
        cases = _draw_cases(theme, steps, style, random)
        if cases is not None:
            return Problem(theme, random.choice(AUDIENCES), steps, style, cases)


def _draw_steps(theme: Theme, length: int, random: Random) -> tuple[Step, ...]:
    kind = random.choice(("numbers", "numbers", "words", "words", "text", "table", "grid", "number"))
    x = theme.parameter(kind)[0]
    steps = list[Step]()
    chain: list[Operation] = []
    for _ in range(length):
        chain.append(random.choice([operation for operation in TAKING[kind] if operation not in chain]))
        kind = chain[-1].gives
    for i, operation in enumerate(chain):
        constants = {name: random.choice(values) for name, values in operation.values.items()}
        y = _free_name(
            operation.out,
            {x, theme.parameter(chain[0].takes)[0], *(_locals(chain[i + 1]) if i + 1 < length else ())},
        )
        steps.append(Step(operation, constants, x, y))
        x = y
    return tuple(steps)


def _free_name(wanted: str, taken: set[str]) -> str:
    return wanted if wanted not in taken else f"{wanted}_now"


@cache
def _locals(operation: Operation) -> frozenset[str]:
    """The names that the operation's own loop uses."""
    return frozenset(re.findall(r"(?<![\w$.])[a-z_]+\b", operation.loop)) - frozenset(keyword.kwlist)


def _draw_cases(
    theme: Theme, steps: tuple[Step, ...], style: str, random: Random
) -> tuple[tuple[Any, tuple[Any, ...]], ...] | None:
    """Three drawn cases, and often the empty one; the results come from the style that the solution is *not*
    written in."""
    kind = steps[0].operation.takes
    values = [theme.draw(kind, random) for _ in range(3)]
    if kind in EMPTY and random.random() < 0.5:
        values.append(EMPTY[kind])
    cases = []
    for value in values:
        results, now = [], value
        for step in steps:
            now = step.operation.run(OTHER[style], now, step.given)
            if len(repr(now)) > LARGEST:
                return None
            results.append(now)
        cases.append((value, tuple(results)))
    if not _worthwhile(cases[:3]) or idle(steps, cases, OTHER[style]):
        return None
    return tuple(cases)


def _worthwhile(cases: list[tuple[Any, tuple[Any, ...]]]) -> bool:
    """Whether the results differ, and the first is not empty."""
    results = [way[-1] for _, way in cases]
    first = results[0]
    distinct = {repr(result) for result in results}
    return len(distinct) > 1 and bool(first or first == 0)


def idle(
    steps: Sequence[Step], cases: Sequence[tuple[Any, tuple[Any, ...]]], style: str
) -> list[tuple[int, int]]:
    """The runs of steps [i, j) that change the result of no case: left out, what remains computes the same.

    A run can be left out where it gives the kind of value that it takes. Sorting before a sum is idle, and so
    are two steps that undo each other.
    """
    kinds = [step.operation.takes for step in steps] + [steps[-1].operation.gives]
    pairs = combinations(range(len(kinds)), 2)
    runs = [(i, j) for i, j in pairs if kinds[i] == kinds[j]]

    def is_idle(i: int, j: int) -> bool:
        return all(_same_without(steps[j:], case, i, style) for case in cases)

    return [(i, j) for i, j in runs if is_idle(i, j)]


def _same_without(rest: Sequence[Step], case: tuple[Any, tuple[Any, ...]], first: int, style: str) -> bool:
    """Whether `rest`, run on what the steps before `first` gave, has the result of all of them."""
    value, results = case
    now = results[first - 1] if first else value
    for step in rest:
        now = step.operation.run(style, now, step.given)
    return bool(now == results[-1])


def _later(kind: str) -> str:
    """What the values of a later step are called."""
    return {
        "numbers": "numbers",
        "words": "words",
        "number": "the number",
        "text": "the text",
        "table": "entries",
        "grid": "rows",
    }[kind]
