"""A study of the project at toy size: its own definition with short budgets, on a small text."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from outgrow.experiments.study_file import DEFINITION, HERE
from outgrow.train.compose import compose

BATCH = 128  # tokens
SHORTEST = 8  # steps of the shortest horizon
COUNTS = re.compile(r"\b(schedule\.horizons=|until_tokens:|budget_tokens=|warmup_tokens=)([\d,\[\]]+)")
BATCHES = re.compile(r"\b(train\.batch_tokens=)(\d+)")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "under", "that", "old", "tree")


def toy_study(
    name: str,
    folder: Path,
    more: Mapping[str, Sequence[str]],
    sizes: Sequence[str] = (),
    arms: Sequence[str] = (),
) -> None:
    """Write `experiments/NAME/study.yaml` and its text into `folder`, where the study is to be run from.

    Args:
        more: overrides of single arms, such as fewer steps of a learned operator.
        sizes: overrides of the source and all arms.
        arms: those that are trained; none: all of the study's demo.
    """
    definition = yaml.safe_load((HERE / name / DEFINITION).read_text())
    settings = compose([*definition["runs"], "growth=scratch"])
    batch = settings.train.batch_tokens
    step = settings.schedule.horizons[0] // SHORTEST  # tokens that become one step

    def shortened(overrides: Sequence[str]) -> list[str]:
        short = [COUNTS.sub(lambda match: match[1] + _counts(match[2], step), text) for text in overrides]
        return [
            BATCHES.sub(lambda match: match[1] + str(int(match[2]) * BATCH // batch), text) for text in short
        ]

    toy = [
        *("data=files", f"data.path={_write_text(folder)}", "data.folder=data/packages"),
        *("data.vocab_size=280", "data.validation_fraction=0.2", "train.context=16"),
        *(f"train.batch_tokens={BATCH}", "train.eval_tokens=320", f"train.log_every_tokens={BATCH}"),
        *("logger=none", *sizes),
    ]
    for key in ("source", "runs"):
        if isinstance(definition[key], list) and definition[key]:
            own = _experiments_own(definition[key])
            definition[key] = [*shortened(own), *shortened(definition[key]), *toy]
    for source, overrides in definition.get("sources", {}).items():
        own = _experiments_own(overrides)
        definition["sources"][source] = [*shortened(own), *shortened(overrides), *toy]
    for extent in ("demo", "full"):
        overrides = definition[extent].get("overrides", [])
        definition[extent]["overrides"] = shortened(overrides)
    if arms:
        definition["demo"]["arms"] = list(arms)
    for arm, values in definition["arms"].items():
        values["overrides"] = [*shortened(values.get("overrides", [])), *more.get(arm, ())]
    place = folder / "experiments" / name
    place.mkdir(parents=True)
    text = yaml.safe_dump(definition, sort_keys=False)
    (place / DEFINITION).write_text(text)


def _write_text(folder: Path) -> Path:
    """Some sentences."""
    texts = folder / "text"
    texts.mkdir()
    draw = random.Random(0)
    for number in range(200):
        words = draw.choices(WORDS, k=120)
        (texts / f"{number}.txt").write_text(" ".join(words))
    return texts


def _experiments_own(overrides: Sequence[str]) -> list[str]:
    """The name that an experiment's run has without toy sizes, and its counts of tokens, as overrides."""
    starts = any(override.startswith("growth=") for override in overrides)
    settings = compose([*overrides] if starts else [*overrides, "growth=scratch"])
    own = ["changes=''", f"name={settings.name}", f"train.budget_tokens={settings.train.budget_tokens}"]
    if horizons := ",".join(map(str, settings.schedule.horizons)):
        own.append(f"schedule.horizons=[{horizons}]")
    if (warmup := settings.schedule.warmup_tokens) is not None:
        own.append(f"schedule.warmup_tokens={warmup}")
    return own


def _counts(text: str, step: int) -> str:
    """Counts of tokens, each as many toy steps as it had steps of `step` tokens, at least one."""
    return re.sub(r"\d+", lambda match: str(max(1, round(int(match[0]) / step)) * BATCH), text)
