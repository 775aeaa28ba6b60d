"""A forecast of what a run would take: parameters, steps, FLOPs, hours and the memory of each GPU, from
configs alone.

Nothing is downloaded and no weight is made: the network is built on fake tensors, which have shapes and no
memory, and one of its forward passes is made on them to count what it keeps for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING

from outgrow.model.base.errors import UserError
from outgrow.model.build import empty_model
from outgrow.model.geometry import active_parameter_count, flops_source, parameter_count
from outgrow.train.compose import compose
from outgrow.train.machine.device import MEMORY_GIB, PEAK_BF16_FLOPS, named, peak_flops
from outgrow.train.machine.memory import Memory, memory
from outgrow.train.machine.regime import multiplied, regime
from outgrow.train.optimizer import HOLDS, UNTOUCHED, parameter_groups
from outgrow.train.run.record import flops_after
from outgrow.train.settings import Budget, Settings
from outgrow.train.start.passes import passes
from outgrow.train.start.source import target_config
from outgrow.train.start.stages import spans_of, stages_of
from outgrow.train.step import drawn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
# `transformers`' names; a family may spell its own
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
FILLED = 0.95  # of a device's memory may be planned for


@dataclass(frozen=True)
class Forecast:
    """A run in numbers. `hours` are of `gpus` devices at the model-FLOPs utilisation (arXiv 2204.02311) that
    was assumed."""

    parameters: int
    active: int  # of them for each token; fewer in a mixture of experts
    groups: dict[str, tuple[int, int]]  # name → tensors, entries
    tokens_per_step: int
    steps: int
    pieces: int  # forward passes of one GPU in one step
    flops_per_token: float  # on average over its stages
    flops: float  # of the network; a teacher's come on top
    flops_from: str
    hours: float | None  # None where the device is not known
    memory: Memory
    dropout: str | None  # what its masks change, in words


def forecast(settings: Settings) -> Forecast:
    """Count what `settings` would take on `settings.forecast.gpus` devices.

    Raises:
        UserError: the devices do not divide the batch, or the network's config is not at hand.
    """
    budget = Budget.of(settings.train)
    plan = settings.forecast
    loop = settings.train
    if budget.rows % plan.gpus:
        each = max(1, round(budget.rows / plan.gpus))
        windows = each * plan.gpus
        raise UserError(
            f"forecast.gpus: {plan.gpus} do not divide the {budget.rows} windows of a batch "
            "(train.batch_tokens / train.context); try "
            f"train.batch_tokens={windows * loop.context}"
        )
    config = target(settings)
    attention = None if loop.attention in ("auto", "flash_attention_2") else loop.attention
    with FakeTensorMode():
        network = empty_model(config, dtype=torch.float32, attention=attention)
    groups = groups_of(network)
    share = budget.rows // plan.gpus
    rows = min(loop.micro_batch or share, share)
    peak = peak_flops(plan.device, "bf16")
    spans = spans_of(stages_of(settings, config), settings, None, {})
    total = flops_after(spans, budget.steps, budget.tokens_per_step)
    return Forecast(
        parameters=parameter_count(config),
        active=active_parameter_count(config),
        groups=groups,
        tokens_per_step=budget.tokens_per_step,
        steps=budget.steps,
        pieces=-(-share // rows),
        flops_per_token=total / (budget.steps * budget.tokens_per_step),
        flops=total,
        flops_from=flops_source(config, loop.context),
        hours=None if peak is None else total / (plan.gpus * peak * plan.mfu) / 3600,
        memory=memory(settings, config, network, groups, rows),
        dropout=drawn(network),
    )


def groups_of(network: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The optimizer's groups of a network: name → tensors, entries."""
    return {
        group["name"]: (len(group["params"]), sum(weight.numel() for weight in group["params"]))
        for group in parameter_groups(network, 0.0)
    }


def largest_micro_batch(config: dict[str, Any], context: int, room: float) -> int:
    """The most windows of `context` tokens that a device of `room` GiB trains at a time, alone: AdamW, mixed
    precision in bfloat16, gradient accumulation, no checkpointing. 0 where not even one fits.

    Raises:
        UserError: the class's forward pass depends on values.
    """
    start = ["growth=scratch", "target=tiny_target", "forecast.gpus=1", "train.precision=bf16"]
    sizes = [f"train.context={context}", f"train.batch_tokens={2 * context}"]
    settings = compose([*start, *sizes])
    with FakeTensorMode():
        network = empty_model(config, dtype=torch.float32)
    groups = groups_of(network)

    @cache
    def needed(rows: int) -> float:
        loop = replace(settings.train, batch_tokens=2 * rows * context)
        own = replace(settings, train=loop)
        return memory(own, config, network, groups, rows).total

    limit = FILLED * room * GIB
    one = needed(1)
    if one >= limit:
        return 0
    # A window more costs about as much as the one before it: a few lines through two points come near, and
    # what is left is searched.
    fits = 2
    for _ in range(3):
        each = (needed(fits) - one) / (fits - 1)
        more = int((limit - one) / each)
        fits = max(2, 1 + more)
    fails = fits + 1
    step = 1
    while needed(fits) >= limit:
        fails = fits
        fits = max(1, fits - step)
        step *= 2
    while needed(fails) < limit:
        fits = fails
        fails = fails + step
        step *= 2
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if needed(middle) < limit:
            fits = middle
        else:
            fails = middle
    return fits


def target(settings: Settings) -> dict[str, Any]:
    """The config of the network that would be trained, from what lies on this machine.

    Raises:
        UserError: it depends on a source that does not.
    """
    source = settings.source
    if source is not None and Path(source).is_dir():
        return target_config(settings, Path(source))
    if settings.growth.operator == "source":
        raise UserError(
            f"dry_run: the source {source!r} is the network, and it is no folder here; give one, or a preset "
            "as target"
        )
    if source is not None and _leaves_out_a_size(settings.target):
        raise UserError(
            f"dry_run: the target changes the config of the source {source!r}, and that is no folder here; "
            "train or fetch it first, name a preset as target, or give source=null where the target is whole "
            "by itself"
        )
    return target_config(settings, None)


def _leaves_out_a_size(target: Any) -> bool:
    """Find whether a target leaves a size to the source's config. The class's own default must not stand in
    for it."""
    if not isinstance(target, dict):
        return False
    model_type = str(target.get("model_type"))
    spelled = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
    return any(size not in target and spelled.get(size) not in target for size in SIZES)


# ---- telling -----------------------------------------------------------------------------------------------


def tell(settings: Settings) -> str:
    """The forecast as a text, every number with its arithmetic."""
    counted = forecast(settings)
    plan = settings.forecast
    loop = settings.train
    peak = peak_flops(plan.device, "bf16")
    room = named(MEMORY_GIB, plan.device)
    is_sparse = counted.active < counted.parameters
    sparsity = f", {counted.active:,} active for each token" if is_sparse else ""
    lines = [f"{settings.name}: {counted.parameters:,} parameters{sparsity}"]
    lines += _groups(counted, settings.optimizer.weight_decay)
    machine = f"{plan.gpus} × {plan.device}"
    lines.append(f"assumed       {machine}, whatever this machine has (forecast.gpus, forecast.device)")
    rows = loop.micro_batch or "all"
    shape = f"{plan.gpus} × {counted.pieces} × {rows} windows of {loop.context}"
    lines += [
        (
            f"steps         {counted.steps:,} of {counted.tokens_per_step:,} tokens ({shape}): "
            f"{counted.steps * counted.tokens_per_step:,} tokens"
        ),
        (
            f"FLOPs         {counted.flops_per_token:.4g} per token × tokens = {counted.flops:.4g} "
            f"({counted.flops_from})"
        ),
    ]
    if counted.hours is None or peak is None:
        lines.append(f"hours         not known for {plan.device}; known: {', '.join(PEAK_BF16_FLOPS)}")
    else:
        lines.append(
            f"hours         FLOPs / ({plan.gpus} × {peak / 1e12:g} TFLOP/s × MFU {plan.mfu:g}) = "
            f"{counted.hours:,.1f}"
        )
        if plan.days is not None:
            rate, mfu = sustained(counted.flops, plan.gpus, plan.days, peak)
            lines.append(
                f"{plan.days:g} days       would be {rate / 1e12:.1f} TFLOP/s on each of {plan.gpus}, an "
                f"MFU of {mfu:.1%}"
            )
    lines += [f"text          {line}" for line in passes(settings)]
    if counted.dropout is not None:
        lines.append(f"dropout       {counted.dropout}")
    memory = vars(counted.memory)
    parts = [f"{name} {size / GIB:.1f}" for name, size in memory.items() if size]
    total = counted.memory.total / GIB
    if room is None:
        verdict = f"; how much memory {plan.device} has is not known"
    else:
        verdict = f", {_verdict(total, room)} in {room:g} GiB"
    lines.append(
        f"GiB per GPU   {' + '.join(parts)} = {total:.1f}{verdict} (sharding {settings.sharding.name})"
    )
    if plan.frontier is not None:
        size = multiplied(target(settings), counted.parameters)
        warning = regime(Path(plan.frontier), size, counted.flops)
        lines += [f"regime        {warning}"] if warning else []
    if room is not None and not _fits(total, room):
        lines += ways_out(settings, room)
    if settings.transfer.inherited_rate == 0.0:
        lines.append(
            "too much      what is frozen has neither gradients nor state, and is counted as if it had"
        )
    if settings.transfer.teacher is not None:
        lines.append(
            "not counted   the teacher: its forward passes, a third of its training FLOPs, and its weights"
        )
    return "\n".join(lines)


def _groups(counted: Forecast, weight_decay: float) -> list[str]:
    """A line on each of the optimizer's groups: its size, what it holds, and whether that decays."""
    lines = []
    for name, (tensors, count) in counted.groups.items():
        plural = "s" if tensors > 1 else ""
        decay = "no weight decay" if name == UNTOUCHED else f"weight decay {weight_decay:g}"
        lines.append(f"  {name:<10} {count:>14,} in {tensors} tensor{plural}: {HOLDS[name]}; {decay}")
    return lines


def ways_out(settings: Settings, room: float) -> list[str]:
    """Forecast the memory anew with each key alone that saves some; the most helpful first."""
    loop = settings.train
    gpus = settings.forecast.gpus
    sharding = settings.sharding
    share = Budget.of(loop).rows // gpus
    rows = min(loop.micro_batch or share, share)
    choices: dict[str, Settings] = {}
    if gpus > 1:
        full = replace(sharding, name="full")
        choices["sharding=full"] = replace(settings, sharding=full)
    if not loop.checkpointing:
        checkpointing = replace(loop, checkpointing=True)
        choices["train.checkpointing=true"] = replace(settings, train=checkpointing)
    if rows > 1:
        half = rows // 2
        halved = replace(loop, micro_batch=half)
        choices[f"train.micro_batch={half}"] = replace(settings, train=halved)
    if sharding.name == "none":
        adam = replace(settings.optimizer, name="adamw_8bit")
        choices["optimizer=adamw_8bit"] = replace(settings, optimizer=adam)
    totals = []
    for key, changed in choices.items():
        if changed != settings:
            total = forecast(changed).memory.total / GIB
            totals.append((total, key))
    totals.sort(key=lambda pair: pair[0])
    return [f"with {key}: {total:.1f} GiB, {_verdict(total, room)}" for total, key in totals]


def _fits(total: float, room: float) -> bool:
    return total < FILLED * room


def _verdict(total: float, room: float) -> str:
    return "fits" if _fits(total, room) else "does not fit"


def sustained(flops: float, gpus: int, days: float, peak: float) -> tuple[float, float]:
    """The FLOP/s of each GPU that does `flops` in `days`, and its share of `peak`."""
    rate = flops / (gpus * days * 86400)
    return rate, rate / peak
