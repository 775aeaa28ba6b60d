"""A suite of benchmarks as data: conf/suite/NAME.yaml says which tasks, in which groups, with how many shots
and which metric."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from outgrow.model.base.compose import CONF, yaml_fault
from outgrow.model.base.errors import UserError, unknown
from outgrow.model.base.settings import read


@dataclass(frozen=True)
class BenchmarkTask:
    """One benchmark.

    Attributes:
        task: its name in lm-evaluation-harness, or in a task file of the user's.
        group: what it is averaged in.
        shots: examples in the prompt (few-shot); None leaves it to the task.
        metric: the harness's name, without its filter.
    """

    task: str
    group: str
    shots: int | None
    metric: str


@dataclass(frozen=True)
class Suite:
    """Benchmarks that are told together."""

    name: str
    tasks: tuple[BenchmarkTask, ...]

    def of(self, only: Sequence[str] | None) -> Suite:
        """The suite with the tasks called `only` alone.

        Raises:
            UserError: one of them is not in it.
        """
        names = [task.task for task in self.tasks]
        for name in only or ():
            if name not in names:
                unknown(f"task of the suite {self.name}", name, names)
        return (
            self
            if only is None
            else Suite(self.name, tuple(task for task in self.tasks if task.task in only))
        )


def load_suite(name: str) -> Suite:
    """The suite of conf/suite/`name`.yaml.

    Raises:
        UserError: there is none, or the file is none.
    """
    import yaml

    path = CONF / "suite" / f"{name}.yaml"
    leaves = path.parent.glob("*.yaml")
    names = sorted(leaf.stem for leaf in leaves)
    if name not in names:
        unknown("suite", name, names)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {yaml_fault(error)}") from None
    faults: list[str] = []
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected name and tasks")
    suite = read(Suite, values, f"suite {name}.", faults)
    UserError.collect(faults)
    assert suite is not None
    return suite


def group_averages(suite: Suite, scores: Mapping[str, float]) -> dict[str, float | None]:
    """The mean score of each group of the suite, None where one of its tasks has none: an average of a part
    is another number."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for task in suite.tasks:
        score = scores.get(task.task)
        groups[task.group].append(score)
    return {group: None if None in own else fmean(own) for group, own in groups.items()}
