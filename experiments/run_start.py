"""The start of a run and what it read, as its folder tells of them: loss at step 0, receipt, passes, text.

The passes are counted in the manifest of the run's text, and the text of its source is told by the source's
own run: both lie where the run's settings name them, seen from the working directory. What lies there no
more, or is another by now, is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from outgrow.experiments.runs import RUN_AGAIN, Run
from outgrow.model.base.errors import UserError
from outgrow.model.base.settings import read
from outgrow.model.keys import only
from outgrow.train.data.settings import DataSettings
from outgrow.train.data.shards import read_manifest
from outgrow.train.run.folder import RUN, SUMMARY
from outgrow.train.run.record import RunRecord, SourceCost, Summary
from outgrow.train.settings import UNGROWN
from outgrow.train.start.passes import prepared


@dataclass(frozen=True)
class RunStart:
    """How a run started, and what it read. Losses and KL in nats per token; None: not measured, or not known.

    Attributes:
        operator: of the growth that it starts from; "scratch", or "source" for a source as it is.
        val_loss: before the first step.
        lossless: what the certificate of the growth says; None from scratch.
        max_delta, kl: of the growth's receipt: the grown model's logits against the source's.
        passes: over the training part of its text.
        source_data: fingerprint of the text that its source was trained on.
    """

    operator: str
    val_loss: float
    lossless: bool | None = None
    max_delta: float | None = None
    kl: float | None = None
    passes: float | None = None
    source_data: str | None = None

    @property
    def is_whole(self) -> bool:
        """Check that nothing is missing of what rule 8 asks for: a receipt, where something grew."""
        return self.operator in UNGROWN or self.max_delta is not None


def read_start(run: Run) -> RunStart:
    """The start of a complete run."""
    start = run.record.start
    return RunStart(
        operator=start.operator,
        val_loss=run.summary.start_val_loss,
        lossless=start.lossless,
        max_delta=start.max_delta,
        kl=start.measured("kl"),
        passes=_passes(run.record, run.summary.tokens),
        source_data=_source_data(start.source),
    )


def _passes(record: RunRecord, tokens: int) -> float | None:
    """The passes that `tokens` are over a run's text; None of a mixture, which reads each text as often as it
    says.
    """
    values = record.setting("data")
    if not isinstance(values, Mapping) or record.setting("mixture") is not None:
        return None
    names = [field.name for field in fields(DataSettings)]
    data = read(DataSettings, only(values, names), "", [])
    if data is None:
        return None
    with suppress(UserError):  # what lies there now is no text, or damaged
        for folder in prepared(data.home):
            manifest = read_manifest(folder)
            if manifest is not None and manifest["fingerprint"] == record.data.fingerprint:
                return tokens / int(manifest["splits"]["train"]["tokens"])
    return None


def _source_data(source: SourceCost | None) -> str | None:
    """The fingerprint of a source's text; None where its run is not there, or has been trained anew."""
    if source is None or source.path is None:
        return None
    folder = Path(source.path).parent
    try:
        record = RunRecord.read(folder / RUN, RUN_AGAIN)
        summary = Summary.read(folder / SUMMARY, RUN_AGAIN)
    except UserError:
        return None
    is_same = source.val_loss in (summary.final_val_loss, summary.ema_val_loss)
    return record.data.fingerprint if is_same else None
