"""What a config says of a quantisation, and which formats of tensors are plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outgrow.model.dtypes import PLAIN_NUMBERS, is_float


def is_plain(dtype: str) -> bool:
    """Check that tensors of a format are numbers as a model has them, and no packed or quantised weights."""
    return is_float(dtype) or dtype in PLAIN_NUMBERS


def quantisation(config: Mapping[str, Any]) -> str | None:
    """Name the quantisation of a config's weights as the library does; None where it says nothing of it."""
    said = quantisation_entries(config)
    if not said:
        return None
    if "quant_method" in said:
        return str(said["quant_method"])
    keys = map(str, said)
    of_bitsandbytes = [key for key in keys if key.startswith(("load_in", "bnb"))]
    return "bitsandbytes" if of_bitsandbytes else "an unnamed method"


def quantisation_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the entries of a config, or of its flat view, on a quantisation."""
    entries: dict[str, Any] = {}
    for key, value in config.items():
        if not quantises(key):
            continue
        if isinstance(value, Mapping):
            entries |= value
        else:
            name = key.rpartition(".")[2]
            entries[name] = value
    return {} if entries == {"quantization_config": None} else entries


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of a quantisation."""
    return {key: value for key, value in config.items() if not quantises(key)}


def quantises(key: str) -> bool:
    """Check whether an entry of a config, or of its flat view, is on a quantisation."""
    first, _, _ = key.lstrip(".").partition(".")
    return first == "quantization_config"
