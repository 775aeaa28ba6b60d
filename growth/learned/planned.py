"""The plan of a learned growth: that of a fixed operator, with the lesson that follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from outgrow.growth.learned.lessons import LEARNED
from outgrow.growth.operators import OPERATORS, options_of
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError, did_you_mean, unknown


def learned_plan(operator: str, options: Mapping[str, Any], fixed: Callable[[str], Plan]) -> Plan:
    """The plan of a learned growth.

    Args:
        fixed: makes the plan of a fixed operator, of its name.

    Raises:
        UserError: an option is unknown, missing or out of range, or the fixed plan cannot be made.
    """
    known = options_of(operator)
    UserError.collect(
        f"unknown option of operator {operator!r}: {name!r}; {did_you_mean(name, known)}"
        for name in options
        if name not in known
    )
    lesson = LEARNED[operator](**options)
    if lesson.width not in OPERATORS:
        unknown("width", lesson.width, OPERATORS)
    plan = fixed(lesson.width)
    if not plan.recipe.expansions or not plan.recipe.inherits:
        raise UserError(
            f"operator {operator!r}: fits the matrices of a schema to those of the source, and "
            + (
                f"width={lesson.width} inherits nothing"
                if plan.recipe.expansions
                else f"family {plan.family.name!r} has none here"
            )
        )
    recipe = replace(plan.recipe, moments="reset")  # they are not those of the weights that are fitted
    own = dict(options)
    return replace(plan, operator=operator, options=own, recipe=recipe, lesson=lesson)
