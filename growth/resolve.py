"""Resolving what a source is: its family by the schema that is here, by one derived and rehearsed, or by an
outline; else it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from outgrow.growth.layers import LAYER_MAPS, layer_map
from outgrow.growth.plan import deepened
from outgrow.growth.recipe import Growth
from outgrow.model.base.errors import UserError, names_of
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.composite import flat
from outgrow.model.config import Target, resolve_target
from outgrow.model.depth_only import outline
from outgrow.model.family import MAX_LAYERS, Config, Family, family_of, has_schema
from outgrow.model.fp8 import dequantised, obstacle
from outgrow.model.keys import DEPTH_KEYS, EXPERTS, HEAD_KEYS, follow_layers, without
from outgrow.model.quantisation import is_plain

if TYPE_CHECKING:
    from outgrow.growth.rehearse import Rehearsal
    from outgrow.model.derive import Draft
MAX_EXPERTS = 1 << 12  # of one layer; no model has a fourth of it
ORIGINAL = "give the checkpoint that it was made from, since no library makes plain weights of these"
OTHERWISE = "dequantise it first, where its library can, or give the checkpoint that it was made from"
# How plain weights come of a quantised checkpoint, by its method.
WAYS = {
    "bitsandbytes": (
        "dequantise it first (AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(NEW), "
        "with bitsandbytes)"
    ),
    "mxfp4": (
        "dequantise it first (AutoModelForCausalLM.from_pretrained(DIR, "
        "quantization_config=Mxfp4Config(dequantize=True), dtype='bfloat16').save_pretrained(NEW))"
    ),
    "gptq": ORIGINAL,
    "awq": ORIGINAL,
    "compressed-tensors": (
        "dequantise it first (AutoModelForCausalLM.from_pretrained(DIR, "
        "quantization_config=CompressedTensorsConfig(dequantize=True)).save_pretrained(NEW), with "
        "compressed-tensors)"
    ),
}
BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")  # which older files carry along
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Resolved:
    """A family, and what is and is not known of it.

    Attributes:
        family: the schema to go by.
        notes: in words; none for a family with a schema of its own.
        config: of the source, with everything that the library's class makes of it; None where the file's own
            will do.
    """

    family: Family
    notes: tuple[str, ...] = ()
    config: Config | None = None


def resolve_family(
    source: Checkpoint | Config,
    target: Target,
    depth: str | Sequence[int],
    operator: str = "lossless",
    options: Mapping[str, Any] | None = None,
) -> Resolved:
    """The family of `source` for a growth into `target`.

    Without a schema: whole layers are copied by an outline (`model.outline`); for anything else a schema is
    derived (`model.derive`) and this very growth rehearsed on a tiny random model of the family
    (`growth.rehearse`) before it is believed: a lossless one must keep the logits; where none does, an
    `operator` that is not lossless must give a model that the library's class loads and runs.

    Raises:
        UserError: the family is unknown to the library too, or the derived schema was not confirmed; the
            message says why.
    """
    config = source.config if isinstance(source, Checkpoint) else source
    if isinstance(source, Checkpoint) and source.quantised is not None:
        return _quantised(source, target, depth)
    named = isinstance(config.get("model_type"), str)
    if not named or has_schema(config):
        return Resolved(family_of(config))
    shapes = _shapes(source) if isinstance(source, Checkpoint) else None
    _check_counts(config, "config.json")
    if isinstance(target, Mapping):
        _check_counts(target, "target")
    if shapes is not None:
        _check_depth(config, shapes)
    if shapes is not None and _copies_layers_only(config, target, depth):
        return _outlined(config, shapes)
    chosen = options or {}
    return _derived(config, shapes, target, depth, operator, chosen)


def _shapes(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    """List the shapes of a checkpoint's tensors."""
    return {name: stored.shape for name, stored in source.tensors.items()}


def plain_source(source: Checkpoint, target: Target, depth: str | Sequence[int]) -> Checkpoint:
    """A source as growth reads it: FP8 weights with scales dequantised on the way, unless whole layers are
    copied byte for byte.

    Raises:
        UserError: the scales do not fit.
    """
    fields = flat(target) if isinstance(target, Mapping) else target
    if source.quantised is None:
        return source
    if _copies_layers_only(source.config, fields, depth):
        return source
    return dequantised(source) or source


def _quantised(source: Checkpoint, target: Target, depth: str | Sequence[int]) -> Resolved:
    """Whole layers of quantised weights, byte for byte.

    Raises:
        UserError: anything else is asked for, or the config says of layers by their numbers how they are
            quantised.
    """
    config = source.config
    dtypes = {stored.dtype for stored in source.tensors.values()}
    kinds = ", ".join(sorted(dtype for dtype in dtypes if not is_plain(dtype)))
    quantisation = f"{source.quantised}; {kinds}"
    what = f"{source.folder}: its weights are quantised ({quantisation})"
    if not _copies_layers_only(config, target, depth):
        reason = obstacle(source)
        why = "" if reason is None else f"{reason}; "
        raise UserError(
            f"{what}, and growth computes on plain ones: {why}{WAYS.get(str(source.quantised), OTHERWISE)}, "
            "or copy whole layers (growth.depth=stack and no size but the number of layers)"
        )
    entries = {key: value for key, value in config.items() if "quantization_config" in key}
    text = json.dumps(entries, default=str)
    without_decimals = re.sub(r"\d\.\d+", "", text)
    if re.search(r"\.\d+\b", without_decimals):
        raise UserError(
            f"{what}, and quantization_config names layers by their numbers, which would move; dequantise "
            "it first"
        )
    note = (
        f"weights quantised by {source.quantised} are copied byte for byte, layer by layer; nothing "
        "was checked"
    )
    return Resolved(outline(config, _shapes(source)), (note,))


def _check_counts(entries: Mapping[str, Any], where: str) -> None:
    """Reject more layers or experts than any model has, before the library's class makes a module or a name
    of each.
    """
    for key, value in entries.items():
        name = key.rpartition(".")[2]
        most = None
        if name in DEPTH_KEYS:
            most = MAX_LAYERS
        elif EXPERTS.search(name):
            most = MAX_EXPERTS
        if most is not None and type(value) is int and value > most:
            raise UserError(
                f"{where}: {key} {value:,} is more than any model has (at most {most:,}); is this a typo?"
            )


def _check_depth(config: Config, shapes: Shapes) -> None:
    """Reject a config with more layers than the file has tensors, before anything is allocated per layer."""
    for key in DEPTH_KEYS:
        count = config.get(key)
        if isinstance(count, int) and count > len(shapes):
            raise UserError(
                f"config.json says {key} {count:,}, but the file has {len(shapes)} tensors; is it another "
                "checkpoint's?"
            )


def _outlined(config: Config, shapes: Shapes) -> Resolved:
    from outgrow.model.derive import library_knows, passed_over, whole_config

    is_known = library_knows(config)
    complete = whole_config(config) if is_known else config
    dropped = passed_over(complete, shapes) if is_known else []
    own_shapes = without(shapes, dropped)
    outlined = outline(complete, own_shapes)
    family = replace(outlined, ignore=tuple(dropped))
    check = "transformers does not know it, so nothing could be checked"
    if is_known:
        check = "the result was held against transformers' class"
    note = (
        f"family {family.name!r} has no schema here: layers were told by their names and whole layers are "
        f"copied; {check}"
    )
    notes = (note, *_left_out(dropped))
    return Resolved(family, notes, complete if is_known else None)


def _left_out(names: Sequence[str]) -> list[str]:
    return [f"left out: {names_of(names)}, as transformers does when it loads them"] if names else []


def _copies_layers_only(config: Config, target: Target, depth: str | Sequence[int]) -> bool:
    """Check that nothing but the number of layers changes, and no new layer has to start as the identity."""
    if not isinstance(target, Mapping):
        return False
    if isinstance(depth, str):
        _, adds_identity = LAYER_MAPS.get(depth, (None, False))
        if adds_identity:
            return False
    others = without(target, DEPTH_KEYS)
    return all(_says_the_same(key, others[key], config, target, depth) for key in others)


def _says_the_same(key: str, value: Any, config: Config, target: Config, depth: str | Sequence[int]) -> bool:
    """Check that a target's value is the source's, or its list of layers as copying them leaves it."""
    own = config.get(key)
    if value == own:
        return True
    counts = [(config.get(name), target[name]) for name in DEPTH_KEYS if name in target]
    if not isinstance(value, list) or not counts:
        return False
    before, after = counts[0]
    if type(before) is not int or type(after) is not int or after < before:
        return False
    layers = layer_map(depth, before, after).layers
    return bool(follow_layers(key, own, layers, before) == value)


def _derived(
    config: Config,
    shapes: Shapes | None,
    target: Target,
    depth: str | Sequence[int],
    operator: str,
    options: Mapping[str, Any],
) -> Resolved:
    from outgrow.growth.miniature import miniature
    from outgrow.growth.rehearse import bench
    from outgrow.model.derive import derive, whole_config

    name = config["model_type"]
    head = ""
    try:
        draft = derive(config)
        complete = whole_config(config)
        family = _family(draft, complete, shapes)
        grown = resolve_target(target, complete, family)
        growth = Growth(family, complete, grown)
        UserError.collect(growth.smaller)
        whole_config(deepened(growth, depth))  # the class's own words, on the user's own sizes
        head = _other_heads(draft, complete, grown)
        changes = miniature(draft, complete, grown, depth)
        before = family.sizes(complete)
        after = family.sizes(grown)
        _check_growth_is_tested(draft, before, after, changes)
        if not changes:
            note = f"family {name!r} has no schema here: one was derived, and nothing is widened by it"
            return Resolved(family, (note,), complete)
        rule = depth if isinstance(depth, str) else "identity"
        with bench(draft) as tiny:
            rehearsal = tiny.rehearse(draft, changes, rule, operator, options)
        family = _family(rehearsal.draft, complete, shapes)
    except UserError as fault:
        raise UserError(
            f"family {name!r} has no schema here, and none could be derived and confirmed for this growth: "
            f"{fault}{head}; what is left: whole layers copied (growth.depth=stack and no size but the "
            "number of layers), or a schema of your own (docs/families.md, 'Add a family')"
        ) from None
    tiny_config = draft.axes.config
    moves = [f"{key} {tiny_config.get(key)} → {size}" for key, size in changes.items()]
    listing = ", ".join(moves)
    outcome = _outcome(rehearsal, listing, operator)
    if len(tiny.inputs) > 1:
        outcome += ", on tokens alone and with a picture among them"
    origin = f"one was derived from transformers' own class ({len(family.lines)} lines)"
    notes = [f"family {name!r} has no schema here: {origin}", outcome]
    if draft.unused:
        notes.append(f"not tested: {names_of(draft.unused)}, which no forward pass here goes through")
    notes += _left_out(family.ignore)
    return Resolved(family, tuple(notes), complete)


def _outcome(rehearsal: Rehearsal, sizes: str, operator: str) -> str:
    if rehearsal.error is None:
        how = f"grown by {operator} ({sizes}), loads and runs in transformers"
        return f"shapes confirmed, not logits: a tiny random model of the family, {how}"
    return (
        f"confirmed: a tiny random model of the family, grown by it ({sizes}), kept its logits in float64 "
        f"to {rehearsal.error:.1g} of the largest"
    )


def known_family(config: Config) -> Resolved:
    """The family of a network that inherits nothing: by the schema that is here, or by one derived, for which
    there is no growth to rehearse.

    Raises:
        UserError: the family is unknown to the library too, or no schema can be derived.
    """
    if has_schema(config):
        return Resolved(family_of(config))
    from outgrow.model.derive import whole_config

    return Resolved(derived_family(config), config=whole_config(config))


def derived_family(source: Checkpoint | Config) -> Family:
    """The schema that is derived for a source, also where one is written here; nothing is rehearsed.

    Raises:
        UserError: the library does not know the family, or it cannot be derived.
    """
    from outgrow.model.derive import derive, whole_config

    config = source.config if isinstance(source, Checkpoint) else source
    shapes = (
        {name: stored.shape for name, stored in source.tensors.items()}
        if isinstance(source, Checkpoint)
        else None
    )
    if shapes is not None:
        _check_depth(config, shapes)
    return _family(derive(config), whole_config(config), shapes)


def _other_heads(draft: Draft, source: Config, target: Config) -> str:
    """Warn of head dims that grow, or that a config leaves to hidden size / heads, where the growth changes
    them.
    """
    keys = draft.axes.keys
    for key in HEAD_KEYS:
        before = source.get(key)
        after = target.get(key)
        if after and before and after != before:
            return (
                f"; {key} {before} becomes {after}, so rotary positions would turn other dims by "
                f"other angles: keep {key}:{before} and add heads instead, or choose an operator that "
                "is not lossless, such as tile"
            )
    is_given = any(target.get(key) for key in HEAD_KEYS)
    if is_given or not keys.heads:
        return ""
    more = target[keys.heads]
    heads = source[keys.heads]
    dim = source[keys.hidden] // heads
    wider = target[keys.hidden] // more
    if dim == wider:
        return ""
    return (
        f"; head_dim is not given, so with {keys.hidden} {target[keys.hidden]} each of {more} heads would "
        f"have {wider} dims instead of {dim}, and rotary positions would turn other dims by other angles: "
        f"give head_dim:{dim} in the target to keep them"
    )


def _family(draft: Draft, config: Config, shapes: Shapes | None) -> Family:
    """The drafted family under the names of the file: older ones call tensors otherwise and carry buffers
    along.
    """
    from outgrow.model.derive import drafted_family, named_shapes, passed_over, tied_names

    built, called = named_shapes(config, shapes or ())
    if shapes is None:
        return drafted_family(draft, config, built)
    strange = [name for name in shapes if called[name] not in built]
    dropped: set[str] = set()
    if strange:
        dropped.update(passed_over(config, strange))
        dropped.update(tied_names(config, strange))
    buffers = [name for name in strange if name in dropped or name.endswith(BUFFERS)]
    # in the class's order, which a record has too
    order = {name: number for number, name in enumerate(built)}

    def rank(name: str) -> tuple[int, str]:
        last = len(order)
        number = order.get(called[name], last)
        return number, name

    names = sorted(shapes.keys() - set(buffers), key=rank)
    own_shapes = {name: shapes[name] for name in names}
    family = drafted_family(draft, config, own_shapes, called)
    return replace(family, ignore=tuple(buffers))


def _check_growth_is_tested(
    draft: Draft, source: Mapping[str, int], target: Mapping[str, int], changes: Mapping[str, int]
) -> None:
    """Every space that is to grow must grow in the rehearsal, or it would be believed untested."""
    from outgrow.model.derive import drafted_family

    config = draft.axes.config
    tiny = drafted_family(draft, config, draft.axes.shapes)
    before = tiny.sizes(config)
    after = tiny.sizes({**config, **changes})
    spaces = [space for space in source if space != "layer"]
    growing = [space for space in spaces if target[space] != source[space]]
    untested = sorted(space for space in growing if before.get(space) == after.get(space))
    if untested:
        names = ", ".join(untested)
        raise UserError(f"nothing in a tiny model of the family stands for growth of {names}")
