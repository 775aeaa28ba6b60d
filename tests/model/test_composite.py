"""Composite configs: flat inside, nested at the doors."""

from __future__ import annotations

from typing import Any

import pytest

from outgrow.model.composite import flat, nested

NESTED: dict[str, Any] = {
    "model_type": "gemma3",
    "image_token_index": 9,
    "tie_word_embeddings": True,
    "audio_config": None,
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 8,
        "tie_word_embeddings": False,
        "rope_parameters": {"full": {"x": 2}},
    },
    "vision_config": {
        "model_type": "siglip",
        "hidden_size": 6,
        "rope.scale": 1,
        "deeper_config": {"depth": 1},
    },
}
FLAT = {
    "model_type": "gemma3",
    ".image_token_index": 9,
    ".tie_word_embeddings": True,
    ".audio_config": None,
    "text_config.model_type": "gemma3_text",
    "hidden_size": 8,
    "tie_word_embeddings": False,
    "rope_parameters": {"full": {"x": 2}},
    "vision_config.model_type": "siglip",
    "vision_config.hidden_size": 6,
    "vision_config.rope.scale": 1,
    "vision_config.deeper_config": {"depth": 1},
}


def test_the_flat_view_of_a_composite_config_and_the_way_back() -> None:
    assert flat(NESTED) == FLAT
    assert nested(FLAT) == NESTED
    assert flat(FLAT) == FLAT
    assert nested(NESTED) == NESTED


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "llama",
            "hidden_size": 8,
            "rope_parameters": {"factor": 2},
            "quantization_config": {"bits": 4},
        },
        {"model_type": "mine", "text_config": None},
        {},
    ],
)
def test_any_other_config_is_its_own_flat_view(config: dict[str, Any]) -> None:
    assert flat(config) == nested(config) == config


@pytest.mark.parametrize(
    "config",
    [
        # as some files leave the text model's type out
        {"model_type": "mine", "text_config": {"hidden_size": 8}},
        {"model_type": "mine", "text_config": {"a.b": 1, "model_type": "own"}, "c.d": 2, "empty_config": {}},
    ],
)
def test_odd_keys_come_back(config: dict[str, Any]) -> None:
    assert nested(flat(config)) == config


def test_overrides_are_spelled_with_or_without_the_text_models_name() -> None:
    asked = {"hidden_size": 16, "vision_config.hidden_size": 6}
    assert flat({"text_config": {"hidden_size": 16}, "vision_config": {"hidden_size": 6}}) == asked
    assert flat({"text_config.hidden_size": 16, "vision_config.hidden_size": 6}) == asked
    assert flat(asked) == asked
