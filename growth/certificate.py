"""The certificate: whether a plan keeps every logit, proved from the plan alone, or every reason why not.

The proof has four parts. (1) Nothing but sizes changes in the config. (2) The layer map uses every source layer once, in order, and every
other target layer passes the residual stream on. (3) Every tensor's maps are the ones its spaces have. (4) On every space, reading after
writing is the identity on what the network can observe; for the residual stream that includes the norms in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isclose, sqrt
from typing import Any

import numpy as np

from outgrow.growth.decision import Decision
from outgrow.growth.expansion import AxisMap, Expansion, Fill
from outgrow.growth.layers import LayerMap
from outgrow.growth.routing import broken_conditions
from outgrow.model.config import ROPE, THETA, rope_of
from outgrow.model.family import STANDARD, Config, Family
from outgrow.model.keys import follow_layers
from outgrow.model.notation import spaces

# Config keys that are no sizes and do not change what the network computes.
NEUTRAL = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "initializer_range", "auto_map")


@dataclass(frozen=True)
class Certificate:
    """`lossless`, or the `reasons` why not."""

    reasons: tuple[str, ...]

    @property
    def lossless(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        return "lossless" if self.lossless else "not lossless: " + "; ".join(self.reasons)


def certify(plan: Decision) -> Certificate:
    """Prove `plan` lossless or say why it is not."""
    if plan.change is not None:
        return Certificate((*certify(plan.change.within).reasons, *broken_conditions(plan)))
    if not plan.recipe.inherits:
        return Certificate((f"operator {plan.operator!r} inherits nothing",))
    return Certificate((*_config(plan), *_layers(plan), *_steps(plan), *_spaces(plan)))


def _config(plan: Decision) -> Iterator[str]:
    """(1) A value that is no size differs."""
    family, layers = plan.family, plan.layers
    sizes = {family.field_name(name) for name in STANDARD if name != "layer_types"} | {family.rotary_field, *ROPE, *THETA, *family.follows}
    sizes |= {key for key, _ in family.more.values()}
    source, target = ({**config, "layer_types": family.layer_kinds(config)} for config in (plan.source_config, plan.target_config))
    for key in sorted((source.keys() | target.keys()) - sizes - set(NEUTRAL)):
        silent = key.endswith("_token_id") or "drop" in key  # neither touches the logits in evaluation
        if not silent and not _same(key, source.get(key), target.get(key), layers):
            yield f"config {key}: {source.get(key)!r} becomes {target.get(key)!r}, which is no size and may change the function"
    moved = any(number != layer for number, layer in enumerate(layers.layers) if not layers.identity[number])
    if source.get("scale_attn_by_inverse_layer_idx") and moved:
        yield "config scale_attn_by_inverse_layer_idx: layers that move are scaled otherwise"
    yield from _rotary(family, source, target)


def _same(key: str, before: Any, after: Any, layers: LayerMap) -> bool:
    """Whether a config value says the same of every layer that works; a head that becomes its own starts as what it was tied to."""
    if key == "tie_word_embeddings" and after is False:
        return True
    if isinstance(before, list) and isinstance(after, list) and (len(before), len(after)) == (layers.source, layers.target):
        return all(after[number] == before[layer] for number, layer in enumerate(layers.layers) if not layers.identity[number])
    return bool(follow_layers(key, before, layers.layers, layers.source) == after)


def _rotary(family: Family, source: Config, target: Config) -> Iterator[str]:
    """The angles of rotary positions, in today's spelling and in that of older configs."""
    ropes = [rope_of(config) for config in (source, target)]
    for key in sorted({*ropes[0], *ropes[1]} - {family.rotary_field, "partial_rotary_factor"}):
        if ropes[0].get(key) != ropes[1].get(key):
            yield f"config rope_parameters.{key}: {ropes[0].get(key)!r} becomes {ropes[1].get(key)!r}, which turns positions otherwise"
    positions = family.field_name("max_position_embeddings")
    if source.get(positions) == target.get(positions):
        return
    for rope in (ropes[1], *(part for part in ropes[1].values() if isinstance(part, Mapping))):  # one for all layers, or one for each kind
        kind = rope.get("rope_type", "default")
        whole = rope.get("factor") and (rope.get("original_max_position_embeddings") or target.get("original_max_position_embeddings"))
        if kind == "dynamic" or (kind in ("yarn", "longrope", "llama3") and not whole):
            yield f"config {positions}: rotary positions of type {kind!r} are scaled by it"


def _layers(plan: Decision) -> Iterator[str]:
    """(2) The layer map."""
    if not plan.layers.is_lossless:
        repeated = [number for number, layer in enumerate(plan.layers.layers) if plan.layers.layers.index(layer) != number]
        yield f"depth {plan.layers.rule!r}: target layers {_some(repeated)} work although their source layers already do"
    for step in plan.steps:
        number = step.tensor.layer
        idle = number is not None and plan.layers.identity[number]
        if idle and plan.family.writes_residual(step.tensor) and not step.zero:
            yield f"{step.name}: must be zero, since layer {number} is to pass the residual stream on"
        if step.zero and not idle:
            yield f"{step.name}: is zero although its layer is to work"


def _steps(plan: Decision) -> Iterator[str]:
    """(3) Tensors whose maps are not those of their spaces, or that take another tensor than their own."""
    expected: dict[tuple[str, str, bool], tuple[AxisMap, ...]] = {}
    faults: dict[str, int] = {}
    for step in plan.steps:
        line, is_bias = step.tensor.line, step.tensor.is_bias
        key = (line.name, line.text, is_bias)
        if key not in expected:
            expected[key] = plan.recipe.spaces_only().maps(step.tensor)
        if not all(mine is theirs or mine == theirs for mine, theirs in zip(step.maps, expected[key], strict=True)):
            fault = f"{line.name}: axes of {line.text!r} are not grown space by space, so its neighbours do not undo it"
            faults[fault] = faults.get(fault, 0) + 1
        if not step.zero and step.source != plan.source_name(step.tensor):
            faults[f"{step.name}: takes {step.source or 'nothing'}, not its own source"] = 1
    yield from (f"{fault} ({count} tensors)" if count > 1 else fault for fault, count in faults.items())


def _spaces(plan: Decision) -> Iterator[str]:
    """(4) Each space on its own."""
    growth = plan.growth
    for space, expansion in plan.recipe.expansions.items():
        if not plan.family.uses(space):
            continue
        if space == "residual":
            yield from _residual(plan, expansion)
        elif space in ("vocab", "pos"):
            yield from _kept_first(space, expansion)
        else:
            yield from _inner(space, expansion, growth.attention_gain if space == "qk" else 1.0)
            yield from _special(space, expansion, plan)


def _inner(space: str, expansion: Expansion, expected: float) -> Iterator[str]:
    """Reading after writing must give `expected` × the source on every source index, and nothing from new ones."""
    write, read = expansion.write, expansion.read
    met = write.copies & read.copies
    if (write.index[met] != read.index[met]).any():
        yield f"{space}: some target indices are written from one source index and read as another"
        return
    weight = np.bincount(read.index[met], (write.gain * read.gain)[met], minlength=read.source)
    if lost := int((np.bincount(read.index[met], minlength=read.source) == 0).sum()):
        yield f"{space}: {lost} of {read.source} source indices are lost"
    elif not np.allclose(weight, expected, rtol=1e-9):
        worst = int(np.abs(weight - expected).argmax())
        given = f"{weight[worst]:.4g} × source index {worst}, expected {expected:.4g}"
        yield f"{space}: reading its copies gives {given}; copies are not divided among readers"
    if (write.fill == Fill.NEXT).any():
        yield f"{space}: {int((write.fill == Fill.NEXT).sum())} indices are written by the next layer and read as copies"
    leaks = ~met & (write.fill != Fill.NEXT) & (read.fill != Fill.ZERO) & (write.fill != Fill.ZERO)
    if count := int(leaks.sum()):
        yield f"{space}: {count} new indices are written and read, neither as zero"


def _special(space: str, expansion: Expansion, plan: Decision) -> Iterator[str]:
    """What lies between the writers and readers of a space besides copying: activations, rotary positions, norms."""
    growth, write = plan.growth, expansion.write
    if space in ("ffn", "kv", "group") and not np.allclose(write.gain[write.copies], 1):
        yield f"{space}: writers are scaled, which its nonlinearity does not pass on"
    if space == "qk" and growth.family.rotary is not None:
        turned = growth.family.rotary_dims(growth.source_config)
        if not growth.rotary_kept:
            yield f"qk: {turned} rotary dims become {growth.family.rotary_dims(growth.target_config)}, so positions turn by other angles"
        elif not _turned_stay(write, turned):
            yield f"qk: the {turned} rotary dims of each head do not stay where they are, so they turn by other angles"
    for line in growth.family.lines_of(growth.source_config):
        if line.kind == "norm" and space in {named.name for named in spaces(line.out)} and growth.grows(space) and not _uniform(write):
            yield f"{space}: {line.name} normalises over it, and new indices change what it divides by"


def _turned_stay(write: AxisMap, turned: int) -> bool:
    """Whether the dims that rotary positions turn stay first in their head, and nothing else copies them."""
    copied = write.index[turned:][write.copies[turned:]]
    return bool(write.copies[:turned].all() and (write.index[:turned] == np.arange(turned)).all() and (copied >= turned).all())


def _uniform(write: AxisMap) -> bool:
    counts = write.counts()
    return bool(write.copies.all() and (counts == counts[0]).all())


def _kept_first(space: str, expansion: Expansion) -> Iterator[str]:
    """Old tokens and positions must stay where they are; new ones may be anything."""
    for side in (expansion.write, expansion.read):
        kept = slice(0, side.source)
        if not (side.copies[kept].all() and (side.gain[kept] == 1).all() and np.array_equal(side.index[kept], np.arange(side.source))):
            yield f"{space}: its {side.source} old indices do not stay where they are"
            return


def _residual(plan: Decision, expansion: Expansion) -> Iterator[str]:
    """Writers put c·[x ×r, mean or zero ×s] into the stream; norms then divide by what c and the copies make of the statistics."""
    growth, write = plan.growth, expansion.write
    n, N = write.source, write.target
    counts = write.counts()
    r = int(counts[0])
    if (counts != r).any():
        yield f"residual: its {n} indices are copied {counts.min()} to {counts.max()} times, which changes the norms' statistics"
        return
    if r == 0:
        yield f"residual: all {n} source indices are lost"
        return
    kept = Fill.MEAN if growth.family.norm == "layer" else Fill.ZERO
    if (~write.copies).any() and (write.fill[~write.copies] != kept).any():
        yield f"residual: new indices hold other than {kept.name.lower()}, which changes the norms' statistics"
    c = float(write.gain[write.copies][0])
    if not np.allclose(write.gain[write.copies | (write.fill == Fill.MEAN)], c, rtol=1e-12):
        yield "residual: writers are not all scaled alike"
    rho = r * n / N
    yield from _epsilon(plan, c * c * rho)
    yield from _norms(plan, expansion, r, c, rho)


def _epsilon(plan: Decision, factor: float) -> Iterator[str]:
    """The norms' epsilon must follow the variance that those over the residual stream see, and stay for every other norm."""
    family = plan.family
    before, after = (family.eps(config) for config in (plan.source_config, plan.target_config))
    if not family.sets_eps:
        if not isclose(factor, 1, rel_tol=1e-9):
            yield f"residual: norms see variance × {factor:.4g}, and no config key is known that sets their epsilon"
        return
    if not isclose(factor * before, after, rel_tol=1e-9):
        yield f"residual: norms see variance × {factor:.4g} but epsilon {before:g} becomes {after:g}"
    if before != after:
        for line in family.other_norms(plan.source_config):
            yield f"{line.name}: normalises over {line.out} with the config's epsilon too, which becomes {after:g}"


def _norms(plan: Decision, expansion: Expansion, r: int, c: float, rho: float) -> Iterator[str]:
    """What reaches the readers: (1/√ρ)·scale on each copy, and shift; read, they must sum to the source."""
    undone = plan.growth.embedding_gain if plan.recipe.hidden_ratio != 1 else 1.0
    head = expansion.write.scaled(undone) if plan.growth.tied else expansion.head
    pairs = [("the final norm", expansion.final_scale, expansion.final_shift, head)]
    if plan.family.prenorm:
        pairs.append(("norms", expansion.scale, expansion.shift, expansion.read))
    elif not _inverts(expansion.write, expansion.read, 1.0):
        yield "residual: readers do not give back the source"
    for which, scale, shift, read in pairs:
        for part, sums, expected in (("scale", scale, sqrt(rho)), ("shift", shift, 1.0)):
            if not _inverts(sums, read, expected):
                yield f"residual: {which}: {part} and readers do not give back the source"
        if (shift.fill[~shift.copies] != Fill.ZERO).any() and (read.fill[~read.copies] != Fill.ZERO).any():
            yield f"residual: {which}: shift on new indices is read"
        if (
            not np.array_equal(expansion.write.copies, read.copies)
            or (scale.index[read.copies] != expansion.write.index[read.copies]).any()
        ):
            yield f"residual: {which}: scale and readers take other copies than the writers"
    posted = [line for line in plan.family.lines if line.kind == "post norm"]
    if posted and not np.allclose(expansion.post_scale.gain[expansion.write.copies], c * sqrt(rho)):
        yield "residual: post norms do not scale what they add like the other writers"


def _inverts(first: AxisMap, second: AxisMap, expected: float) -> bool:
    met = first.copies & second.copies & (first.index == second.index)
    weight = np.bincount(first.index[met], (first.gain * second.gain)[met], minlength=first.source)
    return bool(np.allclose(weight, expected, rtol=1e-9))


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
