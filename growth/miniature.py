"""A growth in miniature: the changes of a tiny twin's sizes that stand for the growth that is asked for."""

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
    """Config key → size: the growth from `source` to `target` at the sizes of the draft's tiny config.

    Key-value heads, queries for each, head dim and hidden size keep the ratios that are asked for, so that what follows from them (a head
    dim of hidden size / heads) grows where it is to grow. Whole factors stay whole and others do not become whole; where a ratio does not
    fit a tiny size, the next quarter does. There are a few more layers, tokens and positions where there are to be more.
    """
    keys, tiny = draft.axes.keys, draft.axes.config
    mixer = draft.axes.mixer
    others = (keys.ffn, *keys.more, *((mixer.heads, mixer.dim) if mixer else ()))

    heads = _heads(draft, source, target)
    wanted = dict.fromkeys(draft.axes.stream_keys, _hidden(draft, source, target, heads)) | heads
    for key in filter(None, others):
        if key in tiny and source.get(key):
            wanted[key] = scaled(int(tiny[key]), source[key], target.get(key) or source[key])
    wanted |= _head_dim(draft, source, target)
    changes = {key: size for key, size in wanted.items() if _differs(key, source, target) and size != tiny.get(key)}
    for key in filter(None, (keys.vocab, keys.positions)):
        if target.get(key) != source.get(key):
            changes[key] = int(tiny[key]) + MORE
    if target[keys.layers] != source[keys.layers] and isinstance(depth, str) and LAYER_MAPS.get(depth, (None, False))[1]:
        changes[keys.layers] = int(tiny[keys.layers]) + 1
    return changes


def scaled(tiny: int, before: int, after: int, multiple: int = 1) -> int:
    """`tiny` times after / before, at most `LARGEST` times: a whole multiple of it where that factor is whole, else none.

    Args:
        multiple: of which the result is one, unless the factor is whole.
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
    """Whether a size is asked to be another, or one that was left to the class is named."""
    return target.get(key) != source.get(key) and bool(source.get(key) or key in HEAD_KEYS)


def _heads(draft: Draft, source: Config, target: Config) -> dict[str, int]:
    """Heads and key-value heads: the latter and the queries for each grow by their own ratios."""
    keys, axes = draft.axes.keys, draft.axes
    if not keys.heads:
        return {}
    (heads, kv), (more_heads, more_kv) = (_counts(keys, config, one=axes.multi_query) for config in (source, target))
    groups = scaled(axes.kv, kv, more_kv)
    queries = scaled(axes.heads // axes.kv, heads // kv, more_heads // more_kv)
    return {keys.heads: groups * queries} | ({keys.kv: groups} if keys.kv else {})


def _counts(keys: Keys, config: Config, *, one: bool) -> tuple[int, int]:
    """Query heads and key-value heads; `one` of these where a switch says so."""
    heads = int(config[keys.heads or ""])
    return heads, 1 if one else int(config.get(keys.kv or "") or heads)


def _head_dim(draft: Draft, source: Config, target: Config) -> dict[str, int]:
    """The head dim that the target names, of an even number as rotary positions need it."""
    keys, tiny = draft.axes.keys, draft.axes.config
    named = [key for key in (keys.head_dim, *HEAD_KEYS) if key and target.get(key)]
    if not named or not keys.heads:
        return {}
    before = source.get(named[0]) or source[keys.hidden] // source[keys.heads]
    dim = int(tiny.get(named[0]) or draft.axes.hidden // draft.axes.heads)
    return {named[0]: scaled(dim, before, target[named[0]], multiple=2)}


def _hidden(draft: Draft, source: Config, target: Config, heads: Mapping[str, int]) -> int:
    """The hidden size: of so many heads, where their dim is hidden size / heads, else by its own ratio, a multiple of them as asked."""
    keys = draft.axes.keys
    before, after, tiny = int(source[keys.hidden]), int(target[keys.hidden]), draft.axes.hidden
    if before == after or not keys.heads:
        return scaled(tiny, before, after)
    count = heads[keys.heads]
    if draft.axes.coupled and not any(target.get(key) for key in HEAD_KEYS):
        dims = (before // source[keys.heads], after // target[keys.heads])
        return count * scaled(tiny // draft.axes.heads, *dims, multiple=2)
    return scaled(tiny, before, after, multiple=count if after % target[keys.heads] == 0 else 1)
