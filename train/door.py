"""Composing and reading are growth's door; a sweep is several of them, and its faults are told before its first run."""

from __future__ import annotations

from itertools import product

from growth.door import compose_config, plain, read

__all__ = ["compose_config", "plain", "read", "sweep_points"]


def sweep_points(overrides: list[str]) -> list[list[str]]:
    """The overrides of each run of a sweep, in Hydra's order.

    `["growth=a,b", "seed=0"]` → `[["growth=a", "seed=0"], ["growth=b", "seed=0"]]`. An override that cannot be read stays as it is, for
    composing to tell.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    axes: list[list[str]] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
        except HydraException:
            values = None
        axes.append([text] if values is None else [f"{override.input_line.split('=', 1)[0]}={value}" for value in values])  # type: ignore[union-attr]
    return [list(point) for point in product(*axes)]
