"""The text that a learned growth is fitted on, held against what the run validates on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from outgrow.growth.learned.learn import calibration
from outgrow.growth.learned.lessons import LEARNED
from outgrow.growth.planning import plan
from outgrow.model.base.errors import UserError

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
    growth = settings.growth
    if growth.operator not in LEARNED or source is None:
        return
    learned = plan(source, stage.config, growth.operator, seed=settings.seed, **growth.options)
    if learned.lesson is None or learned.lesson.text is None:
        return
    text = calibration(learned, source)
    first = data.validation.tokens[:MOST]
    held = np.asarray(first, "<u4").tobytes()
    rows = (*text.fit, *text.held)
    beginnings = [row[:COMPARED].astype("<u4").tobytes() for row in rows]
    shared = sum(beginning in held for beginning in beginnings)
    if 4 * shared >= len(beginnings):
        raise UserError(
            f"growth.text {text.name!r}: is the text that the run validates on ({shared} of "
            f"{len(beginnings)} windows are in it), so its losses would say nothing; give training text, "
            f"such as growth.text={data.folder}, of which the training part is read"
        )
