"""Origins: the entries of a grown tensor that are the source's own, copies of them, or new.

Training uses them to freeze what was inherited (LLaMA Pro, 2401.02415), to give new entries a learning rate
of their own, and to reset the optimizer's state on one side only (SPARKLING, 2602.02472).
"""

from __future__ import annotations

from enum import IntEnum
from functools import reduce

import numpy as np

from outgrow.growth.decision import Step
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.plan import Plan


class Origin(IntEnum):
    """The origin of an entry; of an entry's axes the least counts."""

    NEW = 0  # fresh, zero or a mean; also every entry of a layer that starts as the identity, or as a mean
    COPY = 1  # a further copy of a source entry that an earlier target entry holds
    ORIGINAL = 2  # the first copy


def axis_origins(plan: Plan, step: Step) -> tuple[np.ndarray, ...]:
    """Compute one (N,) uint8 array of `Origin` per stored axis; an entry's origin is the least over its
    axes."""
    is_new = step.source is None or step.zero
    if is_new or _is_new_layer(plan, step):
        return tuple(np.zeros(axis.target, np.uint8) for axis in step.maps)
    origins = tuple(map(of_axis, step.maps))
    repeats = plan.change is not None and plan.change.repeats(step)
    if repeats or _is_repeated_layer(plan, step):
        copy = np.uint8(Origin.COPY)
        return tuple(np.minimum(origin, copy) for origin in origins)
    return origins


def origins(plan: Plan, step: Step) -> np.ndarray:
    """Compute every entry's `Origin`, uint8, in the target tensor's shape."""
    return reduce(np.minimum.outer, axis_origins(plan, step))


def of_axis(axis: AxisMap) -> np.ndarray:
    """(N,) the `Origin` of each target index of one axis, uint8."""
    from_next = axis.fill == Fill.NEXT
    inherited = axis.copies | from_next
    first = axis.copies & (axis.number() == 0)
    origins = np.where(inherited, Origin.COPY, Origin.NEW)
    origins = np.where(first, Origin.ORIGINAL, origins)
    return origins.astype(np.uint8)


def _is_new_layer(plan: Plan, step: Step) -> bool:
    number = step.tensor.layer
    layers = plan.layers
    if number is None:
        return False
    return layers.identity[number] or number in layers.between


def _is_repeated_layer(plan: Plan, step: Step) -> bool:
    """Check whether the source layer works in an earlier target layer already."""
    number = step.tensor.layer
    sources = plan.layers.layers
    if number is None:
        return False
    return sources[number] in sources[:number]
