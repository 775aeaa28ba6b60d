"""The input of an operator (`Growth`) and its decision (`Recipe`), from which every tensor's maps follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import sqrt
from typing import Literal

from outgrow.growth.expansion import AxisMap, Expansion, compose, concatenate
from outgrow.model.dtypes import config_dtype, is_short
from outgrow.model.family import Config, Family, Tensor
from outgrow.model.notation import Axis, Parts, Product, Space


@dataclass(frozen=True, eq=False)
class Growth:
    """The input of an operator: a family, two configs and their sizes.

    Attributes:
        dtype: what the result is stored in ("float32"); None where that is the source's.
        origin: the source's family, where the target is of another one.
    """

    family: Family
    source_config: Config
    target_config: Config
    seed: int = 0
    dtype: str | None = None
    origin: Family | None = None

    @property
    def source_family(self) -> Family:
        return self.origin or self.family

    @property
    def short(self) -> bool:
        """Check whether the result is stored in 16 bits, as the source's config says; gains are then
        rounded."""
        stored = config_dtype(self.source_config) or "F32"
        return self.dtype is None and is_short(stored)

    @property
    def sets_eps(self) -> bool:
        """Check whether the residual stream's norms can have another epsilon: a key sets it, and for no other
        norm.
        """
        family = self.family
        source = self.source_config
        return (
            family.sets_eps
            and not family.other_norms(source)
            and family.eps(source) == family.eps(self.target_config)
        )

    @cached_property
    def source(self) -> dict[str, int]:
        return self.source_family.sizes(self.source_config)

    @cached_property
    def target(self) -> dict[str, int]:
        return self.family.sizes(self.target_config)

    @property
    def smaller(self) -> list[str]:
        """The faults of a target that is smaller than the source somewhere."""
        source = self.source
        target = self.target
        spaces = [
            space
            for space in source
            if target[space] < source[space] and (space == "layer" or self.family.uses(space))
        ]
        keys = {space: self.family.size_keys(space, self.target_config) for space in spaces}
        return [
            (
                f"target: {space} {target[space]} is smaller than the source's {source[space]} "
                f"({keys[space]} in the config); growth only enlarges"
            )
            for space in spaces
        ]

    @property
    def tied(self) -> bool:
        return self.family.ties(self.target_config)

    @property
    def hidden_ratio(self) -> float:
        """Source over target hidden size: its powers undo the change of a model's own factors."""
        return self.source["residual"] / self.target["residual"]

    @property
    def embedding_gain(self) -> float:
        """The gain that undoes the change of a model's own factor sqrt(hidden) on its embeddings (Gemma);
        else 1.
        """
        return self.hidden_ratio ** max(
            line.scaled if line.kind == "embedding" else 0.0 for line in self.family.lines
        )

    @property
    def rotary_kept(self) -> bool:
        """Check that exactly the same dimensions of a head are turned by the same angles."""
        before = self.family.rotary_dims(self.source_config)
        after = self.family.rotary_dims(self.target_config)
        return before == after

    @property
    def attention_gain(self) -> float:
        """The gain on q·k under which the library's scaling gives the source's attention logits."""
        family = self.family
        scale = family.attention_scale
        condition = family.scaled_if
        if condition is not None and not family.flag(self.source_config, condition):
            return 1.0
        if scale == "head_dim":
            head_dim = self.source["qk"]
            return sqrt(self.target["qk"] / head_dim)
        if scale == "none":
            return 1.0
        before = family.fixed_scale(self.source_config)
        return sqrt(family.fixed_scale(self.target_config) / before)

    def grows(self, space: str) -> bool:
        """Check whether a space that the family has becomes larger."""
        before = self.source.get(space)
        return before != self.target.get(space)


@dataclass(frozen=True, eq=False)
class Recipe:
    """The decision of an operator.

    Attributes:
        expansions: one per space.
        flat: axes made of several spaces grow as one, whatever they are made of (`tile`'s flat variant).
        eps_factor: what the target's norm epsilon is multiplied by.
        diagonal: the n-th copies of a writer read the n-th copies only (HyperCloning's diagonal form), not
            all of them evenly.
        factor: one more factor on a tensor, by the spaces it reads and writes that grow.
        hidden_ratio: what is taken to the power of the hidden size by which the model multiplies a tensor's
            output; 1 leaves it.
        inherits: False when nothing is taken from the source.
        noisy_head: whether noise falls on the output head too.
        moments: how an optimizer's averages grow with the weights (`growth.moments`): by the transposed maps,
            kept on original entries, or reset.
    """

    expansions: Mapping[str, Expansion]
    flat: Callable[[int, int], AxisMap] | None = None
    diagonal: bool = False
    factor: Callable[[Tensor], float] | None = None
    eps_factor: float = 1.0
    hidden_ratio: float = 1.0
    inherits: bool = True
    noisy_head: bool = True
    moments: Literal["transpose", "kept", "reset"] = "reset"

    def spaces_only(self) -> Recipe:
        """The same recipe with every axis grown space by space."""
        return replace(self, flat=None, factor=None)

    def maps(self, tensor: Tensor) -> tuple[AxisMap, ...]:
        """One map per stored axis of `tensor`, composed from the expansions of its spaces in the role it
        plays for each.
        """
        axes = zip(tensor.axes, tensor.reads, strict=True)
        maps = [self._axis(axis, reads, tensor) for axis, reads in axes]
        if self.factor is not None:
            factor = self.factor(tensor)
            maps[0] = maps[0].scaled(factor)
        if tensor.line.scaled and not tensor.is_bias:
            written = tensor.reads.index(False)
            factor = self.hidden_ratio**tensor.line.scaled
            maps[written] = maps[written].scaled(factor)
        return tuple(maps)

    def _axis(self, axis: Axis, reads: bool, tensor: Tensor) -> AxisMap:
        if self.flat is not None and isinstance(axis, Parts):
            parts = [self._axis(part, reads, tensor) for part in axis.parts]
            return reduce(concatenate, parts)
        expanded = compose(axis, lambda space: self._side(space, reads, tensor))
        if self.flat is not None and isinstance(axis, Product):
            return self.flat(expanded.source, expanded.target)
        return expanded

    def _side(self, space: Space, reads: bool, tensor: Tensor) -> AxisMap:
        expansion = self.expansions[space.name]
        line = tensor.line
        match line.kind:
            case "norm":
                return expansion.shift if tensor.is_bias else expansion.scale
            case "final norm":
                return expansion.final_shift if tensor.is_bias else expansion.final_scale
            case "post norm":
                return expansion.post_scale
        if tensor.is_head and reads:
            return expansion.head
        return expansion.read if reads != space.dual else expansion.write
