"""A plan in words: its five lines, and the tables that `plan_only` prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from outgrow.growth.decision import Decision, Step


def summary(plan: Decision, reasons: Sequence[str]) -> list[str]:
    """Summarise a plan in five lines: what grows how, into what, and whether it is lossless."""
    growth = plan.growth
    if plan.change is not None:
        growth = plan.change.within.growth
    source = growth.source
    target = growth.target
    changes = []
    for space, n in source.items():
        N = target[space]
        if space != "layer" and n != N:
            changes.append(f"{space} {n} → {N}")
    grows = ", ".join(changes)
    verdict = "lossless"
    if reasons:
        verdict = f"not lossless: {reasons[0]:.100}"
    if len(reasons) > 1:
        verdict += f" (and {len(reasons) - 1} more)"
    return [
        (
            f"Plan {plan.hash}: {plan.family.name} by {plan.operator!r}, noise {plan.noise:g}, seed "
            f"{plan.growth.seed}" + (", fresh entries matched to the source" if plan.fresh == "match" else "")
        ),
        (
            f"  {plan.source_parameters:,} → {plan.target_parameters:,} parameters, "
            f"{human_bytes(plan.target_bytes)}"
        ),
        f"  {grows or 'no width grows'}",
        *([] if plan.change is None else [f"  {plan.change.summary(plan)}"]),
        f"  layers {plan.layers.source} → {plan.layers.target} by {plan.layers.rule!r}",
        *([] if plan.lesson is None else [f"  learned on {plan.lesson.text or 'its layers'} once written"]),
        f"  certificate: {verdict}",
    ]


def describe(plan: Decision, reasons: Sequence[str], remarks: Sequence[str]) -> str:
    """Describe a plan: spaces, layers, one line per module, certificate with its reasons, notes, remarks."""
    rules = spaces_table(plan)
    spaces = [f"  {space}: {rule}" for space, rule in rules]
    rows = tensor_table(plan)
    modules = [
        f"  {name}: {pattern}; {shapes} ({count} tensors, {human_bytes(size)})"
        for name, pattern, shapes, count, size in rows
    ]
    layers = [f"  {layer_table(plan)}"]
    parts = {
        "spaces": spaces,
        "layers": layers,
        "modules": modules,
        "why not lossless": [f"  - {reason}" for reason in reasons],
        "notes": [f"  {note}" for note in (*plan.notes, *remarks)],
    }
    text = summary(plan, reasons)
    for title, lines in parts.items():
        if lines:
            text += [f"{title}:", *lines]
    return "\n".join(text)


def spaces_table(plan: Decision) -> list[tuple[str, str]]:
    """List (space, rule) for every space that the family has."""
    return [
        (space, expansion.rule)
        for space, expansion in plan.recipe.expansions.items()
        if plan.family.uses(space)
    ]


def tensor_table(plan: Decision) -> list[tuple[str, str, str, int, int]]:
    """List (module with `*` for the layer, spaces, shapes, tensors, bytes), one row per line of the
    schema."""
    rows: dict[str, list[Step]] = defaultdict(list)
    for step in plan.steps:
        rows[step.tensor.line.name].append(step)
    table = []
    for name, steps in rows.items():
        line = steps[0].tensor.line
        if line.kind == "tensor":
            pattern = line.text
        elif line.into is None:
            pattern = f"{line.kind} {line.out}"
        else:
            pattern = f"{line.out} <- {line.into}"
        first = steps[0]
        before = _shape(first.source_shape)
        after = _shape(first.shape)
        shapes = f"{before} → {after}"
        size = sum(map(plan.nbytes, steps))
        count = len(steps)
        table.append((name, pattern, shapes, count, size))
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def human_bytes(count: float) -> str:
    """Write a number of bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def layer_table(plan: Decision) -> str:
    """List the source layer of each target layer, identity layers in brackets: `0 1 [1] 2`."""
    return " ".join(plan.layers.shown)
