"""Composing and reading are growth's door; a sweep is several of them, and its faults are told before its first run."""

from __future__ import annotations

from pathlib import Path

from growth.door import compose_config, load_yaml, plain, plain_text, read
from model.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"

__all__ = ["compose_config", "load_yaml", "plain", "plain_text", "read", "sweep_points"]


def sweep_points(overrides: list[str]) -> list[list[str]]:
    """The overrides of each run of a sweep, as Hydra's own sweeper makes them: lists of values, choice(), range() and glob().

    `["growth=a,b", "seed=range(2)"]` → `[["growth=a", "seed=0"], ["growth=a", "seed=1"], ["growth=b", "seed=0"], …]`. An override that
    cannot be read stays as it is, for composing to tell.

    Raises:
        UserError: it is a sweep that Hydra's sweeper does not make, such as interval().
    """
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    readable, unreadable = [], []
    with initialize_config_dir(str(CONF), version_base="1.3"):  # glob() looks for leaves there
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for text in overrides:
            try:
                readable += parser.parse_overrides([text])
            except HydraException:
                unreadable.append(text)
        try:
            (points,) = BasicSweeper.split_arguments(readable, None)
        except HydraException as error:
            raise UserError(f"sweep: {error}; give its values: KEY=1,2,3, or KEY=range(…), choice(…), glob(…)") from None
    if not points:
        raise UserError(f"sweep: {' '.join(overrides)}: no point; a range() or glob() in it is empty")
    return [[*point, *unreadable] for point in points]
