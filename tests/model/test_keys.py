"""Config values that follow the layers, and those that repeat the hidden size."""

from __future__ import annotations

from typing import Any

import pytest

from outgrow.model.keys import follow_layers, repeats_hidden

STACKED = [0, 1, 2, 3, 0, 1, 2, 3]  # the source layer of each target layer


@pytest.mark.parametrize(
    ("key", "value", "followed"),
    [
        ("layer_types", ["a", "b", "c", "d"], ["a", "b", "c", "d", "a", "b", "c", "d"]),
        ("num_kv_heads", [1, 2, 4, 4], [1, 2, 4, 4, 1, 2, 4, 4]),
        ("no_rope_layers", [1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1, 0]),  # yes and no, layer by layer
        ("ffn_multipliers", [0.5, 1.0, 1.5, 2.0], [0.5, 1.0, 1.5, 2.0, 0.5, 1.0, 1.5, 2.0]),
        ("mlp_only_layers", [1, 3], [1, 3, 5, 7]),  # by their numbers
        ("mlp_only_layers", [0, 1, 2, 3], list(range(8))),
        ("mlp_only_layers", [], []),
        ("attn_layer_indices", [0, 1], [0, 1, 4, 5]),
        ("per_layer_config", {"1": {"a": 5}}, {"1": {"a": 5}, "5": {"a": 5}}),
        ("moe_layer_pattern", [0, 1], [0, 1]),  # a rhythm of no and yes
        ("eos_token_id", [1, 2, 3, 4], [1, 2, 3, 4]),
        ("id2label", {"0": "no", "1": "yes"}, {"0": "no", "1": "yes"}),
        ("architectures", ["ForCausalLM"], ["ForCausalLM"]),
        ("layers", 4, 4),
    ],
)
def test_values_of_layers_follow_them_and_others_stay(key: str, value: Any, followed: Any) -> None:
    assert follow_layers(key, value, STACKED, 4) == followed


def test_layers_that_are_dropped_take_their_values_with_them() -> None:
    assert follow_layers("layer_types", ["a", "b", "c", "d"], (0, 2), 4) == ["a", "c"]
    assert follow_layers("mlp_only_layers", [1, 2], (0, 2), 4) == [1]
    assert follow_layers("per_layer_config", {"1": "x", "2": "y"}, (0, 2), 4) == {"1": "y"}


@pytest.mark.parametrize("key", ["mrope_section", "rope_scaling_factors"])
def test_a_short_list_may_have_its_length_by_chance(key: str) -> None:
    assert follow_layers(key, [16, 24, 24], (0, 1, 2, 0), 3) == [16, 24, 24]


@pytest.mark.parametrize(
    ("key", "value", "repeats"),
    [
        ("embed_dim", 64, True),
        ("hidden_size", 64, False),  # it is the size itself
        ("intermediate_size", 64, False),
        ("head_dim", 64, False),
        ("embed_dim", 32, False),
        ("vision_config.hidden_size", 64, False),
        ("vision_config.out_hidden_size", 64, True),
    ],
)
def test_a_size_repeats_the_hidden_size_by_value_and_by_name(key: str, value: int, repeats: bool) -> None:
    assert repeats_hidden(key, value, 64) is repeats
