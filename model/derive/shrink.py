"""A tiny twin of a config: the same switches, every size small, so that its model is built, run and grown at
once.

The result is a guess; nothing is believed of it but what the library's own classes then build.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from outgrow.model.composite import TEXT, flat, nested, of_text
from outgrow.model.config import ROPE
from outgrow.model.derive.unfit import Unfit
from outgrow.model.family import Config
from outgrow.model.keys import (
    DEPTH_KEYS,
    EXPERTS,
    HEAD_KEYS,
    OUTPUT,
    SIZES,
    by_number,
    follow_layers,
    is_size,
    numbers_layers,
    per_layer,
    repeats_hidden,
)

MAX_PARAMETERS = 3_000_000  # of a tiny twin; more means that some size was not recognised

HEAD = 16  # hidden size / heads of the tiny twin

# Sizes of the tiny twin by the name of their key; the first match wins. Sizes that meet on one axis divide
# each other; all others differ.
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
    (
        r"intermediate_size|ffn_dim|ffn_hidden|^n_inner$|^dff$|^d_inner$|dim_ff|feed_forward_size|^mlp_dim$",
        88,
    ),
    (r"(kv|key_value)_(n_)?heads|num_query_groups", 2),
    (r"(attention_heads|^n_heads?|^num_heads|head_count)$", 4),
    (
        r"^(d_)?head_dim$|^d_head$|^dim_head$|^kv_channels$|attention_head_size|swa_head_dim|attention_head_dim",
        24,
    ),
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
    (EXPERTS.pattern, 4),
    (r"channels?$", 32),
    (r"first_k_dense|num_dense_layers|moe_layer_start_index", 1),
)
RHYTHM = re.compile(r"period|interval|every|_step$")  # of layers that differ by their number
RHYTHM_LIST = re.compile(r"types|pattern")  # which the layers go through again and again
MAX_LAYERS = 8
TOKEN_KEYS = ("token_id", "token_index")
KV_HEADS = re.compile(r"(kv|key_value)_heads")
WITHOUT_DEFAULT = {"num_key_value_heads": 4, "num_experts_per_tok": 2}  # some classes do not fill these in
CLIPPED, CLIP = re.compile(r"clip_qkv"), 1.0  # so low that random queries and keys reach it
PARTS = re.compile(r"(?<!quantization)_config$|compress_rates")  # dicts of sizes
UNTOUCHED = re.compile(
    r"token_id|token_index|_id$|chunk|window|dtype|seed|interval|period|offset|drop|layer_idx|kernel|conv(?!_channels)|expand|eps"
)


def shrunken(config: Config, depth_key: str, layers: tuple[int, ...]) -> dict[str, Any]:
    """Make every size of `config` small that is recognised.

    Args:
        config: as `PretrainedConfig.to_dict` gives it.
        depth_key: the key that counts the layers.
        layers: those of its layers to keep; lists with one entry per layer follow.
    """
    towers = nested(config)
    if TEXT in towers:
        return _shrunken_composite(config, towers, depth_key, layers)
    depth = config[depth_key]
    small = _small_values(config, depth, layers)
    small[depth_key] = len(layers)
    for key in ROPE:
        rope = small.get(key)
        if isinstance(rope, Mapping):
            small[key] = _small_rope(rope, small)
    # Special tokens move into the small vocabulary.
    vocabulary = small.get("vocab_size")
    named = [key for key in small if key.endswith(TOKEN_KEYS)]
    tokens = [key for key in named if isinstance(small[key], int)]
    if isinstance(vocabulary, int):
        last = vocabulary - 1
        small |= {key: min(small[key], last) for key in tokens}
    return small


def _shrunken_composite(
    config: Config, parts: Config, depth_key: str, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Make a composite config small, tower by tower.

    A value that repeats the text model's hidden size in another tower goes on doing so, and the tokens that
    hold the towers' places in a text are the last ones.
    """
    text = shrunken(parts[TEXT], depth_key, layers)
    small: dict[str, Any] = {TEXT: text}
    for key, value in parts.items():
        if key == TEXT:
            continue
        is_tower = isinstance(value, Mapping) and key.endswith("_config")
        small[key] = _small_tower(value) if is_tower else _small(key, value, text, 0, ())
    hidden = config.get("hidden_size")
    others = [key for key in config if not of_text(key)]
    outputs = [key for key in others if repeats_hidden(key, config[key], hidden)]
    last = text["vocab_size"] - 1
    places = enumerate(place_tokens(config))
    tokens = {key: last - number for number, key in places}
    widths = dict.fromkeys(outputs, text["hidden_size"])
    return flat(small) | widths | tokens


def place_tokens(config: Config) -> list[str]:
    """List the keys of tokens that hold the places of pictures and sounds in a text."""
    tokens = [key for key in config if key.endswith(TOKEN_KEYS)]
    tokens = [key for key in tokens if not of_text(key)]
    return _integer_keys(config, tokens)


def _small_rope(rope: Config, small: Config) -> dict[str, Any]:
    """Divide a small head's pairs among rotary positions in time, rows and columns."""
    sections = rope.get("mrope_section")
    if not isinstance(sections, list) or len(sections) != 3:
        return dict(rope)
    heads = [small[key] for key in HEAD_KEYS if small.get(key)]
    head = heads[0] if heads else HEAD
    share = rope.get("partial_rotary_factor") or 1
    pairs = int(head * share) // 2
    third = pairs // 3
    rest = pairs - 2 * third
    return {**rope, "mrope_section": [rest, third, third]}


def _small_tower(tower: Config) -> dict[str, Any]:
    """Make a tower small that tokens do not go through."""
    depths = _integer_keys(tower, DEPTH_KEYS)
    if not depths:
        small = _small_values(tower)
    else:
        depth = depths[0]
        layers = (0, 1)[: tower[depth]]
        small = shrunken(tower, depth, layers)
    # What the text model reads of it stays narrow.
    numbers = _integer_keys(tower, tower)
    sizes = [key for key in numbers if key.endswith((*SIZES, "_channels"))]
    widths = filter(OUTPUT.search, sizes)
    outputs = {key: min(tower[key], 40) for key in widths}
    shuffled = {}
    ratio = tower.get("pixel_shuffle_ratio")
    if ratio:
        shuffled["intermediate_size"] = int(64 / ratio**2)  # Llama 4's projector reads it
    heads = dict.fromkeys(_integer_keys(tower, HEAD_KEYS), HEAD)
    picture = _small_picture(tower)
    return small | outputs | picture | shuffled | heads


def _integer_keys(config: Config, keys: Iterable[str]) -> list[str]:
    """List those of some keys whose value in a config is a whole number."""
    return [key for key in keys if type(config.get(key)) is int]


def _small_picture(tower: Config) -> dict[str, Any]:
    """Make a picture four patches high and wide, where the config says how large both are."""
    patch = tower.get("patch_size")
    picture = tower.get("image_size")
    same_type = type(patch) is type(picture)
    if not same_type or not isinstance(patch, int | list):
        return {}
    if isinstance(patch, list):
        return {"image_size": [4 * side for side in patch]}
    return {"image_size": 4 * patch}


def _small_values(config: Config, depth: int = 0, layers: tuple[int, ...] = ()) -> dict[str, Any]:
    """Make every value of a config small, by its key."""
    return {key: _small(key, value, config, depth, layers) for key, value in config.items()}


def _small(key: str, value: Any, config: Config, depth: int, layers: tuple[int, ...]) -> Any:
    """Make one config value small.

    Args:
        config: the values beside it.
        depth: number of layers of the config; `layers` are those to keep.
    """
    followed = follow_layers(key, value, layers, depth)
    if per_layer(key, value, depth):
        return [_small(key, entry, config, depth, layers) for entry in followed]
    names_layers = numbers_layers(key, value, depth)
    if names_layers or by_number(key, value, depth):
        return followed
    if isinstance(value, Mapping):
        return _small_part(key, value, depth, layers)
    is_number = isinstance(value, int | float)
    if is_number and CLIPPED.search(key):
        return CLIP
    if value is None and key in WITHOUT_DEFAULT:
        return WITHOUT_DEFAULT[key]
    if not is_size(value) or UNTOUCHED.search(key):
        return value
    counts_kv_heads = KV_HEADS.search(key) and not key.startswith("index")
    if value == 1 and not counts_kv_heads:
        return value
    return _small_size(key, value, config)


def _small_part(key: str, part: Mapping[Any, Any], depth: int, layers: tuple[int, ...]) -> Mapping[Any, Any]:
    """Make a part of a config small: a tower's config, or a dict of sizes; any other stays."""
    count = part.get("num_hidden_layers")
    is_tower = isinstance(part.get("hidden_size"), int)
    if is_tower and isinstance(count, int):
        layers = (0, 1)[:count]
        return shrunken(part, "num_hidden_layers", layers)  # of a tower that tokens do not go through
    if not PARTS.search(key):
        return part
    of_sizes = key == "compress_rates"
    return {
        name: _small(key if of_sizes or type(name) is int else name, size, part, depth, layers)
        for name, size in part.items()
    }


def _small_size(key: str, value: int, config: Config) -> int:
    """Choose the small size of a key, by its name."""
    if repeats_hidden(key, value, config.get("hidden_size")):
        return 64
    if key == "head_dim" and "qk_rope_head_dim" in config:
        return 8 if value == config["qk_rope_head_dim"] else 20
    if key == "head_dim" and "expand" in config:
        return 32  # of a state space: expand × hidden size / heads
    if key == "attention_head_dim" and "attention_hidden_size" in config:
        return 32  # of attention over its own hidden size
    few = [size for pattern, size in FEW if re.search(pattern, key)]
    if few:
        return min(value, few[0])
    small = [size for pattern, size in SMALL if re.search(pattern, key)]
    return small[0] if small else value


def small_layers(tiny: Config) -> dict[str, Any]:
    """Make the sizes small that a tiny config still has of single layers (`per_layer_config`)."""
    small = {}
    for key, value in tiny.items():
        if isinstance(value, Mapping) and value and all(map(_is_layer, value.items())):
            small[key] = {layer: _small_layer(entry) for layer, entry in value.items()}
    return small


def _is_layer(entry: tuple[object, object]) -> bool:
    """Check for (a layer's number, its sizes)."""
    number, sizes = entry
    return str(number).isdigit() and isinstance(sizes, Mapping)


def _small_layer(entry: Config) -> dict[str, Any]:
    small = _small_values(entry)
    kv = entry.get("num_key_value_heads")
    if kv is not None and kv == entry.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _words(value: object) -> bool:
    """Check for a list of several words."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(isinstance(word, str) for word in value)


def _of_layers(config: Config, depth: int) -> tuple[list[list[Any]], list[list[int]]]:
    """Collect the lists of a config with one entry per layer, and those that name layers by their numbers."""
    keys = list(filter(of_text, config))
    each = [config[key] for key in keys if per_layer(key, config[key], depth)]
    numbered = [config[key] for key in keys if numbers_layers(key, config[key], depth)]
    return each, numbered


def layer_kinds(config: Config, depth: int) -> list[str]:
    """Describe each layer by the config's lists; the same for layers that they do not tell apart."""
    each, numbered = _of_layers(config, depth)

    def kind(layer: int) -> str:
        entries = [listed[layer] for listed in each]
        named = [layer in numbers for numbers in numbered]
        return repr([entries, named])

    return [kind(layer) for layer in range(depth)]


def kept_layers(config: Config, depth: int) -> tuple[int, ...]:
    """Choose layers that stand for all: the first of each kind that the config's lists tell apart, two at
    least.

    Where no list tells them apart, a number may: "every 4th", or a pattern that the layers go through.

    Raises:
        Unfit: there are too many kinds for a tiny model.
    """
    keys = list(filter(of_text, config))
    each, _ = _of_layers(config, depth)
    kinds = layer_kinds(config, depth)
    chosen = {kinds.index(kind) for kind in kinds}
    chosen |= set(range(min(2, depth)))
    if not each:
        numbers = [config[key] for key in keys if RHYTHM.search(key)]
        lists = [config[key] for key in keys if RHYTHM_LIST.search(key)]
        rhythms = list(filter(is_size, numbers))
        rhythms += map(len, filter(_words, lists))
        short = [length for length in rhythms if length <= MAX_LAYERS]
        period = max(short, default=0)
        chosen |= set(range(min(period, depth)))
    if len(chosen) > MAX_LAYERS:
        raise Unfit(f"{len(chosen)} kinds of layers are too many to stand for in a tiny model")
    return tuple(sorted(chosen))


def two_of_each_kind(config: Config, depth: int) -> tuple[int, ...]:
    """Choose the first two layers of each kind, for classes that tie one to another (Zamba).

    Returns:
        Nothing where there is one kind, or too many.
    """
    kinds = layer_kinds(config, depth)
    earlier: Counter[str] = Counter()
    first = []
    for layer, kind in enumerate(kinds):
        if earlier[kind] < 2:
            first.append(layer)
        earlier[kind] += 1
    several = len(set(kinds)) > 1
    few = len(first) <= MAX_LAYERS
    return tuple(first) if several and few else ()


def stand_ins(kinds: Sequence[str], layers: tuple[int, ...]) -> tuple[int, ...]:
    """Find for each layer the place, among the kept ones, of one of its kind; for the last layer, of the last
    such.

    Returns:
        Nothing where all layers are of one kind.
    """
    if len(set(kinds)) == 1:
        return ()
    numbered = list(enumerate(layers))
    first = {kinds[layer]: number for number, layer in reversed(numbered)}
    last = {kinds[layer]: number for number, layer in numbered}
    places = [first[kind] for kind in kinds[:-1]]
    return (*places, last[kinds[-1]])
