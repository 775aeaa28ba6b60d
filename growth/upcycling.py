"""Experts from a dense MLP: units cut into blocks, each expert one of them, times what undoes the combine
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
from outgrow.model.base.errors import UserError, names_of
from outgrow.model.config import rope_of
from outgrow.model.family import STANDARD, Config, Family, Tensor
from outgrow.model.keys import only, without
from outgrow.model.mixture import EXPERT, ROUTED, SHARED, Mixture
from outgrow.model.notation import Space


@dataclass(frozen=True)
class _Cut:
    """Cut of an MLP of `units` after growth in width: `shared` first, then G blocks for routed experts."""

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
    source: Config, mixture: Mixture, sizes: dict[str, Any], options: Upcycling, within: Callable[..., Plan]
) -> Plan:
    """The plan of a dense source into a mixture."""
    count = needed(sizes, mixture, mixture.count)
    chosen = needed(sizes, mixture, mixture.top_k)
    cut = _cut(source, mixture, sizes, options.granularity)
    _check_groups(mixture, count, chosen, cut.granularity)
    own = set(mixture.keys)
    keys = {*source, *STANDARD} - own
    dense = only(sizes, keys)
    dense["intermediate_size"] = cut.units
    dense_plan = within(dense, options.width)
    config = _config(dense_plan, mixture, sizes, options, cut)
    family = mixture.family(config, dense_plan.family)
    experts = tuple(map(cut.expert_of, range(count)))
    routed = routed_tensors(mixture, config, count)
    growth = replace(dense_plan.growth, family=family, target_config=config, origin=dense_plan.family)
    change = Change(dense_plan, mixture, options, config, experts, routed, cut.shared)
    steps = tuple(_handed_out(change, growth, family))
    recipe = replace(dense_plan.recipe, expansions=_expansions(change, growth))
    return replace(dense_plan, growth=growth, recipe=recipe, steps=steps, change=change)


def _cut(source: Config, mixture: Mixture, sizes: Config, granularity: int | None) -> _Cut:
    """Into what the MLP is cut, from what the target says of it.

    Raises:
        UserError: its units do not divide.
    """
    units = source["intermediate_size"]
    named = "intermediate_size" in sizes and mixture.units != "intermediate_size"
    width = sizes["intermediate_size"] if named else units
    groups = granularity or 1
    expert, shared = _sizes(mixture, sizes, width, groups)
    if granularity is None:
        routed = width - shared
        one_is_enough = expert >= routed and not named
        granularity = 1 if one_is_enough else _divided(routed, expert, mixture)
    total = granularity * expert + shared
    differs = named and total != width
    if total < units or differs:
        raise UserError(
            f"target: {granularity} × {mixture.units} {expert} + {shared} shared units are {total}, and "
            f"the MLP has {width}; experts that do not divide it lose units"
        )
    return _Cut(total, shared, granularity, expert)


def _sizes(mixture: Mixture, sizes: Config, width: int, granularity: int) -> tuple[int, int]:
    """The units of a routed expert and those that are shared; what the target does not say divides what is
    left.
    """
    named = sizes.get(mixture.units)
    expert = None
    if named is not None:
        size = {mixture.units: named}
        expert = mixture.size(size, mixture.units)
    if mixture.shared_of is not None:  # whole = (G + shared experts) · units of one
        experts = needed(sizes, mixture, mixture.shared_of)
        parts = granularity + experts
        expert = expert or _divided(width, parts, mixture)
        return expert, experts * expert
    if mixture.shared_units is not None and mixture.shared_units not in sizes:
        raise UserError(
            f"target: {mixture.shared_units} is missing: how many of the MLP's units every token goes through"
        )
    shared = 0
    if mixture.shared_units is not None:
        shared = mixture.size(sizes, mixture.shared_units)
    routed = width - shared
    return expert or _divided(routed, granularity, mixture), shared


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
        more = f"is more than {mixture.count} {count}"
        fault = f"{mixture.top_k} {chosen} {more}"
        faults.append(f"target: {fault}")
    elif chosen % granularity:
        faults.append(
            f"target: {mixture.top_k} {chosen} is no multiple of the granularity {granularity}, so a token "
            "would meet parts of an MLP"
        )
    UserError.collect(faults)


def _config(
    dense_plan: Plan, mixture: Mixture, sizes: Config, options: Upcycling, cut: _Cut
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
    depth = dense_plan.family.field_name("num_hidden_layers")
    count = int(dense[depth])
    layers = options.layers(count)
    of_layers = mixture.said_of_layers(layers, count)
    is_told = sizes.keys() & of_layers.keys()
    names_dense = mixture.dense_layers is not None
    may_tell = names_dense and options.sparse == "all"
    if is_told and may_tell:
        of_layers = {key: sizes[key] for key in of_layers if key in sizes}
    own = without(sizes, dense)
    config = without(dense, mixture.lacks)
    if "rope_parameters" not in config and "rope_theta" not in config:
        config["rope_parameters"] = rope_of(dense)
    kinds = dense_plan.family.layer_kinds(dense)
    if kinds and "layer_types" not in mixture.lacks:
        config["layer_types"] = kinds
    units = {"intermediate_size": cut.units, mixture.units: cut.expert}
    chosen = {key: sizes[key] for key in mixture.adds if key in sizes}
    return {
        **config,
        **mixture.adds,
        **own,
        **chosen,
        **of_layers,
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
    sources = {own: dense for dense, own in mixture.experts.items()}
    sources |= {own: dense for dense, own in mixture.shared.items()}
    used = set()
    for tensor in family.tensors(change.config):
        if tensor.tied:
            continue
        if change.routed.get(tensor.name, 0) < 0:
            yield _routing(change, tensor, growth)
            continue
        dense = sources.get(numbered(tensor), "")
        name = tensor.name
        if dense:
            layer = str(tensor.layer)
            name = f"{dense}.weight".replace("*", layer)
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
    options = change.options
    assert isinstance(options, Upcycling)
    number = change.routed.get(tensor.name)
    expert = Expert(0, 0, change.shared, -1)
    if number is not None:
        expert = change.experts[number]
    units = step.tensor.axes.index(Space(FFN))
    maps = list(step.maps)
    units_map = maps[units]
    part = units_map.cut(expert.start, expert.stop)
    maps[units] = part
    reads = step.tensor.reads[units]
    gain = _gain(change, number, reads=reads)
    if gain != 1:
        out = step.tensor.reads.index(False)
        maps[out] = maps[out].scaled(gain)
    finish = None
    if number is not None:
        count = expert.stop - expert.start
        finish = _finish(change, options, tensor, number, units, count)
    return replace(step, tensor=tensor, maps=tuple(maps), finish=finish)


def _gain(change: Change, number: int | None, *, reads: bool) -> float:
    """The factor on one matrix: the whole of it on what reads the units, or its third root on each
    (Megatron's split).
    """
    options = change.options
    mixture = change.mixture
    assert isinstance(options, Upcycling)
    if number is None:
        is_halved = mixture.shared_gate is not None  # a gate of zeros is 1/2
        return 2.0 if is_halved and reads else 1.0
    factor = float(change.group)
    if mixture.scaled:
        scale = change.config.get(mixture.scaled, 1.0)
        factor /= float(scale)
    if not mixture.normalises(change.config):
        factor *= len(change.experts) / change.chosen
    if options.scale == "down":
        return factor if reads else 1.0
    return factor ** (1 / 3)


def _finish(
    change: Change, options: Upcycling, tensor: Tensor, number: int, axis: int, units: int
) -> Finish | None:
    """Noise on further copies, and units that are drawn anew, the same in every matrix of an expert."""
    noise = options.copy_noise if number >= change.group else 0.0
    if not options.drop:
        return Finish(noise=noise) if noise else None
    seed = change.within.growth.seed
    numbers = generator(seed, "dropped", tensor.layer, number)
    drawn = numbers.permutation(units)
    count = round(options.drop * units)
    dropped = np.sort(drawn[:count])
    return Finish(redrawn=(axis, dropped), noise=noise)


def _routing(change: Change, tensor: Tensor, growth: Growth) -> Step:
    """A router, whose rows are fresh and alike in each group; the gate of a shared expert and the correction
    start at zero.
    """
    options = change.options
    assert isinstance(options, Upcycling)
    axes = zip(tensor.axes, tensor.shape, strict=True)
    maps = tuple(_all_new(growth, axis, length) for axis, length in axes)
    is_router = tensor.pattern == f"{change.mixture.router}.weight"
    if not is_router or options.router_std == 0:
        return Step(tensor, None, maps, zero=True)
    finish = Finish(deviation=options.router_std, alike=change.group)
    return Step(tensor, None, maps, finish=finish)


def _all_new(growth: Growth, axis: Any, length: int) -> AxisMap:
    source = growth.source.get(str(axis), 1)
    nothing = np.full(length, -1)
    return AxisMap.of(source, nothing, Fill.RANDOM)


def _expansions(change: Change, growth: Growth) -> dict[str, Expansion]:
    """Every space of the mixture with its expansion, for whoever prints or draws the plan."""
    dense = change.within.recipe.expansions
    expansions = {space: expansion for space, expansion in dense.items() if growth.family.uses(space)}
    first = change.experts[0]
    count = len(change.experts)
    groups = len({expert.row for expert in change.experts})
    ffn = dense[FFN]
    units = first.stop - first.start
    routed = ffn.write.target - change.shared
    parts = f"{change.group} parts of {units}"
    rule = f"{routed} units in {parts}, each {groups} times"
    write = ffn.write.cut(first.start, first.stop)
    read = ffn.read.cut(first.start, first.stop)
    cut = Expansion.of(write, read, rule)
    experts = Expansion.of(
        AxisMap.of(1, np.zeros(count)),
        AxisMap.of(1, np.full(count, -1), Fill.ZERO),
        f"{count} of one MLP, {groups} router rows",
    )
    expansions |= {ROUTED: cut, EXPERT: experts}
    if change.shared:
        every_unit = ffn.write.target
        rule = f"the first {change.shared} of {every_unit} units"
        write = ffn.write.cut(0, change.shared)
        read = ffn.read.cut(0, change.shared)
        expansions[SHARED] = Expansion.of(write, read, rule)
    return expansions
