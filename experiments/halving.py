"""The question of a selection: candidates, and the course of successive halving over them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from outgrow.experiments.runs import SOURCE
from outgrow.experiments.study_file import Study, load_study
from outgrow.model.base.compose import leaves
from outgrow.model.base.errors import UserError, did_you_mean
from outgrow.model.base.settings import read


@dataclass(frozen=True)
class Candidate:
    """A way to start: an arm of the study or a leaf of conf/growth, and what is changed in it."""

    name: str
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its name in files and tables: `lossless-depth_stack`."""
        changes = [override.rpartition(".")[2] for override in self.overrides]
        label = "-".join([self.name, *changes])
        label = label.replace("=", "_")
        return re.sub(r"[^\w.-]+", "", label)


@dataclass(frozen=True)
class Halving:
    """The course of a selection.

    Attributes:
        lag_tokens: of the first rung.
        keep: the share that goes on from a rung, and 1 / the factor from its tokens to the next one's.
        seeds: each trains every candidate.
    """

    lag_tokens: int
    keep: float = 0.5
    seeds: tuple[int, ...] = (0,)

    def rungs(self, candidates: int) -> list[tuple[int, int]]:
        """(tokens, how many go on from there) of each rung, until one is left."""
        rungs: list[tuple[int, int]] = []
        while candidates > 1:
            shrunk = self.keep ** len(rungs)
            tokens = round(self.lag_tokens / shrunk)
            share = math.ceil(candidates * self.keep)
            all_but_one = candidates - 1
            candidates = max(1, min(all_but_one, share))
            rungs.append((tokens, candidates))
        return rungs

    @property
    def faults(self) -> Iterator[str]:
        if self.lag_tokens <= 0:
            yield f"lag_tokens: must be positive; found {self.lag_tokens}"
        if not 0 < self.keep < 1:
            yield f"keep: a share between 0 and 1; found {self.keep}"
        distinct = set(self.seeds)
        if not distinct or len(distinct) < len(self.seeds):
            yield f"seeds: at least one, each once; found {list(self.seeds)}"


@dataclass(frozen=True)
class Question:
    """A selection as it is asked for; `overrides` are of all runs."""

    study: Study
    candidates: tuple[Candidate, ...]
    halving: Halving
    overrides: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        return Path("runs") / f"select-{self.study.name}"


def question(study: str, words: Sequence[str], own: Path | None = None) -> Question:
    """A selection from the words of the command line: candidates, and `key=value`.

    Args:
        own: a folder of the user's, with further leaves.

    Raises:
        UserError: every fault of the words, at once.
    """
    definition = load_study(study, own)
    candidates = []
    overrides = []
    values: dict[str, Any] = {}
    for word in words:
        first, *changes = shlex.split(word) or [""]
        key, sign, value = first.partition("=")
        if not sign:
            candidate = Candidate(first, tuple(changes))
            candidates.append(candidate)
        elif key in Halving.__dataclass_fields__:
            values[key] = yaml.safe_load(value)
        else:
            overrides.append(first)
    faults: list[str] = []
    halving = read(Halving, values, "", faults)
    if halving is not None:
        faults += halving.faults
    faults += _candidate_faults(definition, candidates)
    UserError.collect(faults)
    assert halving is not None
    return Question(definition, tuple(candidates), halving, tuple(overrides))


def _candidate_faults(study: Study, candidates: Sequence[Candidate]) -> Iterator[str]:
    """List what is wrong with the names of candidates."""
    names = {*study.arms, *leaves("growth", study.own)} - {SOURCE}
    labels = []
    for candidate in candidates:
        if candidate.name not in names:
            hint = did_you_mean(candidate.name, names)
            yield f"unknown candidate {candidate.name!r}; {hint}"
        if candidate.label in labels:
            yield f"candidate {candidate.label}: named twice"
        labels.append(candidate.label)
    if len(candidates) < 2:
        yield f"candidates: {len(candidates)}; give two or more, arms of the study or leaves of conf/growth"
