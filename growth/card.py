"""The plan in words: the table that `plan_only` prints, and the model card of a grown folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .origin import Origin, of_axis

if TYPE_CHECKING:
    from .plan import Plan, Step
    from .verify import Receipt


MAX_CARD = 1 << 20  # characters of a model card that are looked at


def summary(plan: Plan) -> list[str]:
    """Five lines: what grows how, into what, and whether it is lossless."""
    sizes, target = plan.growth.source, plan.growth.target
    grows = ", ".join(f"{space} {sizes[space]} → {target[space]}" for space in sizes if space != "layer" and sizes[space] != target[space])
    reasons = plan.certificate.reasons
    said = (
        "lossless" if not reasons else f"not lossless: {reasons[0]:.100}" + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
    )
    return [
        f"Plan {plan.hash}: {plan.family.name} by {plan.operator!r}, noise {plan.noise:g}, seed {plan.growth.seed}",
        f"  {plan.source_parameters:,} → {plan.target_parameters:,} parameters, {human_bytes(plan.target_bytes)}",
        f"  {grows or 'no width grows'}",
        f"  layers {plan.layers.source} → {plan.layers.target} by {plan.layers.rule!r}",
        f"  certificate: {said}",
    ]


def describe(plan: Plan) -> str:
    """The plan in words: spaces, layers, one line per module, certificate with its reasons, notes."""
    spaces = [f"  {space}: {rule}" for space, rule in spaces_table(plan)]
    rows = tensor_table(plan)
    modules = [f"  {name}: {pattern}; {shapes} ({count} tensors, {human_bytes(size)})" for name, pattern, shapes, count, size in rows]
    reasons = [f"  - {reason}" for reason in plan.certificate.reasons]
    layers = [f"  {layer_table(plan)}"]
    parts = {
        "spaces": spaces,
        "layers": layers,
        "modules": modules,
        "why not lossless": reasons,
        "notes": [f"  {note}" for note in plan.notes],
    }
    return "\n".join([*summary(plan), *(line for title, lines in parts.items() if lines for line in (f"{title}:", *lines))])


def spaces_table(plan: Plan) -> list[tuple[str, str]]:
    """(space, rule) for every space that the family has."""
    return [(space, expansion.rule) for space, expansion in plan.recipe.expansions.items() if plan.family.uses(space)]


def tensor_table(plan: Plan) -> list[tuple[str, str, str, int, int]]:
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


def layer_table(plan: Plan) -> str:
    """Which source layer feeds each target layer, repeats that start as the identity in brackets: `0 1 [1] 2`."""
    return " ".join(f"[{layer}]" if idle else str(layer) for layer, idle in zip(plan.layers.layers, plan.layers.identity, strict=True))


def layer_map(plan: Plan, width: int = 100) -> list[str]:
    """Two lines per stretch of layers, each source layer under the target layer that it feeds, identity layers in brackets."""
    sources = [f"[{layer}]" if idle else f"{layer} " for layer, idle in zip(plan.layers.layers, plan.layers.identity, strict=True)]
    cell = max(map(len, sources)) + 1
    step = max(1, (width - len("target ")) // cell)
    lines = []
    for first in range(0, len(sources), step):
        shown = range(first, min(first + step, len(sources)))
        lines.append("target " + "".join(f"{number} ".rjust(cell) for number in shown))
        lines.append("source " + "".join(sources[number].rjust(cell) for number in shown))
    return [line.rstrip() for line in lines]


def space_bar(plan: Plan, space: str, length: int = 20) -> str:
    """A space's target indices as a bar: █ the source's own, ▒ further copies, · new."""
    write = plan.recipe.expansions[space].write
    counts = [int((of_axis(write) == origin).sum()) for origin in (Origin.ORIGINAL, Origin.COPY, Origin.NEW)]
    ends = [round(length * sum(counts[: i + 1]) / max(1, write.target)) for i in range(3)]
    return "█" * ends[0] + "▒" * (ends[1] - ends[0]) + "·" * (ends[2] - ends[1])


LICENCE_KEYS = ("license", "license_name", "license_link")


def licence(card: Path) -> dict[str, str]:
    """What the head of a model card (README.md) says of the model's licence, under the hub's keys; nothing where there is no such card."""
    import yaml

    try:
        text = card.read_text(encoding="utf-8")[:MAX_CARD]
        head = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    found = head if isinstance(head, dict) else {}
    return {key: str(found[key])[:200] for key in LICENCE_KEYS if isinstance(found.get(key), str)}


def _licence_lines(stated: Mapping[str, str]) -> str:
    """The source's licence in words."""
    if not stated:
        return "Licence: the source's folder names none; the source's own terms hold for what was grown from it."
    named = stated.get("license_name", stated.get("license", ""))
    link = f" ({stated['license_link']})" if "license_link" in stated else ""
    return f"Licence: the source's, {named}{link}, holds for what was grown from it."


def model_card(plan: Plan, source: str, receipt: Receipt | None, stated: Mapping[str, str] | None = None) -> str:
    """README.md of a grown folder; `stated` is the source's `licence`."""
    import yaml

    stated = stated or {}
    certificate = plan.certificate
    lines = [
        "---",
        f"base_model: {source}" if source.count("/") == 1 and not source.startswith((".", "/")) else "tags: [grown]",
        "library_name: transformers",
        *yaml.safe_dump(dict(stated), sort_keys=False).splitlines()[: len(stated)],
        "---",
        f"# Grown from {source}",
        "",
        f"{plan.source_parameters:,} → {plan.target_parameters:,} parameters by operator `{plan.operator}` (depth `{plan.layers.rule}`, "
        f"noise {plan.noise:g}, seed {plan.growth.seed}); an initialisation to go on training from.",
        "",
        "Certificate, proved from the plan: "
        + ("**lossless** in exact arithmetic, every logit is the source's." if certificate.lossless else "not lossless:"),
        *(f"- {reason}" for reason in certificate.reasons),
        *(f"- {note}" for note in (*plan.notes, *plan.remarks)),
        "",
    ]
    if receipt is not None:
        lines += [
            f"Receipt, measured on {receipt.tokens} tokens in {receipt.dtype}: max |Δlogit| {receipt.max_delta:.3g} "
            f"(largest logit {receipt.max_logit:.3g}), KL {receipt.kl:.3g}, loss {receipt.loss_source:.4f} → {receipt.loss_target:.4f}"
            + (f" ({receipt.note})." if receipt.note else "."),
            "",
        ]
    lines += [_licence_lines(stated), ""]
    lines += ["| space | how it grew |", "|---|---|", *(f"| `{space}` | {rule} |" for space, rule in spaces_table(plan)), ""]
    lines += [f"Layers (source of each; identity in brackets): {layer_table(plan)}", "", "The whole recipe is in `growth.json`."]
    return "\n".join(lines) + "\n"
