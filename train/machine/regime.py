"""The regime of a budget: is the target larger than the size that a frontier found best for it?

A frontier.json of `outgrow frontier` has the best size of flat models at several budgets; between two of them
it is read linearly in log FLOPs and log parameters, and outside of them it says nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import read_object

SLACK = 1.05  # a budget so near to the range is inside of it: budgets are whole steps


def multiplied(config: Mapping[str, Any], parameters: int) -> int:
    """The parameters of a network without its embedding table, which an untied head does not need."""
    from outgrow.model.build import known_size  # imports torch

    table = (known_size(config, "vocab_size") or 0) * (known_size(config, "hidden_size") or 0)
    return parameters if config.get("tie_word_embeddings") else parameters - table


def regime(path: Path, size: int, flops: float) -> str | None:
    """A warning about a target of `size` parameters in matrices and head for `flops`; None for none.

    Raises:
        UserError: the file is no frontier.
    """
    record = read_object(path, "write it with `outgrow frontier`")
    try:
        points = sorted((float(row["flops"]), int(row["parameters"])) for row in record["best"])
        low = points[0][0]
        high = points[-1][0]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"forecast.frontier: {path} is no frontier ({error}); write it with `outgrow frontier`",
        ) from error
    if not low / SLACK <= flops <= high * SLACK:
        return f"{path} measured {low:.3g} to {high:.3g} FLOPs, so it says nothing about {flops:.3g}"
    best = _between(points, min(max(flops, low), high))
    if size <= best:
        return None
    return (
        f"{size:,} parameters in matrices and head is larger than the best size of the frontier for "
        f"{flops:.3g} FLOPs, {best:,.0f}: there the smaller network wins whatever the growth; more "
        "tokens, or a smaller target"
    )


def _between(points: list[tuple[float, int]], flops: float) -> float:
    """The best size at a budget between two measured ones, linear in the logs."""
    for (before, small), (after, large) in itertools.pairwise(points):
        if flops <= after:
            share = math.log(flops / before) / math.log(after / before)
            return small * (large / small) ** share
    return points[-1][1]
