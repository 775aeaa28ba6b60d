"""LiGO (2303.00980): the maps of a growth are parameters, learned by the training loss, its source frozen.

    W' = B (Σ_j w_j W_j) Aᵀ

B and A are the maps of a tensor's axes as matrices, w the weights of the source's layers. They start at a
fixed plan's maps (a gain at the index that is copied, the mean as 1/n each), so that the loss begins where
that operator's does. The rows that hold the source's own indices stay; all others learn. Over the residual
stream one map for each side serves the whole network, over heads and feed-forward units one for each layer.
Both models are in memory, and the maps with AdamW's moments; a run that was stopped begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from outgrow.growth.decision import Step, source_name
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.learned.lessons import Ligo
from outgrow.growth.learned.on_disk import Values, Written
from outgrow.growth.learned.squares import mapped
from outgrow.growth.learned.text import Calibration
from outgrow.growth.origin import Origin, of_axis
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import empty_model, stored_names
from outgrow.model.family import has_schema
from outgrow.model.geometry import flops_per_token
from outgrow.model.notation import Space, spaces

WARMUP = 10  # steps
UNLEARNED = (
    "vocab",
    "pos",
    "expert",
)  # spaces whose maps stay: their indices are told apart by what they mean


def matrix_of(axis: AxisMap) -> Tensor:
    """(N, n) of an axis map, float64; what it draws fresh is zero."""
    rows = np.zeros((axis.target, axis.source))
    copies = np.flatnonzero(axis.copies)
    rows[copies, axis.index[copies]] = axis.gain[copies]
    mean = axis.fill == Fill.MEAN
    rows[mean] = axis.gain[mean, None] / axis.source
    return torch.from_numpy(rows)


class Learner(nn.Module):
    """The maps and the weights of layers; `grown` makes the target's weights of them.

    Raises (on making):
        UserError: the plan has what no such map says.
    """

    def __init__(self, plan: Plan, values: Values, start: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.plan, self._values, self.dtype = plan, values, dtype
        if plan.recipe.diagonal or any(step.next_source for step in plan.steps):
            raise UserError("ligo: a map of one axis at a time starts it; choose another growth.width")
        self.maps, self.layers = nn.ParameterList(), nn.ParameterList()
        self._frozen: dict[int, Tensor] = {}  # number of a map → (N, 1), 1 where a row learns
        self._of: dict[
            str, tuple[list[int | None], int | None]
        ] = {}  # tensor → its maps, its layers' weights
        self._source: dict[str, Tensor] = {}
        numbers: dict[tuple[int, int | None], int] = {}
        drawn = torch.Generator().manual_seed(plan.growth.seed)
        for step in plan.steps:
            own = [self._number(step, place, numbers, start, drawn) for place in range(len(step.maps))]
            self._of[step.name] = (own, self._weights(step))

    def _number(
        self, step: Step, place: int, numbers: dict[tuple[int, int | None], int], start: str, drawn: Any
    ) -> int | None:
        """The number of the map of an axis; None where it stays."""
        axis, named = step.maps[place], step.tensor.axes[place]
        if axis.is_identity or {space.name for space in spaces(named)} & set(UNLEARNED):
            return None
        shared = isinstance(named, Space) and named.name == "residual"
        key = (id(axis), None if shared else step.tensor.layer)
        if key not in numbers:
            numbers[key] = len(self.maps)
            rows, learns = matrix_of(axis), torch.from_numpy(of_axis(axis) != Origin.ORIGINAL)[:, None]
            if start == "random":
                fresh = torch.randn(rows.shape, generator=drawn, dtype=torch.float64) / sqrt(axis.source)
                rows = torch.where(learns, fresh, rows)
            self._frozen[numbers[key]] = learns.to(self.dtype)
            self.maps.append(nn.Parameter(rows.to(self.dtype)))
        return numbers[key]

    def _weights(self, step: Step) -> int | None:
        """The number of the weights of a tensor's source layers; its source tensors are read."""
        names = self._names(step)
        for name in names:
            if name not in self._source:
                self._source[name] = self._fixed(step, self._values(name))
        if step.tensor.layer is None:
            return None
        own = [names.index(name) for name in (step.source, step.beside) if name is not None]
        weights = torch.zeros(len(names), dtype=self.dtype)
        weights[own] = 1 / max(1, len(own))
        self.layers.append(nn.Parameter(weights))
        return len(self.layers) - 1

    def _names(self, step: Step) -> list[str]:
        """The source tensors of a step, of every layer that has it."""
        tensor, plan = step.tensor, self.plan
        if tensor.layer is None:
            return [source_name(tensor, plan.growth, None)]
        having = range(plan.layers.source) if tensor.line.only is None else sorted(tensor.line.only)
        return [source_name(tensor, plan.growth, layer) for layer in having]

    def _fixed(self, step: Step, values: np.ndarray) -> Tensor:
        """A source tensor grown along the axes whose maps stay."""
        for place, (axis, named) in enumerate(zip(step.maps, step.tensor.axes, strict=True)):
            if {space.name for space in spaces(named)} & set(UNLEARNED) and not axis.is_identity:
                values = np.moveaxis(mapped(np.moveaxis(values, place, 0), axis), 0, place)
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype)

    def grown(self) -> Iterator[tuple[str, Tensor]]:
        """The target's weights: (stored name, tensor)."""
        for step in self.plan.steps:
            maps, layers = self._of[step.name]
            sources = [self._source[name] for name in self._names(step)]
            value = sources[0]
            if layers is not None:
                weights = self.layers[layers]
                value = sum(
                    (weight * each for weight, each in zip(weights, sources, strict=True)), 0.0 * value
                )
            for place, number in enumerate(maps):
                if number is not None:
                    value = torch.tensordot(self.maps[number], value, ([1], [place])).movedim(0, place)
            yield step.name, value

    def keep_originals(self) -> None:
        """Take the gradient off the rows that stay."""
        for number, rows in enumerate(self.maps):
            if rows.grad is not None:
                rows.grad *= self._frozen[number]

    @property
    def flops(self) -> float:
        """Of making the weights once."""
        total = 0.0
        for step in self.plan.steps:
            maps, layers = self._of[step.name]
            size = list(self._source[self._names(step)[0]].shape)
            total += 2.0 * prod(size) * (0 if layers is None else len(self.layers[layers]))
            for place, number in enumerate(maps):
                if number is not None:
                    total += 2.0 * prod(size) * step.shape[place]
                    size[place] = step.shape[place]
        return total


def learn_maps(
    plan: Plan,
    lesson: Ligo,
    values: Values,
    written: Written,
    text: Calibration,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Learn the maps of a plan on text and write the weights that they make; return what it took.

    Raises:
        UserError: the loss is not finite.
    """
    wide = any(stored.dtype == "F64" for stored in written.tensors.values())
    dtype = torch.float64 if wide else torch.float32
    learner = Learner(plan, values, lesson.start, dtype)
    model = empty_model(plan.target_config, dtype=dtype).eval()
    own = [name for name, _ in model.named_parameters()]
    names = stored_names(model) if has_schema(plan.target_config) else {name: name for name in own}
    optimizer = torch.optim.AdamW(learner.parameters(), lesson.learning_rate, weight_decay=0.0)
    rows, losses = max(1, lesson.batch_tokens // text.fit.shape[1]), []
    for step in range(lesson.steps):
        chosen = np.arange(step * rows, (step + 1) * rows) % len(text.fit)
        tokens = torch.from_numpy(text.fit[chosen])
        weights = dict(learner.grown())
        made = {name: weights[stored] for name, stored in names.items()}
        out = torch.func.functional_call(model, made, kwargs={"input_ids": tokens, "use_cache": False})
        loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise UserError(f"ligo: the loss is {losses[-1]} at step {step}; lower growth.learning_rate")
        optimizer.zero_grad()
        loss.backward()
        learner.keep_originals()
        rise = min(1.0, (step + 1) / WARMUP)
        optimizer.param_groups[0]["lr"] = lesson.learning_rate * rise * (1 - step / lesson.steps)
        optimizer.step()
        progress(step)
    with torch.no_grad():
        for name, tensor in learner.grown():
            written.write(name, tensor.numpy())
    read = lesson.steps * rows * text.fit.shape[1]
    paid = flops_per_token(plan.target_config, text.fit.shape[1]) * read + 3 * learner.flops * lesson.steps
    return {"steps": lesson.steps, "tokens_read": read, "losses": losses, "flops": paid}
