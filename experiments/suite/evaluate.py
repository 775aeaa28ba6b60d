"""Measure a suite on runs and checkpoints, task by task: each score is a file of its own, and is not measured
again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import read_object, write_json
from outgrow.model.base.settings import CONF, compose_config, plain, read
from outgrow.model.checkpoint import locate
from outgrow.model.gguf import gguf_in
from outgrow.train.run.folder import FINAL, RUN
from outgrow.train.suite.suite import BenchmarkTask, Suite, group_averages


@dataclass(frozen=True)
class EvaluateSettings:
    """What conf/evaluate.yaml composes."""

    suite: Suite
    tasks: str | None
    only: tuple[str, ...] | None
    limit: int | None
    batch: int
    run_code: bool
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    out: str


@dataclass(frozen=True)
class Evaluated:
    """The scores of one checkpoint, of 1; those of `local` are on the items of local task files."""

    name: str
    folder: Path
    scores: dict[str, float]
    groups: dict[str, float | None]
    limit: int | None
    local: tuple[str, ...] = ()


def settings_from(overrides: Sequence[str]) -> EvaluateSettings:
    """The settings under overrides such as `suite=phi_2`.

    Raises:
        UserError: with every fault of them.
    """
    cfg, faults = compose_config(CONF, "evaluate", list(overrides))
    values = plain(cfg, faults)
    settings = read(EvaluateSettings, values, "", faults) if values else None
    if settings is not None and (settings.batch <= 0 or (settings.limit is not None and settings.limit <= 0)):
        faults.append(f"batch, limit: must be positive; found {settings.batch}, {settings.limit}")
    UserError.collect(faults)
    assert settings is not None
    return settings


def evaluate(
    runs: Sequence[str], settings: EvaluateSettings, say: Callable[[str], None] = print
) -> list[Evaluated]:
    """Every run's scores on the suite; those that lie in `settings.out` are read.

    Raises:
        UserError: a run has no checkpoint or no tokenizer, or a task cannot be measured; scores that were
        made until then are kept.
    """
    suite = settings.suite.of(settings.only)
    folders = [checkpoint_of(Path(run)) for run in runs]
    scores = [Scores(Path(settings.out), folder, settings) for folder in folders]
    missing = [task for task in suite.tasks if any(each.get(task) is None for each in scores)]
    if missing:
        _measure(missing, folders, scores, settings, say)
    found = []
    for folder, each in zip(folders, scores, strict=True):
        # also what `only` leaves out and was measured before
        values = {task.task: each.get(task) for task in settings.suite.tasks}
        known = {task: value for task, value in values.items() if value is not None}
        groups = group_averages(settings.suite, known)
        local = tuple(task for task in known if local_items(each.tasks, task) is not None)
        found.append(Evaluated(title(folder), folder, known, groups, settings.limit, local))
    return found


def _measure(
    tasks: Sequence[BenchmarkTask],
    folders: Sequence[Path],
    scores: Sequence[Scores],
    settings: EvaluateSettings,
    say: Callable[[str], None],
) -> None:
    """Make the scores that are not there yet, one network in memory at a time."""
    from outgrow.train.suite.harness import Harness

    harness = Harness(None if settings.tasks is None else Path(settings.tasks).expanduser().resolve())
    loaded = harness.load(tasks, run_code=settings.run_code)
    for folder, each in zip(folders, scores, strict=True):
        todo = [task for task in tasks if each.get(task) is None]
        model: Any = None
        for task in todo:
            model = model or harness.model(*network_of(folder, settings), settings.batch)
            score = harness.score(
                task, loaded[task.task], model, limit=settings.limit, run_code=settings.run_code
            )
            each.put(task, asdict(score))
            say(f"{title(folder)}: {task.task} {score.value:.1%} of {score.items} ({score.metric})")


def checkpoint_of(run: Path) -> Path:
    """The folder of weights of a run, or of a checkpoint itself.

    Raises:
        UserError: there is none.
    """
    folder = run.resolve()
    if gguf_in(folder) is not None:
        return locate(folder)
    if (folder / RUN).is_file():
        if not (folder / FINAL).is_dir():
            raise UserError(
                f"{run}: the run has not ended: it has no {FINAL}/; the command that started it goes on"
            )
        return folder / FINAL
    if not (folder / "config.json").is_file():
        raise UserError(f"{run}: neither a run's folder nor a checkpoint: it has no {RUN} and no config.json")
    return folder


def title(checkpoint: Path) -> str:
    """What a checkpoint is called: as its run, or as its folder."""
    return checkpoint.parent.name if checkpoint.name == FINAL else checkpoint.name


def network_of(folder: Path, settings: EvaluateSettings) -> tuple[Any, Any]:
    """The network and the tokenizer of a checkpoint.

    Raises:
        UserError: it has no tokenizer, or one with more entries than the network has.
    """
    import torch

    from outgrow.model.build import load_model
    from outgrow.train.data.tokenizer import entries, has_tokenizer, load_tokenizer

    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: it has no tokenizer, so no text can be read; put its tokenizer.json and "
            "tokenizer_config.json there"
        )
    tokenizer = load_tokenizer(str(folder))
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if settings.device == "auto" else settings.device
    network: Any = load_model(folder, dtype=settings.dtype).eval()
    rows = network.get_input_embeddings().weight.shape[0]
    if entries(tokenizer) > rows:
        raise UserError(
            f"{folder}: its tokenizer has {entries(tokenizer)} entries, its network {rows}; give it the "
            "tokenizer it was trained with"
        )
    return network.to(device), tokenizer


class Scores:
    """The scores of one checkpoint on the disk, a file for each task."""

    def __init__(self, out: Path, checkpoint: Path, settings: EvaluateSettings) -> None:
        place = hashlib.sha256(str(checkpoint).encode()).hexdigest()[:8]
        self.folder = out / "scores" / f"{title(checkpoint)}-{place}"
        self.tasks = None if settings.tasks is None else Path(settings.tasks).expanduser()
        self.weights = weights_of(checkpoint)
        self.settings = settings

    def conditions(self, task: BenchmarkTask) -> dict[str, Any]:
        """All that a score of the task depends on beside the task: another item is another score."""
        return {
            "limit": self.settings.limit,
            "dtype": self.settings.dtype,
            "weights": self.weights,
            "items": local_items(self.tasks, task.task),
        }

    def get(self, task: BenchmarkTask) -> float | None:
        """What was measured under the same conditions, of the same weights; None where nothing was."""
        path = self.folder / f"{task.task}.json"
        if not path.is_file():
            return None
        kept = read_object(path, "delete it, and it is measured again")
        return (
            float(kept["value"])
            if kept.get("asked") == asdict(task) and kept.get("conditions") == self.conditions(task)
            else None
        )

    def put(self, task: BenchmarkTask, score: Mapping[str, Any]) -> None:
        """Keep a score."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self.folder / f"{task.task}.json",
            {**score, "asked": asdict(task), "conditions": self.conditions(task)},
        )


def local_items(tasks: Path | None, task: str) -> str | None:
    """A hash of the local file of a task, and of when the data files that it names were written; None where
    there is none."""
    digest = hashlib.sha256()
    asks = re.compile(rf"^(task|group): *[\"']?{re.escape(task)}[\"']?\s*$", re.MULTILINE)
    texts = {path: path.read_bytes() for path in sorted(tasks.rglob("*.yaml"))} if tasks else {}
    named = {path: text for path, text in texts.items() if asks.search(text.decode(errors="replace"))}
    for path, text in named.items():
        digest.update(text)
        for data in sorted(path.parent.iterdir()):
            if data.is_file() and data not in texts and data.name.encode() in text:
                digest.update(f"{data.stat().st_size} {data.stat().st_mtime_ns}".encode())
    return digest.hexdigest() if named else None


def weights_of(folder: Path) -> dict[str, list[int]]:
    """What tells other weights apart in a folder: each file's size and when it was written."""
    files = sorted(folder.glob("*.safetensors"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
