"""Operators: named recipes of one expansion per space. A new one is a function here, a line in OPERATORS and
a leaf in conf/growth.

Notation as in the plan: a space grows n → N; r = ⌊N/n⌋ whole copies, s = N - r·n residue, ρ = r·n/N.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isclose, sqrt
from typing import Any

import numpy as np

from outgrow.growth.changes import CHANGES
from outgrow.growth.engine.seeding import generator
from outgrow.growth.expansion import AxisMap, Expansion, Fill
from outgrow.growth.learned.lessons import LEARNED
from outgrow.growth.recipe import Growth, Recipe
from outgrow.model.base.errors import UserError, unknown
from outgrow.model.family import Tensor
from outgrow.model.notation import size

Operator = Callable[..., Recipe]


def _wrapped(n: int, N: int) -> np.ndarray:
    """Index p mod n for every position: whole and partial copies."""
    return np.arange(N) % n


def _padded(n: int, N: int) -> np.ndarray:
    """Index the source first, then new indices (-1)."""
    position = np.arange(N)
    return np.where(position < n, position, -1)


def _pairs_padded(n: int, N: int, turned: int, turned_target: int) -> np.ndarray:
    """Index a head's dims, the source's first.

    Where the rotary count grows too, each half of the turned dims is padded, so that pairs stay pairs.
    """
    if turned == turned_target:
        return _padded(n, N)
    half = turned // 2
    half_target = turned_target // 2
    first = _padded(half, half_target)
    second = np.where(first < 0, -1, first + half)
    rest = _padded(n - turned, N - turned_target)
    unturned = np.where(rest < 0, -1, rest + turned)
    return np.concatenate([first, second, unturned])


def _vocabulary(n: int, N: int) -> Expansion:
    """Start new tokens at the mean of the old ones, 10⁻³ of the rows' RMS away from it, in embedding and
    head.

    The rule is the same for every operator.
    """
    rule = "unchanged"
    if n < N:
        rule = f"{N - n} new tokens: mean of the old and a little noise"
    index = _padded(n, N)
    kept = AxisMap.of(n, index, Fill.MEAN)
    return Expansion.of(kept, kept, rule)


def _positions(n: int, N: int) -> Expansion:
    """Start new learned positions fresh, for every operator."""
    fresh = f"{N - n} new positions: fresh"
    rule = "unchanged" if n == N else fresh
    index = _padded(n, N)
    kept = AxisMap.of(n, index, Fill.RANDOM)
    return Expansion.of(kept, kept, rule)


def _each_space(growth: Growth, grow: Callable[[str, int, int], Expansion]) -> dict[str, Expansion]:
    """Apply `grow` to the spaces of the transformer, and the shared rules to vocabulary and positions."""
    rules = {"vocab": _vocabulary, "pos": _positions}
    expansions: dict[str, Expansion] = {}
    for space, n in growth.source.items():
        N = growth.target[space]
        if space in rules:
            expansions[space] = rules[space](n, N)
        elif space == "layer":
            continue
        elif n == N:
            expansions[space] = Expansion.identity(n)
        else:
            expansions[space] = grow(space, n, N)
    return expansions


def lossless(growth: Growth) -> Recipe:
    """Width growth that keeps every logit, at any ratio (LEMON's average expansion, 2310.07999; splits as in
    Net2Net, 1511.05641).

    Residual stream: writers c·[w ×r, mean(w) ×s] (zero instead of the mean under RMSNorm), norm scale √ρ·[γ
    ×r, mean ×s], norm shift [β ×r, 0], readers r parts that sum to the source and fresh residue columns; c =
    1/√ρ, which leaves the variance that norms see, and so their epsilon, as it was. Feed-forward units and KV
    groups are copied in turn, their readers divided. Head dim: q × √(h'/h), new k rows zero, new v rows
    fresh, new output columns zero. A tied head's gain goes into the final norm.

    Weights stored in 16 bits are rounded by every gain that is no power of two. So there c = 1, of all powers
    of two the nearest to 1/√ρ, and the norms' epsilon × ρ instead (`lemon`'s form), where no other norm
    shares the epsilon and a config key sets it.

    Lossless where the rotary count stays, and where the normalised spaces (per-head q/k norms) do not grow.
    """
    return (
        lemon(growth)
        if growth.short and growth.sets_eps
        else _average_expansion(growth, lambda rho: 1 / sqrt(rho))
    )


def lemon(growth: Growth) -> Recipe:
    """`lossless` in LEMON's own form (2310.07999): writers unscaled (c = 1), the norms' epsilon × ρ instead.

    Lossless where `lossless` is, unless ρ < 1 and another norm shares the config's epsilon (per-head q/k
    norms: Qwen3, OLMo 2), or no config key sets the epsilon (a constant of OPT's code; families whose schema
    is derived).
    """
    n = growth.source["residual"]
    N = growth.target["residual"]
    rho = (N // n) * n / N
    recipe = _average_expansion(growth, lambda rho: 1.0)
    return replace(recipe, eps_factor=rho)


def _average_expansion(growth: Growth, writer_gain: Callable[[float], float]) -> Recipe:
    def grow(space: str, n: int, N: int) -> Expansion:
        if space == "residual":
            rho = (N // n) * n / N
            return _average_residual(growth, n, N, writer_gain(rho))
        if space in ("qk", "v"):
            return _free_head_dims(growth, space, n, N)
        copies = AxisMap.of(n, _wrapped(n, N))
        rule = f"{n} → {N}: copied in turn, readers divided"
        return Expansion.of(copies, copies.split(), rule)

    return Recipe(_each_space(growth, grow), hidden_ratio=growth.hidden_ratio, moments="transpose")


def _average_residual(growth: Growth, n: int, N: int, c: float) -> Expansion:
    """Make the residual stream's lossless expansion with writers × `c`; see `lossless`."""
    r = N // n
    rho = r * n / N
    position = np.arange(N)
    is_copy = position < r * n
    turns = position % n
    index = np.where(is_copy, turns, -1)
    mean = growth.family.norm == "layer"
    gain = sqrt(rho)
    scale = AxisMap.of(n, index, Fill.MEAN, gain=gain)
    shift = AxisMap.of(n, index, Fill.ZERO)
    copies = AxisMap.of(n, index, Fill.RANDOM)
    read = copies.split()
    tied = 1.0
    if growth.tied:
        tied = 1 / (r * c * growth.embedding_gain)
    fill = Fill.MEAN if mean else Fill.ZERO
    word = "mean" if mean else "zero"
    rest = N - r * n
    residues = f", {rest} {word} residues"
    residue = residues if rest > 0 else ""
    return Expansion(
        write=AxisMap.of(n, index, fill, gain=c),
        read=read if growth.family.prenorm else read.scaled(1 / c),
        head=read,
        rule=f"{n} → {N}: {r} × copied{residue}, written × {c:.4g}, norm scale × {sqrt(rho):.4g}",
        scale=scale,
        shift=shift,
        final_scale=scale.scaled(tied),
        final_shift=shift.scaled(tied),
        post_scale=scale.scaled(c),
    )


def _free_head_dims(growth: Growth, space: str, n: int, N: int) -> Expansion:
    family = growth.family
    turned = family.rotary_dims(growth.source_config)
    turned_target = family.rotary_dims(growth.target_config)
    index = _padded(n, N)
    if space == "qk":
        index = _pairs_padded(n, N, turned, turned_target)
    gain = growth.attention_gain if space == "qk" else 1.0
    write = AxisMap.of(n, index, Fill.RANDOM, gain=gain)
    kept = AxisMap.of(n, index, Fill.RANDOM)
    scaled = "" if isclose(gain, 1) else f", queries × {gain:.4g}"
    return Expansion.of(
        write,
        kept.filled(Fill.ZERO),
        f"{n} → {N}: {N - n} new dims written fresh and read as zero{scaled}",
        scale=kept,
        shift=kept,
    )


def random_pad(growth: Growth) -> Recipe:
    """The source in a corner of every tensor, everything else freshly initialised.

    "Weight reuse" in Javaheripi's NeurIPS 2023 talk on Phi-2.

    Not lossless wherever a space grows: fresh writers meet fresh readers.
    """
    return _pad(growth, Fill.RANDOM, "fresh")


def _pad(growth: Growth, fill: Fill, word: str) -> Recipe:
    def grow(space: str, n: int, N: int) -> Expansion:
        index = _padded(n, N)
        kept = AxisMap.of(n, index, fill)
        rest = f"{N - n} {word}"
        rule = f"{n} → {N}: source first, {rest}"
        return Expansion.of(kept, kept, rule)

    return Recipe(_each_space(growth, grow))


def tile(growth: Growth, *, mode: str = "middle", heads: str = "head_aware") -> Recipe:
    """Position p of an axis takes (p - off) mod n, with no rescaling: Phi-2's scaled knowledge transfer,
    ModernBERT's weight tiling.

    `mode="edge"`: off = 0; `"middle"`: off = ⌊(N - n)/2⌋; `"center"`: the middle block only, fresh around it.
    `heads="head_aware"` tiles each space, so a head's dims stay in its head; `"flat"` tiles the flattened
    axis, which at 2048 → 2560 with 32 heads mixes heads and shifts rotary dims. Not lossless. Phi-2's own
    scale factors were never published; none is applied here.
    """
    if mode not in ("edge", "middle", "center"):
        unknown("tile mode", mode, ("edge", "middle", "center"))
    if heads not in ("head_aware", "flat"):
        unknown("tile heads", heads, ("head_aware", "flat"))

    def tiled(n: int, N: int) -> AxisMap:
        offset = 0 if mode == "edge" else (N - n) // 2
        position = np.arange(N) - offset
        inside = (position >= 0) & (position < n)
        block = np.where(inside, position, -1)
        index = block if mode == "center" else position % n
        return AxisMap.of(n, index)

    def grow(space: str, n: int, N: int) -> Expansion:
        kept = tiled(n, N)
        how = "middle block, fresh around it" if mode == "center" else f"tiled from the {mode}"
        rule = f"{n} → {N}: {how}"
        return Expansion.of(kept, kept, rule)

    flat = tiled if heads == "flat" else None
    return Recipe(_each_space(growth, grow), flat=flat)


def scratch(growth: Growth) -> Recipe:
    """Nothing is inherited: 0 in biases, 1 in norm scales, and normal matrices of the deviation that the
    library's class gives them.
    """

    def fresh(space: str) -> Expansion:
        n = growth.source[space]
        N = growth.target[space]
        nothing = np.full(N, -1)
        new = AxisMap.of(n, nothing, Fill.RANDOM)
        return Expansion.of(new, new, "fresh")

    spaces = [space for space in growth.source if space != "layer"]
    return Recipe({space: fresh(space) for space in spaces}, inherits=False)


def zero_pad(growth: Growth) -> Recipe:
    """The source in a corner of every tensor, zeros everywhere else, norm scales included: a null control,
    never read.

    A new reader's gradient is a multiple of a new activation, which is zero, and that of a new writer or norm
    scale passes through a new reader, which is zero: all stay exactly 0 for ever (norm scales of 1 would not
    help an RMSNorm, which scales a zero). Only through LayerNorm's mean does a gradient reach what writes new
    residual dims, which still nothing reads. `random_pad` learns. Lossless only on spaces without a norm; a
    norm over the residual stream then divides by another variance.
    """
    return _pad(growth, Fill.ZERO, "zero")


def net2net(growth: Growth) -> Recipe:
    """Net2WiderNet (1511.05641): each new index copies a random old one, its readers divided by how many
    copies there are.

    Lossless on spaces without a norm. A norm over the residual stream sees other statistics unless every
    index happens to be copied equally often, and head dims that rotary positions turn are never copied.
    """

    def grow(space: str, n: int, N: int) -> Expansion:
        return _random_copies(growth, space, n, N)

    expansions = _each_space(growth, grow)
    return Recipe(expansions, hidden_ratio=growth.hidden_ratio, moments="transpose")


def bert2bert_fpi(growth: Growth) -> Recipe:
    """bert2BERT's function-preserving initialisation (2110.07143): Net2Net's random copies on every space of
    a transformer, heads whole.
    """
    return net2net(growth)


def bert2bert_aki(growth: Growth) -> Recipe:
    """bert2BERT's advanced knowledge initialisation (2110.07143): as `bert2bert_fpi`, but new rows come from
    the next layer.

    Readers are divided as if the new rows were copies. Not lossless, which breaks the symmetry that copies
    have. The last layer has no next one and copies itself.
    """
    expansions = dict(net2net(growth).expansions)
    for space, expansion in expansions.items():
        if growth.grows(space) and space not in ("vocab", "pos"):
            write = expansion.write
            new = np.arange(write.target) >= write.source
            expansions[space] = replace(
                expansion,
                write=expansion.write.from_next_layer(new),
                rule=expansion.rule + ", new rows from the next layer",
            )
    return Recipe(expansions, hidden_ratio=growth.hidden_ratio)


def _random_copies(growth: Growth, space: str, n: int, N: int) -> Expansion:
    """Copy indices 0 … n-1 once each, then random ones; of a head, dims that rotary positions do not turn."""
    is_query = space == "qk"
    turned = growth.family.rotary_dims(growth.source_config) if is_query else 0
    first = turned if turned < n else 0
    numbers = generator(growth.seed, "copies", space)
    drawn = numbers.integers(first, n, N - n)
    own = np.arange(n)
    index = np.concatenate([own, drawn])
    copies = AxisMap.of(n, index)
    gain = growth.attention_gain if is_query else 1.0
    rule = f"{n} → {N}: {N - n} random copies, readers divided"
    if not isclose(gain, 1):
        rule += f", queries × {gain:.4g}"
    write = copies.scaled(gain)
    read = copies.split()
    expansion = Expansion.of(write, read, rule, scale=copies, shift=copies)
    if space == "residual" and growth.tied:  # the head is the embedding, whose copies are not divided
        expansion = replace(expansion, final_scale=copies.split(), final_shift=copies.split())
    return expansion


def hyperclone(growth: Growth, *, form: str = "symmetric") -> Recipe:
    """HyperCloning (2409.12903): every space grows by a whole factor m, copies side by side, their readers
    divided.

    `form="symmetric"`: every copy reads all m copies, each × 1/m; `"diagonal"`: the n-th copy reads the n-th
    copies only (block-diagonal matrices). With `noise` the paper's noisy forms (10 dB there: noise =
    10^(-10/20) = 0.3162): what is added to the readers of one copy is taken from another's, the output head's
    readers excepted. Attention heads are cloned whole. Lossless.
    """
    if form not in ("symmetric", "diagonal"):
        unknown("hyperclone form", form, ("symmetric", "diagonal"))
    apart = ("layer", "vocab", "pos")
    spaces = [space for space in growth.source if space not in apart]
    sizes = [(growth.source[space], growth.target[space]) for space in spaces]
    grown = dict(zip(spaces, sizes, strict=True))
    UserError.collect(
        (
            f"hyperclone: {space} {n} → {N} is no whole factor; choose a multiple, or operator lossless, "
            "which takes any ratio"
        )
        for space, (n, N) in grown.items()
        if N % n
    )
    UserError.collect(
        (
            f"hyperclone: clones whole heads, but {space} grows {n} → {N}; keep the head dim and multiply "
            "the heads"
        )
        for space, (n, N) in grown.items()
        if space in ("qk", "v") and n != N
    )

    def grow(space: str, n: int, N: int) -> Expansion:
        copies = AxisMap.of(n, _wrapped(n, N))
        times = f"cloned {N // n} ×"
        rule = f"{n} → {N}: {times}, readers divided"
        expansion = Expansion.of(copies, copies.split(), rule, scale=copies, shift=copies)
        if space != "residual":
            return expansion
        scale = copies.scaled(1.0)
        shift = copies.scaled(1.0)
        if growth.tied:
            undo = 1 / growth.embedding_gain
            scale = copies.split().scaled(undo)
            shift = copies.split().scaled(undo)
        expansion = replace(expansion, final_scale=scale, final_shift=shift)
        return expansion

    return Recipe(
        _each_space(growth, grow),
        diagonal=form == "diagonal",
        hidden_ratio=growth.hidden_ratio,
        noisy_head=False,
        moments="transpose",
    )


def sparkling(growth: Growth) -> Recipe:
    """SPARKLING's RMS-preserving copies (2602.02472): copies in turn, matrices scaled so that activations
    keep their root mean square.

    A matrix whose input alone grows d → D is scaled by √(d/D), one whose input and output grow, D = (1 + c)·d
    with c ≤ 1, by √(1/(1 + 3c)): a share c of the terms then adds up coherently. Not lossless. Meant with
    asymmetric resets of the optimizer's state.
    """
    n = growth.source["residual"]
    N = growth.target["residual"]
    if 2 * n < N:
        raise UserError(
            f"sparkling: residual {n} → {N} is more than double, which its formula does not cover; grow in "
            "two steps"
        )

    def grow(space: str, n: int, N: int) -> Expansion:
        copies = AxisMap.of(n, _wrapped(n, N))
        rule = f"{n} → {N}: copied in turn, fan-in rescaled"
        return Expansion.of(copies, copies, rule)

    def factor(tensor: Tensor) -> float:
        line = tensor.line
        if line.kind != "linear" or line.into is None or tensor.is_bias:
            return 1.0
        d = size(line.into, growth.source)
        D = size(line.into, growth.target)
        out = size(line.out, growth.source)
        if out == size(line.out, growth.target):
            return sqrt(d / D)
        coherent = 3 * (D - d) / d
        return sqrt(1 / (1 + coherent))

    return Recipe(_each_space(growth, grow), factor=factor, moments="original")


OPERATORS: dict[str, Operator] = {
    "lossless": lossless,
    "lemon": lemon,
    "net2net": net2net,
    "bert2bert_fpi": bert2bert_fpi,
    "bert2bert_aki": bert2bert_aki,
    "hyperclone": hyperclone,
    "tile": tile,
    "random_pad": random_pad,
    "zero_pad": zero_pad,
    "sparkling": sparkling,
    "scratch": scratch,
    "none": scratch,
}


# The strength of noise where none is asked for; none of the other operators has any.
NOISE = dict.fromkeys(
    ("lossless", "lemon", "upcycle", "drop_upcycle", "expert_copy", "least_squares", "lesa"), 0.5
)


def default_noise(operator: str) -> float:
    """Return the strength of noise with which an operator is meant to be used, as its leaf in conf/growth has
    it.
    """
    return NOISE.get(operator, 0.0)


def options_of(operator: str) -> list[str]:
    """List the names of an operator's own options."""
    every_operator = OPERATORS | CHANGES | LEARNED
    parameters = inspect.signature(every_operator[operator]).parameters
    named = inspect.Parameter.KEYWORD_ONLY
    return [name for name, parameter in parameters.items() if parameter.kind is named]


def recipe(operator: str, growth: Growth, options: Mapping[str, Any]) -> Recipe:
    """Make the recipe of the operator of that name.

    Raises:
        UserError: the operator or an option is unknown, or the operator cannot do this growth.
    """
    if operator not in OPERATORS:
        unknown("operator", operator, OPERATORS | CHANGES | LEARNED)
    function = OPERATORS[operator]
    if not growth.family.spaces:
        if function is scratch:
            raise UserError(
                f"operator {operator!r}: family {growth.family.name!r} has no schema, so how its tensors "
                "start is unknown"
            )
        return Recipe({})
    known = options_of(operator)
    for name in options:
        if name not in known:
            unknown(f"option of operator {operator!r}", name, known)
    return function(growth, **options)
