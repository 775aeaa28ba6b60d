"""The trackers that mirror metrics.jsonl, W&B, TensorBoard and Trackio through Accelerate, each kept where it
can do the run no harm.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.keys import without
from outgrow.train.run import weights_and_biases
from outgrow.train.run.folder import METRICS, PICTURE, SAMPLES
from outgrow.train.run.weights_and_biases import CLOCKS, Say

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from outgrow.train.run.record import RunRecord
    from outgrow.train.settings import Settings


class Tracker:
    """One of Accelerate's trackers, held so that no fault of it reaches the run: after its first fault it is
    left alone.
    """

    def __init__(self, tracker: GeneralTracker, say: Say) -> None:
        self.tracker: GeneralTracker | None = tracker
        self.name = tracker.name
        self.say = say
        self.begun = 0  # the first step that it does not hold already

    def log(self, kind: str, clocks: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """One row: every value over steps (W&B: over tokens), and every loss over tokens, FLOPs and
        seconds."""
        if clocks["step"] < self.begun:
            return
        step = clocks["step"]
        numbers = {key: value for key, value in values.items() if value is not None}
        losses = {key: value for key, value in numbers.items() if key.endswith("loss")}
        row = {key: clocks[key] for key in CLOCKS}
        if self.name == "trackio":  # which keeps it itself
            del row["step"]
        row |= _under(kind, numbers)
        # its only x-axis is a whole number: curves over other clocks are written at their time
        if self.name == "tensorboard":
            self._guard(partial(_log, row, step))
            axes = {
                "tokens": clocks["tokens"],
                "gigaflops": clocks["flops"] / 1e9,
                "seconds": clocks["seconds"],
            }
            for axis, position in axes.items():
                curves = _under(f"{kind}_by_{axis}", losses)
                self._guard(partial(_log, curves, round(position)))
        else:
            for axis in ("flops", "seconds"):
                row |= _under(f"{kind}_by_{axis}", losses)
            self._guard(partial(_log, row, step))

    def samples(self, when: str, samples: Iterable[Mapping[str, str]], clocks: Mapping[str, Any]) -> None:
        """Log samples, as a table where the tracker has tables, else as text."""
        pairs = [[sample["prompt"], sample["text"]] for sample in samples]
        step = clocks["step"]
        if step < self.begun:
            return
        label = f"samples/{when}"

        def log(tracker: Any) -> None:
            if self.name == "wandb":
                tracker.log_table(label, columns=["prompt", "text"], data=pairs, step=step)
            else:
                parts = [f"**{prompt}**{text}" for prompt, text in pairs]
                tracker.log({label: "\n\n".join(parts)}, step=step)

        self._guard(log)

    def picture(self, name: str, path: Path) -> None:
        """A picture at step 0, where the tracker shows pictures."""

        def log(tracker: Any) -> None:
            from matplotlib.image import imread

            shape = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
            image = imread(path)[None, ..., :3]
            tracker.log_images({name: image}, step=0, **shape)

        if hasattr(self.tracker, "log_images"):
            self._guard(log)

    def finish(self, status: int) -> None:
        """End the record of a run that ends with this status."""

        def end(tracker: Any) -> None:
            if self.name == "wandb":
                weights_and_biases.end(tracker.run, status)
            else:
                tracker.finish()

        self._guard(end)

    def _guard(self, act: Callable[[Any], None]) -> None:
        if self.tracker is None:
            return
        try:
            act(self.tracker)
        except Exception as error:
            self.tracker = None
            reason = in_one_line(error)
            self.say(f"tracker {self.name} stopped ({reason}); training goes on, {METRICS} is complete")


def _log(values: Mapping[str, Any], step: int, tracker: Any) -> None:
    tracker.log(values, step=step)


def _under(label: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with `label` before their names."""
    return {f"{label}/{key}": value for key, value in values.items()}


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed, before anything is trained.

    Raises:
        UserError: naming each of them and the command that installs it.
    """
    missing = [name for name in names if not installed(name)]
    extras = {"wandb": "train"}  # which comes with all that training needs
    UserError.collect(
        f"logger={name}: not installed; pip install -e '.[{extras.get(name, name)}]', or choose logger=none"
        for name in missing
    )


def installed(name: str) -> bool:
    """Check for a package of that name; a folder so called, as W&B leaves one where it runs, is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def open_trackers(folder: Path, settings: Settings, run: RunRecord, say: Say) -> list[Tracker]:
    """The trackers that can be started, shown how the run began; the others are told and left out."""
    opened = []
    for name in settings.logger.trackers:
        try:
            started = OPENERS[name](folder, settings, run, say)
            opened.append(Tracker(started, say))
        except Exception as error:
            say(
                f"tracker {name} does not start ({in_one_line(error)}); training goes on without it",
            )
    metrics = folder / METRICS
    picture = folder / PICTURE
    text = metrics.read_text() if metrics.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    for tracker in opened:
        begins = not rows
        if tracker.name == "wandb":
            begins = not getattr(tracker.tracker, "run").resumed  # noqa: B009
        if begins and picture.is_file():
            tracker.picture("growth/plan", picture)
        if tracker.name == "wandb":
            _catch_up(tracker, folder, rows)
    return opened


def _catch_up(tracker: Tracker, folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Make one record of a run that is started again: go on after what the server holds, else write all so
    far into this record.

    A record is made of metrics.jsonl, so an earlier one on this disk that nobody has uploaded says nothing
    more, and is removed.
    """
    run: Any = getattr(tracker.tracker, "run")  # noqa: B009
    if run.resumed:
        tracker.begun = run.step
        return
    for when, written in _samples(folder).items():
        tracker.samples(when, written["samples"], written)
    for row in rows:
        clocks = {key: row[key] for key in CLOCKS}
        values = without(row, CLOCKS)
        tracker.log(values.pop("kind"), clocks, values)
    own = Path(run.dir).parent
    for earlier in own.parent.glob(f"offline-run-*-{run.id}"):
        if earlier != own and not list(earlier.glob("*.synced")):
            shutil.rmtree(earlier, ignore_errors=True)


def _samples(folder: Path) -> dict[str, Any]:
    """The samples of the run's start, if it has written any and they can be read."""
    try:
        start = json.loads((folder / SAMPLES).read_text())["start"]
        pairs = [{key: str(sample[key]) for key in ("prompt", "text")} for sample in start["samples"]]
        return {"start": {"step": int(start["step"]), "samples": pairs}}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _tensorboard(folder: Path, settings: Settings, run: RunRecord, say: Say) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(settings.name, folder / "tensorboard")
    tracker.start()
    return tracker


def _trackio(folder: Path, settings: Settings, run: RunRecord, say: Say) -> GeneralTracker:
    """Trackio, on this machine unless its own variables name a server: `trackio show` opens it."""
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(
        settings.logger.project,
        name=settings.name,
        group=settings.study,
        resume="allow",
        config=run.to_json(),
    )
    tracker.start()
    return tracker


OPENERS = {"wandb": weights_and_biases.start, "tensorboard": _tensorboard, "trackio": _trackio}
