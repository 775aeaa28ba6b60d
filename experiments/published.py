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


def credits(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Turn (row's name, its credit) into one note per credit: `phi-1.5: arXiv 2309.05463`."""
    by_credit: dict[str, list[str]] = defaultdict(list)
    for name, credit in rows:
        by_credit[credit].append(name)
    return [f"{', '.join(names)}: {credit}" for credit, names in by_credit.items()]
