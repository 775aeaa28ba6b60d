"""Measure a suite on runs and checkpoints, task by task: each score is a file of its own, and is not measured
again."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from outgrow.experiments.runs import resolved
from outgrow.model.base.compose import CONF, compose_config
from outgrow.model.base.errors import UserError, reading
from outgrow.model.base.files import read_object, write_json
from outgrow.model.base.settings import settings_of
from outgrow.model.gguf import gguf_in
from outgrow.model.locate import locate
from outgrow.train.run.folder import FINAL, RUN
from outgrow.train.suite.suite import BenchmarkTask, Suite, group_averages

HOME = Path("runs/evaluation")  # of scores, where no folder is named
OWN_ITEMS = re.compile(r"\bbenchmark_items: *true\b")  # in the metadata of a task file


@dataclass(frozen=True)
class EvaluateSettings:
    """conf/evaluate.yaml."""

    suite: Suite
    tasks: str | None
    only: tuple[str, ...] | None
    limit: int | None
    batch: int
    run_code: bool
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    out: str | None


@dataclass(frozen=True)
class Evaluated:
    """The scores of one checkpoint, of 1; those of `local` are on items of local task files that are not said
    to be the benchmark's own."""

    name: str
    folder: Path
    scores: dict[str, float]
    groups: dict[str, float | None]
    limit: int | None
    local: tuple[str, ...] = ()


def settings_from(overrides: Sequence[str], own: Path | None = None) -> EvaluateSettings:
    """The settings under overrides such as `suite=phi_2`.

    Raises:
        UserError: with every fault of them.
    """
    cfg, faults = compose_config(CONF, "evaluate", list(overrides), own)
    return settings_of(EvaluateSettings, cfg, faults, _disagreements)


def _disagreements(settings: EvaluateSettings) -> Iterator[str]:
    """Yield the faults between well-typed values."""
    batch = settings.batch
    limit = settings.limit
    if batch <= 0 or (limit is not None and limit <= 0):
        yield f"batch, limit: must be positive; found {batch}, {limit}"


def evaluate(
    runs: Sequence[str], settings: EvaluateSettings, say: Callable[[str], None] = print
) -> list[Evaluated]:
    """Every run's scores on the suite; those that lie in `settings.out`, or HOME, are read.

    Raises:
        UserError: a run has no checkpoint or no tokenizer, or a task cannot be measured; scores that were
        made until then are kept.
    """
    suite = settings.suite.of(settings.only)
    folders = [checkpoint_of(Path(run)) for run in runs]
    out = HOME if settings.out is None else Path(settings.out)
    scores = [Scores(out, folder, settings) for folder in folders]

    def is_missing(task: BenchmarkTask) -> bool:
        return any(scores_of_run.get(task) is None for scores_of_run in scores)

    missing = list(filter(is_missing, suite.tasks))
    if missing:
        check_tokenizers(folders)
        _measure(missing, titles(runs), folders, scores, settings, say)
    evaluated = []
    for name, folder, scores_of_run in zip(titles(runs), folders, scores, strict=True):
        # also what `only` leaves out and was measured before
        values = {task.task: scores_of_run.get(task) for task in settings.suite.tasks}
        by_task = {task: value for task, value in values.items() if value is not None}
        groups = group_averages(settings.suite, by_task)
        local = [task for task in by_task if are_others(scores_of_run.tasks, task)]
        row = Evaluated(name, folder, by_task, groups, settings.limit, tuple(local))
        evaluated.append(row)
    return evaluated


def _measure(
    tasks: Sequence[BenchmarkTask],
    names: Sequence[str],
    folders: Sequence[Path],
    scores: Sequence[Scores],
    settings: EvaluateSettings,
    say: Callable[[str], None],
) -> None:
    """Make the scores that are not there yet, one network in memory at a time."""
    from outgrow.train.suite.harness import Harness

    local = None
    if settings.tasks is not None:
        local = Path(settings.tasks).expanduser().resolve()
    harness = Harness(local, bars=sys.stderr.isatty())
    run_code = settings.run_code
    loaded = harness.load(tasks, run_code=run_code)
    for name, folder, scores_of_run in zip(names, folders, scores, strict=True):
        todo = [task for task in tasks if scores_of_run.get(task) is None]
        model: Any = None
        for task in todo:
            if model is None:
                network, tokenizer = network_of(folder, settings)
                model = harness.model(network, tokenizer, settings.batch)
            ready = loaded[task.task]
            limit = settings.limit
            score = harness.score(task, ready, model, limit=limit, run_code=run_code)
            scores_of_run.put(task, asdict(score))
            share = f"{score.value:.1%} of {score.items}"
            say(f"{name}: {task.task} {share} ({score.metric})")


def checkpoint_of(run: Path) -> Path:
    """The folder of weights of a run, or of a checkpoint itself; of a GGUF file, what it was unpacked into.

    Raises:
        UserError: there is none.
    """
    folder = resolved(run)
    with reading(run):
        if run.is_file() or gguf_in(folder) is not None:
            return locate(run)  # not `folder`: a hub's cache links to files without an ending
        has_ended = (folder / FINAL).is_dir()
        if (folder / RUN).is_file() and has_ended:
            return folder / FINAL
        if (folder / RUN).is_file():
            raise UserError(
                f"{run}: the run has not ended: it has no {FINAL}/; the command that started it goes on"
            )
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{run}: neither a run's folder nor a checkpoint: it has no {RUN} and no config.json")


def titles(runs: Sequence[str]) -> list[str]:
    """The names of runs and checkpoints: their folders', or what was typed where two folders' are one."""
    names = [title(Path(run).resolve()) for run in runs]
    pairs = zip(runs, names, strict=True)
    return [run if names.count(name) > 1 else name for run, name in pairs]


def title(checkpoint: Path) -> str:
    """The name of a checkpoint: its run's, or its folder's."""
    return checkpoint.parent.name if checkpoint.name == FINAL else checkpoint.name


def check_tokenizers(folders: Sequence[Path]) -> None:
    """Refuse checkpoints that cannot read text, before any of them is measured.

    Raises:
        UserError: with every one that has no tokenizer.
    """
    from outgrow.train.data.tokenizer import has_tokenizer

    faults = []
    for folder in folders:
        with reading(folder):
            readable = has_tokenizer(folder)
        if not readable:
            faults.append(
                f"{folder}: it has no tokenizer, so no text can be read; put its tokenizer.json and "
                "tokenizer_config.json there"
            )
    UserError.collect(faults)


def network_of(folder: Path, settings: EvaluateSettings) -> tuple[Any, Any]:
    """The network and the tokenizer of a checkpoint.

    Raises:
        UserError: its tokenizer has more entries than the network.
    """
    import torch

    from outgrow.model.build import load_model
    from outgrow.train.data.tokenizer import entries, load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    cuda = torch.cuda.is_available()
    device = settings.device
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    network: Any = load_model(folder, dtype=settings.dtype)
    network.eval()
    rows = network.get_input_embeddings().weight.shape[0]
    count = entries(tokenizer)
    if count > rows:
        raise UserError(
            f"{folder}: its tokenizer has {count} entries, its network {rows}; give it the "
            "tokenizer it was trained with"
        )
    return network.to(device), tokenizer


class Scores:
    """The scores of one checkpoint on the disk, a file for each task."""

    def __init__(self, out: Path, checkpoint: Path, settings: EvaluateSettings) -> None:
        digest = hashlib.sha256(os.fsencode(checkpoint)).hexdigest()
        name = f"{title(checkpoint)}-{digest[:8]}"
        self.folder = out / "scores" / name
        self.tasks = None if settings.tasks is None else Path(settings.tasks).expanduser()
        self.weights = weights_of(checkpoint)
        self.settings = settings

    def conditions(self, task: BenchmarkTask) -> dict[str, Any]:
        """Everything that a score of the task depends on beside the task: another item is another score."""
        return {
            "limit": self.settings.limit,
            "dtype": self.settings.dtype,
            "weights": self.weights,
            "items": local_items(self.tasks, task.task),
        }

    def get(self, task: BenchmarkTask) -> float | None:
        """The score that was measured under the same conditions, of the same weights; None where none was."""
        path = self.folder / f"{task.task}.json"
        if not path.is_file():
            return None
        entry = read_object(path, "delete it, and it is measured again")
        same_task = entry.get("asked") == asdict(task)
        if same_task and entry.get("conditions") == self.conditions(task):
            return float(entry["value"])
        return None

    def put(self, task: BenchmarkTask, score: Mapping[str, Any]) -> None:
        """Keep a score."""
        record = {**score, "asked": asdict(task), "conditions": self.conditions(task)}
        write_json(self.folder / f"{task.task}.json", record)


def local_items(tasks: Path | None, task: str) -> str | None:
    """A hash of the local file of a task, and of when the data files that it names were written; None where
    there is none."""
    digest = hashlib.sha256()
    files = _files_of(tasks, task)
    for path in files:
        text = path.read_bytes()
        digest.update(text)
        for data in sorted(path.parent.iterdir()):
            is_data = data.is_file() and data.suffix != ".yaml"
            if is_data and data.name.encode() in text:
                size, modified = _stamp(data)
                digest.update(f"{size} {modified}".encode())
    return digest.hexdigest() if files else None


def are_others(tasks: Path | None, task: str) -> bool:
    """Check for a task with a local file which does not say, with `benchmark_items: true` in its metadata,
    that it holds the benchmark's own items."""
    texts = [path.read_text(errors="replace") for path in _files_of(tasks, task)]
    return not all(OWN_ITEMS.search(text) for text in texts)


def _files_of(tasks: Path | None, task: str) -> list[Path]:
    """The local files that define a task: one, if any, in a folder that the harness accepts."""
    name = re.escape(task)
    asks = re.compile(rf"^(task|group): *[\"']?{name}[\"']?\s*$", re.MULTILINE)
    paths = sorted(tasks.rglob("*.yaml")) if tasks else []
    return [path for path in paths if asks.search(path.read_text(errors="replace"))]


def weights_of(folder: Path) -> dict[str, list[int]]:
    """Stamps that tell other weights apart in a folder: each file's size and when it was written."""
    files = sorted(folder.glob("*.safetensors"))
    return {path.name: _stamp(path) for path in files}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
