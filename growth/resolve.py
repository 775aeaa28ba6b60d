"""Resolving what a source is: its family by the schema that is here, by one derived and rehearsed, or by an
outline; else it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from outgrow.growth.layers import LAYER_MAPS
from outgrow.growth.recipe import Growth
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint, is_plain, names_of
from outgrow.model.composite import flat
from outgrow.model.config import Target, resolve_target
from outgrow.model.depth_only import outline
from outgrow.model.family import Config, Family, family_of, has_schema
from outgrow.model.fp8 import dequantised
from outgrow.model.keys import DEPTH_KEYS, HEAD_KEYS

if TYPE_CHECKING:
    from outgrow.growth.rehearse import Rehearsal
    from outgrow.model.derive import Draft
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
    "fp8": (
        "its matrices have no scales X.weight_scale_inv beside them, without which they cannot be "
        "dequantised on the way; dequantise it first, or give the checkpoint that it was made from"
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
    if not isinstance(config.get("model_type"), str) or has_schema(config):
        return Resolved(family_of(config))
    shapes = (
        {name: stored.shape for name, stored in source.tensors.items()}
        if isinstance(source, Checkpoint)
        else None
    )
    if shapes is not None:
        _check_depth(config, shapes)
    if shapes is not None and _copies_layers_only(config, target, depth):
        return _outlined(config, shapes)
    return _derived(config, shapes, target, depth, operator, options or {})


def plain_source(source: Checkpoint, target: Target, depth: str | Sequence[int]) -> Checkpoint:
    """A source as growth reads it: FP8 weights with scales dequantised on the way, unless whole layers are
    copied byte for byte.

    Raises:
        UserError: the scales do not fit.
    """
    asked = flat(target) if isinstance(target, Mapping) else target
    if source.quantised is None or _copies_layers_only(source.config, asked, depth):
        return source
    return dequantised(source) or source


def _quantised(source: Checkpoint, target: Target, depth: str | Sequence[int]) -> Resolved:
    """Whole layers of quantised weights, byte for byte.

    Raises:
        UserError: anything else is asked for, or the config says of layers by their numbers how they are
            quantised.
    """
    config, kinds = (
        source.config,
        sorted({stored.dtype for stored in source.tensors.values() if not is_plain(stored.dtype)}),
    )
    what = f"{source.folder}: its weights are quantised ({source.quantised}; {', '.join(kinds)})"
    if not _copies_layers_only(config, target, depth):
        raise UserError(
            f"{what}, and growth computes on plain ones: {WAYS.get(str(source.quantised), OTHERWISE)}, or "
            "copy whole layers (growth.depth=stack and no size but the number of layers)"
        )
    said = json.dumps(
        {key: value for key, value in config.items() if "quantization_config" in key}, default=str
    )
    if re.search(r"\.\d+\b", re.sub(r"\d\.\d+", "", said)):
        raise UserError(
            f"{what}, and quantization_config names layers by their numbers, which would move; dequantise "
            "it first"
        )
    family = outline(config, {name: stored.shape for name, stored in source.tensors.items()})
    return Resolved(
        family,
        (
            f"weights quantised by {source.quantised} are copied byte for byte, layer by layer; nothing "
            "was checked",
        ),
    )


def _check_depth(config: Config, shapes: Shapes) -> None:
    """Reject a config with more layers than the file has tensors, before anything is allocated per layer."""
    for key in DEPTH_KEYS:
        if isinstance(count := config.get(key), int) and count > len(shapes):
            raise UserError(
                f"config.json says {key} {count:,}, but the file has {len(shapes)} tensors; is it another "
                "checkpoint's?"
            )


def _outlined(config: Config, shapes: Shapes) -> Resolved:
    from outgrow.model.derive import library_knows, passed_over, whole_config

    known = library_knows(config)
    complete = whole_config(config) if known else config
    dropped = passed_over(complete, shapes) if known else []
    family = replace(
        outline(complete, {name: shape for name, shape in shapes.items() if name not in dropped}),
        ignore=tuple(dropped),
    )
    held = (
        "the result was held against transformers' class"
        if known
        else "transformers does not know it, so nothing could be checked"
    )
    note = (
        f"family {family.name!r} has no schema here: layers were told by their names and whole layers are "
        f"copied; {held}"
    )
    return Resolved(family, (note, *_left_out(dropped)), complete if known else None)


def _left_out(names: Sequence[str]) -> list[str]:
    return [f"left out: {names_of(names)}, as transformers does when it loads them"] if names else []


def _copies_layers_only(config: Config, target: Target, depth: str | Sequence[int]) -> bool:
    """Check that nothing but the number of layers changes, and no new layer has to start as the identity."""
    if not isinstance(target, Mapping):
        return False
    if isinstance(depth, str) and LAYER_MAPS.get(depth, (None, False))[1]:
        return False
    others = {key: value for key, value in target.items() if key not in DEPTH_KEYS}
    return all(config.get(key) == value for key, value in others.items())


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

    name, head = config["model_type"], ""
    try:
        draft, complete = derive(config), whole_config(config)
        family = _family(draft, complete, shapes)
        grown = resolve_target(target, complete, family)
        UserError.collect(Growth(family, complete, grown).smaller)
        head = _other_heads(draft, complete, grown)
        changes = miniature(draft, complete, grown, depth)
        _check_asked(draft, family.sizes(complete), family.sizes(grown), changes)
        if not changes:
            return Resolved(
                family,
                (f"family {name!r} has no schema here: one was derived, and nothing is widened by it",),
                complete,
            )
        with bench(draft) as tiny:
            rehearsal = tiny.rehearse(
                draft, changes, depth if isinstance(depth, str) else "identity", operator, options
            )
        family = _family(rehearsal.draft, complete, shapes)
    except UserError as fault:
        raise UserError(
            f"family {name!r} has no schema here, and none could be derived and confirmed for this growth: "
            f"{fault}{head}; what is left: whole layers copied (growth.depth=stack and no size but the "
            "number of layers), or a schema of your own (docs/families.md, 'Add a family')"
        ) from None
    known = draft.axes.config
    moves = [(key, known.get(key), size) for key, size in changes.items()]
    sizes = ", ".join(f"{key} {before} → {after}" for key, before, after in moves)
    notes = [
        (
            f"family {name!r} has no schema here: one was derived from transformers' own class "
            f"({len(family.lines)} lines)"
        ),
        f"{_outcome(rehearsal, sizes, operator)}"
        + ", on tokens alone and with a picture among them" * (len(tiny.inputs) > 1),
    ]
    if draft.unused:
        notes.append(f"not tested: {names_of(draft.unused)}, which no forward pass here goes through")
    return Resolved(family, (*notes, *_left_out(family.ignore)), complete)


def _outcome(rehearsal: Rehearsal, sizes: str, operator: str) -> str:
    if rehearsal.error is None:
        how = f"grown by {operator} ({sizes}), loads and runs in transformers"
        return f"shapes confirmed, not logits: a tiny random model of the family, {how}"
    return (
        f"confirmed: a tiny random model of the family, grown by it ({sizes}), kept its logits in float64 "
        f"to {rehearsal.error:.1g} of the largest"
    )


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
    """What happens to head dims that grow, or that a config leaves to hidden size / heads, where the growth
    changes them.
    """
    keys = draft.axes.keys
    for key in HEAD_KEYS:
        if target.get(key) and source.get(key) and target[key] != source[key]:
            return (
                f"; {key} {source[key]} becomes {target[key]}, so rotary positions would turn other dims by "
                f"other angles: keep {key}:{source[key]} and add heads instead, or choose an operator that "
                "is not lossless, such as tile"
            )
    if not keys.heads or any(target.get(key) for key in HEAD_KEYS):
        return ""
    (dim, _), (wider, more) = (
        (config[keys.hidden] // config[keys.heads], config[keys.heads]) for config in (source, target)
    )
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
        dropped = {*passed_over(config, strange), *tied_names(config, strange)}
    buffers = [name for name in strange if name in dropped or name.endswith(BUFFERS)]
    # in the class's order, which a record has too
    order = {name: number for number, name in enumerate(built)}

    def rank(name: str) -> tuple[int, str]:
        return order.get(called[name], len(order)), name

    names = sorted(shapes.keys() - set(buffers), key=rank)
    family = drafted_family(draft, config, {name: shapes[name] for name in names}, called)
    return replace(family, ignore=tuple(buffers))


def _check_asked(
    draft: Draft, source: Mapping[str, int], target: Mapping[str, int], changes: Mapping[str, int]
) -> None:
    """Every space that is to grow must grow in the rehearsal, or it would be believed untested."""
    from outgrow.model.derive import drafted_family

    tiny = drafted_family(draft, draft.axes.config, draft.axes.shapes)
    before = tiny.sizes(draft.axes.config)
    after = tiny.sizes({**draft.axes.config, **changes})
    asked = {space for space in source if target[space] != source[space]} - {"layer"}
    untested = sorted(space for space in asked if before.get(space) == after.get(space))
    if untested:
        raise UserError(f"nothing in a tiny model of the family stands for growth of {', '.join(untested)}")
