"""Adam's moments, grown with the weights (LEMON, 2310.07999, appendix; Net2Net's map transposed).

Growth that keeps the function is a linear map of the weights, so the chain rule ties the new gradients to the
old. An index that is copied k times with gain a sees each copy's gradient as 1/(k·a) of the source's: k
copies share what flows back, and whoever is scaled by a is answered by 1/a. One such factor per axis gives a
whole tensor:

    m' = α·m,  v' = α²·v,  α = Π over the axes of 1/(k·a)

It is exact for what is inherited where the plan is lossless, copies are evenly read (no noise) and nothing
new reaches an inherited gradient; `inexact` names what stands against it. Under noise the k copies still
share what flows back, in uneven parts: each gets the mean of the copies' first moments, exactly, and the
square of such means for the second, which is at most the mean of the copies' own. New entries, and layers
that start as the identity, begin at zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from outgrow.growth.decision import Step
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.origin import Origin, axis_origins
from outgrow.growth.plan import Plan

# the folder beside the grown weights, and what says how they grew
OPTIMIZER, STATE = "optimizer", "state.json"
POWERS = {"exp_avg": 1, "exp_avg_sq": 2}  # Adam's names → the power of the gradient that they average


def moments_plan(plan: Plan, dtypes: dict[str, str]) -> Plan:
    """Make the plan by which the moments grow: steps `exp_avg.NAME` and `exp_avg_sq.NAME` for every tensor of
    `plan`.

    Args:
        dtypes: safetensors dtype of each source moment, under the same prefixed names.
    """
    steps: list[Step] = []
    for moment, power in POWERS.items():
        steps += [_step(plan, step, moment, power) for step in plan.steps]
    growth = replace(plan.growth, dtype=None)
    every_step = tuple(steps)
    return replace(plan, growth=growth, steps=every_step, noise=0.0, dtypes=dtypes)


def inexact(plan: Plan) -> Iterator[str]:
    """Yield why the grown moments are not those that the grown model's own gradients would have given."""
    growth = plan.growth
    if plan.recipe.moments != "transpose":
        rule = RULES[plan.recipe.moments]
        yield f"operator {plan.operator!r}: {rule}"
        return
    if not plan.certificate.lossless:
        yield "the growth is not lossless"
    if plan.is_noisy:
        yield (
            f"noise {plan.noise:g}: copies are read unevenly; each gets the mean of what the copies' "
            "gradients are"
        )
    if plan.change is not None:
        yield from plan.change.moments_lost
    residue = growth.target["residual"] % growth.source["residual"]
    is_layer_norm = growth.family.norm == "layer"
    if residue and is_layer_norm and growth.grows("residual"):
        yield "residual: gradients of the new indices reach the inherited ones through LayerNorm's mean"
    was_tied = growth.source_family.ties(growth.source_config)
    if was_tied and not growth.tied:
        yield (
            "tie_word_embeddings: the embedding's gradients were those of the head too, which learns on "
            "its own now"
        )
    if growth.grows("vocab"):
        yield "vocab: new tokens take part in the softmax"


RULES = {
    "transpose": "grown by the transposed maps",
    "original": "kept where an entry is the source's own, reset on copies and on what is new",
    "reset": "reset",
}


def _step(plan: Plan, step: Step, moment: str, power: int) -> Step:
    line = replace(step.tensor.line, offset=0.0)
    pattern = f"{moment}.{step.tensor.pattern}"
    tensor = replace(step.tensor, pattern=pattern, line=line)
    rule = plan.recipe.moments
    origins = axis_origins(plan, step)
    share = 1.0
    if plan.change is not None:
        share = plan.change.share_of_gradient(step)
    is_new = [origin == Origin.NEW for origin in origins]
    all_new = any(marked.all() for marked in is_new)
    is_reset = rule == "reset" or share == 0
    if is_reset or step.source is None or all_new:
        return replace(
            step,
            tensor=tensor,
            source=None,
            zero=True,
            next_source=None,
            beside=None,
            diagonal=False,
            finish=None,
        )
    if rule == "original":
        axes = zip(step.maps, origins, strict=True)
        maps = tuple(_kept(axis, origin == Origin.ORIGINAL) for axis, origin in axes)
    else:
        maps = tuple(_transposed(axis, power) for axis in step.maps)
        if share != 1:
            first, *others = maps
            power_of_share = share**power
            maps = (first.scaled(power_of_share), *others)
    return replace(
        step,
        tensor=tensor,
        source=f"{moment}.{step.source}",
        maps=maps,
        next_source=None,
        beside=None,
        diagonal=False,
        finish=None,
    )


def _transposed(axis: AxisMap, power: int) -> AxisMap:
    """Map copies with the gain 1/(copies · gain) to the `power`; what is new is zero."""
    counts = axis.counts()[axis.index]
    shared = counts * axis.gain
    divisible = axis.copies & (shared != 0)
    nothing = np.zeros_like(axis.gain)
    gain = np.divide(1.0, shared, out=nothing, where=divisible)
    kept = axis.filled(Fill.ZERO)
    return replace(kept, gain=gain**power)


def _kept(axis: AxisMap, kept: np.ndarray) -> AxisMap:
    index = np.where(kept, axis.index, -1)
    return AxisMap.of(axis.source, index, Fill.ZERO)
