"""The plan of a learned growth: that of a fixed operator, with the lesson that follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from outgrow.growth.learned.lessons import LEARNED, LEAST_LAYERS, Lesa
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
    names = options_of(operator)
    UserError.collect(
        f"unknown option of operator {operator!r}: {name!r}; {did_you_mean(name, names)}"
        for name in options
        if name not in names
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
    if isinstance(lesson, Lesa):
        _check_between(plan)
    recipe = replace(plan.recipe, moments="reset")  # they are not those of the weights that are fitted
    own = dict(options)
    return replace(plan, operator=operator, options=own, recipe=recipe, lesson=lesson)


def _check_between(plan: Plan) -> None:
    """Refuse a plan without layers to predict, or with too few to learn from."""
    layers = plan.layers
    if layers.source < LEAST_LAYERS:
        raise UserError(
            f"operator 'lesa': learns from layers that stand between two others, and the source has "
            f"{layers.source} layers; take growth=lossless with growth.depth=neighbours, stack or identity"
        )
    if layers.target == layers.source:
        raise UserError(
            f"operator 'lesa': predicts new layers, and the target has the source's {layers.source}; give it "
            "more, or choose another operator"
        )
    if not layers.between:
        raise UserError(
            f"operator 'lesa': predicts layers between two others, which depth {layers.rule!r} has none of; "
            "use growth.depth=neighbours"
        )
