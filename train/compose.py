"""The way from YAML and overrides to a run's settings: frozen values, or one error that names every fault.

Nothing here imports torch, so that a misspelt key is answered at once. No code beyond this file sees a
`DictConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.compose import CONF, MISSING, compose_config, plain
from outgrow.model.base.settings import settings_of
from outgrow.train.disagreements import disagreements
from outgrow.train.settings import Settings
from outgrow.train.start.naming import tell_changes

if TYPE_CHECKING:
    from omegaconf import DictConfig


def compose(overrides: list[str], own: Path | None = None) -> Settings:
    """Settings of `conf/train.yaml` under Hydra overrides (`["experiment=tiny", "seed=1"]`).

    Args:
        own: a folder of the user's, with further leaves.

    Raises:
        UserError: every fault of the overrides and of what they compose to, in one message.
    """
    cfg, faults = compose_config(CONF, "train", overrides, own)
    if not faults:
        tell_changes(cfg, overrides, own)
    return settings_from(cfg, faults, own)


def settings_from(
    cfg: DictConfig | Mapping[str, Any], faults: Sequence[str] = (), own: Path | None = None
) -> Settings:
    """A composed configuration, read and checked.

    Args:
        cfg: what Hydra composed, or the same as plain dicts.
        faults: faults that are already known; they are told with the ones found here.
        own: a folder of the user's, with further leaves.

    Raises:
        UserError: unknown (with near matches), missing or mistyped keys and values that cannot work together,
            all at once.
    """
    every_fault = list(faults)
    values = plain(cfg, every_fault)
    if "evaluate" in values:
        values["evaluate"] = _with_suite(values["evaluate"], own, every_fault)
    return settings_of(Settings, values, every_fault, disagreements)


def _with_suite(benchmarks: Any, own: Path | None, faults: list[str]) -> Any:
    """The settings `evaluate` with the suite itself in the place of its name: the leaf that `outgrow evaluate
    suite=NAME` would measure. MISSING, and why, where there is none.
    """
    suite = benchmarks.get("suite") if isinstance(benchmarks, dict) else None
    if suite is None or isinstance(suite, dict):
        return benchmarks
    cfg, leaf_faults = compose_config(CONF, "evaluate", [f"suite={suite}"], own)
    further = [fault for fault in leaf_faults if fault not in faults]
    faults += [f"evaluate: {fault}" for fault in further]
    return MISSING if further else {**benchmarks, "suite": plain(cfg, faults)["suite"]}
