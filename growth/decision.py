"""The decision of a growth: every target tensor once, with its source, maps and scales; frozen, without
weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Protocol

import numpy as np

from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.layers import LayerMap
from outgrow.growth.recipe import Growth, Recipe
from outgrow.model.composite import of_text
from outgrow.model.dtypes import TORCH_NAMES, bytes_of, config_dtype, is_float
from outgrow.model.family import Config, Family, Tensor
from outgrow.model.keys import follow_layers
from outgrow.model.starts import Start

LineKey = tuple[str, str, bool]  # of a schema's line: name, text, whether the tensor is its bias


class Sparse(Protocol):
    """Description of a plan's change into a mixture of experts; `growth.experts.Change` is one."""

    @property
    def within(self) -> Decision:
        """The plan in the source's own family."""

    @property
    def options(self) -> object:
        """The operator's options."""

    @property
    def moments_lost(self) -> Iterator[str]:
        """Reasons why moments of experts and routers are not those of the mixture's own gradients."""

    def active_parameters(self, plan: Decision) -> int:
        """Number of parameters that one token meets."""

    def share_of_gradient(self, step: Step) -> float:
        """Share of its source's gradient that a target tensor's is beyond what the maps say: 0 where no
        factor gives it.
        """

    def repeats(self, step: Step) -> bool:
        """Check whether a target tensor is of an expert that holds what one before it holds already."""

    def summary(self, plan: Decision) -> str:
        """One line: the experts, and what a token meets of them."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the change."""


class Lesson(Protocol):
    """Lesson that is learned once the steps are written; `growth.learned.lessons` has them."""

    @property
    def text(self) -> str | None:
        """The file or folder that it is fitted on; None of one that learns on the source's own layers."""

    @property
    def reason(self) -> str:
        """The part that is learned, as a reason of the certificate."""


@dataclass(frozen=True, eq=False)
class Finish:
    """Treatment of a tensor's entries beyond its maps, in a mixture of experts.

    Attributes:
        deviation: of fresh entries; None where they start as the library's class starts them.
        alike: so many consecutive fresh rows are one and the same.
        redrawn: (axis, indices) whose entries are drawn anew, normal with the mean and the deviation of those
            that they replace.
        jitter: on rows that are further copies, a uniform number between minus and plus this.
        noise: normal, on every entry, relative to the source tensor's root mean square.
    """

    deviation: float | None = None
    alike: int = 1
    redrawn: tuple[int, np.ndarray] | None = None
    jitter: float = 0.0
    noise: float = 0.0

    @property
    def changes_copies(self) -> bool:
        adds_noise = self.jitter > 0 or self.noise > 0
        return self.redrawn is not None or adds_noise


@dataclass(frozen=True, eq=False)
class Step:
    """One target tensor: where it comes from and how.

    Attributes:
        tensor: the target tensor, with its schema line and shape.
        source: the source tensor's name; None where nothing is inherited.
        maps: one axis map per stored axis.
        zero: the tensor starts at zero (a writer of an identity layer).
        next_source: the same tensor of the next source layer, for indices that come from there.
        beside: the same tensor of another source layer; the mean of both stands for the source.
        diagonal: the n-th copy on the writing axis reads the n-th copies only.
        finish: what is done to it beyond that; None where nothing is.
    """

    tensor: Tensor
    source: str | None
    maps: tuple[AxisMap, ...]
    zero: bool = False
    next_source: str | None = None
    beside: str | None = None
    diagonal: bool = False
    finish: Finish | None = None

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def is_copy(self) -> bool:
        """Check whether it is its source's bytes."""
        is_touched = self.finish is not None and self.finish.changes_copies
        has_source = self.source is not None and not self.zero
        if is_touched or self.beside is not None or not has_source:
            return False
        return all(axis.is_identity for axis in self.maps)

    @property
    def is_fresh(self) -> bool:
        """Check whether any of its entries is drawn as the model's class starts it."""
        return not self.zero and (
            self.source is None or any((axis.fill == Fill.RANDOM).any() for axis in self.maps)
        )

    @property
    def source_shape(self) -> tuple[int, ...]:
        return tuple(axis.source for axis in self.maps)


@dataclass(frozen=True, eq=False)
class Decision:
    """A growth, decided and not yet done; `growth.plan.Plan` adds what is proved and said of it.

    Attributes:
        growth: family, source and target configs, seed.
        operator, options, noise: the recipe by name, as recorded in `growth.json`.
        recipe: one expansion per space.
        layers: the layer map.
        steps: every stored target tensor exactly once, in the order of the file.
        dtypes: source tensor name → safetensors dtype, where the weights are at hand.
        notes: what is and is not known of a family that has no schema of its own.
        starts: target tensor name → how the library's class starts it, for what is drawn fresh; a schema of
            its own says it by itself.
        change: how the plan goes from one family to another, or from few experts to many; None where it does
            not.
        lesson: what is learned once the steps are written; None where nothing is.
        fresh: the deviation of matrices' fresh entries: "init", the class's own; "match", the root mean
            square of the source tensor that they stand beside.
    """

    growth: Growth
    operator: str
    options: Mapping[str, Any]
    noise: float
    recipe: Recipe
    layers: LayerMap
    steps: tuple[Step, ...]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    starts: Mapping[str, Start] = field(default_factory=dict)
    change: Sparse | None = None
    lesson: Lesson | None = None
    fresh: str = "init"

    @property
    def family(self) -> Family:
        return self.growth.family

    @property
    def source_config(self) -> Config:
        return self.growth.source_config

    @cached_property
    def target_config(self) -> dict[str, Any]:
        """The config that the grown folder gets: what follows a layer or an epsilon has followed."""
        # a change of family has written it of one in which everything followed
        config = dict(self.growth.target_config)
        if self.change is not None:
            return config
        return followed(config, self.growth, self.recipe, self.layers)

    @property
    def is_noisy(self) -> bool:
        """Check whether noise falls on anything: on what reads copies."""
        if self.noise <= 0:
            return False
        for space, expansion in self.recipe.expansions.items():
            if not self.family.uses(space):
                continue
            if expansion.read.counts().max(initial=0) > 1:
                return True
        return False

    @cached_property
    def target_parameters(self) -> int:
        sizes = [prod(step.shape) for step in self.steps]
        return sum(sizes)

    @cached_property
    def source_parameters(self) -> int:
        tensors = self.growth.source_family.tensors(self.source_config)
        stored = [tensor for tensor in tensors if not tensor.tied]
        return sum(prod(tensor.shape) for tensor in stored)

    def source_name(self, tensor: Tensor) -> str:
        """The source tensor that a target tensor grows from."""
        return source_name(
            tensor, self.growth, None if tensor.layer is None else self.layers.layers[tensor.layer]
        )

    def dtype(self, step: Step) -> str:
        """The safetensors dtype of a target tensor: the one asked for, else its source's, else the
        config's."""
        name = step.source or self.source_name(step.tensor)
        stored = self.source_dtype(name)
        if self.growth.dtype and is_float(stored):
            return TORCH_NAMES[self.growth.dtype]
        return stored

    def source_dtype(self, name: str) -> str:
        """The safetensors dtype of a source tensor, or of what it would have where the source has none of
        that name.
        """
        own = self.dtypes.get(name)
        if own:
            return own
        dtypes = self.dtypes.values()
        any_float = next(filter(is_float, dtypes), None)
        return any_float or config_dtype(self.source_config) or "F32"

    def nbytes(self, step: Step) -> int:
        return bytes_of(self.dtype(step), step.shape)

    @property
    def target_bytes(self) -> int:
        return sum(map(self.nbytes, self.steps))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values: what was decided, one entry per space, per layer and per tensor."""
        return {
            "operator": self.operator,
            "options": dict(self.options),
            "depth": self.layers.rule,
            "noise": self.noise,
            "seed": self.growth.seed,
            **({} if self.growth.dtype is None else {"dtype": self.growth.dtype}),
            **({} if self.fresh == "init" else {"fresh": self.fresh}),
            "family": self.family.name,
            "notes": list(self.notes),
            "spaces": {
                space: expansion.rule
                for space, expansion in self.recipe.expansions.items()
                if self.family.uses(space)
            },
            "layers": list(self.layers.layers),
            "identity_layers": [number for number, idle in enumerate(self.layers.identity) if idle],
            **({"mean_layers": sorted(self.layers.between)} if self.layers.between else {}),
            "source_parameters": self.source_parameters,
            "target_parameters": self.target_parameters,
            **({} if self.change is None else {"change": self.change.to_dict()}),
            "tensors": {
                step.name: {"source": step.source, "shape": list(step.shape), "line": step.tensor.line.text}
                for step in self.steps
            },
            **({"starts": {name: str(start) for name, start in self.starts.items()}} if self.starts else {}),
        }

    @cached_property
    def hash(self) -> str:
        """A fingerprint of everything that decides the result but the weights; of notes, nothing, which tell
        what was measured here.
        """
        decided = {**self.to_dict(), "notes": []}
        digest = hashlib.sha256(
            json.dumps([decided, self.target_config], sort_keys=True, default=str).encode()
        )
        for step in self.steps:
            for axis in step.maps:
                for array in (axis.index, axis.gain, axis.fill):
                    digest.update(array.tobytes())
        return digest.hexdigest()[:16]


def source_names(tensor: Tensor, growth: Growth, layers: LayerMap) -> list[str]:
    """The source tensors like a target tensor, of every layer that has it."""
    if tensor.layer is None:
        return [source_name(tensor, growth, None)]
    having = tensor.line.layers_of(layers.source)
    return [source_name(tensor, growth, layer) for layer in having]


def source_name(tensor: Tensor, growth: Growth, layer: int | None) -> str:
    """The source tensor, in source layer `layer`, that a target tensor grows from."""
    line = tensor.line
    config = growth.source_config
    is_tied = line.tied_if and growth.family.flag(config, line.tied_if)
    if is_tied and not tensor.is_bias:
        return str(line.tied_to)
    return tensor.name if layer is None else tensor.name_in(layer)


def followed(config: dict[str, Any], growth: Growth, recipe: Recipe, layers: LayerMap) -> dict[str, Any]:
    """A target's config in which what follows a layer or an epsilon has followed."""
    family = growth.family
    eps = family.names.get("norm_eps")
    if recipe.eps_factor != 1 and eps is not None:  # some models have a constant in their code instead (OPT)
        source_eps = family.eps(growth.source_config)
        config[eps] = source_eps * recipe.eps_factor
    source = dict(growth.source_config)
    # the class would tell them by their numbers, which move
    if growth.grows("layer") and (kinds := family.layer_kinds(source)):
        source["layer_types"] = kinds
        config["layer_types"] = config.get("layer_types") or kinds
    followed_values = {}
    for key, value in source.items():
        is_untouched = of_text(key) and config.get(key) == value
        if is_untouched:
            followed_values[key] = follow_layers(key, value, layers.layers, layers.source)
    return config | followed_values
