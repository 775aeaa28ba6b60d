"""From a draft to a family: the schema's lines, with the numbers of the checkpoint at hand."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product

from outgrow.model.base.errors import UserError
from outgrow.model.depth_only import in_layers
from outgrow.model.derive.roles import BLOCKS, GROUPS_OF, Choices, Draft
from outgrow.model.family import Config, Family
from outgrow.model.notation import parse_axis, size

Shapes = Mapping[str, tuple[int, ...]]
LATENT = re.compile(r"_b_proj\.weight$")  # reads a latent vector, as DeepSeek's attention has them
CHOICES = tuple(Choices(*flags[::-1]) for flags in product((False, True), repeat=6))  # the likeliest first


def drafted_family(draft: Draft, config: Config, shapes: Shapes, called: Mapping[str, str] | None = None) -> Family:
    """The family that a draft describes, with the numbers of one checkpoint.

    Args:
        draft: the roles of its tensors' axes.
        config: of the checkpoint, as the library's class completes it.
        shapes: its tensors.
        called: what the library calls a tensor, where the file has another name for it.

    Raises:
        UserError: a tensor has no counterpart in the tiny model, or a shape does not fit.
    """
    keys = draft.axes.keys
    lines = "\n".join(_lines(draft, config, shapes, called or {}))
    kv = "multi_query_heads" if draft.axes.multi_query else keys.kv  # a switch says that there is one; no config has this name
    standard = {
        "hidden_size": keys.hidden,
        "num_attention_heads": keys.heads,
        "num_key_value_heads": kv,
        "head_dim": keys.head_dim,
        "intermediate_size": keys.ffn,
        "num_hidden_layers": keys.layers,
        "vocab_size": keys.vocab,
        "max_position_embeddings": keys.positions,
    }
    mixer = draft.axes.mixer
    states: dict[str, tuple[str, int | Fraction]] = (
        {}
        if mixer is None
        else {
            mixer.heads: (mixer.heads, Fraction(1, mixer.count(config))),
            mixer.dim: (mixer.dim, 1),
        }
    )
    if keys.heads and re.search(r"\bblock\b", lines):
        states["block"] = (keys.heads, Fraction(1, BLOCKS))
    inner = {
        f"inner_{times}{of}": (keys.hidden, Fraction(int(times), int(of.removeprefix("of") or 1)))
        for times, of in re.findall(r"inner_(\d+)((?:of\d+)?)", lines)
    }
    return Family(
        name=str(config["model_type"]),
        schema=lines,
        norm="layer" if draft.norm == "layer" else "rms",
        names={name: key for name, key in standard.items() if key and key != name},
        defaults={str(kv): 1} if draft.axes.multi_query else {},
        more={key: (key, 1) for key in keys.more if re.search(rf"\b{key}\b", lines)} | inner | states,
        follows={key: "hidden_size" for key in keys.follows} | ({keys.also_layers: "num_hidden_layers"} if keys.also_layers else {}),
        rotary=None,
        attention_scale="none" if draft.choices.unscaled else "head_dim",
        pos_offset=draft.position_offset,
        tied=draft.tied,
    )


def variants(draft: Draft) -> Iterator[Draft]:
    """`draft` under every choice that makes a difference to its schema, the likeliest first."""
    tried = set()
    for chosen in CHOICES:
        variant = replace(draft, choices=chosen)
        family = drafted_family(variant, draft.axes.config, draft.axes.shapes)
        key = (family.schema, family.attention_scale if family.uses("qk") else "")
        if key not in tried:
            tried.add(key)
            yield variant


def _lines(draft: Draft, config: Config, shapes: Shapes, called: Mapping[str, str]) -> Iterator[str]:
    count = int(config[draft.axes.keys.layers])
    twins = _Twins(draft.seen, int(draft.axes.config[draft.axes.keys.layers]), draft.stands)
    texts, work = {}, []
    for name in shapes:
        if (twin := twins.of(called.get(name, name), count)) is None:
            raise UserError(f"tensor {name!r} has no counterpart in a tiny model of family {config['model_type']!r}")
        texts[name] = _line(draft, name, twin, config, shapes)
        work += [name] if draft.seen[twin].by_text else []
    stacks = {stack for stack in _stacks(shapes, count) if any(name.startswith(stack) for name in work)}  # not another tower's
    grouped: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    for name, text in texts.items():
        module = name.removesuffix(".weight").removesuffix(".bias")
        if name.endswith(".bias") and texts.get(f"{module}.weight", "").split(" scaled")[0].endswith("+ bias"):
            continue  # a part of its weight's line
        star, layer = _layer_of(name if text.startswith("tensor ") else module, stacks)
        grouped[star, text].append(layer)
    yield from _merged(grouped, count)


def _line(draft: Draft, name: str, twin: str, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> str:
    seen, shape = draft.seen[twin], shapes[name]
    axes = [_filled(draft, template, length, name, config) for template, length in zip(draft.templates(twin), shape, strict=True)]
    bias = shapes.get(name.removesuffix(".weight") + ".bias") if name.endswith(".weight") else None
    if name.endswith(".weight") and seen.norm and not axes[0].isdigit():
        role = "norm" if axes[0] != "residual" else "post norm" if draft.choices.post and seen.role == "norm" else seen.role
        return f"{role}{'+1' if seen.offset else ''} {axes[0]}" + " + bias" * (bias == shape)
    if name.endswith(".weight") and len(shape) == 2 and (seen.indexed or seen.reads.count(True) == 1):
        arrow, out = ("->", 1) if seen.indexed or seen.reads[0] else ("<-", 0)
        scaled = " scaled" if draft.choices.scaled and seen.parameter == draft.embedding else _power(draft, seen.parameter, axes)
        return f"{axes[0]} {arrow} {axes[1]}" + " + bias" * (bias == (shape[out],)) + scaled
    starred = [re.sub(r"([a-z_]\w*)", r"\1*", axis) if reads else axis for axis, reads in zip(axes, seen.reads, strict=True)]
    return "tensor " + (", ".join(starred) or "scalar")


def _power(draft: Draft, parameter: str, axes: Sequence[str]) -> str:
    """What a matrix is multiplied by, where its module says so: one that reads the stream and writes something else, or a latent vector."""
    module = parameter.rpartition(".")[0].rpartition(".")[0]
    buffers, attributes = draft.axes.powers
    reads_stream = axes[1] == "residual" != axes[0] and "vocab" not in axes
    found = buffers.get(module) if reads_stream else attributes.get(module) if LATENT.search(parameter) else None
    power = round(2 * (found or 0.0)) / 2
    return f" scaled^{power:g}" if power else ""


def _filled(draft: Draft, template: str, length: int, name: str, config: Config) -> str:
    """A template with its number, so that the axis has `length`."""
    mixer = draft.axes.mixer
    groups = mixer.count(config) if mixer else 1
    template = template.replace(GROUPS_OF, f"{groups} " if groups > 1 else "")
    if "?" not in template:
        return template
    sizes = _sizes(draft, config)
    least, more = (size(parse_axis(template.replace("?", number)), sizes) for number in "01")
    number, rest = divmod(length - least, more - least)
    if rest or number < 1:
        raise UserError(f"{name}: an axis of {length} is no multiple of {more - least} above {least} as {template!r} says")
    return template.replace("?", str(number))


def _sizes(draft: Draft, config: Config) -> dict[str, int]:
    keys = draft.axes.keys
    heads = int(config[keys.heads]) if keys.heads else 1
    kv = 1 if draft.axes.multi_query else int(config.get(keys.kv or "") or heads)
    sizes = {"kv": kv, "group": heads // kv, "block": heads // BLOCKS, "residual": int(config[keys.hidden])}
    if mixer := draft.axes.mixer:
        sizes |= {mixer.heads: int(config[mixer.heads]) // mixer.count(config), mixer.dim: int(config[mixer.dim])}
    return sizes


class _Twins:
    """Which tensor of the tiny model stands for a tensor of a large one: the same name in another layer, or of another expert."""

    def __init__(self, names: Iterable[str], count: int, stands: tuple[int, ...]) -> None:
        self._layers: dict[str, dict[int | None, str]] = defaultdict(dict)
        self._loosely: dict[str, str] = {}
        self._count, self._stands = count, stands
        for name in names:
            star, number = _first_number(name)
            self._layers[star][number] = name
            self._loosely.setdefault(_numberless(name), name)

    def of(self, name: str, count: int) -> str | None:
        """The twin of a tensor of a model with `count` layers, in a layer of its kind; of the last layer, the last one's, which may be
        normalised otherwise.
        """
        star, number = _first_number(name)
        found = self._layers.get(star)
        if not found:
            return self._loosely.get(_numberless(name))
        alike = self._count - 1 if number == count - 1 else number
        if number is not None and number < count == len(self._stands) != self._count:
            alike = self._stands[number]
        return found.get(alike) or found.get(number) or next(iter(found.values()))


def _first_number(name: str) -> tuple[str, int | None]:
    """(name with `*` for its first number, that number)."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name, None) if match is None else (f"{name[: match.start()]}*{name[match.end() :]}", int(match[0]))


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _stacks(names: Iterable[str], count: int) -> set[str]:
    """The prefixes of lists with one entry per layer."""
    found: dict[str, set[int]] = defaultdict(set)
    for match in filter(None, (re.match(r"(.*?\.)(\d+)\.", name) for name in names)):
        found[match[1]].add(int(match[2]))
    return {prefix for prefix, numbers in found.items() if numbers == set(range(count))}


def _layer_of(name: str, stacks: set[str]) -> tuple[str, int | None]:
    """(name with `*` for its layer's number, that number)."""
    match = re.match(r"(.*?\.)(\d+)(\..*)", name)
    return (f"{match[1]}*{match[3]}", int(match[2])) if match and match[1] in stacks else (name, None)


def _merged(grouped: Mapping[tuple[str, str], list[int | None]], count: int) -> Iterator[str]:
    """Lines, with runs of numbered siblings (experts) folded into `{a..b}`."""
    folded: dict[tuple[str, str, tuple[int | None, ...]], list[str]] = defaultdict(list)
    for (star, text), layers in grouped.items():
        folded[_numberless(star), text, tuple(layers)].append(star)
    for (_, text, found), names in folded.items():
        numbers = [layer for layer in found if layer is not None]
        suffix = in_layers(numbers, count) if numbers else ""
        for name in _braced(names):
            yield f"{name}  {text}{suffix}"


def _braced(names: list[str]) -> list[str]:
    found = [re.search(r"(?<=\.)\d+(?=\.)", name + ".") for name in names]
    heads = {name[: match.start()] + "{}" + name[match.end() :] for name, match in zip(names, found, strict=True) if match}
    if len(names) < 2 or len(heads) != 1 or not all(found):
        return names
    numbers = sorted(int(match[0]) for match in found if match)
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return names
    return [heads.pop().replace("{}", f"{{{numbers[0]}..{numbers[-1]}}}")]
