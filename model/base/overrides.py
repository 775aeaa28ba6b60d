"""Overrides of settings (`key=value`) as they are typed: paths are no syntax, and a dict is told once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from outgrow.model.base.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FOLDER_FLAGS = ("--config-dir", "-cd")
_SPECIAL = re.compile(r"[^\w./\\+-]|[^\x00-\x7f]")  # what makes a value more than a word to Hydra


def plain_text(text: str) -> str:
    """An override whose value Hydra's grammar would not read as the path that it is, quoted; a leading `~` is
    expanded.

    `source=runs/lr=0.1/final` → `source='runs/lr=0.1/final'`. Lists, dicts, functions and what is quoted
    already stay as they are, unless there is a file or folder of exactly that name.
    """
    from hydra.core.override_parser.overrides_parser import create_functions
    from hydra.errors import HydraException

    key, equals, value = text.partition("=")
    if not equals or not value:
        return text
    path = os.path.expanduser(value)
    escaped = re.sub(r"(\\+)$", r"\1\1", path)  # backslashes count only before a quote
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escaped)
    quoted = f"{key}='{escaped}'"
    is_special = _SPECIAL.search(value)
    if is_special and os.path.lexists(path):
        return quoted
    function = re.fullmatch(r"(\w+)\(.*\)", value)
    calls_hydra = function and function[1] in create_functions().functions
    if value[0] in "'\"[{" or calls_hydra:
        return text
    try:
        _by_grammar(text)
    except HydraException:
        return quoted
    return text


def own_folder(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Take the folder of the user's own settings (`--config-dir DIR`) out of the arguments of a command.

    Raises:
        UserError: there is no such folder.
    """
    folder = None
    others = []
    words = iter(arguments)
    for text in words:
        flag, _, value = text.partition("=")
        if flag not in FOLDER_FLAGS:
            others.append(text)
            continue
        folder = leaves_folder(flag, value or next(words, ""))
    return folder, others


def leaves_folder(flag: str, name: str) -> Path:
    """The folder of the user's own settings that a flag names.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(name).expanduser().absolute()
    if not name or not folder.is_dir():
        raise UserError(
            f"{flag} {name}: no such folder; give the one that holds your leaves (experiment/, data/, …)"
        )
    return folder


def paths_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments of a command that takes paths and `key=value` overrides.

    A path may have a "=" in its name: what lies on this machine under the entire argument is a path.
    """
    paths = []
    overrides = []
    for text in arguments:
        path = os.path.expanduser(text)
        if "=" not in text or os.path.lexists(path):
            paths.append(path)
        else:
            overrides.append(text)
    return paths, overrides


@lru_cache(maxsize=256)
def _by_grammar(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


def parse(text: str, faults: list[str]) -> Override | None:
    """One override; None, with a fault, where it is none or gives several values."""

    from hydra.errors import HydraException

    key, _, _ = text.partition("=")
    try:
        override = _by_grammar(plain_text(text))
    except HydraException:
        way = "quote values with commas or braces: 'target={hidden_size:96}'"
        form = f"is not of the form key=value ({way})"
        faults.append(f"{key}: override {text!r} {form}")
        return None
    if override.is_sweep_override():
        faults.append(f"{key}: override {text!r} gives several values; add -m to sweep over them")
        return None
    return override


def each_dict_once(parsed: list[Override], faults: list[str]) -> list[Override]:
    """The overrides without those that say several times what a key holds, once with keys and values: Hydra
    makes nothing of them.

    Of two plain values the last holds, as with Hydra.
    """
    dicts = {override.key_or_group for override in parsed if _is_dict(override)}
    several: dict[str, list[Override]] = {}
    for override in parsed:
        for key in dicts:
            if _says_part_of(override, key):
                several.setdefault(key, []).append(override)
    once = [key for key, repeats in several.items() if len(repeats) == 1]
    for key in once:
        del several[key]
    for key, repeats in several.items():
        inners = [_inner(override, key) for override in repeats]
        inner = ",".join(inners)
        faults.append(
            f"{key}: given {len(repeats)} times; give all its keys and values at once: '{key}={{{inner}}}'"
        )
    repeated = list(chain.from_iterable(several.values()))
    return [override for override in parsed if override not in repeated]


def _says_part_of(override: Override, key: str) -> bool:
    """Check whether an override gives keys and values of `key`, or a value below it."""
    name = override.key_or_group
    if name == key:
        return _is_dict(override)
    return name.startswith(f"{key}.")


def _is_dict(override: Override) -> bool:
    """Check whether an override sets keys and values."""
    return isinstance(override.value(), Mapping)


def _inner(override: Override, key: str) -> str:
    """The keys and values of `key` that an override gives, as between braces."""
    name = override.key_or_group
    below = name.removeprefix(key).lstrip(".")
    line = str(override.input_line)
    _, _, text = line.partition("=")
    value = text.strip()
    parts = below.split(".") if below else []
    for part in reversed(parts):
        value = f"{{{part}:{value}}}"
    return value[1:-1]
