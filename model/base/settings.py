"""Settings with types: plain dicts read into frozen dataclasses, with every fault in one list."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from outgrow.model.base.compose import MISSING, plain
from outgrow.model.base.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")


def settings_of(
    cls: type[T],
    cfg: DictConfig | Mapping[str, Any],
    faults: Iterable[str],
    disagreements: Callable[[T], Iterable[str]],
) -> T:
    """A composed configuration as the dataclass `cls`, read and checked.

    Args:
        faults: that are known already; they are told with the ones found here.
        disagreements: yields the faults between well-typed values.

    Raises:
        UserError: unknown (with near matches), missing or mistyped keys and values that cannot work together,
            all at once.
    """
    every_fault = list(faults)
    values = plain(cfg, every_fault)
    settings = read(cls, values, "", every_fault) if values else None
    if settings is not None:
        every_fault += disagreements(settings)
    UserError.collect(dict.fromkeys(every_fault))
    assert settings is not None
    return settings


def read(cls: type[T], values: Any, path: str, faults: list[str]) -> T | None:
    """`values` as the dataclass `cls`; None, and at least one more entry in `faults`, where they do not fit.

    A field whose metadata says `rest` takes every key that is no other field's. `path` is the dotted prefix
    for messages.
    """
    before = len(faults)
    if not isinstance(values, Mapping):
        part = path.rstrip(".") or "configuration"
        faults.append(f"{part}: expected keys and values; found {values!r}")
        return None
    every_field = dataclasses.fields(cls)  # type: ignore[arg-type]
    fields = {field.name: field for field in every_field}
    open_fields = (field.name for field in every_field if field.metadata.get("rest"))
    rest = next(open_fields, None)
    by_name = {str(key): value for key, value in values.items()}
    further = [key for key in by_name if key not in fields or key == rest]
    if rest is None:
        for key in further:
            hint = did_you_mean(key, fields)
            faults.append(f"{path}{key}: unknown key; {hint}")
    hints = typing.get_type_hints(cls)
    fitting: dict[str, Any] = {}
    if rest is not None:
        fitting[rest] = {key: by_name[key] for key in further}
    for name, field in fields.items():
        if name == rest:
            continue
        dotted = f"{path}{name}"
        value = values.get(name, MISSING)
        if value != MISSING:
            fitting[name] = _read_value(hints[name], value, dotted, faults)
        elif _is_required(field):
            # a reason that is reported already is said again: what holds the key cannot be read
            prefix = f"{dotted}:"
            reported = (fault for fault in faults if fault.startswith(prefix))
            faults.append(next(reported, f"{dotted}: missing"))
    if len(faults) > before:
        return None
    return cls(**fitting)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    """Check that a field has no default."""
    has_value = field.default is not dataclasses.MISSING
    has_factory = field.default_factory is not dataclasses.MISSING
    return not has_value and not has_factory


def _read_value(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    """`value` as the type `hint`: scalars, Literal, X | None, tuple, list, dict, or a nested dataclass."""
    if dataclasses.is_dataclass(hint):
        return read(hint, value, f"{path}.", faults)  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _read_union(arguments, hint, value, path, faults)
    if origin is Literal:
        return _read_choice(arguments, value, path, faults)
    if origin in (tuple, list):
        return _read_sequence(origin, arguments, hint, value, path, faults)
    is_dict = (origin or hint) is dict
    if is_dict and isinstance(value, Mapping):
        kind = arguments[1] if arguments else Any
        entries = {}
        for key, entry in value.items():
            entries[key] = _read_value(kind, entry, f"{path}.{key}", faults)
        return entries
    # Numbers: 1 is a number with decimals too, and 1e6 is a whole one.
    value_type = type(value)
    is_float = value_type is float
    if hint is float and (is_float or value_type is int) and not _is_finite(value):
        faults.append(f"{path}: expected a finite number; found {value!r:.40}")
        return None
    if hint is float and value_type is int:
        return float(value)
    if hint is int and is_float and value.is_integer():
        return int(value)
    if hint is Any or value_type is hint:
        return value
    faults.append(_misfit(path, hint, value))
    return None


def _read_union(arguments: tuple[Any, ...], hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    if value is None and type(None) in arguments:
        return None
    options = [argument for argument in arguments if argument is not type(None)]
    attempts: list[list[str]] = []
    for option in options:
        attempt: list[str] = []
        attempts.append(attempt)
        result = _read_value(option, value, path, attempt)
        if not attempt:
            return result
    if len(options) == 1:
        faults += attempts[0]
    else:
        faults.append(_misfit(path, hint, value))
    return None


def _is_same(value: Any, choice: Any) -> bool:
    """Check that two values are equal and of one type: true is not 1."""
    if value is choice:
        return True
    same_type = type(value) is type(choice)
    return same_type and bool(value == choice)


def _read_choice(choices: tuple[Any, ...], value: Any, path: str, faults: list[str]) -> Any:
    if any(_is_same(value, choice) for choice in choices):
        return value
    spellings = [str(choice).lower() for choice in choices]
    near = did_you_mean(str(value), spellings)
    faults.append(f"{path}: unknown value {value!r}; {near}")
    return None


def _read_sequence(
    origin: Any, arguments: tuple[Any, ...], hint: Any, value: Any, path: str, faults: list[str]
) -> Any:
    fixed = origin is tuple and Ellipsis not in arguments
    is_list = isinstance(value, (list, tuple))
    if not is_list or (fixed and len(value) != len(arguments)):
        faults.append(_misfit(path, hint, value))
        return None
    kinds = arguments if fixed else arguments[:1] * len(value)
    entries = zip(kinds, value, strict=True)
    items = []
    for number, (kind, entry) in enumerate(entries):
        item = _read_value(kind, entry, f"{path}[{number}]", faults)
        items.append(item)
    return origin(items)


def _is_finite(value: float) -> bool:
    """Check for a number that a float can hold, as NaN, infinities and the largest whole numbers are not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "keys and values",
    type(None): "null",
}


def _misfit(path: str, hint: Any, value: Any) -> str:
    """Report a value that is not of its type."""
    type_name = _spell(hint)
    return f"{path}: expected {type_name}; found {value!r}"


def _spell(hint: Any) -> str:
    """Name a type as a user reads it in YAML."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        options = map(_spell, arguments)
        return " or ".join(options)
    if origin in (tuple, list):
        fixed = origin is tuple and Ellipsis not in arguments
        count = f" ({len(arguments)} of them)" if fixed else ""
        return f"a list of {_spell(arguments[0])}{count}"
    if origin is Literal:
        choices = [str(argument).lower() for argument in arguments]
        return " or ".join(choices)
    plain_type = origin or hint
    return TYPE_NAMES.get(plain_type, str(hint))
