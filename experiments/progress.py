"""Progress of runs, read from metrics.jsonl: bars on a terminal, else one line for each finished run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from outgrow.experiments.study_file import Job


class Display:
    """One study's voice. `watching` shows bars for a batch of jobs; `say` prints a line at any time."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(soft_wrap=True, highlight=False)
        self.bars: Progress | None = None
        self.tasks: dict[TaskID, Job] = {}

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    @contextmanager
    def watching(self, todo: Sequence[Job]) -> Iterator[None]:
        """Show one bar for each job while the block runs, if there is a terminal to show it on."""
        if not self.console.is_terminal:
            yield
            return
        with _bars(self.console) as self.bars:
            add = self.bars.add_task
            for job in todo:
                task = add(job.name, start=False, total=job.settings.train.budget_tokens, shown="waiting")
                self.tasks[task] = job
            yield
        self.bars = None
        self.tasks = {}

    def refresh(self) -> None:
        """Move every bar to where its run's metrics say it is."""
        for task, job in self.tasks.items() if self.bars else ():
            tokens, shown = position(job.folder / "metrics.jsonl")
            if self.bars and shown:
                # its clock starts with its first evaluation, not while it waits for a core
                self.bars.start_task(task)
                self.bars.update(task, completed=tokens, shown=shown)

    def finished(self, job: Job, seconds: float) -> None:
        """Stop the job's clock, or tell that it is done; `seconds` since the batch began."""
        _, shown = position(job.folder / "metrics.jsonl")
        own = [task for task, other in self.tasks.items() if other is job]
        for task in own:
            if self.bars:
                budget = job.settings.train.budget_tokens
                self.bars.update(task, completed=budget, shown=shown)
                self.bars.stop_task(task)
                del self.tasks[task]
        if self.bars is None:
            minutes = seconds / 60
            duration = f"{minutes:.1f} min after the start"
            self.say(f"{job.name}: done, {shown}, {duration}")


def position(metrics: Path) -> tuple[float, str]:
    """Tokens done and the newest validation loss in words; (0, "") before the first line."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    tokens, loss = 0.0, ""
    for entry in map(_parsed, lines):
        tokens = entry.get("tokens", tokens)
        loss = f"val loss {entry['val_loss']:.3f}" if "val_loss" in entry else loss
    return tokens, loss


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the line that is being written
        return {}


def _bars(console: Any) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}% {task.fields[shown]}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
