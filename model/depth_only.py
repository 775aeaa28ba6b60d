"""An outline: the family of one checkpoint whose `model_type` has no schema, read off its tensors' names and
shapes.

It knows which tensors belong to which numbered layer and nothing of what they do: every axis is a number. So
it can grow in depth alone, by layer maps that copy whole layers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from outgrow.model.base.errors import UserError
from outgrow.model.composite import other_towers
from outgrow.model.family import Config, Family
from outgrow.model.keys import DEPTH_KEYS

Shape = tuple[int, ...]
_Pattern = tuple[str, Shape]  # (name with `*` for the layer, shape)


def outline(config: Config, shapes: Mapping[str, Shape], depth_key: str | None = None) -> Family:
    """The outline of a checkpoint.

    Args:
        config: its config.json.
        shapes: tensor name → shape.
        depth_key: the config key that counts the layers, where it is known; else the one whose value is the
            number of layers found.

    Raises:
        UserError: no numbered layers, more than one stack of them, or no config key counts them.
    """
    name = str(config.get("model_type"))
    counting = {depth_key or "", *DEPTH_KEYS}
    prefix, count = numbered_layers(name, shapes, counting, config)
    keys = [key for key in DEPTH_KEYS if config.get(key) == count]
    if depth_key:
        keys = [depth_key]
    if not keys or config.get(keys[0]) != count:
        raise UserError(
            f"family {name!r} has no schema, and no config key says that {prefix}* has {count} layers "
            f"(looked for {', '.join(keys or DEPTH_KEYS)}), so the grown config could not say it either"
        )
    lines = outline_lines(shapes, prefix, count)
    schema = "\n".join(lines)
    names = {"num_hidden_layers": keys[0]}
    return Family(name=name, norm="rms", schema=schema, names=names, rotary=None)


def numbered_layers(name: str, shapes: Iterable[str], keys: Iterable[str], config: Config) -> tuple[str, int]:
    """The prefix of the layers' names (`model.layers.`) and how many layers there are.

    Raises:
        UserError: there are none, numbers are missing, or there are several stacks of layers.
    """
    values = map(config.get, keys)
    counts = {value for value in values if isinstance(value, int)}
    numbers: dict[str, set[int]] = defaultdict(set)  # by prefix
    for tensor in shapes:
        if match := re.match(r"(.*?\.|)(\d+)\.", tensor):
            number = int(match[2])
            numbers[match[1]].add(number)
    if not numbers:
        raise UserError(
            f"family {name!r} has no schema, and no tensor's name has a layer's number, so its layers "
            "cannot be told apart"
        )
    lengths = {prefix: len(layers) for prefix, layers in numbers.items()}
    # from 0 on, with none missing
    last = {prefix: max(layers) for prefix, layers in numbers.items()}
    complete = [prefix for prefix in lengths if last[prefix] == lengths[prefix] - 1]
    # vis(ion_config) has the layers of vision_tower. and of visual.
    others = [re.compile(rf"\b{tower[:3]}") for tower in other_towers(config)]

    def of_other(prefix: str) -> bool:
        return any(tower.search(prefix) for tower in others)

    of_text = [prefix for prefix in complete if not of_other(prefix)] or complete
    stacks = [prefix for prefix in of_text if lengths[prefix] in counts] or of_text
    if len(stacks) != 1:
        prefixes = sorted(lengths)
        described = [f"{prefix}* ({lengths[prefix]} numbers)" for prefix in prefixes]
        stories = ", ".join(described)
        raise UserError(
            f"family {name!r} has no schema, and which numbers count its layers is not clear: {stories}"
        )
    (stack,) = stacks
    return stack, lengths[stack]


def outline_lines(shapes: Mapping[str, Shape], prefix: str, count: int) -> list[str]:
    """One `tensor` line per name pattern and shape; a tensor that only some layers have says which."""
    layers: dict[_Pattern, list[int]] = defaultdict(list)
    for tensor, shape in shapes.items():
        name = tensor.removeprefix(prefix)
        number, _, rest = name.partition(".")
        if tensor.startswith(prefix) and number.isdigit():
            pattern = f"{prefix}*.{rest}"
            layer = int(number)
            layers[pattern, shape].append(layer)
        else:
            layers.setdefault((tensor, shape), [])
    lines = []
    for (pattern, shape), numbers in layers.items():
        lengths = ", ".join(map(str, shape)) or "scalar"
        everywhere = count if "*" in pattern else 0
        suffix = in_layers(numbers, everywhere)
        lines.append(f"{pattern}  tensor {lengths}{suffix}")
    return lines


def in_layers(numbers: Sequence[int], count: int) -> str:
    """The end of a line that only some of `count` layers have."""
    if len(numbers) == count:
        return ""
    listing = ",".join(map(str, sorted(numbers)))
    return f" in layers {listing}"
