"""Copies and new entries of a grown network while it trains (train.diagnostics_every_tokens): whether the
symmetry of copies breaks, and whether new dims wake up.

After a step that is looked at, from the weights before and after it and its gradient:

    weight_rms, update_rms   root mean square of the weights, and of what the step changed; also of `original`
                             (the source's own), `copy` (a further copy of one) and `new` entries
    copy_cosine/KIND         mean cosine between copies and the first of them: `layer` and `expert`, of whole
                             matrices; `SPACE_written` and `SPACE_read`, of rows or columns of a matrix
    dead_units               hidden units of MLPs whose weights, in and out, got a gradient of exactly zero
                             from the whole batch; also by the units' origin
    unread_units             hidden units whose outgoing weights are all zero

each with `/layer_N` for one layer. Origins are those of the entries in the growth's plan, which the start's
folder records; a network that was built from nothing has none.

Shapes: tensors are as the file has them; the axis that is looked along is taken to the front, (unit, rest).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from outgrow.growth.expansion import AxisMap
from outgrow.growth.origin import Origin, axis_origins, origins
from outgrow.model.notation import Axis, Parts, Space, spaces

if TYPE_CHECKING:
    from outgrow.growth.decision import Step
    from outgrow.growth.plan import Plan
    from outgrow.model import family

UNITS = ("ffn", "unit", "shared")  # spaces of hidden units: of an MLP, a routed and a shared expert
Row = dict[str, float]


def in_layers(kind: str, layer: int | None) -> tuple[str, ...]:
    """The keys under which a measurement counts: over all, and in its layer."""
    if layer is None:
        return (kind,)
    return kind, f"{kind}/layer_{layer}"


def layer_of(name: str) -> int | None:
    """The layer that the name of a tensor tells: its first number."""
    number = re.search(r"\.(\d+)\.", name)
    return None if number is None else int(number[1])


def by_name(plan: Plan | None) -> dict[str, Step]:
    """The steps of a plan by the target tensor's name."""
    if plan is None:
        return {}
    return {step.name: step for step in plan.steps}


# ---- norms -------------------------------------------------------------------------------------------------


def norms(plan: Plan | None, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Row:
    """Root mean squares of weights and of a step's change, by origin and by layer."""
    squares: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    steps = by_name(plan)
    for name in after:
        weight = after[name].double()
        change = weight - before[name]
        parts = {"weight_rms": weight.square(), "update_rms": change.square()}
        layer = layer_of(name)
        masks = origin_masks(plan, steps.get(name), weight)
        for label, mask in masks.items():
            entries = int(mask.sum())
            for kind, square in parts.items():
                total = float(square[mask].sum())
                for key in in_layers(kind + label, layer):
                    squares[key] += total
                    counts[key] += entries
    row = {}
    for key, count in counts.items():
        if count:
            mean_square = squares[key] / count
            row[key] = mean_square**0.5
    return row


def origin_masks(plan: Plan | None, step: Step | None, weight: Tensor) -> dict[str, Tensor]:
    """Masks of all entries ("") and of those of each origin (`/copy`), in the tensor's shape."""
    masks = {"": torch.ones_like(weight, dtype=torch.bool)}
    if plan is not None and step is not None:
        origin_of = torch.from_numpy(origins(plan, step)).to(weight.device)
        for origin in Origin:
            label = origin.name.lower()
            masks[f"/{label}"] = origin_of == origin
    return masks


# ---- copies ------------------------------------------------------------------------------------------------


def copy_cosines(plan: Plan, weights: Mapping[str, Tensor]) -> Row:
    """Mean cosines between copies and the first of them, by kind and by layer; zeros have no direction and do
    not count.
    """
    cosines: dict[str, list[Tensor]] = defaultdict(list)
    firsts: dict[str, list[Step]] = defaultdict(list)
    for step in plan.steps:
        source = step.source
        layer = step.tensor.layer
        is_measured = len(step.shape) > 1 and step.name in weights
        if source is None or not is_measured:
            continue
        weight = weights[step.name].float()
        of_units = unit_cosines(plan, step, weight)
        for kind, pairs in of_units.items():
            for key in in_layers(kind, layer):
                cosines[key].append(pairs)
        if step.beside is not None:  # the mean of two layers is a copy of neither
            continue
        same = (other for other in firsts[source] if same_maps(other, step))
        first = next(same, None)
        if first is None:
            firsts[source].append(step)
            continue
        kind = "layer" if first.tensor.layer != layer else "expert"
        original = weights[first.name].float()
        pair = cosine(weight.reshape(1, -1), original.reshape(1, -1))
        for key in in_layers(f"copy_cosine/{kind}", layer):
            cosines[key].append(pair)
    row = {}
    for key, parts in cosines.items():
        values = torch.cat(parts)
        if len(values):
            row[key] = float(values.mean())
    return row


def unit_cosines(plan: Plan, step: Step, weight: Tensor) -> dict[str, Tensor]:
    """The cosine of each copied row or column of a tensor with the first copy, by kind."""
    cosines: dict[str, Tensor] = {}
    for axis, grown in enumerate(step.maps):
        copies, originals = copied_pairs(grown)
        if len(copies):
            units = weight.movedim(axis, 0).flatten(1)
            kind = axis_kind(plan, step, axis)
            cosines[f"copy_cosine/{kind}"] = cosine(units[copies], units[originals])
    return cosines


def copied_pairs(grown: AxisMap) -> tuple[np.ndarray, np.ndarray]:
    """The target indices of further copies, and for each the index of the first copy: (copies,) both."""
    is_first = grown.number() == 0
    originals = np.flatnonzero(grown.copies & is_first)
    further = np.flatnonzero(grown.copies & ~is_first)
    first = np.zeros(grown.source, np.int64)  # of each source index
    first[grown.index[originals]] = originals
    origins = grown.index[further]
    return further, first[origins]


def axis_kind(plan: Plan, step: Step, axis: int) -> str:
    """The spaces of an axis that grow, and the side on which the matrix touches them: `ffn_written`."""
    tensor = step.tensor
    on_axis = spaces(tensor.axes[axis])
    named = [space.name for space in on_axis]
    growing = [name for name in named if plan.growth.grows(name)]
    once = dict.fromkeys(growing or named)
    side = "read" if tensor.sums_over(axis) else "written"
    return "_".join([*once, side])


def same_maps(one: Step, other: Step) -> bool:
    """Check whether two steps take the same entries of their source."""
    pairs = zip(one.maps, other.maps, strict=True)
    return all(ours == theirs for ours, theirs in pairs)


def cosine(ones: Tensor, others: Tensor) -> Tensor:
    """The cosine of each pair of rows, without pairs of which one is zero.

    (pairs, rest) twice → (≤ pairs,)
    """
    products = (ones * others).sum(dim=1)
    length = ones.norm(dim=1)
    other_length = others.norm(dim=1)
    lengths = length * other_length
    nonzero = lengths > 0
    return products[nonzero] / lengths[nonzero]


# ---- hidden units ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitAxis:
    """The axis of a tensor along which the hidden units of an MLP lie, as many times as it has `parts`."""

    name: str
    axis: int
    parts: int
    reads: bool  # the units, so that they come out through it


def unit_axes(tensors: Iterable[family.Tensor]) -> dict[str, list[UnitAxis]]:
    """The axes of hidden units, by the module that writes and reads them."""
    modules: dict[str, list[UnitAxis]] = defaultdict(list)
    for tensor in tensors:
        name = tensor.name
        module = name.rsplit(".", 2)[0]
        for number, axis in enumerate(tensor.axes):
            parts = unit_parts(axis)
            if parts:
                reads = tensor.sums_over(number)
                modules[module].append(UnitAxis(name, number, parts, reads))
    written_and_read = {}
    for module, axes in modules.items():
        sides = {unit_axis.reads for unit_axis in axes}
        if sides == {True, False}:
            written_and_read[module] = axes
    return written_and_read


def unit_parts(axis: Axis) -> int:
    """Count how many times the hidden units lie along an axis, end to end; 0 for another axis."""
    own = axis.parts if isinstance(axis, Parts) else (axis,)
    are_units = [isinstance(part, Space) and part.name in UNITS for part in own]
    return len(own) if all(are_units) else 0


def unit_counts(
    modules: Mapping[str, list[UnitAxis]],
    plan: Plan | None,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> Row:
    """Count the hidden units that are dead and those that are unread, by layer and by origin."""
    counts: Row = defaultdict(int)
    steps = by_name(plan)
    for module, axes in modules.items():
        origin_of = None if plan is None else unit_origins(plan, steps, axes)
        reading = [axis for axis in axes if axis.reads]
        idle = {
            "dead_units": ~any_unit(gradients, axes),
            "unread_units": ~any_unit(weights, reading),
        }
        layer = layer_of(f"{module}.")
        for kind, units in idle.items():
            for key in in_layers(kind, layer):
                counts[key] += int(units.sum())
            if origin_of is None:
                continue
            for origin in Origin:
                alike = units.cpu() & (origin_of == origin)
                label = origin.name.lower()
                counts[f"{kind}/{label}"] += int(alike.sum())
    return dict(counts)


def unit_origins(plan: Plan, steps: Mapping[str, Step], axes: Iterable[UnitAxis]) -> Tensor:
    """The origin of each hidden unit of a module, by a tensor that writes them: (units,)."""
    writer = next(axis for axis in axes if not axis.reads)
    by_axis = axis_origins(plan, steps[writer.name])
    along = by_axis[writer.axis]
    parts = along.reshape(writer.parts, -1)
    return torch.from_numpy(parts.min(axis=0))


def any_unit(tensors: Mapping[str, Tensor], axes: Iterable[UnitAxis]) -> Tensor:
    """Mark the hidden units of which any entry is not zero, in any of the tensors: bool (units,)."""
    reached = []
    for axis in axes:
        tensor = tensors[axis.name]
        count = tensor.shape[axis.axis]
        in_front = tensor.movedim(axis.axis, 0)
        rows = in_front.reshape(count, -1)  # (part × unit, rest)
        nonzero = (rows != 0).any(dim=1)
        by_part = nonzero.reshape(axis.parts, -1)
        reached.append(by_part.any(dim=0))
    return torch.stack(reached).any(dim=0)
