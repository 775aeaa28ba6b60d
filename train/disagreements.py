"""The faults between the settings of a run, each of which is well-typed by itself, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from outgrow.growth.learned.lessons import LEARNED
from outgrow.model.base.errors import UserError, did_you_mean
from outgrow.train.data.settings import disagreements as data_disagreements
from outgrow.train.data.settings import mixture_disagreements
from outgrow.train.schedule import REWARM, SCHEDULES, ScheduleSettings
from outgrow.train.settings import (
    KEPT,
    UNGROWN,
    GrowthSettings,
    LoopSettings,
    Settings,
    TeacherSettings,
    learns_from_source,
)

SEEDS = 2**63


def disagreements(settings: Settings) -> list[str]:
    """List the faults between well-typed values."""
    faults = _loop_disagreements(settings.train)
    if not faults:
        faults += _observer_disagreements(settings)
    faults += _schedule_disagreements(settings.schedule)
    faults += _horizon_disagreements(settings)
    faults += _optimizer_disagreements(settings)
    faults += _start_disagreements(settings)
    faults += _run_disagreements(settings)
    faults += _fresh_disagreements(settings.growth)
    faults += _benchmark_disagreements(settings)
    faults += _transfer_disagreements(settings)
    if settings.growth.stages:
        faults += _stage_disagreements(settings.growth)
    if settings.mixture is not None:
        faults += mixture_disagreements(settings.mixture, settings.data)
    return faults + data_disagreements(settings.data)


def _run_disagreements(settings: Settings) -> list[str]:
    """List what is wrong with the run's names, seeds and counts, and with the machine of a dry run."""
    faults = []
    for key in ("study", "name"):
        name = getattr(settings, key)
        if not name or Path(name).name != name:
            faults.append(f"{key}: must be usable as the name of a folder; found {name!r}")
    if Path(settings.out).name in ("", ".."):
        faults.append(
            f"out: must be a folder of its own; found {settings.out!r}; leave it away for "
            f"runs/{settings.name}"
        )
    seeds = {"seed": settings.seed, "data.seed": settings.data.seed}
    for key, seed in seeds.items():
        if not 0 <= seed < SEEDS:
            faults.append(f"{key}: from 0 on, less than 2^63, as random generators take it; found {seed}")
    counts = {"source_tokens": settings.source_tokens, "forecast.days": settings.forecast.days}
    for key, count in counts.items():
        if count is not None and count <= 0:
            faults.append(f"{key}: must be positive, or null; found {count}")
    forecast = settings.forecast
    gpus = forecast.gpus
    mfu = forecast.mfu
    if gpus <= 0 or not 0 < mfu <= 1:
        faults.append(f"forecast: gpus must be positive and mfu between 0 and 1; found {gpus}, {mfu}")
    return faults


# ---- the loop ----------------------------------------------------------------------------------------------


def _loop_disagreements(loop: LoopSettings) -> list[str]:
    """List what is wrong with the counts of tokens and steps."""
    counts = ("budget_tokens", "batch_tokens", "context", "eval_tokens", "log_every_tokens", "keep")
    optional = (
        *("micro_batch", "eval_every_tokens", "save_every_tokens", "gradient_clip", "hang_seconds"),
        "diagnostics_every_tokens",
    )
    faults = []
    for key in counts:
        value = getattr(loop, key)
        if value <= 0:
            faults.append(f"train.{key}: must be positive; found {value}")
    for key in optional:
        value = getattr(loop, key)
        if value is not None and value <= 0:
            faults.append(f"train.{key}: must be positive, or null; found {value}")
    if loop.skip_nonfinite < 0:
        faults.append(f"train.skip_nonfinite: must not be negative; found {loop.skip_nonfinite}")
    if faults:  # what follows divides by them
        return faults
    if loop.batch_tokens % loop.context:
        windows = max(1, round(loop.batch_tokens / loop.context))
        nearest = windows * loop.context
        faults.append(
            f"train.batch_tokens: must be a whole number of windows of train.context={loop.context} tokens; "
            f"found {loop.batch_tokens}, try {nearest}"
        )
    elif loop.budget_tokens < loop.batch_tokens:
        faults.append(
            f"train.budget_tokens: {loop.budget_tokens} is less than one batch of {loop.batch_tokens} "
            "tokens; raise it, or lower train.batch_tokens"
        )
    return faults


def _observer_disagreements(settings: Settings) -> list[str]:
    """List what is wrong with what a run is asked to tell of itself, its counts of tokens being right."""
    loop = settings.train
    longest = max(settings.schedule.horizons, default=loop.budget_tokens)
    steps = longest // loop.batch_tokens
    faults = []
    ema = loop.ema
    is_decay = ema is not None and 0 < ema < 1
    is_half_life = ema is not None and ema >= loop.batch_tokens
    if ema is not None and not (is_decay or is_half_life):
        faults.append(
            "train.ema: expected a decay of each step, between 0 and 1, or a half-life in tokens, at least "
            f"train.batch_tokens={loop.batch_tokens}; found {loop.ema:g}"
        )
    inside = False
    if ends := re.fullmatch(r"(\d+)-(\d+)", str(loop.profile_steps)):
        first, last = map(int, ends.groups())
        inside = 1 <= first <= last <= steps
    if loop.profile_steps is not None and not inside:
        faults.append(
            "train.profile_steps: expected FIRST-LAST, steps counted from 1, of which this run has "
            f"{steps}; found {loop.profile_steps!r}"
        )
    return faults


def _benchmark_disagreements(settings: Settings) -> list[str]:
    """List what is wrong with the benchmarks on the way."""
    benchmarks = settings.evaluate
    faults = []
    for key in ("every_tokens", "limit"):
        value = getattr(benchmarks, key)
        if value is not None and value <= 0:
            faults.append(f"evaluate.{key}: must be positive, or null; found {value}")
    if benchmarks.suite is None:
        if benchmarks.every_tokens:
            faults.append("evaluate.every_tokens: of which suite? give evaluate.suite=NAME")
        return faults
    if settings.sharding.name == "full":
        faults.append(
            "evaluate.suite: needs the whole network on a process (sharding=none); outgrow evaluate RUN "
            "measures it at the end"
        )
    try:
        benchmarks.suite.of(benchmarks.only)
    except UserError as fault:
        faults.append(f"evaluate: {fault}")
    return faults


def _optimizer_disagreements(settings: Settings) -> list[str]:
    """List what is wrong with the optimizer, and with it under the sharding that is asked for."""
    faults = []
    optimizer = settings.optimizer
    for key in ("learning_rate", "epsilon"):
        value = getattr(optimizer, key)
        if value <= 0:
            faults.append(f"optimizer.{key}: must be positive; found {value}")
    if optimizer.weight_decay < 0:
        faults.append(f"optimizer.weight_decay: must not be negative; found {optimizer.weight_decay}")
    shares = {"betas": optimizer.betas, "momentum": (optimizer.momentum or 0.0,)}
    for key, values in shares.items():
        if not all(0 <= value < 1 for value in values):
            faults.append(f"optimizer.{key}: from 0 on, less than 1; found {getattr(optimizer, key)}")
    if optimizer.name == "adamw_8bit" and settings.sharding.name == "full":
        faults.append(
            "optimizer=adamw_8bit with sharding=full: torchao quantises each process's part by itself, "
            "unlike on one process, and a checkpoint cannot put the parts together; use sharding=none, or "
            "optimizer=adamw"
        )
    if optimizer.name == "muon" and optimizer.momentum is None:
        faults.append("optimizer.momentum: missing; muon needs one (optimizer.momentum=0.95)")
    return faults


# ---- the schedule and its horizons -------------------------------------------------------------------------


def _schedule_disagreements(schedule: ScheduleSettings) -> list[str]:
    """List what is wrong with the learning rate's course."""
    names: list[tuple[str, str, Mapping[str, Any]]] = [
        ("name", schedule.name, SCHEDULES),
        ("rewarm", schedule.rewarm, REWARM),
    ]
    faults = []
    for key, name, names_known in names:
        if name not in names_known:
            hint = did_you_mean(name, names_known)
            faults.append(f"schedule.{key}: unknown value {name!r}; {hint}")
    for key in ("warmup_fraction", "floor", "decay_fraction"):
        value = getattr(schedule, key)
        if value is not None and not 0 <= value <= 1:
            faults.append(f"schedule.{key}: must be between 0 and 1; found {value}")
    if schedule.name == "wsd" and schedule.decay_fraction is None:
        faults.append(
            "schedule.decay_fraction: missing; wsd decays over the last decay_fraction of the budget"
        )
    decay = schedule.decay_fraction or 0
    together = schedule.warmup_fraction + decay
    if schedule.warmup_tokens is None and together > 1:
        faults.append(
            f"schedule: warmup_fraction and decay_fraction are {together} together, more than the budget"
        )
    return faults


def _horizon_disagreements(settings: Settings) -> list[str]:
    """List the faults of a warm-up in tokens and of horizons."""
    schedule = settings.schedule
    loop = settings.train
    faults = []
    horizons = list(schedule.horizons)
    shortest = min(horizons, default=loop.budget_tokens)
    warmup = schedule.warmup_tokens
    if warmup is not None and not 0 <= warmup <= shortest:
        faults.append(
            f"schedule.warmup_tokens: between 0 and the budget of {shortest}; found {warmup}",
        )
    if not horizons:
        return faults
    if schedule.name != "wsd" or warmup is None:
        faults.append(
            "schedule.horizons: need schedule=wsd and schedule.warmup_tokens=N, a warm-up that all of them "
            "share",
        )
    rising = horizons == sorted(set(horizons))
    if not rising or horizons[0] < loop.batch_tokens:
        faults.append(
            "schedule.horizons: budgets of at least a batch, each longer than the one before; found "
            f"{horizons}",
        )
    stable = 1.0 - (schedule.decay_fraction or 0.0)
    faults += _growth_within_horizons(settings.growth, stable, shortest)
    return faults


def _growth_within_horizons(growth: GrowthSettings, stable: float, shortest: int) -> Iterator[str]:
    """Yield the faults of growths on the way of a run with horizons, which come before the decay of each.

    Args:
        stable: the share of a horizon before its decay.
        shortest: the tokens of the shortest horizon.
    """
    for stage in growth.stages[:-1]:
        if stage.until is not None and stage.until > stable:
            yield (
                f"growth.stages: growth at {stage.until:g} of each horizon is inside its decay, from "
                f"{stable:g}; let it grow earlier"
            )
        if stage.until_tokens is not None and stage.until_tokens > shortest * stable:
            yield (
                f"growth.stages: growth after {stage.until_tokens} tokens is inside the decay of the "
                f"shortest horizon, from {shortest * stable:.0f}; let it grow earlier, or leave that horizon "
                "out"
            )


# ---- the start, and growth on the way ----------------------------------------------------------------------


def _start_disagreements(settings: Settings) -> list[str]:
    """List what is missing of source and target."""
    faults = []
    growth = settings.growth
    has_source = settings.source is not None
    if settings.train.save_dtype == "source" and not has_source:
        faults.append("train.save_dtype=source: there is no source; give float32, bfloat16 or float16")
    if growth.operator != "scratch" and not has_source:
        way = "source=FOLDER or source=owner/name on the Hugging Face hub"
        faults.append(f"source: missing; growth={growth.name} starts from one: {way}")
    if growth.operator != "source" and settings.target is None:
        way = (
            "give a preset (target=tiny_target), a folder, or overrides of the source "
            "(target={hidden_size:96})"
        )
        faults.append(f"target: missing; {way}")
    return faults


def _fresh_disagreements(growth: GrowthSettings) -> list[str]:
    """List what is wrong with the scale of fresh entries, of the start and of each growth on the way."""
    grown = {"growth": (growth.operator, growth.options)}
    for number, stage in enumerate(growth.stages):
        key = f"growth.stages[{number}]"
        grown[key] = (stage.operator, stage.options)
    faults = []
    for key, (operator, options) in grown.items():
        fresh = options.get("fresh", "init")
        if fresh not in ("init", "match"):
            faults.append(f"{key}.fresh: expected init or match; found {fresh!r}")
        elif fresh == "match" and operator in UNGROWN:
            faults.append(
                f"{key}.fresh: operator {operator} grows nothing, so there is no source tensor to match; "
                "leave it out"
            )
    return faults


def _stage_disagreements(growth: GrowthSettings) -> list[str]:
    """List the faults of a growth on the way."""
    faults: list[str] = []
    *earlier, last = growth.stages
    ends_of_each = [(stage.until, stage.until_tokens) for stage in earlier]
    has_one_end = [ends.count(None) == 1 for ends in ends_of_each]
    if not all(has_one_end) or last.until_tokens is not None:
        return [
            (
                "growth.stages: each ends at until=SHARE or after until_tokens=N, one of them; the last at "
                "until=1.0"
            )
        ]
    counts = (stage.until_tokens for stage in growth.stages)
    tokens = [count for count in counts if count is not None]
    rising = tokens == sorted(set(tokens))
    if not rising or min(tokens, default=1) <= 0:
        faults.append(f"growth.stages: each must end later than the one before; found until_tokens={tokens}")
    shares = (stage.until for stage in growth.stages)
    ends = [share for share in shares if share is not None]
    rising = ends == sorted(set(ends))
    if not ends or not rising or ends[0] <= 0.0 or ends[-1] != 1.0:
        faults.append(
            f"growth.stages: each must end later than the one before, the last at 1.0; found until={ends}",
        )
    for number, stage in enumerate(growth.stages):
        if number and stage.operator in UNGROWN:
            faults.append(
                f"growth.stages[{number}].operator: {stage.operator} grows nothing; choose one that grows "
                "what there is",
            )
        if stage.operator in LEARNED:
            faults.append(
                f"growth.stages[{number}].operator: {stage.operator} learns at a cost of its own, which "
                "begins a run and does not go on in it; grow first (outgrow grow), or choose a fixed "
                "operator",
            )
    return faults


def _transfer_disagreements(settings: Settings) -> list[str]:
    """List the faults of what a grown start brings along."""
    growth = settings.growth
    transfer = settings.transfer
    teacher = settings.transfer.teacher
    faults: list[str] = []
    takes_moments = transfer.optimizer is not None
    from_source = {
        "transfer.optimizer": transfer.optimizer == "source",
        "transfer.mup": transfer.mup,
        "transfer.teacher": learns_from_source(transfer),
    }
    if settings.source is None:
        needing = [key for key, is_on in from_source.items() if is_on]
        faults += [f"{key}: needs a source (source=FOLDER)" for key in needing]
    own_rate = transfer.inherited_rate != 1.0
    if growth.operator in UNGROWN and own_rate:
        faults.append(
            f"transfer.inherited_rate: growth={growth.name} grows nothing, so entries are neither "
            "inherited nor new",
        )
    if growth.operator == "scratch" and takes_moments:
        faults.append("transfer.optimizer: growth=scratch has no weights that the source's moments belong to")
    grows_moments = any(stage.rule != "reset" for stage in growth.stages)
    optimizer = settings.optimizer.name
    if transfer.mup and optimizer != "adamw":
        faults.append(f"transfer.mup: for optimizer=adamw; found {optimizer}")
    needs_state = {
        "transfer.optimizer": takes_moments,
        "train.keep_optimizer": settings.train.keep_optimizer,
        "growth.stages.moments": grows_moments,
    }
    if optimizer not in KEPT:
        needing = [key for key, is_on in needs_state.items() if is_on]
        faults += [f"{key}: for optimizer={' or '.join(KEPT)}; found {optimizer}" for key in needing]
    unsharded = {
        "transfer.inherited_rate": own_rate,
        "schedule.rewarm=new": settings.schedule.rewarm == "new",
        "transfer.optimizer": takes_moments,
        "train.keep_optimizer": settings.train.keep_optimizer,
        "growth.stages.moments": grows_moments,
    }
    if settings.sharding.name == "full":
        needing = [key for key, is_on in unsharded.items() if is_on]
        faults += [f"{key}: needs whole tensors on each process (sharding=none)" for key in needing]
    if not 0.0 <= transfer.inherited_rate <= 10.0:
        faults.append(
            "transfer.inherited_rate: a share of the learning rate, at least 0; found "
            f"{transfer.inherited_rate}",
        )
    if teacher is not None:
        faults += _teacher_disagreements(teacher)
    return faults


def _teacher_disagreements(teacher: TeacherSettings) -> Iterator[str]:
    """Yield the faults of a teacher's weights, temperatures and end."""
    lowest = min(teacher.weight)
    highest = max(teacher.weight)
    in_range = 0.0 <= lowest <= highest <= 1.0
    if not in_range or min(teacher.temperature) <= 0:
        yield (
            "transfer.teacher: weights are between 0 and 1, temperatures positive; found "
            f"{teacher.weight}, {teacher.temperature}"
        )
    if not 0.0 < teacher.until <= 1.0:
        yield f"transfer.teacher.until: a share of the budget, above 0 and at most 1; found {teacher.until}"
