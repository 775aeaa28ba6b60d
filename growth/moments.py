"""An optimizer's averages of gradients, grown with the weights (LEMON, 2310.07999, appendix; Net2Net's map
transposed): Adam's two moments, and Muon's momentum.

Growth that keeps the function is a linear map of the weights, so the chain rule ties the new gradients to the
old. An index that is copied k times with gain a sees each copy's gradient as 1/(k·a) of the source's: k
copies share what flows back, and whoever is scaled by a is answered by 1/a. One such factor per axis gives a
whole tensor:

    m' = α·m,  v' = α²·v,  α = Π over the axes of 1/(k·a)

m is any average of gradients: Adam's first moment, and Muon's momentum, which Muon makes orthogonal only as
it steps. v is Adam's second.

It is exact for what is inherited where the plan is lossless, copies are evenly read (no noise) and nothing
new reaches an inherited gradient; `inexact` names what stands against it. Under noise the k copies still
share what flows back, in uneven parts: each gets the mean of the copies' first moments, exactly, and the
square of such means for the second, which is at most the mean of the copies' own. New entries begin at
zero, and so do layers that start as the identity or as a mean, unless the rule is `copied`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from outgrow.growth.decision import Step
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.origin import Origin, axis_origins
from outgrow.growth.plan import Plan

# the folder beside the grown weights, and what says how they grew
OPTIMIZER, STATE = "optimizer", "state.json"
# PyTorch's names of what is kept for a parameter → the power of the gradient that it averages
POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}
# what an optimizer keeps for one parameter
ADAM, MUON = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)

# how moments grow: `own` is what the operator says, one of the others
Rule = Literal["own", "transpose", "copied", "kept", "reset"]
RULES: dict[str, str] = {
    "transpose": "grown by the transposed maps",
    "copied": "grown by the transposed maps; a new layer takes those of the layer that it copies",
    "kept": "kept where an entry is the source's own, reset on copies and on what is new",
    "reset": "reset",
}


def moments_plan(plan: Plan, dtypes: dict[str, str], rule: Rule = "own") -> Plan:
    """Make the plan by which the moments grow: a step `MOMENT.NAME` for every tensor of `plan` and each of
    the moments that its source tensor has; of one that the source has not, for each that any tensor has.

    Args:
        dtypes: safetensors dtype of each source moment, under the same prefixed names.
    """
    prefixes = {name.partition(".")[0] for name in dtypes}
    own_rule = _rule(plan, rule)
    steps: list[Step] = []
    for moment in POWERS:
        for step in plan.steps:
            name = step.source or plan.source_name(step.tensor)
            own = [prefix for prefix in prefixes if f"{prefix}.{name}" in dtypes]
            if moment in (own or prefixes):
                grown = _step(plan, step, moment, own_rule)
                steps.append(grown)
    growth = replace(plan.growth, dtype=None)
    every_step = tuple(steps)
    return replace(plan, growth=growth, steps=every_step, noise=0.0, dtypes=dtypes)


def describe_moments(plan: Plan, rule: Rule = "own") -> str:
    """Say how the moments grow."""
    return RULES[_rule(plan, rule)]


def _rule(plan: Plan, rule: Rule) -> Rule:
    return plan.recipe.moments if rule == "own" else rule


def inexact(plan: Plan, rule: Rule = "own") -> Iterator[str]:
    """Yield why the grown moments are not those that the grown model's own gradients would have given."""
    growth = plan.growth
    own_rule = _rule(plan, rule)
    if own_rule in ("kept", "reset"):
        whose = f"operator {plan.operator!r}" if rule == "own" else "as asked"
        yield f"{whose}: {RULES[own_rule]}"
        return
    has_new_layers = any(plan.layers.identity) or bool(plan.layers.between)
    if own_rule == "copied" and has_new_layers:
        yield "new layers take the moments of the layers that they copy, which were averaged elsewhere"
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


def _step(plan: Plan, step: Step, moment: str, rule: Rule) -> Step:
    power = POWERS[moment]
    line = replace(step.tensor.line, offset=0.0)
    pattern = f"{moment}.{step.tensor.pattern}"
    tensor = replace(step.tensor, pattern=pattern, line=line)
    origins = axis_origins(plan, step)
    share = 1.0
    if plan.change is not None:
        share = plan.change.share_of_gradient(step)
    is_new = [origin == Origin.NEW for origin in origins]
    all_new = any(marked.all() for marked in is_new)
    is_reset = rule == "reset" or share == 0
    source = step.source
    if rule == "copied":
        # writers of a layer that begins as the identity copy no weights; in a mixture an expert's name tells
        # no source tensor to take theirs from
        begins_idle = step.zero and plan.change is None
        source = plan.source_name(step.tensor) if begins_idle else source
        all_new = False
    if is_reset or source is None or all_new:
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
    if rule == "kept":
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
        source=f"{moment}.{source}",
        maps=maps,
        zero=False,
        next_source=None,
        beside=None if step.beside is None else f"{moment}.{step.beside}",
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
    unscaled = axis.filled(Fill.ZERO)
    return replace(unscaled, gain=gain**power)


def _kept(axis: AxisMap, mask: np.ndarray) -> AxisMap:
    index = np.where(mask, axis.index, -1)
    return AxisMap.of(axis.source, index, Fill.ZERO)
