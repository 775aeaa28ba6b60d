"""A problem: one to three operations in a row on a value of a theme, with cases whose results come from the
other way of writing them."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations, zip_longest
from random import Random
from textwrap import indent
from typing import Any

from outgrow.train.corpus.synthetic.operation import KINDS, Operation, fill, read_operations
from outgrow.train.corpus.synthetic.themes import AUDIENCES, EMPTY, THEMES, Audience, Theme

FILES = ("lists.yaml", "sums.yaml", "digits.yaml", "texts.yaml", "dictionaries.yaml")
OPERATIONS = tuple(chain.from_iterable(map(read_operations, FILES)))


def _taking(kind: str) -> tuple[Operation, ...]:
    """The operations on a kind of value."""
    return tuple(operation for operation in OPERATIONS if operation.takes == kind)


TAKING = {kind: _taking(kind) for kind in KINDS}
LENGTHS = (1, 2, 2, 3, 3, 3)  # of a chain of operations, drawn evenly
LARGEST = 110  # characters of a value that is shown
OTHER = {"loop": "short", "short": "loop"}
# the values of a step that is not the first, by their kind
LATER = {
    "numbers": "numbers",
    "words": "words",
    "number": "the number",
    "text": "the text",
    "table": "entries",
    "grid": "rows",
}
Case = tuple[Any, tuple[Any, ...]]  # an argument, and the results of each step


@dataclass(frozen=True)
class Step:
    """An operation with its parameters, and the names it reads and writes."""

    operation: Operation
    constants: Mapping[str, Any]
    x: str
    y: str

    def says(self, items: str) -> str:
        constants = {name: repr(value) for name, value in self.constants.items()}
        return fill(self.operation.says, items=items, it=items, **constants)


@dataclass(frozen=True)
class Problem:
    """The subject of an exercise."""

    theme: Theme
    audience: Audience
    steps: tuple[Step, ...]
    style: str  # in which it is solved: "loop" or "short"
    cases: tuple[Case, ...]

    @property
    def takes(self) -> str:
        return self.steps[0].operation.takes

    @property
    def gives(self) -> str:
        return self.steps[-1].operation.gives

    @property
    def name(self) -> str:
        names = [step.operation.name for step in self.steps]
        return "_then_".join(names)

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
        """An instruction for each step."""
        _, description = self.theme.parameter(self.takes)
        items, _, _ = description.partition(",")
        first, *later = self.steps
        tasks = [first.says(items)]
        for step in later:
            items = LATER[step.operation.takes]
            tasks.append(step.says(items))
        return tasks

    def whys(self, style: str | None = None) -> list[str]:
        """A sentence about each step, true beside the program in this style."""
        own = style or self.style
        return [step.operation.why[own] for step in self.steps]

    def code(self, style: str | None = None, *, wrong: int | None = None) -> str:
        """The statements of the function's body; step `wrong` with its slip."""
        in_loops = (style or self.style) == "loop"
        parts = []
        for number, step in enumerate(self.steps):
            operation = step.operation
            write = operation.loop_code if in_loops else operation.short_code
            if number == wrong:
                write = operation.slipped_code
            code = write(step.x, step.y, step.constants)
            parts.append(code)
        last = self.steps[-1]
        parts.append(f"return {last.y}")
        return "\n".join(parts)

    def function(self, style: str | None = None, *, doc: str = "", wrong: int | None = None) -> str:
        """The function, after the imports that it needs."""
        modules: set[str | None] = set()
        if (style or self.style) == "short":
            modules = {step.operation.module for step in self.steps}
        needed = sorted(filter(None, modules))
        lines = [f"import {module}\n" for module in needed]
        imports = "".join(lines)
        title = f'"""{doc}"""\n' if doc else ""
        code = self.code(style, wrong=wrong)
        body = indent(f"{title}{code}", "    ")
        return f"{imports}{self.signature}\n{body}"

    def call(self, case: int) -> str:
        argument, _ = self.cases[case]
        return f"{self.name}({argument!r})"

    def result(self, case: int) -> Any:
        _, results = self.cases[case]
        return results[-1]

    def asserts(self) -> str:
        numbers = range(len(self.cases))
        lines = [f"assert {self.call(case)} == {self.result(case)!r}" for case in numbers]
        return "\n".join(lines)

    def program(self) -> str:
        """The function, and the asserts that check it."""
        return f"{self.function()}\n{self.asserts()}"


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
    """A chain of operations, each on the kind of value that the one before it gives."""
    kind = random.choice(("numbers", "numbers", "words", "words", "text", "table", "grid", "number"))
    parameter, _ = theme.parameter(kind)
    operations: list[Operation] = []
    for _ in range(length):
        unused = [operation for operation in TAKING[kind] if operation not in operations]
        operation = random.choice(unused)
        operations.append(operation)
        kind = operation.gives
    steps: list[Step] = []
    x = parameter
    for operation, following in zip_longest(operations, operations[1:]):
        constants = {name: random.choice(values) for name, values in operation.values.items()}
        names = {x, parameter}
        if following is not None:
            names |= _locals(following)
        y = operation.out
        if y in names:
            y = f"{y}_now"
        steps.append(Step(operation, constants, x, y))
        x = y
    return tuple(steps)


@cache
def _locals(operation: Operation) -> frozenset[str]:
    """The names that the operation's own loop uses."""
    words = re.findall(r"(?<![\w$.])[a-z_]+\b", operation.loop)
    return frozenset(words) - frozenset(keyword.kwlist)


def _draw_cases(theme: Theme, steps: tuple[Step, ...], style: str, random: Random) -> tuple[Case, ...] | None:
    """Three drawn cases, and often the empty one; the results come from the style that the solution is *not*
    written in."""
    kind = steps[0].operation.takes
    values = [theme.draw(kind, random) for _ in range(3)]
    if kind in EMPTY and random.random() < 0.5:
        values.append(EMPTY[kind])
    other = OTHER[style]
    cases: list[Case] = []
    for value in values:
        results = []
        now = value
        for step in steps:
            now = step.operation.run(other, now, step.constants)
            if len(repr(now)) > LARGEST:
                return None
            results.append(now)
        cases.append((value, tuple(results)))
    drawn = cases[:3]
    if not _worthwhile(drawn) or idle(steps, cases, other):
        return None
    return tuple(cases)


def _worthwhile(cases: list[Case]) -> bool:
    """Check whether the results differ, and the first is not empty."""
    ends = [results[-1] for _, results in cases]
    first = ends[0]
    is_empty = not first and first != 0
    distinct = set(map(repr, ends))
    return len(distinct) > 1 and not is_empty


def idle(steps: Sequence[Step], cases: Sequence[Case], style: str) -> list[tuple[int, int]]:
    """The runs of steps [i, j) that change the result of no case: left out, what remains computes the same.

    A run can be left out where it gives the kind of value that it takes. Sorting before a sum is idle, and so
    are two steps that undo each other.
    """
    kinds = [step.operation.takes for step in steps]
    kinds.append(steps[-1].operation.gives)

    def is_idle(i: int, j: int) -> bool:
        rest = steps[j:]
        return all(_same_without(rest, case, i, style) for case in cases)

    runs = combinations(range(len(kinds)), 2)
    return [(i, j) for i, j in runs if kinds[i] == kinds[j] and is_idle(i, j)]


def _same_without(rest: Sequence[Step], case: Case, first: int, style: str) -> bool:
    """Check whether `rest`, run on what the steps before `first` gave, has the result of all of them."""
    value, results = case
    now = results[first - 1] if first else value
    for step in rest:
        now = step.operation.run(style, now, step.constants)
    return bool(now == results[-1])
