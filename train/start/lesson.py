"""The text that a learned growth is fitted on, held against what the run validates on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.growth.learned.learn import calibration
from outgrow.growth.learned.lessons import LEARNED
from outgrow.growth.learned.text import Calibration, check_there
from outgrow.growth.planning import plan
from outgrow.model.base.errors import UserError
from outgrow.train.data.shards import open_data
from outgrow.train.machine.forecast import target
from outgrow.train.start.passes import prepared

if TYPE_CHECKING:
    from outgrow.train.data.shards import TokenData
    from outgrow.train.settings import Settings
    from outgrow.train.start.stages import Stage

COMPARED = 64  # tokens of each window, at its beginning
MOST = 1 << 25  # validation tokens that are looked through


def check_text(settings: Settings, stage: Stage, source: Path | None, data: TokenData) -> None:
    """Look for the text that a learned growth is fitted on among the validation tokens.

    It is found where both are cut by one tokenizer.

    Raises:
        UserError: a quarter of its windows are there, or it cannot be read.
    """
    if settings.growth.operator not in LEARNED or source is None:
        return
    text = _calibration(settings, stage.config, source)
    if text is not None:
        _check_apart(text, data)


def lesson_faults(settings: Settings) -> Iterator[str]:
    """List what is wrong with a learned growth and its text, as far as it can be told before the run begins:
    that of a source on the Hub is not read, nor is a folder of tokens that the run itself is to prepare.
    """
    growth = settings.growth
    if growth.operator not in LEARNED:
        return
    home = settings.data.home
    written = growth.options.get("text")
    text = None if written is None else Path(str(written)).expanduser()
    if text is not None and text.absolute() == home.absolute() and not text.exists():
        return
    source = None if settings.source is None else Path(settings.source)
    try:
        if source is None or not source.is_dir():
            if text is not None:
                check_there(str(text))
            return
        read = _calibration(settings, target(settings), source)
        if read is not None:
            for folder in prepared(home):
                _check_apart(read, open_data(folder))
    except UserError as fault:
        yield str(fault)


def _calibration(settings: Settings, config: dict[str, Any], source: Path) -> Calibration | None:
    """Read the text that the start of a run is learned on; None where it is learned on none."""
    growth = settings.growth
    learned = plan(source, config, growth.operator, seed=settings.seed, **growth.options)
    if learned.lesson is None or learned.lesson.text is None:
        return None
    return calibration(learned, source)


def _check_apart(text: Calibration, data: TokenData) -> None:
    """Refuse a text of which a quarter is among the validation tokens."""
    first = data.validation.tokens[:MOST]
    beginning_bytes = np.asarray(first, "<u4").tobytes()
    rows = (*text.fit, *text.held)
    beginnings = [row[:COMPARED].astype("<u4").tobytes() for row in rows]
    shared = sum(beginning in beginning_bytes for beginning in beginnings)
    if 4 * shared >= len(beginnings):
        raise UserError(
            f"growth.text {text.name!r}: is the text that the run validates on ({shared} of "
            f"{len(beginnings)} windows are in it), so its losses would say nothing; give training text, "
            f"such as growth.text={data.folder}, of which the training part is read"
        )
