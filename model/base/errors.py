"""The one error a door shows to its user without a traceback."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NoReturn

LONGEST_WORD, LONGEST_LINE = 400, 2000  # characters of a message that a stranger's file may fill


class UserError(Exception):
    """A fault in what the user gave: its message names the thing, what was expected and found, and the way
    out.

    Names come from files of strangers: of a word or a line without end, the middle is left out.
    """

    def __init__(self, message: str) -> None:
        long_word = rf"\S{{{LONGEST_WORD},}}"
        lines = []
        for line in message.split("\n"):
            text = re.sub(long_word, _shortened, line)
            if len(text) > LONGEST_LINE:
                text = f"{text[:LONGEST_LINE]} …"
            lines.append(text)
        super().__init__("\n".join(lines))

    @classmethod
    def collect(cls, faults: Iterable[str]) -> None:
        """Raise all `faults` as one error; do nothing when there are none."""
        faults = list(faults)
        if len(faults) == 1:
            raise cls(faults[0])
        if faults:
            listing = "\n".join(f"  - {fault}" for fault in faults)
            raise cls(f"{len(faults)} faults:\n{listing}")


class Diverged(UserError):
    """A training whose loss, gradient or weights are not finite, with its way out."""


def _shortened(word: re.Match[str]) -> str:
    text = word[0]
    begin = text[:100]
    end = text[-50:]
    return f"{begin}… ({len(text):,} characters) …{end}"


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn an OSError raised while reading `path` into a UserError."""
    try:
        yield
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """The end of an error about an unknown `name`: its near matches, else everything that is known."""
    names = sorted(names)
    return near_matches(name, names) or f"known: {', '.join(names) or 'none'}"


def near_matches(name: object, names: Iterable[str]) -> str:
    """A question after the known names that are near to `name`; "" where none is."""
    words = map(repr, nearest(name, names))
    options = " or ".join(words)
    return f"did you mean {options}?" if options else ""


def nearest(name: object, names: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """Up to three known names that are near to `name`, in whatever case it is written, the nearest first.

    Args:
        cutoff: the share that two names have in common, from which on they are near.
    """
    by_small = {word.lower(): word for word in sorted(names)}
    small = str(name).lower()
    near = difflib.get_close_matches(small, by_small, n=3, cutoff=cutoff)
    return [by_small[word] for word in near]


def unknown(kind: str, name: object, names: Iterable[str]) -> NoReturn:
    """Raise the error for a `name` that is no known `kind`."""
    near = did_you_mean(name, names)
    raise UserError(f"unknown {kind} {name!r}; {near}")


DISTRIBUTION = "scaled-knowledge-transfer"


def not_installed(fault: ModuleNotFoundError) -> UserError | None:
    """The error for a library of the extras `train` and `corpus` that is not there; None for another module,
    which is no user's fault.
    """
    missing = (fault.name or "").partition(".")[0]
    requirements = metadata.requires(DISTRIBUTION) or []
    for extra in ("train", "corpus"):
        lines = [line for line in requirements if re.search(f"extra == .{extra}.", line)]
        packages = [re.split(r"[^\w-]", line)[0] for line in lines]
        if missing in {package.replace("-", "_") for package in packages}:
            way_out = f"pip install '{DISTRIBUTION}[{extra}]'; growing a checkpoint does without"
            return UserError(f"{missing} is not installed, and this needs it: {way_out}")
    return None


def loading_faults(report: Mapping[str, Iterable[object]]) -> list[str]:
    """The library's report of how a model was loaded, in words: `missing keys: a, b`."""
    faults = []
    for kind, names in report.items():
        listing = ", ".join(sorted(map(str, names)))
        if listing:
            words = kind.replace("_", " ")
            faults.append(f"{words}: {listing[:200]}")
    return faults


def names_of(words: Iterable[str]) -> str:
    """The first few of many names, for an error message."""
    names = sorted(words)
    first = ", ".join(names[:3])
    if len(names) <= 3:
        return first
    return f"{first}, … ({len(names)} in all)"


def first_line(fault: BaseException) -> str:
    """The first line of another library's error, to be quoted; its class's name where it says nothing."""
    message = str(fault).strip() or type(fault).__name__
    return message.splitlines()[0]


def kind_and_line(fault: BaseException) -> str:
    """The kind of another library's error and the first line of it, to be quoted; the kind alone where it
    says nothing.
    """
    kind = type(fault).__name__
    return f"{kind}: {first_line(fault)}" if str(fault).strip() else kind


def in_one_line(fault: BaseException, length: int = 200) -> str:
    """The kind and the beginning of another library's error, its lines joined, to be quoted."""
    message = " ".join(str(fault).split())
    kind = type(fault).__name__
    return f"{kind}: {message[:length]}" if message else kind


def seen_from(path: Path) -> str:
    """The folder that a relative path is seen from, for the message that it is not there; "" for others."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"
