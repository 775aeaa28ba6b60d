"""State spaces (Mamba 2, arXiv 2405.21060) as wide as a multiple of the hidden size: their heads grow with
it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
GROUPS = re.compile(r"n_?groups$")


@dataclass(frozen=True)
class Mixer:
    """The state spaces of a tiny model.

    Attributes:
        modules: the prefixes of their tensors.
        heads, dim: the config keys of the heads and of the channels of each.
        groups: the config key of the number of groups of heads, each with state projections of its own.
        inner: number of channels, heads × dim.
    """

    modules: tuple[str, ...]
    heads: str
    dim: str
    groups: str | None
    inner: int

    def count(self, config: Mapping[str, Any]) -> int:
        """Count the groups of heads of a config."""
        named = config.get(self.groups or "")
        return int(named or 1)


def find_mixer(
    config: Mapping[str, Any], shapes: Shapes, wider: Callable[..., Shapes | None]
) -> Mixer | None:
    """Find the state spaces whose heads have to grow with the hidden size.

    Args:
        wider: builds the shapes under twice the hidden size and twice the values of further keys; None where
            the class does not build.

    Returns:
        None where there are none, or they have a size of their own.
    """
    vectors = [name for name, shape in shapes.items() if len(shape) == 1]
    logs = [name for name in vectors if name.endswith(".A_log")]
    modules = tuple(name.removesuffix(".A_log") for name in logs)
    out = f"{modules[0]}.out_proj.weight" if modules else ""
    if out not in shapes:
        return None
    rates = logs[0]
    (heads,) = shapes[rates]
    inner = shapes[out][1]
    sizes = {name: value for name, value in config.items() if type(value) is int}
    alone = wider()
    stays = alone and alone[out][1] == inner
    if inner % heads or stays:
        return None

    def key(size: int, grown: int) -> str | None:
        """Find the key of that size which, doubled with the width, makes `grown` heads."""
        candidates = [name for name, value in sizes.items() if value == size]
        for name in candidates:
            moved = wider(name)
            if not moved:
                continue
            doubled = moved[out][1] == 2 * inner
            if doubled and moved[rates] == (grown,):
                return name
        return None

    rows = key(heads, 2 * heads)
    dims = key(inner // heads, heads)
    counts = [name for name in sizes if GROUPS.search(name)]
    groups = counts[0] if counts else None
    if not rows or not dims:
        return None
    return Mixer(modules, rows, dims, groups, inner)
