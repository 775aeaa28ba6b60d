"""Progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]  # so much further


def say(line: str) -> None:
    """Tell something on stderr."""
    print(line, file=sys.stderr)


@contextmanager
def bar(title: str, total: int | None, shown: bool) -> Iterator[Advance]:
    """A progress bar over bytes of text, or tasks; nothing where it is not shown."""
    if not shown:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown_bar:
        task = shown_bar.add_task(title, total=total)
        yield lambda size: shown_bar.advance(task, size)
