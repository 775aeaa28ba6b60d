"""Configs as plain dicts under their Hugging Face names: read from a folder, and resolved into the config of
a target.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from outgrow.model.base.errors import UserError, did_you_mean, reading
from outgrow.model.composite import TEXT, flat
from outgrow.model.family import STANDARD, Config, Family, family_of
from outgrow.model.keys import is_number, without
from outgrow.model.presets import PRESETS, preset, preset_sizes

# preset name, folder, overrides, or a transformers config
Target: TypeAlias = "str | Path | Mapping[str, Any] | Any"

# older configs keep the base outside
ROPE = ("rope_scaling", "rope_parameters")
THETA = ("rotary_emb_base", "rope_theta")
DTYPES = {"dtype", "torch_dtype"}  # how transformers 5 and 4 call what tensors are stored in
# the key that names the file of a folder's weights, where that is no usual one
WEIGHTS = "transformers_weights"
LARGEST = 1e30  # more than any factor, base or epsilon of a config
# no honest index or tokenizer, no honest config is larger
MAX_JSON_BYTES = 64 << 20
MAX_CONFIG_BYTES = 4 << 20
# nor holds more: of what a parser makes, a value takes a hundred times its bytes
MAX_VALUES, MAX_CONFIG_VALUES = 2_000_000, 100_000


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON object from a file that a stranger may have written; bounded in time and memory before it is
    parsed.

    Raises:
        UserError: it is missing, no regular file, too large, not JSON, or not an object.
    """
    with reading(path):
        if not path.exists():
            raise UserError(f"{path}: no such file")
        if not path.is_file():  # a device never ends, a pipe is waited on for ever
            raise UserError(f"{path}: not a regular file")
        if path.stat().st_size > max_bytes:
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes; no honest {path.name} is larger than {max_bytes:,}"
            )
        content = path.read_bytes()
    check_values(path, content, max_values)
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise UserError(
            f"{path}: not valid JSON ({'nested too deep' if isinstance(fault, RecursionError) else fault})"
        ) from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(entries).__name__}")
    return entries


def check_values(path: Path, text: bytes, most: int) -> None:
    """Count the values of a JSON text by what stands between them, which takes no memory.

    Raises:
        UserError: there are more than `most`.
    """
    count = sum(map(text.count, (b",", b"[", b"{")))
    if count > most:
        raise UserError(f"{path}: about {count:,} values; no honest {path.name} holds more than {most:,}")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder, as its flat view (`model.composite`).

    Raises:
        UserError: as `read_json`; or its text model is no config.
    """
    path = folder / "config.json"
    config = read_json(path, MAX_CONFIG_BYTES, MAX_CONFIG_VALUES)
    text = config.get(TEXT)
    if not isinstance(text, Mapping | None):
        raise UserError(f"{path}: {TEXT} must be keys and values, or null; found {text!r:.80}")
    return flat(config)


def value_faults(config: Config, family: Family) -> Iterator[str]:
    """List values that are no sizes and have a type that the engine does not compute with."""
    scale = family.attention_scale
    scale_keys = [] if scale in ("head_dim", "none") else [scale]
    shares = (family.rotary_field, "partial_rotary_factor")
    eps = family.field_name("norm_eps")
    keys = [eps, "initializer_range", *shares, *THETA, *scale_keys]
    numbers = dict.fromkeys(keys)
    positive = set(scale_keys)
    if family.rotary is not None:  # without positions that turn, their base may be anything
        positive.update(THETA)
    yield from _no_numbers(config, numbers, "config", positive, shares)
    for key in ROPE:
        rope = config.get(key)
        if isinstance(rope, Mapping):
            rope_numbers = (*shares, "rope_theta")
            yield from _no_numbers(rope, rope_numbers, f"config: {key}", positive, shares)
        elif rope is not None:
            yield f"config: {key} must be keys and values, or null; found {rope!r:.80}"
    for key in scale_keys:
        if key in config and config[key] is None:
            yield f"config: {key} must be a finite number above 0; found None"
    kinds = config.get("layer_types")
    are_names = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    if kinds is not None and not are_names:
        yield f"config: layer_types must be a list of names, or null; found {kinds!r:.80}"
    tied = config.get("tie_word_embeddings")
    if not isinstance(tied, bool | None):
        yield f"config: tie_word_embeddings must be true, false or null; found {tied!r:.80}"


def _no_numbers(
    values: Config,
    keys: Iterable[str | None],
    where: str,
    positive: Container[str | None],
    shares: Container[str],
) -> Iterator[str]:
    """List values that are no numbers, or none that a network computes with: NaN, infinite, below zero; zero
    where they are to be `positive`, more than one of `shares`.
    """
    for key in keys:
        value = None if key is None else values.get(key)
        if value is None:
            continue
        if not is_number(value):
            yield f"{where}: {key} must be a number, or null; found {value!r:.80}"
        elif not 0 <= value < LARGEST or (value == 0 and key in positive):
            least = "above 0" if key in positive else "of at least 0"
            yield f"{where}: {key} must be a finite number {least}, or null; found {value!r:.80}"
        elif value > 1 and key in shares:
            yield f"{where}: {key} must be a share of each head, at most 1, or null; found {value!r:.80}"


def tokenizer_size(folder: Path) -> int | None:
    """Count the token ids of a folder's tokenizer.json (its largest, plus one); None where there is none.

    Raises:
        UserError: it is no tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = read_json(path)
    try:
        vocabulary = tokenizer["model"]["vocab"]
        is_list = isinstance(vocabulary, list)
        ids = range(len(vocabulary)) if is_list else vocabulary.values()
        further = tokenizer.get("added_tokens") or ()
        added = [token["id"] for token in further]
        return 1 + max([*ids, *added])
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise UserError(
            f"{path}: not a tokenizer of the tokenizers library ({type(fault).__name__}: {fault})"
        ) from None


def resolve_target(
    target: Target, source: Config | None = None, family: Family | None = None
) -> dict[str, Any]:
    """The whole config of a growth target or of a model to build.

    Args:
        target: a preset's name, a folder with a config.json, a `transformers` config, or a dict of overrides
            of `source` under their Hugging Face names (`{"hidden_size": 2560}`). A preset is laid over the
            source's config too, so that everything that is not a size stays the source's.
        source: the source's config; None only where the target is whole by itself.
        family: the source's, where it is not the one of its `model_type`.

    Returns:
        a new dict. Where the overrides change the head dim of a partly rotary model and say nothing of the
        rotary share, the share follows, so that as many dimensions as before are turned.

    Raises:
        UserError: the preset, folder or key is unknown (with near matches), or overrides come without a
            source.
    """
    if hasattr(target, "to_dict"):
        return _stored_as(source, flat(target.to_dict()))
    if isinstance(target, Mapping):
        return _overlay(flat(target), source, family)
    if str(target) in PRESETS:
        if source is None:
            return preset(str(target))
        return _overlay(preset_sizes(str(target)), source, family)
    folder = Path(os.path.expanduser(target))
    with reading(f"target {str(target)!r}"):
        is_folder = folder.is_dir()
    if is_folder:
        return _stored_as(source, read_config(folder))
    unquoted = re.fullmatch(r"\w+:[\w.]+", str(target))
    way = did_you_mean(str(target), PRESETS)
    if unquoted:
        way = f"a shell takes braces apart, so put quotes around them: 'target={{{target},…}}'"
    raise UserError(f"unknown target {str(target)!r}: neither a folder nor a preset; {way}")


def _overlay(overrides: dict[str, Any], source: Config | None, family: Family | None) -> dict[str, Any]:
    """Lay overrides over the source's config; what follows a changed size there follows it in the target.

    Raises:
        UserError: a key is unknown or has no such value, or the source is no such model.
    """
    if source is None:
        if "model_type" not in overrides:
            raise UserError(
                "a target given as overrides needs a source whose config they change; give a source, or "
                "name a preset"
            )
        return overrides
    family = family or family_of(source)
    UserError.collect(value_faults(source, family))
    own_type = source["model_type"]
    target_type = overrides.get("model_type", own_type)
    if target_type != own_type:
        raise UserError(
            f"target: model_type {target_type!r} differs from the source's {own_type!r}; a family "
            "grows into itself only"
        )
    spelled = {key: key if key in source else family.field_name(key) for key in overrides}
    overrides = {spelled[key]: value for key, value in overrides.items()}
    # How many dims of a head rotary positions turn is given by itself, or among rope_parameters.
    rotary = overrides.pop(family.rotary_field, None)
    _check_dtypes(overrides, source)
    _check_keys(overrides, source, family)
    rope = overrides.pop("rope_parameters", None) or {}
    UserError.collect(
        f"target: {fault.removeprefix('config: ')}"
        for fault in value_faults(overrides | {"rope_parameters": rope}, family)
    )
    rope = dict(rope)
    for key in (family.rotary_field, "partial_rotary_factor"):
        rotary = rope.pop(key, rotary)

    config = {**source, **overrides}
    _follow_sizes(config, overrides, source, family)
    if rope:
        config["rope_parameters"] = rope_of(source) | rope
        if source.get("rope_scaling"):
            config["rope_scaling"] = None
    config = _named(config, source, family)
    if rotary is None:
        rotary = _kept_rotary(config, source, family)
    if rotary is None:
        return config
    return with_rotary_share(config, family.rotary_field, rotary)


def _kept_rotary(config: Config, source: Config, family: Family) -> float | None:
    """The share of a grown head that rotary positions turn so that they turn as many dims as in the source;
    None where they turn none there, or the entire head.
    """
    turned = family.rotary_dims(source)
    if turned <= 0 or turned >= family.sizes(source)["qk"]:
        return None
    head_dim = family.sizes(config)["qk"]
    return rotary_share(turned, head_dim)


def _check_dtypes(overrides: Config, source: Config) -> None:
    """Refuse a dtype that is not the source's."""
    names = sorted(DTYPES)
    dtypes = filter(None, map(source.get, names))
    dtype = next(dtypes, None)
    for key in DTYPES & overrides.keys():
        if overrides[key] != dtype:
            raise UserError(
                f"target: {key} {overrides[key]!r}: the grown tensors keep the source's dtype; leave it "
                "out here"
            )


def _check_keys(overrides: Config, source: Config, family: Family) -> None:
    """Refuse keys that neither the source's config nor the family's class has."""
    standard_keys = filter(family.knows, STANDARD)
    spellings = set(map(family.field_name, standard_keys))
    known_keys = {*source, *DTYPES, *spellings}
    if family.rotary is not None:
        known_keys.add("rope_parameters")
    unknown_keys = [key for key in overrides if key not in known_keys]
    UserError.collect(
        f"target: unknown config key {key!r}; {did_you_mean(key, known_keys)}" for key in unknown_keys
    )


def _follow_sizes(config: dict[str, Any], overrides: Config, source: Config, family: Family) -> None:
    """Let the values that followed a size in the source follow it in the target, unless they are given."""
    for key, standard in family.follows.items():
        size = family.field_name(standard)
        followed_before = source.get(key) == source.get(size)
        if followed_before and key not in overrides:
            config[key] = config[size]
    config |= without(family.scaled_by_depth(source, config), overrides)
    heads = family.field_name("num_attention_heads")
    kv = family.field_name("num_key_value_heads")
    # one key-value head per query head stays so
    kv_heads = source.get(kv)
    one_each = kv_heads == source.get(heads) is not None
    if one_each and kv not in overrides:
        config[kv] = config.get(heads)


def _named(config: dict[str, Any], source: Config, family: Family) -> dict[str, Any]:
    """`config` with the sizes named that it leaves out and that follow from others, where they grow: the
    library's class would take a number of its own for them.
    """
    named = dict(config)
    for standard, space in (("intermediate_size", "ffn"), ("num_key_value_heads", "kv")):
        key = family.field_name(standard)
        if key in config or not (family.knows(standard) and family.uses(space)):
            continue
        size = family.sizes(config)[space]
        if size != family.sizes(source)[space]:
            named[key] = size
    return named


def _stored_as(source: Config | None, config: dict[str, Any]) -> dict[str, Any]:
    """A target's config with the dtype that the source's says, in which its tensors are written."""
    if source is None:
        return config
    dtypes = {key: source[key] for key in DTYPES & source.keys()}
    others = without(config, {*DTYPES, WEIGHTS})
    return others | dtypes


def rope_of(config: Config) -> dict[str, Any]:
    """Collect a config's rotary positions (RoPE) in today's spelling; older ones have `rope_scaling` and a
    base beside it.
    """
    # in the library's order
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    named = filter(None, map(config.get, THETA))
    theta = next(named, 10_000.0)
    return {"rope_type": rope.pop("type", "default"), "rope_theta": theta} | rope


def rotary_share(turned: int, head: int) -> float:
    """The share of a head of `head` dims whose product with it truncates to `turned`, as the library computes
    the rotary count.
    """
    share = turned / head
    if int(head * share) == turned:
        return share
    return (turned + 0.5) / head


def with_rotary_share(config: Config, field: str, share: float) -> dict[str, Any]:
    """`config` with its rotary share set wherever it keeps one (top level before transformers 5,
    `rope_parameters` since).
    """
    changed = dict(config)
    if field in changed:
        changed[field] = share
    if isinstance(rope := changed.get("rope_parameters"), Mapping):
        changed["rope_parameters"] = {**rope, "partial_rotary_factor": share}
    elif field not in changed:
        changed[field] = share
    return changed
