"""Config keys: how configs spell the sizes, and which of their values follow the layers.

One answer for growth, for derivation and for the stages of a run.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from outgrow.model.composite import of_text

V = TypeVar("V")

# ---- spellings of the sizes, beside the standard ones (`model.family.STANDARD`) ----

HIDDEN_KEYS = ("d_model", "n_embd")
LAYER_KEYS = ("num_layers", "decoder_layers", "num_decoder_layers")
QUERY_HEAD_KEYS = ("n_head", "n_heads", "num_heads", "decoder_attention_heads", "num_decoder_attention_heads")
HEAD_KEYS = ("head_dim", "d_head", "dim_head", "kv_channels", "attention_head_size")  # of the head dim
FFN_KEYS = (
    "decoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "n_inner", "dff", "d_inner", "dim_ff",
    "feed_forward_size",
)  # fmt: skip
DEPTH_KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers", "depth",
    "num_blocks",
)  # fmt: skip

EXPERTS = re.compile(r"(num|routed|local|zero).*experts?(_num)?$")  # of counts of a mixture's experts

SIZES = ("_size", "_dim", "_dims", "_width", "d_model")  # endings of keys
OTHER_SIZES = re.compile(r"intermediate|ffn|head|vocab")  # sizes with a name of their own
OUTPUT = re.compile(r"out|text|(^|_)lm|proj")  # in other towers, the size that the text model reads


def without(values: Mapping[str, V], keys: Container[str]) -> dict[str, V]:
    """Leave these keys of a config, or of another mapping, out."""
    return {key: value for key, value in values.items() if key not in keys}


def only(values: Mapping[str, V], keys: Container[str]) -> dict[str, V]:
    """Take from a config, or from another mapping, what it has under these keys."""
    return {key: value for key, value in values.items() if key in keys}


def is_number(value: object) -> TypeGuard[int | float]:
    """Check for a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_size(value: object) -> TypeGuard[int]:
    """Check for a positive whole number."""
    return type(value) is int and value > 0


def repeats_hidden(key: str, value: object, hidden: object) -> bool:
    """Check whether a value repeats the hidden size, by its number and by a key that says nothing else.

    In another tower such a value is the tower's output.
    """
    if value != hidden or key == "hidden_size":
        return False
    is_size_key = key.endswith(SIZES)
    if not is_size_key or OTHER_SIZES.search(key):
        return False
    leaf = key.rpartition(".")[2]
    return of_text(key) or OUTPUT.search(leaf) is not None


# ---- values that follow the layers ----

LAYER_WORDS = ("layer", "block", "pattern", "types", "idx", "indices", "heads", "freq")
NUMBER_WORDS = ("layer", "idx", "indices")
FLAG_WORDS = ("pattern", "types", "freq")  # lists of 0 and 1 that are a no and a yes
COINCIDENCE = 3  # layers: so short a list may have this length for another reason (`mrope_section`)
NOT_OF_LAYERS = ("token", "section", "architectures", "label")


def _has_word(key: str, words: Iterable[str]) -> bool:
    """Check whether a key has one of some words in it."""
    return any(word in key for word in words)


def numbers_layers(key: str, value: object, depth: int) -> bool:
    """Check whether a value lists layers by their numbers, in ascending order (`mlp_only_layers`)."""
    if not isinstance(value, list) or not value:
        return False
    if not _has_word(key, NUMBER_WORDS) or _has_word(key, FLAG_WORDS):
        return False
    if value == list(range(depth)) == [0, 1]:  # may be a no and a yes
        return False
    are_numbers = all(type(number) is int for number in value)
    if not are_numbers or not all(0 <= number < depth for number in value):
        return False
    return value == sorted(set(value))


def per_layer(key: str, value: object, depth: int) -> bool:
    """Check whether a value is a list of one entry per layer (`layer_types`)."""
    if not isinstance(value, list) or len(value) != depth:
        return False
    if numbers_layers(key, value, depth):
        return False
    if _has_word(key, LAYER_WORDS):
        return True
    return depth > COINCIDENCE and not _has_word(key, NOT_OF_LAYERS)


def by_number(key: str, value: object, depth: int) -> bool:
    """Check whether a value has entries by layers' numbers (`per_layer_config`)."""
    if not isinstance(value, Mapping) or not value:
        return False
    if _has_word(key, NOT_OF_LAYERS):
        return False
    numbers = list(map(str, value))
    if not all(map(str.isdigit, numbers)):
        return False
    return all(int(number) < depth for number in numbers)


def follow_layers(key: str, value: Any, layers: Sequence[int], depth: int) -> Any:
    """Carry a config value of `depth` layers over to the layers of another model.

    Args:
        layers: for each layer of that model, the layer that it comes from.

    Returns:
        Lists of one entry per layer, lists of layers' numbers and entries by layers' numbers follow the
        layers; anything else stays.
    """
    if numbers_layers(key, value, depth):
        return [number for number, layer in enumerate(layers) if layer in value]
    if per_layer(key, value, depth):
        return [value[layer] for layer in layers]
    if by_number(key, value, depth):
        entries = {int(number): entry for number, entry in value.items()}
        origins = {number: layer for number, layer in enumerate(layers) if layer in entries}
        return {str(number): entries[layer] for number, layer in origins.items()}
    return value
