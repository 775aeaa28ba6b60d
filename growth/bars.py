"""Progress of a growth on stderr: bars on a terminal, lines of text about what takes minutes elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from outgrow.growth.learned.telling import Telling

Writing = Callable[[int, int], None]  # (bytes done, bytes in all)
Learning = Callable[[float, float], None]  # (FLOPs done, FLOPs in all)


@contextmanager
def bars() -> Iterator[tuple[Writing | None, Learning]]:
    """Callbacks of `grow`, of what is written (None where there is no terminal) and of what is learned."""
    telling = Telling()
    if not sys.stderr.isatty():
        yield None, telling
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    named = (TextColumn("{task.description}"), BarColumn())
    left = TimeRemainingColumn()
    bytes_done = (DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    writing = Progress(*named, *bytes_done, left, console=console, transient=True)
    learning = Progress(*named, TaskProgressColumn(), left, console=console, transient=True)
    with ExitStack() as shown:
        shown.enter_context(writing)
        written = writing.add_task("growing", total=None)

        def learn(done: float, flops: float) -> None:
            """Put the second bar in the place of the first, under the estimate."""
            if not learning.tasks:
                shown.pop_all().close()
                telling(done, flops)
                shown.enter_context(learning)
                learning.add_task("learning")
            learning.update(learning.tasks[0].id, completed=done, total=flops)

        def write(done: int, total: int) -> None:
            """Move the first bar; at its end both models run for a receipt, which may take minutes."""
            doing = "growing" if done < total else "written; checking"
            writing.update(written, completed=done, total=total, description=doing)

        yield write, learn
