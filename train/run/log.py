"""The logs of a run: metrics.jsonl is the truth; trackers mirror it and the console shows it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError, kind_and_line
from outgrow.model.base.files import plain_json, read_object, telling_disk_faults, write_json
from outgrow.train.run.folder import METRICS, SAMPLES, is_complete
from outgrow.train.run.signals import Stopped
from outgrow.train.run.trackers import Tracker, open_trackers

if TYPE_CHECKING:
    from outgrow.train.run.record import RunRecord
    from outgrow.train.run.samples import Sample
    from outgrow.train.settings import Settings

FAILED = 1  # the status of a run that ends before its summary is written


class Log:
    """The one writer of a run's metrics, on the main process."""

    def __init__(self, folder: Path, trackers: list[Tracker], console: Console) -> None:
        self.path = folder / METRICS
        self.trackers = trackers
        self.console = console
        with telling_disk_faults(self.path):
            self.file = self.path.open("a")

    def write(self, kind: str, clocks: Mapping[str, Any], **values: Any) -> None:
        """Append one line and mirror it; what is not finite is null."""
        row = plain_json({"kind": kind, **clocks, **values})
        line = json.dumps(row, allow_nan=False)
        with telling_disk_faults(self.path):
            self.file.write(f"{line}\n")
            self.file.flush()
        for tracker in self.trackers:
            tracker.log(kind, clocks, values)
        self.console.row(kind, clocks, values)

    def rows(self) -> str:
        """All lines so far, which a checkpoint keeps beside the weights that they tell of.

        They are on the disk when this returns.
        """
        with telling_disk_faults(self.path):
            os.fsync(self.file.fileno())
            return self.path.read_text()

    def samples(self, when: str, clocks: Mapping[str, Any], write: Callable[[], list[Sample]]) -> None:
        """Keep what `write` writes in samples.json under `when`, and mirror it.

        No fault of it stops the run: nothing else needs it.
        """
        try:
            written = write()
        except Exception as error:
            reason = kind_and_line(error)
            self.console.say(f"no samples at the {when} ({reason})")
            return
        path = self.path.with_name(SAMPLES)
        try:
            by_time = read_object(path, "it is written anew") if path.is_file() else {}
        except UserError as error:
            self.console.say(str(error))
            by_time = {}
        rows = list(map(asdict, written))
        by_time[when] = {**clocks, "samples": rows}
        try:
            write_json(path, by_time)
        except UserError as error:
            self.console.say(str(error))
        for tracker in self.trackers:
            tracker.samples(when, rows, clocks)
        for sample in written[:1]:
            self.console.say(f"continues {sample.prompt!r} with {sample.text!r}")

    def close(self, status: int) -> None:
        """End all, in the trackers with the status that the run ends with."""
        self.file.close()
        self.console.close()
        for tracker in self.trackers:
            tracker.finish(status)


@contextmanager
def open_log(folder: Path, settings: Settings, run: RunRecord, writes: bool) -> Iterator[Log | None]:
    """The run's log on the process that writes; None on the others."""
    if not writes:
        yield None
        return
    console = Console(settings.progress, settings.name, run.budget_tokens)
    trackers = open_trackers(folder, settings, run, console.say)
    log = Log(folder, trackers, console)
    status = FAILED
    try:
        yield log
    except Stopped as stopped:
        status = stopped.status
        raise
    finally:
        log.close(0 if is_complete(folder) else status)


# ---- console -----------------------------------------------------------------------------------------------


LONGEST_PREFIX = 48  # characters of a run's name before each of its lines


def shortened(name: str) -> str:
    """A run's name with its middle left out where it is longer than a line bears."""
    if len(name) <= LONGEST_PREFIX:
        return name
    end = name[-12:]
    room = LONGEST_PREFIX - len(end) - 1
    return f"{name[:room]}…{end}"


def _diagnosis(values: Mapping[str, Any]) -> str:
    """The diagnostics of all layers together, in a line."""
    keys = [key for key in values if "/layer_" not in key]
    cosines = [
        f"{key.removeprefix('copy_cosine/')} {values[key]:.4f}"
        for key in keys
        if key.startswith("copy_cosine/")
    ]
    parts = [f"cosine of copies: {', '.join(cosines)}"] if cosines else []
    parts += [f"{values[key]} {key.replace('_', ' ')}" for key in keys if key.endswith("_units")]
    parts.append(f"update rms {values['update_rms']:.2e}")
    if "update_rms/new" in values:
        parts.append(f"of new entries {values['update_rms/new']:.2e}")
    return "; ".join(parts)


class Console:
    """A bar on a terminal, one line per logged row elsewhere, or nothing."""

    def __init__(self, progress: str | bool, name: str, budget_tokens: int) -> None:
        # of several processes, the first one speaks
        self.silent = progress is False or os.environ.get("RANK", "0") != "0"
        self.name = shortened(name)
        self.budget = budget_tokens
        self.bar: Any = None
        self.losses: dict[str, str] = {}
        if progress == "auto" and not self.silent and sys.stderr.isatty():
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = ("[bold]{task.description}", "{task.percentage:3.0f}%", "{task.fields[shown]}")
        self.bar = Progress(
            TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), TextColumn(columns[2]),
            TimeElapsedColumn(), TimeRemainingColumn(),
            console=Terminal(stderr=True),
        )  # fmt: skip
        self.task = self.bar.add_task(self.name, total=self.budget, shown="")
        self.bar.start()

    def say(self, text: str) -> None:
        """One line for the reader, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        elif not self.silent:
            print(f"{self.name}: {text}", flush=True)

    def row(self, kind: str, clocks: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Show a row of the metrics: on the bar where there is one, else as a line."""
        text = self._text(kind, values)
        tokens = clocks["tokens"]
        if self.bar is not None:
            parts = [f"{key} {value}" for key, value in self.losses.items()]
            self.bar.update(self.task, completed=tokens, shown=", ".join(parts))
        else:
            share = tokens / self.budget
            step = clocks["step"]
            left = self.left(clocks)
            self.say(f"{share:4.0%}, step {step}: {text}{left}")

    def _text(self, kind: str, values: Mapping[str, Any]) -> str:
        """A row's values in words; its losses and speed are kept for the bar."""
        if kind == "eval":
            loss = f"{values['val_loss']:.4f}"
            self.losses["val loss"] = loss
            average = f" (averaged weights {values['ema_val_loss']:.4f})" if "ema_val_loss" in values else ""
            return f"val loss {loss} nats/token, {values['bits_per_byte']:.4f} bits/byte{average}"
        if kind in ("before_growth", "growth"):
            when = "grown" if kind == "growth" else "before it grows"
            return f"{when}: val loss {values['val_loss']:.4f}"
        if kind == "benchmark":
            return ", ".join(f"{task} {score:.1%}" for task, score in values.items())
        if kind == "diagnostics":
            return _diagnosis(values)
        if kind == "skip":
            return f"{values['reason']}: passed over"
        return self._training_text(values)

    def _training_text(self, values: Mapping[str, Any]) -> str:
        """A row of training: loss, routers, learning rate, speed."""
        loss = f"{values['loss']:.4f}"
        speed = f"{values['tokens_per_second']:,.0f}"
        self.losses["loss"] = loss
        self.losses["tokens/s"] = speed
        mfu = "" if values["mfu"] is None else f", MFU {values['mfu']:.1%}"
        router = f" (routers {values['router_loss']:.3f})" if "router_loss" in values else ""
        rate = f"{values['learning_rate']:.2e}"
        return f"loss {loss}{router}, learning rate {rate}, {speed} tokens/s{mfu}"

    def left(self, clocks: Mapping[str, Any]) -> str:
        """The time that the rest of the budget will take at the run's speed so far.

        "" where it is unknown or over.
        """
        tokens = clocks["tokens"]
        if not tokens or tokens >= self.budget:
            return ""
        seconds = clocks["seconds"] / tokens * (self.budget - tokens)
        hours, minutes = divmod(round(seconds / 60), 60)
        if hours:
            return f", {hours} h {minutes:02d} min left"
        return f", {minutes} min left" if minutes else f", {seconds:.0f} s left"

    def close(self) -> None:
        if self.bar is not None:
            with contextlib.suppress(Exception):
                self.bar.stop()
            self.bar = None
