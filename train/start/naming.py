"""Names of runs: what a run changes against its experiment's defaults is in its name, so that no two results
share a folder.

`experiment=tiny growth=tile optimizer.learning_rate=0.01 transfer=continued` →
`tiny-tile-transfer_continued-lr0.01-s0`

A label is a setting's key and value, without a "-" in it. What changes no result (NEUTRAL in
train/neutral.py) or says only how it is computed (COMPUTED) is in no name. Hydra's own `override_dirname`
names what was typed, in its order, defaults and loggers included.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.compose import CONF, compose_config, plain
from outgrow.model.keys import is_number
from outgrow.train.start.neutral import flatten, is_neutral, is_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMPUTED = (
    *("train.attention", "train.loss", "train.checkpointing", "train.compile", "train.log_every_tokens"),
    *("data.shard_tokens", "data.model_max_length"),
)
ELSEWHERE = ("study", "seed", "name", "changes", "growth.name")  # have a place of their own in a name
SHORT = {"optimizer.learning_rate": "lr"}
LONGEST_VALUE, LONGEST = 40, 150  # characters, of 255 that a file system gives a name


def tell_changes(cfg: DictConfig, overrides: Sequence[str], own: Path | None = None) -> None:
    """Fill in `changes` of a composed configuration, which `name` is made of, where the overrides do not give
    it themselves.

    Args:
        own: the folder of the user's that it was composed of too.
    """
    is_told = "changes" in map(_key, overrides)
    if "changes" in cfg and not is_told:
        labels = [f"-{label}" for label in changes(cfg, overrides, own)]
        cfg.changes = "".join(labels)


def changes(cfg: DictConfig, overrides: Sequence[str], own: Path | None = None) -> list[str]:
    """The labels of what a run changes: chosen leaves first, then single settings, in the order of
    conf/train.yaml.
    """
    by_key = {_key(text): text for text in overrides}
    # whose leaves the name tells already
    named = ("experiment",) if "growth.name" in by_key else ("experiment", "growth")
    others = [key for key in by_key if key not in named]
    if not any(map(_shows, others)):
        return []
    # Leaves of groups that were chosen beside the experiment and change something.
    base = [text for key, text in by_key.items() if key in named]
    folders = [CONF] if own is None else [CONF, own]
    groups = [key for key in others if any((folder / key).is_dir() for folder in folders)]
    leaves = {key: by_key[key] for key in groups if not is_neutral(key)}
    before = _values(own, *base)
    after = _values(own, *base, *leaves.values())
    labels = []
    for key, text in leaves.items():
        if _of(before, key) != _of(after, key):
            labels.append(_leaf_label(key, text))

    # Single settings that differ from what experiment and leaves say, and those that are gone.
    settings = flatten(plain(cfg, []))
    shown = filter(_shows, _differing(settings, after))
    labels += [_label(key, settings.get(key), settings) for key in shown]
    return _short(labels)


def _leaf_label(key: str, override: str) -> str:
    """`transfer/end=merge` → `transfer_end_merge`."""
    group = key.replace("/", "_")
    _, _, leaf = override.partition("=")
    return f"{group}_{_word(leaf)}"


def _differing(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The keys of settings that differ from the defaults, and of defaults that are gone."""
    absent = object()
    differing = [key for key, value in settings.items() if defaults.get(key, absent) != value]
    present = set(settings)
    for key in settings:
        present.update(_parents(key))
    gone = [key for key in defaults if key not in present]
    return [*differing, *gone]


def _parents(key: str) -> list[str]:
    """`a.b.c` → `a`, `a.b`."""
    parts = key.split(".")
    lengths = range(1, len(parts))
    return [".".join(parts[:length]) for length in lengths]


def arm_changes(labels: str) -> list[str]:
    """The changes that make another arm: all but the learning rate, which is a point of an arm's grid."""
    return [label for label in labels.split("-") if label and not _is_rate(label)]


def _is_rate(label: str) -> bool:
    """Check for the label of a learning rate."""
    return re.fullmatch(r"lr\d[\d.e]*", label) is not None


def _key(override: str) -> str:
    key, _, _ = override.partition("=")
    return key.lstrip("+~")


@lru_cache(maxsize=64)  # the points of a sweep share what they are held against
def _values(own: Path | None, *overrides: str) -> dict[str, Any]:
    cfg, _ = compose_config(CONF, "train", list(overrides), own)
    return flatten(plain(cfg, []))


def _of(values: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The settings of one group; all of them for a group within a group."""
    top, _, _ = group.partition("/")
    return {key: value for key, value in values.items() if _group(key) == top}


def _group(key: str) -> str:
    """`optimizer.learning_rate` → `optimizer`."""
    group, _, _ = key.partition(".")
    return group


def _shows(key: str) -> bool:
    """Check for a setting that is told in a name."""
    if is_text(key):
        return True
    silent = is_neutral(key) or key in (*COMPUTED, *ELSEWHERE)
    return not silent and _group(key) != "experiment"


def _label(key: str, value: Any, values: Mapping[str, Any]) -> str:
    """The end of the key that no other key shares, and the value."""
    name = SHORT.get(key)
    if name is None:
        end = _unique_end(key, values)
        name = _word(end.replace(".", "_"))
    gap = "" if is_number(value) else "_"
    return f"{name}{gap}{_word(value)}"


def _unique_end(key: str, values: Mapping[str, Any]) -> str:
    """The shortest end of the dotted `key` that at most one key of `values` has."""
    parts = key.split(".")
    last = len(parts) - 1
    for start in range(last, 0, -1):
        end = ".".join(parts[start:])
        sharing = [other for other in values if f".{other}".endswith(f".{end}")]
        if len(sharing) <= 1:
            return end
    return key


def _word(value: Any) -> str:
    """A value in letters, digits, "." and "_"; a long one ends in a hash."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _number(value)
    if _is_list_of_numbers(value):
        return "_".join(map(_number, value))
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    short = text.removeprefix("runs/")
    short = short.removesuffix("/final")
    word = re.sub(r"[^A-Za-z0-9.]+", "_", short)
    word = word.strip("_.") or "none"
    if len(word) <= LONGEST_VALUE:
        return word
    end = word[-LONGEST_VALUE:]
    end = end.strip("_.")
    return f"{end}_{_hash(text)}"


def _is_list_of_numbers(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(isinstance(item, int | float) for item in value)


def _number(value: float) -> str:
    """Without an exponent, so without a "-": 1e-05 → 0.00001."""
    text = str(value)
    if abs(value) < 1e18:  # false for NaN
        text = format(Decimal(text), "f")
    if "." in text:
        text = text.rstrip("0")
        text = text.rstrip(".")
    text = text.replace("-", "minus")
    return text.replace("+", "")


def _short(labels: list[str]) -> list[str]:
    """Shorten a list of labels to the room that a name has, with a hash in place of the rest.

    A learning rate is always told and takes no room, so that all points of an arm's grid are of one arm.
    """
    room = LONGEST
    for number, label in enumerate(labels):
        room -= 0 if _is_rate(label) else len(label) + 1
        if room < 0:
            rest = labels[number:]
            rates = list(filter(_is_rate, rest))
            others = [label for label in rest if label not in rates]
            return [*labels[:number], f"more_{_hash(str(others))}", *rates]
    return labels


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:6]


def same_folder(settings: Sequence[tuple[Sequence[str], str]]) -> list[str]:
    """Faults of a sweep of (overrides, out): every folder that two of its points would write."""
    points: dict[Path, list[str]] = defaultdict(list)
    for overrides, out in settings:
        folder = Path(out).resolve()
        point = " ".join(overrides)
        points[folder].append(point)
    return [_shared_folder(folder, same) for folder, same in points.items() if len(same) > 1]


def _shared_folder(folder: Path, points: Sequence[str]) -> str:
    """Say that several points of a sweep would train in one folder."""
    first = "; ".join(points[:3])
    return (
        f"sweep: {len(points)} points would train in {folder}: {first}; what they differ in changes no "
        "result, or name= and out= do not hold it: put it into name=, as in "
        "name='${study}-${growth.name}-${train.compile}-s${seed}'"
    )
