"""Several processes of one run: they were given the same settings, or all of them end with what differs.

Two that differ would hang in an exchange of other sizes, end in the library's traceback, or, where only a
rate differs, train something that nobody asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from outgrow.model.base.errors import UserError
from outgrow.train.start.neutral import flatten

if TYPE_CHECKING:
    from outgrow.train.settings import Settings

# what each process may have its own of: where a text lies on its machine, and what only process 0 does
OWN = ("out", "name", "changes", "progress", "logger", "dry_run", "forecast")
PLACES = ("folder", "path", "validation_path", "workers")  # of a text

PARTING = timedelta(seconds=60)  # that process 0 waits for the others to read what it told


def check_agreement(
    own: Mapping[str, Any], store: torch.distributed.Store | None, process: int, count: int
) -> None:
    """Let process 0 hold the settings of all `count` processes against its own.

    Args:
        own: `shared` settings of this process.
        store: that all of them share; None: there is one process.

    Raises:
        UserError: on every process, naming what one was given otherwise.
    """
    if store is None:
        return
    store.set(f"settings of {process}", json.dumps(own))
    if process == 0:
        verdicts = (_verdict(own, other, _settings_of(store, other)) for other in range(1, count))
        store.set("verdict", next(filter(None, verdicts), ""))
    verdict = store.get("verdict").decode()
    if verdict:
        _part(store, process, count)
        raise UserError(verdict)


def _part(store: torch.distributed.Store, process: int, count: int) -> None:
    """Let process 0, which holds the store, end last: the others would lose it before they have read it."""
    store.set(f"{process} has read the verdict", "")
    if process == 0:
        readers = [f"{other} has read the verdict" for other in range(1, count)]
        # one that has died meanwhile is not waited for
        with suppress(torch.distributed.DistError):
            store.wait(readers, PARTING)


def shared(settings: Settings) -> dict[str, Any]:
    """The settings that all processes have in common, flat: dotted key → JSON value."""
    flat = flatten(json.loads(json.dumps(asdict(settings))))
    return {key: value for key, value in flat.items() if not _is_own(key)}


def _is_own(key: str) -> bool:
    """Check for a setting that each process may have its own of."""
    parts = key.split(".")
    group, last = parts[0], parts[-1]
    is_place = group in ("data", "mixture") and last in PLACES
    return group in OWN or is_place


def _settings_of(store: torch.distributed.Store, process: int) -> dict[str, Any]:
    """The settings that a process has put into the store, for which it is waited."""
    settings: dict[str, Any] = json.loads(store.get(f"settings of {process}"))
    return settings


def _verdict(own: Mapping[str, Any], process: int, other: Mapping[str, Any]) -> str:
    """Say what a process was given otherwise than process 0; "" where nothing is."""
    differing = [key for key in sorted({**own, **other}) if own.get(key) != other.get(key)]
    if not differing:
        return ""
    differences = "; ".join(f"{key}={other.get(key)}, not {own.get(key)}" for key in differing)
    return (
        f"process {process} was started with other settings than process 0: {differences}; start "
        "every process with the same command"
    )
