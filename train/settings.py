"""The settings of a run, as frozen values: what they are, and which of them make two runs the same.

`compose.py` makes them of a configuration, `disagreements.py` holds them against each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from outgrow.growth.moments import ADAM, MUON, Rule
from outgrow.train.data.settings import DataSettings, MixtureSettings
from outgrow.train.schedule import ScheduleSettings
from outgrow.train.start.neutral import flatten, is_neutral
from outgrow.train.suite.suite import Suite

# the optimizers whose state is kept for growth, and grows → what it holds
KEPT: Mapping[str, tuple[str, ...]] = {"adamw": ADAM, "muon": (*ADAM, *MUON)}

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
    # how the optimizer's state goes on (see `rule`); false: reset, true: as the operator's own rule says
    moments: Literal["reset", "copied", "kept", False, True] = "reset"
    options: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})

    @property
    def rule(self) -> Rule:
        """How the optimizer's state grows: by growth's rule of that name (`growth.moments`)."""
        if isinstance(self.moments, bool):
            return "own" if self.moments else "reset"
        return self.moments


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
    keep_optimizer: bool  # the optimizer's state beside the final model, for a growth that takes it over
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

    suite: Suite | None  # a leaf of conf/suite
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


def needs_source(settings: Settings) -> bool:
    """Check whether a run needs its source also after it has begun."""
    transfer = settings.transfer
    return transfer.mup or learns_from_source(transfer)


def learns_from_source(transfer: TransferSettings) -> bool:
    """Check whether the run's own source teaches."""
    teacher = transfer.teacher
    return teacher is not None and teacher.model == "source"


# ---- which settings make a run what it is ------------------------------------------------------------------

# Settings, of whatever part, that came when there were runs already → the value that says nothing.
LATER: Mapping[str, Any] = {"data_dir": None, "share": None, "ema": None, "fresh": "init"}

# Likewise, values that have a name since → what runs had recorded before.
EARLIER: Mapping[tuple[str, Any], Any] = {("moments", "reset"): False}


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
    rest = {}
    for key, item in value.items():
        says_nothing = key in LATER and item == LATER[key]
        if says_nothing:
            continue
        is_renamed = isinstance(item, str) and (key, item) in EARLIER
        rest[key] = EARLIER[key, item] if is_renamed else _without_later(item)
    return rest


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
