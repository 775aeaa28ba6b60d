"""Templates of short textbook sections around a problem, as `exercises` has of exercises."""

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
from outgrow.train.corpus.synthetic.operation import KINDS
from outgrow.train.corpus.synthetic.problem import OTHER, Problem

NAMES = ("Ada", "Ben", "Chiara", "Dilan", "Edda", "Farid", "Greta", "Ivo", "Jun", "Kofi", "Lena", "Noor")


def section(problem: Problem, random: Random) -> Item:
    """Idea, example, what happens inside, a question with its answer."""
    ideas = " ".join(problem.whys())
    steps = "\n".join(f"- {line}" for line in trace(problem, 0))
    last = len(problem.cases) - 1
    text = (
        f"## {_title(problem)}\n\n{opening(problem, random)} {ideas}\n\nAs an example, take "
        f"{input_of(problem)}. We want to {in_order(problem.tasks())}. In "
        f"Python:\n\n{fenced(problem.function())}\n\nWhat happens inside, for one "
        f"argument:\n\n{steps}\n\n**Question.** What does `{problem.call(last)}` return?\n\n**Answer.** "
        f"`{problem.result(last)!r}`.\n"
    )
    return Item(text, problem.program())


def worked(problem: Problem, random: Random) -> Item:
    """A section from the question to a plan, to a program, to a check."""
    plan = numbered(f"{capital(task)}." for task in problem.tasks())
    notes = "\n\n".join(
        f"*{capital(step.operation.topic)}.* {why}"
        for step, why in zip(problem.steps, problem.whys(), strict=True)
    )
    text = (
        f"## Worked example: {problem.theme.name}\n\n{opening(problem, random)} The data is "
        f"{input_of(problem)}.\n\n**Plan.**\n\n{plan}\n\n**Program.** "
        f"The type of the argument is `{KINDS[problem.takes]}`, that of the result "
        f"`{KINDS[problem.gives]}`.\n\n{fenced(problem.function())}\n\n"
        f"**Check.**\n\n{fenced(shown(problem, 0))}\n\n{notes}\n"
    )
    return Item(text, problem.program())


def two_ways(problem: Problem, random: Random) -> Item:
    """A loop and an expression side by side."""
    text = (
        f"## Two ways to write it: {_topics(problem)}\n\n{opening(problem, random)} Given "
        f"{input_of(problem)}, we want to {in_order(problem.tasks())}. With loops, every step is in "
        f"sight:\n\n{fenced(problem.function('loop'))}\n\nThe same in a shorter "
        f"form:\n\n{fenced(problem.function('short'))}\n\nBoth return `{problem.result(1)!r}` for "
        f"`{problem.cases[1][0]!r}`. {problem.whys()[0]} Prefer the form that you can still read in half a "
        "year.\n"
    )
    return Item(
        text,
        f"{problem.function()}\n{problem.asserts()}\n{problem.function(OTHER[problem.style])}\n{problem.asserts()}",
    )


def pitfall(problem: Problem, random: Random) -> Item | None:
    """A mistake that is often made, what it does, and how to avoid it."""
    mistakes = slips(problem)
    if not mistakes:
        return None
    step, case, wrong = random.choice(mistakes)
    operation = problem.steps[step].operation
    assert operation.slip is not None
    why = operation.why["loop"]  # in which slips are made
    effect = operation.slip.effect
    for name, value in problem.steps[step].constants.items():
        effect = effect.replace(f"${name}", repr(value))
    slipped = problem.function("loop", wrong=step)
    right = problem.function("loop")
    text = (
        f"## A common mistake: {operation.topic}\n\n{opening(problem, random)} Somebody wants to "
        f"{in_order(problem.tasks())}, and writes for {input_of(problem)}:\n\n{fenced(slipped)}\n\nThis runs "
        f"without an error and still is wrong: {effect}. For `{problem.cases[case][0]!r}` it returns "
        f"`{wrong!r}`, where `{problem.result(case)!r}` is right. {why}\n\nThe right "
        f"version:\n\n{fenced(right)}\n"
    )
    call = problem.call(case)
    mistake = f"{slipped}\nassert {call} == {wrong!r}"
    return Item(text, f"{mistake}\n{right}\n{problem.asserts()}")


def dialogue(problem: Problem, random: Random) -> Item:
    """Two people build the program step by step."""
    asks, tells = random.sample(NAMES, 2)
    turns = []
    starts = ("How do I begin?", "And then?", "What is left to do?")
    argument, results = problem.cases[0]
    steps = zip(starts, problem.tasks(), problem.whys(), results, strict=False)
    for start, task, why, result in steps:
        reply = f"{capital(task)}. {why}"
        turns.append(f'{asks}: "{start}"\n\n{tells}: "{reply}"')
        turns.append(
            f'{asks}: "So for `{argument!r}` I have `{result!r}` after this step?"\n\n{tells}: "Exactly."'
        )
    text = (
        (
            f"## A conversation about {_topics(problem)}\n\n{opening(problem, random)} {asks} has "
            f"{input_of(problem)} and asks {tells} for help.\n\n"
        )
        + "\n\n".join(turns)
        + f"\n\nIn the end they have written:\n\n{fenced(problem.function())}\n"
    )
    return Item(text, problem.program())


def summary(problem: Problem, random: Random) -> Item:
    """Questions and answers that sum up what was learnt."""
    topics = [step.operation.topic for step in problem.steps]
    questions = [
        f"**What is worth remembering about {topic}?** {why}"
        for topic, why in zip(topics, problem.whys(), strict=True)
    ]
    calls = [
        f"**What is `{problem.name}` of `{problem.cases[i][0]!r}`?** It is `{problem.result(i)!r}`."
        for i in range(min(2, len(problem.cases)))
    ]
    mixed = questions + calls
    random.shuffle(mixed)
    text = (
        (
            f"## Summary and questions: {_topics(problem)}\n\n{opening(problem, random)} The function of "
            f"this section is given {input_of(problem)}; its task was to "
            f"{in_order(problem.tasks())}.\n\n{fenced(problem.function())}\n\n"
        )
        + "\n\n".join(mixed)
        + "\n"
    )
    return Item(text, problem.program())


def _topics(problem: Problem) -> str:
    topics = [step.operation.topic for step in problem.steps]
    return " and ".join(dict.fromkeys(topics))


def _title(problem: Problem) -> str:
    return capital(_topics(problem))


TEMPLATES: dict[str, Callable[[Problem, Random], Item | None]] = {
    template.__name__: template for template in (section, worked, two_ways, pitfall, dialogue, summary)
}
