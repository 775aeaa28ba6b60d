"""A plan in words: its five lines, and the tables that `plan_only` prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from outgrow.growth.decision import Decision, Step


def summary(plan: Decision, reasons: Sequence[str]) -> list[str]:
    """Five lines: what grows how, into what, and whether it is lossless."""
    growth = plan.growth if plan.change is None else plan.change.within.growth
    sizes, target = growth.source, growth.target
    grows = ", ".join(f"{space} {sizes[space]} → {target[space]}" for space in sizes if space != "layer" and sizes[space] != target[space])
    said = (
        "lossless" if not reasons else f"not lossless: {reasons[0]:.100}" + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
    )
    return [
        f"Plan {plan.hash}: {plan.family.name} by {plan.operator!r}, noise {plan.noise:g}, seed {plan.growth.seed}",
        f"  {plan.source_parameters:,} → {plan.target_parameters:,} parameters, {human_bytes(plan.target_bytes)}",
        f"  {grows or 'no width grows'}",
        *([] if plan.change is None else [f"  {plan.change.summary(plan)}"]),
        f"  layers {plan.layers.source} → {plan.layers.target} by {plan.layers.rule!r}",
        f"  certificate: {said}",
    ]


def describe(plan: Decision, reasons: Sequence[str]) -> str:
    """The plan in words: spaces, layers, one line per module, certificate with its reasons, notes."""
    spaces = [f"  {space}: {rule}" for space, rule in spaces_table(plan)]
    rows = tensor_table(plan)
    modules = [f"  {name}: {pattern}; {shapes} ({count} tensors, {human_bytes(size)})" for name, pattern, shapes, count, size in rows]
    layers = [f"  {layer_table(plan)}"]
    parts = {
        "spaces": spaces,
        "layers": layers,
        "modules": modules,
        "why not lossless": [f"  - {reason}" for reason in reasons],
        "notes": [f"  {note}" for note in plan.notes],
    }
    return "\n".join([*summary(plan, reasons), *(line for title, lines in parts.items() if lines for line in (f"{title}:", *lines))])


def spaces_table(plan: Decision) -> list[tuple[str, str]]:
    """(space, rule) for every space that the family has."""
    return [(space, expansion.rule) for space, expansion in plan.recipe.expansions.items() if plan.family.uses(space)]


def tensor_table(plan: Decision) -> list[tuple[str, str, str, int, int]]:
    """(module with `*` for the layer, what it writes and reads, shapes, tensors, bytes), one row per line of the schema."""
    rows: dict[str, list[Step]] = defaultdict(list)
    for step in plan.steps:
        rows[step.tensor.line.name].append(step)
    table = []
    for name, steps in rows.items():
        line = steps[0].tensor.line
        pattern = line.text if line.kind == "tensor" else f"{line.kind} {line.out}" if line.into is None else f"{line.out} <- {line.into}"
        shapes = f"{_shape(steps[0].source_shape)} → {_shape(steps[0].shape)}"
        table.append((name, pattern, shapes, len(steps), sum(map(plan.nbytes, steps))))
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def human_bytes(count: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def layer_table(plan: Decision) -> str:
    """Which source layer feeds each target layer, repeats that start as the identity in brackets: `0 1 [1] 2`."""
    return " ".join(f"[{layer}]" if idle else str(layer) for layer, idle in zip(plan.layers.layers, plan.layers.identity, strict=True))
