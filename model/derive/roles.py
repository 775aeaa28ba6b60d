"""A draft of a family's schema: what each axis of each tensor is, by what the probes show of it.

A `?` on an axis is a number that follows from the checkpoint at hand (`model.derive.schema`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import product
from typing import Literal, get_args, get_type_hints

from outgrow.model.composite import TEXT_TYPE
from outgrow.model.derive.axes import Axes, Shapes
from outgrow.model.derive.watch import Sighting
from outgrow.model.notation import OPEN, Axis, Parts, Product, Space, parse_axis

# What a class calls the modules of its attention (the last word of the module's name).
_LEAF = r"(^|_|\.)(project_|w)?(?:{})(_?(lin|linear|proj))?$"
QUERY, KEY, VALUE, FUSED = (
    re.compile(_LEAF.format(words), re.IGNORECASE)
    for words in ("q|query", "k|key", "v|value", "qkv|query_key_value|c_attn|att|pack")
)
HEAD_NORM = re.compile(r"(^|_)(q|k|query|key)_?(norm|ln|layernorm)$", re.IGNORECASE)

RESIDUAL = Space("residual")
FFN = Space("ffn")
VOCAB = Space("vocab")
POSITIONS = Space("pos")
GROUPS = Space("groups")  # of a state space's heads: a number of the config, left out where it is 1
BLOCKS = 4  # of heads, in CodeGen

# Axes over heads (grouped-query attention: `kv` key-value heads, `group` queries for each), head dims open.
ONE_PER_QUERY = parse_axis("(kv group)")
ONE_PER_KV = Space("kv")
QUERIES = parse_axis("(kv group ?)")
KEYS = parse_axis("(kv ?)")
FUSED_PARTS, FUSED_HEADS = (
    parse_axis("[(kv group ?) | (kv ?) | (kv ?)]"),
    parse_axis("(kv [(group ?) | ? | ?])"),
)
KEYS_BESIDE_QUERIES = parse_axis("[(kv group ?) | (kv ?)]")
HEADS = (QUERIES, KEYS, FUSED_PARTS, FUSED_HEADS)

# The same axes with the head dims named: queries and keys contract `qk`, values and the output `v`.
NAMED_QUERIES = parse_axis("(kv group qk)")
NAMED_KEYS = parse_axis("(kv qk*)")
NAMED_VALUES = parse_axis("(kv v)")
NAMED_OUTPUT = parse_axis("(kv group v)")
NAMED_KEY_NORM = parse_axis("(kv qk)")
NAMED_FUSED = {
    FUSED_PARTS: Parts((NAMED_QUERIES, NAMED_KEYS, NAMED_VALUES)),
    FUSED_HEADS: parse_axis("(kv [(group qk) | qk* | v])"),
}
# The same axes where heads lie in blocks, each with its queries, values and keys one after the other.
IN_BLOCKS = {
    ONE_PER_QUERY: parse_axis(f"({BLOCKS} block)"),
    QUERIES: parse_axis(f"({BLOCKS} block ?)"),
    FUSED_PARTS: parse_axis(f"({BLOCKS} [(block ?) | (block ?) | (block ?)])"),
}


@dataclass(frozen=True)
class Choices:
    """Decisions that watching leaves open, each with its alternatives, the likelier first.

    Attributes:
        fused: queries, keys and values in one matrix lie as three parts, or head by head (GPT-NeoX).
        gates: gate and up projection in one matrix lie as two parts, or unit by unit.
        embeddings: they enter the stream as they are, or multiplied by sqrt(hidden) (Gemma).
        norms: matrices read a normalised stream, or the stream itself is normalised after each addition (OPT
            350M).
        logits: attention logits are divided by sqrt(head dim), or not (GPT-Neo).
        heads: they lie in a row, or in blocks (CodeGen's, one block per TPU core).
    """

    fused: Literal["parts", "heads"] = "parts"
    gates: Literal["parts", "units"] = "parts"
    embeddings: Literal["plain", "scaled"] = "plain"
    norms: Literal["before", "after"] = "before"
    logits: Literal["divided", "undivided"] = "divided"
    heads: Literal["row", "blocks"] = "row"

    @classmethod
    def in_order(cls) -> Iterator[Choices]:
        """Yield every combination: the first decision changes fastest, so single changes of early ones come
        first.
        """
        hints = get_type_hints(cls)
        names = [field.name for field in fields(cls)]
        options = [get_args(hints[name]) for name in names]
        options.reverse()
        for values in product(*options):
            yield cls(*reversed(values))


def inner(share: Fraction | int) -> Space:
    """Name a space as wide as a multiple of the hidden size."""
    share = Fraction(share)
    numerator = share.numerator
    denominator = share.denominator
    part = "" if denominator == 1 else f"of{denominator}"
    return Space(f"{_INNER}{numerator}{part}")


def inner_share(space: Space) -> Fraction | None:
    """Read the multiple of the hidden size that a space named by `inner` is as wide as; None of others."""
    if not space.name.startswith(_INNER):
        return None
    name = space.name.removeprefix(_INNER)
    numerator, _, denominator = name.partition("of")
    return Fraction(int(numerator), int(denominator or 1))


_INNER = "inner_"


@dataclass(frozen=True)
class Draft:
    """A family as far as it was derived: tensor patterns and their axes, still without the numbers of a
    checkpoint.

    Attributes:
        axes: the probes; `axes.config` is the tiny config.
        tensors: every tensor of the tiny model.
        head, embedding: the parameters of the output head and of the embedding; the same where they are tied.
        choices: the decisions on what watching leaves open.
        stands: for each layer of the config that it was derived from, the layer of the tiny model that is of
            its kind; empty where the config does not tell layers apart.
    """

    axes: Axes
    tensors: Mapping[str, Sighting]
    head: str | None
    embedding: str | None
    choices: Choices = Choices()
    stands: tuple[int, ...] = ()

    def templates(self, name: str) -> tuple[Axis, ...]:
        """Describe the axes of one tensor of the tiny model, in storage order, `?` for numbers."""
        axes = self._unnamed[name]
        in_blocks = self.choices.heads == "blocks"
        if in_blocks and self._may_have_blocks:
            return tuple(IN_BLOCKS.get(axis, axis) for axis in axes)
        if not self._all_named:
            return axes
        named = [self._named_axis(name, dim) or axis for dim, axis in enumerate(axes)]
        return tuple(named)

    @cached_property
    def _unnamed(self) -> dict[str, tuple[Axis, ...]]:
        """Tensor → its axes, head dims as numbers."""

        def axes(name: str) -> tuple[Axis, ...]:
            count = len(self.tensors[name].shape)
            return tuple(self._template(name, dim) for dim in range(count))

        return {name: axes(name) for name in self.tensors}

    @cached_property
    def _may_have_blocks(self) -> bool:
        """Check that queries, keys and values are one tensor, with as many heads each, a multiple of the
        blocks.
        """
        heads = self.axes.heads
        one_each = self.axes.kv == heads
        in_blocks = heads % BLOCKS == 0
        fused = any(FUSED_PARTS in axes for axes in self._unnamed.values())
        return fused and one_each and in_blocks

    @cached_property
    def _all_named(self) -> bool:
        """Check that every axis over heads is recognised by name, so that head dims can grow."""
        named: list[Axis | None] = []
        for name, axes in self._unnamed.items():
            over_heads = [dim for dim, axis in enumerate(axes) if axis in HEADS]
            named += [self._named_axis(name, dim) for dim in over_heads]
        has_heads = bool(self._head_dim and named)
        return has_heads and all(named)

    def _named_axis(self, name: str, dim: int) -> Axis | None:
        """Name the head dims of an axis over heads; None where it has none or the module's name does not tell
        them.
        """
        unnamed = self._unnamed[name]
        axis = unnamed[dim]
        leaf = leaf_of(name)
        sighting = self.tensors[name]
        length = sighting.shape[dim]
        head = self._head_dim
        heads = self.axes.heads
        kv = self.axes.kv
        is_head_norm = HEAD_NORM.search(leaf) is not None
        if axis in NAMED_FUSED:
            fused_heads = heads + 2 * kv
            complete = length == fused_heads * head
            is_fused = complete and FUSED.search(leaf)
            return NAMED_FUSED[axis] if is_fused else None
        over_one_head = sighting.shape == (head,)
        if axis == OPEN and is_head_norm and over_one_head:
            return Space("qk")
        if axis not in HEADS:
            return None
        over_queries = length == heads * head
        over_keys = length == kv * head
        if is_head_norm:
            return NAMED_QUERIES if over_queries else NAMED_KEY_NORM
        if sighting.reads[dim]:
            return NAMED_OUTPUT if over_queries else None
        projections = (
            (QUERY, over_queries, NAMED_QUERIES),
            (KEY, over_keys, NAMED_KEYS),
            (VALUE, over_keys, NAMED_VALUES),
        )
        for pattern, fits, named in projections:
            if pattern.search(leaf):
                return named if fits else None
        return None

    def _template(self, name: str, dim: int) -> Axis:
        """Recognise one axis by which config keys move its length; `?` where none or too many do."""
        axes = self.axes
        sighting = self.tensors[name]
        length = sighting.shape[dim]
        if axis := self._of_mixer(name, dim):
            return axis

        def moved(shapes: Shapes | None) -> int:
            """Compute how much longer the axis is in these shapes."""
            if shapes is None:
                return 0
            shape = shapes[name]
            return shape[dim] - length

        deltas = {key: moved(shapes) for key, shapes in axes.by_key.items()}
        by_key = {key: delta for key, delta in deltas.items() if delta}
        by_hidden = moved(axes.by_hidden)
        queries = moved(axes.by_queries)
        kv = moved(axes.by_kv)
        by_heads = queries or kv
        if by_key:
            by_width = by_hidden or by_heads
            return OPEN if by_width else self._of_keys(by_key, length)
        if by_hidden and axes.coupled:
            return self._coupled(name, dim, by_hidden, queries, kv)
        if by_hidden:
            return OPEN if by_heads else self._of_hidden(name, dim, by_hidden)
        if queries > 0 or kv > 0:
            return self._of_heads(name, length, queries, kv)
        return OPEN

    def _of_keys(self, by_key: Mapping[str, int], length: int) -> Axis:
        """Recognise an axis that one size of its own moves: vocabulary, positions, a feed-forward size."""
        if len(by_key) > 1:
            return OPEN
        ((key, delta),) = by_key.items()
        keys = self.axes.keys
        config = self.axes.config
        size = config[key]
        if key == keys.vocab:
            return VOCAB if length == size else OPEN
        if key == keys.positions:
            return POSITIONS if delta == 8 else OPEN
        parts = delta // 8
        is_ffn = key == keys.ffn
        space = FFN if is_ffn else Space(key)
        complete = parts * size == length
        return self._repeated(space, parts) if complete else OPEN

    def _repeated(self, space: Space, parts: int) -> Axis:
        """Compose an axis of several such parts: gate and up projections in one matrix."""
        if parts == 1:
            return space
        interleaved = self.choices.gates == "units"
        if interleaved:
            count = Space(str(parts))
            return Product((space, count))
        return Parts((space,) * parts)

    def _of_hidden(self, name: str, dim: int, by_hidden: int) -> Axis:
        """Recognise a multiple of the hidden size, or it with something beside it.

        A state space's input is two halves, channels and gates.

        Args:
            by_hidden: growth of the axis when the hidden size is doubled.
        """
        sighting = self.tensors[name]
        length = sighting.shape[dim]
        hidden = self.axes.hidden
        parts, rest = divmod(length, hidden)
        beside_more = by_hidden == hidden < length
        if beside_more:
            return Parts((RESIDUAL, OPEN))
        is_part = by_hidden == length < hidden
        if is_part and hidden % length == 0:
            share = Fraction(1, hidden // length)
            return inner(share)
        if rest or parts == 0:
            return OPEN
        if parts in (1, 3) and self._gated(name, dim):
            channels = inner(1)
            return channels if parts == 1 else Parts((channels,) * 3)
        in_halves = parts % 2 == 0
        if in_halves and leaf_of(name) == "in_proj":
            half = RESIDUAL if parts == 2 else inner(parts // 2)
            return Parts((half, half))
        if parts == 1:
            return RESIDUAL
        reads = sighting.reads[dim]
        if parts in self._written or not reads:
            return inner(parts)
        streams = Space(str(parts))
        return Product((streams, RESIDUAL))

    @cached_property
    def _written(self) -> set[int]:
        """Multiples of the hidden size that some matrix writes; others are read of several streams side by
        side.
        """
        hidden = self.axes.hidden
        lengths: set[int] = set()
        for sighting in self.tensors.values():
            if any(sighting.reads):
                sides = zip(sighting.shape, sighting.reads, strict=True)
                lengths |= {length for length, reads in sides if not reads}
        return {length // hidden for length in lengths if length % hidden == 0}

    def _of_mixer(self, name: str, dim: int) -> Axis | None:
        """Recognise an axis of a state space with heads.

        Its input is gates, channels, state projections and a time step for each head.
        """
        mixer = self.axes.mixer
        if mixer is None:
            return None
        modules = tuple(f"{module}." for module in mixer.modules)
        if not name.startswith(modules):
            return None
        head_space = Space(mixer.heads)
        rates: Axis = Product((GROUPS, head_space))
        dim_space = Space(mixer.dim)
        channels: Axis = Product((GROUPS, head_space, dim_space))
        sighting = self.tensors[name]
        length = sighting.shape[dim]
        leaf = leaf_of(name)
        config = self.axes.config
        heads = int(config[mixer.heads])
        if leaf == "in_proj" and not sighting.reads[dim]:
            complete = length > 2 * mixer.inner + heads
            return Parts((channels, channels, OPEN, rates)) if complete else None
        if leaf == "conv1d" and dim == 0:
            has_states = length > mixer.inner
            return Parts((channels, OPEN)) if has_states else channels
        is_vector = len(sighting.shape) == 1
        is_of_channels = sighting.reads[dim] or is_vector
        if is_of_channels and length == mixer.inner:
            return channels
        return rates if sighting.shape == (heads,) else None

    def _of_heads(self, name: str, length: int, queries: int, kv: int) -> Axis:
        """Recognise an axis over heads where the head dim is independent of the hidden size.

        Args:
            queries, kv: growth of the axis when the query heads, or the key-value heads, are doubled.
        """
        axes = self.axes
        head = self._head_dim
        if kv and queries:
            complete = queries + kv == length
            if not complete:
                return OPEN
            is_fused = kv > axes.kv * head
            return self._fused() if is_fused else KEYS_BESIDE_QUERIES
        if kv:
            return self._of_kv(kv) if kv == length else OPEN
        if queries != length:
            return OPEN
        leaf = leaf_of(name)
        one_each = axes.kv == axes.heads
        all_queries = axes.heads * head
        three_each = one_each and length == 3 * all_queries
        if three_each and FUSED.search(leaf):
            return self._fused()
        return QUERIES if length > axes.heads else ONE_PER_QUERY

    def _of_kv(self, length: int) -> Axis:
        """Recognise an axis that is as often there as there are key-value heads."""
        return KEYS if length > self.axes.kv else ONE_PER_KV

    @property
    def _head_dim(self) -> int:
        axes = self.axes
        key = axes.keys.head_dim or ""
        named = axes.config.get(key)
        return int(named or axes.hidden // axes.heads)

    def _fused(self) -> Axis:
        by_head = self.choices.fused == "heads"
        return FUSED_HEADS if by_head else FUSED_PARTS

    def _coupled(self, name: str, dim: int, by_hidden: int, queries: int, kv: int) -> Axis:
        """Recognise an axis where the head dim is hidden size / heads, both of which are doubled together."""
        axes = self.axes
        sighting = self.tensors[name]
        length = sighting.shape[dim]
        if kv == length:
            return self._of_kv(kv)
        if kv > 0:
            is_fused = length - kv == axes.hidden
            return self._fused() if is_fused else OPEN
        if length == axes.heads and queries > 0:
            return ONE_PER_QUERY
        if length == axes.hidden:
            return QUERIES if self._is_heads(name, dim) else RESIDUAL
        leaf = leaf_of(name)
        fused_heads = axes.heads + 2 * axes.kv
        is_fused = length == fused_heads * self._head_dim
        if is_fused and FUSED.search(leaf):
            return self._fused()
        return self._of_hidden(name, dim, by_hidden)

    def _gated(self, name: str, dim: int) -> bool:
        """Check whether an axis is over the channels of a short convolution between two gates (LFM2).

        They are as many as the hidden size.
        """
        leaf = leaf_of(name)
        sighting = self.tensors[name]
        module = module_of(name)
        path, _, _ = module.rpartition(".")
        has_kernel = f"{path}.conv.weight" in self.tensors
        into = self.tensors.get(f"{path}.in_proj.weight")
        if into is None or not has_kernel:
            return False
        rows = into.shape[0]
        has_three_parts = rows == 3 * self.axes.hidden
        if not has_three_parts:
            return False
        projection = "out_proj" if sighting.reads[dim] else "in_proj"
        return leaf in ("conv", projection)

    def _is_heads(self, name: str, dim: int) -> bool:
        """Check whether an axis as long as the hidden size runs over heads.

        Queries, keys and values write it; the output projection reads it.
        """
        leaf = leaf_of(name)
        sighting = self.tensors[name]
        projections = (QUERY, KEY, VALUE)
        writes_heads = any(pattern.search(leaf) for pattern in projections)
        reads = sighting.reads[dim]
        axis_count = len(sighting.shape)
        if axis_count == 1:
            is_norm = HEAD_NORM.search(leaf) is not None
            is_bias = name.endswith(".bias")
            return is_norm or (writes_heads and is_bias)
        reads_once = sighting.reads.count(True) == 1
        if axis_count != 2 or not reads_once:
            return False
        if writes_heads:
            return not reads
        path, _, _ = name.rpartition(f".{leaf}")
        in_attention = "att" in path.lower()
        rows, columns = sighting.shape
        is_square = rows == columns
        return in_attention and is_square and reads

    # ---- the family as one ----

    @property
    def norm(self) -> Literal["layer", "rms"]:
        """The kind of most norms over the residual stream."""
        over_stream = [name for name, axes in self._unnamed.items() if axes == (RESIDUAL,)]
        kinds = [self.tensors[name].norm for name in over_stream]
        most_are_layer_norms = kinds.count("layer") >= kinds.count("rms")
        return "layer" if most_are_layer_norms else "rms"

    @property
    def unused(self) -> list[str]:
        """Tensors that may grow and that no forward pass touches, so that no rehearsal tests them.

        Cross-attention without an encoder, for one.
        """
        unused = [name for name, sighting in self.tensors.items() if not sighting.used]
        return [name for name in unused if not self._stays(name)]

    @property
    def unproved(self) -> list[str]:
        """Unused tensors beside the text model that do more than write its residual stream.

        They read or normalise what grows, so their own function stays for sure only where it grows by whole
        factors, all of it copied alike.
        """
        if TEXT_TYPE not in self.axes.config:
            return []
        axes = self._unnamed
        touching = [name for name in self.unused if RESIDUAL in axes[name]]
        return [name for name in touching if not self._writes_only(name)]

    def _writes_only(self, name: str) -> bool:
        """Check that a matrix, or the one of a bias, writes the residual stream and reads something else."""
        weight = f"{module_of(name)}.weight" if name.endswith(".bias") else name
        sighting = self.tensors.get(weight)
        if sighting is None:
            return False
        axes = self._unnamed[weight]
        over_stream = [axis == RESIDUAL for axis in axes]
        sides = zip(over_stream, sighting.reads, strict=True)
        return sorted(sides) == [(False, True), (True, False)]  # (over the stream, read)

    def _stays(self, name: str) -> bool:
        """Check whether no axis of a tensor may grow: each has a number that is left open."""
        return all(map(_is_open, self._unnamed[name]))

    @property
    def tied(self) -> bool:
        """Check whether the output head is the embedding."""
        has_head = self.head is not None
        return has_head and self.head == self.embedding

    @property
    def position_offset(self) -> int:
        """Number of learned positions stored beyond what the config says."""
        key = self.axes.keys.positions or ""
        config = self.axes.config
        for name, sighting in self.tensors.items():
            axes = self.templates(name)
            if POSITIONS in axes:
                dim = axes.index(POSITIONS)
                stored = sighting.shape[dim]
                return stored - int(config[key])
        return 0


def _is_open(axis: Axis) -> bool:
    """Check whether an axis has a number that is left open."""
    if isinstance(axis, Space):
        return axis == OPEN
    return any(map(_is_open, axis.parts))


def module_of(name: str) -> str:
    """Name a tensor's module: `a.b.weight` → `a.b`."""
    return name.removesuffix(".weight").removesuffix(".bias")


def leaf_of(name: str) -> str:
    """Return the last word of the name of a tensor's module."""
    words = [word for word in name.split(".") if not word.isdigit()]
    last = words[-1]
    if len(words) > 1 and last in ("weight", "bias"):
        return words[-2]
    return last
