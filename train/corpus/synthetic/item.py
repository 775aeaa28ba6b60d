"""The product of a template: a text, and the program that proves it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from outgrow.train.corpus.synthetic.operation import fill
from outgrow.train.corpus.synthetic.problem import Problem


@dataclass(frozen=True)
class Item:
    """`program` holds all code of the text and asserts what the text says.

    Where it prints, `prints` is what it has to print; None: anything.
    """

    text: str
    program: str
    prints: str | None = ""


def opening(problem: Problem, random: Random) -> str:
    """A sentence that leads in, for the audience."""
    template = random.choice(problem.audience.openings)
    return fill(template, theme=problem.theme.name)


def input_of(problem: Problem) -> str:
    """The argument of the function: "`rainfall`, a list of readings"."""
    holds = problem.theme.parameter(problem.takes)[1]
    kind = {
        "numbers": "a list of whole numbers",
        "number": "a whole number",
        "text": "a text",
        "words": "a list of words",
        "table": "a dictionary",
        "grid": "a list of rows",
    }[problem.takes]
    return f"`{problem.parameter}`, {kind} ({holds})"


def in_order(tasks: list[str]) -> str:
    """The instructions as one sentence without its full stop."""
    if len(tasks) == 1:
        return tasks[0]
    if len(tasks) == 2:
        return f"first {tasks[0]}; then {tasks[1]}"
    first, *between, last = tasks
    return f"first {first}; then {'; then '.join(between)}; finally {last}"


def numbered(entries: Iterable[str]) -> str:
    """A numbered list in Markdown."""
    lines = [f"{number}. {entry}" for number, entry in enumerate(entries, 1)]
    return "\n".join(lines)


def capital(sentence: str) -> str:
    """The sentence with a capital at its beginning."""
    return sentence[:1].upper() + sentence[1:]


def fenced(code: str) -> str:
    """Code as a Markdown block."""
    return f"```python\n{code}\n```"


def shown(problem: Problem, case: int) -> str:
    """One case as the interactive interpreter shows it."""
    return f">>> {problem.call(case)}\n{problem.result(case)!r}"


def trace(problem: Problem, case: int) -> list[str]:
    """The values of the variables, step by step."""
    argument, results = problem.cases[case]
    lines = [f"`{problem.parameter}` is `{argument!r}`"]
    return lines + [
        f"`{step.y}` becomes `{result!r}`" for step, result in zip(problem.steps, results, strict=True)
    ]


def slips(problem: Problem) -> list[tuple[int, int, Any]]:
    """(step, case, wrong result) where a step has a slip, and the first case in which it shows without an
    error."""
    mistakes = []
    for i, step in enumerate(problem.steps):
        if step.operation.slip is None:
            continue
        for number in range(len(problem.cases)):
            wrong = _slipped(problem, i, number)
            if wrong is not None and wrong != problem.result(number):
                mistakes.append((i, number, wrong))
                break
    return mistakes


def _slipped(problem: Problem, wrong: int, case: int) -> Any:
    """The result with one slip; None where that is an error or cannot be shown."""
    value = problem.cases[case][0]
    try:
        for i, step in enumerate(problem.steps):
            style = "slipped" if i == wrong else "loop"
            value = step.operation.run(style, value, step.constants)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None
    return value if len(repr(value)) < 110 else None
