"""A study of data: the same network trained on different mixtures with equal tokens, judged on held-out text of every source.

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
from outgrow.experiments.runs import read_evaluations
from outgrow.experiments.study import complete, cores, run_jobs
from outgrow.experiments.study_file import Job, folder_of, results_folder
from outgrow.model.base.errors import UserError
from outgrow.model.base.settings import load_yaml, read

if TYPE_CHECKING:
    from outgrow.train.data import TokenData
    from outgrow.train.settings import Settings

FILE = "mixtures.yaml"


@dataclass(frozen=True)
class Study:
    """What `mixtures.yaml` says. The first arm is the baseline; the first text is the one that the runs are validated on."""

    question: str
    runs: tuple[str, ...]  # Hydra overrides of all runs
    arms: dict[str, tuple[str, ...]]  # and of an arm's
    seeds: tuple[int, ...]
    judged_on: tuple[str, ...]  # leaves of conf/data
    eval_tokens: int


def load(name: str) -> Study:
    """The study called `name`. Raises UserError for an unknown one, and for every misspelt, missing or mistyped key at once."""
    path = folder_of(name, FILE) / FILE
    faults: list[str] = []
    study = read(Study, load_yaml(path), "", faults)
    UserError.collect(f"{path}: {fault}" for fault in faults)
    assert study is not None
    return study


def jobs(study: Study) -> list[Job]:
    """Every run, seed by seed."""
    from outgrow.train.settings import compose

    found = []
    for seed in study.seeds:
        for arm, overrides in study.arms.items():
            given = (*study.runs, *overrides, f"growth.name={arm}", f"seed={seed}", "changes=''", "progress=false")
            settings = compose(list(given))
            found.append(Job(settings.name, arm, given, settings))
    return found


def run(name: str, *, jobs_at_once: int | None = None) -> list[Judged]:
    """Train what is not trained yet, judge it, and write results.json, losses.png and the table of the study's README.

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
        run_jobs(missing, cores() if jobs_at_once is None else jobs_at_once, Path("runs") / f"logs-{name}", display)
    found = [judge(arm, [job for job in todo if job.arm == arm], study, texts, display) for arm in study.arms]
    publish(study, found, [json.loads((job.folder / "run.json").read_text()) for job in todo], results_folder(name, True, FILE))
    return found


# ---- judging --------------------------------------------------------------------------------------------------------------------------


def open_texts(study: Study, display: Display) -> dict[str, TokenData]:
    """The texts to judge on, cut by the tokenizer of the runs' own."""
    from outgrow.train.corpus import prepare
    from outgrow.train.data.mixture import source_data
    from outgrow.train.data.settings import SourceSettings
    from outgrow.train.settings import compose

    own = compose(list(study.runs)).data
    data = prepare(own)
    found = {}
    for leaf in study.judged_on:
        display.say(f"text: {leaf}")
        wanted = source_data(SourceSettings(compose([*study.runs, f"data={leaf}"]).data), own, data)
        found[leaf] = data if wanted is None else prepare(wanted)
    return found


def read_by(settings: Settings) -> dict[str, int]:
    """How many tokens a run reads of each source; builds what is not built."""
    from outgrow.train.corpus import prepare
    from outgrow.train.data.mixture import mixed, tokens_read
    from outgrow.train.settings import Budget

    budget, context = Budget.of(settings.train), settings.train.context
    rows, data = budget.steps * budget.rows, prepare(settings.data)
    train = mixed(settings.mixture, settings.data, data, context=context, rows=rows, progress=True).train
    return tokens_read(train, settings.data.name, rows, context)


def judge(arm: str, done: Sequence[Job], study: Study, texts: dict[str, TokenData], display: Display) -> Judged:
    """The losses of an arm's final models."""
    results = [[evaluation(job.folder / "final", job.settings, data, study.eval_tokens) for job in done] for data in texts.values()]
    display.say(f"{arm}: " + ", ".join(f"{name} {fmean(r.val_loss for r in row):.3f}" for name, row in zip(texts, results, strict=True)))
    curves = (read_evaluations(job.folder / "metrics.jsonl") for job in done)
    return Judged(
        arm,
        read_by(done[0].settings),
        tuple(tuple((entry["tokens"], entry["val_loss"]) for entry in curve) for curve in curves),
        {name: tuple(r.val_loss for r in row) for name, row in zip(texts, results, strict=True)},
        {name: tuple(r.bits_per_byte for r in row) for name, row in zip(texts, results, strict=True)},
    )


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
    return evaluate(NextTokenLoss(load_model(final), fused=False), windows, Accelerator(cpu=True), data.validation.bytes_per_token)


# ---- publishing -----------------------------------------------------------------------------------------------------------------------


def publish(study: Study, found: Sequence[Judged], records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write results.json and losses.png, and the table into README.md."""
    from outgrow.experiments.table import insert_table

    machine = sorted({f"{r['device']}, threads {r['threads']}, {r['precision']}" for r in records})
    results = {"question": study.question, "seeds": study.seeds, "arms": [asdict(judged) for judged in found], "machine": machine}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(found, folder / "losses.png")
    if (folder / "README.md").is_file():
        insert_table(folder / "README.md", markdown(study, found, machine))


def change(judged: Judged, baseline: Judged, text: str) -> tuple[float, float | None]:
    """What an arm changed in the loss on `text`, seed by seed against the baseline: (mean, half of the 95 % interval)."""
    pairs = [a - b for a, b in zip(judged.losses[text], baseline.losses[text], strict=True)]
    return fmean(pairs), half_interval(pairs)


def markdown(study: Study, found: Sequence[Judged], machine: Sequence[str]) -> str:
    """The answer, the table, and what a reader should know."""
    baseline, texts = found[0], study.judged_on
    lines = [f"Against `{baseline.arm}`, at equal tokens:", ""]
    for judged in found[1:]:
        said = []
        for text in texts:
            difference, interval = change(judged, baseline, text)
            said.append(f"{text} {_signed(difference)}{_plus_minus(interval)} ({verdict(difference, interval)})")
        lines.append(f"- `{judged.arm}`: " + ", ".join(said))
    lines += ["", "| arm | tokens read | " + " | ".join(f"{text}: loss (95 %), change" for text in texts) + " |"]
    lines.append("| --- " * (len(texts) + 2) + "|")
    for judged in found:
        cells = [judged.arm, ", ".join(f"{name} {count:,}" for name, count in judged.tokens.items())]
        for text in texts:
            values = judged.losses[text]
            own = f"{fmean(values):.3f}{_plus_minus(half_interval(values))}"
            cells.append(own if judged is baseline else f"{own}, {_signed(change(judged, baseline, text)[0])}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Losses in nats/token on held-out documents, {study.eval_tokens:,} tokens of each text; {len(study.seeds)} seeds; 95 %, "
        "Student's t over seeds, those of changes over pairs of one seed, not corrected for the "
        f"{(len(found) - 1) * len(texts)} changes that are looked at. Machine: {'; '.join(machine)}.",
    ]
    return "\n".join(lines)


def _signed(difference: float) -> str:
    return f"{difference:+.3f}".replace("-", "−")


def _plus_minus(interval: float | None) -> str:
    return "" if interval is None else f" ± {interval:.3f}"
