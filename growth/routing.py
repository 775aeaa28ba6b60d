"""The certificate of a mixture of experts: whether what the experts of a token add up to is what the MLP, or
the experts, were before.

Proved from the plan's steps and the config's numbers. Of a dense MLP cut into G blocks of units, each block
must reach the output with weight 1: Σ over the chosen experts that hold it of combine weight × scale. That
needs combine weights of a known sum, whole groups of equal router rows chosen together, and a scale on the
linear factor alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose

import numpy as np

from outgrow.growth.changes import ExpertCopy
from outgrow.growth.decision import Decision, Step
from outgrow.growth.experts import FFN, Change, numbered
from outgrow.model.notation import Space


def broken_conditions(plan: Decision) -> Iterator[str]:
    """Reasons why the change of family, or of the number of experts, does not keep the function; none where
    it does.
    """
    change = plan.change
    assert isinstance(change, Change)
    yield from _needs(change)
    if isinstance(change.options, ExpertCopy):
        yield from _copies(change)
        return
    yield from _entries(plan)
    yield from _scales(plan, change)
    yield from _groups(plan, change)
    yield from _sum_of_weights(plan, change)
    yield from _coverage(change)


def _needs(change: Change) -> Iterator[str]:
    """Config values that the two classes understand differently."""
    for key, allowed in change.mixture.needs.items():
        if key not in change.config:
            continue
        if change.config[key] not in allowed:
            yield (
                f"config {key}: {change.config[key]!r} with which {change.mixture.name}'s class does not "
                "compute what the source's does"
            )


def _entries(plan: Decision) -> Iterator[str]:
    """Entries of experts that are not the MLP's."""
    finishes = [step.finish for step in plan.steps if step.finish is not None]
    redrawn = [finish.redrawn for finish in finishes if finish.redrawn is not None]
    if redrawn:
        _, units = redrawn[0]
        yield f"experts: {len(units)} units of each are drawn anew"
    if noise := max((finish.noise for finish in finishes), default=0.0):
        yield f"experts: copies carry noise of {noise:g} of each tensor's root mean square"


def _scales(plan: Decision, change: Change) -> Iterator[str]:
    """Every matrix of an expert must be its block of the MLP's; what reads the units undoes the combine
    weights, others are unscaled.
    """
    mixture = change.mixture
    dense = {step.name: step for step in change.within.steps}
    shared = {own: name for name, own in mixture.shared.items()}
    experts = {own: name for name, own in mixture.experts.items()}
    origins = set()
    for step in plan.steps:
        number = change.routed.get(step.name)
        module = step.tensor.line.name
        layer = step.tensor.layer
        expert = experts.get(numbered(step.tensor))
        origin = shared.get(module) or expert
        if origin is None or layer is None or origin in origins:
            continue
        weight = f"{origin}.weight".replace("*", str(layer))
        before = dense[weight]
        if step.zero and before.zero:
            continue
        units = before.tensor.axes.index(Space(FFN))
        reads = before.tensor.reads[units]
        start = 0
        if number is not None:
            start = change.experts[number].start
        scale = _scale(step, before, start)
        expected = _undone(change, number) if reads else 1.0
        if scale is None:
            origins.add(origin)
            yield f"{module}: is not a block of {origin}"
        elif not isclose(scale, expected, rel_tol=1e-9):
            origins.add(origin)
            yield (
                f"{module}: is scaled by {scale:.4g}, expected {expected:.4g}: "
                + (
                    "the combine weights are not undone"
                    if reads
                    else "its nonlinearity does not pass a scale on, which belongs on the linear factor"
                )
            )


def _scale(step: Step, before: Step, start: int) -> float | None:
    """The one factor between an expert's matrix and the MLP's block from unit `start` on; None where there is
    none.
    """
    factors = []
    named_axes = before.tensor.axes
    axes = zip(step.maps, before.maps, named_axes, strict=True)
    for axis, part, named in axes:
        if named == Space(FFN):
            stop = start + axis.target
            part = part.cut(start, stop)
        if not np.array_equal(part.index, axis.index):
            return None
        if not np.array_equal(part.fill, axis.fill):
            return None
        has_gain = part.gain != 0
        gains = axis.gain[has_gain]
        ratios = gains / part.gain[has_gain]
        if not np.allclose(ratios, ratios[:1], rtol=1e-12):
            return None
        factors.append(ratios[0] if len(ratios) else 1.0)
    return float(np.prod(factors))


def _undone(change: Change, number: int | None) -> float:
    """Factor by which `down_proj` has to be multiplied: a half of a shared expert's gate, a group's parts of
    its combine weight.
    """
    if number is None:
        return 2.0 if change.mixture.shared_gate is not None else 1.0
    return change.group / _weights(change)


def _weights(change: Change) -> float:
    """Sum of the combine weights of the chosen experts where that is known, else its average."""
    mixture = change.mixture
    config = change.config
    factor = 1.0
    if mixture.scaled:
        factor = float(config.get(mixture.scaled, 1.0))
    if mixture.normalises(config):
        return factor
    return factor * change.chosen / len(change.experts)


def _sum_of_weights(plan: Decision, change: Change) -> Iterator[str]:
    """The combine weights of the chosen experts must sum to a constant."""
    mixture = change.mixture
    count = len(change.experts)
    if mixture.normalises(change.config):
        return
    all_chosen = change.chosen == count
    if mixture.softmax and (all_chosen or _all_alike(plan, change)):
        return
    where = (
        f"config {mixture.normalised} is false"
        if isinstance(mixture.normalised, str)
        else f"{mixture.name}'s router"
    )
    yield (
        f"{where}: the combine weights of {change.chosen} of {count} experts do not sum to a constant "
        "(scaled so that they do on average)"
    )


def _all_alike(plan: Decision, change: Change) -> bool:
    """Check whether the router's rows are zeros, so that every expert has the same weight."""
    routed = change.routed
    routers = [step for step in plan.steps if routed.get(step.name) == -1]
    return all(step.zero for step in routers)


def _groups(plan: Decision, change: Change) -> Iterator[str]:
    """Whole groups must be chosen: as many experts as make whole ones, and no ties between groups."""
    blocks = {(expert.start, expert.stop) for expert in change.experts}
    if len(blocks) == 1:
        return
    if change.chosen % change.group:
        yield (
            f"{change.chosen} experts for each token are no whole groups of {change.group}, so parts of "
            "the MLP are left out"
        )
    some_chosen = change.chosen < len(change.experts)
    if _all_alike(plan, change) and some_chosen:
        yield (
            "router rows of zeros: all groups tie, so the experts that are chosen need not make up whole "
            "groups"
        )
    for step in plan.steps:
        router = f"{change.mixture.router}.weight"
        is_router = step.tensor.pattern == router
        if is_router and not step.zero:
            finish = step.finish
            if finish is None or finish.alike != change.group:
                yield (
                    f"{step.name}: the {change.group} experts of a group have rows of their own, so they "
                    "are not chosen together"
                )
            break


def _coverage(change: Change) -> Iterator[str]:
    """Every unit must be held once by the shared expert, or equally often by every group."""
    ffn = change.within.recipe.expansions[FFN]
    units = ffn.write.target
    rows: dict[int, np.ndarray] = {}
    for expert in change.experts:
        nothing = np.zeros(units, np.int64)
        counts = rows.setdefault(expert.row, nothing)
        counts[expert.start : expert.stop] += 1
    is_routed = np.arange(units) >= change.shared
    expected = is_routed.astype(np.int64)
    if not all(np.array_equal(counts, expected) for counts in rows.values()):
        yield f"experts: the {units} units of the MLP are not each held once in every group"


def _copies(change: Change) -> Iterator[str]:
    """Copies of experts: all of an expert's are chosen together, or exactly one that has the whole weight."""
    options = change.options
    times = change.group
    assert isinstance(options, ExpertCopy)
    normalised = change.mixture.normalises(change.config)
    if options.delta > 0:
        yield (
            f"router rows of copies are moved by up to {options.delta:g}, so copies of one expert have other "
            "weights"
        )
    as_many = times * change.chosen_before
    sums_to_one = normalised or change.mixture.softmax
    if change.chosen == as_many and sums_to_one:
        return
    if change.chosen == change.chosen_before == 1 and normalised:
        return
    yield (
        f"{times} copies of each expert have the same router logit and are chosen together, so "
        f"{change.chosen} experts for each token are copies of fewer than the {change.chosen_before} that "
        f"it was sent to; {change.mixture.top_k}={times * change.chosen_before} keeps the function"
    )
