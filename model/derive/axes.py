"""The config key that moves each axis: a tiny config is built again and again, one size changed at a time.

Everything is built on the meta device, in no memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import log2
from typing import Any

from outgrow.model.build import to_hf_config
from outgrow.model.composite import of_text
from outgrow.model.derive.mixer import Mixer, find_mixer
from outgrow.model.derive.probe import computed, factors, shapes
from outgrow.model.derive.unfit import Unfit
from outgrow.model.family import Config
from outgrow.model.keys import (
    FFN_KEYS,
    HIDDEN_KEYS,
    LAYER_KEYS,
    QUERY_HEAD_KEYS,
    is_size,
    only,
    repeats_hidden,
)

Shapes = Mapping[str, tuple[int, ...]]
# sizes beside the first, as of experts
MORE_FFN = re.compile(r"^(?!.*(multiple|encoder)).*(intermediate|ffn)")


@dataclass(frozen=True)
class Keys:
    """A config's spelling of the sizes that a schema is about; None where it does not have one.

    Attributes:
        follows: keys that repeat the hidden size.
        also_layers: a key that repeats the layer count; the library takes from it how many layers to cache
            keys and values of.
        more: further feed-forward sizes, as of experts, each a space of its own.
    """

    hidden: str
    heads: str | None
    kv: str | None
    ffn: str | None
    layers: str
    vocab: str
    positions: str | None
    head_dim: str | None
    follows: tuple[str, ...]
    more: tuple[str, ...]
    also_layers: str | None

    @classmethod
    def of(cls, config: Config, attribute_map: Mapping[str, str]) -> Keys:
        """Find the keys of a complete config (`PretrainedConfig.to_dict`).

        Raises:
            Unfit: it has no hidden size, layer count or vocabulary of its own.
        """

        def key(standard: str, *others: str) -> str | None:
            """Find the first spelling under which the config has a positive size; a decoder's before an
            encoder's.
            """
            decoder = [name for name in others if "decoder_" in name]
            own = attribute_map.get(standard, standard)
            names = (*decoder, own, standard, *others)
            sized = [name for name in names if is_size(config.get(name))]
            return sized[0] if sized else None

        hidden = key("hidden_size", *HIDDEN_KEYS)
        vocab = key("vocab_size")
        layers = key("num_hidden_layers", *LAYER_KEYS)
        ffn = key("intermediate_size", *FFN_KEYS)
        required = {"hidden size": hidden, "layer count": layers, "vocabulary": vocab}
        missing = [word for word, name in required.items() if name is None]
        if hidden is None or layers is None or vocab is None:
            lacking = " and no ".join(missing)
            raise Unfit(f"its config has no {lacking} at its top level or in a text_config")
        every_size = {name: value for name, value in config.items() if is_size(value)}
        sizes = {name: value for name, value in every_size.items() if value > 1}
        width = config[hidden]
        others = [name for name in sizes if name != hidden]
        count = key("num_hidden_layers")
        counts_too = count not in (None, layers) and config[count] == config[layers]
        return cls(
            hidden=hidden,
            heads=key("num_attention_heads", *QUERY_HEAD_KEYS),
            kv=key("num_key_value_heads", "num_kv_heads"),
            ffn=ffn,
            layers=layers,
            vocab=vocab,
            head_dim=key("head_dim", "attention_head_size", "d_head", "dim_head", "kv_channels"),
            positions=key("max_position_embeddings", "n_positions", "max_target_positions"),
            follows=tuple(name for name in others if repeats_hidden(name, sizes[name], width)),
            more=tuple(name for name in sizes if of_text(name) and MORE_FFN.search(name) and name != ffn),
            also_layers=count if counts_too else None,
        )


@dataclass(frozen=True)
class Axes:
    """The tiny model's tensors under changes of single sizes.

    Attributes:
        keys: the config's spellings.
        config: the tiny config.
        shapes: its tensors.
    """

    keys: Keys
    config: Mapping[str, Any]
    shapes: Shapes

    @cached_property
    def hidden(self) -> int:
        return int(self.config[self.keys.hidden])

    @cached_property
    def heads(self) -> int:
        key = self.keys.heads
        return int(self.config[key]) if key else 1

    @cached_property
    def kv(self) -> int:
        key = self.keys.kv or ""
        named = self.config.get(key)
        return 1 if self.multi_query else int(named or self.heads)

    @cached_property
    def multi_query(self) -> bool:
        """Check whether a switch of the config says that all queries share one key-value head (MQA).

        Some classes have the switch and go by the number all the same (Falcon's newer ones).
        """
        if self.config.get("multi_query") is not True:
            return False
        key = self.keys.kv
        return key is None or self.changed(self.times(2, key)) in (None, self.shapes)

    def changed(self, changes: Mapping[str, int]) -> Shapes | None:
        """Build the shapes after changes of config keys; None where the library refuses them or lacks tensors
        then.

        It may have more: StableLM's norms of queries are one for each head.
        """
        try:
            moved = shapes({**self.config, **changes})
        except Unfit:
            return None
        has_tensors = moved.keys() >= self.shapes.keys()
        return only(moved, self.shapes) if has_tensors else None

    @cached_property
    def takes_kv(self) -> bool:
        """Check whether the class goes by the key of the key-value heads.

        Some only give back there what another part of the config says.
        """
        text_config = to_hf_config(self.config).get_text_config(decoder=True)
        own = {field.name for field in fields(text_config)}
        return self.keys.kv is None or self.keys.kv in own

    @property
    def stream_keys(self) -> tuple[str, ...]:
        """The keys of the residual stream's size."""
        return (self.keys.hidden, *self.keys.follows)

    @property
    def head_keys(self) -> tuple[str, ...]:
        """The keys that multiply the heads: key-value groups where there is more than one, else query
        heads."""
        heads = self.keys.heads
        kv = self.keys.kv
        if not heads:
            return ()
        if kv and self.kv > 1 and self.takes_kv:
            return heads, kv
        return (heads,)

    @property
    def width_keys(self) -> tuple[str, ...]:
        """The keys of the residual stream's size, and of the heads that grow with it.

        These are attention heads whose dim is hidden size / heads, and the heads of state spaces.
        """
        mixer = (self.mixer.heads,) if self.mixer else ()
        heads = self.head_keys if self.coupled else ()
        keys = (*self.stream_keys, *heads, *mixer)
        return tuple(dict.fromkeys(keys))

    def times(self, factor: float, *keys: str | None) -> dict[str, int]:
        """Compose the change that multiplies the sizes of `keys`."""
        named = filter(None, keys)
        return {key: int(self.config[key] * factor) for key in named}

    @cached_property
    def coupled(self) -> bool:
        """Check whether a head's dim is hidden size / heads, so that width grows by whole heads."""
        doubled = self.times(2, *self.head_keys)
        moved = self.keys.heads and self.changed(doubled)
        if not moved:
            return self.keys.heads is not None
        doubled_lengths: list[int] = []
        for name in moved:
            before = self.shapes[name]
            pairs = zip(before, moved[name], strict=True)
            doubled_lengths += [before for before, after in pairs if after == 2 * before]
        least = 2 * self.heads
        return not any(length > least for length in doubled_lengths)

    @cached_property
    def mixer(self) -> Mixer | None:
        """The state spaces whose heads have to grow with the hidden size."""

        def wider(*keys: str) -> Shapes | None:
            changes = self.times(2, *self.stream_keys, *keys)
            return self.changed(changes)

        return find_mixer(self.config, self.shapes, wider)

    @cached_property
    def by_hidden(self) -> Shapes:
        """The shapes under twice the hidden size.

        Raises:
            Unfit: the library refuses it.
        """
        changes = self.times(2, *self.width_keys)
        moved = self.changed(changes)
        if moved is None:
            raise Unfit(f"its class does not build with twice the {self.keys.hidden}")
        return moved

    @cached_property
    def computed(self) -> list[str]:
        """Buffers as wide as the residual stream that the class computes and no file holds (sinusoids of
        positions).
        """
        widths = self.times(2, *self.width_keys)
        wider = computed({**self.config, **widths})
        own = computed(self.config)
        as_wide = [name for name, shape in own.items() if self.hidden in shape]
        double = 2 * self.hidden
        return [name for name in as_wide if double in wider.get(name, ())]

    @cached_property
    def powers(self) -> tuple[dict[str, float], dict[str, float]]:
        """Module → the power of the hidden size in its buffers, and in its attributes."""
        buffers, attributes = self._powers
        return _by_module(buffers), _by_module(attributes)

    @cached_property
    def rounded(self) -> list[str]:
        """Buffers that would be a power of the hidden size, were they not rounded (to bfloat16)."""
        buffers, _ = self._powers
        doubled = {name: 2 * power for name, power in buffers.items()}
        misses = {name: abs(power - round(power)) for name, power in doubled.items()}
        return [name for name, miss in misses.items() if 1e-6 < miss < 1e-2]

    @cached_property
    def _powers(self) -> tuple[dict[str, float], dict[str, float]]:
        """Number → the power of two by which it moves when the hidden size is doubled: of buffers, of
        attributes.
        """
        buffers, attributes = factors(self.config)
        changes = self.times(2, *self.width_keys)
        wider_buffers, wider_attributes = factors({**self.config, **changes})
        of_buffers = _powers_of_two(buffers, wider_buffers)
        of_attributes = _powers_of_two(attributes, wider_attributes)
        return of_buffers, of_attributes

    @cached_property
    def _powers_of_depth(self) -> dict[str, float]:
        """Number of a module → the power of two by which it moves when there are twice as many layers."""
        return self._moved_by_depth({})

    def _moved_by_depth(self, changes: Mapping[str, float]) -> dict[str, float]:
        layers = self.keys.layers
        twice = {layers: 2 * self.config[layers], **changes}
        try:
            deeper = factors({**self.config, **twice})
        except Unfit:  # lists of layers that are too short, which nothing is computed from
            return {}
        _, before = factors(self.config)
        return _powers_of_two(before, deeper[1])

    @property
    def computed_by_depth(self) -> list[str]:
        """Numbers of modules that the class computes from the number of layers."""
        return list(self._powers_of_depth)

    @cached_property
    def by_depth(self) -> dict[str, float]:
        """The config key that undoes what the number of layers does to the numbers of the modules, and the
        power of it that does; nothing where there is none.
        """
        powers = set(self._powers_of_depth.values())
        if len(powers) != 1:
            return {}
        (power,) = powers
        numbers = [key for key, value in self.config.items() if type(value) is float and value]
        for key in numbers:
            undone = {key: self.config[key] * 2**-power}
            if not self._moved_by_depth(undone):
                return {key: -power}
        return {}

    @cached_property
    def by_queries(self) -> Shapes | None:
        """The shapes under twice the query heads (and key-value heads, where each query head has its own),
        hidden size fixed.
        """
        if self.keys.heads is None:
            return None
        one_each = self.kv == self.heads
        kv = self.keys.kv if one_each else None
        changes = self.times(2, self.keys.heads, kv)
        return self.changed(changes)

    @cached_property
    def by_kv(self) -> Shapes | None:
        """The shapes under twice the key-value heads, where there are fewer of them than query heads."""
        key = self.keys.kv
        one_each = self.kv == self.heads
        doubled = 2 * self.kv
        if key is None or one_each or self.heads % doubled:
            return None
        return self.changed({key: doubled})

    @cached_property
    def by_key(self) -> dict[str, Shapes]:
        """The shapes under 8 more of each feed-forward size, the vocabulary and the positions, as far as the
        library builds them.
        """
        keys = self.keys
        names = filter(None, (keys.ffn, *keys.more, keys.vocab, keys.positions))
        moved = {}
        for name in names:
            longer = {name: self.config[name] + 8}
            shapes = self.changed(longer)
            if shapes is not None:
                moved[name] = shapes
        return moved


def _by_module(numbers: Mapping[str, float]) -> dict[str, float]:
    """Key numbers by the module that has them."""
    return {name.rpartition(".")[0]: number for name, number in numbers.items()}


def _powers_of_two(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Compute by which power of two each positive number moves; numbers that stay are left out."""
    powers = {}
    for name, old in before.items():
        new = after.get(name, old)
        least = min(old, new)
        if least > 0 and new != old:
            powers[name] = log2(new / old)
    return powers
