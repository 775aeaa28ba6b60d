"""More experts from few: every expert copied side by side, its router row with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from outgrow.growth.changes import ExpertCopy
from outgrow.growth.decision import Finish, Step
from outgrow.growth.expansion import AxisMap, Expansion, Fill
from outgrow.growth.experts import Change, Expert, needed, numbered, routed_tensors
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.family import Config, Family
from outgrow.model.keys import without
from outgrow.model.mixture import EXPERT, Mixture
from outgrow.model.notation import Space


def copied(
    source: Config, mixture: Mixture, sizes: dict[str, Any], options: ExpertCopy, within: Callable[..., Plan]
) -> Plan:
    """The plan of a mixture into one with more experts."""
    before = mixture.size(source, mixture.count_key(source))
    count = needed(sizes, mixture, mixture.count)
    chosen_before = mixture.size(source, mixture.top_k)
    if count % before or count == before:
        raise UserError(
            f"target: {mixture.count} {count} is no multiple of the source's {before} above it, so experts "
            "do not divide"
        )
    chosen = sizes.get(mixture.top_k, chosen_before)
    config = {mixture.top_k: chosen}
    if mixture.size(config, mixture.top_k) > count:
        most = f"{mixture.count} {count}"
        fault = f"{mixture.top_k} {chosen} is more than {most}"
        raise UserError(f"target: {fault}")
    own = {mixture.count, mixture.top_k}
    dense = without(sizes, own)
    family = mixture.family(source)
    dense_plan = within(dense, options.width, family=family)
    count_key = mixture.count_key(source)
    config = {**dense_plan.target_config, count_key: count, mixture.top_k: chosen}
    family = mixture.family(config)
    times = count // before
    units = mixture.size(config, mixture.units)
    origins = [number // times for number in range(count)]
    experts = tuple(Expert(origin, 0, units, origin) for origin in origins)
    growth = replace(dense_plan.growth, family=family, target_config=config, origin=dense_plan.family)
    routed = routed_tensors(mixture, config, count)
    shared = mixture.shared_size(config)
    change = Change(dense_plan, mixture, options, config, experts, routed, shared, chosen_before)
    copies = AxisMap.of(before, np.arange(count) // times)
    steps = tuple(_copies(change, family, copies))
    expansions = dict(dense_plan.recipe.expansions)
    rule = f"{before} → {count}: {times} copies of each, router rows copied"
    nothing = np.full(count, -1)
    unread = AxisMap.of(before, nothing, Fill.ZERO)
    expansions.pop(EXPERT, None)
    expansions[EXPERT] = Expansion.of(copies, unread, rule)
    recipe = replace(dense_plan.recipe, expansions=expansions)
    return replace(dense_plan, growth=growth, recipe=recipe, steps=steps, change=change)


def _copies(change: Change, family: Family, copies: AxisMap) -> Iterator[Step]:
    """Every tensor of the larger mixture, of the plan with the source's number of experts."""
    options = change.options
    own_steps = {step.name: step for step in change.within.steps}
    assert isinstance(options, ExpertCopy)
    for tensor in family.tensors(change.config):
        if tensor.tied:
            continue
        number = change.routed.get(tensor.name)
        if number is None:
            yield replace(own_steps[tensor.name], tensor=tensor)
        elif number >= 0:
            expert = change.experts[number].source
            module = numbered(tensor).replace("#", str(expert))
            module = module.replace("*", str(tensor.layer))
            yield replace(own_steps[f"{module}.weight"], tensor=tensor)
        else:
            step = own_steps[tensor.name]
            axes = zip(tensor.axes, step.maps, strict=True)
            maps = tuple(copies if axis == Space(EXPERT) else grown for axis, grown in axes)
            is_router = tensor.pattern == f"{change.mixture.router}.weight"
            is_moved = is_router and options.delta > 0
            finish = Finish(jitter=options.delta) if is_moved else None
            yield replace(step, tensor=tensor, maps=maps, finish=finish)
