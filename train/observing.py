"""What a run looks at on its way, off the training clock: losses, samples, benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from outgrow.model.build import load_model
from outgrow.model.geometry import active_parameter_count, parameter_count
from outgrow.train.evaluate import evaluate
from outgrow.train.machine.device import device_name
from outgrow.train.objects import RunContext, TrainingObjects
from outgrow.train.router import unbalanced
from outgrow.train.run.reading import loss_warnings
from outgrow.train.run.samples import samples
from outgrow.train.settings import Settings
from outgrow.train.start.stages import Stage
from outgrow.train.start.way import precision_of
from outgrow.train.step import drawn


def introduction(context: RunContext, objects: TrainingObjects, stage: Stage) -> Iterator[str]:
    """Lines on what is about to train, and on what."""
    count = parameter_count(stage.config)
    active = active_parameter_count(stage.config)
    sparsity = f" ({active:,} active for each token)" if active < count else ""
    steps = f"{context.clock.position.step} to {stage.last}"
    tokens = context.settings.budget.tokens_per_step
    yield f"{count:,} parameters{sparsity}, steps {steps} of {tokens:,} tokens"

    notes = unbalanced(objects.network), drawn(objects.network)
    yield from filter(None, notes)
    if objects.diagnostics is not None:
        yield from objects.diagnostics.remarks

    accelerator = context.accelerator
    device = device_name(accelerator.device)
    processes = f"{accelerator.num_processes} process(es)"
    precision = precision_of(accelerator.mixed_precision)
    attention = f"attention {context.way.attention} ({context.way.why})"
    yield f"{device}, {processes}, {precision}, {attention}"


def validate(context: RunContext, objects: TrainingObjects, kind: str = "eval") -> None:
    """Take the validation loss, off the training clock, and log it.

    Args:
        kind: "before_growth" and "growth" for the losses of a network that is about to grow and of the one
            that has just grown, whose difference is the height of the spike; neither is the run's own.
    """
    position = context.clock.position
    console = context.console
    measure = partial(
        evaluate,
        objects.objective,
        context.windows,
        context.accelerator,
        context.data.validation.bytes_per_token,
    )
    averaged: dict[str, float] = {}
    with context.clock.paused():
        result = measure()
        if objects.average is not None:
            with objects.average.applied():
                of_average = asdict(measure())
            averaged = {f"ema_{name}": value for name, value in of_average.items()}
    if kind == "eval":
        position.ema_val_loss = averaged.get("ema_val_loss")
        position.ema_bits_per_byte = averaged.get("ema_bits_per_byte")
        loss = result.val_loss
        if position.start_val_loss is None:
            position.start_val_loss = loss
            vocabulary = context.data.vocab_size
            for line in loss_warnings(context.settings, loss, vocabulary):
                console.say(line)
        position.val_loss = loss
        position.bits_per_byte = result.bits_per_byte
        best = position.best_val_loss
        if best is None:
            best = math.inf
        if position.step > 0 and loss < best:  # false for NaN
            position.best_val_loss = loss
            position.best_step = position.step
    if context.log:
        clocks = context.clock.clocks()
        context.log.write(kind, clocks, **asdict(result), **averaged)


def write_samples(
    context: RunContext,
    objects: TrainingObjects,
    when: str,
    final: Path | None = None,
) -> None:
    """Log what the network writes, off the training clock.

    Args:
        final: the folder to load the network from, where its own weights are sharded.
    """
    if context.log is None:
        return
    accelerator = context.accelerator
    with context.clock.paused():
        network = objects.network
        if final is not None:
            network = load_model(final).to(accelerator.device)
        sampled = partial(samples, network, context.data, context.windows, accelerator)
        clocks = context.clock.clocks()
        context.log.samples(when, clocks, sampled)


def benchmark_every(settings: Settings) -> int | None:
    """The number of steps between two measurements of the benchmarks; None: at the end alone."""
    every = settings.evaluate.every_tokens
    if every is None:
        return None
    steps = round(every / settings.train.batch_tokens)
    return max(1, steps)


def measure_benchmarks(context: RunContext, objects: TrainingObjects) -> None:
    """Measure the benchmarks, off the training clock, on the process that writes; the others wait in their
    next step."""
    assert context.benchmarks is not None
    with context.clock.paused():
        scores = context.benchmarks.measure(objects.network, context.accelerator)
    if context.log:
        clocks = context.clock.clocks()
        context.log.write("benchmark", clocks, **scores)
