"""Fresh entries of families without a schema here: as the class itself starts them, tensor by tensor, at the
sizes of the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from outgrow.growth import grow, plan
from outgrow.model.build import build_model, to_hf_config
from outgrow.model.derive import stored
from outgrow.model.derive.starts import starts
from tests.conftest import make_checkpoint

TINY = {
    "vocab_size": 97,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
}
CLASSES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    "mamba2": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "rescale_prenorm_residual": True},
    "mamba": {"hidden_size": 32, "state_size": 8, "time_step_rank": 6},
    "recurrent_gemma": {"hidden_size": 32, "num_attention_heads": 4, "lru_width": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    "qwen3_next": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "modernbert-decoder": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24, "pad_token_id": 3},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64},
    "apertus": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24},
    "data2vec-text": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "is_decoder": True, "pad_token_id": 1},
}  # fmt: skip


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return to_hf_config({"model_type": name, **TINY, **CLASSES[name], **changes}).to_dict()


def sampled(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The entries that the class itself draws, of every tensor of the file, under several seeds: (seed,
    …)."""
    files = [stored(build_model(config, seed=seed, attention="eager")) for seed in range(20, 26)]
    return {
        name: torch.stack([file[name].detach().double() for file in files])
        for name in files[0]
        if files[0][name].is_floating_point()
    }


def agree(found: np.ndarray, expected: torch.Tensor, name: str) -> None:
    """The deviation within a fiftieth, or what its number of entries lets one know; the mean within five such
    errors."""
    count, deviation = min(found.size, expected.numel()), float(expected.std())
    assert float(found.std()) == pytest.approx(deviation, rel=0.02 + 4 / count**0.5, abs=1e-7), name
    assert float(found.mean()) == pytest.approx(
        float(expected.mean()), abs=0.01 * deviation + 6 * deviation / count**0.5 + 1e-7
    ), name


@pytest.mark.parametrize("name", CLASSES)
def test_starts_are_those_of_the_class(name: str) -> None:
    known = starts(config := config_of(name, tie_word_embeddings=False))
    for tensor_name, expected in sampled(config).items():
        start = known[tensor_name]
        if start.places is not None:
            assert np.allclose(start.places, expected[0].numpy(), atol=1e-6), tensor_name
        else:
            agree(start.quantiles, expected, tensor_name)


@pytest.mark.slow
def test_starts_take_the_sizes_of_the_model_and_not_of_a_twin() -> None:
    """Mamba's projections: uniform within 1/√fan-in, divided by √layers where they write to the residual
    stream."""
    known = starts(config_of("mamba2", hidden_size=128, head_dim=64, num_hidden_layers=8))
    assert known["backbone.layers.7.mixer.out_proj.weight"].deviation == pytest.approx(
        (3 * 256 * 8) ** -0.5, rel=1e-4
    )
    assert known["backbone.layers.0.mixer.in_proj.weight"].deviation == pytest.approx(0.05, rel=1e-3)


def test_a_normal_start_is_told_from_others() -> None:
    known = starts(config_of("mamba2"))
    assert known["backbone.embeddings.weight"].normal == (0.0, 0.05)
    assert known["backbone.layers.0.mixer.out_proj.weight"].normal is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "target"),
    [
        (
            "mixtral",
            {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 48},
        ),
        ("mamba2", {"hidden_size": 64, "num_heads": 8, "num_hidden_layers": 4}),
        ("modernbert-decoder", {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 48}),
    ],
)
def test_scratch_starts_a_derived_family_as_its_class_does(
    tmp_path: Path, name: str, target: dict[str, int], dtype: str
) -> None:
    source = make_checkpoint(tmp_path / "source", config_of(name), dtype=dtype)
    made = grow(source, tmp_path / "out", target=target, operator="scratch", receipt=False, seed=3).plan
    mine, theirs = (
        load_file(tmp_path / "out" / "model.safetensors"),
        sampled({**made.target_config, "dtype": "float32"}),
    )
    for tensor_name, expected in theirs.items():
        found, start = mine[tensor_name].double(), made.starts[tensor_name]
        if start.places is not None or start.deviation == 0:
            assert torch.allclose(found, expected[0], rtol=1e-2 if dtype == "bfloat16" else 1e-6), tensor_name
        else:
            agree(found.numpy(), expected, tensor_name)


@pytest.mark.slow
def test_fresh_entries_take_the_values_of_their_place(tmp_path: Path) -> None:
    """Mamba 2's A_log counts its heads: those that are added go on counting, and no norm scale is drawn."""
    source = make_checkpoint(tmp_path / "source", config_of("mamba2"))
    grow(
        source,
        tmp_path / "out",
        target={"hidden_size": 64, "num_heads": 8},
        operator="random_pad",
        receipt=False,
    )
    found, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", source))
    name = "backbone.layers.0.mixer.A_log"
    assert torch.equal(found[name][:4], kept[name])
    assert torch.allclose(found[name][4:], torch.log(torch.arange(5.0, 9.0)).double())
    assert torch.equal(found["backbone.norm_f.weight"][32:], torch.ones(32).double())


@pytest.mark.slow
def test_a_plan_that_draws_nothing_asks_for_no_starts() -> None:
    assert not plan(config_of("mixtral"), {"intermediate_size": 48}).starts
