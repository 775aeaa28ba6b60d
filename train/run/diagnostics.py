"""Diagnostics of copies and new entries while a run trains (train.diagnostics_every_tokens): after the first
step of a stage, and every so often. What they see is in train/run/symmetry.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from outgrow.growth.record import recorded_plan
from outgrow.model.build import stored_names
from outgrow.model.conversion import in_file
from outgrow.model.family import family_of, has_schema
from outgrow.train.machine.distribute import gather
from outgrow.train.run.symmetry import Row, copy_cosines, norms, unit_axes, unit_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from outgrow.growth.plan import Plan
    from outgrow.model import family
    from outgrow.train.run.clock import Meter
    from outgrow.train.settings import Budget
    from outgrow.train.start.stages import Stage

RECIPE = "growth.json"
NO_ORIGINS = (
    "train.diagnostics_every_tokens: these weights came of no growth, so there are no copies and no origins "
    "to tell apart"
)
NO_UNITS = "train.diagnostics_every_tokens: which hidden units an MLP has is not known of this class"


class Diagnostics:
    """Looks at the network of a stage after some of its steps.

    Of a sharded network tensors are put together one by one, for which every process has to take part; else
    one process looks.

    Args:
        start: the folder that the network was loaded from; None where it was built from nothing.

    Attributes:
        row: of the last step, where that was looked at; else empty.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        stage: Stage,
        start: Path | None,
        budget: Budget,
        clock: Meter,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.stage = stage
        self.budget = budget
        self.clock = clock
        self.row: Row = {}
        self.plan = plan_of(start)
        tensors = tensors_of(self.plan, stage)
        self.units = unit_axes(tensors)

    @property
    def remarks(self) -> Iterator[str]:
        """Lines on what cannot be told of this network."""
        if self.plan is None:
            yield NO_ORIGINS
        if not self.units:
            yield NO_UNITS

    def due(self, number: int) -> bool:
        """Check whether a step, counted from 1, is looked at."""
        first = self.stage.first + 1
        return number == first or self.budget.due(self.budget.diagnostics_every, number)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Look at what the block changes, the optimizer step of that number, if it is to be looked at."""
        self.row = {}
        if not self.due(number):
            yield
            return
        before: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}

        def keep(*_: Any) -> None:
            for name, weight in self.network.named_parameters():
                before[name] = weight.detach().clone()
                gradient = weight.grad
                gradients[name] = torch.zeros_like(weight) if gradient is None else gradient

        hook = self.optimizer.register_step_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()
        with self.clock.paused(), torch.no_grad():
            self.row = self._look(before, gradients)

    def _look(self, before: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Row:
        after = dict(self.network.named_parameters())
        weights = self._stored(after)
        row = norms(self.plan, self._stored(before), weights)
        if self.plan is not None:
            row |= copy_cosines(self.plan, weights)
        return row | unit_counts(self.units, self.plan, weights, self._stored(gradients))

    def _stored(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole tensors by their names in a file; of a class with a schema each is put together when it is
        asked for, of others all at once.
        """
        config = self.stage.config
        if has_schema(config):
            names = stored_names(self.network)
            return Whole({names[name]: tensor for name, tensor in tensors.items()})
        parts = {name: gather(tensor) for name, tensor in tensors.items()}
        return in_file(config, parts)


def plan_of(start: Path | None) -> Plan | None:
    """The plan of the growth that made the folder `start`; None where none did.

    Raises:
        UserError: the folder's record gives no plan.
    """
    if start is None or not (start / RECIPE).is_file():
        return None
    return recorded_plan(start)


def tensors_of(plan: Plan | None, stage: Stage) -> Iterable[family.Tensor]:
    """The tensors of a stage's network, by its plan, else by its class's schema; none where it has none."""
    if plan is not None:
        return [step.tensor for step in plan.steps]
    if not has_schema(stage.config):
        return []
    return family_of(stage.config).tensors(stage.config)


class Whole(Mapping[str, Tensor]):
    """Tensors of which each is put together from its shards when it is asked for."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Tensor:
        return gather(self.parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)
