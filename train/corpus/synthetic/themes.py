"""Places where exercises play, and whom they are for. A theme gives every kind of value a name, a description
and words to be made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from outgrow.train.corpus.synthetic.operation import read_table


@dataclass(frozen=True)
class Theme:
    """Names of parameters, and in words what they hold, for each kind of value."""

    name: str
    numbers: tuple[str, str]  # "rainfall", "readings"
    number: tuple[str, str]
    text: tuple[str, str]
    words: tuple[str, str]
    table: tuple[str, str]
    grid: tuple[str, str]
    vocabulary: tuple[str, ...]

    def parameter(self, kind: str) -> tuple[str, str]:
        return getattr(self, kind)

    def draw(self, kind: str, random: Random) -> Any:
        """A value of this kind."""
        return DRAWN[kind](self, random)


def _numbers(theme: Theme, random: Random) -> list[int]:
    count = random.randint(5, 9)
    return [random.randint(0, 25) for _ in range(count)]


def _text(theme: Theme, random: Random) -> str:
    return " ".join(
        random.choice((str.lower, str.lower, str.capitalize))(word)
        for word in random.choices(theme.vocabulary, k=random.randint(2, 4))
    )


def _words(theme: Theme, random: Random) -> list[str]:
    return random.choices(theme.vocabulary, k=random.randint(4, 7))


def _table(theme: Theme, random: Random) -> dict[str, int]:
    count = random.randint(3, 5)
    names = random.sample(theme.vocabulary, count)
    return {name: random.randint(0, 15) for name in names}


def _grid(theme: Theme, random: Random) -> list[list[int]]:
    width = random.randint(2, 4)
    height = random.randint(2, 4)
    return [[random.randint(0, 15) for _ in range(width)] for _ in range(height)]


DRAWN: dict[str, Callable[[Theme, Random], Any]] = {
    "numbers": _numbers,
    "number": lambda theme, random: random.randint(2, 150),
    "text": _text,
    "words": _words,
    "table": _table,
    "grid": _grid,
}
EMPTY: dict[str, Any] = {"numbers": [], "text": "", "words": [], "table": {}, "grid": []}


@dataclass(frozen=True)
class Audience:
    """Whom a text is for; each of `openings` leads into it, with `$theme` for the place."""

    name: str
    openings: tuple[str, ...]


def _theme(*, name: str, vocabulary: list[str], **kinds: dict[str, str]) -> Theme:
    """A theme as the file spells it."""
    nouns = {kind: (entry["name"], entry["holds"]) for kind, entry in kinds.items()}
    return Theme(name=name, vocabulary=tuple(vocabulary), **nouns)


_TABLE = read_table("themes.yaml")
THEMES = tuple(_theme(**entry) for entry in _TABLE["themes"])


def _audience(*, name: str, openings: list[str]) -> Audience:
    """An audience as the file spells it."""
    return Audience(name, tuple(openings))


AUDIENCES = tuple(_audience(**entry) for entry in _TABLE["audiences"])
