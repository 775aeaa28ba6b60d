"""A study as data: `experiments/<name>/study.yaml` becomes a frozen value, and the value becomes a list of
runs to do.

A study is a source, arms with their learning rates, and two extents: `demo` (minutes) and `full` (what the
README shows). Its arms are compared by what they cost to reach scratch's loss, or by their decayed ends, and
by their losses on the texts of `judged_on`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from outgrow.experiments.runs import CONTROLS, SCRATCH, SOURCE
from outgrow.model.base.compose import leaves, load_yaml
from outgrow.model.base.errors import UserError, did_you_mean, unknown
from outgrow.model.base.settings import read
from outgrow.train.settings import horizon_runs

if TYPE_CHECKING:
    from outgrow.train.settings import Settings

HERE = Path(str(files("outgrow.experiments")))
DEFINITION = "study.yaml"
# what a study has that its definition does not say → where it comes from
UNSAID = {"name": "a study is called as its folder is", "own": "outgrow study NAME --config-dir DIR gives it"}


@dataclass(frozen=True)
class Arm:
    """One way to start, and to go on from there.

    `learning_rate` is the middle of its grid; null: that of `runs`, without a grid and without a place in the
    names. `growth` is its leaf in conf/growth, by default its own name; `overrides` are Hydra's.

    `counts_as` is the arm that a comparison counts its runs under, by default itself: scratch with another
    batch size is scratch. `source` is one of the study's `sources`, where it starts from another than the
    study's own.
    """

    learning_rate: float | None = None
    growth: str | None = None
    overrides: tuple[str, ...] = ()
    counts_as: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Extent:
    """The part of the study that is run.

    `overrides` are of all its arms, before their own: what an arm says itself holds. `arm_overrides` come
    after an arm's own, such as shorter horizons of an arm that names its own.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rate_factors: tuple[float, ...] = (1.0,)  # of each arm's own learning rate
    # seeds on which every factor is run, the others at factor 1 only; null: all of them
    tuning_seeds: tuple[int, ...] | None = None
    overrides: tuple[str, ...] = ()
    arm_overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study's definition: Hydra overrides of the `source` that every grown arm starts from, and of all
    `runs` of the arms.

    `source` may also be a checkpoint that is there already: a folder, or owner/name on the Hugging Face hub;
    or empty, where every arm starts from scratch, and what grows does so on its way.

    `judged_on` are leaves of conf/data: the final models' losses on each of these texts are compared too.

    `sources` are further ones, trained in their order, so that one can be grown from another; the run of the
    source NAME is `runs/STUDY-source-NAME`.

    `sources_per_seed`: each seed has sources of its own, trained with it, so that an interval over seeds
    holds their spread too; the run is then `runs/STUDY-source-NAME-s${seed}`, and so says a source that grew
    from another.

    `source_is_there`: the question takes the sources' training as done; headline and picture of decayed ends
    count it out, the tables count it both ways.

    `family`: the arms are products of several sizes, all of use, and the cost of all of them is compared.

    `own` is a folder of the user's, whose leaves the overrides may name too.
    """

    name: str
    question: str
    source: str | tuple[str, ...]
    runs: tuple[str, ...]
    arms: dict[str, Arm]
    demo: Extent
    full: Extent
    judged_on: tuple[str, ...] = ()
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources_per_seed: bool = False
    source_is_there: bool = False
    family: bool = False
    own: Path | None = None

    def counts_as(self, arm: str) -> str:
        """The arm that a comparison counts the runs of `arm` under."""
        return self.arms[arm].counts_as or arm


@dataclass(frozen=True)
class Job:
    """One run to do: who it is, and the overrides that compose its settings, with the folder of the user's
    leaves that they may name.
    """

    name: str
    arm: str
    overrides: tuple[str, ...]
    settings: Settings
    own: Path | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of its horizons, shortest first; one where it has none."""
        runs = horizon_runs(self.settings)
        return tuple(Path(run.out) for run in runs)

    @property
    def folder(self) -> Path:
        """The folder of its longest horizon, which ends last."""
        return self.folders[-1]


def studies() -> dict[str, Path]:
    """Name → folder of every study: the project's, and those in `experiments/` of the working directory,
    which come first.
    """
    folders: list[Path] = []
    for room in (HERE, Path("experiments")):
        definitions = sorted(room.glob(f"*/{DEFINITION}"))
        folders += [path.parent for path in definitions]
    return {folder.name: folder for folder in folders}


def folder_of(name: str) -> Path:
    """The folder of the study called `name`. Raises UserError where there is none of that name."""
    registry = studies()
    if name not in registry:
        unknown("study", name, registry)
    return registry[name]


def results_folder(name: str, full: bool) -> Path:
    """The folder of a study's comparison: of its full extent the study's own, if that is of the working
    directory.
    """
    folder = folder_of(name)
    own = folder.resolve().is_relative_to(Path.cwd())
    if full and own:
        return folder
    extent = "-full" if full else ""
    return Path("runs") / f"comparison-{name}{extent}"


def load_study(name: str, own: Path | None = None) -> Study:
    """The study called `name`, to be run.

    Args:
        own: a folder of the user's, with further leaves.

    Raises UserError for an unknown study, and every misspelt, missing or mistyped key at once.
    """
    study, faults = _definition(name)
    if study is not None:
        faults += _judged_faults(study, own)
    return replace(_sound(name, study, faults), own=own)


def read_study(name: str) -> Study:
    """The study called `name`, to be told of: what it is judged on need not be here.

    Raises UserError as `load_study` does.
    """
    return _sound(name, *_definition(name))


def _definition(name: str) -> tuple[Study | None, list[str]]:
    """What defines the study called `name`, with the faults that it has of itself."""
    values = load_yaml(folder_of(name) / DEFINITION)
    fields = values if isinstance(values, dict) else {}
    faults = [f"{key}: unknown key; {origin}" for key, origin in UNSAID.items() if key in fields]
    said = {key: value for key, value in fields.items() if key not in UNSAID}
    study = read(Study, {**said, "name": name}, "", faults)
    if study is not None:
        faults += _disagreements(study)
    return study, faults


def _sound(name: str, study: Study | None, faults: Sequence[str]) -> Study:
    path = folder_of(name) / DEFINITION
    UserError.collect(f"{path}: {fault}" for fault in faults)
    assert study is not None
    return study


def takes_source_as_there(name: str) -> bool:
    """Check whether the question of the study called `name` takes its source as there; one without a
    definition does not.
    """
    return name in studies() and read_study(name).source_is_there


def source_job(study: Study) -> Job | None:
    """The run that trains the source; None where there is none, or where it is a checkpoint that is there."""
    if isinstance(study.source, str) or not study.source:
        return None
    return job_of(SOURCE, list(study.source), study.own)


def source_jobs(
    study: Study, arms: Iterable[str] | None = None, seeds: Sequence[int] | None = None
) -> list[Job]:
    """The runs that train the study's source and its `sources`, in the order in which they are trained.

    Args:
        arms: some of its arms; of the `sources` only those that these start from, and what those start from.
        seeds: those whose sources are wanted, where each has its own; by default those of the full extent.
    """
    own = source_job(study)
    runs = [] if own is None else [own]
    needed = set(study.sources) if arms is None else _sources_of(study, arms)
    sources = [(name, overrides) for name, overrides in study.sources.items() if name in needed]
    every = (study.full.seeds if seeds is None else seeds) if study.sources_per_seed else (None,)
    for seed, (name, overrides) in itertools.product(every, sources):
        drawn = [] if seed is None else [f"seed={seed}"]
        own_name = f"name='{_source_run(study, name)}'"
        runs.append(job_of(SOURCE, [*overrides, *drawn, "changes=''", own_name], study.own))
    return runs


def _sources_of(study: Study, arms: Iterable[str]) -> set[str]:
    """The names of the `sources` that some arms start from, at once or by way of another source."""
    own = {study.arms[arm].source for arm in arms}
    needed = {name for name in study.sources if name in own}
    for name, overrides in reversed(study.sources.items()):  # a source comes after the one that it grew from
        if name in needed:
            starts = set(overrides)
            needed |= {other for other in study.sources if f"source={_source_folder(study, other)}" in starts}
    return needed


def _source_folder(study: Study, source: str) -> str:
    """Where the checkpoint of one of the study's `sources` is; Hydra fills in the seed."""
    return f"runs/{_source_run(study, source)}/final"


def _source_run(study: Study, source: str) -> str:
    """The name of the run that trains one of the study's `sources`."""
    seed = "-s${seed}" if study.sources_per_seed else ""
    return f"{study.name}-source-{source}{seed}"


def jobs(study: Study, extent: Extent) -> list[Job]:
    """The runs of an extent, seed by seed. The source must be complete: its config decides the control's
    budget.

    The learning rate is part of a run's name, so that a grid has a folder for each point and a larger extent
    goes on from a smaller one.

    Raises:
        UserError: what the arms say composes to no run; every such arm is named.
    """
    shared = _compose_arms(study, extent)
    tuning = extent.seeds if extent.tuning_seeds is None else extent.tuning_seeds
    points = itertools.product(extent.seeds, extent.arms, extent.learning_rate_factors)
    runs = []
    for seed, name, share in points:
        if share == 1 or seed in tuning:
            middle = study.arms[name].learning_rate
            point = _point_overrides(name, middle, share, seed)
            runs.append(job_of(name, shared[name] + point, study.own))
    return runs


def check_arms(study: Study, extent: Extent) -> None:
    """Compose every arm of an extent once, before a source is trained for it.

    Raises:
        UserError: as `jobs` does, but for what a control takes from the source.
    """
    _compose_arms(study, extent, sources_ready=False)


def _compose_arms(study: Study, extent: Extent, *, sources_ready: bool = True) -> dict[str, list[str]]:
    """Arm → the overrides that all its runs share; every arm that composes to no run is named at once."""
    shared: dict[str, list[str]] = {}
    faults: dict[str, list[str]] = defaultdict(list)  # what is wrong → the arms of which that is true
    for name in extent.arms:
        try:
            shared[name] = _arm_overrides(study, name, extent, sources_ready)
            job_of(name, shared[name], study.own)
        except UserError as fault:
            faults[str(fault)].append(name)
    path = folder_of(study.name) / DEFINITION
    arms = {fault: ", ".join(names) for fault, names in faults.items()}
    UserError.collect(f"{path}, arms {names}: {fault}" for fault, names in arms.items())
    return shared


def _arm_overrides(study: Study, name: str, extent: Extent, sources_ready: bool) -> list[str]:
    """The overrides that all runs of an arm share in an extent; a control's budget only once its source is
    there.
    """
    arm = study.arms[name]
    growth = arm.growth or name
    names = [f"growth={growth}", f"growth.name={study.counts_as(name)}"]
    start = start_of(study)
    if arm.source is not None:
        start = [f"source={_source_folder(study, arm.source)}"]
    last = extent.arm_overrides.get(name, ())
    overrides = [*study.runs, *extent.overrides, *start, *names, *arm.overrides, *last]
    if growth in CONTROLS and sources_ready:
        overrides += equal_flops([f"seed={extent.seeds[0]}", *overrides], study.own)
    return overrides


def start_of(study: Study) -> list[str]:
    """The override that names a source which is there already."""
    return [f"source={study.source}"] if isinstance(study.source, str) else []


def _point_overrides(arm: str, middle: float | None, share: float, seed: int) -> list[str]:
    """One point of an arm's grid: a share of its own learning rate."""
    tuned: list[str] = []
    label = ""
    if middle is not None:
        rate = float(f"{middle * share:.6g}")  # 3 × 0.1 is 0.30000000000000004
        tuned = [f"optimizer.learning_rate={rate!r}"]
        label = f"-lr{rate:g}"
    name = f"name='${{study}}-{arm}{label}-s${{seed}}'"
    return [f"seed={seed}", *tuned, "changes=''", name]


def equal_flops(overrides: list[str], own: Path | None = None) -> list[str]:
    """The overrides that give a control its budget, or its horizons: the tokens on which the source pays the
    FLOPs that the target pays on each of its own, rounded up to whole steps.
    """
    from outgrow.growth.planning import wanted_config
    from outgrow.model.geometry import flops_per_token
    from outgrow.train.compose import compose

    settings = compose(overrides, own)
    path = Path(settings.source or "") / "config.json"
    if not path.is_file():
        raise UserError(
            f"source={settings.source}: no {path.name} there, and the control arm's budget needs it; train "
            "the source first",
        )
    source = json.loads(path.read_text(encoding="utf-8"))
    target = wanted_config(source, settings.target)
    context = settings.train.context
    relative_cost = flops_per_token(target, context) / flops_per_token(source, context)
    step = settings.budget.tokens_per_step

    budgets = []
    for run in horizon_runs(settings):
        target_tokens = run.budget.steps * step
        steps = math.ceil(target_tokens * relative_cost / step)
        budgets.append(steps * step)
    longest = f"train.budget_tokens={budgets[-1]}"
    horizons = ",".join(map(str, budgets))
    return [longest, f"schedule.horizons=[{horizons}]"] if settings.schedule.horizons else [longest]


def job_of(arm: str, overrides: list[str], own: Path | None = None) -> Job:
    """The run that overrides compose.

    Args:
        own: a folder of the user's, with further leaves.

    Raises:
        UserError: they compose to none.
    """
    from outgrow.train.compose import compose

    quiet = [*overrides, "progress=false"]
    settings = compose(quiet, own)
    return Job(settings.name, arm, tuple(quiet), settings, own)


def _judged_faults(study: Study, own: Path | None) -> list[str]:
    """List the texts to judge on that are no leaf of conf/data, nor of the user's."""
    texts = leaves("data", own)
    unknown_texts = [leaf for leaf in study.judged_on if leaf not in texts]
    return [f"judged_on: unknown data {leaf!r}; {did_you_mean(leaf, texts)}" for leaf in unknown_texts]


def _misnamed_sources(study: Study) -> list[str]:
    """List the sources that grow from another whose run is called as `sources_per_seed` does not have it."""
    other_way = replace(study, sources_per_seed=not study.sources_per_seed)
    faults = []
    for (name, overrides), other in itertools.product(study.sources.items(), study.sources):
        folder, misnamed = _source_folder(study, other), _source_folder(other_way, other)
        if f"source={misnamed}" in overrides:
            seeds = "true" if study.sources_per_seed else "false"
            faults.append(
                f"sources.{name}: expected source={folder}, with sources_per_seed: {seeds}; found {misnamed}"
            )
    return faults


def _disagreements(study: Study) -> list[str]:
    """List the faults between well-typed values."""
    faults = _misnamed_sources(study)
    for key in ("demo", "full"):
        extent: Extent = getattr(study, key)
        names = [name for name in extent.arms if name in study.arms]
        unknown_arms = [name for name in extent.arms if name not in names]
        for name in unknown_arms:
            hint = did_you_mean(name, study.arms)
            faults.append(f"{key}.arms: unknown arm {name!r}; {hint}")
        if extent.learning_rate_factors != (1.0,):
            without = [name for name in names if study.arms[name].learning_rate is None]
            faults += [f"arms.{name}.learning_rate: missing; {key} has a grid around it" for name in without]
        for name in names:
            source = study.arms[name].source
            if source is not None and source not in study.sources:
                hint = did_you_mean(source, study.sources)
                faults.append(f"arms.{name}.source: unknown source {source!r}; {hint}")
        for name in extent.arm_overrides:
            if name not in extent.arms:
                hint = did_you_mean(name, extent.arms)
                faults.append(f"{key}.arm_overrides: {name!r} is not among {key}.arms; {hint}")
        has_scratch = SCRATCH in map(study.counts_as, names)
        if not (has_scratch or study.judged_on or unknown_arms):
            faults.append(
                f"{key}.arms: none counts as {SCRATCH}, which costs are measured against; add it, or "
                "judged_on, the texts to compare the arms' losses on"
            )
    return faults
