"""The matrices of a target that are fitted, each with what the source's own says of it.

Shapes: see `growth.learned.squares`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from outgrow.growth.decision import Step
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.learned.on_disk import Values
from outgrow.growth.plan import Plan
from outgrow.model.family import Tensor


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of the target, its bias as one more column, and what it is fitted to.

    Attributes:
        outputs: the map of its outputs.
        shifts: that of its bias.
        share: of the source's outputs that it is to give.
    """

    weight: Step
    bias: Step | None
    outputs: AxisMap
    shifts: AxisMap | None
    share: float

    @property
    def source(self) -> str:
        assert self.weight.source is not None
        return self.weight.source

    def joined(self, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """(outputs, inputs) of a stored weight and its bias."""
        rows = self._by_output(weight)
        if bias is None:
            return rows
        return _with_column(rows, bias)

    def parted(self, rows: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
        """(parameter, stored name, values) of the weight and its bias, as they are stored."""
        weight = rows
        if self.bias is not None:
            weight = rows[:, :-1]
        stored = self._by_output(weight)
        yield "weight", self.weight.name, stored
        if self.bias is not None:
            shift = rows[:, -1]
            yield "bias", self.bias.name, shift

    def _by_output(self, weight: np.ndarray) -> np.ndarray:
        """Turn a weight as stored into (outputs, inputs), or back."""
        stored_by_input = self.weight.tensor.reads[0]
        return weight.T if stored_by_input else weight

    def targets(self, values: Values) -> np.ndarray:
        """(outputs, source inputs): the source's rows as the target's, as large a share as is wanted."""
        weight = values(self.source)
        source = self._by_output(weight)
        rows = mapped(source, self.outputs)
        bias = None if self.bias is None else self.bias.source
        if bias is not None and self.shifts is not None:
            entries = values(bias)
            column = mapped(entries[:, None], self.shifts)
            rows = _with_column(rows, column[:, 0])
        return self.share * rows


def _with_column(rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Append one column: (o, i), (o,) → (o, i + 1)."""
    last = column[:, None]
    return np.concatenate([rows, last], 1)


def mapped(rows: np.ndarray, axis: AxisMap) -> np.ndarray:
    """Copy or average rows as a map says; what it draws is zero here."""
    is_mean = axis.fill == Fill.MEAN
    is_drawn = ~(axis.copies | is_mean)
    index = np.where(axis.copies, axis.index, 0)
    target_rows = rows[index]
    target_rows[is_mean] = rows.mean(0)
    target_rows[is_drawn] = 0
    gains = axis.gain[:, None]
    return target_rows.astype(np.float64) * gains


def matrices(plan: Plan) -> dict[str, Matrix]:
    """Every matrix that is fitted, by the name of its weight: not those of layers that start as the
    identity."""
    layers = plan.layers
    steps = {step.name: step for step in plan.steps}
    recipe = plan.recipe.spaces_only()
    share_of = _shares(plan)
    fitted = {}
    for step in plan.steps:
        tensor = step.tensor
        is_idle = tensor.layer is not None and layers.identity[tensor.layer]
        if step.source is None or is_idle or not _is_matrix(tensor):
            continue
        module = step.name.removesuffix("weight")
        bias = steps.get(f"{module}bias")
        shifts = None
        if bias is not None and bias.source is None:
            bias = None
        if bias is not None:
            shifts = recipe.maps(bias.tensor)[0]
        maps = recipe.maps(tensor)
        written_axis = tensor.reads.index(False)
        outputs = maps[written_axis]
        share = share_of(tensor)
        fitted[step.name] = Matrix(step, bias, outputs, shifts, share)
    return fitted


def _is_matrix(tensor: Tensor) -> bool:
    """Check for a linear layer's weight, which reads one axis and writes another."""
    reads_once = sorted(tensor.reads) == [False, True]
    return reads_once and tensor.line.kind == "linear"


def _shares(plan: Plan) -> Callable[[Tensor], float]:
    """The share of the source's output that each matrix is to give: of those that write to the residual
    stream, one for each working copy of the source's layer; their shares sum to 1.
    """
    layers = plan.layers
    family = plan.family
    pairs = zip(layers.layers, layers.identity, strict=True)
    copies = Counter(layer for layer, idle in pairs if not idle)
    # Post norms undo any factor before them.
    is_normed = any(line.kind == "post norm" for line in family.lines)

    def share(tensor: Tensor) -> float:
        if tensor.layer is None or is_normed:
            return 1.0
        if not family.writes_residual(tensor):
            return 1.0
        source_layer = layers.layers[tensor.layer]
        return 1 / copies[source_layer]

    return share
