"""A tiny twin of a config: the same switches, every size small, so that a model of it can be built, run and grown in a moment.

The result is a guess about a stranger's config; nothing is believed of it but what the library's own classes then build.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from outgrow.model.base.errors import UserError
from outgrow.model.composite import TEXT, flat, nested, of_text
from outgrow.model.config import ROPE
from outgrow.model.depth_only import DEPTH_KEYS
from outgrow.model.family import Config

MAX_PARAMETERS = 3_000_000  # of a tiny twin; more means that some size was not recognised

HEAD = 16  # hidden size / heads of the tiny twin
HEAD_KEYS = ("head_dim", "d_head", "dim_head", "kv_channels", "attention_head_size")

# Sizes of the tiny twin by the name of their key, first match wins. Sizes that meet on one axis divide each other; all others differ.
SMALL: tuple[tuple[str, int], ...] = (
    (r"^(true_)?hidden_size$|^d_model$|^n_embd$|^embedding_dim$|^emb_dim$|^dim$", 64),
    (r"embedding_size|embed_dim$", 40),
    (r"^attention_hidden_size$", 128),
    (r"^downsample_hidden_size$", 40),
    (r"^mamba_(d_ssm|intermediate)|lru_width", 128),
    (r"mamba_(d_head|head_?dim)", 32),
    (r"mamba_(n|num)_heads|linear_num_value_heads|linear_num_heads|n_mamba_heads", 4),
    (r"linear_num_key_heads|index(er)?_n_heads", 2),
    (r"indexer_head_dim", 24),  # which holds the turned dims of a head
    (r"linear.*head_dim", 8),
    (r"index_head_dim|state_size|d_state", 16),
    (r"time_step_rank|dt_rank", 6),
    (r"(moe|expert).*(intermediate|ffn)|(intermediate|ffn).*(moe|expert)", 56),
    (r"shared.*intermediate", 72),
    (r"dense_intermediate|intermediate_size_mlp", 104),
    (r"intermediate_size|ffn_dim|ffn_hidden|^n_inner$|^dff$|^d_inner$|dim_ff|feed_forward_size|^mlp_dim$", 88),
    (r"(kv|key_value)_(n_)?heads|num_query_groups", 2),
    (r"(attention_heads|^n_heads?|^num_heads|head_count)$", 4),
    (r"^(d_)?head_dim$|^d_head$|^dim_head$|^kv_channels$|attention_head_size|swa_head_dim|attention_head_dim", 24),
    (r"^vocab_size|decoder_vocab_size", 101),
    (r"max_position|n_positions|max_seq_len|max_target_positions|context_length|n_ctx|model_max_length", 64),
    (r"q_lora_rank", 20),
    (r"kv_lora_rank|o_lora_rank", 24),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_nope_head_dim", 12),
    (r"qk_head_dim", 20),
    (r"v_head_dim", 10),
    (r"compress_rates", 4),  # of keys and values, which a dozen tokens must fill
)
# Counts, which may be smaller still.
FEW: tuple[tuple[str, int], ...] = (
    (r"layers$|^n_layers?$|^num_blocks$|^depth$", 2),
    (r"topk_group|n_group$|num_expert_group", 1),
    (r"(n|o)_?groups$", 2),  # of heads
    (r"(topk|top_k|per_tok|per_token|moe_k$)", 2),
    (r"tokens_per_image$", 4),
    (r"n_shared_experts|num_shared_experts", 4),  # whose sizes add up
    (r"(num|routed|local|zero).*experts?(_num)?$", 4),
    (r"channels?$", 32),
    (r"first_k_dense|num_dense_layers|moe_layer_start_index", 1),
)
RHYTHM = re.compile(r"period|interval|every|_step$")  # of layers that differ by their number
RHYTHM_LIST = re.compile(r"types|pattern")  # which the layers go through again and again
SIZES = ("_size", "_dim", "_dims", "_width", "d_model")
OUTPUT = re.compile(r"out|text|(^|_)lm|proj")  # how other towers call the size that the text model reads
MAX_LAYERS = 8
CLIPPED, CLIP = re.compile(r"clip_qkv"), 1.0  # so low that random queries and keys reach it
PARTS = re.compile(r"(?<!quantization)_config$|compress_rates")  # dicts of sizes
UNTOUCHED = re.compile(
    r"token_id|token_index|_id$|chunk|window|dtype|seed|interval|period|offset|drop|layer_idx|kernel|conv(?!_channels)|expand|eps"
)


def shrunken(config: Config, depth_key: str, layers: tuple[int, ...]) -> dict[str, Any]:
    """`config` with every size that is recognised made small.

    Args:
        config: as `PretrainedConfig.to_dict` gives it.
        depth_key: the key that counts the layers.
        layers: which of its layers to keep; lists with one entry per layer follow.
    """
    if TEXT in (whole := nested(config)):
        return _shrunken_composite(config, whole, depth_key, layers)
    depth = config[depth_key]
    small = {key: _small(key, value, config, depth, layers) for key, value in config.items()}
    small[depth_key] = len(layers)
    small |= {key: _small_rope(rope, small) for key in ROPE if isinstance(rope := small.get(key), Mapping)}
    vocabulary = small.get("vocab_size")
    for key, value in small.items():
        if key.endswith(("token_id", "token_index")) and isinstance(value, int) and isinstance(vocabulary, int):
            small[key] = min(value, vocabulary - 1)
    return small


def _shrunken_composite(config: Config, whole: Config, depth_key: str, layers: tuple[int, ...]) -> dict[str, Any]:
    """Tower by tower; what repeats the text model's hidden size in another tower goes on doing so, and what marks their places in a text
    are the last tokens."""
    text = shrunken(whole[TEXT], depth_key, layers)
    towers = {key for key, value in whole.items() if isinstance(value, Mapping) and key.endswith("_config")}
    others = {key: _small_tower(value) if key in towers else _small(key, value, text, 0, ()) for key, value in whole.items() if key != TEXT}
    small = flat({TEXT: text, **others})
    meets = [key for key, value in config.items() if not of_text(key) and repeats_hidden(key, value, config.get("hidden_size"))]
    marks = {key: text["vocab_size"] - 1 - number for number, key in enumerate(place_tokens(config))}
    return small | dict.fromkeys(meets, text["hidden_size"]) | marks


def place_tokens(config: Config) -> list[str]:
    """The keys of tokens that hold the places of pictures and sounds in a text."""
    return [key for key, value in config.items() if not of_text(key) and key.endswith(("token_id", "token_index")) and type(value) is int]


def _small_rope(rope: Config, small: Config) -> dict[str, Any]:
    """Rotary positions in time, rows and columns share a head's pairs among them."""
    sections = rope.get("mrope_section")
    if not isinstance(sections, list) or len(sections) != 3:
        return dict(rope)
    head = next((small[key] for key in HEAD_KEYS if small.get(key)), HEAD)
    pairs = int(head * (rope.get("partial_rotary_factor") or 1)) // 2
    return {**rope, "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]}


def _small_tower(tower: Config) -> dict[str, Any]:
    """A tower that tokens do not go through."""
    depth = next((key for key in DEPTH_KEYS if type(tower.get(key)) is int), None)
    if depth is None:
        small = {key: _small(key, value, tower, 0, ()) for key, value in tower.items()}
    else:
        small = shrunken(tower, depth, (0, 1)[: tower[depth]])
    patch, picture = tower.get("patch_size"), {}
    if type(patch) is type(tower.get("image_size")) and isinstance(patch, int | list):
        picture = {"image_size": [4 * side for side in patch] if isinstance(patch, list) else 4 * patch}
    given = [key for key, value in tower.items() if OUTPUT.search(key) and key.endswith((*SIZES, "_channels")) and type(value) is int]
    ratio = tower.get("pixel_shuffle_ratio")
    shuffled = {"intermediate_size": int(64 / ratio**2)} if ratio else {}  # what Llama 4's projector reads is this and the hidden size
    heads = {key: HEAD for key in HEAD_KEYS if type(tower.get(key)) is int}
    return small | {key: min(tower[key], 40) for key in given} | picture | shuffled | heads


def _small(key: str, value: Any, config: Config, depth: int, layers: tuple[int, ...]) -> Any:
    if isinstance(value, list) and numbers_layers(key, value, depth):
        return [layers.index(layer) for layer in value if layer in layers]
    if isinstance(value, list) and len(value) == depth:
        return [_small(key, value[layer], config, depth, layers) for layer in layers]
    if isinstance(value, Mapping) and value and all(str(entry).isdigit() and int(entry) < depth for entry in value):
        return {str(layers.index(int(layer))): entry for layer, entry in value.items() if int(layer) in layers}
    if isinstance(value, Mapping) and isinstance(value.get("hidden_size"), int) and isinstance(value.get("num_hidden_layers"), int):
        return shrunken(value, "num_hidden_layers", (0, 1)[: value["num_hidden_layers"]])  # of a tower that tokens do not go through
    if isinstance(value, Mapping) and PARTS.search(key):
        return {
            part: _small(key if type(part) is int or key == "compress_rates" else part, size, value, depth, layers)
            for part, size in value.items()
        }
    if CLIPPED.search(key) and isinstance(value, int | float):
        return CLIP
    if value is None and key in ("num_key_value_heads", "num_experts_per_tok"):
        return 4 if key == "num_key_value_heads" else 2  # as many as queries; at all: which some classes do not work out
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or UNTOUCHED.search(key):
        return value
    if value == 1 and (not re.search(r"(kv|key_value)_heads", key) or key.startswith("index")):
        return value
    if repeats_hidden(key, value, config.get("hidden_size")):
        return 64
    if key == "head_dim" and "qk_rope_head_dim" in config:
        return 8 if value == config["qk_rope_head_dim"] else 20
    if (key == "head_dim" and "expand" in config) or (key == "attention_head_dim" and "attention_hidden_size" in config):
        return 32  # of a state space: expand × hidden size / heads; of attention over its own hidden size
    few = next((size for pattern, size in FEW if re.search(pattern, key)), None)
    if few is not None:
        return min(value, few)
    return next((size for pattern, size in SMALL if re.search(pattern, key)), value)


def small_layers(tiny: Config) -> dict[str, Any]:
    """The sizes that a tiny config still has of single layers (`per_layer_config`), made small."""
    entries = {key: value for key, value in tiny.items() if isinstance(value, Mapping) and value and all(map(str.isdigit, map(str, value)))}
    layers = {key: value for key, value in entries.items() if all(isinstance(entry, Mapping) for entry in value.values())}
    return {key: {layer: _small_layer(entry) for layer, entry in value.items()} for key, value in layers.items()}


def _small_layer(entry: Config) -> dict[str, Any]:
    small = {key: _small(key, value, entry, 0, ()) for key, value in entry.items()}
    alike = "num_key_value_heads" in entry and entry["num_key_value_heads"] == entry.get("num_attention_heads")
    return small | ({"num_key_value_heads": small["num_attention_heads"]} if alike else {})


def repeats_hidden(key: str, value: int, hidden: object) -> bool:
    """Whether a size is the hidden size once more, by its value and by a name that says nothing else (in another tower: its output)."""
    if not of_text(key) and not OUTPUT.search(key.rpartition(".")[2]):
        return False
    named = key.endswith(SIZES) and not re.search(r"intermediate|ffn|head|vocab", key)
    return value == hidden and key != "hidden_size" and named


def _words(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(word, str) for word in value)


def numbers_layers(key: str, value: list[Any], depth: int) -> bool:
    """Whether a list names layers by their numbers (`mlp_only_layers`)."""
    named = any(word in key for word in ("layer", "idx", "indices"))
    whole = all(type(number) is int and 0 <= number < depth for number in value)
    return named and whole and len(value) > 0 and value == sorted(set(value)) and value != [0, 1]


def _of_layers(config: Config, depth: int) -> tuple[list[list[Any]], list[list[int]]]:
    """The lists of a config with one entry per layer, and those that name layers by their numbers."""
    config = {key: value for key, value in config.items() if of_text(key)}
    named = [value for key, value in config.items() if isinstance(value, list) and numbers_layers(key, value, depth)]
    lists = [value for value in config.values() if isinstance(value, list)]
    return [value for value in lists if len(value) == depth and value not in named], named


def layer_kinds(config: Config, depth: int) -> list[str]:
    """What the config's lists say of each layer; the same for layers that they do not tell apart."""
    each, named = _of_layers(config, depth)
    return [repr([[entries[layer] for entries in each], [layer in numbers for numbers in named]]) for layer in range(depth)]


def kept_layers(config: Config, depth: int) -> tuple[int, ...]:
    """Layers that stand for all: the first of each kind that the config's lists tell apart, two at least.

    Raises:
        UserError: there are too many kinds for a tiny model.
    """
    config = {key: value for key, value in config.items() if of_text(key)}
    each, _ = _of_layers(config, depth)
    first = {kind: layer for layer, kind in reversed(list(enumerate(layer_kinds(config, depth))))}
    rhythms = [value for key, value in config.items() if RHYTHM.search(key) and type(value) is int and 1 < value <= MAX_LAYERS]
    rhythms += [len(value) for key, value in config.items() if RHYTHM_LIST.search(key) and _words(value) and len(value) <= MAX_LAYERS]
    chosen = sorted({*first.values(), *range(min(2, depth)), *range(min(max(rhythms, default=0) if not each else 0, depth))})
    if len(chosen) > MAX_LAYERS:
        raise UserError(f"{len(chosen)} kinds of layers are too many to stand for in a tiny model")
    return tuple(chosen)


def two_of_each_kind(config: Config, depth: int) -> tuple[int, ...]:
    """The first two layers of each kind, for classes that tie one to another (Zamba); none where there is one kind, or too many."""
    kinds = layer_kinds(config, depth)
    first = [layer for layer in range(depth) if kinds[:layer].count(kinds[layer]) < 2]
    return tuple(first) if len(set(kinds)) > 1 and len(first) <= MAX_LAYERS else ()


def stand_ins(kinds: Sequence[str], kept: tuple[int, ...]) -> tuple[int, ...]:
    """For each layer the place among the kept ones of one of its kind, for the last layer the last such; empty where there is one kind."""
    if len(set(kinds)) == 1:
        return ()
    first = {kinds[layer]: place for place, layer in reversed(list(enumerate(kept)))}
    last = {kinds[layer]: place for place, layer in enumerate(kept)}
    return (*(first[kind] for kind in kinds[:-1]), last[kinds[-1]])
