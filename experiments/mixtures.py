"""A study of data: the same network trained on different mixtures with equal tokens, judged on held-out text
of every source.

outgrow mixtures tiny_mixture
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from outgrow.experiments.cost import half_interval, verdict
from outgrow.experiments.mixture_figure import Judged, draw
from outgrow.experiments.progress import Display
from outgrow.experiments.runs import RUN_AGAIN
from outgrow.experiments.study import complete, cores, run_jobs
from outgrow.experiments.study_file import Job, folder_of, results_folder
from outgrow.model.base.errors import UserError
from outgrow.model.base.settings import load_yaml, read
from outgrow.train.run.record import RunRecord, read_evaluations

if TYPE_CHECKING:
    from outgrow.train.data import TokenData
    from outgrow.train.settings import Settings

FILE = "mixtures.yaml"


@dataclass(frozen=True)
class Study:
    """The content of `mixtures.yaml`.

    The first arm is the baseline; the first text is the one that the runs are validated on.
    """

    question: str
    runs: tuple[str, ...]  # Hydra overrides of all runs
    arms: dict[str, tuple[str, ...]]  # and of an arm's
    seeds: tuple[int, ...]
    judged_on: tuple[str, ...]  # leaves of conf/data
    eval_tokens: int


def load(name: str) -> Study:
    """The study called `name`.

    Raises UserError for an unknown one, and for every misspelt, missing or mistyped key at once.
    """
    path = folder_of(name, FILE) / FILE
    faults: list[str] = []
    study = read(Study, load_yaml(path), "", faults)
    UserError.collect(f"{path}: {fault}" for fault in faults)
    assert study is not None
    return study


def jobs(study: Study) -> list[Job]:
    """The runs, seed by seed."""
    from outgrow.train.settings import compose

    todo = []
    for seed in study.seeds:
        for arm, changes in study.arms.items():
            names = (f"growth.name={arm}", f"seed={seed}", "changes=''", "progress=false")
            overrides = (*study.runs, *changes, *names)
            settings = compose(list(overrides))
            todo.append(Job(settings.name, arm, overrides, settings))
    return todo


def run(name: str, *, jobs_at_once: int | None = None) -> list[Judged]:
    """Train what is not trained yet, judge it, and write results.json, losses.png and the table of the
    study's README.

    Raises:
        UserError: the study or its settings are at fault.
        RunFailed: a run ended with an error; the same command goes on from there.
    """
    study, display = load(name), Display()
    todo = jobs(study)
    texts = open_texts(study, display)
    missing = [job for job in todo if not complete(job)]
    display.say(f"{len(todo)} runs, {len(todo) - len(missing)} of them complete")
    if missing:
        for settings in {job.arm: job.settings for job in missing}.values():
            read_by(settings)  # builds what is not built, before several processes would wait for it
        run_jobs(
            missing,
            cores() if jobs_at_once is None else jobs_at_once,
            Path("runs") / f"logs-{name}",
            display,
        )
    results = []
    for arm in study.arms:
        own = [job for job in todo if job.arm == arm]
        results.append(judge(arm, own, study, texts, display))
    records = [RunRecord.read(job.folder / "run.json", RUN_AGAIN) for job in todo]
    publish(study, results, records, results_folder(name, True, FILE))
    return results


# ---- judging -----------------------------------------------------------------------------------------------


def open_texts(study: Study, display: Display) -> dict[str, TokenData]:
    """The texts to judge on, cut by the tokenizer of the runs' own."""
    from outgrow.train.corpus import prepare
    from outgrow.train.data.mixture import source_data
    from outgrow.train.data.settings import SourceSettings
    from outgrow.train.settings import compose

    own = compose(list(study.runs)).data
    data = prepare(own)
    texts = {}
    for leaf in study.judged_on:
        display.say(f"text: {leaf}")
        settings = compose([*study.runs, f"data={leaf}"]).data
        other = source_data(SourceSettings(settings), own, data)
        texts[leaf] = data if other is None else prepare(other)
    return texts


def read_by(settings: Settings) -> dict[str, int]:
    """The tokens that a run reads of each source; builds what is not built."""
    from outgrow.train.corpus import prepare
    from outgrow.train.data.mixture import mixed, tokens_read

    budget, context = settings.budget, settings.train.context
    rows, data = budget.steps * budget.rows, prepare(settings.data)
    train = mixed(settings.mixture, settings.data, data, prepare, context=context, rows=rows).train
    return tokens_read(train, settings.data.name, rows, context)


def judge(
    arm: str,
    done: Sequence[Job],
    study: Study,
    texts: dict[str, TokenData],
    display: Display,
) -> Judged:
    """The losses of an arm's final models."""
    losses: dict[str, tuple[float, ...]] = {}
    bits: dict[str, tuple[float, ...]] = {}
    for name, data in texts.items():
        results = [evaluation(job.folder / "final", job.settings, data, study.eval_tokens) for job in done]
        losses[name] = tuple(result.val_loss for result in results)
        bits[name] = tuple(result.bits_per_byte for result in results)
    means = [f"{name} {fmean(values):.3f}" for name, values in losses.items()]
    display.say(f"{arm}: " + ", ".join(means))
    curves = []
    for job in done:
        evaluations = read_evaluations(job.folder / "metrics.jsonl", RUN_AGAIN)
        curves.append(tuple((evaluation.tokens, evaluation.val_loss) for evaluation in evaluations))
    return Judged(arm, read_by(done[0].settings), tuple(curves), losses, bits)


def evaluation(final: Path, settings: Settings, data: TokenData, tokens: int) -> Any:
    """A final model's `train.evaluate.Evaluation` on the validation part of `data`."""
    from accelerate import Accelerator
    from transformers.utils import logging

    from outgrow.model.build import load_model
    from outgrow.train.data.batches import validation_batches
    from outgrow.train.evaluate import evaluate
    from outgrow.train.loss import NextTokenLoss

    logging.disable_progress_bar()
    windows = list(validation_batches(data.validation, context=settings.train.context, tokens=tokens))
    return evaluate(
        NextTokenLoss(load_model(final), fused=False),
        windows,
        Accelerator(cpu=True),
        data.validation.bytes_per_token,
    )


# ---- publishing --------------------------------------------------------------------------------------------


def publish(study: Study, arms: Sequence[Judged], records: Sequence[RunRecord], folder: Path) -> None:
    """Write results.json and losses.png, and the table into README.md."""
    from outgrow.experiments.table import insert_table

    machine = sorted({f"{record.device}, threads {record.threads}, {record.precision}" for record in records})
    results = {
        "question": study.question,
        "seeds": study.seeds,
        "arms": list(map(asdict, arms)),
        "machine": machine,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(arms, folder / "losses.png")
    if (folder / "README.md").is_file():
        insert_table(folder / "README.md", markdown(study, arms, machine))


def change(judged: Judged, baseline: Judged, text: str) -> tuple[float, float | None]:
    """The change of an arm in the loss on `text`, seed by seed against the baseline: (mean, half its 95 %
    interval).
    """
    pairs = zip(judged.losses[text], baseline.losses[text], strict=True)
    differences = [own - other for own, other in pairs]
    return fmean(differences), half_interval(differences)


def markdown(study: Study, arms: Sequence[Judged], machine: Sequence[str]) -> str:
    """The answer, the table, and the method in a sentence."""
    baseline, texts = arms[0], study.judged_on
    lines = [f"Against `{baseline.arm}`, at equal tokens:", ""]
    for judged in arms[1:]:
        parts = []
        for text in texts:
            difference, interval = change(judged, baseline, text)
            measured = f"{_signed(difference)}{_plus_minus(interval)}"
            parts.append(f"{text} {measured} ({verdict(difference, interval)})")
        lines.append(f"- `{judged.arm}`: " + ", ".join(parts))
    lines += [
        "",
        "| arm | tokens read | " + " | ".join(f"{text}: loss (95 %), change" for text in texts) + " |",
    ]
    lines.append("| --- " * (len(texts) + 2) + "|")
    for judged in arms:
        counts = [f"{name} {count:,}" for name, count in judged.tokens.items()]
        cells = [judged.arm, ", ".join(counts)]
        for text in texts:
            values = judged.losses[text]
            own = f"{fmean(values):.3f}{_plus_minus(half_interval(values))}"
            difference, _ = change(judged, baseline, text)
            cells.append(own if judged is baseline else f"{own}, {_signed(difference)}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        (
            f"Losses in nats/token on held-out documents, {study.eval_tokens:,} tokens of each text; "
            f"{len(study.seeds)} seeds; 95 %, Student's t over seeds, those of changes over pairs of one "
            f"seed, not corrected for the {(len(arms) - 1) * len(texts)} changes that are looked at. "
            f"Machine: {'; '.join(machine)}."
        ),
    ]
    return "\n".join(lines)


def _signed(difference: float) -> str:
    return f"{difference:+.3f}".replace("-", "−")


def _plus_minus(interval: float | None) -> str:
    return "" if interval is None else f" ± {interval:.3f}"
