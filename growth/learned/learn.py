"""The lesson of a plan, learned in the folder that its steps are written in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch

from outgrow.growth.engine.rows import Reader
from outgrow.growth.learned.kept import Kept, fingerprint
from outgrow.growth.learned.lesa import predict_layers
from outgrow.growth.learned.lessons import LeastSquares, Lesa, Ligo
from outgrow.growth.learned.ligo import learn_maps
from outgrow.growth.learned.on_disk import OnDisk, Written, values_of
from outgrow.growth.learned.squares import fit
from outgrow.growth.learned.text import Calibration, read_calibration
from outgrow.growth.plan import Plan
from outgrow.model.build import known_size
from outgrow.model.checkpoint import Checkpoint


def calibration(plan: Plan, source: Path) -> Calibration:
    """The text of a plan's lesson, in the tokens of the source.

    Raises:
        UserError: there is no such text, it is empty or too short, or the source has no tokenizer for it.
    """
    lesson = plan.lesson
    config = plan.source_config
    assert isinstance(lesson, LeastSquares | Ligo)
    vocabulary = known_size(config, "vocab_size")
    context = known_size(config, "max_position_embeddings")
    assert vocabulary is not None
    return read_calibration(
        lesson.text, source, vocabulary, context, tokens=lesson.tokens, window=lesson.window
    )


def learn(
    plan: Plan,
    reader: Reader,
    source: Checkpoint,
    folder: Path,
    text: Calibration | None,
    state: Path,
    progress: Callable[[float, float], None] | None = None,
) -> dict[str, Any]:
    """Fit what a plan has written in `folder`, and return the record of it.

    Args:
        reader: of the `source`'s tensors.
        state: a folder beside it, for what is learned so far.
        progress: called with (FLOPs done, FLOPs in all) before the first part and after each.

    Returns:
        text, its hash, tokens, steps, FLOPs, and the losses (nats per token) on the windows held out: the
        source's, that of what was written, and that of what was learned. Without a text, steps, FLOPs and
        the losses of what was predicted.
    """
    lesson = plan.lesson
    written = Written(folder)
    values = values_of(reader, source.tensors)
    read = "" if text is None else text.sha256
    weights = fingerprint(reader, source.tensors)
    kept = Kept(state, f"{plan.hash} {read} {weights}")
    kept.check()

    def share(done: float, flops: float) -> None:
        if progress is not None:
            progress(done, flops)

    if isinstance(lesson, Lesa):
        took = predict_layers(plan, lesson, values, written, folder, kept, share)
        return {"operator": plan.operator, **took}
    assert isinstance(lesson, LeastSquares | Ligo)
    assert text is not None

    def source_model() -> OnDisk:
        return OnDisk(plan.source_config, values, source.tensors, plan.layers.source)

    def target_model() -> OnDisk:
        return OnDisk(plan.target_config, written.values, written.tensors, plan.layers.target)

    windows = torch.from_numpy(text.held)
    loss_source, loss_before = _losses_before(kept, (source_model, target_model), windows)
    if isinstance(lesson, Ligo):
        took = learn_maps(plan, lesson, values, written, text, kept, share)
    else:
        took = fit(plan, lesson.ridge, source_model(), target_model(), written, text, folder, kept, share)
    return {
        "operator": plan.operator,
        "text": text.name,
        "sha256": text.sha256,
        "tokens": prod(text.fit.shape),
        "held_out_tokens": prod(text.held.shape),
        "loss_source": loss_source,
        "loss_before": loss_before,
        "loss_after": _loss(target_model, windows),
        **took,
    }


def _losses_before(kept: Kept, models: Iterable[Callable[[], OnDisk]], windows: torch.Tensor) -> list[float]:
    """The source's loss on the windows held out, and that of what was written."""
    piece = kept.get("before")
    if piece is not None:
        _, losses = piece
        return list(losses)
    losses = [_loss(model, windows) for model in models]
    kept.put("before", {}, losses)
    return losses


def _loss(model: Callable[[], OnDisk], windows: torch.Tensor) -> float:
    """The loss of a model on the windows held out."""
    with torch.no_grad():
        return model().loss(windows)
