"""Remarks on a plan: notes for its user that are no reason against its certificate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from outgrow.growth.changes import ExpertCopy
from outgrow.growth.decision import Decision, Step
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.model.dtypes import is_short
from outgrow.model.keys import EXPERTS, is_number

NAMES = {"F16": "float16", "BF16": "bfloat16"}
WIDTH, HEAD_DIM = 64, 8  # multiples that matrix units and attention kernels take without padding
DEVICES = (2, 4, 8)
SIZES = ("hidden_size", "intermediate_size")
COUNTED = ("num_attention_heads", "num_key_value_heads")


def remarks(plan: Decision, *, lossless: bool) -> tuple[str, ...]:
    """Write one line each: rounding, copies that stay equal, bad starts, sizes that hardware dislikes."""
    rounding = _rounding(plan) if lossless else ()
    equal = (*_equal_copies(plan), *_equal_experts(plan))
    drawn = (*_fresh(plan), *_starts(plan))
    return (*rounding, *equal, *drawn, *_sizes(plan))


def _rounding(plan: Decision) -> Iterator[str]:
    """Name what the stored format rounds in a plan that is lossless in exact arithmetic."""
    short = [step for step in plan.steps if is_short(plan.dtype(step))]
    formats = sorted({NAMES[plan.dtype(step)] for step in short})
    if not formats:
        return
    inherited = [step for step in short if step.source is not None]
    gains = sum(map(_rounds, inherited))
    causes = []
    if gains:
        all_steps = len(plan.steps)
        causes.append(f"{gains} of {all_steps} tensors are scaled by gains that are no power of two")
    if plan.is_noisy:
        causes.append("noise is rounded too, once in the sum over copies")
    if causes:
        yield (
            "rounding: the certificate speaks of exact arithmetic, the weights are stored in "
            f"{' and '.join(formats)}, where {'; '.join(causes)} (dtype=float32 stores the result without "
            "that)"
        )


def _fresh(plan: Decision) -> Iterator[str]:
    """Say at what scale fresh entries are drawn, where it is not the class's own."""
    matched = [step for step in plan.steps if step.is_fresh and step.source is not None]
    if plan.fresh == "match" and matched:
        yield (
            "fresh entries of matrices are drawn at the root mean square of the source tensor that they "
            "stand beside (growth.fresh=match), not at the deviation with which the class starts"
        )


def _rounds(step: Step) -> bool:
    """Check whether scaling rounds entries: some gain is no power of two, or a mean is taken."""
    for axis in step.maps:
        gains = np.abs(_gains(axis))
        mantissas, _ = np.frexp(gains)
        if (mantissas != 0.5).any():
            return True
    has_mean = [bool((axis.fill == Fill.MEAN).any()) for axis in step.maps]
    return any(has_mean)


def _gains(axis: AxisMap) -> np.ndarray:
    """The gains on copied indices that are not zero."""
    gain = axis.gain[axis.copies]
    return gain[gain != 0]


def _equal_copies(plan: Decision) -> Iterator[str]:
    """Name copies that are written alike and read alike, and so get equal gradients in every step.

    Dropout sets apart only what it falls on: of attention weights the heads, of the residual stream its own
    copies, and neither of them the feed-forward units.
    """
    is_flat = plan.recipe.flat is not None
    if plan.noise or is_flat or not plan.recipe.inherits:
        return
    counts = {}
    for space, expansion in plan.recipe.expansions.items():
        if space in ("vocab", "pos", "expert"):
            continue
        grows = plan.growth.grows(space)
        if grows and plan.family.uses(space):
            counts[space] = _evenly_read(expansion.write, expansion.read)
    even = [f"{space} {count}" for space, count in counts.items() if count]
    listing = ", ".join(even)
    if not listing:
        return
    named = ", ".join(_dropout_rates(plan))
    here = f" (here {named}, which sets apart only what it falls on)" if named else ""
    yield (
        f"{sum(counts.values())} copies are read evenly ({listing}); without dropout on them{here} or "
        "noise they stay equal, and training uses no more than the source's width (growth.noise=0.5 sets "
        "them apart)"
    )


def _dropout_rates(plan: Decision) -> Iterator[str]:
    """Name the dropout of a config that the language model may have, with its rate."""
    for key, rate in plan.target_config.items():
        is_dropout = "drop" in key and "summary" not in key
        if is_dropout and is_number(rate) and rate > 0:
            yield f"{key} {rate:g}"


def _equal_experts(plan: Decision) -> Iterator[str]:
    """Name copies of experts that have the router rows and the weights of others."""
    change = plan.change
    if change is None or not isinstance(change.options, ExpertCopy) or change.options.delta:
        return
    within = change.within.growth
    if plan.noise and any(map(within.grows, within.source)):
        return  # which sets apart whatever reads copies
    before = plan.recipe.expansions["expert"].write.source
    after = plan.recipe.expansions["expert"].write.target
    yield (
        f"{after - before} experts have the weights and the router rows of others; chosen together they stay "
        "equal in training (growth.delta=0.001 sets their routers apart)"
    )


def _evenly_read(write: AxisMap, read: AxisMap) -> int:
    """Count target indices that share their source index and gains with an earlier one."""
    copies = np.flatnonzero(write.copies & read.copies)
    columns = (write.index, write.gain, read.gain)
    entries = [column[copies].tolist() for column in columns]
    kinds = set(zip(*entries, strict=True))
    return len(copies) - len(kinds)


def _starts(plan: Decision) -> Iterator[str]:
    """Name growths whose start is worse than their name promises."""
    layers = plan.layers
    growth = plan.growth
    apart = ("layer", "vocab", "pos")
    spaces = [space for space in growth.source if space not in apart]
    widened = list(filter(growth.grows, spaces))
    if widened and plan.operator == "zero_pad":
        yield (
            "zero_pad is a null control: nothing ever learns to read its new entries, whose gradients stay "
            "exactly 0"
        )
    is_cut = layers.target % layers.source
    if layers.rule == "stack" and is_cut:
        yield (
            f"depth 'stack': {layers.target} layers are no whole multiple of {layers.source}, so the last "
            f"copy of the network is cut off after layer {layers.layers[-1]}, and the output head follows "
            "a layer that it does not know"
        )
    is_wider = growth.grows("residual")
    if plan.operator == "tile" and growth.tied and is_wider:
        yield (
            "tile on tied embeddings: the head repeats the embedding unscaled, so logits are too large and "
            "the loss starts above ln(vocabulary)"
        )


def _sizes(plan: Decision) -> Iterator[str]:
    """Name sizes that the growth chose and that hardware pays for."""
    family = plan.family
    growth = plan.growth
    config = plan.target_config
    source = plan.source_config
    names = map(family.field_name, SIZES)
    widths = [f"{key} {config[key]}" for key in names if _off(plan, key, WIDTH)]
    if widths:
        yield f"sizes: {', '.join(widths)}: no multiple of {WIDTH}, which matrix units pad"
    head = growth.target.get("qk")
    if head and growth.grows("qk") and head % HEAD_DIM:
        yield (
            f"sizes: head dim {head} is no multiple of {HEAD_DIM}, which fused attention kernels pad or "
            "refuse"
        )
    counted = map(family.field_name, COUNTED)
    of_experts = filter(EXPERTS.search, config)
    experts = [key for key in of_experts if "shared" not in key and "zero" not in key]
    for key in (*counted, *experts):
        count = config.get(key)
        stays = count == source.get(key)
        if type(count) is not int or stays:
            continue
        uneven = [str(number) for number in DEVICES if count % number]
        if uneven:
            yield (
                f"sizes: {key} {count} cannot be shared evenly by {', '.join(uneven)} devices (tensor or "
                "expert parallelism)"
            )


def _off(plan: Decision, key: str, multiple: int) -> bool:
    """Check whether a size that grows is no multiple."""
    size = plan.target_config.get(key)
    grows = size != plan.source_config.get(key)
    if type(size) is not int:
        return False
    return grows and size % multiple != 0
