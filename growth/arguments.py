"""The arguments of `plan` and `grow`, held against what they take before anything is read; YAML's door has
done so already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, get_args

from outgrow.growth.moments import Rule
from outgrow.model.base.errors import UserError
from outgrow.model.keys import is_number


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return is_number(value) and isfinite(value)


def _is_depth(value: Any) -> bool:
    if isinstance(value, str):
        return True
    is_list = isinstance(value, list | tuple)
    return is_list and all(map(_is_whole, value))


def _is_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value)
    if isinstance(value, str | Path):
        return True
    return hasattr(value, "to_dict") and not isinstance(value, type)


# argument → what it must be, in code and in words
EXPECTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "target": (_is_target, "a preset's name, a folder, a config, or overrides such as {'hidden_size': 2560}"),
    "operator": (lambda value: isinstance(value, str), "an operator's name"),
    "depth": (_is_depth, "a layer map's name, or a list of source layers"),
    "noise": (lambda value: value is None or _is_number(value), "a number"),
    "fresh": (lambda value: value in ("init", "match"), "'init' or 'match'"),
    "seed": (_is_whole, "a whole number"),
    "dtype": (lambda value: value in (None, "float32"), "'float32', or None to keep the source's"),
    "out": (lambda value: isinstance(value, str | Path), "a folder's path"),
    "overwrite": (lambda value: isinstance(value, bool), "True or False"),
    "receipt": (lambda value: isinstance(value, bool | None), "True, False or None"),
    "text": (lambda value: isinstance(value, str | Path | None), "a text file's path, or None"),
    "receipt_text": (
        lambda value: isinstance(value, str | Path | None),
        "a text file's path, or None",
    ),
    "threads": (lambda value: _is_whole(value) and value > 0, "a positive whole number"),
    "max_shard_bytes": (lambda value: _is_whole(value) and value > 0, "a positive whole number"),
    "revision": (lambda value: isinstance(value, str | None), "a commit or branch, or None"),
    "optimizer": (lambda value: isinstance(value, str | Path | None), "a file's or folder's path, or None"),
    "moments": (lambda value: value in get_args(Rule), f"one of {', '.join(get_args(Rule))}"),
    "nonfinite": (lambda value: value in ("refuse", "allow"), "'refuse' or 'allow'"),
    "worker": (lambda value: isinstance(value, str | None), "'i/n' or None"),
    "progress": (lambda value: value is None or callable(value), "a function or None"),
    "learning": (lambda value: value is None or callable(value), "a function or None"),
}


def check_arguments(**arguments: Any) -> None:
    """Raise one error that names every argument of another kind than `EXPECTED`.

    Raises:
        UserError: there are any.
    """
    UserError.collect(
        f"{name}: expected {EXPECTED[name][1]}; found {value!r:.80}"
        for name, value in arguments.items()
        if not EXPECTED[name][0](value)
    )
