"""Layer maps: the source layer of each target layer, and the target layers that start as the identity."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from outgrow.model.base.errors import UserError, unknown


@dataclass(frozen=True)
class LayerMap:
    """Depth growth of L source layers into M.

    Attributes:
        rule: the map's name.
        source: L.
        layers: (M,) the source layer of each target layer.
        identity: (M,) True where the target layer's writers start at zero, so that it passes the residual
            stream on.
        between: the target layers that are the mean of their source layer and the next.
    """

    rule: str
    source: int
    layers: tuple[int, ...]
    identity: tuple[bool, ...]
    between: frozenset[int] = frozenset()

    @property
    def target(self) -> int:
        return len(self.layers)

    @property
    def is_lossless(self) -> bool:
        """Check that every source layer works exactly once and in order, all others passing through."""
        pairs = zip(self.layers, self.identity, strict=True)
        working = [layer for layer, idle in pairs if not idle]
        return working == list(range(self.source))

    @property
    def shown(self) -> list[str]:
        """The source of each target layer in short: `0`, `[0]` of an identity layer, `0+1` of a mean of
        two.
        """
        cells = []
        pairs = zip(self.layers, self.identity, strict=True)
        for number, (layer, idle) in enumerate(pairs):
            both = f"{layer}+{layer + 1}"
            mean = both if number in self.between else f"{layer}"
            cells.append(f"[{layer}]" if idle else mean)
        return cells


def _repeats(layers: Sequence[int]) -> tuple[bool, ...]:
    repeats = [layer == following for layer, following in pairwise(layers)]
    return (False, *repeats)


def interleave(source: int, target: int) -> list[int]:
    """Target layer i ← ⌊i·L/M⌋: every layer repeated in place (interleaved stacking; G_direct of
    2405.15319)."""
    return [i * source // target for i in range(target)]


def stack(source: int, target: int) -> list[int]:
    """i mod L: the whole network on top of itself (StackBERT, Gong et al. 2019; G_stack, 2405.15319)."""
    return [i % source for i in range(target)]


def proportional(source: int, target: int) -> list[int]:
    """round(i·L/M), half to even, clamped to L-1 (Gopher's map, 2112.11446; Javaheripi, NeurIPS 2023, for
    Phi-2).
    """
    nearest = [round(i * source / target) for i in range(target)]
    return [min(layer, source - 1) for layer in nearest]


def top(source: int, target: int) -> list[int]:
    """The last M-L layers once more on top."""
    _at_most_double("top", source, target)
    again = range(2 * source - target, source)
    return [*range(source), *again]


def solar(source: int, target: int) -> list[int]:
    """[0 : L-m] ++ [m : L], two overlapping copies with L-m = M/2 (SOLAR, 2312.15166)."""
    _at_most_double("solar", source, target)
    if target % 2:
        raise UserError(f"depth 'solar': joins two equal halves, so {target} target layers must be even")
    half = target // 2
    second = range(source - half, source)
    return [*range(half), *second]


def midas(source: int, target: int) -> list[int]:
    """The middle block of M-L layers once more, behind itself (MIDAS, 2409.19044)."""
    _at_most_double("midas", source, target)
    extra = target - source
    start = (source - extra) // 2
    first = range(start + extra)
    return [*first, *range(start, source)]


def llama_pro(source: int, target: int) -> list[int]:
    """An identity copy after every L/(M-L) layers (LLaMA Pro, 2401.02415)."""
    extra = target - source
    if source % extra:
        raise UserError(
            f"depth 'llama_pro': {extra} new layers cannot be spread evenly among {source}; use "
            "depth=identity, which spreads any number"
        )
    group = source // extra
    return [
        layer
        for start in range(0, source, group)
        for layer in (*range(start, start + group), start + group - 1)
    ]


def identity_top(source: int, target: int) -> list[int]:
    """Identity copies of the last layer, on top."""
    last = source - 1
    return [min(i, last) for i in range(target)]


def neighbours(source: int, target: int) -> list[int]:
    """New layers between two others, at most one in a gap, the gaps spread evenly.

    Each starts as the mean of both: what LESA (2502.13794) predicts, without the prediction.
    """
    extra = target - source
    gaps = source - 1
    if extra > gaps:
        raise UserError(
            f"depth 'neighbours': a new layer stands between two, so at most {source + gaps} layers come of "
            f"{source}, not {target}; use stack or interleave, or grow twice"
        )
    filled = {(2 * number + 1) * gaps // (2 * extra) for number in range(extra)}
    layers = []
    for layer in range(source):
        copies = 2 if layer in filled else 1
        layers += [layer] * copies
    return layers


def _at_most_double(rule: str, source: int, target: int) -> None:
    if target > 2 * source:
        raise UserError(
            f"depth {rule!r}: repeats layers once, so at most {2 * source} layers come of {source}, not "
            f"{target}; use stack or interleave"
        )


# name → (map, whether repeats start as the identity, which keeps the function)
LAYER_MAPS: dict[str, tuple[Callable[[int, int], list[int]], bool]] = {
    "identity": (interleave, True),
    "identity_top": (identity_top, True),
    "llama_pro": (llama_pro, True),
    "interleave": (interleave, False),
    "stack": (stack, False),
    "proportional": (proportional, False),
    "top": (top, False),
    "solar": (solar, False),
    "midas": (midas, False),
    "neighbours": (neighbours, False),
}


def layer_map(depth: str | Sequence[int], source: int, target: int) -> LayerMap:
    """Make the layer map named `depth`, or of a list of source layers (repeats work; none starts as the
    identity).

    Raises:
        UserError: the name is unknown, the list does not fit, or the target has fewer layers than the source.
    """
    if target < source:
        raise UserError(
            f"target has {target} layers, fewer than the source's {source}; growth cannot drop layers"
        )
    if not isinstance(depth, str):
        return _explicit(depth, source, target)
    if depth not in LAYER_MAPS:
        unknown("depth", depth, LAYER_MAPS)
    rule, idle = LAYER_MAPS[depth]
    is_deeper = target > source
    layers = rule(source, target) if is_deeper else list(range(source))
    new = _repeats(layers)
    identity = new if idle else (False,) * target
    between: frozenset[int] = frozenset()
    if depth == "neighbours":
        between = frozenset(number for number in range(target) if new[number])
    return LayerMap(depth, source, tuple(layers), identity, between)


def among_kinds(source: Sequence[Hashable], target: Sequence[Hashable]) -> LayerMap | None:
    """Make the identity map where layers differ in kind: a source layer works at a place of its kind, near
    `identity`'s.

    Every new layer is a copy of the nearest one before it of its own kind.

    Args:
        source, target: the kind of each layer, as the class makes them.

    Returns:
        None where the source's kinds do not come in this order among the target's.
    """
    plain = interleave(len(source), len(target))
    latest = [0] * len(source)
    position = len(target)
    for layer in reversed(range(len(source))):
        kind = source[layer]
        candidates = [number for number in range(position) if target[number] == kind]
        if not candidates:
            return None
        latest[layer] = position = candidates[-1]
    working: dict[int, int] = {}  # target layer → source layer
    position = -1
    for layer, kind in enumerate(source):
        last = latest[layer] + 1
        between = range(position + 1, last)
        free = [number for number in between if target[number] == kind]
        # The first of a kind works at once, so that new layers of this kind come after it.
        has_earlier = kind in source[:layer]
        goal = plain.index(layer) if has_earlier else free[0]
        position = min(free, key=lambda number: abs(number - goal))
        working[position] = layer
    layers = []
    for number, kind in enumerate(target):
        alike = [position for position in working if source[working[position]] == kind]
        if not alike:
            return None
        before = [position for position in alike if position <= number]
        nearest = before[-1] if before else alike[0]
        layers.append(working[nearest])
    identity = tuple(number not in working for number in range(len(target)))
    return LayerMap("identity", len(source), tuple(layers), identity)


def _explicit(depth: Sequence[int], source: int, target: int) -> LayerMap:
    if len(depth) != target:
        raise UserError(f"depth: the list names {len(depth)} layers, the target has {target}")
    layers = range(source)
    wrong = [layer for layer in depth if type(layer) is not int or layer not in layers]
    if wrong:
        last = source - 1
        raise UserError(f"depth: {wrong[0]!r} is no source layer; the source has layers 0 to {last}")
    works = (False,) * target
    return LayerMap("list", source, tuple(depth), works)
