"""Checks of a source against its plan before anything is written: its tokenizer has room, its tied head is
tied.
"""

from __future__ import annotations

from pathlib import Path

from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.config import tokenizer_size
from outgrow.model.notation import Space

ROWS = 1024  # of two tensors that are compared, at a time


def check_tokenizer(source: Path, plan: Plan) -> None:
    """New tokens must have room for all of the tokenizer's.

    Raises:
        UserError: the vocabulary grows, and the tokenizer that goes with the weights has more tokens than it
            then holds.
    """
    if not plan.growth.grows("vocab"):
        return
    tokens = tokenizer_size(source)
    size = plan.growth.target["vocab"]
    if tokens is not None and tokens > size:
        raise UserError(
            f"target: vocab_size {size} is less than the {tokens} tokens of {source / 'tokenizer.json'}; "
            f"give at least vocab_size:{tokens}"
        )


def check_head(source: Checkpoint, plan: Plan) -> None:
    """A head that is stored beside the embedding that it is tied to must be that: the library would use the
    one stored.

    Raises:
        UserError: it is another.
    """
    stored = source.tensors
    family = plan.growth.source_family
    tensors = list(family.tensors(plan.source_config))
    tables = [tensor for tensor in tensors if tensor.line.kind == "embedding"]
    vocabulary = Space("vocab")
    embeddings = [tensor.name for tensor in tables if vocabulary in tensor.axes]
    heads = [tensor.name for tensor in tensors if tensor.tied]
    if not heads:
        heads = [name for name in plan.family.ignore if name.endswith("head.weight")]
    if not embeddings or embeddings[0] not in stored:
        return
    embedding = embeddings[0]
    for name in filter(stored.__contains__, heads):
        if not _equal(source, name, embedding):
            raise UserError(
                f"{source.folder}: config.json ties the head to {embedding}, but {name} is stored too and "
                "differs, and transformers uses what is stored; say tie_word_embeddings: false in "
                "config.json, or remove that tensor"
            )


def _equal(source: Checkpoint, one: str, other: str) -> bool:
    """Check whether two stored tensors hold the same bits, some rows at a time."""
    stored = source.tensors[one]
    beside = source.tensors[other]
    if (stored.dtype, stored.shape) != (beside.dtype, beside.shape):
        return False
    rows = stored.shape[0]
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        own = source.read(one, start, stop)
        equal = own == source.read(other, start, stop)
        if not equal.all():
            return False
    return True
