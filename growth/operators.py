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
    count = N - n
    if count > 0:
        rule = f"{count} new tokens: mean of the old and a little noise"
    index = _padded(n, N)
    axis = AxisMap.of(n, index, Fill.MEAN)
    return Expansion.of(axis, axis, rule)


def _positions(n: int, N: int) -> Expansion:
    """Start new learned positions fresh, for every operator."""
    count = N - n
    rule = f"{count} new positions: fresh" if count else "unchanged"
    index = _padded(n, N)
    axis = AxisMap.of(n, index, Fill.RANDOM)
    return Expansion.of(axis, axis, rule)


def each_space(growth: Growth, grow: Callable[[str, int, int], Expansion]) -> dict[str, Expansion]:
    """Apply `grow` to the spaces of the transformer, and the shared rules to vocabulary and positions."""
    rules = {"vocab": _vocabulary, "pos": _positions}
    expansions: dict[str, Expansion] = {}
    for space, n in growth.source.items():
        N = growth.target[space]
        if space == "layer":
            continue
        rule = rules.get(space)
        if rule is not None:
            expansions[space] = rule(n, N)
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
    if growth.short and growth.sets_eps:
        return lemon(growth)

    def keeping_variance(rho: float) -> float:
        return 1 / sqrt(rho)

    return _average_expansion(growth, keeping_variance)


def lemon(growth: Growth) -> Recipe:
    """`lossless` in LEMON's own form (2310.07999): writers unscaled (c = 1), the norms' epsilon × ρ instead.

    Lossless where `lossless` is, unless ρ < 1 and another norm shares the config's epsilon (per-head q/k
    norms: Qwen3, OLMo 2), or no config key sets the epsilon (a constant of OPT's code; families whose schema
    is derived).
    """
    n = growth.source["residual"]
    N = growth.target["residual"]
    recipe = _average_expansion(growth, lambda rho: 1.0)
    return replace(recipe, eps_factor=_share_copied(n, N))


def _share_copied(n: int, N: int) -> float:
    """ρ = r·n/N: the share of a grown space that whole copies fill."""
    r = N // n
    return r * n / N


def _average_expansion(growth: Growth, writer_gain: Callable[[float], float]) -> Recipe:
    def grow(space: str, n: int, N: int) -> Expansion:
        if space == "residual":
            gain = writer_gain(_share_copied(n, N))
            return _average_residual(growth, n, N, gain)
        if space in ("qk", "v"):
            return _free_head_dims(growth, space, n, N)
        index = _wrapped(n, N)
        copies = AxisMap.of(n, index)
        rule = f"{n} → {N}: copied in turn, readers divided"
        return Expansion.of(copies, copies.split(), rule)

    expansions = each_space(growth, grow)
    return Recipe(expansions, hidden_ratio=growth.hidden_ratio, moments="transpose")


def _average_residual(growth: Growth, n: int, N: int, c: float) -> Expansion:
    """Make the residual stream's lossless expansion with writers × `c`; see `lossless`."""
    r = N // n
    copied = r * n
    residue = N - copied
    position = np.arange(N)
    turns = position % n
    index = np.where(position < copied, turns, -1)
    # Writers: the residue repeats the mean, or is zero where the norm subtracts none.
    has_mean = growth.family.norm == "layer"
    fill = Fill.MEAN if has_mean else Fill.ZERO
    # Readers: r parts that sum to the source, whatever the residue columns are.
    copies = AxisMap.of(n, index, Fill.RANDOM)
    head = copies.split()
    read = head
    if not growth.family.prenorm:
        read = head.scaled(1 / c)
    # Norms.
    gain = sqrt(_share_copied(n, N))
    scale = AxisMap.of(n, index, Fill.MEAN, gain=gain)
    shift = AxisMap.of(n, index, Fill.ZERO)
    # A tied head reads r undivided copies, each × c: the final norm takes that back.
    tied = 1.0
    if growth.tied:
        tied = 1 / (r * c * growth.embedding_gain)
    rule = f"{n} → {N}: {r} × copied"
    if residue > 0:
        word = "mean" if has_mean else "zero"
        rule += f", {residue} {word} residues"
    rule += f", written × {c:.4g}, norm scale × {gain:.4g}"
    return Expansion(
        write=AxisMap.of(n, index, fill, gain=c),
        read=read,
        head=head,
        rule=rule,
        scale=scale,
        shift=shift,
        final_scale=scale.scaled(tied),
        final_shift=shift.scaled(tied),
        post_scale=scale.scaled(c),
    )


def _free_head_dims(growth: Growth, space: str, n: int, N: int) -> Expansion:
    index = _padded(n, N)
    gain = 1.0
    if space == "qk":
        family = growth.family
        turned = family.rotary_dims(growth.source_config)
        turned_target = family.rotary_dims(growth.target_config)
        index = _pairs_padded(n, N, turned, turned_target)
        gain = growth.attention_gain
    write = AxisMap.of(n, index, Fill.RANDOM, gain=gain)
    axis = AxisMap.of(n, index, Fill.RANDOM)
    read = axis.filled(Fill.ZERO)
    count = N - n
    scaled_queries = _scaled_queries(gain)
    rule = f"{n} → {N}: {count} new dims written fresh and read as zero{scaled_queries}"
    return Expansion.of(write, read, rule, scale=axis, shift=axis)


def _scaled_queries(gain: float) -> str:
    """Name the gain of queries at the end of a rule, where there is one."""
    if isclose(gain, 1):
        return ""
    return f", queries × {gain:.4g}"


def random_pad(growth: Growth) -> Recipe:
    """The source in a corner of every tensor, everything else freshly initialised.

    "Weight reuse" in Javaheripi's NeurIPS 2023 talk on Phi-2.

    Not lossless wherever a space grows: fresh writers meet fresh readers.
    """
    return _pad(growth, Fill.RANDOM, "fresh")


def _pad(growth: Growth, fill: Fill, word: str) -> Recipe:
    def grow(space: str, n: int, N: int) -> Expansion:
        count = N - n
        index = _padded(n, N)
        axis = AxisMap.of(n, index, fill)
        rule = f"{n} → {N}: source first, {count} {word}"
        return Expansion.of(axis, axis, rule)

    expansions = each_space(growth, grow)
    return Recipe(expansions)


def tile(growth: Growth, *, mode: str = "middle", heads: str = "head_aware") -> Recipe:
    """Position p of an axis takes (p - off) mod n, with no rescaling: Phi-2's scaled knowledge transfer,
    ModernBERT's weight tiling.

    `mode="edge"`: off = 0; `"middle"`: off = ⌊(N - n)/2⌋; `"center"`: the middle block only, fresh around it.
    `heads="head_aware"` tiles each space, so a head's dims stay in its head; `"flat"` tiles the flattened
    axis, which at 2048 → 2560 with 32 heads mixes heads and shifts rotary dims. Not lossless. Phi-2's own
    scale factors were never published; none is applied here.
    """
    modes = ("edge", "middle", "center")
    ways = ("head_aware", "flat")
    if mode not in modes:
        unknown("tile mode", mode, modes)
    if heads not in ways:
        unknown("tile heads", heads, ways)
    centered = mode == "center"

    def tiled(n: int, N: int) -> AxisMap:
        offset = 0 if mode == "edge" else (N - n) // 2
        position = np.arange(N) - offset
        inside = (position >= 0) & (position < n)
        block = np.where(inside, position, -1)
        index = block if centered else position % n
        return AxisMap.of(n, index)

    def grow(space: str, n: int, N: int) -> Expansion:
        axis = tiled(n, N)
        how = "middle block, fresh around it" if centered else f"tiled from the {mode}"
        rule = f"{n} → {N}: {how}"
        return Expansion.of(axis, axis, rule)

    expansions = each_space(growth, grow)
    flat = tiled if heads == "flat" else None
    return Recipe(expansions, flat=flat)


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
    expansions = {space: fresh(space) for space in spaces}
    return Recipe(expansions, inherits=False)


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

    expansions = each_space(growth, grow)
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
        has_own_rule = space in ("vocab", "pos")
        if has_own_rule or not growth.grows(space):
            continue
        copies = expansion.write
        is_new = np.arange(copies.target) >= copies.source
        write = copies.from_next_layer(is_new)
        rule = f"{expansion.rule}, new rows from the next layer"
        expansions[space] = replace(expansion, write=write, rule=rule)
    return Recipe(expansions, hidden_ratio=growth.hidden_ratio)


def _random_copies(growth: Growth, space: str, n: int, N: int) -> Expansion:
    """Copy indices 0 … n-1 once each, then random ones; of a head, dims that rotary positions do not turn."""
    gain = 1.0
    turned = 0
    count = N - n
    if space == "qk":
        family = growth.family
        gain = growth.attention_gain
        turned = family.rotary_dims(growth.source_config)
    first = turned if turned < n else 0
    numbers = generator(growth.seed, "copies", space)
    drawn = numbers.integers(first, n, count)
    own = np.arange(n)
    index = np.concatenate([own, drawn])
    copies = AxisMap.of(n, index)
    write = copies.scaled(gain)
    read = copies.split()
    scaled_queries = _scaled_queries(gain)
    rule = f"{n} → {N}: {count} random copies, readers divided{scaled_queries}"
    expansion = Expansion.of(write, read, rule, scale=copies, shift=copies)
    if space == "residual" and growth.tied:  # the head is the embedding, whose copies are not divided
        expansion = replace(expansion, final_scale=read, final_shift=read)
    return expansion


def hyperclone(growth: Growth, *, form: str = "symmetric") -> Recipe:
    """HyperCloning (2409.12903): every space grows by a whole factor m, copies side by side, their readers
    divided.

    `form="symmetric"`: every copy reads all m copies, each × 1/m; `"diagonal"`: the n-th copy reads the n-th
    copies only (block-diagonal matrices). With `noise` the paper's noisy forms (10 dB there: noise =
    10^(-10/20) = 0.3162): what is added to the readers of one copy is taken from another's, the output head's
    readers excepted. Attention heads are cloned whole. Lossless.
    """
    forms = ("symmetric", "diagonal")
    if form not in forms:
        unknown("hyperclone form", form, forms)
    _check_clones(growth)

    def grow(space: str, n: int, N: int) -> Expansion:
        index = _wrapped(n, N)
        copies = AxisMap.of(n, index)
        read = copies.split()
        times = N // n
        rule = f"{n} → {N}: cloned {times} ×, readers divided"

        expansion = Expansion.of(copies, read, rule, scale=copies, shift=copies)
        if space != "residual":
            return expansion
        final = copies.scaled(1.0)
        if growth.tied:
            undo = 1 / growth.embedding_gain
            final = read.scaled(undo)
        return replace(expansion, final_scale=final, final_shift=final)

    expansions = each_space(growth, grow)
    return Recipe(
        expansions,
        diagonal=form == "diagonal",
        hidden_ratio=growth.hidden_ratio,
        noisy_head=False,
        moments="transpose",
    )


def _check_clones(growth: Growth) -> None:
    """Refuse spaces that do not grow by a whole factor, and heads that would not stay whole."""
    apart = ("layer", "vocab", "pos")
    spaces = [space for space in growth.source if space not in apart]
    grown = {space: (growth.source[space], growth.target[space]) for space in spaces}
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
        index = _wrapped(n, N)
        copies = AxisMap.of(n, index)
        rule = f"{n} → {N}: copied in turn, fan-in rescaled"
        return Expansion.of(copies, copies, rule)

    def factor(tensor: Tensor) -> float:
        line = tensor.line
        is_matrix = line.kind == "linear" and not tensor.is_bias
        if line.into is None or not is_matrix:
            return 1.0
        d = size(line.into, growth.source)
        D = size(line.into, growth.target)
        out = size(line.out, growth.source)
        out_target = size(line.out, growth.target)
        if out == out_target:
            return sqrt(d / D)
        coherent = 3 * (D - d) / d
        return sqrt(1 / (1 + coherent))

    expansions = each_space(growth, grow)
    return Recipe(expansions, factor=factor, moments="kept")


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
    signature = inspect.signature(every_operator[operator])
    named = inspect.Parameter.KEYWORD_ONLY
    parameters = signature.parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is named]


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
    names = options_of(operator)
    for name in options:
        if name not in names:
            unknown(f"option of operator {operator!r}", name, names)
    return function(growth, **options)
