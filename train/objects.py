"""The objects that train in one stage of a run: built first, then filled with the state that they start
from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor

from outgrow.growth.optimizer import named_state
from outgrow.model.build import load_model
from outgrow.model.geometry import parameter_count
from outgrow.train.average import Average
from outgrow.train.data import TokenData
from outgrow.train.experts import ExpertLoad
from outgrow.train.loss import NextTokenLoss, build_loss
from outgrow.train.machine.compile import speed_up
from outgrow.train.machine.distribute import prepare
from outgrow.train.noise_scale import NoiseScale, first_micro_batches
from outgrow.train.optimizer import build_optimizer
from outgrow.train.run import state
from outgrow.train.run.clock import Meter
from outgrow.train.run.diagnostics import Diagnostics
from outgrow.train.run.log import Console, Log
from outgrow.train.settings import Settings
from outgrow.train.start.source import start_folder, starting_model
from outgrow.train.start.stages import Stage
from outgrow.train.start.teacher import Teacher, taught
from outgrow.train.start.transfer import entry_rates, mup_rates, take_over
from outgrow.train.start.way import Way
from outgrow.train.step import Step

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from outgrow.train.suite.during import Benchmarks


@dataclass(frozen=True)
class RunContext:
    """Everything that all stages of a run share."""

    settings: Settings
    folder: Path
    source: Path | None
    teacher: Teacher | None  # a network that teaches beside the text (distillation)
    accelerator: Accelerator
    data: TokenData
    windows: list[np.ndarray]  # the validation batches, (rows, context + 1) each
    way: Way  # attention and loss
    dtype: str  # that the final weights are stored in
    console: Console
    log: Log | None  # on the process that writes
    clock: Meter
    benchmarks: Benchmarks | None = None  # on the process that writes


@dataclass(frozen=True)
class TrainingObjects:
    """A network with its loss, its optimizer and the step that trains it."""

    network: PreTrainedModel  # what is saved
    objective: NextTokenLoss  # the network with the loss on top
    optimizer: Any  # prepared by Accelerate
    step: Step
    load: ExpertLoad  # of a mixture of experts, for the log
    average: Average | None = None  # of the weights over the steps (EMA)
    diagnostics: Diagnostics | None = None  # of copies and new entries, on the processes that look

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state with the parameters' names."""
        return named_state(self.optimizer.optimizer, self.network)

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights; none where none are kept."""
        return {} if self.average is None else self.average.tensors


def build_objects(context: RunContext, stage: Stage) -> TrainingObjects:
    """Build the network of `stage` with its starting weights, and around it loss, optimizer and step."""
    settings = context.settings
    way = context.way
    source = context.source
    folder = context.folder
    network = starting_model(settings, stage, source, folder, way.attention)
    sizes = (parameter.numel() for parameter in network.parameters())
    same_count = sum(sizes) == parameter_count(stage.config)
    assert same_count, "geometry and the built model count different parameters"

    # Frozen entries and learning rates are settled before the optimizer sorts the parameters into groups.
    entries = entry_rates(network, settings, stage, folder)
    rates = mup_rates(network, settings, stage, source)
    optimizer = build_optimizer(network, settings.optimizer, rates)

    # Layers are compiled and checkpointed in place, and only then wrapped for several processes.
    speed_up(network, settings.train)
    plain = build_loss(
        network, settings.train, context.data.end_of_text_id, fused=way.fused, masked=way.masked
    )
    accelerator = context.accelerator
    objective = taught(plain, context.teacher, accelerator.device)
    model, prepared = prepare(objective, optimizer, accelerator, unused=way.partly)
    split = context.data.train
    noise = _noise_scale(context)
    step = Step(model, prepared, accelerator, split, settings, entries, noise)
    if noise is not None and len(step.share.pieces) == 1:
        noise.watch(model)
    decay = settings.train.ema_decay
    average = None if decay is None else Average(model, step.weights(), decay)
    diagnostics = _diagnostics(context, network, prepared.optimizer, stage)
    load = ExpertLoad(network)
    return TrainingObjects(network, objective, prepared, step, load, average, diagnostics)


def _noise_scale(context: RunContext) -> NoiseScale | None:
    """Build what estimates the gradient noise scale, if that is asked for."""
    settings = context.settings
    accelerator = context.accelerator
    if not settings.train.noise_scale:
        return None
    own = first_micro_batches(settings, accelerator.num_processes)
    tokens = settings.budget.tokens_per_step
    return NoiseScale(own, tokens, accelerator, context.clock.position)


def _diagnostics(
    context: RunContext, network: PreTrainedModel, optimizer: torch.optim.Optimizer, stage: Stage
) -> Diagnostics | None:
    """The observer of copies and new entries, on the processes that look."""
    accelerator = context.accelerator
    budget = context.settings.budget
    looks = accelerator.is_main_process or accelerator.is_fsdp2
    if budget.diagnostics_every is None or not looks:
        return None
    start = start_folder(stage, context.source, context.folder)
    return Diagnostics(network, optimizer, stage, start, budget, context.clock)


def fill_state(context: RunContext, objects: TrainingObjects, stage: Stage, saved: Path | None) -> None:
    """Restore everything from the checkpoint `saved`.

    Where the stage begins, take over an optimizer's state, if any is to be, and the averaged weights that
    have grown.

    Raises:
        UserError: the checkpoint, or the optimizer's state of the source, cannot be read.
    """
    optimizer = objects.optimizer.optimizer
    if saved is None:
        settings = context.settings
        source = context.source
        folder = context.folder
        take_over(optimizer, objects.network, settings, stage, source, folder)
        if objects.average is not None and stage.number > 0:
            grown = load_model(stage.averaged_start(folder))
            objects.average.fill(dict(grown.named_parameters()))
    else:
        state.read(saved, objects.objective, optimizer, objects.averaged)
