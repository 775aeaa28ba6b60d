"""Grow a checkpoint into a larger initialisation: seconds for a billion parameters, in little memory, with a
proof.

outgrow grow source=microsoft/phi-1_5 target=phi_2 growth=lossless out=grown/phi_2
outgrow grow source=microsoft/phi-1_5 target=phi_2 growth=tile growth.mode=edge growth.depth=stack
plan_only=true outgrow grow source=DIR 'target={hidden_size:2560,num_hidden_layers:32}' out=DIR
outgrow schema source=DIR     the schema that is derived for a checkpoint, as a file of model/families

Prints the plan's certificate, and a receipt where one was measured. Exit status: 0 done, 2 a fault in what
was asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from outgrow.growth.moments import Rule
from outgrow.model.base.compose import CONF, compose_config
from outgrow.model.base.errors import UserError, not_installed
from outgrow.model.base.interrupt import started
from outgrow.model.base.overrides import own_folder
from outgrow.model.base.settings import settings_of

if TYPE_CHECKING:
    from outgrow.growth.engine.rows import Reader
    from outgrow.growth.plan import Plan
    from outgrow.growth.verify import Receipt

PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class GrowthLeaf:
    """One file of conf/growth: an arm's name, the operator, and whatever else the operator takes."""

    name: str
    operator: str
    depth: str | list[int]
    noise: float
    options: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})

    def arguments(self) -> dict[str, Any]:
        """Arguments as `grow` and `plan` take them."""
        named = {"operator": self.operator, "depth": self.depth, "noise": self.noise}
        return {**named, **self.options}


@dataclass(frozen=True)
class ReceiptLeaf:
    """Settings of a receipt's measurement."""

    measure: bool | None
    text: str | None


@dataclass(frozen=True)
class Settings:
    """Settings of one growth; see conf/grow.yaml."""

    source: str
    target: str | dict[str, Any]
    growth: GrowthLeaf
    out: str | None
    plan_only: bool
    seed: int
    dtype: Literal["float32"] | None
    overwrite: bool
    receipt: ReceiptLeaf
    threads: int
    max_shard_gb: float
    revision: str | None
    optimizer: str | None
    moments: Rule
    nonfinite: Literal["refuse", "allow"]
    figure: str | None
    worker: str | int | None


def settings_from(arguments: list[str]) -> Settings:
    """Typed settings from `key=value` arguments, and leaves of the user's own from `--config-dir DIR`.

    Raises:
        UserError: every unknown, missing and mistyped key, at once.
    """
    own, overrides = own_folder(arguments)
    # `receipt=false` is short for `receipt.measure=false`.
    spelt = [re.sub(r"^receipt=(?!\{)", "receipt.measure=", override) for override in overrides]
    cfg, faults = compose_config(CONF, "grow", spelt, own)
    return settings_of(Settings, cfg, faults, _disagreements)


def _disagreements(settings: Settings) -> Iterator[str]:
    """Yield the faults between well-typed values."""
    if not settings.out and not settings.plan_only:
        yield "out: missing; give out=DIR, or plan_only=true to write nothing"
    if settings.growth.operator == "source":
        yield (
            "growth=source: a training arm (the source trained on), so there is nothing to grow; "
            "choose an operator"
        )
    if "stages" in settings.growth.options:
        name = settings.growth.name
        yield (
            f"growth={name}: a training arm that grows on its way (outgrow train growth={name}); "
            "choose an operator"
        )
    for key in ("threads", "max_shard_gb"):
        value = getattr(settings, key)
        if value <= 0:
            yield f"{key}: must be positive; found {value}"
    if settings.worker is not None:
        from outgrow.growth.engine.workers import Worker

        try:
            Worker.parse(str(settings.worker))
        except UserError as fault:
            yield str(fault)
    receipt = settings.receipt
    if receipt.text is not None and receipt.measure is False:
        yield "receipt.text: is for a receipt, and receipt=false measures none; leave one of them out"
    if settings.moments != "own" and settings.optimizer is None:
        yield (
            f"moments={settings.moments}: how an optimizer's state grows, and none is given; give "
            "optimizer=FILE, or leave moments out"
        )
    figure = settings.figure
    is_picture = figure is None or Path(figure).suffix in PICTURES
    if not is_picture:
        yield f"figure {figure!r}: no picture's name; end it in {', '.join(PICTURES)}"


def run(settings: Settings) -> None:
    """Plan, or plan and grow, and say what came of it."""
    from outgrow.growth.bars import bars
    from outgrow.growth.grow import grow

    if settings.plan_only:
        _plan_alone(settings)
        return
    worker = None if settings.worker is None else str(settings.worker)
    max_shard_bytes = int(settings.max_shard_gb * 1e9)
    with bars() as (progress, learning):
        grown = grow(
            settings.source,
            str(settings.out),
            target=settings.target,
            seed=settings.seed,
            dtype=settings.dtype,
            overwrite=settings.overwrite,
            receipt=settings.receipt.measure,
            receipt_text=settings.receipt.text,
            threads=settings.threads,
            max_shard_bytes=max_shard_bytes,
            revision=settings.revision,
            optimizer=settings.optimizer,
            moments=settings.moments,
            nonfinite=settings.nonfinite,
            worker=worker,
            progress=progress,
            learning=learning,
            **settings.growth.arguments(),
        )
    if not grown.complete:
        print(f"worker {settings.worker} wrote its shards; the last worker to finish makes {grown.folder}")
        return
    _print_outcome(grown.plan, grown.receipt)
    if grown.learned is not None:
        print(_what_was_learned(grown.learned))
    _draw(settings, grown.plan, _source(settings))
    for note in grown.notes:
        print(f"note: {note}")
    print(f"wrote {grown.folder}")


def _plan_alone(settings: Settings) -> None:
    """Plan, and say what would come of it."""
    from outgrow.growth.grow import read_lesson
    from outgrow.growth.planning import plan

    source = _source(settings)
    options = settings.growth.arguments()
    planned = plan(source, settings.target, seed=settings.seed, dtype=settings.dtype, **options)
    checkpoint = None if isinstance(source, str) else source
    if checkpoint is not None:
        read_lesson(planned, checkpoint, settings.receipt.text)
    _print_plan(planned)
    _print_outcome(planned, None)
    _draw(settings, planned, checkpoint)


def _what_was_learned(learned: dict[str, Any]) -> str:
    """One line: on what, and the loss before and after."""
    flops = f"{learned['flops']:.3g} FLOPs"
    if "text" not in learned:
        losses = list(learned["losses"].values())
        count = max(1, len(losses))
        before = sum(loss["neighbours"] for loss in losses) / count
        after = sum(loss["learned"] for loss in losses) / count
        return (
            f"learned on the source's layers, {learned['steps']} steps, {flops}: inner layers missed by "
            f"{before:.4f} of their mean square as the mean of two → {after:.4f}; {learned['matrices']} new "
            f"matrices, {learned['means']} other tensors stay the mean"
        )
    losses_said = f"{learned['loss_before']:.4f} → {learned['loss_after']:.4f}"
    return (
        f"learned on {learned['tokens']} tokens of {learned['text']}, {flops}: loss {losses_said} nats on "
        f"{learned['held_out_tokens']} held out (source {learned['loss_source']:.4f})"
    )


def _source(settings: Settings) -> Any:
    """The source of a plan: a preset's name needs no weights."""
    from outgrow.model.checkpoint import Checkpoint
    from outgrow.model.locate import locate
    from outgrow.model.presets import PRESETS

    is_preset = settings.source in PRESETS
    if is_preset and not Path(settings.source).is_dir():
        return settings.source
    return Checkpoint(locate(settings.source, settings.revision))


def _draw(settings: Settings, plan: Plan, reader: Reader | None) -> None:
    if settings.figure is not None:
        from outgrow.growth.figure import draw  # matplotlib takes longer to import than a small growth does

        draw(plan, settings.figure, reader)
        print(f"drew {settings.figure}")


def _print_plan(plan: Plan) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from outgrow.growth.card import layer_map, space_bar
    from outgrow.growth.words import human_bytes, spaces_table, tensor_table

    console = (
        Console(highlight=False)
        if sys.stdout.isatty()
        else Console(highlight=False, soft_wrap=True, width=120)
    )
    table = Table("module", "writes <- reads", "source → target", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("tensors", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, pattern, shapes, count, nbytes in tensor_table(plan):
        table.add_row(
            name.replace("model.layers.*.", "*."), escape(pattern), shapes, str(count), human_bytes(nbytes)
        )
    console.print(table)
    table = Table("space", "█ source ▒ copies · new", "expansion", box=SIMPLE_HEAD, pad_edge=False)
    for space, rule in spaces_table(plan):
        table.add_row(space, space_bar(plan, space), rule)
    if table.rows:
        console.print(table)
    idle = sum(plan.layers.identity)
    note = f"; {idle} in [brackets] start as the identity" if idle else ""
    console.print(
        f"layers {plan.layers.source} → {plan.layers.target} by {plan.layers.rule!r}{note}:", markup=False
    )
    for line in layer_map(plan, console.width):
        console.print(line, markup=False)
    console.print()


def _print_outcome(plan: Plan, receipt: Receipt | None) -> None:
    print(
        f"{plan.source_parameters:,} → {plan.target_parameters:,} parameters, {plan.target_bytes:,} bytes, "
        f"plan {plan.hash}"
    )
    if plan.change is not None:
        print(plan.change.summary(plan))
    for note in plan.notes:
        print(note)
    certificate = plan.certificate
    print("certificate: lossless" if certificate.lossless else "certificate: not lossless")
    for reason in certificate.reasons:
        print(f"  - {reason}")
    for remark in plan.remarks:
        print(f"note: {remark}")
    if receipt is not None:
        kind = "random " if receipt.text is None else ""
        note = f" ({receipt.note})" if receipt.note else ""
        print(
            f"receipt: max |Δlogit| {receipt.max_delta:.3g} (largest logit {receipt.max_logit:.3g}), "
            f"KL {receipt.kl:.3g}, loss {receipt.loss_source:.4f} → {receipt.loss_target:.4f} nats on "
            f"{receipt.tokens} {kind}tokens, in {receipt.dtype}{note}"
        )
        _print_text(receipt)


def _print_text(receipt: Receipt) -> None:
    """Perplexity before and after, and continuations side by side, where the receipt is of a text."""
    if receipt.text is None:
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from outgrow.growth.card import SAME, said_alike

    print(
        f"text: perplexity {receipt.perplexity_source:.4f} → {receipt.perplexity_target:.4f} on "
        f"{receipt.text}; {said_alike(receipt)}"
    )
    table = Table("… the text", "the source goes on", "the grown model goes on", show_lines=True)
    for each in receipt.continuations:
        target = SAME if each.is_same else each.target
        cells = (_in_one_line(text) for text in (each.prompt, each.source, target))
        table.add_row(*map(escape, cells))
    width = None if sys.stdout.isatty() else 120
    Console(highlight=False, width=width).print(table)


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def main(arguments: Sequence[str] | None = None) -> None:
    """The door: a UserError is one message on stderr and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any(argument in ("-h", "--help") for argument in words):
        defaults = CONF / "grow.yaml"
        text = defaults.read_text()
        print(f"{__doc__}\nKeys and defaults ({defaults}):\n\n{text}")
        return
    try:
        if words[:1] == ["schema"]:
            from outgrow.growth.schema import print_schema

            print_schema(words[1:])
        else:
            run(settings_from(words))
    except ModuleNotFoundError as fault:
        missing = not_installed(fault)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(2)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "stopped; nothing half-written was left behind as whole: the same command begins anew, or goes "
            "on where it was learning",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    started()
    main()
