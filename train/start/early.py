"""The faults of a new run's source, told before torch is waited for and any text is prepared."""

from __future__ import annotations

from pathlib import Path

from outgrow.model.checkpoint import Checkpoint
from outgrow.model.family import has_schema
from outgrow.model.locate import is_hub_name, locate
from outgrow.train.run.folder import RUN
from outgrow.train.settings import UNGROWN, Settings, horizon_runs


def check_source(settings: Settings) -> None:
    """Open the local source of a run that has not begun, and plan its growth, where that needs no torch.

    A name on the Hub is looked up later, and the schema of a family that has none is derived later.

    Raises:
        UserError: the source is no checkpoint, or cannot be grown so.
    """
    if settings.source is None or _has_begun(settings) or is_hub_name(settings.source):
        return
    growth = settings.growth
    with Checkpoint(locate(settings.source)) as checkpoint:
        grows_at_once = growth.operator not in UNGROWN and not growth.stages
        planned = grows_at_once and settings.target is not None
        if not planned or not has_schema(checkpoint.config):
            return
        from outgrow.growth.planning import plan  # numpy takes its time too

        plan(checkpoint, settings.target, growth.operator, seed=settings.seed, **growth.options)


def _has_begun(settings: Settings) -> bool:
    """Check whether a run is there, of any horizon: it may need its source no more."""
    folders = [Path(run.out) for run in horizon_runs(settings)]
    return any((folder / RUN).is_file() for folder in folders)
