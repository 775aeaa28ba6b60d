"""Changes to the same start: arms that differ in training alone, or in the scale of what is fresh, compared
seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from outgrow.experiments.comparable import OF_ONE_SEED, differing_keys
from outgrow.experiments.cost import VERDICTS, half_interval, verdict
from outgrow.experiments.runs import Run
from outgrow.train.settings import identity

# what is done to a start, and the scale of its fresh entries, as the settings name them
COMPARED = ("transfer.", "growth.stages", "growth.options.fresh", "schedule.rewarm")
# an arm is tuned, and called, as it is
NOT_COMPARED = (*OF_ONE_SEED, "growth.name", "transfer.name", "optimizer.learning_rate")


@dataclass(frozen=True)
class Change:
    """One arm against the arm that starts alike and is trained on plainly, each at its best learning rate, at
    equal tokens.
    """

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
    """Compare every arm that has a plain counterpart, in the order of counterparts, then of arms.

    Args:
        best: each arm's runs at its best learning rate.
    """
    arms = sorted(best)
    plain_arms = [arm for arm in arms if is_plain(best[arm][0])]
    measured: list[Change] = []
    for plain in plain_arms:
        for arm in arms:
            plain_run = best[plain][0]
            run = best[arm][0]
            keys = changed_keys(plain_run, run)
            if keys:
                measured.append(_change(arm, plain, keys, best))
    return tuple(measured)


def summary(measured: Sequence[Change]) -> str:
    """The effect of the changes on the final loss, in one sentence for each counterpart."""
    sentences = []
    for plain in sorted({change.plain for change in measured}):
        arms: dict[str, list[str]] = {word: [] for word in VERDICTS}
        for change in measured:
            if change.plain == plain:
                arms[change.verdict].append(change.arm)
        parts = []
        for word, names in arms.items():
            if names:
                listed = ", ".join(names)
                parts.append(f"{word} for {listed}")
        sentences.append(f"Final loss against {plain}, " + "; ".join(parts))
    return ". ".join(sentences)


def is_plain(run: Run) -> bool:
    """Check for a start whose fresh entries are the class's own, trained on as any weights would be."""
    setting = run.record.setting
    transfer = setting("transfer") or {}
    if any(transfer.get(key) for key in ("optimizer", "mup", "teacher")):
        return False
    if transfer.get("inherited_rate", 1.0) != 1.0 or setting("growth.stages"):
        return False
    if setting("growth.options.fresh") not in (None, "init"):
        return False
    return setting("schedule.rewarm") in (None, "full")


def changed_keys(one: Run, other: Run) -> tuple[str, ...]:
    """The settings in which the two differ, if all of them are of those that are compared.

    () where anything else differs too.
    """
    differing = differing_keys(_identity(one), _identity(other))
    keys = tuple(key for key in differing if key not in NOT_COMPARED)
    nothing_else = all(key.startswith(COMPARED) for key in keys)
    return keys if nothing_else else ()


def _identity(run: Run) -> dict[str, Any]:
    """The settings, a teacher and stages as one each: they are one change, however much they say."""
    settings = identity(run.record.settings)
    grouped = ("transfer.teacher", "growth.stages")
    single = [key for key in settings if not key.startswith(grouped)]
    values = {key: settings[key] for key in single}
    return values | {key: run.record.setting(key) or None for key in grouped}


def _change(arm: str, plain: str, keys: tuple[str, ...], best: Mapping[str, Sequence[Run]]) -> Change:
    ours = {run.seed: run.final_loss for run in best[arm]}
    theirs = {run.seed: run.final_loss for run in best[plain]}
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not seeds:
        mean = fmean(ours.values())
        plain_mean = fmean(theirs.values())
        differences = [mean - plain_mean]
    first = best[arm][0]
    plain_first = best[plain][0]
    flops = first.flops / plain_first.flops
    difference = fmean(differences)
    interval = half_interval(differences)
    return Change(arm, plain, keys, seeds, flops, difference, interval)
