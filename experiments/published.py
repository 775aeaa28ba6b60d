"""Rows that others published: a YAML file beside the table that shows them, and the credit under it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import yaml

R = TypeVar("R")


def read_rows(kind: type[R], file: Path) -> list[R]:
    """All rows of a file, each of a dataclass whose fields are the file's keys."""
    text = file.read_text(encoding="utf-8")
    return [kind(**row) for row in yaml.safe_load(text)]


def credits(sources: Iterable[tuple[str, str]]) -> list[str]:
    """Turn (row's name, where it was published) into one note per place: `phi-1.5: arXiv 2309.05463`."""
    by_place: dict[str, list[str]] = defaultdict(list)
    for name, place in sources:
        by_place[place].append(name)
    return [f"{', '.join(names)}: {place}" for place, names in by_place.items()]
