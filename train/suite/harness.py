"""lm-evaluation-harness, asked for one score at a time: its tasks or task files of the user's, on a network
in memory.

It is an extra (`pip install -e '.[eval]'`) and imported only here, when something is to be measured.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.base.quiet import quietly
from outgrow.train.suite.metrics import check_allowed, running_code
from outgrow.train.suite.suite import BenchmarkTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED = 1234  # the harness's own
OWN = Path(__file__).with_name("tasks")  # where the harness's would fetch a metric when it is imported


@dataclass(frozen=True)
class Score:
    """The result of a benchmark, of 1, on so many items."""

    value: float
    items: int
    metric: str  # with the harness's filter


class Harness:
    """The tasks that can be asked, of the harness, of this project and of the folder `tasks`, the last first.

    With `bars`, the harness's progress bars are shown while it measures.

    Raises:
        UserError: the harness is not installed, or a file of `tasks` is no task.
    """

    def __init__(self, tasks: Path | None = None, *, bars: bool = False) -> None:
        _installed()
        self.bars = bars
        if tasks is not None:
            check_tasks(tasks)
        self.tasks = tasks
        files = () if tasks is None else _files(tasks)
        self.local = {name for path in files for name in _names(path)}
        self.managers: dict[bool, Any] = {}

    def model(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int) -> Any:
        """`network` as the harness asks it."""
        from lm_eval.models.huggingface import HFLM

        with _silent():
            return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=batch)

    def load(self, tasks: Sequence[BenchmarkTask], *, run_code: bool) -> dict[str, Any]:
        """Task → what the harness makes of it, data included: what cannot be measured is told before anything
        is.

        Raises:
            UserError: with every task that the harness does not know, whose data cannot be reached, or that
                would run code where that is not allowed.
        """
        loaded: dict[str, Any] = {}
        faults: list[str] = []
        unreachable: dict[str, str] = {}
        for task in tasks:
            try:
                # each request to a hub that is not there would wait for half a minute
                with _offline() if unreachable else contextlib.nullcontext():
                    loaded[task.task] = self._load(task, run_code)
            except _Unreachable as fault:
                unreachable[task.task] = str(fault)
            except UserError as fault:
                faults.append(str(fault))
        if unreachable:
            faults.append(
                f"{', '.join(unreachable)}: benchmarks whose data are on the Hugging Face hub, which cannot "
                f"be reached ({next(iter(unreachable.values()))}); with no network give tasks=DIR, a folder "
                "that holds each as a task file with local data, or leave them out with only=[…]"
            )
        UserError.collect(faults)
        return loaded

    def score(
        self, task: BenchmarkTask, loaded: Any, model: Any, *, limit: int | None, run_code: bool
    ) -> Score:
        """Measure one benchmark that was loaded.

        Raises:
            UserError: it has no such metric, or fails.
        """
        from lm_eval import evaluate

        try:
            with running_code(run_code), _silent(bars=self.bars), torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                results: Any = evaluate(
                    lm=model,
                    task_dict=loaded,
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=False,
                    confirm_run_unsafe_code=run_code,
                )
        except UserError:
            raise
        except Exception as fault:  # the harness and its tasks raise every kind
            raise UserError(f"task {task.task}: it cannot be measured ({in_one_line(fault)})") from fault
        return _read(task, results)

    def _load(self, asked: BenchmarkTask, run_code: bool) -> Any:
        """One task with its data, its shots set."""
        task = asked.task
        manager = self._manager(task)
        if task not in manager.all_tasks:
            raise UserError(
                f"task {task}: neither lm-evaluation-harness nor {self.tasks or 'a folder tasks=DIR'} has "
                "one of this name"
            )
        # before any data is asked for: without leave, a network that answers would help nothing
        entry = manager.task_index.get(task)
        if entry is not None and (entry.cfg or {}).get("unsafe_code"):
            _check_leave(task, run_code)
        try:
            with _silent(), self._beside_its_files(task):
                loaded = manager.load([task])
        except Exception as fault:  # the harness, its tasks and `datasets` raise every kind
            if _no_network(fault):
                raise _Unreachable(in_one_line(fault)) from fault
            is_local = task in self.local
            way_out = f"correct what is in {self.tasks}" if is_local else "leave it out with only=[…]"
            raise UserError(
                f"task {task}: its file or its data cannot be read ({in_one_line(fault)}); {way_out}"
            ) from fault
        parts = loaded["tasks"].values()
        if any(getattr(part, "UNSAFE_CODE", False) for part in parts):  # those of a group too
            _check_leave(task, run_code)
        for part in parts:
            shots = part.get_config("num_fewshot")
            if asked.shots is not None and shots != 0:
                shots = asked.shots
            part.set_config(key="num_fewshot", value=shots or 0)
            part.set_fewshot_seed(seed=SEED)
        return loaded

    def _manager(self, task: str) -> Any:
        """The index of tasks that has this one: of the folders here, or of the thousands of the harness too,
        whose files take a while."""
        from lm_eval.tasks import TaskManager

        folders = [str(OWN)]
        if self.tasks is not None:
            folders.append(str(self.tasks))
        for everything in (False, True):
            if everything not in self.managers:
                with _silent():
                    self.managers[everything] = TaskManager(include_path=folders, include_defaults=everything)
            if task in self.managers[everything].all_tasks:
                break
        return self.managers[everything]

    def _beside_its_files(self, task: str) -> contextlib.AbstractContextManager[Any]:
        """Work in the folder of a local task's file: its data's paths are told from there."""
        entry = self._manager(task).task_index.get(task)
        path = None if entry is None else entry.yaml_path
        if task not in self.local or path is None:
            return contextlib.nullcontext()
        return contextlib.chdir(Path(path).parent)


def _check_leave(task: str, run_code: bool) -> None:
    """Refuse a benchmark that runs generated code without leave to."""
    with running_code(run_code):
        check_allowed(task)


def _read(task: BenchmarkTask, results: Any) -> Score:
    """The score that was asked for among all that the harness tells."""
    groups = results.get("groups", {})
    own = results["results"].get(task.task)
    entries = own or groups.get(task.task) or {}
    values = {
        key: value
        for key, value in entries.items()
        if isinstance(value, float | int) and "_stderr" not in key and "," in key
    }
    metrics = [key for key in values if key.startswith(f"{task.metric},")]
    if not metrics:
        raise UserError(
            f"task {task.task}: it has no metric {task.metric!r}; it has "
            f"{', '.join(sorted(values)) or 'none'}"
        )
    metric = metrics[0]
    value = float(values[metric])
    if not math.isfinite(value):
        raise UserError(f"task {task.task}: its {task.metric} is {value}")
    counts = results["n-samples"].values()
    items = sum(count["effective"] for count in counts)
    return Score(value, items, metric)


# ---- without a network -------------------------------------------------------------------------------------


class _Unreachable(Exception):
    """The hub with a task's data cannot be reached: the message says why."""


def _no_network(fault: BaseException | None) -> bool:
    """Check whether a fault, or one that led to it, is of a connection."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while fault is not None:
        if isinstance(fault, ConnectionError | TimeoutError | LocalEntryNotFoundError):
            return True
        fault = fault.__cause__ or fault.__context__
    return False


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Data of earlier times alone, without a request."""
    import datasets
    from huggingface_hub import constants

    key = "HF_HUB_OFFLINE"
    with patch.object(constants, key, True), patch.object(datasets.config, key, True):
        yield


# ---- files -------------------------------------------------------------------------------------------------


def check_tasks(folder: Path) -> None:
    """Refuse a folder whose YAML files are no tasks: the harness passes over them without a word.

    Raises:
        UserError: with every file that is none.
    """
    if not folder.is_dir():
        raise UserError(
            f"tasks={folder}: no such folder; give one with task files in lm-evaluation-harness's YAML format"
        )
    files = _files(folder)
    if not files:
        raise UserError(
            f"tasks={folder}: it holds no *.yaml; give task files in lm-evaluation-harness's format"
        )
    UserError.collect(fault for path in files if (fault := _fault(path)))


def _files(folder: Path) -> list[Path]:
    paths = folder.rglob("*.yaml")
    return sorted(path for path in paths if not path.name.startswith("_"))


def _config(path: Path) -> Any:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=False, recursive=True)


def _names(path: Path) -> list[str]:
    config = _config(path)
    values = (config.get("task"), config.get("group"))
    return [value for value in values if isinstance(value, str)]


def _fault(path: Path) -> str | None:
    """The fault of a task file, or None."""
    try:
        config = _config(path)
    except Exception as fault:  # PyYAML's, and the harness's own
        return f"{path}: no task file ({in_one_line(fault)})"
    names_one = isinstance(config, dict) and ("task" in config or "group" in config)
    if not names_one:
        return f"{path}: no task file: expected task: NAME, or group: NAME, in lm-evaluation-harness's format"
    has_data = {"dataset_path", "class", "custom_dataset"} & set(config)
    if isinstance(config.get("task"), str) and not has_data:
        return f"{path}: task {config['task']} says nothing of its data; expected dataset_path"
    return None


def _installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "benchmarks are measured by lm-evaluation-harness, which is not installed; pip install -e "
            "'.[eval]'"
        ) from error


@contextlib.contextmanager
def _silent(*, bars: bool = False) -> Iterator[None]:
    """Without the harness's and the libraries' own lines, and without bars unless `bars`."""
    with quietly(), open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if not bars:
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
