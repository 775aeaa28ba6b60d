"""Settings from overrides: compose with Hydra, and read plain dicts into frozen dataclasses, with every fault
in one list.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from outgrow.model.base.errors import UserError, did_you_mean, first_line

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
        faults.append(str(fault))
        return OmegaConf.create({}), faults
    leaves = [override for override in parsed if _is_choice(groups, override)]
    assignments = [override for override in parsed if override not in leaves]
    choices = [override for override in leaves if _choice_holds(folder, override, faults)]
    try:
        cfg = _chosen(tree, name, choices)
        values = [override for override in assignments if _key_holds(cfg, override, groups, faults)]
        changes = [override for override in values if _needs_composing(override)]
        if changes:
            further = [*choices, *changes]
            cfg = _chosen(tree, name, further)
        # Plain values are set as Hydra sets them; composing again would take longer than planning a growth.
        own_file = folder / f"{name}.yaml"
        for value in values:
            if value not in changes:
                key = value.key_or_group
                replaced = _is_open(own_file, value)
                assigned = value.value()
                OmegaConf.update(cfg, key, assigned, merge=not replaced)
        return cfg, faults
    except (HydraException, OmegaConfBaseException) as error:
        faults.append(str(error).strip())
    except YAMLError as error:
        faults.append(yaml_fault(error))
    return OmegaConf.create({}), faults


@dataclasses.dataclass(frozen=True)
class Tree:
    """A folder of configurations as it is now: every file and folder below it, each with the time of its last
    change. Equal trees compose to equal configurations.
    """

    folder: Path
    entries: tuple[tuple[str, int], ...]


def _tree(folder: Path) -> Tree:
    files = [path for path in folder.rglob("*") if path.exists()]
    stamps = [(str(path), path.stat().st_mtime_ns) for path in files]
    return Tree(folder, tuple(sorted(stamps)))


def _chosen(tree: Tree, name: str, overrides: list[Override]) -> DictConfig:
    """The configuration that Hydra composes of these overrides; the caller may change it."""
    lines = tuple(str(override.input_line) for override in overrides)
    cached = _composed(tree, name, lines)
    return copy.deepcopy(cached)


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
    cfg = OmegaConf.load(file)
    own = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(own, dict)
    key = override.key_or_group
    open_values = (None, MISSING)
    return key in own and own[key] in open_values


def _needs_composing(override: Override) -> bool:
    """Check whether an override adds or deletes a key, or sets one of Hydra's own: Hydra composes it."""
    adds = override.is_add() or override.is_force_add()
    of_hydra = override.key_or_group.startswith("hydra")
    return bool(adds or override.is_delete() or of_hydra)


@contextmanager
def _apart() -> Iterator[None]:
    """Put aside the Hydra that is running: a job of a sweep composes the defaults that its name is told by,
    and goes on as it was.
    """
    from hydra.core.global_hydra import GlobalHydra

    state = GlobalHydra.instance()
    running = state.hydra
    state.hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running  # leaving has put another object there


def yaml_fault(error: YAMLError) -> str:
    """A syntax error of a YAML file in one line: where it is, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    where = ""
    if mark is not None:
        line = mark.line + 1
        column = mark.column + 1
        where = f"{mark.name}, line {line}, column {column}: "
    problem = getattr(error, "problem", None) or first_line(error)
    return f"{where}not valid YAML ({problem})"


def load_yaml(path: Path) -> Any:
    """The YAML file at `path` as plain values, a leading `~/` expanded.

    Raises:
        UserError: it cannot be read, or is not valid YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        cfg = OmegaConf.load(path)
        return at_home(OmegaConf.to_container(cfg))
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
            name = override.key_or_group
            is_plain_value = name == key and not _is_dict(override)
            begins = f"{name}.".startswith(f"{key}.")
            if begins and not is_plain_value:
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


@lru_cache(maxsize=16)
def _groups(tree: Tree, name: str) -> set[str]:
    """The groups of a folder that its config `name` chooses from; a key of its own that is called as a group
    is a value.
    """
    folder = tree.folder
    own = load_yaml(folder / f"{name}.yaml")
    choices = own.get("defaults", ())
    chosen: set[str] = set()
    for entry in choices:
        if isinstance(entry, Mapping):
            chosen.update(map(str, entry))
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    groups = {str(path.relative_to(folder)) for path in folders}
    return {group for group in groups if group in chosen or group not in own}


def _is_choice(groups: set[str], override: Override) -> bool:
    """Check whether it chooses a file of a group (growth=tile) and sets no value."""
    name = override.key_or_group
    # Hydra knows its own groups
    return name in groups and not name.startswith("hydra/")


def _choice_holds(folder: Path, override: Override, faults: list[str]) -> bool:
    group = override.key_or_group
    chosen = override.value()
    files = (folder / group).glob("*.yaml")
    known = sorted(path.stem for path in files)
    no_choice = override.is_delete() or chosen is None
    if no_choice or str(chosen) in known:
        return True
    near = did_you_mean(str(chosen), known)
    choice = f"{group}={chosen}"
    faults.append(f"{choice}: unknown {group}; {near}")
    return False


def _key_holds(cfg: DictConfig, override: Override, groups: set[str], faults: list[str]) -> bool:
    name = override.key_or_group
    adds = override.is_add() or override.is_force_add()
    if adds or name.startswith(("hydra.", "hydra/")):
        return True
    node: Any = cfg
    parts = name.split(".")
    for depth, part in enumerate(parts):
        # A DictConfig does not "contain" a missing value, but lists its key.
        keys = list(node) if isinstance(node, Mapping) else []
        if part not in keys:
            known = set(map(str, keys))
            if depth == 0:
                known |= groups
            way = _elsewhere(cfg, parts[-1]) or did_you_mean(part, known)
            until_here = parts[: depth + 1]
            unknown = ".".join(until_here)
            faults.append(f"{unknown}: unknown key; {way}")
            return False
        # The node itself: no interpolation, no missing value.
        is_config = hasattr(node, "_get_node")
        node = node._get_node(part) if is_config else node[part]
    return True


def _elsewhere(cfg: DictConfig, name: str) -> str:
    """A question that offers the keys of that name in a group: `train.learning_rate` is
    `optimizer.learning_rate`.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(cfg)
    entries = values if isinstance(values, dict) else {}
    keys = []
    for group, inner in entries.items():
        if isinstance(inner, dict) and name in inner:
            keys.append(f"{group!s}.{name}")
    options = " or ".join(map(repr, keys))
    return f"did you mean {options}?" if keys else ""


def at_home(value: Any) -> Any:
    """A value, or all that lists and dicts hold, with paths under `~/` as paths that are there."""
    if isinstance(value, dict):
        return {key: at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [at_home(inner) for inner in value]
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    return value


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
            is_missing = OmegaConf.is_missing(cfg, key)
            value = MISSING if is_missing else cfg.get(key)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
            values[key] = value
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
        loader = GlobalHydra.instance().config_loader()
        parser = OverridesParser.create(config_loader=loader)
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
    missing = False
    for name, field in fields.items():
        if name == rest:
            continue
        dotted = f"{path}{name}"
        value = values.get(name, MISSING)
        if value != MISSING:
            fitting[name] = _read_value(hints[name], value, dotted, faults)
        elif _is_required(field):
            missing = True
            # Unless it is reported already why it is not there.
            prefix = f"{dotted}:"
            reported = [fault for fault in faults if fault.startswith(prefix)]
            if not reported:
                faults.append(f"{dotted}: missing")
    if missing or len(faults) > before:
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
    known = [str(choice).lower() for choice in choices]
    near = did_you_mean(str(value), known)
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
    wanted = _spell(hint)
    return f"{path}: expected {wanted}; found {value!r}"


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
