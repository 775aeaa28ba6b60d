"""Judge a study's runs on other texts: the validation loss of every final model on each text of `judged_on`.

So arms that read different mixtures are compared at equal tokens, on held-out text of every source. An arm is
judged at its best learning rate, over the seeds that all arms were run with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from outgrow.experiments.compare import best_learning_rates, by_rate, machine
from outgrow.experiments.cost import half_interval
from outgrow.experiments.runs import Run, read_runs
from outgrow.model.base.errors import UserError
from outgrow.train.run.folder import FINAL

if TYPE_CHECKING:
    from outgrow.experiments.study_file import Job
    from outgrow.train.data import TokenData
    from outgrow.train.data.settings import DataSettings
    from outgrow.train.run.record import Evaluation


@dataclass(frozen=True)
class Judged:
    """One arm: per seed its curve on the text it was validated on, and its final loss on each text, in
    nats/token.
    """

    arm: str
    tokens: dict[str, int]  # read of each source
    curves: tuple[tuple[tuple[float, float], ...], ...]  # per seed (tokens, loss)
    losses: dict[str, tuple[float, ...]]  # text → one for each seed
    bits_per_byte: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Judgement:
    """All arms, the first of which is what the others are held against."""

    arms: tuple[Judged, ...]
    seeds: tuple[int, ...]
    eval_tokens: int  # of each text
    machine: str

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.arms[0].losses)

    def change(self, judged: Judged, text: str) -> tuple[float, float | None]:
        """The change of an arm in the loss on `text`, seed by seed against the first arm: (mean, half its
        95 % interval).
        """
        baseline = self.arms[0].losses[text]
        pairs = zip(judged.losses[text], baseline, strict=True)
        differences = [own - other for own, other in pairs]
        return fmean(differences), half_interval(differences)


def check_held_out(leaves: Sequence[str], todo: Sequence[Job]) -> None:
    """Refuse to judge on text that one of the runs `todo` may be trained on: its own, or a source of its
    mixture.

    Raises:
        UserError: every such text, with the arm and the setting that tells.
    """
    from outgrow.train.data.settings import held_out_faults

    faults: list[str] = []
    for leaf in leaves:
        judged = _judged(leaf, todo[0])
        for job in todo:
            for key, trained in _trained_on(job).items():
                own = held_out_faults(trained, judged)
                faults += [f"judged_on: {leaf}: arm {job.arm}, {key}.{fault}" for fault in own]
    UserError.collect(dict.fromkeys(faults))


def _judged(leaf: str, job: Job) -> DataSettings:
    """The text of a leaf of conf/data, or of the user's, under the overrides of `job`."""
    from outgrow.train.compose import compose

    return compose([*job.overrides, f"data={leaf}"], job.own).data


def _trained_on(job: Job) -> dict[str, DataSettings]:
    """Key → text that a run is trained on; that of `data` is held out only, where there is a mixture."""
    mixture = job.settings.mixture
    if mixture is None:
        return {"data": job.settings.data}
    return {f"mixture.sources.{name}.data": source.data for name, source in mixture.sources.items()}


def open_texts(leaves: Sequence[str], job: Job, own: DataSettings) -> dict[str, TokenData]:
    """The texts of these leaves of conf/data, cut by the tokenizer of the text `own` that `job` reads."""
    from outgrow.train.corpus import prepare
    from outgrow.train.data.mixture import source_data
    from outgrow.train.data.settings import SourceSettings

    data = prepare(own)
    texts = {}
    for leaf in leaves:
        settings = _judged(leaf, job)
        other = source_data(SourceSettings(settings), own, data)
        texts[leaf] = data if other is None else prepare(other)
    return texts


def judge(folders: Iterable[Path], texts: Mapping[str, TokenData]) -> Judgement:
    """Judge complete runs on `texts`. The arms stay in the order of their first folders.

    Raises:
        UserError: a run is damaged, or there is no seed that all arms have.
    """
    runs, _ = read_runs(folders)
    groups = by_rate(runs)
    best = best_learning_rates(groups)
    names = dict.fromkeys(run.arm for run in runs)
    arms = {arm: groups[arm, best[arm]] for arm in names}
    seeds_of_arms = [{run.seed for run in own} for own in arms.values()]
    shared = set.intersection(*seeds_of_arms)
    if not shared:
        raise UserError(f"arms {', '.join(arms)}: no seed that all of them were run with")
    judged = []
    for arm, own in arms.items():
        of_shared = [run for run in own if run.seed in shared]
        judged.append(_judge(arm, of_shared, texts))
    eval_tokens = _eval_tokens(runs[0])
    seeds = tuple(sorted(shared))
    return Judgement(tuple(judged), seeds, eval_tokens, machine(runs))


def _judge(arm: str, runs: Sequence[Run], texts: Mapping[str, TokenData]) -> Judged:
    losses: dict[str, tuple[float, ...]] = {}
    bits: dict[str, tuple[float, ...]] = {}
    for name, data in texts.items():
        results = [evaluation(run, data) for run in runs]
        losses[name] = tuple(result.val_loss for result in results)
        bits[name] = tuple(result.bits_per_byte for result in results)
    curves = []
    for run in runs:
        curve = run.curve
        points = zip(curve.tokens, curve.losses, strict=True)
        curves.append(tuple(points))
    tokens = runs[0].record.data.tokens_read
    return Judged(arm, tokens, tuple(curves), losses, bits)


def evaluation(run: Run, data: TokenData) -> Evaluation:
    """The final model's loss on the validation part of `data`, over as many tokens as the run was validated
    on.
    """
    from accelerate import Accelerator
    from transformers.utils import logging

    from outgrow.model.build import load_model
    from outgrow.train.data.batches import validation_batches
    from outgrow.train.evaluate import evaluate
    from outgrow.train.loss import NextTokenLoss

    logging.disable_progress_bar()
    context = int(run.number("train.context"))
    split = data.validation
    tokens = _eval_tokens(run)
    windows = list(validation_batches(split, context=context, tokens=tokens))
    network = load_model(run.folder / FINAL)
    model = NextTokenLoss(network, fused=False)
    return evaluate(model, windows, Accelerator(cpu=True), split.bytes_per_token)


def _eval_tokens(run: Run) -> int:
    return int(run.number("train.eval_tokens"))
