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
    prefix, count = numbered_layers(name, shapes, {depth_key or "", *DEPTH_KEYS}, config)
    keys = [key for key in DEPTH_KEYS if config.get(key) == count]
    if depth_key:
        keys = [depth_key]
    if not keys or config.get(keys[0]) != count:
        raise UserError(
            f"family {name!r} has no schema, and no config key says that {prefix}* has {count} layers "
            f"(looked for {', '.join(keys or DEPTH_KEYS)}), so the grown config could not say it either"
        )
    lines = outline_lines(shapes, prefix, count)
    return Family(
        name=name, norm="rms", schema="\n".join(lines), names={"num_hidden_layers": keys[0]}, rotary=None
    )


def numbered_layers(name: str, shapes: Iterable[str], keys: Iterable[str], config: Config) -> tuple[str, int]:
    """The prefix of the layers' names (`model.layers.`) and how many layers there are.

    Raises:
        UserError: there are none, numbers are missing, or there are several stacks of layers.
    """
    counts = {config[key] for key in keys if isinstance(config.get(key), int)}
    numbers: dict[str, set[int]] = defaultdict(set)  # by prefix
    for tensor in shapes:
        if match := re.match(r"(.*?\.|)(\d+)\.", tensor):
            numbers[match[1]].add(int(match[2]))
    if not numbers:
        raise UserError(
            f"family {name!r} has no schema, and no tensor's name has a layer's number, so its layers "
            "cannot be told apart"
        )
    lengths = {prefix: len(layers) for prefix, layers in numbers.items()}
    # from 0 on, with none missing
    complete = {prefix: count for prefix, count in lengths.items() if max(numbers[prefix]) == count - 1}
    # vis(ion_config) has the layers of vision_tower. and of visual.
    others = [re.compile(rf"\b{tower[:3]}") for tower in other_towers(config)]

    def of_other(prefix: str) -> bool:
        return any(tower.search(prefix) for tower in others)

    of_text = {prefix: count for prefix, count in complete.items() if not of_other(prefix)} or complete
    stacks = {prefix: count for prefix, count in of_text.items() if count in counts} or of_text
    if len(stacks) != 1:
        stories = ", ".join(f"{prefix}* ({lengths[prefix]} numbers)" for prefix in sorted(lengths))
        raise UserError(
            f"family {name!r} has no schema, and which numbers count its layers is not clear: {stories}"
        )
    return next(iter(stacks.items()))


def outline_lines(shapes: Mapping[str, Shape], prefix: str, count: int) -> list[str]:
    """One `tensor` line per name pattern and shape; a tensor that only some layers have says which."""
    layers: dict[tuple[str, Shape], list[int]] = defaultdict(list)
    for tensor, shape in shapes.items():
        number, _, rest = tensor.removeprefix(prefix).partition(".")
        if tensor.startswith(prefix) and number.isdigit():
            layers[f"{prefix}*.{rest}", shape].append(int(number))
        else:
            layers.setdefault((tensor, shape), [])
    return [
        f"{pattern}  tensor {', '.join(map(str, shape)) or 'scalar'}"
        + in_layers(numbers, count if "*" in pattern else 0)
        for (pattern, shape), numbers in layers.items()
    ]


def in_layers(numbers: Sequence[int], count: int) -> str:
    """The end of a line that only some of `count` layers have."""
    return "" if len(numbers) == count else f" in layers {','.join(map(str, sorted(numbers)))}"
