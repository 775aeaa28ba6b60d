"""The place of each stored tensor in a built model: the parameter that it becomes, axis by axis, found by
painting the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from outgrow.model.derive.probe import stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAINT = 1 << 20  # apart by more than any axis of a tiny model is long


@dataclass
class Place:
    """One stored tensor: its shape, the parameter that it becomes, and the parameter's axis for each of its
    axes.
    """

    shape: tuple[int, ...]
    parameter: str
    axes: list[int | None]


def find_places(model: PreTrainedModel) -> dict[str, Place]:
    """Find the place of each stored tensor in the model.

    Every parameter is painted with its own number plus the coordinate along one axis; what the library then
    would save shows where parameter and axis went, through whatever it splits, joins, transposes and renames.
    """
    state = _saved(model)
    names = list(state)
    tensors = list(state.values())
    originals = [tensor.detach().clone() for tensor in tensors]
    places: dict[str, Place] = {}
    most_axes = max(tensor.ndim for tensor in tensors)
    for axis in range(most_axes):
        for number, tensor in enumerate(tensors):
            _paint(tensor, number, axis)
        for name, painted in stored(model).items():
            has_paint = painted.is_floating_point() and painted.numel() > 0
            if not has_paint:
                continue
            number = _painted_number(painted, len(names))
            unknown_axes: list[int | None] = [None] * painted.ndim
            shape = tuple(painted.shape)
            unknown = Place(shape, names[number], unknown_axes)
            site = places.setdefault(name, unknown)
            for dim in _varying(painted):
                site.axes[dim] = axis
    for tensor, values in zip(tensors, originals, strict=True):
        tensor.data.copy_(values)
    return places


def _saved(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Collect the parameters and buffers that a file would hold, of floating-point numbers."""
    saved = {tensor.data_ptr() for tensor in model.state_dict().values()}
    named = parameters_and_buffers(model)
    paintable = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    return {name: tensor for name, tensor in paintable if tensor.data_ptr() in saved}


def _paint(tensor: torch.Tensor, number: int, axis: int) -> None:
    """Write into every entry of a tensor the tensor's number and the entry's place along one axis."""
    paint = number * PAINT + _coordinate(tensor, axis)
    numbered = torch.zeros_like(tensor) + paint
    tensor.data.copy_(numbered)


def _painted_number(painted: torch.Tensor, count: int) -> int:
    """Read the number of the tensor that was painted, of `count`, off its first entry."""
    first_entry = painted.flatten()[0]
    number = int(first_entry.item() // PAINT)
    return min(number, count - 1)


def _coordinate(tensor: torch.Tensor, axis: int) -> torch.Tensor | int:
    """Number the places along one axis, in a shape that broadcasts; 0 where the tensor has no such axis."""
    if axis >= tensor.ndim:
        return 0
    length = tensor.shape[axis]
    places = torch.arange(length, dtype=tensor.dtype)
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return places.reshape(shape)


def _varying(tensor: torch.Tensor) -> Iterator[int]:
    """Yield the dims along which entries differ."""
    for dim in range(tensor.ndim):
        if tensor.shape[dim] > 1:
            largest = tensor.amax(dim)
            differ = largest != tensor.amin(dim)
            if bool(differ.any()):
                yield dim


def parameters_and_buffers(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Every tensor that a model may store, by its name in the module tree."""
    parameters = model.named_parameters()
    buffers = model.named_buffers()
    return [*parameters, *buffers]
