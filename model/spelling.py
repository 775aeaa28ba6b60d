"""Configs in two spellings: that of transformers 5, and beside it that of transformers 4, which most servers
and tools still read.

transformers 5 keeps all of a model's rotary positions in `rope_parameters`, which transformers 4 does not
look into: it would turn by its defaults. It takes the older keys too, so a file with both is the same model
for either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outgrow.model.config import read_json
from outgrow.model.keys import without

# Where classes of transformers 4 keep the base and the share of rotary positions, if not under these names.
BASE, SHARE = "rope_theta", "partial_rotary_factor"
BASES = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
SHARES = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
# Where they differ by the kind of layer: of those that see everything and of those that see a window. Other
# classes are younger.
FULL, SLIDING = "full_attention", "sliding_attention"
BASES_BY_LAYER = {
    "gemma3_text": (BASE, "rope_local_base_freq"),
    "gemma3n_text": (BASE, "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": (BASE, ""),
}
# that transformers 4 knows
SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "mrope")
# whose classes there do not scale, or are younger
UNSCALED = ("bamba", "modernbert", "modernbert-decoder", "zaya")
SCALED = ("apertus", "gpt_oss")  # whose classes there scale unless they are told not to
# Whose classes there want these entries and no other, and the rest outside.
STRICT = {
    **{(name, "longrope"): ("short_factor", "long_factor") for name in ("phi3", "phi4_multimodal")},
    **{(name, kind): ("factor",) for name in ("olmo", "olmo2") for kind in ("linear", "dynamic")},
}

NO_SCALING = ("rope_theta", "partial_rotary_factor", "rope_type", "type")  # entries of rotary positions

HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # of surrogates: JSON can spell it, UTF-8 cannot

CODE = "auto_map"  # names classes in Python files of the folder, which are neither run nor copied

# The tokenizer that transformers 5 makes of a tokenizer.json alone, by its name in transformers 4, which is
# good in both.
TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spell a config, as the library nests it, in both ways, rotary positions and dtype, and leave out names
    of code.

    `rope_parameters` decide where they are given; an infinity is written as transformers 4 wrote it.
    """
    spelt: dict[str, Any] = {}
    for key, value in config.items():
        if key != CODE:
            is_config = _is_config(key, value)
            spelt[key] = both_spellings(value) if is_config else _number(value)
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and rope:
        spelt |= _older_rope(config, rope)
    if dtype := config.get("dtype") or config.get("torch_dtype"):
        spelt |= {"dtype": dtype, "torch_dtype": dtype}
    return spelt


def _is_config(key: str, value: Any) -> bool:
    is_named_so = key.endswith("_config") and key != "quantization_config"
    return is_named_so and isinstance(value, Mapping)


def _number(value: Any) -> Any:
    """Unwrap an infinity as transformers 5 writes it, which transformers 4 would take for the value."""
    if isinstance(value, list):
        return [_number(entry) for entry in value]
    is_mapping = isinstance(value, Mapping)
    if is_mapping and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return value


def _older_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Write `rope_parameters` in the keys of transformers 4."""
    kind = str(config.get("model_type"))
    by_layer = any(isinstance(value, Mapping) for value in rope.values())
    if by_layer and kind not in BASES_BY_LAYER:
        return {}
    full = rope
    sliding: Mapping[str, Any] = {}
    base = BASES.get(kind, BASE)
    narrow = ""
    if by_layer:
        full = rope.get(FULL) or {}
        sliding = rope.get(SLIDING) or {}
        base, narrow = BASES_BY_LAYER[kind]
    share = SHARES.get(kind, SHARE)
    entries = {base: full.get("rope_theta"), narrow: None}
    if narrow:
        entries[narrow] = sliding.get("rope_theta")
    entries[share] = full.get("partial_rotary_factor")
    spelt = {key: value for key, value in entries.items() if value is not None}
    return spelt | _older_scaling(config, full)


def _older_scaling(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling`: null where positions are not scaled and it is there already, or the class would scale
    by default.
    """
    model_type = str(config.get("model_type"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    entries = without(rope, NO_SCALING)
    if model_type in UNSCALED:
        return {}
    is_plain = kind == "default" and not entries
    if kind not in SCALINGS or is_plain:
        says_none = "rope_scaling" in config or model_type in SCALED
        return {"rope_scaling": None} if says_none else {}
    if (model_type, kind) not in STRICT:
        return {"rope_scaling": {"rope_type": kind, **entries}}
    strict = STRICT[model_type, kind]
    own = {key: entries.pop(key) for key in strict if key in entries}
    return {"rope_scaling": {"type": kind, **own}, **entries}


def spell_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spell a tokenizer_config.json so that transformers 4 and 5 read it alike."""
    spelt = {key: value for key, value in config.items() if key != CODE}
    if isinstance(name := spelt.get("tokenizer_class"), str):
        spelt["tokenizer_class"] = TOKENIZERS.get(name, name)
    # transformers 4 wants names for extra tokens, and has another key for a list of them.
    if isinstance(more := spelt.get("extra_special_tokens"), list):
        del spelt["extra_special_tokens"]
        spelt["additional_special_tokens"] = more
    return spelt


def spell_folder(folder: Path) -> None:
    """Rewrite the configs of a folder (model, tokenizer, processors) in both spellings, without names of
    code.
    """
    for path in folder.glob("*config.json"):
        before = read_json(path)
        spell = both_spellings if path.name == "config.json" else spell_tokenizer
        if (after := spell(before)) != before:
            text = json.dumps(after, indent=2, sort_keys=True, ensure_ascii=False)
            if HALF_PAIR.search(text):
                text = json.dumps(after, indent=2, sort_keys=True)
            path.write_text(f"{text}\n", encoding="utf-8")
