"""Configurations composed with Hydra: YAML files, the overrides that hold, and the faults of those that do
not.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError, did_you_mean, first_line, near_matches, nearest
from outgrow.model.base.overrides import each_dict_once, parse

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from hydra.errors import MissingConfigException
    from omegaconf import DictConfig
    from yaml import YAMLError

# beside the rooms, in a clone and in an installed package
CONF = Path(str(files("outgrow.model"))).parent / "conf"
TYPING = 0.75  # what a mistyped name has in common with the right one
MISSING = "???"  # Hydra's mark of a value that has to be given


def compose_config(
    folder: Path, name: str, overrides: list[str], own: Path | None = None
) -> tuple[DictConfig, list[str]]:
    """Compose `folder/name.yaml` with the overrides that hold; return it with the faults of those that do
    not.

    Hydra stops at the first wrong override; here all of them are told, with near matches.

    Args:
        own: a folder of the user's, with further leaves of the groups.
    """
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    faults: list[str] = []
    attempts = [parse(text, faults) for text in overrides]
    parsed = [override for override in attempts if override is not None]
    parsed = each_dict_once(parsed, faults)
    tree = _tree(folder, own)
    faults += _hidden(tree)
    try:
        groups = _groups(tree, name)
    except UserError as fault:  # the file itself is no YAML
        faults.append(str(fault))
        return OmegaConf.create({}), faults
    leaves = [override for override in parsed if _is_choice(groups, override)]
    assignments = [override for override in parsed if override not in leaves]
    choices = [override for override in leaves if _choice_holds(tree, override, faults)]
    try:
        cfg = _chosen(tree, name, choices)
        values = [override for override in assignments if _key_holds(cfg, override, groups, faults)]
        changes = [override for override in values if _needs_composing(override)]
        if changes:
            further = [*choices, *changes]
            cfg = _chosen(tree, name, further)
        plain_values = [value for value in values if value not in changes]
        _set(cfg, plain_values, folder / f"{name}.yaml")
        return cfg, faults
    except MissingConfigException as error:
        faults.append(_missing(tree, error))
    except (HydraException, OmegaConfBaseException) as error:
        words = " ".join(str(error).split())
        group = re.search(r"Could not override '([^'@]+)'", words)
        near = near_matches(group[1], groups) if group else ""
        faults.append(f"{words} {near}".strip())
    except YAMLError as error:
        faults.append(yaml_fault(error))
    return OmegaConf.create({}), faults


def _set(cfg: DictConfig, values: Iterable[Override], own_file: Path) -> None:
    """Set plain values as Hydra sets them; composing again would take longer than planning a growth."""
    from omegaconf import OmegaConf

    for override in values:
        replaced = _is_open(own_file, override)
        value = override.value()
        OmegaConf.update(cfg, override.key_or_group, value, merge=not replaced)


@dataclasses.dataclass(frozen=True)
class Tree:
    """Folders of configurations as they are now: every file and folder below them, each with the time of its
    last change. Equal trees compose to equal configurations.

    Attributes:
        folders: what the first of them has counts.
    """

    folders: tuple[Path, ...]
    entries: tuple[tuple[str, int], ...]

    def leaves(self, group: str) -> set[str]:
        """The names of the files of a group."""
        files = chain.from_iterable((folder / group).glob("*.yaml") for folder in self.folders)
        return {path.stem for path in files}

    def groups(self) -> set[str]:
        """The folders below each of the folders, by their paths from there."""
        names: set[str] = set()
        for folder in self.folders:
            below = [path for path in folder.rglob("*") if path.is_dir()]
            names.update(str(path.relative_to(folder)) for path in below)
        return names


def leaves(group: str, own: Path | None) -> set[str]:
    """The names of a group's leaves, in conf/ and in a folder of the user's."""
    return _tree(CONF, own).leaves(group)


def _tree(folder: Path, own: Path | None) -> Tree:
    folders = (folder,) if own is None else (folder, own.absolute())
    entries = chain.from_iterable(folder.rglob("*") for folder in folders)
    stamps = [(str(path), path.stat().st_mtime_ns) for path in entries if path.exists()]
    return Tree(folders, tuple(sorted(stamps)))


def _chosen(tree: Tree, name: str, overrides: list[Override]) -> DictConfig:
    """The configuration that Hydra composes of these overrides; the caller may change it."""
    lines = tuple(str(override.input_line) for override in overrides)
    cached = _composed(tree, name, lines)
    return copy.deepcopy(cached)


@lru_cache(maxsize=128)  # the runs of a study or sweep choose the same leaves again and again
def _composed(tree: Tree, name: str, lines: tuple[str, ...]) -> DictConfig:
    from hydra import compose

    with _apart(), _reading(tree.folders):
        return compose(name, list(lines))


@contextmanager
def _reading(folders: Sequence[Path]) -> Iterator[None]:
    """Let Hydra compose of what lies in these folders."""
    from hydra import initialize_config_dir
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathElement
    from hydra.core.global_hydra import GlobalHydra

    first, *others = map(str, folders)
    with initialize_config_dir(first, version_base="1.3"):
        search_path = create_config_search_path(first)
        for folder in others:
            further = SearchPathElement("own", f"file://{folder}")
            search_path.get_path().insert(-1, further)  # the last is Hydra's own
        GlobalHydra.instance().clear()
        Hydra.create_main_hydra2("app", search_path)
        yield


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


@lru_cache(maxsize=16)
def _groups(tree: Tree, name: str) -> set[str]:
    """The groups that the config `name` chooses from; a key of its own that is called as a group is a
    value.
    """
    own = load_yaml(tree.folders[0] / f"{name}.yaml")
    choices = own.get("defaults", ())
    chosen: set[str] = set()
    for entry in choices:
        if isinstance(entry, Mapping):
            chosen.update(map(str, entry))
    return {group for group in tree.groups() if group in chosen or group not in own}


def _is_choice(groups: set[str], override: Override) -> bool:
    """Check whether it chooses a file of a group (growth=tile) and sets no value."""
    name = override.key_or_group
    # Hydra knows its own groups
    return name in groups and not name.startswith("hydra/")


def _choice_holds(tree: Tree, override: Override, faults: list[str]) -> bool:
    group = override.key_or_group
    chosen = override.value()
    leaves = tree.leaves(group)
    if override.is_delete() or str(chosen) in leaves:
        return True
    name = "null" if chosen is None else str(chosen)
    near = did_you_mean(name, leaves)
    choice = f"{group}={name}"
    faults.append(f"{choice}: unknown {group}; {near}")
    return False


def _missing(tree: Tree, error: MissingConfigException) -> str:
    """Say which leaf is named in a file that was chosen, and is not there; its file, where one alone names
    it.
    """
    group, _, leaf = str(error.missing_cfg_file).rpartition("/")
    files = chain.from_iterable(folder.rglob("*.yaml") for folder in tree.folders)
    choice = re.compile(rf"\b{re.escape(group)}\b.*\b{re.escape(leaf)}\b")
    naming = [path for path in files if choice.search(path.read_text(errors="replace"))]
    prefix = f"{naming[0]}: " if len(naming) == 1 else ""
    if group not in tree.groups():
        return f"{prefix}{group}={leaf}: unknown group; {did_you_mean(group, tree.groups())}"
    return f"{prefix}{group}={leaf}: unknown {group}; {did_you_mean(leaf, tree.leaves(group))}"


def _hidden(tree: Tree) -> Iterator[str]:
    """Yield the files that nothing reads, since the first folder has another of the same name."""
    first, *others = tree.folders
    for folder in others:
        for path in sorted(folder.rglob("*.yaml")):
            same = first / path.relative_to(folder)
            if same.is_file() and same.read_bytes() != path.read_bytes():
                yield f"{path}: {same} would be read in its place; give yours a name of its own"


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
            names = set(map(str, keys))
            if depth == 0:
                names |= groups
            last = parts[-1]
            way = _elsewhere(cfg, last) or _near(cfg, part, names)
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
    keys = _in_groups(cfg).get(name, [])
    options = " or ".join(map(repr, keys))
    return f"did you mean {options}?" if keys else ""


def _near(cfg: DictConfig, name: str, names: set[str]) -> str:
    """A question that offers names near to `name`, of those known where it stands and of those in groups:
    `nosie` is `growth.noise`.
    """
    in_groups = _in_groups(cfg)
    keys = nearest(name, names, TYPING) or list(
        chain.from_iterable(in_groups[near] for near in nearest(name, in_groups, TYPING))
    )
    options = " or ".join(map(repr, keys))
    return f"did you mean {options}?" if keys else did_you_mean(name, names)


def _in_groups(cfg: DictConfig) -> dict[str, list[str]]:
    """The keys in groups, each with its places: `noise` → `growth.noise`."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(cfg)
    places: dict[str, list[str]] = {}
    for group, inner in values.items() if isinstance(values, dict) else ():
        for key in inner if isinstance(inner, dict) else ():
            places.setdefault(str(key), []).append(f"{group!s}.{key}")
    return places


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


def sweep_points(overrides: list[str], own: Path | None = None) -> list[list[str]]:
    """The overrides of each run of a sweep, as Hydra's own sweeper makes them: lists of values, choice(),
    range() and glob().

    `["growth=a,b", "seed=range(2)"]` → `[["growth=a", "seed=0"], ["growth=a", "seed=1"], ["growth=b",
    "seed=0"], …]`. An override that cannot be read stays as it is, for composing to tell.

    Raises:
        UserError: it is a sweep that Hydra's sweeper does not make, such as interval(), or a key's keys and
            values are given twice.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    readable: list[Override] = []
    unreadable: list[str] = []
    with _apart(), _reading(_tree(CONF, own).folders):  # glob() looks for leaves there
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
