"""The settings of a run: a composed configuration becomes frozen values, or one error that names every fault.

Nothing here imports torch, so that a misspelt key is answered at once. No code beyond this file sees a
`DictConfig`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from outgrow.growth.learned.lessons import LEARNED
from outgrow.model.base.compose import CONF, compose_config
from outgrow.model.base.errors import UserError, did_you_mean
from outgrow.model.base.settings import settings_of
from outgrow.train.data.settings import DataSettings, MixtureSettings, mixture_disagreements
from outgrow.train.data.settings import disagreements as data_disagreements
from outgrow.train.schedule import REWARM, SCHEDULES, ScheduleSettings
from outgrow.train.start.neutral import flatten, is_neutral
from outgrow.train.suite.suite import load_suite

if TYPE_CHECKING:
    from omegaconf import DictConfig

SEEDS = 2**63
# the operators that grow nothing: build the target afresh; train the source itself on
UNGROWN = ("scratch", "source")


@dataclass(frozen=True)
class StageSettings:
    """A stretch of a run that grows on its way. `options` are the operator's own."""

    until: float | None = None  # the share of the budget at which it ends
    until_tokens: int | None = None  # or the tokens after which it ends, whatever the budget
    layers: float = 1.0  # of the target's, at least one
    # other sizes than the target's, under their Hugging Face names
    sizes: dict[str, Any] = field(default_factory=dict)
    operator: str = "lossless"  # by which it grows from what the stage before left
    moments: bool = False  # Adam's state grows too; else it begins anew
    options: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})


@dataclass(frozen=True)
class GrowthSettings:
    """The start of the run. `options` are the operator's own, handed to `growth.grow` as they are."""

    name: str
    operator: str
    options: dict[str, Any] = field(metadata={"rest": True})
    # where it grows on its way; the first one starts as `operator` says
    stages: tuple[StageSettings, ...] = ()


@dataclass(frozen=True)
class OptimizerSettings:
    """conf/optimizer."""

    name: Literal["adamw", "adamw_8bit", "muon"]
    learning_rate: float  # at the peak of the schedule
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float  # of matrices only, see train/optimizer.py
    momentum: float | None = None  # of Muon's matrices


@dataclass(frozen=True)
class TeacherSettings:
    """A model that teaches beside the text. Pairs are the values at the start and at `until`."""

    model: str  # source: the run's own; or a folder, or owner/name on the Hugging Face hub
    weight: tuple[float, float]
    temperature: tuple[float, float]
    until: float  # of the budget


@dataclass(frozen=True)
class TransferSettings:
    """conf/transfer: the use that training makes of a grown start."""

    name: str
    optimizer: str | None
    inherited_rate: float
    mup: bool
    teacher: TeacherSettings | None


@dataclass(frozen=True)
class ShardingSettings:
    """conf/sharding: the part that each of several processes holds, see train/machine/distribute.py."""

    name: Literal["none", "full"]
    # free a gathered layer until the backward pass needs it: less memory, more traffic
    reshard_after_forward: bool


@dataclass(frozen=True)
class LoggerSettings:
    """conf/logger."""

    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...]  # mirrors of metrics.jsonl
    project: str
    mode: Literal["auto", "online", "offline"]  # W&B; auto is online where the user is logged in


@dataclass(frozen=True)
class LoopSettings:
    """Budget and bookkeeping.

    What ends in `_tokens` is rounded to whole steps once, in `Budget`; null means never.
    """

    budget_tokens: int
    batch_tokens: int  # per step, over all processes
    context: int
    micro_batch: int | None  # windows per forward pass on one process; gradients accumulate over a step's
    eval_every_tokens: int | None
    eval_tokens: int
    log_every_tokens: int
    save_every_tokens: int | None
    keep: int  # newest checkpoints
    keep_optimizer: bool  # Adam's state beside the final model, for a growth that takes it over
    # of the final model's weights; null: float32
    save_dtype: Literal["source", "float32", "bfloat16", "float16"] | None
    keep_best: bool  # the checkpoint of the lowest validation loss too, saved when it is measured
    save_async: bool  # write from a copy while training goes on
    # of several processes: without the end of a step, the one that hangs is named, and the run ends
    hang_seconds: float | None
    skip_nonfinite: int  # steps whose loss or gradient is not finite that a run passes over before it stops
    precision: Literal["auto", "bf16", "fp32"]  # bf16: mixed precision, weights and sums stay float32
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]
    document_mask: bool  # no attention across documents, positions restart in each
    # fused: the logits are never whole; auto: fused where the network allows it
    loss: Literal["auto", "fused", "plain"]
    checkpointing: bool  # activations are computed again in the backward pass
    compile: bool  # torch.compile, layer by layer
    gradient_clip: float | None
    # copies, dead units and norms by origin, measured on the way; null: never
    diagnostics_every_tokens: int | None = None
    noise_scale: bool = False  # estimate the gradient noise scale, from micro-batches and whole batches
    # of the average of the weights, kept beside them: its decay a step, or its half-life in tokens
    ema: float | None = None
    profile_steps: str | int | None = None  # a-b: torch.profiler traces these steps, counted from 1

    @property
    def ema_decay(self) -> float | None:
        """The decay of the averaged weights at each step; None where none are kept."""
        if self.ema is None or self.ema < 1:
            return self.ema
        return float(0.5 ** (self.batch_tokens / self.ema))

    @property
    def profiled(self) -> range:
        """The steps that are traced, counted from 1; none where none are asked for."""
        if self.profile_steps is None:
            return range(0)
        first, _, last = str(self.profile_steps).partition("-")
        return range(int(first), int(last) + 1)


@dataclass(frozen=True)
class ForecastSettings:
    """The machine that dry_run counts with."""

    device: str  # a name that holds a key of train.device.PEAK_BF16_FLOPS
    gpus: int
    mfu: float  # model-FLOPs utilisation that is reached
    days: float | None  # also tell the rate that finishing in so many days would take
    frontier: str | None = None  # frontier.json: warn where the target is larger than the budget's best size


@dataclass(frozen=True)
class BenchmarkSettings:
    """Benchmarks on the way: they change nothing in the result."""

    suite: str | None  # conf/suite
    tasks: str | None
    only: tuple[str, ...] | None
    every_tokens: int | None
    limit: int | None  # items of each


@dataclass(frozen=True)
class Settings:
    """A whole run, as conf/train.yaml and its groups compose it."""

    study: str
    seed: int
    name: str
    out: str
    source: str | None
    source_tokens: int | None
    target: str | dict[str, Any] | None
    growth: GrowthSettings
    transfer: TransferSettings
    data: DataSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    logger: LoggerSettings
    sharding: ShardingSettings
    train: LoopSettings
    progress: Literal["auto", "lines", False]  # auto: a bar on a terminal, else lines
    dry_run: bool  # tell what the run would take, and stop
    forecast: ForecastSettings
    evaluate: BenchmarkSettings
    mixture: MixtureSettings | None = None  # what is trained on; null: the training part of `data`
    changes: str = ""  # of the experiment's defaults, as train.naming tells them; part of the name

    @cached_property
    def budget(self) -> Budget:
        """All counts of tokens as numbers of steps, converted once."""
        return Budget.of(self.train)


@dataclass(frozen=True)
class Budget:
    """Tokens, converted once: everything the loop counts is a number of steps."""

    steps: int
    rows: int  # windows per step, over all processes
    tokens_per_step: int
    eval_every: int | None
    log_every: int
    save_every: int | None
    keep_best: bool
    diagnostics_every: int | None = None

    @classmethod
    def of(cls, loop: LoopSettings) -> Budget:
        def steps(tokens: int | None) -> int | None:
            if tokens is None:
                return None
            return max(1, round(tokens / loop.batch_tokens))

        return cls(
            steps=loop.budget_tokens // loop.batch_tokens,
            rows=loop.batch_tokens // loop.context,
            tokens_per_step=loop.batch_tokens,
            eval_every=steps(loop.eval_every_tokens),
            log_every=steps(loop.log_every_tokens) or 1,
            save_every=steps(loop.save_every_tokens),
            keep_best=loop.keep_best,
            diagnostics_every=steps(loop.diagnostics_every_tokens),
        )

    def progress(self, step: int) -> float:
        """The share of the budget that is spent in the middle of step `step`."""
        return (step + 0.5) / self.steps

    def due(self, every: int | None, step: int) -> bool:
        """Check whether what is done `every` so many steps is due after `step` steps; all of it is due at the
        end.
        """
        in_turn = every is not None and step % every == 0
        return in_turn or step == self.steps

    def saves(self, step: int, best: int | None = None) -> bool:
        """Check whether a checkpoint is due after `step` steps, the best evaluation so far being that of step
        `best`.

        None is due after the last step: there is the final model.
        """
        in_turn = self.save_every is not None and step % self.save_every == 0
        is_best = self.keep_best and step == best
        return (in_turn or is_best) and step < self.steps


def compose(overrides: list[str]) -> Settings:
    """Settings of `conf/train.yaml` under Hydra overrides (`["experiment=tiny", "seed=1"]`).

    Raises:
        UserError: every fault of the overrides and of what they compose to, in one message.
    """
    from outgrow.train.start.naming import tell_changes

    cfg, faults = compose_config(CONF, "train", overrides)
    if not faults:
        tell_changes(cfg, overrides)
    return settings_from(cfg, faults)


def settings_from(cfg: DictConfig | Mapping[str, Any], faults: list[str] | None = None) -> Settings:
    """A composed configuration, read and checked.

    Args:
        cfg: what Hydra composed, or the same as plain dicts.
        faults: faults that are already known; they are told with the ones found here.

    Raises:
        UserError: unknown (with near matches), missing or mistyped keys and values that cannot work together,
            all at once.
    """
    return settings_of(Settings, cfg, faults or (), _disagreements)


def _disagreements(settings: Settings) -> list[str]:
    """List the faults between well-typed values."""
    faults = _loop_disagreements(settings.train)
    if not faults:
        faults += _observer_disagreements(settings)
    faults += _schedule_disagreements(settings.schedule)
    faults += _horizon_disagreements(settings)
    faults += _optimizer_disagreements(settings)
    faults += _start_disagreements(settings)
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
    faults += _fresh_disagreements(settings.growth)
    faults += _benchmark_disagreements(settings)
    faults += _transfer_disagreements(settings)
    if settings.growth.stages:
        faults += _stage_disagreements(settings.growth)
    if settings.mixture is not None:
        faults += mixture_disagreements(settings.mixture, settings.data)
    return faults + data_disagreements(settings.data)


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


def _schedule_disagreements(schedule: ScheduleSettings) -> list[str]:
    """List what is wrong with the learning rate's course."""
    names: list[tuple[str, str, Mapping[str, Any]]] = [
        ("name", schedule.name, SCHEDULES),
        ("rewarm", schedule.rewarm, REWARM),
    ]
    faults = []
    for key, name, known in names:
        if name not in known:
            hint = did_you_mean(name, known)
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
        load_suite(benchmarks.suite).of(benchmarks.only)
    except UserError as fault:
        faults.append(f"evaluate: {fault}")
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
    has_teacher = settings.transfer.teacher is not None
    if has_teacher or schedule.rewarm == "new":
        faults.append(
            "schedule.horizons: not with a teacher or rewarm=new, whose course depends on the budget"
        )
    mixture = settings.mixture
    phases = () if mixture is None else mixture.phases
    if any(phase.share is not None for phase in phases):
        faults.append(
            "schedule.horizons: a phase of the mixture lasts a share of the run; give its tokens, the same "
            "for every horizon"
        )
    decay = schedule.decay_fraction or 0.0
    stable = shortest * (1.0 - decay)
    faults += _growth_within_horizons(settings.growth, stable)
    return faults


def _growth_within_horizons(growth: GrowthSettings, stable: float) -> Iterator[str]:
    """Yield the faults of growths on the way of a run with horizons, which must come within the tokens that
    all of them share: `stable` ones, before the shortest decays.
    """
    ends = [stage.until_tokens for stage in growth.stages[:-1]]
    if None in ends:
        yield "growth.stages: with horizons a stage ends after until_tokens=N, the same for every horizon"
    for end in ends:
        tokens = end or 0
        if tokens > stable:
            yield (
                f"growth.stages: growth after {tokens} tokens is inside the decay of the shortest horizon, "
                f"from {stable:.0f}"
            )


def needs_source(settings: Settings) -> bool:
    """Check whether a run needs its source also after it has begun."""
    transfer = settings.transfer
    return transfer.mup or _learns_from_source(transfer)


def _learns_from_source(transfer: TransferSettings) -> bool:
    """Check whether the run's own source teaches."""
    teacher = transfer.teacher
    return teacher is not None and teacher.model == "source"


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
        "transfer.teacher": _learns_from_source(transfer),
    }
    if settings.source is None:
        needing = [key for key, wanted in from_source.items() if wanted]
        faults += [f"{key}: needs a source (source=FOLDER)" for key in needing]
    own_rate = transfer.inherited_rate != 1.0
    if growth.operator in UNGROWN and own_rate:
        faults.append(
            f"transfer.inherited_rate: growth={growth.name} grows nothing, so entries are neither "
            "inherited nor new",
        )
    if growth.operator == "scratch" and takes_moments:
        faults.append("transfer.optimizer: growth=scratch has no weights that the source's moments belong to")
    needs_adam = takes_moments or transfer.mup or settings.train.keep_optimizer
    if needs_adam and settings.optimizer.name != "adamw":
        faults.append(
            "transfer.optimizer, transfer.mup, train.keep_optimizer: for optimizer=adamw; found "
            f"{settings.optimizer.name}"
        )
    unsharded = {
        "transfer.inherited_rate": own_rate,
        "schedule.rewarm=new": settings.schedule.rewarm == "new",
        "transfer.optimizer": takes_moments,
        "train.keep_optimizer": settings.train.keep_optimizer,
        "growth.stages.moments": any(stage.moments for stage in growth.stages),
    }
    if settings.sharding.name == "full":
        needing = [key for key, wanted in unsharded.items() if wanted]
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


# Settings, of whatever part, that came when there were runs already → the value that says nothing.
LATER: Mapping[str, Any] = {"data_dir": None, "share": None, "ema": None, "fresh": "init"}


def identity(settings: Settings | Mapping[str, Any]) -> dict[str, Any]:
    """All settings that change the result, flat: dotted key → JSON value."""
    values = settings if isinstance(settings, Mapping) else asdict(settings)
    recorded = json.loads(json.dumps(values))
    flat = flatten(_without_later(recorded))
    return {key: value for key, value in flat.items() if not is_neutral(key)}


def _without_later(value: Any) -> Any:
    """Settings without those of LATER that say nothing: a run that was begun before there were any goes
    on."""
    if isinstance(value, list):
        return [_without_later(item) for item in value]
    if not isinstance(value, dict):
        return value
    told = {}
    for key, item in value.items():
        says_nothing = key in LATER and item == LATER[key]
        if not says_nothing:
            told[key] = _without_later(item)
    return told


def settings_hash(settings: Settings | Mapping[str, Any]) -> str:
    """A fingerprint of `identity`: two runs with the same hash on the same text give the same result."""
    text = json.dumps(identity(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def horizon_runs(settings: Settings) -> list[Settings]:
    """The run of each horizon, shortest first; the run itself where it has none."""
    return [
        replace(
            settings,
            name=f"{settings.name}-t{tokens}",
            out=f"{settings.out}-t{tokens}",
            train=replace(settings.train, budget_tokens=tokens),
        )
        for tokens in settings.schedule.horizons
    ] or [settings]
