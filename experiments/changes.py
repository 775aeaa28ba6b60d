"""What one change in training made of the same start: arms that differ in nothing else, held against each other seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from outgrow.experiments.comparable import OF_ONE_SEED, differing_keys
from outgrow.experiments.cost import VERDICTS, half_interval, verdict
from outgrow.experiments.runs import Run, setting
from outgrow.train.settings import identity

IN_TRAINING = ("transfer.", "growth.stages", "schedule.rewarm")  # what is done to a start, as the settings name it
NOT_COMPARED = (*OF_ONE_SEED, "growth.name", "transfer.name", "optimizer.learning_rate")  # an arm is tuned, and called, as it is


@dataclass(frozen=True)
class Change:
    """One arm against the arm that starts alike and is trained on plainly, each at its best learning rate, at equal tokens."""

    arm: str
    plain: str
    settings: tuple[str, ...]  # in which the two differ
    seeds: tuple[int, ...]  # that both were run with
    flops: float  # of the arm's training, as a multiple of the plain arm's
    difference: float  # of the final losses, arm − plain, the mean over the seeds; nats
    interval: float | None  # half of the 95 % interval of that mean

    @property
    def verdict(self) -> str:
        return verdict(self.difference, self.interval)


def changes(best: Mapping[str, Sequence[Run]]) -> tuple[Change, ...]:
    """Every arm that has a plain counterpart, by the name of the counterpart, then by its own.

    Args:
        best: each arm's runs at its best learning rate.
    """
    pairs = [(plain, arm) for plain in best if is_plain(best[plain][0]) for arm in best]
    found = [(plain, arm, changed_in_training(best[plain][0], best[arm][0])) for plain, arm in sorted(pairs)]
    return tuple(_change(arm, plain, keys, best) for plain, arm, keys in found if keys)


def summary(found: Sequence[Change]) -> str:
    """What the changes did to the final loss, in one sentence for each counterpart."""
    sentences = []
    for plain in sorted({change.plain for change in found}):
        told = {word: [change.arm for change in found if (change.plain, change.verdict) == (plain, word)] for word in VERDICTS}
        said = [f"{word} for {', '.join(arms)}" for word, arms in told.items() if arms]
        sentences.append(f"against {plain}, " + "; ".join(said))
    return ". ".join(f"Final loss {sentence}" for sentence in sentences)


def is_plain(run: Run) -> bool:
    """Whether the run's start was trained on as any weights would be."""
    transfer = setting(run.record, "transfer") or {}
    more = transfer.get("optimizer") or transfer.get("mup") or transfer.get("teacher") or transfer.get("inherited_rate", 1.0) != 1.0
    return not more and not setting(run.record, "growth.stages") and setting(run.record, "schedule.rewarm") in (None, "full")


def changed_in_training(one: Run, other: Run) -> tuple[str, ...]:
    """The settings in which the two differ, if all of them are of training; () where anything else differs too."""
    sides = [{key: value for key, value in _identity(run).items() if key not in NOT_COMPARED} for run in (one, other)]
    keys = differing_keys(*sides)
    return tuple(keys) if all(key.startswith(IN_TRAINING) for key in keys) else ()


def _identity(run: Run) -> dict[str, Any]:
    """The settings, a teacher and stages as one each: they are one change, however much they say."""
    settings = identity(run.record["settings"])
    whole = {key: setting(run.record, key) or None for key in ("transfer.teacher", "growth.stages")}
    return {key: value for key, value in settings.items() if not key.startswith(tuple(whole))} | whole


def _change(arm: str, plain: str, keys: tuple[str, ...], best: Mapping[str, Sequence[Run]]) -> Change:
    ours, theirs = ({run.seed: run.curve.losses[-1] for run in best[name]} for name in (arm, plain))
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    differences = [ours[seed] - theirs[seed] for seed in seeds] or [fmean(ours.values()) - fmean(theirs.values())]
    flops = best[arm][0].curve.flops[-1] / best[plain][0].curve.flops[-1]
    return Change(arm, plain, keys, seeds, flops, fmean(differences), half_interval(differences))
