"""From overrides to typed values: composing with Hydra, and reading plain dicts into frozen dataclasses, with
every fault in one list.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from outgrow.model.base.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig
    from yaml import YAMLError

T = TypeVar("T")
# beside the rooms, in a clone and in an installed package
CONF = Path(str(files("outgrow.model"))).parent / "conf"
MISSING = "???"  # Hydra's mark of a value that has to be given


# ---- composing ---------------------------------------------------------------------------------------------


def compose_config(folder: Path, name: str, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """Compose `folder/name.yaml` with the overrides that hold; return it with the faults of those that do
    not.

    Hydra stops at the first wrong override; here all of them are told, with near matches.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    faults: list[str] = []
    attempts = [_parse(text, faults) for text in overrides]
    parsed = [override for override in attempts if override is not None]
    parsed = each_dict_once(parsed, faults)
    tree = _tree(folder)
    try:
        groups = _groups(tree, name)
    except UserError as fault:  # the file itself is no YAML
        return OmegaConf.create({}), [*faults, str(fault)]
    choices = [o for o in parsed if _is_choice(groups, o) and _choice_holds(folder, o, faults)]
    try:
        cfg = _chosen(tree, name, choices)
        assignments = [o for o in parsed if not _is_choice(groups, o)]
        values = [o for o in assignments if _key_holds(cfg, o, groups, faults)]
        changes = [o for o in values if _changes_keys(o) or o.key_or_group.startswith("hydra")]
        if changes:
            cfg = _chosen(tree, name, [*choices, *changes])
        # Plain values are set as Hydra sets them; composing again would take longer than planning a growth.
        for value in values:
            if value not in changes:
                replaced = _is_open(folder / f"{name}.yaml", value)
                OmegaConf.update(cfg, value.key_or_group, value.value(), merge=not replaced)
        return cfg, faults
    except (HydraException, OmegaConfBaseException) as error:
        return OmegaConf.create({}), [*faults, str(error).strip()]
    except YAMLError as error:
        return OmegaConf.create({}), [*faults, yaml_fault(error)]


@dataclasses.dataclass(frozen=True)
class Tree:
    """A folder of configurations as it is now: every file and folder below it, each with the time of its last
    change. Equal trees compose to equal configurations.
    """

    folder: Path
    entries: tuple[tuple[str, int], ...]


def _tree(folder: Path) -> Tree:
    stamps = [(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.exists()]
    return Tree(folder, tuple(sorted(stamps)))


def _chosen(tree: Tree, name: str, overrides: list[Override]) -> DictConfig:
    """The configuration that Hydra composes of these overrides; the caller may change it."""
    return copy.deepcopy(_composed(tree, name, tuple(str(override.input_line) for override in overrides)))


@lru_cache(maxsize=128)  # the runs of a study or sweep choose the same leaves again and again
def _composed(tree: Tree, name: str, lines: tuple[str, ...]) -> DictConfig:
    from hydra import compose, initialize_config_dir

    with _apart(), initialize_config_dir(str(tree.folder), version_base="1.3"):
        return compose(name, list(lines))


def _is_open(file: Path, override: Override) -> bool:
    """Check for a mapping of keys that a configuration's own file leaves open, such as `target`: one that
    an experiment gives is replaced whole, as a preset's name would be.
    """
    from omegaconf import OmegaConf

    if not isinstance(override.value(), dict):
        return False
    own = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(own, dict)
    key = override.key_or_group
    return key in own and own[key] in (None, MISSING)


def _changes_keys(override: Override) -> bool:
    """Check whether an override adds or deletes a key."""
    return bool(override.is_add() or override.is_force_add() or override.is_delete())


@contextmanager
def _apart() -> Iterator[None]:
    """Put aside the Hydra that is running: a job of a sweep composes the defaults that its name is told by,
    and goes on as it was.
    """
    from hydra.core.global_hydra import GlobalHydra

    state = GlobalHydra.instance()
    running, state.hydra = state.hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running  # leaving has put another object there


def yaml_fault(error: YAMLError) -> str:
    """A syntax error of a YAML file in one line: where it is, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    where = ""
    if mark is not None:
        line, column = mark.line + 1, mark.column + 1
        where = f"{mark.name}, line {line}, column {column}: "
    return f"{where}not valid YAML ({getattr(error, 'problem', None) or str(error).splitlines()[0]})"


def load_yaml(path: Path) -> Any:
    """The YAML file at `path` as plain values, a leading `~/` expanded.

    Raises:
        UserError: it cannot be read, or is not valid YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return at_home(OmegaConf.to_container(OmegaConf.load(path)))
    except YAMLError as error:
        raise UserError(yaml_fault(error)) from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


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
    if _SPECIAL.search(value) and os.path.lexists(path):
        return quoted
    function = re.fullmatch(r"(\w+)\(.*\)", value)
    if value[0] in "'\"[{" or (function and function[1] in create_functions().functions):
        return text
    try:
        _by_grammar(text)
    except HydraException:
        return quoted
    return text


_SPECIAL = re.compile(r"[^\w./\\+-]|[^\x00-\x7f]")  # what makes a value more than a word to Hydra


@lru_cache(maxsize=256)
def _by_grammar(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


def _parse(text: str, faults: list[str]) -> Override | None:
    from hydra.errors import HydraException

    key = text.partition("=")[0]
    try:
        override = _by_grammar(plain_text(text))
    except HydraException:
        way = "quote values with commas or braces: 'target={hidden_size:96}'"
        faults.append(f"{key}: override {text!r} is not of the form key=value ({way})")
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
    dicts = {override.key_or_group for override in parsed if isinstance(override.value(), Mapping)}
    several: dict[str, list[Override]] = {}
    for override in parsed:
        for key in dicts:
            plain_value = override.key_or_group == key and not isinstance(override.value(), Mapping)
            if f"{override.key_or_group}.".startswith(f"{key}.") and not plain_value:
                several.setdefault(key, []).append(override)
    several = {key: repeats for key, repeats in several.items() if len(repeats) > 1}
    for key, repeats in several.items():
        inner = ",".join(_inner(override, key) for override in repeats)
        faults.append(
            f"{key}: given {len(repeats)} times; give all its keys and values at once: '{key}={{{inner}}}'"
        )
    merged = [override for repeats in several.values() for override in repeats]
    return [override for override in parsed if override not in merged]


def _inner(override: Override, key: str) -> str:
    """The keys and values of `key` that an override gives, as between braces."""
    below, value = (
        override.key_or_group.removeprefix(key).lstrip("."),
        str(override.input_line).partition("=")[2].strip(),
    )
    for part in reversed(below.split(".") if below else []):
        value = f"{{{part}:{value}}}"
    return value[1:-1]


@lru_cache(maxsize=16)
def _groups(tree: Tree, name: str) -> set[str]:
    """The groups of a folder that its config `name` chooses from; a key of its own that is called as a group
    is a value.
    """
    folder = tree.folder
    own = load_yaml(folder / f"{name}.yaml")
    choices = [entry for entry in own.get("defaults", ()) if isinstance(entry, Mapping)]
    chosen = {str(key) for entry in choices for key in entry}
    groups = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}
    return {group for group in groups if group in chosen or group not in own}


def _is_choice(groups: set[str], override: Override) -> bool:
    """Check whether it chooses a file of a group (growth=tile) and sets no value."""
    # Hydra knows its own groups
    return not override.key_or_group.startswith("hydra/") and override.key_or_group in groups


def _choice_holds(folder: Path, override: Override, faults: list[str]) -> bool:
    group, chosen = override.key_or_group, override.value()
    known = sorted(path.stem for path in (folder / group).glob("*.yaml"))
    if override.is_delete() or chosen is None or str(chosen) in known:
        return True
    faults.append(f"{group}={chosen}: unknown {group}; {did_you_mean(str(chosen), known)}")
    return False


def _key_holds(cfg: DictConfig, override: Override, groups: set[str], faults: list[str]) -> bool:
    if override.is_add() or override.is_force_add() or override.key_or_group.startswith(("hydra.", "hydra/")):
        return True
    node: Any = cfg
    parts = override.key_or_group.split(".")
    for depth, part in enumerate(parts):
        # A DictConfig does not "contain" a missing value, but lists its key.
        keys = list(node) if isinstance(node, Mapping) else []
        if part not in keys:
            known = set(map(str, keys))
            near = did_you_mean(part, known | groups if depth == 0 else known)
            way = _elsewhere(cfg, parts[-1]) or near
            faults.append(f"{'.'.join(parts[: depth + 1])}: unknown key; {way}")
            return False
        # The node itself: no interpolation, no missing value.
        node = node._get_node(part) if hasattr(node, "_get_node") else node[part]
    return True


def _elsewhere(cfg: DictConfig, name: str) -> str:
    """A question that offers the keys of that name in a group: `train.learning_rate` is
    `optimizer.learning_rate`.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(cfg)
    entries = values if isinstance(values, dict) else {}
    groups = {group: inner for group, inner in entries.items() if isinstance(inner, dict)}
    keys = [f"{group!s}.{name}" for group, inner in groups.items() if name in inner]
    return f"did you mean {' or '.join(map(repr, keys))}?" if keys else ""


def at_home(value: Any) -> Any:
    """A value, or all that lists and dicts hold, with paths under `~/` as paths that are there."""
    if isinstance(value, dict):
        return {key: at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [at_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def plain(cfg: DictConfig | Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """A composed config as plain dicts, interpolations resolved and a leading `~/` expanded, wherever it was
    written.

    What cannot be resolved becomes a fault and stays missing.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    values: dict[str, Any] = {}
    for key in map(str, cfg):
        node = cfg._get_node(key)
        try:
            value = cfg.get(key) if not OmegaConf.is_missing(cfg, key) else MISSING
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            faults.append(f"{key}: {node!s} needs a value that is missing")
            values[key] = MISSING
    return {key: at_home(value) for key, value in values.items()}


def sweep_points(overrides: list[str]) -> list[list[str]]:
    """The overrides of each run of a sweep, as Hydra's own sweeper makes them: lists of values, choice(),
    range() and glob().

    `["growth=a,b", "seed=range(2)"]` → `[["growth=a", "seed=0"], ["growth=a", "seed=1"], ["growth=b",
    "seed=0"], …]`. An override that cannot be read stays as it is, for composing to tell.

    Raises:
        UserError: it is a sweep that Hydra's sweeper does not make, such as interval(), or a key's keys and
            values are given twice.
    """
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    readable: list[Override] = []
    unreadable: list[str] = []
    with initialize_config_dir(str(CONF), version_base="1.3"):  # glob() looks for leaves there
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for text in overrides:
            try:
                readable += parser.parse_overrides([text])
            except HydraException:
                unreadable.append(text)
        twice: list[str] = []
        readable = each_dict_once(readable, twice)
        UserError.collect(twice)
        try:
            (points,) = BasicSweeper.split_arguments(readable, None)
        except HydraException as error:
            raise UserError(
                f"sweep: {error}; give its values: KEY=1,2,3, or KEY=range(…), choice(…), glob(…)"
            ) from None
    if not points:
        raise UserError(f"sweep: {' '.join(overrides)}: no point; a range() or glob() in it is empty")
    return [[*point, *unreadable] for point in points]


# ---- reading -----------------------------------------------------------------------------------------------


def read(cls: type[T], values: Any, path: str, faults: list[str]) -> T | None:
    """`values` as the dataclass `cls`; None, and at least one more entry in `faults`, where they do not fit.

    A field whose metadata says `rest` takes every key that is no other field's. `path` is the dotted prefix
    for messages.
    """
    before = len(faults)
    if not isinstance(values, Mapping):
        faults.append(f"{path.rstrip('.') or 'configuration'}: expected keys and values; found {values!r}")
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    rest = next((name for name, field in fields.items() if field.metadata.get("rest")), None)
    by_name = {str(key): value for key, value in values.items()}
    extra = {key: value for key, value in by_name.items() if key not in fields or key == rest}
    if rest is None:
        faults += [f"{path}{key}: unknown key; {did_you_mean(key, fields)}" for key in extra]
    hints = typing.get_type_hints(cls)
    fitting: dict[str, Any] = {} if rest is None else {rest: extra}
    missing = False
    for name, field in fields.items():
        if name == rest:
            continue
        if name in values and values[name] != MISSING:
            dotted = f"{path}{name}"
            fitting[name] = _read_value(hints[name], values[name], dotted, faults)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing = True
            # Unless it is reported already why it is not there.
            if not any(fault.startswith(f"{path}{name}:") for fault in faults):
                faults.append(f"{path}{name}: missing")
    return cls(**fitting) if len(faults) == before and not missing else None


def _read_value(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    """`value` as the type `hint`: scalars, Literal, X | None, tuple, list, dict, or a nested dataclass."""
    if dataclasses.is_dataclass(hint):
        return read(hint, value, f"{path}.", faults)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _read_union(arguments, hint, value, path, faults)
    if origin is Literal:
        return _read_choice(arguments, value, path, faults)
    if origin in (tuple, list):
        return _read_sequence(origin, arguments, hint, value, path, faults)
    if (origin or hint) is dict and isinstance(value, Mapping):
        kind = arguments[1] if arguments else Any
        return {key: _read_value(kind, value[key], f"{path}.{key}", faults) for key in value}
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if hint is Any or type(value) is hint:
        return value
    faults.append(f"{path}: expected {_spell(hint)}; found {value!r}")
    return None


def _read_union(arguments: tuple[Any, ...], hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    if value is None and type(None) in arguments:
        return None
    options = [argument for argument in arguments if argument is not type(None)]
    attempts: list[list[str]] = []
    for option in options:
        attempts.append([])
        result = _read_value(option, value, path, attempts[-1])
        if not attempts[-1]:
            return result
    if len(options) == 1:
        faults += attempts[0]
    else:
        faults.append(f"{path}: expected {_spell(hint)}; found {value!r}")
    return None


def _is_same(value: Any, choice: Any) -> bool:
    """Check that two values are equal and of one type: true is not 1."""
    return value is choice or (type(value) is type(choice) and value == choice)


def _read_choice(choices: tuple[Any, ...], value: Any, path: str, faults: list[str]) -> Any:
    if any(_is_same(value, choice) for choice in choices):
        return value
    known = [str(choice).lower() for choice in choices]
    faults.append(f"{path}: unknown value {value!r}; {did_you_mean(str(value), known)}")
    return None


def _read_sequence(
    origin: Any, arguments: tuple[Any, ...], hint: Any, value: Any, path: str, faults: list[str]
) -> Any:
    fixed = origin is tuple and Ellipsis not in arguments
    is_list = isinstance(value, (list, tuple))
    if not is_list or (fixed and len(value) != len(arguments)):
        faults.append(f"{path}: expected {_spell(hint)}; found {value!r}")
        return None
    kinds = arguments if fixed else (arguments[0],) * len(value)
    paths = [f"{path}[{number}]" for number in range(len(value))]
    entries = zip(kinds, value, paths, strict=True)
    return origin(_read_value(kind, item, where, faults) for kind, item, where in entries)


TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "keys and values",
    type(None): "null",
}


def _spell(hint: Any) -> str:
    """Name a type as a user reads it in YAML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_spell(argument) for argument in arguments)
    if origin in (tuple, list):
        fixed = origin is tuple and Ellipsis not in arguments
        return f"a list of {_spell(arguments[0])}" + f" ({len(arguments)} of them)" * fixed
    if origin is Literal:
        return " or ".join(str(argument).lower() for argument in arguments)
    return TYPE_NAMES.get(origin or hint, str(hint))
