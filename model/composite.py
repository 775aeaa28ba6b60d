"""Composite configs: a text model's values nested beside those of other towers (Gemma 3, Llama 4, Qwen 3.5).

Inside this project every config is flat, so that a size has one name whatever stands around it: `flat` is
applied where a config comes in (a file, a target, a model in memory), `nested` where it goes out (to the
library, into a file). The flat view of a composite config has

- the text model's values under their own names: `hidden_size`;
- those of another tower under their path: `vision_config.hidden_size`;
- those that belong to no tower behind a dot: `.image_token_id`;
- the whole's `model_type`; the text model's own is `text_config.model_type`.

Any other config is its own flat view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT = "text_config"
TEXT_TYPE = f"{TEXT}.model_type"  # which every flat view of a composite config has


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat view of a config or of overrides of one; of a flat view, itself."""
    text = config.get(TEXT)
    if not isinstance(text, Mapping):
        prefix = f"{TEXT}."  # which a key that is no text, a fault told later, does not begin with
        return {
            key.removeprefix(prefix) if isinstance(key, str) and key != TEXT_TYPE else key: value
            for key, value in config.items()
        }
    fields: dict[str, Any] = {}
    if "model_type" in config:  # overrides name none
        fields[TEXT_TYPE] = text.get("model_type")
    for key, value in config.items():
        if key == TEXT:
            for name, entry in text.items():
                is_apart = name == "model_type" or "." in name
                fields[f"{TEXT}.{name}" if is_apart else name] = entry
        elif isinstance(value, Mapping) and value and key.endswith("_config"):
            for name, entry in value.items():
                fields[f"{key}.{name}"] = entry
        elif key == "model_type":
            fields[key] = value
        else:
            fields[f".{key}"] = value
    return fields


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """The way back: the config as the library has it."""
    if TEXT_TYPE not in config:
        return dict(config)
    config_tree: dict[str, Any] = {TEXT: {}}
    for key, value in config.items():
        tower, dot, name = key.partition(".")
        if key == "model_type":
            config_tree[key] = value
        elif not dot:
            config_tree[TEXT][key] = value
        elif not tower:
            config_tree[name] = value
        elif key != TEXT_TYPE or value is not None:
            config_tree.setdefault(tower, {})[name] = value
    return config_tree


def of_text(key: str) -> bool:
    """Check whether a key of a flat view is the text model's own."""
    return "." not in key


def other_towers(config: Mapping[str, Any]) -> set[str]:
    """The names of the configs (`vision_config`) beside the text model's in a flat view."""
    others = [key for key in config if not of_text(key)]
    return {key.partition(".")[0] for key in others} - {"", TEXT}
