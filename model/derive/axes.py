"""Which config key moves which axis: the family's tiny config built again and again on the meta device, one size changed at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import log2
from typing import Any

from outgrow.model.base.errors import UserError
from outgrow.model.build import to_hf_config
from outgrow.model.composite import of_text
from outgrow.model.derive.mixer import Mixer, find_mixer
from outgrow.model.derive.probe import computed, factors, shapes
from outgrow.model.derive.shrink import repeats_hidden
from outgrow.model.family import Config

Shapes = Mapping[str, tuple[int, ...]]
MORE_FFN = re.compile(r"^(?!.*(multiple|encoder)).*(intermediate|ffn)")


@dataclass(frozen=True)
class Keys:
    """How a config spells the sizes that a schema is about; None where it does not have one.

    Attributes:
        follows: keys that repeat the hidden size.
        also_layers: a key that repeats the layer count, from which the library takes how many layers to remember keys and values of.
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
        """The keys of a whole config (`PretrainedConfig.to_dict`).

        Raises:
            UserError: it has no hidden size, layer count or vocabulary of its own.
        """

        def key(standard: str, *others: str) -> str | None:
            decoder = tuple(name for name in others if "decoder_" in name)  # where the config has an encoder's sizes too
            names = (*decoder, attribute_map.get(standard, standard), standard, *others)
            return next((name for name in names if type(config.get(name)) is int and config[name] > 0), None)

        hidden, vocab = key("hidden_size", "d_model", "n_embd"), key("vocab_size")
        layers = key("num_hidden_layers", "num_layers", "decoder_layers", "num_decoder_layers")
        sizes = {"hidden size": hidden, "layer count": layers, "vocabulary": vocab}
        missing = [word for word, found in sizes.items() if found is None]
        if hidden is None or layers is None or vocab is None:
            raise UserError(f"its config has no {' and no '.join(missing)} at its top level or in a text_config")
        spellings = ("decoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "n_inner", "dff", "d_inner", "dim_ff", "feed_forward_size")
        ffn = key("intermediate_size", *spellings)
        whole = {name: value for name, value in config.items() if type(value) is int and value > 1}
        return cls(
            hidden=hidden,
            heads=key("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "num_decoder_attention_heads"),
            kv=key("num_key_value_heads", "num_kv_heads"),
            ffn=ffn,
            layers=layers,
            vocab=vocab,
            head_dim=key("head_dim", "attention_head_size", "d_head", "dim_head", "kv_channels"),
            positions=key("max_position_embeddings", "n_positions", "max_target_positions"),
            follows=tuple(name for name, value in whole.items() if name != hidden and repeats_hidden(name, value, config[hidden])),
            more=tuple(name for name in whole if of_text(name) and MORE_FFN.search(name) and name != ffn),
            also_layers=count if (count := key("num_hidden_layers")) != layers and count and config[count] == config[layers] else None,
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
        return int(self.config[self.keys.heads]) if self.keys.heads else 1

    @cached_property
    def kv(self) -> int:
        return 1 if self.multi_query else int(self.config.get(self.keys.kv or "") or self.heads)

    @property
    def multi_query(self) -> bool:
        """Whether a switch of the config says that all queries share one key-value head."""
        return self.config.get("multi_query") is True

    def changed(self, changes: Mapping[str, int]) -> Shapes | None:
        """The shapes after changes of config keys; None where the library refuses them or other tensors come of it."""
        try:
            found = shapes({**self.config, **changes})
        except UserError:
            return None
        return found if found.keys() == self.shapes.keys() else None

    @cached_property
    def takes_kv(self) -> bool:
        """Whether the class goes by the key of the key-value heads, rather than giving back there what another part of the config says."""
        return self.keys.kv is None or self.keys.kv in {
            field.name for field in fields(to_hf_config(self.config).get_text_config(decoder=True))
        }

    @property
    def stream_keys(self) -> tuple[str, ...]:
        """The keys of the residual stream's size."""
        return (self.keys.hidden, *self.keys.follows)

    @property
    def head_keys(self) -> tuple[str, ...]:
        """The keys that multiply the heads: key-value groups where there is more than one, else query heads."""
        groups = (self.keys.kv,) if self.keys.kv and self.kv > 1 and self.takes_kv else ()
        return (self.keys.heads, *groups) if self.keys.heads else ()

    @property
    def width_keys(self) -> tuple[str, ...]:
        """The keys of the residual stream's size, with the heads where their dim is hidden size / heads, and those of state spaces."""
        mixer = (self.mixer.heads,) if self.mixer else ()
        return tuple(dict.fromkeys((*self.stream_keys, *(self.head_keys if self.coupled else ()), *mixer)))

    def times(self, factor: float, *keys: str | None) -> dict[str, int]:
        """The change that multiplies the sizes of `keys`."""
        return {key: int(self.config[key] * factor) for key in keys if key}

    @cached_property
    def coupled(self) -> bool:
        """Whether a head's dim is hidden size / heads, so that width grows by whole heads."""
        moved = self.keys.heads and self.changed(self.times(2, *self.head_keys))
        if not moved:
            return self.keys.heads is not None
        grown = [name for name in moved for a, b in zip(self.shapes[name], moved[name], strict=True) if b == 2 * a and a > 2 * self.heads]
        return not grown

    @cached_property
    def mixer(self) -> Mixer | None:
        """The state spaces whose heads have to grow with the hidden size."""
        return find_mixer(self.config, self.shapes, lambda *keys: self.changed(self.times(2, *self.stream_keys, *keys)))

    @cached_property
    def by_hidden(self) -> Shapes:
        """The shapes under twice the hidden size.

        Raises:
            UserError: the library refuses it.
        """
        found = self.changed(self.times(2, *self.width_keys))
        if found is None:
            raise UserError(f"its class does not build with twice the {self.keys.hidden}")
        return found

    @cached_property
    def computed(self) -> list[str]:
        """Buffers as wide as the residual stream that no file holds, as sinusoids of positions: its class makes them from the width."""
        wide = computed({**self.config, **self.times(2, *self.width_keys)})
        return [name for name, shape in computed(self.config).items() if self.hidden in shape and 2 * self.hidden in wide.get(name, ())]

    @cached_property
    def powers(self) -> tuple[dict[str, float], dict[str, float]]:
        """Module → the power of the hidden size by which it multiplies something, as its buffers and as its attributes tell."""

        buffers, attributes = ({name.rpartition(".")[0]: power for name, power in powers.items()} for powers in self._powers)
        return buffers, attributes

    @cached_property
    def rounded(self) -> list[str]:
        """Buffers that would be a power of the hidden size, were they not rounded (to bfloat16)."""
        return [name for name, power in self._powers[0].items() if 1e-6 < abs(2 * power - round(2 * power)) < 1e-2]

    @cached_property
    def _powers(self) -> tuple[dict[str, float], dict[str, float]]:
        def moved(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
            pairs = {name: (value, after.get(name, value)) for name, value in before.items()}
            return {name: log2(b / a) for name, (a, b) in pairs.items() if a > 0 and b > 0 and a != b}

        buffers, attributes = zip(factors(self.config), factors({**self.config, **self.times(2, *self.width_keys)}), strict=True)
        return moved(*buffers), moved(*attributes)

    @cached_property
    def by_queries(self) -> Shapes | None:
        """The shapes under twice the query heads (and key-value heads, where each query head has its own), hidden size fixed."""
        if self.keys.heads is None:
            return None
        return self.changed(self.times(2, self.keys.heads, self.keys.kv if self.kv == self.heads else None))

    @cached_property
    def by_kv(self) -> Shapes | None:
        """The shapes under twice the key-value heads, where there are fewer of them than query heads."""
        if self.keys.kv is None or self.kv == self.heads or self.heads % (self.kv * 2):
            return None
        return self.changed({self.keys.kv: self.kv * 2})

    @cached_property
    def by_key(self) -> dict[str, Shapes]:
        """The shapes under 8 more of each feed-forward size, the vocabulary and the positions, as far as the library builds them."""
        names = [self.keys.ffn, *self.keys.more, self.keys.vocab, self.keys.positions]
        found = {name: self.changed({name: self.config[name] + 8}) for name in names if name}
        return {name: moved for name, moved in found.items() if moved is not None}
