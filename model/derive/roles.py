"""What each axis of each tensor is: a draft of a family's schema, with a `?` where a number follows from the checkpoint at hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from outgrow.model.composite import TEXT_TYPE
from outgrow.model.derive.axes import Axes
from outgrow.model.derive.probe import Sighting

_LEAF = r"(^|_|\.)(project_|w)?(?:{})(_?(lin|linear|proj))?$"
QUERY, KEY, VALUE = (re.compile(_LEAF.format(words), re.IGNORECASE) for words in ("q|query", "k|key", "v|value"))
FUSED = re.compile(_LEAF.format("qkv|query_key_value|c_attn|att|pack"), re.IGNORECASE)
HEAD_NORM = re.compile(r"(^|_)(q|k|query|key)_?(norm|ln|layernorm)$", re.IGNORECASE)
BLOCKS = 4
IN_BLOCKS = {
    "(kv group)": f"({BLOCKS} block)",
    "(kv group ?)": f"({BLOCKS} block ?)",
    "[(kv group ?) | (kv ?) | (kv ?)]": f"({BLOCKS} [(block ?) | (block ?) | (block ?)])",
}
GROUPS_OF = "groups "  # before the heads of state spaces, which are in so many parts
HEADS = ("(kv group ?)", "(kv ?)", "[(kv group ?) | (kv ?) | (kv ?)]", "(kv [(group ?) | ? | ?])")


@dataclass(frozen=True)
class Choices:
    """What watching does not decide, to be tried in turn.

    Attributes:
        interleaved: queries, keys and values fused head by head, not as three parts.
        gates_interleaved: gate and up fused unit by unit, not as two parts.
        scaled: the embeddings are multiplied by sqrt(hidden).
        post: the norms that matrices read are the residual stream itself (normalised after each addition).
        unscaled: attention logits are not divided by sqrt(head dim).
        blocks: heads lie in blocks, each with its queries, values and keys one after the other (as CodeGen's, one block per TPU core).
    """

    interleaved: bool = False
    gates_interleaved: bool = False
    scaled: bool = False
    post: bool = False
    unscaled: bool = False
    blocks: bool = False


@dataclass(frozen=True)
class Draft:
    """A family as far as it was derived: tensor patterns and their axes, still without the numbers of a checkpoint.

    Attributes:
        axes: the probes; `axes.config` is the tiny config.
        seen: every tensor of the tiny model.
        head, embedding: the parameters of the output head and of the embedding; the same where they are tied.
        choices: how what watching left open was decided.
        stands: for each layer of the config that it was derived from, the layer of the tiny model that is of its kind; empty where the
            config does not tell layers apart.
    """

    axes: Axes
    seen: Mapping[str, Sighting]
    head: str | None
    embedding: str | None
    choices: Choices = Choices()
    stands: tuple[int, ...] = ()

    def templates(self, name: str) -> tuple[str, ...]:
        """The axes of one tensor of the tiny model, in storage order, `?` for numbers."""
        found = self._unnamed[name]
        if self.choices.blocks and self._may_have_blocks:
            return tuple(IN_BLOCKS.get(axis, axis) for axis in found)
        return tuple(self._named_axis(name, dim) or axis for dim, axis in enumerate(found)) if self._all_named else found

    @cached_property
    def _unnamed(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(self._template(name, dim) for dim in range(len(seen.shape))) for name, seen in self.seen.items()}

    @cached_property
    def _may_have_blocks(self) -> bool:
        """Whether queries, keys and values are one tensor, with as many heads each, a multiple of the blocks."""
        fused = any(HEADS[2] in axes for axes in self._unnamed.values())
        return fused and self.axes.kv == self.axes.heads and self.axes.heads % BLOCKS == 0

    @cached_property
    def _all_named(self) -> bool:
        """Whether every axis over heads is known to be that of queries, keys, values or what comes after, so that head dims can grow."""
        over_heads = [(name, dim) for name, axes in self._unnamed.items() for dim, axis in enumerate(axes) if axis in HEADS]
        return bool(self._head_dim and over_heads) and all(self._named_axis(name, dim) for name, dim in over_heads)

    def _named_axis(self, name: str, dim: int) -> str | None:
        """The axis over heads with its head dims named; None where it has none or they are not told by the module's name."""
        template, seen, leaf = self._unnamed[name][dim], self.seen[name], leaf_of(name)
        heads, kv, head = self.axes.heads, self.axes.kv, self._head_dim
        if template in HEADS[2:]:
            whole = seen.shape[dim] == (heads + 2 * kv) * head
            names = {HEADS[2]: "[(kv group qk) | (kv qk*) | (kv v)]", HEADS[3]: "(kv [(group qk) | qk* | v])"}
            return names[template] if whole and FUSED.search(leaf) else None
        if template == "?" and HEAD_NORM.search(leaf) and seen.shape == (head,):
            return "qk"
        if template not in HEADS:
            return None
        if HEAD_NORM.search(leaf):
            return "(kv group qk)" if seen.shape[dim] == heads * head else "(kv qk)"
        queries = seen.shape[dim] == heads * head
        if seen.reads[dim]:
            return "(kv group v)" if queries else None
        for pattern, fits, named in (
            (QUERY, queries, "(kv group qk)"),
            (KEY, seen.shape[dim] == kv * head, "(kv qk*)"),
            (VALUE, seen.shape[dim] == kv * head, "(kv v)"),
        ):
            if pattern.search(leaf):
                return named if fits else None
        return None

    def _template(self, name: str, dim: int) -> str:
        axes, length = self.axes, self.seen[name].shape[dim]
        if template := self._of_mixer(name, dim):
            return template

        def moved(shapes: Mapping[str, tuple[int, ...]] | None) -> int:
            return 0 if shapes is None else shapes[name][dim] - length

        by_key = {key: moved(shapes) for key, shapes in axes.by_key.items() if moved(shapes)}
        by_hidden, queries, kv = moved(axes.by_hidden), moved(axes.by_queries), moved(axes.by_kv)
        if by_key:
            return self._of_keys(by_key, length) if not (by_hidden or queries or kv) else "?"
        if axes.coupled and by_hidden:
            return self._coupled(name, dim, by_hidden, queries, kv)
        if by_hidden:
            return "?" if queries or kv else self._of_hidden(name, dim, by_hidden)
        return self._of_heads(name, length, queries, kv) if queries > 0 or kv > 0 else "?"

    def _of_keys(self, by_key: Mapping[str, int], length: int) -> str:
        if len(by_key) > 1:
            return "?"
        ((key, delta),) = by_key.items()
        keys, config = self.axes.keys, self.axes.config
        if key == keys.vocab:
            return "vocab" if length == config[key] else "?"
        if key == keys.positions:
            return "pos" if delta == 8 else "?"
        space = "ffn" if key == keys.ffn else key
        parts = delta // 8
        return self._repeated(space, parts) if parts * config[key] == length else "?"

    def _repeated(self, space: str, parts: int) -> str:
        if parts == 1:
            return space
        return f"({space} {parts})" if self.choices.gates_interleaved else f"[{' | '.join([space] * parts)}]"

    def _of_hidden(self, name: str, dim: int, by_hidden: int) -> str:
        """A multiple of the hidden size, or it with something beside it; what goes into a state space is two halves, channels and gates.

        Args:
            by_hidden: how much longer the axis gets under twice the hidden size.
        """
        length, hidden = self.seen[name].shape[dim], self.axes.hidden
        parts, rest = divmod(length, hidden)
        if by_hidden == hidden < length:
            return "[residual | ?]"
        if by_hidden == length < hidden and hidden % length == 0:
            return f"inner_1of{hidden // length}"
        if rest or parts == 0:
            return "?"
        if parts in (1, 3) and self._gated(name, dim):
            return "inner_1" if parts == 1 else "[inner_1 | inner_1 | inner_1]"
        if leaf_of(name) == "in_proj" and parts % 2 == 0:
            half = "residual" if parts == 2 else f"inner_{parts // 2}"
            return f"[{half} | {half}]"
        if parts == 1:
            return "residual"
        return f"inner_{parts}" if parts in self._written or not self.seen[name].reads[dim] else f"({parts} residual)"

    @cached_property
    def _written(self) -> set[int]:
        """The multiples of the hidden size that some matrix writes; others are read of several streams side by side."""
        matrices = [seen for seen in self.seen.values() if any(seen.reads)]
        lengths = {length for seen in matrices for length, reads in zip(seen.shape, seen.reads, strict=True) if not reads}
        return {length // self.axes.hidden for length in lengths if length % self.axes.hidden == 0}

    def _of_mixer(self, name: str, dim: int) -> str | None:
        """An axis of a state space with heads: what goes in is gates, channels, state projections and a time step for each head."""
        mixer, seen = self.axes.mixer, self.seen[name]
        if mixer is None or not name.startswith(tuple(f"{module}." for module in mixer.modules)):
            return None
        rates, channels = f"({GROUPS_OF}{mixer.heads})", f"({GROUPS_OF}{mixer.heads} {mixer.dim})"
        length, heads, leaf = seen.shape[dim], int(self.axes.config[mixer.heads]), leaf_of(name)
        if leaf == "in_proj" and not seen.reads[dim]:
            return f"[{channels} | {channels} | ? | {rates}]" if length > 2 * mixer.inner + heads else None
        if leaf == "conv1d" and dim == 0:
            return f"[{channels} | ?]" if length > mixer.inner else channels
        if length == mixer.inner and (seen.reads[dim] or len(seen.shape) == 1):
            return channels
        return rates if seen.shape == (heads,) else None

    def _of_heads(self, name: str, length: int, queries: int, kv: int) -> str:
        """Of a model whose head dim is its own: `queries` and `kv` are how much longer the axis gets under twice as many of each."""
        heads = self.axes.heads
        if kv and queries:
            if queries + kv != length:
                return "?"
            return self._fused() if kv > self.axes.kv * self._head_dim else "[(kv group ?) | (kv ?)]"
        if kv:
            return "(kv ?)" if kv == length and kv // self.axes.kv > 1 else "kv" if kv == length else "?"
        if queries != length:
            return "?"
        if length == 3 * heads * self._head_dim and self.axes.kv == heads and FUSED.search(leaf_of(name)):
            return self._fused()
        return "(kv group ?)" if length > heads else "(kv group)"

    @property
    def _head_dim(self) -> int:
        given = self.axes.config.get(self.axes.keys.head_dim or "")
        return int(given or self.axes.hidden // self.axes.heads)

    def _fused(self) -> str:
        return "(kv [(group ?) | ? | ?])" if self.choices.interleaved else "[(kv group ?) | (kv ?) | (kv ?)]"

    def _coupled(self, name: str, dim: int, by_hidden: int, queries: int, kv: int) -> str:
        """Of a model whose head dim is hidden size / heads, where hidden size and heads are doubled together."""
        axes, length = self.axes, self.seen[name].shape[dim]
        if kv > 0:
            return "(kv ?)" if kv == length else self._fused() if length - kv == axes.hidden else "?"
        if length == axes.heads and queries > 0:
            return "(kv group)"
        if length == axes.hidden:
            return "(kv group ?)" if self._is_heads(name, dim) else "residual"
        if length == (axes.heads + 2 * axes.kv) * self._head_dim and FUSED.search(leaf_of(name)):
            return self._fused()
        return self._of_hidden(name, dim, by_hidden)

    def _gated(self, name: str, dim: int) -> bool:
        """Whether an axis is over the channels of a short convolution between two gates, which are as many as the hidden size."""
        leaf, seen = leaf_of(name), self.seen[name]
        path = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]
        into = self.seen.get(f"{path}.in_proj.weight")
        if into is None or into.shape[0] != 3 * self.axes.hidden or f"{path}.conv.weight" not in self.seen:
            return False
        return leaf == "conv" or (leaf == "in_proj" and not seen.reads[dim]) or (leaf == "out_proj" and seen.reads[dim])

    def _is_heads(self, name: str, dim: int) -> bool:
        """Whether an axis as long as the hidden size runs over heads: written by queries, keys and values, or read by what comes next."""
        leaf, seen = leaf_of(name), self.seen[name]
        writes_heads = any(pattern.search(leaf) for pattern in (QUERY, KEY, VALUE))
        if len(seen.shape) == 1:
            return bool(HEAD_NORM.search(leaf)) or (name.endswith(".bias") and writes_heads)
        if len(seen.shape) != 2 or seen.reads.count(True) != 1:
            return False
        if writes_heads:
            return not seen.reads[dim]
        return seen.reads[dim] and seen.shape[0] == seen.shape[1] and "att" in name.rpartition(f".{leaf}")[0].lower()

    # ---- of the whole family ----------------------------------------------------------------------------------------------------------

    @property
    def norm(self) -> str:
        """What most norms of the residual stream keep: "layer" or "rms"."""
        kinds = [seen.norm for name, seen in self.seen.items() if seen.norm and self._unnamed[name] == ("residual",)]
        return max(("layer", "rms"), key=kinds.count)

    @property
    def unused(self) -> list[str]:
        """Tensors that may grow and that no forward pass touches (cross-attention without an encoder), so that no rehearsal tests them."""
        return [name for name, seen in self.seen.items() if not seen.used and any("?" not in axis for axis in self._unnamed[name])]

    @property
    def unproved(self) -> list[str]:
        """Of those beside the text model, the ones that do more than write its residual stream: they read or normalise what grows, so
        that their own function stays for sure only where it grows by whole factors, all of it copied alike.
        """
        around = TEXT_TYPE in self.axes.config
        return [name for name in self.unused if around and "residual" in self._unnamed[name] and not self._writes_only(name)]

    def _writes_only(self, name: str) -> bool:
        weight = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
        return weight in self.seen and [
            (axis == "residual", reads) for axis, reads in zip(self._unnamed[weight], self.seen[weight].reads, strict=True)
        ] in ([(True, False), (False, True)], [(False, True), (True, False)])

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.head is not None and self.head == self.embedding

    @property
    def position_offset(self) -> int:
        """Learned positions stored beyond what the config says."""
        for name, seen in self.seen.items():
            if "pos" in self.templates(name):
                return seen.shape[self.templates(name).index("pos")] - int(self.axes.config[self.axes.keys.positions or ""])
        return 0


def leaf_of(name: str) -> str:
    """The last word of the name of a tensor's module."""
    words = [word for word in name.split(".") if not word.isdigit()]
    return words[-2] if len(words) > 1 and words[-1] in ("weight", "bias") else words[-1]
