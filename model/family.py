"""A family: the schema and the config fields that the checkpoints of one `model_type` share."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from math import inf, prod, sqrt
from typing import Any, Literal

from outgrow.model.base.errors import UserError, unknown
from outgrow.model.keys import is_number
from outgrow.model.notation import Axis, Line, Space, parse_schema, size, spaces

Config = Mapping[str, Any]
_Size = tuple[str, int | Fraction]  # (config key, factor)

# The field's standard names of the sizes; a family lists only those that its config spells differently.
STANDARD = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
    "max_position_embeddings", "layer_types", "norm_eps",
)  # fmt: skip

# space → the standard names of what its size is made of, the first divided by the second
_SIZE_KEYS = {
    "layer": ("num_hidden_layers",),
    "vocab": ("vocab_size",),
    "residual": ("hidden_size",),
    "ffn": ("intermediate_size",),
    "qk": ("head_dim",),
    "v": ("head_dim",),
    "kv": ("num_key_value_heads",),
    "group": ("num_attention_heads", "num_key_value_heads"),
    "pos": ("max_position_embeddings",),
}

# More than any model has: what sizes are checked against before anything is made of them.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 14

# How configs spell the deviation of fresh weights, in the order in which the library's classes look for it.
INITIAL = ("initializer_range", "init_std", "initializer_factor")

# Buffers that older checkpoints carry along.
BUFFERS = ("model.layers.*.self_attn.rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a checkpoint: its name, its axes in storage order, and the schema line it comes
    from.
    """

    pattern: str  # its name, with `*` for the layer's number
    line: Line
    axes: tuple[Axis, ...]  # storage order
    reads: tuple[bool, ...]  # per axis: is it the reading (in) side?
    shape: tuple[int, ...]
    layer: int | None
    tied: bool  # tied to another tensor: not stored, and its source is that tensor
    is_bias: bool = False

    @property
    def name(self) -> str:
        if self.layer is None:
            return self.pattern
        return self.name_in(self.layer)

    def name_in(self, layer: int) -> str:
        """Name the same tensor in another layer."""
        return self.pattern.replace("*", str(layer))

    @property
    def is_head(self) -> bool:
        """Check whether it is the output head's matrix."""
        line = self.line
        writes_vocab = line.kind == "linear" and line.out == Space("vocab")
        return writes_vocab and not self.is_bias

    def sums_over(self, axis: int) -> bool:
        """Check whether the module sums over an axis.

        It reads it, or it has no sides and all spaces of the axis are reading ones.
        """
        if self.reads[axis]:
            return True
        if self.line.kind != "tensor":
            return False
        named = list(spaces(self.axes[axis]))
        return bool(named) and all(space.dual for space in named)


@dataclass(frozen=True)
class Family:
    """The layout of the checkpoints of one `model_type`, as data.

    Args:
        name: the config's `model_type`.
        schema: one line per module (`model.notation`).
        norm: kind of the residual stream's norms: "layer" removes the mean, "rms" does not.
        names: standard size name → this family's config field, where they differ.
        rotary: share of each head that rotary positions turn when the config does not say; None for other
            positions.
        rotary_field: the config field of that share.
        attention_scale: "head_dim" (logits scaled by 1/sqrt(head dim)), "none", or the config field that
            fixes the scale instead.
        scaled_if: config switch without which attention logits are not scaled at all.
        pos_offset: learned positions stored beyond max_position_embeddings.
        follows: config field → the standard size that it repeats.
        by_depth: config field → the power of the number of layers by which it has to move with them, where
            the class computes what each layer adds from both (MiniCPM3's scale_depth).
        more: further spaces, each with the config field of its size and the factor on it.
        tied: True or False where the config's `tie_word_embeddings` does not decide whether the head is the
            embedding.
        small_writers: its class starts the writers of the residual stream at 1/√(2 · layers) of the others'
            deviation (GPT-2).
        lacks: standard sizes that its class does not know, whatever a config says.
        whole_heads: `model_type`s whose class wants a hidden size that the heads divide, also where the head
            dim is given.
        layer_types: the class's `layer_types` where the config does not list them.
        also: other `model_type`s with the same layout.
        ignore: stored names that are buffers, not weights (a `*` stands for the layer).
    """

    name: str
    schema: str
    norm: Literal["layer", "rms"]
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rotary: float | None = 1.0
    rotary_field: str = "partial_rotary_factor"
    attention_scale: str = "head_dim"
    scaled_if: str | None = None
    pos_offset: int = 0
    follows: Mapping[str, str] = field(default_factory=dict)
    by_depth: Mapping[str, float] = field(default_factory=dict)
    more: Mapping[str, _Size] = field(default_factory=dict)
    tied: bool | None = None
    small_writers: bool = False
    lacks: tuple[str, ...] = ()
    whole_heads: tuple[str, ...] = ()
    layer_types: Callable[[Config], list[str]] | None = None
    also: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def scaled_by_depth(self, source: Config, target: Config) -> dict[str, float]:
        """The values that the fields of `by_depth` have to have in a target of so many layers.

        Raises:
            UserError: there are such fields, and a number of layers is none.
        """
        scales = {key: source[key] for key in self.by_depth if source.get(key)}
        if not scales:
            return {}
        layers, layers_before = (self.require(config, "num_hidden_layers") for config in (target, source))
        ratio = layers / layers_before
        return {key: value * ratio ** self.by_depth[key] for key, value in scales.items()}

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        return parse_schema(self.schema)

    def lines_of(self, config: Config) -> list[Line]:
        """The lines that apply under `config`."""

        def applies(line: Line) -> bool:
            condition = line.condition
            return condition is None or self.flag(config, condition)

        return list(filter(applies, self.lines))

    def flag(self, config: Config, condition: str) -> bool:
        """Check whether a config value is true; a leading "!" negates."""
        key = condition.lstrip("!")
        value = config.get(key, self.defaults.get(key))
        negated = condition.startswith("!")
        return bool(value) != negated

    @cached_property
    def prenorm(self) -> bool:
        """Check whether layers normalise what they read from the residual stream (OLMo 2: only what they
        write).
        """
        norms = [line for line in self.lines if line.kind == "norm" and line.layered]
        return any(line.out == Space("residual") for line in norms)

    def knows(self, standard: str) -> bool:
        """Check whether its class knows a size or list of that standard name, in whatever spelling."""
        has_list = standard != "layer_types" or self.layer_types is not None
        return has_list and standard not in self.lacks

    def field_name(self, standard: str) -> str:
        """Spell a standard name as this family's config does."""
        return self.names.get(standard, standard)

    def get(self, config: Config, standard: str, default: Any = None) -> Any:
        """A config value by its standard name; a missing or null one is the family's default."""
        key = self.field_name(standard)
        value = config.get(key)
        if value is None:
            return self.defaults.get(key, default)
        return value

    def require(self, config: Config, standard: str) -> int:
        """A positive whole number by its standard name.

        Raises:
            UserError: it is missing, is not a positive whole number, or is none that any model has.
        """
        most = MAX_LAYERS if standard == "num_hidden_layers" else MAX_SIZE
        value = self.get(config, standard)
        return self._checked(self.field_name(standard), value, most)

    def _checked(self, key: str, value: Any, most: int = MAX_SIZE) -> int:
        """Check a size before anything of that size is made."""
        if type(value) is not int or value < 1:
            raise UserError(
                f"config of family {self.name!r}: {key} must be a positive whole number, found {value!r}"
            )
        if value > most:
            raise UserError(
                f"config of family {self.name!r}: {key} {value:,} is more than any model has (at most "
                f"{most:,}); is this a typo?"
            )
        return value

    def optional(self, config: Config, standard: str) -> int | None:
        """A positive whole number by its standard name, or None where it is not given."""
        if self.get(config, standard) is None:
            return None
        return self.require(config, standard)

    def sizes(self, config: Config) -> dict[str, int]:
        """Compute the size of every space of the schema (`vocab residual ffn kv group qk v pos`, `more`), and
        of `layer`.

        Raises:
            UserError: a size is missing, or heads do not divide what they share.
        """
        sizes = {"layer": self.require(config, "num_hidden_layers")}
        for space, size_of in self._size_rules.items():
            if self.uses(space):
                sizes[space] = size_of(config)
        for space, (key, factor) in self.more.items():
            value = self._checked(key, config.get(key))
            size = value * factor
            if size.denominator != 1:
                multiple = f"a multiple of {size.denominator}"
                fault = f"{key} {config[key]} must be {multiple}"
                raise UserError(f"config of family {self.name!r}: {fault}")
            sizes[space] = int(size)
        head_spaces = ("kv", "group", "qk")
        width = prod(sizes.get(space, 1) for space in head_spaces)
        self._checked("heads × head dim", width)
        return sizes

    @cached_property
    def _size_rules(self) -> dict[str, Callable[[Config], int]]:
        return {
            "vocab": lambda config: self.require(config, "vocab_size"),
            "residual": lambda config: self.require(config, "hidden_size"),
            "ffn": self._ffn,
            "qk": self._head_dim,
            "v": self._head_dim,
            "kv": self._kv_heads,
            "group": self._group,
            "pos": lambda config: self.require(config, "max_position_embeddings") + self.pos_offset,
        }

    def size_keys(self, space: str, config: Config) -> str:
        """The config keys that say how large a space is, as this family spells them."""
        if space in self.more:
            key, _ = self.more[space]
            return key
        keys = _SIZE_KEYS[space]
        is_head_dim = keys == ("head_dim",)
        if is_head_dim and not self.optional(config, "head_dim"):
            keys = ("hidden_size", "num_attention_heads")
        return " / ".join(map(self.field_name, keys))

    def _ffn(self, config: Config) -> int:
        named = self.optional(config, "intermediate_size")
        return named or 4 * self.require(config, "hidden_size")

    def _kv_heads(self, config: Config) -> int:
        named = self.optional(config, "num_key_value_heads")
        return named or self.require(config, "num_attention_heads")

    def _group(self, config: Config) -> int:
        heads = self.require(config, "num_attention_heads")
        kv = self._kv_heads(config)
        return _divide(heads, kv, f"{heads} query heads among {kv} key-value heads")

    def _head_dim(self, config: Config) -> int:
        hidden = self.require(config, "hidden_size")
        heads = self.require(config, "num_attention_heads")
        named = self.optional(config, "head_dim")
        if named:
            return named
        return _divide(hidden, heads, f"{self.field_name('hidden_size')} into {heads} heads")

    def layer_kinds(self, config: Config) -> list[str] | None:
        """List the class's `layer_types`, named in the config or not; None where it knows no such list."""
        named: list[str] | None = config.get("layer_types")
        if named or self.layer_types is None:
            return named or None
        return self.layer_types(config)

    def rotary_dims(self, config: Config) -> int:
        """Count the dimensions of each head that rotary positions (RoPE) turn; 0 without rotary positions."""
        if self.rotary is None:
            return 0
        rope = config.get("rope_parameters") or {}
        older = rope.get("partial_rotary_factor", config.get(self.rotary_field))
        share = rope.get(self.rotary_field, older)
        if share is None:
            share = self.rotary
        head_dim = self.sizes(config).get("qk", 0)
        return int(head_dim * share)

    def eps(self, config: Config) -> float:
        """The epsilon of the norms over the residual stream."""
        return float(self.get(config, "norm_eps", 1e-5))

    def fixed_scale(self, config: Config) -> float:
        """The number that fixes the attention's scale (`attention_scale`), as the class has it where the
        config does not name it.

        Raises:
            UserError: it is named and no number.
        """
        key = self.attention_scale
        value = config.get(key, self.defaults.get(key))
        if not is_number(value) or not 0 < value < inf:
            raise UserError(
                f"config of family {self.name!r}: {key} must be a finite number above 0; found {value!r:.80}"
            )
        return float(value)

    @property
    def sets_eps(self) -> bool:
        """Check whether a config key is known that sets that epsilon; some classes have a constant in their
        code (OPT).
        """
        return "norm_eps" in self.names

    def other_norms(self, config: Config) -> list[Line]:
        """The norms over another space than the residual stream (queries, keys), which take the config's
        epsilon too.
        """
        norms = [line for line in self.lines_of(config) if line.kind == "norm"]
        return [line for line in norms if line.out != Space("residual")]

    def init_deviation(self, config: Config, tensor: Tensor) -> float:
        """The standard deviation with which the library's class starts a matrix: by its config's own key, in
        the library's order.

        Raises:
            UserError: the config's value is no number of at least 0.
        """
        deviation = initial_deviation(config)
        may_be_small = self.small_writers and tensor.line.layered
        if not may_be_small or not self.writes_residual(tensor):
            return deviation
        writers = 2 * self.require(config, "num_hidden_layers")
        return deviation / sqrt(writers)

    def uses(self, space: str) -> bool:
        """Check whether any tensor of the schema has `space` on an axis."""
        return space in self.spaces

    @cached_property
    def spaces(self) -> frozenset[str]:
        """Every space that a tensor of the schema has on an axis; none where the schema is an outline of
        names and numbers.
        """
        return frozenset(space.name for line in self.lines for space in line.spaces)

    def writes_residual(self, tensor: Tensor) -> bool:
        """Check whether the tensor is the last to touch what its module adds to the residual stream."""
        line = tensor.line
        post_norms = [other for other in self.lines if other.kind == "post norm"]
        if any(norm.layered for norm in post_norms):
            return line.kind == "post norm"
        if line.kind == "tensor":
            reads = any(space.dual for space in line.spaces)
            is_bias = line.name.endswith("bias")
            return Space("residual") in line.axes and (reads or is_bias)
        return line.kind == "linear" and line.out == Space("residual")

    def ties(self, config: Config) -> bool:
        """Check whether the output head is the embedding."""
        if self.tied is not None:
            return self.tied
        return self.flag(config, "tie_word_embeddings")

    def ignores(self, name: str) -> bool:
        """Check whether a stored name is a buffer that no schema line needs."""
        for stars in (*self.ignore, *BUFFERS):
            pattern = stars.replace(".", r"\.").replace("*", r"\d+")
            if re.fullmatch(pattern, name):
                return True
        return False

    def tensors(self, config: Config, layers: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yield every tensor of a checkpoint with this `config`, layer by layer, tied ones included and
        marked.

        `layers` names, for each layer, the one whose modules it has; None where each has its own.
        """
        sizes = self.sizes(config)
        active = self.lines_of(config)
        first = _first_layered(active)
        layered = [line for line in active if line.layered]
        kinds = range(sizes["layer"]) if layers is None else layers
        # In the order of the file: what comes before the layers, layer by layer, what comes after.
        for line in active[:first]:
            yield from self._tensors_of(line, None, config, sizes)
        for number, kind in enumerate(kinds):
            for line in layered:
                if line.only is None or kind in line.only:
                    yield from self._tensors_of(line, number, config, sizes)
        for line in active[first:]:
            if not line.layered:
                yield from self._tensors_of(line, None, config, sizes)

    def _tensors_of(
        self, line: Line, layer: int | None, config: Config, sizes: Mapping[str, int]
    ) -> Iterator[Tensor]:
        tied = line.tied_if is not None and self.flag(config, line.tied_if)
        has_bias = line.bias and (line.bias_if is None or self.flag(config, line.bias_if))
        axes = line.axes
        transposed = line.transposed
        reads: tuple[bool, ...] = (transposed, not transposed)
        if line.into is None:
            reads = (False,) * len(axes)
        is_plain = line.kind == "tensor"
        weight = "" if is_plain else ".weight"
        bias = "" if is_plain else ".bias"
        for name in line.names:
            shape = tuple(size(axis, sizes) for axis in axes)
            weight_name = name + weight
            yield Tensor(weight_name, line, axes, reads, shape, layer, tied)
            if has_bias:
                width = (size(line.out, sizes),)
                own = (line.out,)
                bias_name = name + bias
                yield Tensor(bias_name, line, own, (False,), width, layer, False, is_bias=True)


def initial_deviation(config: Config) -> float:
    """Look up the deviation of a fresh matrix as the library's classes do: by the first known key, else 0.02.

    Raises:
        UserError: its value is no finite number of at least 0.
    """
    named = [key for key in INITIAL if key in config]
    key = named[0] if named else INITIAL[0]
    value = config.get(key)
    if value is None:
        return 0.02
    if not is_number(value) or not 0 <= value < inf:
        raise UserError(
            f"config: {key} must be a finite number of at least 0, the deviation of fresh weights; found "
            f"{value!r:.80}"
        )
    return float(value) or 0.02  # as the library takes a zero


def _first_layered(lines: list[Line]) -> int:
    layered = [number for number, line in enumerate(lines) if line.layered]
    return layered[0] if layered else len(lines)


def _divide(size: int, by: int, what: str) -> int:
    if size % by:
        raise UserError(f"cannot divide {what}: {size} is no multiple of {by}; choose sizes that divide")
    return size // by


_REGISTERED: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make `family` known under its `model_type`s; the same name again replaces it.

    Raises:
        ValueError: a line of its schema does not parse or names a space that has no size.
    """
    spaces = {"vocab", "residual", "ffn", "kv", "group", "qk", "v", "pos", *family.more}
    for line in family.lines:
        unsized = [space.name for space in line.spaces if space.name not in spaces]
        if unsized:
            names = ", ".join(sorted(spaces))
            raise ValueError(
                f"{family.name}: line {line.name!r} names the space {unsized[0]!r}; known: {names}"
            )
    for name in (family.name, *family.also):
        _REGISTERED[name] = family
    return family


@cache
def _load_families() -> None:
    package = importlib.import_module(".families", __package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def families() -> dict[str, Family]:
    """List every known family by `model_type`."""
    _load_families()
    return dict(_REGISTERED)


def has_schema(config: Config) -> bool:
    """Check whether the config's family is known, so that every parameter of its model is one tensor of the
    file.
    """
    name = config.get("model_type")
    return isinstance(name, str) and name in families()


def family_of(config: Config) -> Family:
    """Look up the family of a Hugging Face config (a dict).

    Raises:
        UserError: the config names no `model_type`, or one without a schema.
    """
    registry = families()
    name = config.get("model_type")
    if name is None:
        raise UserError(
            "the config names no model_type, so its tensors' roles are unknown; is this a Hugging Face "
            "config.json?"
        )
    if not isinstance(name, str):
        raise UserError(f"config: model_type must be a name; found {name!r:.80}")
    if name not in registry:
        unknown("model family", name, registry)
    return registry[name]


__all__ = ["STANDARD", "Config", "Family", "Space", "Tensor", "families", "family_of", "register"]
