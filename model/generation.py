"""Generation configs: how a model writes unless it is told otherwise, mended so that the library saves them
again.

The library loads a generation_config.json that contradicts itself (a temperature, and no sampling) and
refuses to save it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError
from outgrow.model.config import read_json
from outgrow.model.family import Config
from outgrow.model.keys import only

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
SWITCHES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")  # which others make sense under


def generation_config(folder: Path, config: Config) -> tuple[GenerationConfig, tuple[str, ...]]:
    """The generation config that goes with a checkpoint.

    Args:
        config: of the checkpoint, which says a part of it where the folder has no file of its own.

    Returns:
        (what the library saves as it is, what had to be changed for that, in words).
    """
    file = folder / FILE
    try:
        is_there = file.is_file()
        entries = read_json(file) if is_there else _entries(config)
    except UserError as fault:
        generation, changes = mended(_entries(config))
        return generation, (f"{fault}; left out", *changes)
    return mended(entries)


def mended(entries: Mapping[str, Any]) -> tuple[GenerationConfig, tuple[str, ...]]:
    """`generation_config`, from the entries of a file: the switch that they lack is added, and what still
    contradicts is dropped.
    """
    generation = _valid(entries)
    if generation is not None:
        return generation, ()
    changes: list[str] = []
    survivors = _consistent(entries)
    if "do_sample" not in entries:
        sampled = _consistent({"do_sample": True, **entries})
        if len(sampled) > len(survivors) + 1:
            survivors = sampled
            changes.append("do_sample: true is added, without which what it says of sampling is refused")
    dropped = [key for key in entries if key not in survivors]
    if dropped:
        entries_dropped = [f"{key}: {entries[key]!r:.40}" for key in dropped]
        listing = ", ".join(entries_dropped)
        changes.append(f"{listing} left out, which the library refuses to save")
    generation = _valid(survivors)
    assert generation is not None
    return generation, tuple(f"{FILE}: {change}" for change in changes)


def _consistent(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the library takes together, tried one by one, switches first."""
    survivors: dict[str, Any] = {}
    for key in sorted(entries, key=lambda key: key not in SWITCHES):
        if _valid({**survivors, key: entries[key]}) is not None:
            survivors[key] = entries[key]
    return survivors


def _valid(entries: Mapping[str, Any]) -> GenerationConfig | None:
    """The library's object of these entries; None where it would not save it."""
    from transformers import GenerationConfig

    from outgrow.model.base.quiet import quietly

    try:
        with quietly():
            generation = GenerationConfig.from_dict(dict(entries))
            generation.validate(strict=True)
            generation.to_json_string()
    except Exception:  # the library's checks raise every kind
        return None
    return generation


def _entries(config: Config) -> dict[str, Any]:
    """Collect the generation settings that a config itself holds, as older files do."""
    from transformers import GenerationConfig

    keys = GenerationConfig().to_dict().keys() - {"transformers_version"}
    values = {key: value for key, value in config.items() if value is not None}
    return only(values, keys)
