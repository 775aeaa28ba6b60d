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
    keys = draft.axes.keys
    mixer = draft.axes.mixer
    tiny = draft.axes.config
    states = (mixer.heads, mixer.dim) if mixer else ()

    # Widths, each by its own ratio.
    heads = _heads(draft, source, target)
    hidden = _hidden(draft, source, target, heads)
    streams = draft.axes.stream_keys
    sizes = dict.fromkeys(streams, hidden) | heads
    widths = (keys.ffn, *keys.more, *states)
    for key in filter(None, widths):
        before = source.get(key)
        if key in tiny and before:
            after = target.get(key) or before
            own = int(tiny[key])
            sizes[key] = scaled(own, before, after)
    sizes |= _head_dim(draft, source, target)
    keys_changed = [key for key, size in sizes.items() if size != tiny.get(key)]
    changes = {key: sizes[key] for key in keys_changed if _differs(key, source, target)}
    # A few more tokens, positions and layers.
    for key in filter(None, (keys.vocab, keys.positions)):
        if target.get(key) != source.get(key):
            own = int(tiny[key])
            changes[key] = own + MORE
    adds_identity = False
    if isinstance(depth, str):
        _, adds_identity = LAYER_MAPS.get(depth, (None, False))
    layers = keys.layers
    if adds_identity and target[layers] != source[layers]:
        own = int(tiny[layers])
        changes[layers] = own + 1
    return changes | _divided(draft, changes)


def _divided(draft: Draft, changes: Mapping[str, int]) -> dict[str, int]:
    """A wider hidden size, where the tiny one stays and more heads no longer divide it, which some classes
    insist on (Arcee, Llama), as they do in the target.
    """
    axes = draft.axes
    heads = changes.get(axes.keys.heads or "", axes.heads)
    stays = axes.keys.hidden not in changes
    if not stays or axes.hidden % heads == 0 or axes.changed(changes) is not None:
        return {}
    wider = heads * (axes.hidden // heads + 1)
    return dict.fromkeys(axes.stream_keys, wider)


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
    is_integer = exact.denominator == 1
    if is_integer and exact % multiple == 0:
        return int(exact)
    quarters = ceil(factor * 4)
    quarters -= quarters % 4 == 0  # no whole factor
    share = Fraction(tiny * quarters, 4 * multiple)
    size = ceil(share) * multiple
    if size % tiny:
        return size
    smaller = size - multiple
    return smaller if smaller > tiny else size + multiple


def _differs(key: str, source: Config, target: Config) -> bool:
    """Check whether another size is asked for, or one is named that was left to the class."""
    before = source.get(key)
    after = target.get(key)
    may_change = bool(before or key in HEAD_KEYS)
    return after != before and may_change


def _heads(draft: Draft, source: Config, target: Config) -> dict[str, int]:
    """Scale key-value heads, and the queries for each (grouped-query attention), by their own ratios."""
    axes = draft.axes
    keys = axes.keys
    if not keys.heads:
        return {}
    heads, kv = _counts(keys, source, one=axes.multi_query)
    more_heads, more_kv = _counts(keys, target, one=axes.multi_query)
    groups = scaled(axes.kv, kv, more_kv)
    own = axes.heads // axes.kv
    more = more_heads // more_kv
    queries = scaled(own, heads // kv, more)
    sizes = {keys.heads: groups * queries}
    if keys.kv:
        sizes[keys.kv] = groups
    return sizes


def _counts(keys: Keys, config: Config, *, one: bool) -> tuple[int, int]:
    """Count query heads and key-value heads; `one` of these where a switch says so (MQA)."""
    heads = int(config[keys.heads or ""])
    if one:
        return heads, 1
    return heads, int(config.get(keys.kv or "") or heads)


def _head_dim(draft: Draft, source: Config, target: Config) -> dict[str, int]:
    """Scale the head dim that the target names, to an even number as rotary positions need it."""
    axes = draft.axes
    keys = axes.keys
    named = [key for key in (keys.head_dim, *HEAD_KEYS) if key and target.get(key)]
    if not named or not keys.heads:
        return {}
    key = named[0]
    before = source.get(key) or source[keys.hidden] // source[keys.heads]
    dim = axes.config.get(key) or axes.hidden // axes.heads
    wider = target[key]
    size = scaled(int(dim), before, wider, multiple=2)
    return {key: size}


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
    is_given = any(target.get(key) for key in HEAD_KEYS)
    if draft.axes.coupled and not is_given:
        dim = before // source[keys.heads]
        wider = after // target[keys.heads]
        tiny_dim = tiny // draft.axes.heads
        return count * scaled(tiny_dim, dim, wider, multiple=2)
    whole_heads = after % target[keys.heads] == 0
    return scaled(tiny, before, after, multiple=count if whole_heads else 1)
