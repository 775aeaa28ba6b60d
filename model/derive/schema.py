"""A family from a draft: the schema's lines, with the numbers of the checkpoint at hand."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from outgrow.model.derive.axes import Keys
from outgrow.model.derive.roles import (
    BLOCKS,
    GROUPS,
    RESIDUAL,
    VOCAB,
    Choices,
    Draft,
    inner_share,
    module_of,
)
from outgrow.model.derive.unfit import Unfit
from outgrow.model.derive.watch import Sighting
from outgrow.model.family import Config, Family
from outgrow.model.notation import (
    EMBEDDING_SCALE,
    OPEN,
    Axis,
    Line,
    Product,
    Space,
    replaced,
    size,
    spaces,
)

Shapes = Mapping[str, tuple[int, ...]]
Size = tuple[str, int | Fraction]  # (config key, factor)
Layers = tuple[int | None, ...]
Alike = tuple[Line, Layers]  # lines that differ in a sibling's number alone, and the layers that have them
LATENT = re.compile(r"_b_proj\.weight$")  # reads a latent vector, as DeepSeek's attention has them
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # in a tensor's name: of a layer, of an expert
BLOCK = Space("block")
# Multi-query attention: a switch says that there is one key-value head, and no config has this name.
ONE_KV = "multi_query_heads"


def drafted_family(
    draft: Draft, config: Config, shapes: Shapes, called: Mapping[str, str] | None = None
) -> Family:
    """Make the family that a draft describes, with the numbers of one checkpoint.

    Args:
        draft: the roles of its tensors' axes.
        config: of the checkpoint, as the library's class completes it.
        shapes: its tensors.
        called: the library's name of a tensor, where the file has another one.

    Raises:
        Unfit: a tensor has no counterpart in the tiny model, or a shape does not fit.
    """
    keys = draft.axes.keys
    names = called or {}
    lines = list(_lines(draft, config, shapes, names))
    one_kv = draft.axes.multi_query
    follows = dict.fromkeys(keys.follows, "hidden_size")
    if keys.also_layers:
        follows[keys.also_layers] = "num_hidden_layers"
    undivided = draft.choices.logits == "undivided"
    return Family(
        name=str(config["model_type"]),
        schema="\n".join(map(str, lines)),
        norm=draft.norm,
        names=_spellings(keys, one_kv),
        defaults={ONE_KV: 1} if one_kv else {},
        more=_further_sizes(draft, config, lines),
        follows=follows,
        by_depth=draft.axes.by_depth,
        rotary=None,
        attention_scale="none" if undivided else "head_dim",
        pos_offset=draft.position_offset,
        tied=draft.tied,
    )


def _spellings(keys: Keys, one_kv: bool) -> dict[str, str]:
    """List the sizes that the config spells otherwise than most: standard name → its key."""
    standard = {
        "hidden_size": keys.hidden,
        "num_attention_heads": keys.heads,
        "num_key_value_heads": ONE_KV if one_kv else keys.kv,
        "head_dim": keys.head_dim,
        "intermediate_size": keys.ffn,
        "num_hidden_layers": keys.layers,
        "vocab_size": keys.vocab,
        "max_position_embeddings": keys.positions,
    }
    return {name: key for name, key in standard.items() if key and key != name}


def _further_sizes(draft: Draft, config: Config, lines: Iterable[Line]) -> dict[str, Size]:
    """Say what the sizes of further spaces are: space → (config key, factor)."""
    keys = draft.axes.keys
    mixer = draft.axes.mixer
    used = [space for line in lines for space in line.spaces]
    named = {space.name for space in used}
    sizes: dict[str, Size] = {}
    for key in keys.more:
        if key in named:
            sizes[key] = (key, 1)
    for space in used:
        share = inner_share(space)
        if share is not None:
            sizes[space.name] = (keys.hidden, share)
    if mixer is not None:
        blocks = Fraction(1, mixer.count(config))
        sizes[mixer.heads] = (mixer.heads, blocks)
        sizes[mixer.dim] = (mixer.dim, 1)
    if keys.heads and BLOCK.name in named:
        block = Fraction(1, BLOCKS)
        sizes[BLOCK.name] = (keys.heads, block)
    return sizes


def variants(draft: Draft) -> Iterator[Draft]:
    """Yield `draft` under every choice that makes a difference to its schema, the likeliest first."""
    tried = set()
    for choices in Choices.in_order():
        variant = replace(draft, choices=choices)
        family = drafted_family(variant, draft.axes.config, draft.axes.shapes)
        scale = family.attention_scale if family.uses("qk") else ""
        key = (family.schema, scale)
        if key not in tried:
            tried.add(key)
            yield variant


def _lines(draft: Draft, config: Config, shapes: Shapes, called: Mapping[str, str]) -> Iterator[Line]:
    """Yield the schema's lines: one for all layers and experts whose tensors are described alike."""
    layers_key = draft.axes.keys.layers
    count = int(config[layers_key])
    tiny_count = int(draft.axes.config[layers_key])
    twins = _Twins(draft.tensors, tiny_count, draft.stands)
    # One line for every tensor, by its twin in the tiny model.
    lines: dict[str, Line] = {}
    by_text = []
    for name in shapes:
        library_name = called.get(name, name)
        twin = twins.of(library_name, count)
        if twin is None:
            family = config["model_type"]
            raise Unfit(f"tensor {name!r} has no counterpart in a tiny model of family {family!r}")
        lines[name] = _line(draft, name, twin, config, shapes)
        sighting = draft.tensors[twin]
        if sighting.by_text:
            by_text.append(name)
    # The layers are the lists as long as the config says that some text goes through: not another tower's.
    stacks = _stacks(by_text, shapes, count)
    # Lines that differ in the layer alone become one with a star.
    grouped: dict[Line, list[int | None]] = defaultdict(list)
    for name, line in lines.items():
        if _is_in_weights_line(name, lines):
            continue
        star, layer = _layer_of(line.name, stacks)
        layerless = replace(line, name=star)
        grouped[layerless].append(layer)
    yield from _merged(grouped, count)


def _is_in_weights_line(name: str, lines: Mapping[str, Line]) -> bool:
    """Check for a bias that is a part of its weight's line."""
    if not name.endswith(".bias"):
        return False
    weight = lines.get(f"{module_of(name)}.weight")
    return weight is not None and weight.bias


def _line(draft: Draft, name: str, twin: str, config: Config, shapes: Shapes) -> Line:
    """Describe one tensor by the axes of its twin: a norm, a matrix or embedding, or a tensor as it is."""
    sighting = draft.tensors[twin]
    shape = shapes[name]
    templates = zip(draft.templates(twin), shape, strict=True)
    axes = [_filled(draft, template, length, name, config) for template, length in templates]
    is_weight = name.endswith(".weight")
    module = module_of(name)
    bias = shapes.get(f"{module}.bias") if is_weight else None
    is_norm = is_weight and sighting.norm is not None
    if is_norm and not _is_number(axes[0]):
        has_bias = bias == shape
        return _norm_line(draft, sighting, module, axes[0], has_bias=has_bias)
    reads_once = sighting.reads.count(True) == 1
    has_sides = sighting.indexed or reads_once
    is_matrix = is_weight and len(shape) == 2
    if is_matrix and has_sides:
        transposed = sighting.indexed or sighting.reads[0]  # stored (in, out)
        out, into = reversed(axes) if transposed else axes
        power = _power(draft, sighting.parameter, axes)
        width = shape[1] if transposed else shape[0]
        has_bias = bias == (width,)
        return Line(module, "linear", out, into, transposed=transposed, bias=has_bias, scaled=power)
    pairs = zip(axes, sighting.reads, strict=True)
    sides = tuple(_read(axis) if reads else axis for axis, reads in pairs)
    return Line(name, "tensor", Product(sides), None, sides)


def _norm_line(draft: Draft, sighting: Sighting, module: str, axis: Axis, *, has_bias: bool) -> Line:
    """Describe a norm by the space that it is over and where it stands."""
    over_stream = axis == RESIDUAL
    role = sighting.role if over_stream else "norm"
    if over_stream and role == "norm" and draft.choices.norms == "after":
        role = "post norm"
    offset = 1.0 if sighting.offset else 0.0
    return Line(module, role, axis, None, bias=has_bias, offset=offset)


def _is_number(axis: Axis) -> bool:
    return isinstance(axis, Space) and axis.fixed


def _read(axis: Axis) -> Axis:
    """Mark the reading side of every space of an axis."""

    def read(space: Space) -> Space:
        return space if space.fixed else replace(space, dual=True)

    return replaced(axis, read)


def _power(draft: Draft, parameter: str, axes: Sequence[Axis]) -> float:
    """Look up the power of the hidden size by which a matrix is multiplied: that of an embedding, or of the
    module, where it shows one.

    The matrix reads the stream and writes something else, or it reads a latent vector.
    """
    scaled_embeddings = draft.choices.embeddings == "scaled"
    if scaled_embeddings and parameter == draft.embedding:
        return EMBEDDING_SCALE
    path = module_of(parameter)
    module, _, _ = path.rpartition(".")
    buffers, attributes = draft.axes.powers
    power: float | None = None
    first, second = axes
    leaves_stream = second == RESIDUAL != first
    if leaves_stream and VOCAB not in axes:
        power = buffers.get(module)
    elif LATENT.search(parameter):
        power = attributes.get(module)
    return round(2 * (power or 0.0)) / 2


def _filled(draft: Draft, template: Axis, length: int, name: str, config: Config) -> Axis:
    """Fill in the number that a template leaves open, so that the axis has `length`."""
    mixer = draft.axes.mixer
    groups = mixer.count(config) if mixer else 1
    axis = _grouped(template, groups)
    sizes = _sizes(draft, config)
    open_spaces = [space for space in spaces(axis) if space == OPEN]
    if not open_spaces:
        return axis
    least = size(axis, sizes | {OPEN.name: 0})
    more = size(axis, sizes | {OPEN.name: 1})
    step = more - least
    if step == 0:
        raise Unfit(
            f"{name}: an axis of {length} is said to be {str(axis)!r}, of which one is 0 here; are there "
            "more key and value heads than heads?"
        )
    number, rest = divmod(length - least, step)
    if rest or number < 1:
        raise Unfit(
            f"{name}: an axis of {length} is no multiple of {step} above {least} as {str(axis)!r} says"
        )
    filling = Space(str(number))
    return replaced(axis, lambda space: filling if space == OPEN else space)


def _grouped(axis: Axis, groups: int) -> Axis:
    """Write how many groups the heads of a state space are in; one group is left out."""
    if isinstance(axis, Space):
        return Space(str(groups)) if axis == GROUPS else axis
    parts = [part for part in axis.parts if part != GROUPS or groups > 1]
    grouped = tuple(_grouped(part, groups) for part in parts)
    return type(axis)(grouped)


def _sizes(draft: Draft, config: Config) -> dict[str, int]:
    """Compute the sizes of the spaces beside which a template has an open number."""
    keys = draft.axes.keys
    heads = int(config[keys.heads]) if keys.heads else 1
    named = config.get(keys.kv or "")
    kv = int(named or heads)
    if draft.axes.multi_query:
        kv = 1
    sizes = {
        "kv": kv,
        "group": heads // kv,
        BLOCK.name: heads // BLOCKS,
        "residual": int(config[keys.hidden]),
    }
    if mixer := draft.axes.mixer:
        all_heads = int(config[mixer.heads])
        groups = mixer.count(config)
        sizes[mixer.heads] = all_heads // groups
        sizes[mixer.dim] = int(config[mixer.dim])
    return sizes


class _Twins:
    """The tensors of the tiny model that stand for those of a large one.

    They have the same name in another layer, or of another expert.
    """

    def __init__(self, names: Iterable[str], count: int, stands: tuple[int, ...]) -> None:
        self._layers: dict[str, dict[int | None, str]] = defaultdict(dict)
        self._loosely: dict[str, str] = {}
        self._count = count
        self._stands = stands
        for name in names:
            star, number = _first_number(name)
            self._layers[star][number] = name
            self._loosely.setdefault(_numberless(name), name)

    def of(self, name: str, count: int) -> str | None:
        """Find the twin of a tensor of a model with `count` layers, in a layer of its kind.

        Of the last layer it is the last one's, which may be normalised differently.
        """
        star, number = _first_number(name)
        layers = self._layers.get(star)
        if not layers:
            return self._loosely.get(_numberless(name))
        is_last = number == count - 1
        alike = self._count - 1 if is_last else number
        told_apart = count == len(self._stands) != self._count
        if told_apart and number is not None and number < count:
            alike = self._stands[number]
        any_layer = next(iter(layers.values()))
        return layers.get(alike) or layers.get(number) or any_layer


def _first_number(name: str) -> tuple[str, int | None]:
    """Split a tensor's name into (name with `*` for its first number, that number)."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    if match is None:
        return name, None
    head, tail = _around(match)
    star = f"{head}*{tail}"
    return star, int(match[0])


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _stacks(by_text: Iterable[str], names: Iterable[str], count: int) -> set[str]:
    """Find the prefixes of lists with one entry per layer, among them one that text goes through."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        match = re.match(r"(.*?\.)(\d+)\.", name)
        if match is not None:
            number = int(match[2])
            numbers[match[1]].add(number)
    every_layer = set(range(count))
    lists = [prefix for prefix, present in numbers.items() if present == every_layer]
    return {prefix for prefix in lists if any(name.startswith(prefix) for name in by_text)}


def _layer_of(name: str, stacks: set[str]) -> tuple[str, int | None]:
    """Split a name into (name with `*` for its layer's number, that number)."""
    match = re.match(r"(.*?\.)(\d+)(\..*)", name)
    if match is None or match[1] not in stacks:
        return name, None
    star = f"{match[1]}*{match[3]}"
    return star, int(match[2])


def _merged(grouped: Mapping[Line, list[int | None]], count: int) -> Iterator[Line]:
    """Yield lines, with runs of numbered siblings (experts) folded into `{a..b}`."""
    folded: dict[Alike, list[Line]] = defaultdict(list)
    for line, layers in grouped.items():
        unnumbered = replace(line, name=_numberless(line.name))
        folded[unnumbered, tuple(layers)].append(line)
    for (_, numbered), lines in folded.items():
        numbers = sorted(layer for layer in numbered if layer is not None)
        in_some = numbers and len(numbers) != count
        only = tuple(numbers) if in_some else None
        names = [line.name for line in lines]
        for name in _braced(names):
            yield replace(lines[0], name=name, only=only)


def _braced(names: list[str]) -> list[str]:
    """Fold names that differ in one consecutive number into one with `{a..b}`; others stay as they are."""
    matches = list(filter(None, map(NUMBER.search, names)))
    all_numbered = len(matches) == len(names)
    if len(names) < 2 or not all_numbered:
        return names
    stems = {_around(match) for match in matches}
    numbers = sorted(int(match[0]) for match in matches)
    first = numbers[0]
    last = numbers[-1]
    consecutive = list(range(first, last + 1))
    if len(stems) != 1 or numbers != consecutive:
        return names
    ((head, tail),) = stems
    return [f"{head}{{{first}..{last}}}{tail}"]


def _around(match: re.Match[str]) -> tuple[str, str]:
    """Return what stands before and after a match."""
    before = match.string[: match.start()]
    after = match.string[match.end() :]
    return before, after
