"""Tiny twins of the library's classes, and what they show of their parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from outgrow.model.base.errors import UserError
from outgrow.model.build import known_size
from outgrow.model.matrices import parameters_of
from outgrow.model.twin import layerless, tiny_twin

KINDS = {
    "llama": {
        "model.layers.*.self_attn.q_proj.weight": "matrix",
        "model.norm.weight": "other",
        "lm_head.weight": "matrix",
    },
    "gpt2": {
        "transformer.h.*.attn.c_attn.weight": "matrix",
        "transformer.wpe.weight": "embedding",
        "transformer.wte.weight": "embedding",
    },
    "mixtral": {
        "model.layers.*.mlp.experts.down_proj": "matrices",
        "model.layers.*.mlp.gate.weight": "matrix",
    },
    "gpt_oss": {
        "model.layers.*.mlp.experts.gate_up_proj": "matrices",
        "model.layers.*.mlp.experts.gate_up_proj_bias": "other",
    },
    "mamba": {
        "backbone.layers.*.mixer.A_log": "other",
        "backbone.layers.*.mixer.conv1d.weight": "convolution",
        "backbone.layers.*.mixer.in_proj.weight": "matrix",
    },
}


def config_of(name: str) -> dict[str, object]:
    return CONFIG_MAPPING[name]().to_dict()


@pytest.mark.parametrize("name", KINDS)
def test_what_a_class_does_with_its_parameters(name: str) -> None:
    seen = parameters_of(config_of(name))
    assert {pattern: seen[pattern].kind for pattern in KINDS[name]} == KINDS[name]


@pytest.mark.parametrize(
    ("name", "pattern", "reads"),
    [
        ("llama", "model.layers.*.mlp.down_proj.weight", (1,)),
        ("gpt2", "transformer.h.*.mlp.c_proj.weight", (0,)),  # its Conv1D has inputs first
        ("mixtral", "model.layers.*.mlp.experts.down_proj", (2,)),
        ("gpt_oss", "model.layers.*.mlp.experts.down_proj", (1,)),
    ],
)
def test_the_axes_that_are_summed_over(name: str, pattern: str, reads: tuple[int, ...]) -> None:
    assert parameters_of(config_of(name))[pattern].reads == reads


def test_a_tower_that_text_does_not_reach_is_unused() -> None:
    seen = parameters_of(config_of("llama4"))
    assert {parameter.kind for name, parameter in seen.items() if "vision" in name} == {"unused"}


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "helium",
        "deepseek_v3",
        "gemma4",
        "falcon_mamba",
        "zamba2",
        "dots3_note_text",
        "nemotron_h",
        "zamba",
    ],
)
def test_a_twin_is_small_and_runs_as_the_library_builds_it(name: str) -> None:
    before = torch.random.get_rng_state()
    twin = tiny_twin(config_of(name))
    model = twin.build()
    assert model.config.model_type == name
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    with torch.no_grad():
        assert model(input_ids=twin.tokens(2, 24), use_cache=False).logits.isfinite().all()
    assert torch.equal(torch.random.get_rng_state(), before)


INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
IN_CHUNKS = {
    "is_decoder": True,
    "axial_pos_embds": False,
    "num_buckets": 4,
    "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 4,
}


@pytest.mark.parametrize(("name", "said"), [("qwen4_exp_text", INDEXED), ("reformer", IN_CHUNKS)])
def test_a_class_that_says_nothing_by_default_has_a_twin_of_what_a_checkpoint_says(
    name: str, said: dict[str, object]
) -> None:
    twin = tiny_twin(CONFIG_MAPPING[name](**said).to_dict())
    assert not twin.own
    with torch.no_grad():
        assert twin.build()(input_ids=twin.tokens(2, 24), use_cache=False).logits.isfinite().all()


def test_configs_that_differ_in_sizes_share_their_twin() -> None:
    small, large = ({**config_of("phi"), "hidden_size": size} for size in (512, 1024))
    assert tiny_twin(small) is tiny_twin(large)
    assert tiny_twin({**small, "qk_layernorm": True}) is not tiny_twin(small)


def test_a_class_without_a_twin_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="no hidden size and no layer count"):
        tiny_twin(config_of("musicgen"))
    with pytest.raises(UserError, match="no causal language model of type 'vit'"):
        tiny_twin(config_of("vit"))


def test_a_layer_number_is_left_out_of_a_name() -> None:
    assert layerless("model.layers.17.mlp.experts.down_proj") == "model.layers.*.mlp.experts.down_proj"
    assert layerless("h.3.mlp.experts.1.w1.weight") == "h.*.mlp.experts.*.w1.weight"


@pytest.mark.parametrize(
    ("config", "name", "size"),
    [
        ({"model_type": "gpt2"}, "vocab_size", 50257),
        ({"model_type": "gpt2", "n_positions": 40}, "max_position_embeddings", 40),
        ({"model_type": "gemma3", "text_config.model_type": "gemma3_text"}, "vocab_size", 262208),
        ({"model_type": "mamba"}, "max_position_embeddings", None),
        ({"model_type": "phi", "vocab_size": 7}, "vocab_size", 7),
    ],
)
def test_a_size_that_a_config_leaves_out_is_the_classs_own(
    config: dict[str, object], name: str, size: int | None
) -> None:
    assert known_size(config, name) == size
