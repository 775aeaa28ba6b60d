"""A growth in miniature: changes of a tiny twin's sizes that stand for the growth that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil

from outgrow.growth.layers import LAYER_MAPS
from outgrow.model.derive import Draft, Keys
from outgrow.model.family import Config
from outgrow.model.keys import HEAD_KEYS

LARGEST = 4  # factor of a miniature: larger ones show nothing more
MORE = 6  # tokens or positions, where there are to be more


def miniature(draft: Draft, source: Config, target: Config, depth: str | Sequence[int]) -> dict[str, int]:
    """Scale the growth from `source` to `target` down to the draft's tiny config: config key → size.

    Key-value heads, queries for each, head dim and hidden size keep the ratios that are asked for, so that
    what follows from them (a head dim of hidden size / heads) grows where it is to grow. Whole factors stay
    whole and others do not become whole; where a ratio does not fit a tiny size, the next quarter does. There
    are a few more layers, tokens and positions where there are to be more.
    """
    keys, tiny = draft.axes.keys, draft.axes.config
    mixer = draft.axes.mixer
    states = (mixer.heads, mixer.dim) if mixer else ()

    # Widths, each by its own ratio.
    heads = _heads(draft, source, target)
    hidden = _hidden(draft, source, target, heads)
    wanted = dict.fromkeys(draft.axes.stream_keys, hidden) | heads
    for key in filter(None, (keys.ffn, *keys.more, *states)):
        before = source.get(key)
        if key in tiny and before:
            after = target.get(key) or before
            wanted[key] = scaled(int(tiny[key]), before, after)
    wanted |= _head_dim(draft, source, target)
    asked = {key: size for key, size in wanted.items() if _differs(key, source, target)}
    changes = {key: size for key, size in asked.items() if size != tiny.get(key)}
    # A few more tokens, positions and layers.
    for key in filter(None, (keys.vocab, keys.positions)):
        if target.get(key) != source.get(key):
            changes[key] = int(tiny[key]) + MORE
    adds_identity = isinstance(depth, str) and LAYER_MAPS.get(depth, (None, False))[1]
    if adds_identity and target[keys.layers] != source[keys.layers]:
        changes[keys.layers] = int(tiny[keys.layers]) + 1
    return changes


def scaled(tiny: int, before: int, after: int, multiple: int = 1) -> int:
    """Scale `tiny` by after / before, at most `LARGEST` times: a whole multiple where that factor is whole,
    else none.

    Args:
        multiple: a divisor of the result, unless the factor is whole.
    """
    factor = Fraction(after, before)
    if factor <= 1:
        return tiny
    factor -= max(0, factor // 1 - LARGEST)
    if factor.denominator == 1:
        return tiny * int(factor)
    exact = tiny * factor
    if exact.denominator == 1 and exact % multiple == 0:
        return int(exact)
    quarters = ceil(factor * 4)
    quarters -= quarters % 4 == 0  # no whole factor
    size = ceil(Fraction(tiny * quarters, 4 * multiple)) * multiple
    if size % tiny:
        return size
    return size - multiple if size - multiple > tiny else size + multiple


def _differs(key: str, source: Config, target: Config) -> bool:
    """Check whether another size is asked for, or one is named that was left to the class."""
    before, after = source.get(key), target.get(key)
    return after != before and bool(before or key in HEAD_KEYS)


def _heads(draft: Draft, source: Config, target: Config) -> dict[str, int]:
    """Scale key-value heads, and the queries for each (grouped-query attention), by their own ratios."""
    keys, axes = draft.axes.keys, draft.axes
    if not keys.heads:
        return {}
    heads, kv = _counts(keys, source, one=axes.multi_query)
    more_heads, more_kv = _counts(keys, target, one=axes.multi_query)
    groups = scaled(axes.kv, kv, more_kv)
    queries = scaled(axes.heads // axes.kv, heads // kv, more_heads // more_kv)
    return {keys.heads: groups * queries} | ({keys.kv: groups} if keys.kv else {})


def _counts(keys: Keys, config: Config, *, one: bool) -> tuple[int, int]:
    """Count query heads and key-value heads; `one` of these where a switch says so (MQA)."""
    heads = int(config[keys.heads or ""])
    return heads, 1 if one else int(config.get(keys.kv or "") or heads)


def _head_dim(draft: Draft, source: Config, target: Config) -> dict[str, int]:
    """Scale the head dim that the target names, to an even number as rotary positions need it."""
    keys, tiny = draft.axes.keys, draft.axes.config
    named = [key for key in (keys.head_dim, *HEAD_KEYS) if key and target.get(key)]
    if not named or not keys.heads:
        return {}
    key = named[0]
    before = source.get(key) or source[keys.hidden] // source[keys.heads]
    dim = tiny.get(key) or draft.axes.hidden // draft.axes.heads
    return {key: scaled(int(dim), before, target[key], multiple=2)}


def _hidden(draft: Draft, source: Config, target: Config, heads: Mapping[str, int]) -> int:
    """Scale the hidden size.

    Where a head's dim is hidden size / heads it is so many heads, else it has its own ratio, a multiple of
    the heads where the target's is one.
    """
    keys = draft.axes.keys
    tiny = draft.axes.hidden
    before = int(source[keys.hidden])
    after = int(target[keys.hidden])
    if before == after or not keys.heads:
        return scaled(tiny, before, after)
    count = heads[keys.heads]
    if draft.axes.coupled and not any(target.get(key) for key in HEAD_KEYS):
        dims = (before // source[keys.heads], after // target[keys.heads])
        return count * scaled(tiny // draft.axes.heads, *dims, multiple=2)
    whole_heads = after % target[keys.heads] == 0
    return scaled(tiny, before, after, multiple=count if whole_heads else 1)
