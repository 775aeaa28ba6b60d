"""The trackers that mirror metrics.jsonl, W&B, TensorBoard and Trackio through Accelerate, each kept where it can do the run no harm."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UserError
from train.folder import METRICS, PICTURE

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from train.settings import Settings

CLOCKS = ("step", "tokens", "flops", "seconds")
START_S, FINISH_S = 60, 120  # that W&B's server is waited for; what it has not taken by then stays on the disk for `wandb sync`
Say = Callable[[str], None]


class Tracker:
    """One of Accelerate's trackers, held so that no fault of it reaches the run: after its first fault it is left alone."""

    def __init__(self, tracker: GeneralTracker, say: Say) -> None:
        self.tracker: GeneralTracker | None = tracker
        self.name, self.say = tracker.name, say

    def log(self, kind: str, clocks: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """One row: every value over steps (W&B: over tokens), and every loss over tokens, FLOPs and seconds."""
        named = {f"{kind}/{key}": value for key, value in values.items() if value is not None}
        losses = {key: value for key, value in values.items() if key.endswith("loss") and value is not None}
        known = ("step",) if self.name == "trackio" else ()  # which it keeps itself
        row = {**{key: clocks[key] for key in CLOCKS if key not in known}, **named}
        if self.name == "tensorboard":  # its only x-axis is a whole number: curves over other clocks are written at their time
            self._guard("log", row, step=clocks["step"])
            for axis, place in (("tokens", clocks["tokens"]), ("gigaflops", clocks["flops"] / 1e9), ("seconds", clocks["seconds"])):
                self._guard("log", {f"{kind}_by_{axis}/{key}": value for key, value in losses.items()}, step=round(place))
        else:
            over = {f"{kind}_by_{axis}/{key}": value for axis in ("flops", "seconds") for key, value in losses.items()}
            self._guard("log", {**row, **over}, step=clocks["step"])

    def text(self, name: str, text: str, clocks: Mapping[str, Any]) -> None:
        self._guard("log", {name: text}, step=clocks["step"])

    def picture(self, name: str, path: Path) -> None:
        """A picture at step 0, where the tracker shows pictures."""
        if hasattr(self.tracker, "log_images"):
            from matplotlib.image import imread

            shape = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
            self._guard("log_images", {name: imread(path)[None, ..., :3]}, step=0, **shape)

    def finish(self) -> None:
        self._guard("finish")

    def _guard(self, method: str, *arguments: Any, **options: Any) -> None:
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, method)(*arguments, **options)
        except Exception as error:
            self.tracker = None
            self.say(f"tracker {self.name} stopped ({type(error).__name__}: {error}); training goes on, {METRICS} is complete")


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed, before anything is trained.

    Raises:
        UserError: naming each of them and the command that installs it.
    """
    missing = [name for name in names if find_spec(name) is None]
    UserError.collect(f"logger={name}: not installed; pip install -e '.[{name}]', or choose logger=none" for name in missing)


def open_trackers(folder: Path, settings: Settings, run: Mapping[str, Any], say: Say) -> list[Tracker]:
    """The trackers that can be started, shown how the run began; the others are told and left out."""
    opened = []
    for name in settings.logger.trackers:
        try:
            opened.append(Tracker(OPENERS[name](folder, settings, run, say), say))
        except Exception as error:
            say(f"tracker {name} does not start ({type(error).__name__}: {error}); training goes on without it")
    if (folder / PICTURE).is_file():
        for tracker in opened:
            tracker.picture("growth/plan", folder / PICTURE)
    return opened


def _wandb(folder: Path, settings: Settings, run: Mapping[str, Any], say: Say) -> GeneralTracker:
    """W&B: curves grouped by study, over tokens by default, and losses over FLOPs and seconds as well.

    A server that cannot be reached leaves the run offline; one that is lost later is waited for at the end, and not for ever.
    """
    import wandb

    mode = _wandb_mode(settings.logger.mode)
    try:
        tracker = _wandb_in(mode, folder, settings, run)
    except Exception as error:
        if mode != "online":
            raise
        say(f"W&B cannot be reached ({type(error).__name__}: {str(error).splitlines()[0]}); it is written offline, for `wandb sync`")
        wandb.teardown()  # its service would hold the run's name to be in use
        tracker = _wandb_in("offline", folder, settings, run)
    for clock in CLOCKS:
        tracker.run.define_metric(clock, hidden=True)
    for kind in ("train", "eval", "growth"):
        tracker.run.define_metric(f"{kind}/*", step_metric="tokens")
        for axis in ("flops", "seconds"):
            tracker.run.define_metric(f"{kind}_by_{axis}/*", step_metric=axis)
    return tracker


def _wandb_in(mode: str, folder: Path, settings: Settings, run: Mapping[str, Any]) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    tracker: Any = WandBTracker(
        settings.logger.project,
        name=settings.name,
        id=f"{settings.name}-{run['settings_hash'][:8]}",
        resume="allow",
        group=settings.study,
        tags=[settings.growth.name, f"seed {settings.seed}"],
        config=dict(run),
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(console="off", silent=True, init_timeout=START_S, finish_timeout=FINISH_S),
    )
    tracker.start()
    return tracker


def _wandb_mode(asked: str) -> str:
    if asked != "auto":
        return asked
    import wandb

    return os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")


def _tensorboard(folder: Path, settings: Settings, run: Mapping[str, Any], say: Say) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(settings.name, folder / "tensorboard")
    tracker.start()
    return tracker


def _trackio(folder: Path, settings: Settings, run: Mapping[str, Any], say: Say) -> GeneralTracker:
    """Trackio, on this machine unless its own variables name a server: `trackio show` opens it."""
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(settings.logger.project, name=settings.name, group=settings.study, resume="allow", config=dict(run))
    tracker.start()
    return tracker


OPENERS = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio}
