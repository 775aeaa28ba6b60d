"""A plan drawn in characters, and the model card of a grown folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from outgrow.growth.origin import Origin, of_axis
from outgrow.growth.plan import Plan
from outgrow.growth.verify import Receipt
from outgrow.growth.words import layer_table, spaces_table

MAX_CARD = 1 << 20  # characters of a model card that are looked at


def layer_map(plan: Plan, width: int = 100) -> list[str]:
    """Two lines per stretch of layers, each source layer under the target layer that it feeds, identity
    layers in brackets.
    """
    sources = [layer if layer.endswith("]") else f"{layer} " for layer in plan.layers.shown]
    cell = max(map(len, sources)) + 1
    step = max(1, (width - len("target ")) // cell)
    lines = []
    for first in range(0, len(sources), step):
        stop = min(first + step, len(sources))
        targets = [f"{number} ".rjust(cell) for number in range(first, stop)]
        shown = [source.rjust(cell) for source in sources[first:stop]]
        lines.append(f"target {''.join(targets)}")
        lines.append(f"source {''.join(shown)}")
    return [line.rstrip() for line in lines]


def space_bar(plan: Plan, space: str, length: int = 20) -> str:
    """A space's target indices as a bar: █ the source's own, ▒ further copies, · new."""
    write = plan.recipe.expansions[space].write
    origins = of_axis(write)
    bar = ""
    count = 0
    signs = ((Origin.ORIGINAL, "█"), (Origin.COPY, "▒"), (Origin.NEW, "·"))
    size = max(1, write.target)
    for origin, sign in signs:
        count += int((origins == origin).sum())
        end = round(length * count / size)
        bar = bar.ljust(end, sign)
    return bar


LICENCE_KEYS = ("license", "license_name", "license_link")


Stated = Mapping[str, str | list[str]]


def licence(card: Path) -> dict[str, str | list[str]]:
    """Read what the head of a model card (README.md) says of the model's licence, under the hub's keys;
    nothing where there is no such card.
    """
    import yaml

    try:
        text = card.read_text(encoding="utf-8")[:MAX_CARD]
        head = None
        if text.startswith("---\n"):
            _, lines, *_ = text.split("---\n", 2)
            head = yaml.safe_load(lines)
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    entries = head if isinstance(head, dict) else {}
    stated: dict[str, str | list[str]] = {}
    for key in LICENCE_KEYS:
        match entries.get(key):
            case str(text):
                stated[key] = text[:200]
            case [str(), *_] as several:
                texts = map(str, several[:10])
                stated[key] = [text[:200] for text in texts]
    return stated


def _licence_lines(stated: Stated, files: Sequence[str]) -> str:
    """The source's licence in words.

    Args:
        files: of the grown folder, that hold its terms.
    """
    if files and not stated:
        return f"Licence: the source's terms hold for what was grown from it, as in {', '.join(files)}."
    if not stated:
        return (
            "Licence: the source's folder names none; the source's own terms hold for what was grown from it."
        )
    named = stated.get("license_name", stated.get("license", ""))
    if not isinstance(named, str):
        named = ", ".join(named)
    link = ""
    if "license_link" in stated:
        link = f" ({stated['license_link']})"
    said = f"Licence: the source's, {named}{link}, holds for what was grown from it"
    if not files:
        return f"{said}."
    return f"{said}; its text is in {', '.join(files)}."


SAME = "the same"  # instead of a continuation that is the source's


def said_alike(receipt: Receipt) -> str:
    """Count a receipt's continuations that are equal, in words."""
    return f"{receipt.same} of {len(receipt.continuations)} greedy continuations are equal"


def _text_lines(receipt: Receipt) -> list[str]:
    """Perplexity before and after, and both models' continuations, where the receipt is of a text."""
    if receipt.text is None:
        return []
    said = (
        f"Perplexity on that text {receipt.perplexity_source:.4f} → {receipt.perplexity_target:.4f}; "
        f"{said_alike(receipt)}:"
    )
    rows = []
    for each in receipt.continuations:
        target = SAME if each.is_same else each.target
        cells = map(_cell, (each.prompt, each.source, target))
        rows.append(f"| {' | '.join(cells)} |")
    return [
        said,
        "",
        "| … the text | the source goes on | the grown model goes on |",
        "|---|---|---|",
        *rows,
        "",
    ]


def _cell(text: str) -> str:
    """A text within one cell of a table in Markdown, its marks shown as they are."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def model_card(
    plan: Plan,
    source: str,
    receipt: Receipt | None,
    stated: Stated | None = None,
    files: Sequence[str] = (),
) -> str:
    """README.md of a grown folder; `stated` is the source's `licence`, `files` hold its text."""
    stated = stated or {}
    change = [] if plan.change is None else ["", f"{plan.change.summary(plan)}."]
    rules = [f"| `{space}` | {rule} |" for space, rule in spaces_table(plan)]
    lines = [
        *_head(source, stated),
        f"# Grown from {source}",
        "",
        (
            f"{plan.source_parameters:,} → {plan.target_parameters:,} parameters by operator "
            f"`{plan.operator}` (depth `{plan.layers.rule}`, noise {plan.noise:g}, seed "
            f"{plan.growth.seed}); an initialisation to go on training from."
        ),
        *change,
        "",
        *_certificate_lines(plan),
        "",
        *_receipt_lines(receipt),
        _licence_lines(stated, files),
        "",
        "| space | how it grew |",
        "|---|---|",
        *rules,
        "",
        f"Layers (source of each; identity in brackets): {layer_table(plan)}",
        "",
        "The whole recipe is in `growth.json`.",
        "",
    ]
    return "\n".join(lines)


def _head(source: str, stated: Stated) -> list[str]:
    """The lines that the hub reads: the base model where the source is one, and its licence."""
    import yaml

    is_name = source.count("/") == 1 and not source.startswith((".", "/"))
    on_hub = is_name and not Path(source).exists()
    base = f"base_model: {source}" if on_hub else "tags: [grown]"
    licence_lines = []
    if stated:
        text = yaml.safe_dump(dict(stated), sort_keys=False, width=1000)
        licence_lines = text.splitlines()
    return ["---", base, "library_name: transformers", *licence_lines, "---"]


def _certificate_lines(plan: Plan) -> list[str]:
    """The certificate in words, its reasons, and what else there is to know."""
    certificate = plan.certificate
    verdict = "not lossless:"
    if certificate.lossless:
        verdict = "**lossless** in exact arithmetic, every logit is the source's."
    points = (*certificate.reasons, *plan.notes, *plan.remarks)
    listed = [f"- {point}" for point in points]
    return [f"Certificate, proved from the plan: {verdict}", *listed]


def _receipt_lines(receipt: Receipt | None) -> list[str]:
    """The receipt in words, where one was measured."""
    if receipt is None:
        return []
    measured = (
        f"Receipt, measured on {receipt.tokens} tokens in {receipt.dtype}: max |Δlogit| "
        f"{receipt.max_delta:.3g} (largest logit {receipt.max_logit:.3g}), KL {receipt.kl:.3g}, "
        f"loss {receipt.loss_source:.4f} → {receipt.loss_target:.4f}"
    )
    note = f" ({receipt.note})" if receipt.note else ""
    return [f"{measured}{note}.", "", *_text_lines(receipt)]
