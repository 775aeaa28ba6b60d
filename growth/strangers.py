"""The family of a source, known here or not: a `model_type` without a schema gets what its checkpoint lets one know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.checkpoint import Checkpoint
from model.config import Target
from model.errors import UserError
from model.family import Family, families, family_of
from model.outline import outline


@dataclass(frozen=True)
class Known:
    """A family, and what is and is not known of it, in words; nothing has to be said of one with a schema of its own."""

    family: Family
    notes: tuple[str, ...] = ()


def know(source: Checkpoint | Mapping[str, Any], target: Target) -> Known:
    """The family of `source`; without a schema an outline that can grow in depth alone.

    Raises:
        UserError: the family is unknown and there is no checkpoint to read it off, or its layers cannot be told apart.
    """
    config = source.config if isinstance(source, Checkpoint) else source
    if not isinstance(source, Checkpoint) or "model_type" not in config or config["model_type"] in families():
        return Known(family_of(config))
    family = outline(config, {name: stored.shape for name, stored in source.tensors.items()})
    return Known(family, _what_an_outline_says(family, target))


def _what_an_outline_says(family: Family, target: Target) -> tuple[str, ...]:
    depth = family.field_name("num_hidden_layers")
    if not isinstance(target, Mapping) or target.keys() - {depth, "num_hidden_layers"}:
        raise UserError(
            f"family {family.name!r} has no schema, so which axes belong together is unknown and it can grow in depth alone; give "
            f"target={{{depth}:N}}, or register a schema (README, 'Add a family')"
        )
    return (
        f"family {family.name!r} has no schema: layers were told by their names, and whole layers are copied",
        "unknown: which tensors write to the residual stream, so new layers cannot start as the identity",
    )
