"""The text as a run reads it: cut by its source's own tokenizer wherever the source has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from outgrow.train.corpus.build import cut_by
from outgrow.train.data.settings import DataSettings
from outgrow.train.data.tokenizer import TRAIN, has_tokenizer, tokenizer_identity

if TYPE_CHECKING:
    from outgrow.train.data import TokenData
    from outgrow.train.run.record import RunRecord
    from outgrow.train.settings import Settings

# what conf/optimizer's rates were found on has fewer, and likes more
TINY_PARAMETERS, TINY_RATE = 20_000_000, 1e-3


def reading(settings: Settings, source: Path | None, run: RunRecord | None) -> DataSettings:
    """The data settings with a tokenizer where none is named: the source's own.

    A trained one where it has none.

    Args:
        run: the record of a run that has begun: it goes on reading as it began, and needs its source no more.

    Raises:
        UserError: the source's tokenizer cannot be loaded.
    """
    if settings.data.tokenizer is not None:
        return settings.data
    if run is not None:
        cut = run.data.cut
        return (
            settings.data
            if cut is None
            else replace(settings.data, folder=cut["folder"], tokenizer=_still_there(cut))
        )
    if source is None or not has_tokenizer(source):
        return settings.data
    return cut_by(settings.data, source)


def cut_record(settings: DataSettings) -> dict[str, str] | None:
    """The tokenizer that was chosen for the run, and the folder of its tokens.

    None where the run trains its own.
    """
    if settings.tokenizer in (None, TRAIN):
        return None
    return {"tokenizer": str(settings.tokenizer), "folder": str(settings.home)}


def _still_there(cut: Mapping[str, str]) -> str:
    """The tokenizer's folder: where it was, or beside the tokens that it cut."""
    tokenizer = cut["tokenizer"]
    return tokenizer if has_tokenizer(Path(tokenizer)) else f"{cut['folder']}/tokenizer"


def tokenizer_warnings(
    settings: Settings, source: Path | None, data: TokenData, teacher: Path | None = None
) -> Iterator[str]:
    """Warn before weights that have learnt one tokenizer's ids read another's, and before such a teacher."""
    if teacher is not None and has_tokenizer(teacher) and not _cuts(teacher, data):
        yield (
            f"warning: the teacher {teacher} was trained with another tokenizer than the one that cuts the "
            "text: what it predicts stands for other tokens; give its own (data.tokenizer=FOLDER), or a "
            "teacher of this one"
        )
    if source is None or settings.growth.operator == "scratch":
        return
    if not has_tokenizer(source):
        if settings.data.tokenizer in (None, TRAIN):
            yield (
                f"warning: the source {settings.source} comes without a tokenizer, and one was trained on "
                "the text: unless the source has learnt its ids, give the source's own as "
                "data.tokenizer=FOLDER"
            )
    elif not _cuts(source, data):
        yield (
            f"warning: data.tokenizer={settings.data.tokenizer} is not the tokenizer that the source "
            f"{settings.source} was trained with: its embeddings stand for other tokens, and much of what "
            "it knows is lost; data.tokenizer=null keeps the source's own"
        )


def _cuts(model: Path, data: TokenData) -> bool:
    """Check whether the tokenizer in a model's folder is the one that has cut the text."""
    return tokenizer_identity(str(model)) == tokenizer_identity(str(data.tokenizer_folder))


def rate_warnings(settings: Settings, parameters: int) -> Iterator[str]:
    """Warn of a learning rate that fits tiny models where a larger one is trained on."""
    rate = settings.optimizer.learning_rate
    too_high = parameters >= TINY_PARAMETERS and rate >= TINY_RATE
    if too_high and settings.growth.operator != "scratch":
        yield (
            f"warning: optimizer.learning_rate={rate:g} was found on models of one or two million "
            f"parameters; a pretrained model of {parameters:,} is usually trained on at 1e-5 to 3e-4: a "
            "rate that is too high forgets what it knows"
        )


def loss_warnings(settings: Settings, val_loss: float, vocab_size: int) -> Iterator[str]:
    """Warn of a first loss above the entropy of guessing, ln V (a perplexity above the number of tokens)."""
    if settings.growth.operator != "scratch" and val_loss > log(vocab_size):
        yield (
            f"warning: the first validation loss, {val_loss:.3f}, is above ln {vocab_size} = "
            f"{log(vocab_size):.3f}, what guessing would give: weights that are trained should start below "
            "it; are tokenizer, source and growth the ones that are meant?"
        )
