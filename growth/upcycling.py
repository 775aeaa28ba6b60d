"""From a dense MLP to experts: units cut into blocks, each expert one of them, times what undoes the combine
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from outgrow.growth.changes import Upcycling
from outgrow.growth.decision import Finish, Step
from outgrow.growth.engine.seeding import generator
from outgrow.growth.expansion import AxisMap, Expansion, Fill
from outgrow.growth.experts import FFN, Change, Expert, needed, numbered, routed_tensors
from outgrow.growth.plan import Plan
from outgrow.growth.recipe import Growth
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import names_of
from outgrow.model.config import rope_of
from outgrow.model.family import STANDARD, Config, Family, Tensor
from outgrow.model.mixture import EXPERT, ROUTED, SHARED, Mixture
from outgrow.model.notation import Space


@dataclass(frozen=True)
class _Cut:
    """How an MLP of `units` after growth in width is cut: `shared` first, then G blocks for the routed
    experts.
    """

    units: int
    shared: int
    granularity: int
    expert: int  # units of a routed one

    def expert_of(self, number: int) -> Expert:
        """The expert of that number: block `number mod G`, in group ⌊number/G⌋."""
        group, block = divmod(number, self.granularity)
        start = self.shared + block * self.expert
        return Expert(0, start, start + self.expert, group)


def upcycled(
    source: Config, mixture: Mixture, wanted: dict[str, Any], asked: Upcycling, within: Callable[..., Plan]
) -> Plan:
    """The plan of a dense source into a mixture."""
    count, chosen = (needed(wanted, mixture, key) for key in (mixture.count, mixture.top_k))
    cut = _cut(source, mixture, wanted, asked.granularity)
    _check_groups(mixture, count, chosen, cut.granularity)
    dense = {
        key: value for key, value in wanted.items() if key in {*source, *STANDARD} and key not in mixture.keys
    }
    dense_plan = within(dense | {"intermediate_size": cut.units}, asked.width)
    config = _config(dense_plan, mixture, wanted, asked, cut)
    family = mixture.family(config, dense_plan.family)
    experts = tuple(cut.expert_of(number) for number in range(count))
    growth = replace(dense_plan.growth, family=family, target_config=config, origin=dense_plan.family)
    change = Change(
        dense_plan, mixture, asked, config, experts, routed_tensors(mixture, config, count), cut.shared
    )
    steps = tuple(_handed_out(change, growth, family))
    return replace(
        dense_plan,
        growth=growth,
        recipe=replace(dense_plan.recipe, expansions=_expansions(change, growth)),
        steps=steps,
        change=change,
    )


def _cut(source: Config, mixture: Mixture, wanted: Config, granularity: int | None) -> _Cut:
    """Into what the MLP is cut, from what the target says of it.

    Raises:
        UserError: its units do not divide.
    """
    units = source["intermediate_size"]
    named = "intermediate_size" in wanted and mixture.units != "intermediate_size"
    width = wanted["intermediate_size"] if named else units
    expert, shared = _sizes(mixture, wanted, width, granularity or 1)
    if granularity is None:
        routed = width - shared
        granularity = 1 if expert >= routed and not named else _divided(routed, expert, mixture)
    total = granularity * expert + shared
    if total < units or (named and total != width):
        raise UserError(
            f"target: {granularity} × {mixture.units} {expert} + {shared} shared units are {total}, and "
            f"the MLP has {width}; experts that do not divide it lose units"
        )
    return _Cut(total, shared, granularity, expert)


def _sizes(mixture: Mixture, wanted: Config, width: int, granularity: int) -> tuple[int, int]:
    """The units of a routed expert and those that are shared; what the target does not say divides what is
    left.
    """
    named = wanted.get(mixture.units)
    expert = None if named is None else mixture.size({mixture.units: named}, mixture.units)
    if mixture.shared_of is not None:  # whole = (G + shared experts) · units of one
        experts = needed(wanted, mixture, mixture.shared_of)
        expert = expert or _divided(width, granularity + experts, mixture)
        return expert, experts * expert
    if mixture.shared_units is not None and mixture.shared_units not in wanted:
        raise UserError(
            f"target: {mixture.shared_units} is missing: how many of the MLP's units every token goes through"
        )
    shared = mixture.size(wanted, mixture.shared_units) if mixture.shared_units is not None else 0
    return expert or _divided(width - shared, granularity, mixture), shared


def _divided(units: int, parts: int, mixture: Mixture) -> int:
    if units <= 0 or units % parts:
        way = f"give {mixture.units} that divides them"
        raise UserError(f"target: {units} units of the MLP cannot be cut into parts of or by {parts}; {way}")
    return units // parts


def _check_groups(mixture: Mixture, count: int, chosen: int, granularity: int) -> None:
    faults = []
    if count % granularity:
        faults.append(
            f"target: {mixture.count} {count} is no multiple of the granularity {granularity}, so experts "
            "do not make whole groups"
        )
    if chosen > count:
        faults.append(f"target: {mixture.top_k} {chosen} is more than {mixture.count} {count}")
    elif chosen % granularity:
        faults.append(
            f"target: {mixture.top_k} {chosen} is no multiple of the granularity {granularity}, so a token "
            "would meet parts of an MLP"
        )
    UserError.collect(faults)


def _config(
    dense_plan: Plan, mixture: Mixture, wanted: Config, asked: Upcycling, cut: _Cut
) -> dict[str, Any]:
    """The mixture's config: the dense one's values, and the mixture's own.

    Raises:
        UserError: a value of the dense config has no counterpart.
    """
    dense = dense_plan.target_config
    UserError.collect(
        f"config {key}: {dense[key]!r} has no counterpart in {mixture.name!r}, whose class does not know it"
        for key, allowed in mixture.lacks.items()
        if allowed is not None and key in dense and dense[key] not in allowed
    )
    count = int(dense[dense_plan.family.field_name("num_hidden_layers")])
    layers = asked.layers(count)
    said = mixture.said_of_layers(layers, count)
    says_itself = wanted.keys() & said.keys()
    if says_itself and mixture.dense_layers is not None and asked.sparse == "all":
        said = {key: wanted[key] for key in said if key in wanted}
    own = {key: value for key, value in wanted.items() if key not in dense}
    config = {key: value for key, value in dense.items() if key not in mixture.lacks}
    if "rope_parameters" not in config and "rope_theta" not in config:
        config["rope_parameters"] = rope_of(dense)
    if "layer_types" not in mixture.lacks and (kinds := dense_plan.family.layer_kinds(dense)):
        config["layer_types"] = kinds
    units = {"intermediate_size": cut.units} | {mixture.units: cut.expert}
    chosen = {key: wanted[key] for key in mixture.adds if key in wanted}
    return {
        **config,
        **mixture.adds,
        **own,
        **chosen,
        **said,
        **units,
        "model_type": mixture.name,
        "architectures": [mixture.architecture],
    }


def _handed_out(change: Change, growth: Growth, family: Family) -> Iterator[Step]:
    """Every tensor of the mixture, of those of the plan within the dense family.

    Raises:
        UserError: tensors of the dense family have no place in the mixture.
    """
    mixture = change.mixture
    dense_steps = {step.name: step for step in change.within.steps}
    taken = {own: dense for dense, own in mixture.experts.items()} | {
        own: dense for dense, own in mixture.shared.items()
    }
    used = set()
    for tensor in family.tensors(change.config):
        if tensor.tied:
            continue
        if tensor.name in change.routed and change.routed[tensor.name] < 0:
            yield _routing(change, tensor, growth)
            continue
        dense = taken.get(numbered(tensor), "")
        name = f"{dense}.weight".replace("*", str(tensor.layer)) if dense else tensor.name
        if name not in dense_steps:
            raise UserError(
                f"{mixture.name!r}: needs {tensor.name}, which a {change.within.family.name!r} has no "
                "counterpart of"
            )
        used.add(name)
        if dense:
            yield _of_expert(change, tensor, dense_steps[name])
        else:
            yield replace(dense_steps[name], tensor=tensor)
    if left := dense_steps.keys() - used:
        raise UserError(
            f"{change.within.family.name!r} → {mixture.name!r}: their other tensors differ: "
            f"{names_of(sorted(left))} have no place"
        )


def _of_expert(change: Change, tensor: Tensor, step: Step) -> Step:
    """One matrix of an expert, of the dense MLP's: its units alone, and the scale that undoes the combine
    weights.
    """
    asked = change.asked
    assert isinstance(asked, Upcycling)
    number = change.routed.get(tensor.name)
    expert = Expert(0, 0, change.shared, -1) if number is None else change.experts[number]
    units = step.tensor.axes.index(Space(FFN))
    maps = [
        axis.cut(expert.start, expert.stop) if place == units else axis
        for place, axis in enumerate(step.maps)
    ]
    gain = _gain(change, number, reads=step.tensor.reads[units])
    if gain != 1:
        out = step.tensor.reads.index(False)
        maps[out] = maps[out].scaled(gain)
    finish = (
        None if number is None else _finish(change, asked, tensor, number, units, expert.stop - expert.start)
    )
    return replace(step, tensor=tensor, maps=tuple(maps), finish=finish)


def _gain(change: Change, number: int | None, *, reads: bool) -> float:
    """The factor on one matrix: the whole of it on what reads the units, or its third root on each
    (Megatron's split).
    """
    asked, mixture = change.asked, change.mixture
    assert isinstance(asked, Upcycling)
    if number is None:
        return 2.0 if mixture.shared_gate is not None and reads else 1.0  # a gate of zeros is 1/2
    factor = float(change.group)
    if mixture.scaled:
        factor /= float(change.config.get(mixture.scaled, 1.0))
    if not mixture.normalises(change.config):
        factor *= len(change.experts) / change.chosen
    if asked.scale == "down":
        return factor if reads else 1.0
    return factor ** (1 / 3)


def _finish(
    change: Change, asked: Upcycling, tensor: Tensor, number: int, axis: int, units: int
) -> Finish | None:
    """Noise on further copies, and units that are drawn anew, the same in every matrix of an expert."""
    noise = asked.copy_noise if number >= change.group else 0.0
    if not asked.drop:
        return Finish(noise=noise) if noise else None
    drawn = generator(change.within.growth.seed, "dropped", tensor.layer, number).permutation(units)
    count = round(asked.drop * units)
    return Finish(redrawn=(axis, np.sort(drawn[:count])), noise=noise)


def _routing(change: Change, tensor: Tensor, growth: Growth) -> Step:
    """A router, whose rows are fresh and alike in each group; the gate of a shared expert and the correction
    start at zero.
    """
    asked = change.asked
    assert isinstance(asked, Upcycling)
    maps = tuple(
        _all_new(growth, axis, length) for axis, length in zip(tensor.axes, tensor.shape, strict=True)
    )
    if tensor.pattern != f"{change.mixture.router}.weight" or asked.router_std == 0:
        return Step(tensor, None, maps, zero=True)
    return Step(tensor, None, maps, finish=Finish(deviation=asked.router_std, alike=change.group))


def _all_new(growth: Growth, axis: Any, length: int) -> AxisMap:
    source = growth.source.get(str(axis), 1)
    return AxisMap.of(source, np.full(length, -1), Fill.RANDOM)


def _expansions(change: Change, growth: Growth) -> dict[str, Expansion]:
    """Every space of the mixture with its expansion, for whoever prints or draws the plan."""
    dense = change.within.recipe.expansions
    kept = {space: expansion for space, expansion in dense.items() if growth.family.uses(space)}
    first, count = change.experts[0], len(change.experts)
    groups = len({expert.row for expert in change.experts})
    ffn = dense[FFN]
    cut = Expansion.of(
        ffn.write.cut(first.start, first.stop),
        ffn.read.cut(first.start, first.stop),
        (
            f"{ffn.write.target - change.shared} units in {change.group} parts of "
            f"{first.stop - first.start}, each {groups} times"
        ),
    )
    experts = Expansion.of(
        AxisMap.of(1, np.zeros(count)),
        AxisMap.of(1, np.full(count, -1), Fill.ZERO),
        f"{count} of one MLP, {groups} router rows",
    )
    kept |= {ROUTED: cut, EXPERT: experts}
    if change.shared:
        rule = f"the first {change.shared} of {ffn.write.target} units"
        write, read = (side.cut(0, change.shared) for side in (ffn.write, ffn.read))
        kept[SHARED] = Expansion.of(write, read, rule)
    return kept
