"""What a run tells while it trains: metrics.jsonl is the truth; trackers mirror it and the console shows it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.files import telling_disk_faults
from train.folder import METRICS

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from train.settings import Settings

CLOCKS = ("step", "tokens", "flops", "seconds")


class Log:
    """The one writer of a run's metrics, on the main process."""

    def __init__(self, folder: Path, trackers: list[Tracker], console: Console) -> None:
        self.path, self.trackers, self.console = folder / METRICS, trackers, console
        with telling_disk_faults(self.path):
            self.file = self.path.open("a")

    def write(self, kind: str, clocks: Mapping[str, Any], **values: Any) -> None:
        """Append one line, on the disk before this returns, and mirror it."""
        with telling_disk_faults(self.path):
            self.file.write(json.dumps({"kind": kind, **clocks, **values}) + "\n")
            self.file.flush()
        for tracker in self.trackers:
            tracker.log(kind, clocks, values)
        self.console.row(kind, clocks, values)

    def close(self) -> None:
        self.file.close()
        self.console.close()
        for tracker in self.trackers:
            tracker.finish()


@contextmanager
def open_log(folder: Path, settings: Settings, run: Mapping[str, Any], writes: bool) -> Iterator[Log | None]:
    """The run's log on the process that writes; None on the others."""
    if not writes:
        yield None
        return
    console = Console(settings.progress, settings.name, run["budget_tokens"])
    log = Log(folder, open_trackers(folder, settings, run, console), console)
    try:
        yield log
    finally:
        log.close()


# ---- trackers -------------------------------------------------------------------------------------------------------------------------


class Tracker:
    """One of Accelerate's trackers, held so that no fault of it reaches the run: after its first fault it is left alone."""

    def __init__(self, tracker: GeneralTracker, console: Console) -> None:
        self.tracker: GeneralTracker | None = tracker
        self.name, self.console = tracker.name, console

    def log(self, kind: str, clocks: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        named = {f"{kind}/{key}": value for key, value in values.items() if value is not None}
        losses = {f"{kind}_by_flops/{key}": value for key, value in values.items() if key.endswith("loss")}
        self._guard("log", {**{key: clocks[key] for key in CLOCKS}, **named, **losses}, step=clocks["step"])

    def finish(self) -> None:
        self._guard("finish")

    def _guard(self, method: str, *arguments: Any, **options: Any) -> None:
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, method)(*arguments, **options)
        except Exception as error:
            self.tracker = None
            self.console.say(f"tracker {self.name} stopped ({type(error).__name__}: {error}); training goes on, {METRICS} is complete")


def open_trackers(folder: Path, settings: Settings, run: Mapping[str, Any], console: Console) -> list[Tracker]:
    """The trackers that can be started; the others are told and left out."""
    opened = []
    for name in settings.logger.trackers:
        try:
            opened.append(Tracker(OPENERS[name](folder, settings, run), console))
        except Exception as error:
            console.say(f"tracker {name} does not start ({type(error).__name__}: {error}); training goes on without it")
    return opened


def _wandb(folder: Path, settings: Settings, run: Mapping[str, Any]) -> GeneralTracker:
    """W&B: curves grouped by study, over tokens by default, and losses over FLOPs as well."""
    import wandb
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker(
        settings.logger.project,
        name=settings.name,
        id=f"{settings.name}-{run['settings_hash'][:8]}",
        resume="allow",
        group=settings.study,
        tags=[settings.growth.name, f"seed {settings.seed}"],
        config=dict(run),
        dir=str(folder),
        mode=_wandb_mode(settings.logger.mode),
        settings=wandb.Settings(console="off", silent=True, init_timeout=60),
    )
    tracker.start()
    for clock in CLOCKS:
        tracker.run.define_metric(clock, hidden=True)
    for kind in ("train", "eval", "growth"):
        tracker.run.define_metric(f"{kind}/*", step_metric="tokens")
        tracker.run.define_metric(f"{kind}_by_flops/*", step_metric="flops")
    return tracker


def _wandb_mode(asked: str) -> Any:
    if asked != "auto":
        return asked
    import wandb

    return os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")


def _tensorboard(folder: Path, settings: Settings, run: Mapping[str, Any]) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(settings.name, folder / "tensorboard")
    tracker.start()
    return tracker


OPENERS = {"wandb": _wandb, "tensorboard": _tensorboard}


# ---- console --------------------------------------------------------------------------------------------------------------------------


class Console:
    """A bar on a terminal, one line per logged row elsewhere, or nothing."""

    def __init__(self, progress: str | bool, name: str, budget_tokens: int) -> None:
        self.silent = progress is False or os.environ.get("RANK", "0") != "0"  # of several processes, the first one speaks
        self.name, self.budget = name, budget_tokens
        self.bar: Any = None
        self.losses: dict[str, str] = {}
        if progress == "auto" and not self.silent and sys.stderr.isatty():
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = ("[bold]{task.description}", "{task.percentage:3.0f}%", "{task.fields[shown]}")
        self.bar = Progress(
            TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), TextColumn(columns[2]), TimeElapsedColumn(), TimeRemainingColumn(),
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
        if kind == "eval":
            self.losses["val loss"] = f"{values['val_loss']:.4f}"
            text = f"val loss {values['val_loss']:.4f} nats/token, {values['bits_per_byte']:.4f} bits/byte"
        elif kind == "growth":
            text = f"grown: val loss {values['val_loss']:.4f}"
        elif kind == "skip":
            text = f"{values['reason']}: passed over"
        else:
            self.losses["loss"] = f"{values['loss']:.4f}"
            self.losses["tokens/s"] = f"{values['tokens_per_second']:,.0f}"
            mfu = "" if values["mfu"] is None else f", MFU {values['mfu']:.1%}"
            speed = f"{values['tokens_per_second']:,.0f} tokens/s{mfu}"
            text = f"loss {values['loss']:.4f}, learning rate {values['learning_rate']:.2e}, {speed}"
        if self.bar is not None:
            self.bar.update(self.task, completed=clocks["tokens"], shown=", ".join(f"{key} {value}" for key, value in self.losses.items()))
        else:
            self.say(f"{clocks['tokens'] / self.budget:4.0%}, step {clocks['step']}: {text}")

    def close(self) -> None:
        if self.bar is not None:
            with contextlib.suppress(Exception):
                self.bar.stop()
            self.bar = None
