"""Templates of exercises with their solutions. Each is given a problem and returns an item, or None where the
problem does not suit it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from outgrow.train.corpus.synthetic.item import (
    Item,
    capital,
    fenced,
    in_order,
    input_of,
    numbered,
    opening,
    shown,
    slips,
    trace,
)
from outgrow.train.corpus.synthetic.problem import OTHER, Problem


def docstring(problem: Problem, random: Random) -> Item:
    """A Python file: signature and docstring, completed by the body (the form of phi-1's CodeExercises)."""
    tasks = "\n".join(f"{capital(task)}." for task in problem.tasks())
    first = range(min(2, len(problem.cases)))
    examples = "\n\n".join(shown(problem, case) for case in first)
    doc = f"\n{tasks}\n\n{examples.rstrip()}\n"
    code = problem.function(doc=doc)
    asserts = problem.asserts()
    return Item(f"{code}\n\n\n{asserts}\n", f"{code}\n{asserts}")


def statement(problem: Problem, random: Random) -> Item:
    """Problem, solution, tests."""
    ask = random.choice(
        (
            "Write a function",
            "Your task is to write a function",
            "Define a function",
            "Complete the program with a function",
        )
    )
    text = (
        f"# Exercise (level {problem.level})\n\n{opening(problem, random)} {ask} `{problem.name}`. It is "
        f"given {input_of(problem)}. It shall {in_order(problem.tasks())}. The result is returned.\n\nFor "
        f"example, `{problem.call(0)}` gives `{problem.result(0)!r}`.\n\n## "
        f"Solution\n\n{fenced(problem.function())}\n\n## Tests\n\n{fenced(problem.asserts())}\n"
    )
    return Item(text, problem.program())


def explained(problem: Problem, random: Random) -> Item:
    """Problem, hints, solution, and why it works."""
    hints = numbered(problem.whys())
    steps = "\n".join(f"- {line}." for line in trace(problem, 1))
    text = (
        f"# {capital(in_order(problem.tasks()))}\n\n{opening(problem, random)} You have "
        f"{input_of(problem)}.\n\n## Hints\n\n{hints}\n\n## Solution\n\n{fenced(problem.function())}\n\n## "
        f"Why it works\n\nFollow the call `{problem.call(1)}`:\n\n{steps}\n\nSo the function returns "
        f"`{problem.result(1)!r}`.\n"
    )
    return Item(text, problem.program())


def bug(problem: Problem, random: Random) -> Item | None:
    """A function that is almost right: find the mistake."""
    mistakes = slips(problem)
    if not mistakes:
        return None
    step, case, wrong = random.choice(mistakes)
    slip = problem.steps[step].operation.slip
    assert slip is not None
    slipped = problem.function("loop", wrong=step)
    right = problem.function("loop")
    effect = slip.effect
    for name, value in problem.steps[step].constants.items():
        effect = effect.replace(f"${name}", repr(value))
    text = (
        f"# Find the mistake (level {problem.level})\n\n{opening(problem, random)} The following function "
        f"is given {input_of(problem)} and shall {in_order(problem.tasks())}.\n\n{fenced(slipped)}\n\nIt is "
        f"almost right, but `{problem.call(case)}` gives `{wrong!r}` and should give "
        f"`{problem.result(case)!r}`.\n\n## Answer\n\nWhat is wrong: {effect}. The corrected "
        f"function:\n\n{fenced(right)}\n"
    )
    call = problem.call(case)
    mistake = f"{slipped}\nassert {call} == {wrong!r}"
    return Item(text, f"{mistake}\n{right}\n{problem.asserts()}")


def predict(problem: Problem, random: Random) -> Item:
    """A program: say what it prints."""
    case = random.randrange(3)
    program = f"{problem.function()}\n\n\nprint({problem.call(case)})"
    steps = numbered(f"{line}." for line in trace(problem, case))
    text = (
        f"# What is printed?\n\n{opening(problem, random)} Read the program and say what it prints before "
        f"you run it.\n\n{fenced(program)}\n\n## Answer\n\n{steps}\n\nThe program "
        f"prints:\n\n```\n{problem.result(case)}\n```\n"
    )
    return Item(text, program, f"{problem.result(case)}\n")


def fill_in(problem: Problem, random: Random) -> Item | None:
    """A function of which one line is missing."""
    lines = problem.function().splitlines()
    inner = [
        i
        for i, line in enumerate(lines)
        if i > 0 and line.strip() not in ("else:", "break") and not line.startswith(("def", "import"))
    ]
    if len(inner) < 3:
        return None
    missing = random.choice(inner[:-1])
    line = lines[missing]
    margin = line[: len(line) - len(line.lstrip())]
    before = lines[:missing]
    after = lines[missing + 1 :]
    holed = "\n".join([*before, f"{margin}...", *after])
    text = (
        f"# Fill in the missing line\n\n{opening(problem, random)} A function is given {input_of(problem)}; "
        f"it shall {in_order(problem.tasks())}. One line of it got lost:\n\n{fenced(holed)}\n\nAn example "
        f"of what it has to do:\n\n{fenced(shown(problem, 0))}\n\n## Answer\n\nThe line is "
        f"`{lines[missing].strip()}`. The whole function:\n\n{fenced(problem.function())}\n"
    )
    return Item(text, problem.program())


def rewrite(problem: Problem, random: Random) -> Item:
    """The same function, written the other way."""
    other = OTHER[problem.style]
    wish = {"short": "in as few lines as you can", "loop": "with plain loops and conditions, step by step"}[
        other
    ]
    text = (
        f"# Say it differently\n\n{opening(problem, random)} This function is given {input_of(problem)} and "
        f"does the following: {in_order(problem.tasks())}.\n\n{fenced(problem.function())}\n\nWrite it "
        f"again, {wish}.\n\n## Solution\n\n{fenced(problem.function(other))}\n\nBoth pass the same "
        f"tests:\n\n{fenced(problem.asserts())}\n"
    )
    return Item(
        text, f"{problem.function()}\n{problem.asserts()}\n{problem.function(other)}\n{problem.asserts()}"
    )


def cover(problem: Problem, random: Random) -> Item:
    """The function is there; tests are wanted."""
    text = (
        f"# Write the tests\n\n{opening(problem, random)} A colleague has written this "
        f"function; it is given {input_of(problem)}.\n\n"
        f"{fenced(problem.function(doc=capital(in_order(problem.tasks())) + '.'))}\n\n"
        "Write tests for it that a wrong version would be unlikely to pass.\n\n"
        f"## Answer\n\n{fenced(problem.asserts())}\n"
    )
    return Item(
        text, f"{problem.function(doc=capital(in_order(problem.tasks())) + '.')}\n{problem.asserts()}"
    )


TEMPLATES: dict[str, Callable[[Problem, Random], Item | None]] = {
    template.__name__: template
    for template in (docstring, statement, explained, bug, predict, fill_in, rewrite, cover)
}
