"""Transfer from a grown start into training: the optimizer's moments, and learning rates of single entries
and of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from outgrow.growth import load_optimizer, plan
from outgrow.growth.optimizer import fill, read_optimizer
from outgrow.growth.origin import Origin, axis_origins, origins
from outgrow.growth.record import recorded_plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import stored_names
from outgrow.model.config import read_config
from outgrow.model.family import Config, family_of, has_schema
from outgrow.model.notation import Axis, size
from outgrow.train.schedule import new_entries
from outgrow.train.settings import UNGROWN, Settings
from outgrow.train.start.source import saved_optimizer
from outgrow.train.start.stages import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from outgrow.growth.decision import Step
    from outgrow.growth.plan import Plan


# ---- entries -----------------------------------------------------------------------------------------------


class EntryRates:
    """Learning rates of inherited and new entries of one tensor, whatever the optimizer.

    After its step, an entry whose rate is a share of the step's keeps that share of its change: w = before +
    share · (after - before). What stays as it is in every entry is frozen altogether and costs neither
    gradient nor state.

    Args:
        network: whose parameters are frozen where nothing in them learns.
        inherited: by parameter name, in its shape: true where an entry came from the source.
        begun: the progress at which the new entries came.
    """

    def __init__(
        self,
        network: nn.Module,
        inherited: Mapping[str, Tensor],
        settings: Settings,
        begun: float = 0.0,
    ) -> None:
        self.settings = settings
        self.begun = begun
        self.inherited: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in network.named_parameters():
            mask = inherited[name]
            every = bool(mask.all())
            if every and settings.transfer.inherited_rate == 0.0:
                parameter.requires_grad_(False)
                continue
            if every or not mask.any():
                mask = torch.tensor(every)  # one value stands for all entries
            placed = mask.to(parameter.device)
            self.inherited.append((parameter, placed))

    @contextmanager
    def applied(self, progress: float) -> Iterator[None]:
        """Scale what the optimizer's step in the block changes, entry by entry, to the rates at
        `progress`."""
        old = self.settings.transfer.inherited_rate
        new = new_entries(self.settings.schedule, progress - self.begun)
        if old == new == 1.0:
            yield
            return
        before = [parameter.detach().clone() for parameter, _ in self.inherited]
        yield
        stepped = zip(self.inherited, before, strict=True)
        with torch.no_grad():
            for (parameter, inherited), start in stepped:
                share = torch.where(inherited, old, new).to(parameter)
                parameter.copy_(torch.lerp(start, parameter, share))


def entry_rates(
    network: PreTrainedModel,
    settings: Settings,
    stage: Stage,
    folder: Path,
) -> EntryRates | None:
    """The rates that `settings` ask for in a stage; None where every entry learns alike.

    Raises:
        UserError: nothing would learn.
    """
    full_rate = settings.transfer.inherited_rate == 1.0
    alike = full_rate and settings.schedule.rewarm != "new"
    if alike or stage.growth.operator in UNGROWN:
        return None
    growth_plan = recorded_plan(stage.start(folder))
    names = stored_names(network)
    steps = {step.name: step for step in growth_plan.steps}
    inherited = {}
    for name, _ in network.named_parameters():
        step = steps[names[name]]
        origin = origins(growth_plan, step)
        inherited[name] = torch.from_numpy(origin != Origin.NEW)
    begun = stage.first / settings.budget.steps
    rates = EntryRates(network, inherited, settings, begun)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(
            f"transfer.inherited_rate: 0 freezes everything, since growth={settings.growth.name} makes "
            "nothing new; raise it",
        )
    return rates


def frozen_tensors(
    stages: Sequence[Stage],
    settings: Settings,
    source: Path | None,
) -> dict[int, frozenset[str]]:
    """The stored tensors in which nothing learns, by the number of the stage: those that are inherited whole,
    at a rate of 0.

    A family without a schema counts as one that learns everywhere.
    """
    frozen: dict[int, frozenset[str]] = {}
    if settings.transfer.inherited_rate != 0.0:
        return frozen
    before = None if source is None else read_config(source)
    for stage in stages:
        growth = stage.growth
        config = stage.config
        grows = growth.operator not in UNGROWN and has_schema(config)
        if before is not None and grows:
            growth_plan = plan(before, config, growth.operator, seed=settings.seed, **growth.options)
            inherited = [step.name for step in growth_plan.steps if _is_inherited(growth_plan, step)]
            frozen[stage.number] = frozenset(inherited)
        before = config
    return frozen


def _is_inherited(growth_plan: Plan, step: Step) -> bool:
    """Check for a tensor in which no entry is new."""
    axes = axis_origins(growth_plan, step)
    lowest = [axis.min() for axis in axes]
    return all(origin > Origin.NEW for origin in lowest)


# ---- matrices ----------------------------------------------------------------------------------------------


def mup_rates(
    network: PreTrainedModel,
    settings: Settings,
    stage: Stage,
    source: Path | None,
) -> dict[str, float] | None:
    """Parameter → share of the learning rate, as `width_factors` has it from the source.

    None where that is not asked for.
    """
    if not settings.transfer.mup:
        return None
    assert source is not None
    return width_factors(network, read_config(source), stage.config)


def width_factors(network: PreTrainedModel, source: Config, target: Config) -> dict[str, float]:
    """Parameter → source fan-in / target fan-in, the share of the source's learning rate at which it learns
    under Adam.

    Matrices read wider inputs, so the same change of each entry moves their output further; embeddings and
    vectors read single indices (μP: Yang et al., 2203.03466, table 8).
    """
    family = family_of(target)
    source_sizes = family.sizes(source)
    target_sizes = family.sizes(target)
    factors = {}
    for tensor in family.tensors(target):
        axes = zip(tensor.axes, tensor.reads, strict=True)
        inputs = [axis for axis, reads in axes if reads]
        if tensor.line.kind != "linear":
            inputs = []
        fan_in = _entries(inputs, source_sizes)
        factors[tensor.name] = fan_in / _entries(inputs, target_sizes)
    names = stored_names(network)
    return {name: factors[stored] for name, stored in names.items()}


def _entries(axes: Sequence[Axis], sizes: Mapping[str, int]) -> int:
    """The number of entries along some axes together; 1 of none."""
    return prod(size(axis, sizes) for axis in axes)


# ---- the optimizer's state ---------------------------------------------------------------------------------


def take_over(
    optimizer: torch.optim.Optimizer,
    network: PreTrainedModel,
    settings: Settings,
    stage: Stage,
    source: Path | None,
    folder: Path,
) -> None:
    """Put moments that were grown with the weights into the optimizer of a stage that begins.

    The source's own where nothing grew.

    Raises:
        UserError: they cannot be read, or are not of the source's model.
    """
    saved = saved_optimizer(settings, source)
    takes_over = saved is not None and stage.growth.operator != "source"
    grows = stage.number > 0 and stage.rule != "reset"
    if grows or (stage.number == 0 and takes_over):
        load_optimizer(stage.start(folder), optimizer, network)
    if saved is None or stage.growth.operator != "source":
        return
    assert source is not None
    same = plan(read_config(source), {})  # of a growth that changes nothing
    state = read_optimizer(saved, same)
    moments = state.moments.tensors
    fill(optimizer, network, moments, moments.__getitem__, state.step)
