"""Operators: named recipes of one expansion per space. A new one is a function here, a line in OPERATORS and a leaf in conf/growth.

Notation as in the plan: a space grows n → N; r = ⌊N/n⌋ whole copies, s = N - r·n residue, ρ = r·n/N.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import isclose, sqrt
from typing import Any

import numpy as np

from model.errors import unknown
from model.family import Config, Family, Tensor
from model.notation import Axis, Parts, Product, Space

from .expansion import AxisMap, Expansion, Fill, compose, concatenate


@dataclass(frozen=True, eq=False)
class Growth:
    """What an operator is given: a family, two configs and their sizes."""

    family: Family
    source_config: Config
    target_config: Config
    seed: int = 0

    @cached_property
    def source(self) -> dict[str, int]:
        return self.family.sizes(self.source_config)

    @cached_property
    def target(self) -> dict[str, int]:
        return self.family.sizes(self.target_config)

    @property
    def tied(self) -> bool:
        return bool(self.target_config.get("tie_word_embeddings"))

    @property
    def embedding_gain(self) -> float:
        """What undoes the change of a model's own factor sqrt(hidden) on its embeddings (Gemma); 1 where there is none."""
        scaled = any(line.scaled for line in self.family.lines)
        return sqrt(self.source["residual"] / self.target["residual"]) if scaled else 1.0

    @property
    def rotary_kept(self) -> bool:
        """Whether exactly the same dimensions of a head are turned by the same angles."""
        return self.family.rotary_dims(self.source_config) == self.family.rotary_dims(self.target_config)

    @property
    def attention_gain(self) -> float:
        """How much larger q·k must become so that the library's scaling gives the source's attention logits."""
        if self.family.attention_scale == "head_dim":
            return sqrt(self.target["qk"] / self.source["qk"])
        return sqrt(self.target_config[self.family.attention_scale] / self.source_config[self.family.attention_scale])

    def grows(self, space: str) -> bool:
        return self.source[space] != self.target[space]


@dataclass(frozen=True, eq=False)
class Recipe:
    """What an operator decides.

    Attributes:
        expansions: one per space.
        flat: axes made of several spaces grow as one, whatever they are made of (`tile`'s flat variant).
        eps_factor: what the target's norm epsilon is multiplied by.
        embedding_gain: factor on embeddings that the model itself multiplies by sqrt(hidden).
        inherits: False when nothing is taken from the source.
    """

    expansions: Mapping[str, Expansion]
    flat: Callable[[int, int], AxisMap] | None = None
    eps_factor: float = 1.0
    embedding_gain: float = 1.0
    inherits: bool = True

    def spaces_only(self) -> Recipe:
        """The same recipe with every axis grown space by space."""
        return replace(self, flat=None)

    def maps(self, tensor: Tensor) -> tuple[AxisMap, ...]:
        """One map per stored axis of `tensor`, composed from the expansions of its spaces in the role it plays for each."""
        return tuple(self._axis(axis, reads, tensor) for axis, reads in zip(tensor.axes, tensor.reads, strict=True))

    def _axis(self, axis: Axis, reads: bool, tensor: Tensor) -> AxisMap:
        if self.flat is not None and isinstance(axis, Parts):
            return reduce(concatenate, (self._axis(part, reads, tensor) for part in axis.parts))
        whole = compose(axis, lambda space: self._side(space, reads, tensor))
        return self.flat(whole.source, whole.target) if self.flat is not None and isinstance(axis, Product) else whole

    def _side(self, space: Space, reads: bool, tensor: Tensor) -> AxisMap:
        expansion, line = self.expansions[space.name], tensor.line
        match line.kind:
            case "norm":
                return expansion.shift if tensor.is_bias else expansion.scale
            case "final norm":
                return expansion.final_shift if tensor.is_bias else expansion.final_scale
            case "post norm":
                return expansion.post_scale
        side = expansion.read if reads != space.dual else expansion.write
        return side.scaled(self.embedding_gain) if line.scaled and space.name == "residual" else side


Operator = Callable[..., Recipe]


def _wrapped(n: int, N: int) -> np.ndarray:
    """p mod n for every position: whole and partial copies."""
    return np.arange(N) % n


def _padded(n: int, N: int) -> np.ndarray:
    """The source first, then new indices."""
    return np.where(np.arange(N) < n, np.arange(N), -1)


def _pairs_padded(n: int, N: int, turned: int, turned_target: int) -> np.ndarray:
    """A head's dims, the source's first: where the rotary count grows too, each half of the turned dims is padded, so pairs stay pairs."""
    if turned == turned_target:
        return _padded(n, N)
    half, half_target = turned // 2, turned_target // 2
    first = _padded(half, half_target)
    second = np.where(first < 0, -1, first + half)
    rest = _padded(n - turned, N - turned_target)
    return np.concatenate([first, second, np.where(rest < 0, -1, rest + turned)])


def _vocabulary(n: int, N: int) -> Expansion:
    """New tokens start at the mean of the old ones, in the embedding and in the head, for every operator."""
    kept = AxisMap.of(n, _padded(n, N), Fill.MEAN)
    return Expansion.of(kept, kept, "unchanged" if n == N else f"{N - n} new tokens: mean of the old")


def _positions(n: int, N: int) -> Expansion:
    """New learned positions start fresh, for every operator."""
    kept = AxisMap.of(n, _padded(n, N), Fill.RANDOM)
    return Expansion.of(kept, kept, "unchanged" if n == N else f"{N - n} new positions: fresh")


def _each_space(growth: Growth, grow: Callable[[str, int, int], Expansion]) -> dict[str, Expansion]:
    """`grow` for the spaces of the transformer, the shared rules for vocabulary and positions."""
    sizes = {space: (growth.source[space], growth.target[space]) for space in growth.source if space != "layer"}
    expansions = {space: Expansion.identity(n) if n == N else grow(space, n, N) for space, (n, N) in sizes.items()}
    return expansions | {"vocab": _vocabulary(*sizes["vocab"]), "pos": _positions(*sizes["pos"])}


def lossless(growth: Growth, *, eps_form: str = "free") -> Recipe:
    """Width growth that keeps every logit, at any ratio (LEMON's average expansion, 2310.07999; splits as in Net2Net, 1511.05641).

    Residual stream: writers c·[w ×r, mean(w) ×s] (zero instead of the mean under RMSNorm), norm scale √ρ·[γ ×r, mean ×s], norm shift
    [β ×r, 0], readers r parts that sum to the source and fresh residue columns. `eps_form="free"`: c = 1/√ρ, epsilon unchanged;
    `"lemon"`: c = 1, epsilon × ρ. Feed-forward units and KV groups are copied in turn, their readers divided. Head dim: q × √(h'/h), new
    k rows zero, new v rows fresh, new output columns zero. A tied head's gain goes into the final norm.

    Lossless where the rotary count stays, and where the normalised spaces (per-head q/k norms) do not grow.
    """
    if eps_form not in ("free", "lemon"):
        unknown("eps_form", eps_form, ("free", "lemon"))

    def grow(space: str, n: int, N: int) -> Expansion:
        if space == "residual":
            return lossless_residual(growth, n, N, eps_form)
        if space in ("qk", "v"):
            return _free_head_dims(growth, space, n, N)
        copies = AxisMap.of(n, _wrapped(n, N))
        return Expansion.of(copies, copies.split(), f"{n} → {N}: copied in turn, readers divided")

    n, N = growth.source["residual"], growth.target["residual"]
    eps_factor = (N // n) * n / N if eps_form == "lemon" else 1.0
    return Recipe(_each_space(growth, grow), eps_factor=eps_factor, embedding_gain=growth.embedding_gain)


def lossless_residual(growth: Growth, n: int, N: int, eps_form: str) -> Expansion:
    """The residual stream's lossless expansion; see `lossless`."""
    r = N // n
    rho = r * n / N
    c = 1 / sqrt(rho) if eps_form == "free" else 1.0
    index = np.where(np.arange(N) < r * n, np.arange(N) % n, -1)
    mean = growth.family.norm == "layer"
    write = AxisMap.of(n, index, Fill.MEAN if mean else Fill.ZERO, gain=c)
    scale = AxisMap.of(n, index, Fill.MEAN, gain=sqrt(rho))
    shift = AxisMap.of(n, index, Fill.ZERO)
    head = 1 / (r * c * growth.embedding_gain) if growth.tied else 1.0
    residue = f", {N - r * n} {'mean' if mean else 'zero'} residues" if r * n < N else ""
    return Expansion(
        write=write,
        read=AxisMap.of(n, index, Fill.RANDOM).split(),
        rule=f"{n} → {N}: {r} × copied{residue}, written × {c:.4g}, norm scale × {sqrt(rho):.4g}",
        scale=scale,
        shift=shift,
        final_scale=scale.scaled(head),
        final_shift=shift.scaled(head),
        post_scale=scale.scaled(c),
    )


def _free_head_dims(growth: Growth, space: str, n: int, N: int) -> Expansion:
    turned = growth.family.rotary_dims(growth.source_config), growth.family.rotary_dims(growth.target_config)
    index = _pairs_padded(n, N, *turned) if space == "qk" else _padded(n, N)
    gain = growth.attention_gain if space == "qk" else 1.0
    write = AxisMap.of(n, index, Fill.RANDOM, gain=gain)
    kept = AxisMap.of(n, index, Fill.RANDOM)
    scaled = "" if isclose(gain, 1) else f", queries × {gain:.4g}"
    return Expansion.of(
        write, kept.filled(Fill.ZERO), f"{n} → {N}: {N - n} new dims written fresh and read as zero{scaled}", scale=kept, shift=kept
    )


def random_pad(growth: Growth) -> Recipe:
    """The source in a corner of every tensor, everything else freshly initialised ("weight reuse" in Javaheripi's NeurIPS 2023 talk on Phi-2).

    Not lossless wherever a space grows: fresh writers meet fresh readers.
    """
    return _pad(growth, Fill.RANDOM, "fresh")


def _pad(growth: Growth, fill: Fill, word: str) -> Recipe:
    def grow(space: str, n: int, N: int) -> Expansion:
        kept = AxisMap.of(n, _padded(n, N), fill)
        return Expansion.of(kept, kept, f"{n} → {N}: source first, {N - n} {word}")

    return Recipe(_each_space(growth, grow))


def tile(growth: Growth, *, mode: str = "middle", heads: str = "head_aware") -> Recipe:
    """Position p of an axis takes (p - off) mod n, with no rescaling (Phi-2's scaled knowledge transfer and ModernBERT's weight tiling).

    `mode="edge"`: off = 0; `"middle"`: off = ⌊(N - n)/2⌋; `"center"`: the middle block only, fresh around it. `heads="head_aware"` tiles each
    space, so a head's dims stay in its head; `"flat"` tiles the flattened axis, which at 2048 → 2560 with 32 heads mixes heads and shifts
    rotary dims. Not lossless. Phi-2's own scale factors were never published; none is applied here.
    """
    if mode not in ("edge", "middle", "center"):
        unknown("tile mode", mode, ("edge", "middle", "center"))
    if heads not in ("head_aware", "flat"):
        unknown("tile heads", heads, ("head_aware", "flat"))

    def tiled(n: int, N: int) -> AxisMap:
        position = np.arange(N) - (0 if mode == "edge" else (N - n) // 2)
        inside = (position >= 0) & (position < n)
        return AxisMap.of(n, np.where(inside, position, -1) if mode == "center" else position % n)

    def grow(space: str, n: int, N: int) -> Expansion:
        kept = tiled(n, N)
        how = "middle block, fresh around it" if mode == "center" else f"tiled from the {mode}"
        return Expansion.of(kept, kept, f"{n} → {N}: {how}")

    return Recipe(_each_space(growth, grow), flat=tiled if heads == "flat" else None)


def scratch(growth: Growth) -> Recipe:
    """Nothing is inherited: normal(0, initializer_range) in matrices, 0 in biases, 1 in norm scales."""

    def fresh(space: str) -> Expansion:
        new = AxisMap.of(growth.source[space], np.full(growth.target[space], -1), Fill.RANDOM)
        return Expansion.of(new, new, "fresh")

    return Recipe({space: fresh(space) for space in growth.source if space != "layer"}, inherits=False)


OPERATORS: dict[str, Operator] = {
    "lossless": lossless,
    "random_pad": random_pad,
    "tile": tile,
    "scratch": scratch,
}


def recipe(operator: str, growth: Growth, options: Mapping[str, Any]) -> Recipe:
    """The recipe of the operator of that name.

    Raises:
        UserError: the operator or an option is unknown, or the operator cannot do this growth.
    """
    if operator not in OPERATORS:
        unknown("operator", operator, OPERATORS)
    function = OPERATORS[operator]
    known = [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            unknown(f"option of operator {operator!r}", name, known)
    return function(growth, **options)
