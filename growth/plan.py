"""The plan of a growth: every target tensor once, with its source, its maps and its scales. Built from configs alone, frozen, printable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

from model.checkpoint import Checkpoint, Stored, names_of
from model.composite import flat, of_text
from model.config import Target, resolve_target, rope_of, value_faults
from model.dtypes import RAW, TORCH_NAMES, config_dtype, is_float
from model.errors import UserError
from model.family import Config, Family, Tensor, initial_deviation
from model.presets import PRESETS, preset

from .arguments import check_arguments
from .certificate import Certificate, certify
from .expansion import AxisMap, Fill
from .layers import LayerMap, among_kinds, follow_layers, layer_map
from .operators import default_noise, recipe
from .recipe import Growth, Recipe
from .remarks import remarks
from .strangers import Known, hold_against_class, kinds_in_class, know


@dataclass(frozen=True, eq=False)
class Step:
    """One target tensor: where it comes from and how.

    Attributes:
        tensor: the target tensor, with its schema line and shape.
        source: the source tensor's name; None where nothing is inherited.
        maps: one axis map per stored axis.
        zero: the tensor starts at zero (a writer of an identity layer).
        next_source: the same tensor of the next source layer, for indices that come from there.
        diagonal: the n-th copy on the writing axis reads the n-th copies only.
    """

    tensor: Tensor
    source: str | None
    maps: tuple[AxisMap, ...]
    zero: bool = False
    next_source: str | None = None
    diagonal: bool = False

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def is_copy(self) -> bool:
        """Whether it is its source's bytes."""
        return self.source is not None and not self.zero and all(axis.is_identity for axis in self.maps)

    @property
    def source_shape(self) -> tuple[int, ...]:
        return tuple(axis.source for axis in self.maps)


TRUNKS = ("model", "transformer", "gpt_neox", "model.decoder")  # under what a head's class keeps the model that it is the head of


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A growth, decided and not yet done.

    Attributes:
        growth: family, source and target configs, seed.
        operator, options, noise: the recipe by name, as recorded in `growth.json`.
        recipe: one expansion per space.
        layers: the layer map.
        steps: every stored target tensor exactly once, in the order of the file.
        dtypes: source tensor name → safetensors dtype, where the weights are at hand.
        notes: what is and is not known of a family that has no schema of its own.
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

    def __repr__(self) -> str:
        from .card import summary  # which knows plans

        return "\n".join(summary(self))

    def describe(self) -> str:
        """The plan in words: spaces, layers, one line per module, certificate with its reasons, notes."""
        from .card import describe

        return describe(self)

    @property
    def family(self) -> Family:
        return self.growth.family

    @property
    def source_config(self) -> Config:
        return self.growth.source_config

    @cached_property
    def target_config(self) -> dict[str, Any]:
        """The config that the grown folder gets: what follows a layer or an epsilon has followed."""
        return _follow(dict(self.growth.target_config), self.growth, self.recipe, self.layers)

    @cached_property
    def certificate(self) -> Certificate:
        """Lossless, or every reason why not; decided from the plan alone."""
        return certify(self)

    @property
    def is_noisy(self) -> bool:
        """Whether noise falls on anything: on what reads copies."""
        spaces = (expansion for space, expansion in self.recipe.expansions.items() if self.family.uses(space))
        return self.noise > 0 and any(expansion.read.counts().max(initial=0) > 1 for expansion in spaces)

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of it besides: rounding, copies that stay equal, sizes that hardware dislikes (`growth.remarks`)."""
        return remarks(self)

    @cached_property
    def target_parameters(self) -> int:
        return sum(prod(step.shape) for step in self.steps)

    @cached_property
    def source_parameters(self) -> int:
        tensors = self.family.tensors(self.source_config)
        return sum(prod(tensor.shape) for tensor in tensors if not tensor.tied)

    def source_name(self, tensor: Tensor) -> str:
        """The source tensor that a target tensor grows from."""
        return _source_name(tensor, self.growth, None if tensor.layer is None else self.layers.layers[tensor.layer])

    def dtype(self, step: Step) -> str:
        """The safetensors dtype of a target tensor: the one asked for, else its source's, else the config's."""
        stored = self.source_dtype(step.source or self.source_name(step.tensor))
        return TORCH_NAMES[self.growth.dtype] if self.growth.dtype and is_float(stored) else stored

    def source_dtype(self, name: str) -> str:
        """The safetensors dtype of a source tensor, or of what it would have where the source has none of that name."""
        known = self.dtypes.get(name) or next(filter(is_float, self.dtypes.values()), None)
        return known or config_dtype(self.source_config) or "F32"

    def nbytes(self, step: Step) -> int:
        return prod(step.shape) * RAW[self.dtype(step)].itemsize

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
            "family": self.family.name,
            "notes": list(self.notes),
            "spaces": {space: expansion.rule for space, expansion in self.recipe.expansions.items() if self.family.uses(space)},
            "layers": list(self.layers.layers),
            "identity_layers": [number for number, idle in enumerate(self.layers.identity) if idle],
            "source_parameters": self.source_parameters,
            "target_parameters": self.target_parameters,
            "tensors": {
                step.name: {"source": step.source, "shape": list(step.shape), "line": step.tensor.line.text} for step in self.steps
            },
        }

    @cached_property
    def hash(self) -> str:
        """A fingerprint of everything that decides the result but the weights."""
        digest = hashlib.sha256(json.dumps([self.to_dict(), self.target_config], sort_keys=True, default=str).encode())
        for step in self.steps:
            for axis in step.maps:
                for array in (axis.index, axis.gain, axis.fill):
                    digest.update(array.tobytes())
        return digest.hexdigest()[:16]


def plan(
    source: str | Path | Config | Checkpoint,
    target: Target,
    operator: str = "lossless",
    *,
    depth: str | Sequence[int] = "identity",
    noise: float | None = None,
    seed: int = 0,
    dtype: Literal["float32"] | None = None,
    family: Family | None = None,
    **options: Any,
) -> Plan:
    """Decide a growth without reading weights.

    Args:
        source: a checkpoint, a folder, a preset's name, or a config as a dict.
        target: a preset's name, a folder, a `transformers` config, or a dict of config overrides under their Hugging Face names.
        operator, options: the width recipe by name and its options (`growth.operators`).
        depth: a layer map's name, or a list with one source layer per target layer (`growth.layers`).
        noise: strength of symmetry-breaking noise on what was copied, normal, relative to each tensor's root mean square (that of every
            eighth stretch of 32 rows where there are more than 1,024); where the readers of copies were divided it sums to zero over them,
            so that a lossless growth stays lossless. None is the operator's own (`growth.operators.NOISE`).
        seed: of every random entry.
        dtype: what the result is stored in; None keeps the source's.
        family: the schema to go by; None takes the one of the config's `model_type`, and derives one where there is none.

    Raises:
        UserError: unknown names (with near matches), a target smaller than the source, tensors that do not match the schema, …
    """
    check_arguments(target=target, operator=operator, depth=depth, noise=noise, seed=seed, dtype=dtype)
    checkpoint = _opened(source)
    target = flat(target) if isinstance(target, Mapping) else target
    source_config = checkpoint.config if isinstance(checkpoint, Checkpoint) else checkpoint
    known = know(checkpoint, target, depth, operator, options) if family is None else Known(family)
    family, source_config = known.family, known.config or source_config
    growth = Growth(family, source_config, _in_dtype(resolve_target(target, source_config, family), dtype), seed, dtype)
    noise = default_noise(operator) if noise is None else noise
    _check_growable(growth, noise)
    layers = layer_map(depth, growth.source["layer"], growth.target["layer"])
    _check_depth(layers, family)
    layers = _among_kinds(layers, growth)
    made = recipe(operator, growth, options)
    steps = tuple(_steps(growth, made, layers))
    dtypes = check_tensors(checkpoint, growth, steps) if isinstance(checkpoint, Checkpoint) else {}
    decided = Plan(growth, operator, options, noise, made, layers, steps, dtypes, known.notes)
    if known.config is not None:
        hold_against_class(decided)
    return decided


def _in_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config that names another dtype for its weights, wherever it names one."""
    names = {key for key in config if key.rpartition(".")[2] in ("dtype", "torch_dtype")} or {"dtype"}
    return config if dtype is None else config | dict.fromkeys(names, dtype)


def _opened(source: str | Path | Config | Checkpoint) -> Checkpoint | Config:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return flat(source)
    if not isinstance(source, str | Path):
        raise UserError(
            f"source {source!r:.80}: expected a folder, a preset's name, a checkpoint or a config as a dict; found {type(source).__name__}"
        )
    if str(source) in PRESETS and not Path(source).is_dir():
        return preset(str(source))
    return Checkpoint(source)


def _check_growable(growth: Growth, noise: float) -> None:
    family = growth.family
    if (other := growth.target_config.get("model_type")) != growth.source_config["model_type"]:
        raise UserError(f"target: model_type {other!r} differs from the source's {family.name!r}; a family grows into itself only")
    faults = growth.smaller
    if growth.tied and not family.ties(growth.source_config):
        faults.append(
            "target: tie_word_embeddings is true, but the source has an output head of its own that would be lost; leave it false"
        )
    if not 0 <= noise < 10:
        faults.append(f"noise {noise}: expected a strength relative to each tensor's root mean square, between 0 and 10")
    UserError.collect([*faults, *value_faults(growth.target_config, family), *_class_faults(growth)])


def _class_faults(growth: Growth) -> Iterator[str]:
    """What the library's class for the target would not take or run, told before anything is written.

    Raises:
        UserError: a value is no size at all.
    """
    family, config = growth.family, growth.target_config
    family.optional(config, "max_position_embeddings")
    initial_deviation(config)
    hidden, heads = (family.field_name(name) for name in ("hidden_size", "num_attention_heads"))
    if config["model_type"] in family.whole_heads and config[hidden] % config[heads]:
        yield f"target: {hidden} {config[hidden]} is no multiple of {heads} {config[heads]}, which transformers' class insists on"
    for key, standard in family.follows.items():
        size = family.field_name(standard)
        if growth.source_config.get(key) == growth.source_config[size] and config.get(key) not in (None, config[size]):
            yield f"target: {key} {config[key]} must be {size} {config[size]}, as in the source; leave it out and it follows"
    turned = family.rotary_dims(config)
    if turned % 2 and turned != family.rotary_dims(growth.source_config):
        yield f"target: {turned} dims of each head would be turned by rotary positions, which turn pairs; choose an even head dim"
    for key, factors in rope_of(config).items():
        if key in ("short_factor", "long_factor") and isinstance(factors, list) and len(factors) != turned // 2:
            yield f"target: rope_parameters.{key} has {len(factors)} entries, wanted is one for each pair of {turned} rotary dims"


def _check_depth(layers: LayerMap, family: Family) -> None:
    if any(layers.identity) and not family.spaces:
        raise UserError(
            f"depth {layers.rule!r}: new layers start as the identity where what writes to the residual stream is zero, and family "
            f"{family.name!r} has no schema that says what does; choose growth.depth=stack, interleave, proportional, top, solar, midas or "
            "a list of layers"
        )


def _among_kinds(layers: LayerMap, growth: Growth) -> LayerMap:
    """The identity map with new layers after their own kind, where the class makes kinds by place (leading dense layers)."""
    family = growth.family
    if layers.rule != "identity" or layers.source == layers.target or all(line.only is None for line in family.lines):
        return layers
    config = _follow(dict(growth.target_config), growth, Recipe({}), layers)
    source, target = (kinds_in_class(family, which) for which in (growth.source_config, config))
    if len(target) != layers.target or all(source[layer] == kind for layer, kind in zip(layers.layers, target, strict=True)):
        return layers
    return among_kinds(source, target) or layers


def _steps(growth: Growth, made: Recipe, layers: LayerMap) -> Iterator[Step]:
    maps: dict[tuple[str, str, bool], tuple[AxisMap, ...]] = {}
    writes_residual = growth.family.writes_residual
    for tensor in growth.family.tensors(growth.target_config, layers.layers):
        if tensor.tied:
            continue
        name = _source_name(tensor, growth, None if tensor.layer is None else layers.layers[tensor.layer])
        key = (tensor.line.name, tensor.line.text, tensor.is_bias)  # every layer shares its line's maps
        if key not in maps:
            maps[key] = made.maps(tensor)
        idle = made.inherits and tensor.layer is not None and layers.identity[tensor.layer] and writes_residual(tensor)
        yield Step(
            tensor,
            source=name if made.inherits and not idle else None,
            maps=maps[key],
            zero=idle,
            next_source=_next_source(tensor, growth, layers, maps[key]),
            diagonal=made.diagonal and _copied_both_ways(tensor, maps[key]),
        )


def _source_name(tensor: Tensor, growth: Growth, layer: int | None) -> str:
    """The source tensor, in source layer `layer`, that a target tensor grows from."""
    line = tensor.line
    if line.tied_if and growth.family.flag(growth.source_config, line.tied_if) and not tensor.is_bias:
        return str(line.tied_to)
    return tensor.name if layer is None else tensor.name_in(layer)


def _next_source(tensor: Tensor, growth: Growth, layers: LayerMap, maps: Sequence[AxisMap]) -> str | None:
    """Where indices from the next layer come from: the next one that has the tensor (layers may differ in kind).

    The last of them, and tensors outside the layers, stand in for themselves.
    """
    if not any((axis.fill == Fill.NEXT).any() for axis in maps):
        return None
    if tensor.layer is None:
        return _source_name(tensor, growth, None)
    own = layers.layers[tensor.layer]
    having = range(layers.source) if tensor.line.only is None else sorted(tensor.line.only)
    return _source_name(tensor, growth, next((layer for layer in having if layer > own), own))


def _copied_both_ways(tensor: Tensor, maps: Sequence[AxisMap]) -> bool:
    """Whether a matrix both writes and reads copies."""
    return len(maps) == 2 and tensor.line.kind == "linear" and all(axis.counts().max() > 1 for axis in maps)


class Held(Protocol):
    """Tensors that a growth reads, on disk or in memory."""

    @property
    def folder(self) -> Any:
        """Where they are, for messages."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Name → format and shape."""


def check_tensors(checkpoint: Held, growth: Growth, steps: Sequence[Step]) -> dict[str, str]:
    """Hold the stored tensors against the schema; return their dtypes."""
    stored, config, family = checkpoint.tensors, growth.source_config, growth.family
    changed = {step.tensor.pattern for step in steps if not step.is_copy}  # all else is copied byte for byte, of any format
    schema = {tensor.name: tensor for tensor in family.tensors(config)}
    faults = []
    if missing := [name for name, tensor in schema.items() if name not in stored and not tensor.tied]:
        faults.append(f"{checkpoint.folder}: missing {names_of(missing)}, which the {family.name} schema and this config require")
    if missing and any(name in schema for name in (f"{trunk}.{stray}" for stray in stored for trunk in TRUNKS)):
        raise UserError(
            f"{checkpoint.folder}: holds the trunk alone ({names_of(stored)}), as a model without its head saves it; give the checkpoint "
            "of the causal language model, saved by the class that AutoModelForCausalLM takes for it"
        )
    if strange := [name for name in stored if name not in schema and not family.ignores(name)]:
        faults.append(f"{checkpoint.folder}: unknown {names_of(strange)}, which the {family.name} schema does not have")
    wrong: dict[tuple[str, str], list[str]] = {}  # (name with `*`, fault) → the tensors that have it: a fault of every layer is one fault
    for name, tensor in schema.items():
        if name not in stored:
            continue
        expected, found, dtype = tensor.shape, stored[name].shape, stored[name].dtype
        if expected != found:
            fault = f"{tensor.line.text!r} and config.json give shape {expected}, the file has {found}"
            wrong.setdefault((tensor.pattern, fault), []).append(name)
        elif not is_float(dtype) and tensor.pattern in changed:
            fault = f"dtype {dtype}; growth computes on F64, F32, F16 and BF16 weights (dequantise first)"
            wrong.setdefault((tensor.pattern, fault), []).append(name)
    for (pattern, fault), names in wrong.items():
        faults.append(f"{names[0]}: {fault}" if len(names) == 1 else f"{pattern} ({len(names)} tensors): {fault}")
    UserError.collect(faults)
    dtypes = {name: entry.dtype for name, entry in stored.items() if name in schema}
    if growth.dtype is not None and (wide := [name for name, dtype in dtypes.items() if dtype == "F64"]):
        raise UserError(f"dtype {growth.dtype}: {names_of(wide)} are stored in float64, which would lose digits; leave dtype out")
    return dtypes


def _follow(config: dict[str, Any], growth: Growth, made: Recipe, layers: LayerMap) -> dict[str, Any]:
    eps = growth.family.names.get("norm_eps")
    if made.eps_factor != 1 and eps is not None:  # some models have a constant in their code instead (OPT)
        config[eps] = growth.family.eps(growth.source_config) * made.eps_factor
    source = dict(growth.source_config)
    if growth.grows("layer") and (kinds := growth.family.layer_kinds(source)):  # the class would tell them by their numbers, which move
        source["layer_types"], config["layer_types"] = kinds, config.get("layer_types") or kinds
    untouched = {key: value for key, value in source.items() if of_text(key) and config.get(key) == value}
    return config | {key: follow_layers(key, value, layers) for key, value in untouched.items()}
