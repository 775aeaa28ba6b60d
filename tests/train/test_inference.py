"""The memory of writing text and the bound on a token's time, against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.models import TINY
from outgrow.model.presets import preset
from outgrow.model.twin import tiny_twin
from outgrow.train.compose import compose
from outgrow.train.machine.device import BANDWIDTH, PEAK_BF16_FLOPS, named
from outgrow.train.machine.forecast import FILLED, GIB, forecast, largest_micro_batch
from outgrow.train.machine.inference import cache_bytes, inference_memory, least_seconds_per_token

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
CONTEXT, LAYERS, HEAD = 32, 3, 8
PHI = {"model_type": "phi", **TINY, "num_key_value_heads": 3, "tie_word_embeddings": False}
GROUPED = {"model_type": "llama", **TINY, "num_attention_heads": 3, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("config", "tokens", "heads"),
    [
        (PHI, CONTEXT, 3),
        (GROUPED, CONTEXT, 1),
        # the library keeps what the next token's window sees beside that token itself
        ({**GROUPED, "model_type": "mistral", "sliding_window": 10}, 10 - 1, 1),
    ],
    ids=["all heads", "grouped queries", "sliding window"],
)
def test_the_cache_is_two_entries_for_each_token_layer_head_and_place(
    config: dict[str, Any], tokens: int, heads: int
) -> None:
    assert cache_bytes(config, CONTEXT) == 2 * LAYERS * tokens * heads * HEAD * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jetmoe", "phimoe"])
def test_the_cache_of_a_class_that_asks_for_values_is_counted_too(kind: str) -> None:
    """Its experts loop over the tokens that chose them."""
    config = tiny_twin({"model_type": kind}).config
    heads = config["num_key_value_heads"]
    width = config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"]
    entries = 2 * config["num_hidden_layers"] * heads * width
    assert cache_bytes(config, CONTEXT) == entries * CONTEXT * 2


@pytest.mark.slow
def test_a_state_is_as_large_after_any_context() -> None:
    config = {
        "model_type": "mamba",
        "vocab_size": 96,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "state_size": 4,
    }
    # layers × inner width × (a convolution of 4 in float16, a state of 4 that the library keeps in float32)
    assert cache_bytes(config, 5) == cache_bytes(config, 9) == 3 * 48 * (4 * 2 + 4 * 4)


def test_memory_and_bound_of_a_token_by_hand() -> None:
    hidden, inner, words = 24, 40, 96
    matrices = LAYERS * (4 * hidden * hidden + 2 * hidden * inner) + hidden * words  # the last: the head
    biases = LAYERS * (4 * hidden + inner + hidden + 2 * hidden) + 2 * hidden + words
    memory = inference_memory(PHI, CONTEXT)
    assert memory.weights == 2 * (matrices + biases + words * hidden)  # and the embeddings
    assert memory.cache == 2 * LAYERS * CONTEXT * hidden * 2
    assert memory.total == memory.weights + memory.cache + 0.3e9
    assert least_seconds_per_token(PHI, memory.cache, 1e9) == (2 * matrices + memory.cache) / 1e9


@pytest.mark.slow
def test_phi_1_5_beside_its_report() -> None:
    """Published (arXiv 2309.05463, table 1): 3.5 GB at 2,048 tokens, less than 3 ms a token on an A100-80GB."""
    config = preset("phi_1_5")
    memory = inference_memory(config, 2048)
    assert memory.cache == 2 * 24 * 2048 * 2048 * 2
    assert f"{memory.total / 1e9:.1f}" == "3.5"
    bound = 1e3 * least_seconds_per_token(config, memory.cache, BANDWIDTH["A100"])
    assert f"Phi-1.5's bound is {bound:.2f} ms per token" in PAGE.read_text()


@pytest.mark.slow
def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    start = ["growth=scratch", "target=tiny_target", "forecast.gpus=1", "train.precision=bf16"]

    def needed(rows: int) -> float:
        sizes = [f"train.context={CONTEXT}", f"train.batch_tokens={2 * rows * CONTEXT}"]
        settings = compose([*start, *sizes, f"train.micro_batch={rows}"])
        return forecast(replace(settings, target=PHI)).memory.total

    room = (needed(5) + needed(6)) / 2 / FILLED / GIB
    assert largest_micro_batch(PHI, CONTEXT, room) == 5
    assert largest_micro_batch(PHI, CONTEXT, needed(1) / GIB) == 0  # a device is not filled to the last byte


@pytest.mark.parametrize(
    ("device", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-80GB", 2039e9),
        ("NVIDIA A100 80GB PCIe", 1935e9),
        ("NVIDIA A100-PCIE-40GB", 1555e9),
        ("NVIDIA H100 80GB HBM3", 3350e9),
        ("NVIDIA H100 PCIe", 2000e9),
        ("NVIDIA H100 NVL", 3900e9),
        ("NVIDIA L40S", 864e9),
        ("NVIDIA L4", 300e9),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_bandwidths_are_of_exact_names(device: str, bandwidth: float | None) -> None:
    assert named(BANDWIDTH, device) == bandwidth


def test_every_device_with_a_bandwidth_has_a_peak() -> None:
    assert all(named(PEAK_BF16_FLOPS, device) for device in BANDWIDTH)
