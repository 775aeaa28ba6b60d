"""LiGO (2303.00980): the maps of a growth are parameters, learned by the training loss, its source frozen.

    W' = B (Σ_j w_j W_j) Aᵀ

B and A are the maps of a tensor's axes as matrices, w the weights of the source's layers. They start at a
fixed plan's maps (a gain at the index that is copied, the mean as 1/n each), so that the loss begins where
that operator's does. The rows that hold the source's own indices stay; all others learn. Over the residual
stream one map for each side serves the whole network, over heads and feed-forward units one for each layer.
Both models are in memory, and the maps with AdamW's moments. A growth that was stopped goes on from the state
that it kept (`maps_state.py`).

Shapes:
    n, N: one axis of a source tensor, and of the target's
    b, t: windows of text in a batch, and the tokens of each
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from outgrow.growth.decision import Step, source_names
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.learned.kept import Kept
from outgrow.growth.learned.lessons import Ligo
from outgrow.growth.learned.maps_state import MapsState
from outgrow.growth.learned.matrices import mapped
from outgrow.growth.learned.on_disk import Values, Written
from outgrow.growth.learned.text import Calibration
from outgrow.growth.origin import Origin, of_axis
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import empty_model, stored_names
from outgrow.model.family import has_schema
from outgrow.model.geometry import flops_per_token
from outgrow.model.notation import Axis, Space, spaces

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARMUP = 10  # steps
# Spaces whose maps stay: their indices are told apart by what they mean.
UNLEARNED = ("vocab", "pos", "expert")

_MapKey = tuple[int, int | None]  # (which axis map it is, its layer: None where all share it)
_Numbers = tuple[list[int | None], int | None]  # (of a tensor's maps, of its layers' weights)


def _stays(axis: Axis) -> bool:
    """Check whether the map of an axis is not learned."""
    named = {space.name for space in spaces(axis)}
    return not named.isdisjoint(UNLEARNED)


def matrix_of(axis: AxisMap) -> Tensor:
    """(N, n) of an axis map, float64; what it draws fresh is zero."""
    rows = np.zeros((axis.target, axis.source))
    copies = np.flatnonzero(axis.copies)
    gains = axis.gain[:, None]
    index = axis.index[copies]
    rows[copies, index] = axis.gain[copies]
    is_mean = axis.fill == Fill.MEAN
    mean_gains = gains[is_mean]
    rows[is_mean] = mean_gains / axis.source
    return torch.from_numpy(rows)


def _offset(step: Step) -> float:
    """The amount by which a tensor's entries are stored too low: 1 of Gemma's norm scales."""
    return 0.0 if step.tensor.is_bias else step.tensor.line.offset


class Learner(nn.Module):
    """The maps and the weights of layers; `grown` makes the target's weights of them.

    Raises (on making):
        UserError: the plan has what no such map says.
    """

    def __init__(self, plan: Plan, values: Values, start: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.plan = plan
        self.dtype = dtype
        self._values = values
        takes_next = any(step.next_source for step in plan.steps)
        if plan.recipe.diagonal or takes_next:
            raise UserError("ligo: a map of one axis at a time starts it; choose another growth.width")
        self.maps = nn.ParameterList()
        self.layers = nn.ParameterList()
        self._frozen: dict[int, Tensor] = {}  # number of a map → (N, 1), 1 where a row learns
        self._of: dict[str, _Numbers] = {}  # by tensor
        self._source: dict[str, Tensor] = {}
        numbers: dict[_MapKey, int] = {}
        drawn = torch.Generator().manual_seed(plan.growth.seed)
        for step in plan.steps:
            dims = range(len(step.maps))
            own = [self._number(step, dim, numbers, start, drawn) for dim in dims]
            weights = self._weights(step)
            self._of[step.name] = (own, weights)

    def _number(
        self, step: Step, dim: int, numbers: dict[_MapKey, int], start: str, drawn: Any
    ) -> int | None:
        """The number of the map of an axis; None where it stays."""
        axis = step.maps[dim]
        tensor = step.tensor
        named = tensor.axes[dim]
        if axis.is_identity or _stays(named):
            return None
        shared = isinstance(named, Space) and named.name == "residual"
        layer = None if shared else tensor.layer
        key = (id(axis), layer)
        if key not in numbers:
            numbers[key] = len(self.maps)
            self._add(axis, start, drawn)
        return numbers[key]

    def _add(self, axis: AxisMap, start: str, drawn: Any) -> None:
        """Add the map of an axis to those that learn, at its start."""
        rows = matrix_of(axis)
        is_new = of_axis(axis) != Origin.ORIGINAL
        learns = torch.from_numpy(is_new)[:, None]
        if start == "random":
            fresh = torch.randn(rows.shape, generator=drawn, dtype=torch.float64)
            start_rows = fresh / sqrt(axis.source)
            rows = torch.where(learns, start_rows, rows)
        number = len(self.maps)
        self._frozen[number] = learns.to(self.dtype)
        parameter = nn.Parameter(rows.to(self.dtype))
        self.maps.append(parameter)

    def _weights(self, step: Step) -> int | None:
        """The number of the weights of a tensor's source layers; its source tensors are read."""
        names = self._names(step)
        for name in names:
            if name not in self._source:
                values = self._values(name)
                self._source[name] = self._fixed(step, values)
        if step.tensor.layer is None:
            return None
        sources = [name for name in (step.source, step.beside) if name is not None]
        own = [names.index(name) for name in sources]
        weights = torch.zeros(len(names), dtype=self.dtype)
        count = max(1, len(own))
        weights[own] = 1 / count
        self.layers.append(nn.Parameter(weights))
        return len(self.layers) - 1

    def _names(self, step: Step) -> list[str]:
        """The source tensors of a step, of every layer that has it."""
        return source_names(step.tensor, self.plan.growth, self.plan.layers)

    def _fixed(self, step: Step, values: np.ndarray) -> Tensor:
        """A source tensor grown along the axes whose maps stay."""
        axes = zip(step.maps, step.tensor.axes, strict=True)
        for dim, (axis, named) in enumerate(axes):
            if _stays(named) and not axis.is_identity:
                rows = mapped(np.moveaxis(values, dim, 0), axis)
                values = np.moveaxis(rows, 0, dim)
        true_values = values + _offset(step)
        contiguous = np.ascontiguousarray(true_values)
        return torch.from_numpy(contiguous).to(self.dtype)

    def grown(self) -> Iterator[tuple[str, Tensor]]:
        """The target's weights: (stored name, tensor)."""
        for step in self.plan.steps:
            maps, layers = self._of[step.name]
            sources = [self._source[name] for name in self._names(step)]
            value = sources[0]
            if layers is not None:
                weights = zip(self.layers[layers], sources, strict=True)
                value = sum((weight * source for weight, source in weights), 0.0 * value)
            for dim, number in enumerate(maps):
                if number is not None:
                    own = self.maps[number]
                    value = torch.tensordot(own, value, ([1], [dim]))
                    value = value.movedim(0, dim)
            yield step.name, value - _offset(step)

    def keep_originals(self) -> None:
        """Take the gradient off the rows that stay."""
        for number, rows in enumerate(self.maps):
            if rows.grad is not None:
                rows.grad *= self._frozen[number]

    @property
    def flops(self) -> float:
        """FLOPs of making the weights once."""
        total = 0.0
        for step in self.plan.steps:
            maps, layers = self._of[step.name]
            first_name = self._names(step)[0]
            first_source = self._source[first_name]
            size = list(first_source.shape)
            if layers is not None:
                count = len(self.layers[layers])
                total += 2.0 * prod(size) * count
            for dim, number in enumerate(maps):
                if number is not None:
                    width = step.shape[dim]
                    total += 2.0 * prod(size) * width
                    size[dim] = step.shape[dim]
        return total


def _next_token_loss(model: nn.Module, parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each next token of `tokens` (b, t), in nats, under these parameters."""
    inputs = {"input_ids": tokens, "use_cache": False}
    out = torch.func.functional_call(model, parameters, kwargs=inputs)
    logits = out.logits[:, :-1]
    predictions = logits.flatten(0, 1)
    following = tokens[:, 1:].flatten()
    return nn.functional.cross_entropy(predictions, following)


def learn_maps(
    plan: Plan,
    lesson: Ligo,
    values: Values,
    written: Written,
    text: Calibration,
    kept: Kept,
    progress: Callable[[float, float], None],
) -> dict[str, Any]:
    """Learn the maps of a plan on text and write the weights that they make; return what it took.

    Args:
        progress: called with (FLOPs done, FLOPs in all).

    Raises:
        UserError: the loss is not finite.
    """
    dtypes = {stored.dtype for stored in written.tensors.values()}
    dtype = torch.float64 if "F64" in dtypes else torch.float32
    learner = Learner(plan, values, lesson.start, dtype)
    model = empty_model(plan.target_config, dtype=dtype)
    model.eval()
    names = _stored_names(model, plan)
    learned = learner.parameters()
    optimizer = torch.optim.AdamW(learned, lesson.learning_rate, weight_decay=0.0)
    length = text.fit.shape[1]
    rows = max(1, lesson.batch_tokens // length)
    state = MapsState(kept)
    losses = state.restore(optimizer)
    of_passes = flops_per_token(plan.target_config, length) * rows * length
    of_weights = 3 * learner.flops
    flops = of_passes + of_weights  # of a step
    paid = flops * lesson.steps
    progress(flops * len(losses), paid)
    for step in range(len(losses), lesson.steps):
        tokens = _batch(text.fit, step, rows)
        weights = dict(learner.grown())
        parameters = {name: weights[stored] for name, stored in names.items()}
        loss = _next_token_loss(model, parameters, tokens)
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise UserError(f"ligo: the loss is {losses[-1]} at step {step}; lower growth.learning_rate")
        optimizer.zero_grad()
        loss.backward()
        learner.keep_originals()
        group = optimizer.param_groups[0]
        group["lr"] = _rate(lesson, step)
        optimizer.step()
        state.save(optimizer, losses)
        progress(flops * len(losses), paid)
    with torch.no_grad():
        for name, tensor in learner.grown():
            written.write(name, tensor.numpy())
    read = lesson.steps * rows * length
    return {"steps": lesson.steps, "tokens_read": read, "losses": losses, "flops": paid}


def _stored_names(model: PreTrainedModel, plan: Plan) -> dict[str, str]:
    """Parameter → the name that it is stored under."""
    if has_schema(plan.target_config):
        return stored_names(model)
    return {name: name for name, _ in model.named_parameters()}


def _batch(windows: np.ndarray, step: int, rows: int) -> Tensor:
    """(b, t) the next windows of a text that is read again and again."""
    first = step * rows
    last = first + rows
    numbers = np.arange(first, last)
    wrapped = numbers % len(windows)
    return torch.from_numpy(windows[wrapped])


def _rate(lesson: Ligo, step: int) -> float:
    """The learning rate of a step: it rises over `WARMUP` steps, and falls to zero throughout."""
    rise = min(1.0, (step + 1) / WARMUP)
    rest = 1 - step / lesson.steps
    return lesson.learning_rate * rise * rest
