"""Check that runs may be compared: every arm must have been given the same chances.

Where runs answer different questions (another text, another budget, another mask of attention) the comparison
is refused, and the thing is named. Where they answer one question by different means (another optimizer,
schedule or clipping) it is made, and the difference stands at its top: what a growth gained cannot be told
from what the other setting gained.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from outgrow.experiments.runs import CONTROLS, SCRATCH, Run, listed
from outgrow.model.base.errors import UserError
from outgrow.model.keys import without
from outgrow.model.spelling import both_spellings
from outgrow.train.run.record import SourceCost
from outgrow.train.settings import identity

Read = Callable[[Run], Any]

TEXT = "data fingerprint (run.json data.fingerprint)"
# How a loss is measured: what decayed ends must share too, whose batches may differ.
MEASURED_ALIKE: dict[str, Read] = {
    TEXT: lambda run: run.record.data.fingerprint,
    "evaluation budget (train.eval_tokens)": lambda run: run.record.setting("train.eval_tokens"),
    # of runs whose fingerprint did not tell it
    "mixture (mixture.phases)": lambda run: run.record.setting("mixture.phases"),
    "document mask (train.document_mask)": lambda run: bool(run.record.setting("train.document_mask")),
    "context (train.context)": lambda run: run.record.setting("train.context"),
    "precision": lambda run: run.record.precision,
}
# What every run of a comparison must share, the control arm included.
SHARED: dict[str, Read] = MEASURED_ALIKE | {
    "tokens per step": lambda run: run.record.tokens_per_step,
}
# What the arms share, but not the control arm: it trains the source's own config, as far as the same FLOPs
# carry it.
SHARED_BY_ARMS: dict[str, Read] = {
    "training budget (train.budget_tokens)": lambda run: run.record.budget_tokens,
    "FLOPs per token": lambda run: run.record.flops_per_token,
}
# A seed may have its own name and source; every other setting that changes a result is the same within an arm
# at one learning rate.
OF_ONE_SEED = ("seed", "name", "study", "source")
# How an arm starts, which is what is compared; its rate, which is tuned; and names.
THE_QUESTION = (
    *OF_ONE_SEED,
    "growth",
    "target",
    "source_tokens",
    "optimizer.learning_rate",
    "transfer.name",
    "data.name",
    "mixture.name",
)
# What the library writes into a config about itself, and settings of inference: no part of the network that
# is trained.
NOT_TRAINED = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "architectures",
    "return_dict",
)


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise UserError naming two runs and the thing in which they differ, every such thing at once."""
    arms = [run for run in runs if run.arm not in CONTROLS]
    faults = []
    for name, read in SHARED.items():
        faults += _differing(runs, name, read)
    for name, read in SHARED_BY_ARMS.items():
        faults += _differing(arms, name, read)
    faults += _differing_configs(arms) + _twice(runs) + _differing_seeds(runs, lambda run: run.point)
    UserError.collect(faults)
    if SCRATCH not in {run.arm for run in runs}:
        named = listed([run.name for run in runs])
        raise UserError(
            f"no complete {SCRATCH} run among {named}: every cost is measured against it. Train it: "
            f"growth={SCRATCH}",
        )


def check_ends_comparable(runs: Sequence[Run]) -> None:
    """Check runs whose decayed ends are held against each other: budgets, sizes and batches may differ.

    Raises:
        UserError: naming two runs whose losses were not measured alike, or that are no two seeds of one end.
    """
    faults = []
    for name, read in MEASURED_ALIKE.items():
        faults += _differing(runs, name, read)
    UserError.collect(faults + _differing_seeds(runs, _end))


def _end(run: Run) -> tuple[Any, ...]:
    """What the runs share whose ends are averaged over their seeds."""
    record = run.record
    optimizer = str(record.setting("optimizer.name"))
    batch = str(record.setting("train.batch_tokens"))
    return *run.point, optimizer, batch, record.parameters, run.summary.tokens


def differences(runs: Sequence[Run], stated: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Settings beside the growth in which runs of a comparison differ, each with its values and the arms that
    have them.

    Args:
        stated: (arm, setting) pairs that the comparison states elsewhere, as the change that it measures.
    """
    ordered = sorted(runs, key=lambda run: run.arm)
    sentences = _differing_sources(ordered)
    settings = [(run.arm, _beside_the_question(run)) for run in ordered]
    budgets = [(arm, "train.budget_tokens") for arm in CONTROLS]  # the controls train for equal FLOPs
    elsewhere = {*stated, *budgets}
    keys: set[str] = set()
    for _, values in settings:
        keys.update(values)
    for key in sorted(keys):
        arms: dict[str, list[str]] = defaultdict(list)  # value → the arms that have it
        for arm, values in settings:
            if elsewhere.isdisjoint((arm, path) for path in _paths(key)):
                value = _value(values.get(key))
                arms[value].append(arm)
        if len(arms) > 1:
            parts = [f"{value} ({_each_once(names)})" for value, names in arms.items()]
            sentences.append(f"{key}: " + "; ".join(parts))
    return sentences


def _each_once(names: Iterable[str]) -> str:
    distinct = dict.fromkeys(names)
    return ", ".join(distinct)


def _differing_sources(runs: Sequence[Run]) -> list[str]:
    """A sentence on each seed whose arms start from different sources: what its source knew is no gain of a
    growth.
    """
    sentences = []
    for seed in sorted({run.seed for run in runs}):
        arms: dict[SourceCost, list[str]] = {}
        paths: dict[SourceCost, str] = {}
        for run in runs:
            if run.seed == seed and run.source is not None:
                cost = replace(run.source, path=None)  # the same wherever it lies
                same = run.source if cost == SourceCost() else cost
                arms.setdefault(same, []).append(run.arm)
                paths.setdefault(same, run.source.path or "no path")
        if len(arms) > 1:
            parts = [f"{paths[same]} ({_each_once(names)})" for same, names in arms.items()]
            sentences.append(f"source, seed {seed}: " + "; ".join(parts))
    return sentences


def _beside_the_question(run: Run) -> dict[str, Any]:
    """The settings of a run that are no part of what is compared."""
    values = identity(run.record.settings)
    question = set(THE_QUESTION)
    beside = [key for key in values if question.isdisjoint(_paths(key))]
    return {key: values[key] for key in beside}


def _paths(key: str) -> list[str]:
    """`a.b.c` → `a`, `a.b`, `a.b.c`."""
    parts = key.split(".")
    lengths = range(1, len(parts) + 1)
    return [".".join(parts[:length]) for length in lengths]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _differing(runs: Sequence[Run], name: str, read: Read) -> list[str]:
    """Name the first run that differs from the first of all, in one sentence or none."""
    for run in runs[1:]:
        first = runs[0]
        one = read(first)
        other = read(run)
        if one != other:
            pair = f"{first.folder} and {run.folder}"
            why = _differing_texts(first, run) if name == TEXT else ""
            return [f"{pair} cannot be compared: their {name} is {one} and {other}{why}"]
    return []


def _differing_texts(one: Run, other: Run) -> str:
    """Say by which settings two runs have read different texts."""
    groups = ("data", "mixture")
    texts = [flat({group: run.record.settings.get(group) for group in groups}) for run in (one, other)]
    differing = _list_differing(*texts) or "no setting, so the files themselves do"
    return f"; what differs: {differing}"


def _differing_configs(runs: Sequence[Run]) -> list[str]:
    """Name the first target that differs from the first of all, in one sentence or none."""
    for run in runs[1:]:
        first = runs[0]
        same = _network(first) == _network(run)
        if not same and (differing := _list_differing(_network(first, True), _network(run, True))):
            pair = f"{first.folder} and {run.folder}"
            return [f"{pair} cannot be compared: their target configs differ in {differing}"]
    return []


def _network(run: Run, complete: bool = False) -> dict[str, Any]:
    """A target's config in both spellings: a folder that was grown before the run has them, a config made for
    the run has not.

    Args:
        complete: with what it leaves to its class, as far as the library has that class.
    """
    own = run.record.target_config
    if complete:
        from outgrow.model.build import to_hf_config

        with suppress(Exception):  # the library's classes raise every kind
            own = to_hf_config(own).to_dict()
    config = flat(both_spellings(own))
    return without(config, NOT_TRAINED)


def _twice(runs: Sequence[Run]) -> list[str]:
    """A sentence for each run of an arm, a rate and a seed that another run has already."""
    by_point: dict[tuple[str, float, int], Run] = {}
    faults = []
    for run in runs:
        point = (run.arm, run.learning_rate, run.seed)
        first = by_point.setdefault(point, run)
        if first is not run:
            faults.append(
                f"{first.folder} and {run.folder} are both arm {run.arm}, learning rate "
                f"{run.learning_rate:g}, seed {run.seed}: leave one out, or give their arms "
                "different names",
            )
    return faults


def _differing_seeds(runs: Sequence[Run], point: Read) -> list[str]:
    """Seeds of one `point` (an arm at one learning rate) are repetitions only if nothing else differs."""
    firsts: dict[Any, Run] = {}
    faults: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        first = firsts.setdefault(point(run), run)
        if differing := _list_differing(_measured(first), _measured(run)):
            faults[differing].append(f"{first.folder} and {run.folder}")
    return [
        f"{listed(pairs, 1)} are no two seeds of one arm: their settings differ in {keys}"
        for keys, pairs in faults.items()
    ]


def _measured(run: Run) -> dict[str, Any]:
    return without(identity(run.record.settings), OF_ONE_SEED)


def differing_keys(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys at which two flat dicts differ; a missing value is None."""
    keys = sorted(one.keys() | other.keys())
    return [key for key in keys if one.get(key) != other.get(key)]


def _list_differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The keys that differ, with both values; "" where none does."""
    parts = []
    for key in differing_keys(one, other):
        before = one.get(key, "absent")
        after = other.get(key, "absent")
        parts.append(f"{key} ({before} and {after})")
    return "; ".join(parts)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one level of dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            leaves |= flat(value, f"{path}.")
        else:
            leaves[path] = value
    return leaves
