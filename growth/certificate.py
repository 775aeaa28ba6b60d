"""The certificate: a proof from the plan alone that it keeps every logit, or every reason why not.

The proof has four parts. (1) Nothing but sizes changes in the config. (2) The layer map uses every source
layer once, in order, and every other target layer passes the residual stream on. (3) Every tensor's maps are
the ones its spaces have. (4) On every space, reading after writing is the identity on what the network can
observe; for the residual stream that includes the norms in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import isclose, sqrt
from typing import Any

import numpy as np

from outgrow.growth.decision import Decision, LineKey
from outgrow.growth.expansion import AxisMap, Expansion, Fill
from outgrow.growth.layers import LayerMap
from outgrow.growth.routing import broken_conditions
from outgrow.model.config import ROPE, THETA, rope_of
from outgrow.model.family import STANDARD, Config, Family
from outgrow.model.keys import follow_layers
from outgrow.model.notation import spaces

# Config keys that are no sizes and do not change what the network computes.
NEUTRAL = {
    "architectures", "auto_map", "dtype", "initializer_range", "torch_dtype", "transformers_version",
    "use_cache", "_name_or_path",
}  # fmt: skip
SCALED_BY_LENGTH = ("yarn", "longrope", "llama3")  # rotary positions, unless the config says by how much


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
    if plan.lesson is not None:
        own = _proof(plan).reasons
        return Certificate((plan.lesson.reason, *own))
    return _proof(plan)


def _proof(plan: Decision) -> Certificate:
    """Prove what the steps alone keep."""
    if plan.change is not None:
        within = certify(plan.change.within).reasons
        broken = broken_conditions(plan)
        return Certificate((*within, *broken))
    if not plan.recipe.inherits:
        return Certificate((f"operator {plan.operator!r} inherits nothing",))
    parts = (_config, _layers, _steps, _spaces)
    reasons = chain.from_iterable(part(plan) for part in parts)
    return Certificate(tuple(reasons))


def _config(plan: Decision) -> Iterator[str]:
    """Prove (1): no value differs that is no size."""
    family = plan.family
    layers = plan.layers
    # The keys that growth may change.
    sizes = {family.field_name(name) for name in STANDARD if name != "layer_types"}
    sizes |= {family.rotary_field, *ROPE, *THETA, *family.follows}
    sizes |= {key for key, _ in family.more.values()}
    # Every other value must say the same, but for those that do not touch the logits in evaluation.
    source = _with_kinds(family, plan.source_config)
    target = _with_kinds(family, plan.target_config)
    every_key = source.keys() | target.keys()
    by_depth = family.scaled_by_depth(source, target)
    for key, expected in by_depth.items():
        if not isclose(float(target.get(key) or 0), expected, rel_tol=1e-9):
            yield (
                f"config {key}: {target.get(key)!r}, which with {layers.target} layers scales what each of "
                f"them adds otherwise; {expected:.6g} would keep it"
            )
    keys = every_key - sizes - NEUTRAL - by_depth.keys()
    apart = {key for key in keys if key.endswith("_token_id") or "drop" in key}
    for key in sorted(keys - apart):
        before = source.get(key)
        after = target.get(key)
        if not _same(key, before, after, layers):
            yield f"config {key}: {before!r} becomes {after!r}, which is no size and may change the function"
    # A layer that moves must not be scaled by its number.
    moved = [number for number, layer in enumerate(layers.layers) if number != layer]
    moved_and_working = [number for number in moved if not layers.identity[number]]
    by_layer = source.get("scale_attn_by_inverse_layer_idx")
    if by_layer and moved_and_working:
        yield "config scale_attn_by_inverse_layer_idx: layers that move are scaled otherwise"
    yield from _rotary(family, source, target)


def _with_kinds(family: Family, config: Config) -> dict[str, Any]:
    """Complete a config with the kinds of its layers, which the class fills in."""
    return {**config, "layer_types": family.layer_kinds(config)}


def _same(key: str, before: Any, after: Any, layers: LayerMap) -> bool:
    """Check that a config value says the same of every layer that works.

    An output head that is no longer tied starts as the embedding that it was tied to.
    """
    if key == "tie_word_embeddings" and after is False:
        return True
    counts = (layers.source, layers.target)
    are_lists = isinstance(before, list) and isinstance(after, list)
    if are_lists and (len(before), len(after)) == counts:
        for entry, layer, idle in zip(after, layers.layers, layers.identity, strict=True):
            if not idle and entry != before[layer]:
                return False
        return True
    expected = follow_layers(key, before, layers.layers, layers.source)
    return bool(expected == after)


def _rotary(family: Family, source: Config, target: Config) -> Iterator[str]:
    """Compare the angles of rotary positions (RoPE), in today's spelling and in that of older configs."""
    before = rope_of(source)
    after = rope_of(target)
    shares = {family.rotary_field, "partial_rotary_factor"}
    keys = {*before, *after}
    for key in sorted(keys - shares):
        if before.get(key) != after.get(key):
            yield (
                f"config rope_parameters.{key}: {before.get(key)!r} becomes {after.get(key)!r}, which "
                "turns positions otherwise"
            )
    positions = family.field_name("max_position_embeddings")
    if source.get(positions) == target.get(positions):
        return
    # One set of parameters for all layers, or one for each kind of layers.
    of_kinds = [part for part in after.values() if isinstance(part, Mapping)]
    original = target.get("original_max_position_embeddings")
    for rope in (after, *of_kinds):
        kind = rope.get("rope_type", "default")
        length = rope.get("original_max_position_embeddings") or original
        fixed = rope.get("factor") and length
        by_length = kind in SCALED_BY_LENGTH and not fixed
        if kind == "dynamic" or by_length:
            yield f"config {positions}: rotary positions of type {kind!r} are scaled by it"


_REPEATS = "work although their source layers already do"


def _layers(plan: Decision) -> Iterator[str]:
    """Prove (2): every source layer works once, all other layers pass the residual stream on."""
    layers = plan.layers
    if not layers.is_lossless:
        repeated = [
            number for number, layer in enumerate(layers.layers) if layers.layers.index(layer) != number
        ]
        works = "are means of two layers and work beside them" if layers.between else _REPEATS
        again = f"target layers {_some(repeated)} {works}"
        yield f"depth {layers.rule!r}: {again if repeated else 'the layers change their order'}"
    for step in plan.steps:
        number = step.tensor.layer
        idle = number is not None and layers.identity[number]
        must_be_zero = idle and plan.family.writes_residual(step.tensor)
        if must_be_zero and not step.zero:
            yield f"{step.name}: must be zero, since layer {number} is to pass the residual stream on"
        if step.zero and not idle:
            yield f"{step.name}: is zero although its layer is to work"


def _steps(plan: Decision) -> Iterator[str]:
    """Prove (3): every tensor has the maps of its spaces and takes its own source."""
    expected: dict[LineKey, tuple[AxisMap, ...]] = {}
    faults: dict[str, int] = {}
    for step in plan.steps:
        line = step.tensor.line
        is_bias = step.tensor.is_bias
        key = (line.name, line.text, is_bias)  # every layer shares its line's maps
        if key not in expected:
            recipe = plan.recipe.spaces_only()
            expected[key] = recipe.maps(step.tensor)
        targets = expected[key]
        pairs = zip(step.maps, targets, strict=True)
        fitting = [own is of_spaces or own == of_spaces for own, of_spaces in pairs]
        if not all(fitting):
            fault = (
                f"{line.name}: axes of {line.text!r} are not grown space by space, so its neighbours do "
                "not undo it"
            )
            faults[fault] = faults.get(fault, 0) + 1
        own_source = plan.source_name(step.tensor)
        if not step.zero and step.source != own_source:
            origin = step.source or "nothing"
            fault = f"{step.name}: takes {origin}, not its own source"
            faults[fault] = 1
    for fault, count in faults.items():
        times = f" ({count} tensors)"
        yield f"{fault}{times}" if count > 1 else fault


def _spaces(plan: Decision) -> Iterator[str]:
    """Prove (4): on each space, reading after writing is the identity."""
    growth = plan.growth
    for space, expansion in plan.recipe.expansions.items():
        if not plan.family.uses(space):
            continue
        if space == "residual":
            yield from _residual(plan, expansion)
        elif space in ("vocab", "pos"):
            yield from _kept_first(space, expansion)
        else:
            gain = growth.attention_gain if space == "qk" else 1.0
            yield from _inner(space, expansion, gain)
            yield from _special(space, expansion, plan)


def _inner(space: str, expansion: Expansion, expected: float) -> Iterator[str]:
    """Check that reading after writing gives `expected` × the source on every index, and nothing from new
    ones.
    """
    write = expansion.write
    read = expansion.read
    met = write.copies & read.copies  # (N,) written and read as copies
    index = read.index[met]
    if (write.index[met] != index).any():
        yield f"{space}: some target indices are written from one source index and read as another"
        return
    # (n,) the sum of what is read of each source index, and how many copies of it are read.
    gains = (write.gain * read.gain)[met]
    weight = np.bincount(index, gains, minlength=read.source)
    readings = np.bincount(index, minlength=read.source)
    if lost := int((readings == 0).sum()):
        yield f"{space}: {lost} of {read.source} source indices are lost"
    elif not np.allclose(weight, expected, rtol=1e-9):
        apart = np.abs(weight - expected)
        worst = int(apart.argmax())
        reading = f"{weight[worst]:.4g} × source index {worst}"
        sums = f"{reading}, expected {expected:.4g}"
        yield f"{space}: reading its copies gives {sums}; copies are not divided among readers"
    from_next = write.fill == Fill.NEXT
    if from_next.any():
        yield f"{space}: {int(from_next.sum())} indices are written by the next layer and read as copies"
    written = write.fill != Fill.ZERO
    is_read = read.fill != Fill.ZERO
    new = ~met & ~from_next
    leaks = new & written & is_read
    if count := int(leaks.sum()):
        yield f"{space}: {count} new indices are written and read, neither as zero"


def _special(space: str, expansion: Expansion, plan: Decision) -> Iterator[str]:
    """Check what lies between the writers and readers of a space: activations, rotary positions, norms."""
    growth = plan.growth
    write = expansion.write
    gains = write.gain[write.copies]
    is_nonlinear = space in ("ffn", "kv", "group")
    if is_nonlinear and not np.allclose(gains, 1):
        yield f"{space}: writers are scaled, which its nonlinearity does not pass on"
    if space == "qk" and growth.family.rotary is not None:
        turned = growth.family.rotary_dims(growth.source_config)
        if not growth.rotary_kept:
            after = growth.family.rotary_dims(growth.target_config)
            yield f"qk: {turned} rotary dims become {after}, so positions turn by other angles"
        elif not _turned_stay(write, turned):
            yield (
                f"qk: the {turned} rotary dims of each head do not stay where they are, so they turn by "
                "other angles"
            )
    if not growth.grows(space) or _uniform(write):
        return
    lines = growth.family.lines_of(growth.source_config)
    for line in lines:
        if line.kind != "norm":
            continue
        over = {named.name for named in spaces(line.out)}
        if space in over:
            yield f"{space}: {line.name} normalises over it, and new indices change what it divides by"


def _turned_stay(write: AxisMap, turned: int) -> bool:
    """Check that the dims that rotary positions turn stay first in their head, and nothing else copies
    them."""
    first = write.index[:turned]
    copied = write.copies[:turned]
    in_place = first == np.arange(turned)
    stay = copied.all() and in_place.all()
    others = write.index[turned:]
    others = others[write.copies[turned:]]
    return bool(stay and (others >= turned).all())


def _uniform(write: AxisMap) -> bool:
    """Check that nothing is new and every source index is copied as often."""
    counts = write.counts()
    as_often = counts == counts[0]
    return bool(write.copies.all() and as_often.all())


def _kept_first(space: str, expansion: Expansion) -> Iterator[str]:
    """Check that old tokens and positions stay where they are; new ones may be anything."""
    for side in (expansion.write, expansion.read):
        first = slice(0, side.source)
        unscaled = side.gain[first] == 1
        in_copies = side.copies[first]
        copied = in_copies.all() and unscaled.all()
        own = np.arange(side.source)
        in_place = np.array_equal(side.index[first], own)
        if not copied or not in_place:
            yield f"{space}: its {side.source} old indices do not stay where they are"
            return


def _residual(plan: Decision, expansion: Expansion) -> Iterator[str]:
    """Check the residual stream.

    Writers put c·[x ×r, mean or zero ×s] into it; norms then divide by the statistics of that.
    """
    growth = plan.growth
    write = expansion.write
    n = write.source
    N = write.target
    counts = write.counts()
    r = int(counts[0])
    if (counts != r).any():
        least = counts.min()
        most = counts.max()
        yield (
            f"residual: its {n} indices are copied {least} to {most} times, which changes the norms' "
            "statistics"
        )
        return
    if r == 0:
        yield f"residual: all {n} source indices are lost"
        return
    is_layer_norm = growth.family.norm == "layer"
    fill = Fill.MEAN if is_layer_norm else Fill.ZERO
    new = write.fill[~write.copies]
    if (new != fill).any():
        yield (
            f"residual: new indices hold other than {fill.name.lower()}, which changes the norms' statistics"
        )
    is_mean = write.fill == Fill.MEAN
    scaled = write.gain[write.copies | is_mean]
    copy_gains = write.gain[write.copies]
    c = float(copy_gains[0])
    if not np.allclose(scaled, c, rtol=1e-12):
        yield "residual: writers are not all scaled alike"
    rho = r * n / N
    yield from _epsilon(plan, c * c * rho)
    yield from _norms(plan, expansion, r, c, rho)


def _epsilon(plan: Decision, factor: float) -> Iterator[str]:
    """Check that the norms' epsilon follows the variance they see, and stays for norms over other spaces."""
    family = plan.family
    before = family.eps(plan.source_config)
    after = family.eps(plan.target_config)
    if not family.sets_eps:
        if not isclose(factor, 1, rel_tol=1e-9):
            yield (
                f"residual: norms see variance × {factor:.4g}, and no config key is known that sets their "
                "epsilon"
            )
        return
    if not isclose(factor * before, after, rel_tol=1e-9):
        epsilon = f"epsilon {before:g} becomes {after:g}"
        yield f"residual: norms see variance × {factor:.4g} but {epsilon}"
    if before != after:
        for line in family.other_norms(plan.source_config):
            yield (
                f"{line.name}: normalises over {line.out} with the config's epsilon too, which becomes "
                f"{after:g}"
            )


def _norms(plan: Decision, expansion: Expansion, r: int, c: float, rho: float) -> Iterator[str]:
    """Check that what reaches the readers, (1/√ρ)·scale on each copy and the shift, sums to the source."""
    undone = 1.0
    if plan.recipe.hidden_ratio != 1:
        undone = plan.growth.embedding_gain
    tied_head = expansion.write.scaled(undone)
    head = tied_head if plan.growth.tied else expansion.head
    pairs = [("the final norm", expansion.final_scale, expansion.final_shift, head)]
    if plan.family.prenorm:
        norms = ("norms", expansion.scale, expansion.shift, expansion.read)
        pairs.append(norms)
    elif not _inverts(expansion.write, expansion.read, 1.0):
        yield "residual: readers do not give back the source"
    for which, scale, shift, read in pairs:
        parts = (("scale", scale, sqrt(rho)), ("shift", shift, 1.0))
        for part, sums, expected in parts:
            if not _inverts(sums, read, expected):
                yield f"residual: {which}: {part} and readers do not give back the source"
        if _writes_new(shift) and _writes_new(read):
            yield f"residual: {which}: shift on new indices is read"
        written = expansion.write
        copies = read.copies
        same_copies = np.array_equal(written.copies, copies)
        expected = written.index[copies]
        moved = scale.index[copies] != expected
        if not same_copies or moved.any():
            yield f"residual: {which}: scale and readers take other copies than the writers"
    post_gains = expansion.post_scale.gain[expansion.write.copies]
    expected_gain = c * sqrt(rho)
    adds_scaled = np.allclose(post_gains, expected_gain)
    lines = plan.family.lines
    has_post_norms = any(line.kind == "post norm" for line in lines)
    if has_post_norms and not adds_scaled:
        yield "residual: post norms do not scale what they add like the other writers"


def _writes_new(side: AxisMap) -> bool:
    """Check whether any new index holds something else than zero."""
    new = side.fill[~side.copies]
    return bool((new != Fill.ZERO).any())


def _inverts(first: AxisMap, second: AxisMap, expected: float) -> bool:
    """Check that the products of two maps' gains sum to `expected` on every source index."""
    same_index = first.index == second.index
    met = first.copies & second.copies & same_index
    products = (first.gain * second.gain)[met]
    index = first.index[met]
    weight = np.bincount(index, products, minlength=first.source)
    return bool(np.allclose(weight, expected, rtol=1e-9))


def _some(numbers: list[int]) -> str:
    """List the first of some numbers."""
    first = map(str, numbers[:8])
    listing = ", ".join(first)
    return f"{listing}, …" if len(numbers) > 8 else listing
