"""Growth of checkpoints whose language model stands beside other towers: the text model grows, the others
stay, pictures included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from outgrow.growth import grow, grow_model, plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model, to_hf_config
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.composite import flat
from outgrow.model.derive import with_picture

TEXT = {
    "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 3, "intermediate_size": 24,
    "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
EYES = {
    "hidden_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 20,
    "image_size": 28,
    "patch_size": 7,
}
COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "vision_config": EYES,
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
    },
    # whose causal class takes the text model alone; every other layer has experts, the last does not turn
    # positions
    "llama4": {
        "text_config": TEXT
        | {"intermediate_size_mlp": 28, "num_local_experts": 3, "moe_layers": [1], "no_rope_layers": [1, 1, 0], "attention_chunk_size": 4},
        "vision_config": EYES
        | {"hidden_size": 16, "intermediate_size": 64, "vision_output_dim": 14, "projector_input_dim": 14, "projector_output_dim": 14},
        "image_token_index": 60,
    },
    "qwen3_5": {  # whose picture tower says how wide its output is; two layers of three are linear attention
        "text_config": TEXT
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 6}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        "vision_config": {
            "depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 20, "patch_size": 4, "out_hidden_size": 16,
            "num_position_embeddings": 16,
        },
        "image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57,
    },
}  # fmt: skip
TOWERS = {"gemma3": "vision_tower", "llama4": "vision_model", "qwen3_5": "model.visual.blocks"}


def config_of(name: str) -> dict[str, Any]:
    return to_hf_config({"model_type": name, **COMPOSITE[name]}).to_dict()


def tokens() -> torch.Tensor:
    return torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(5))


def logits_of(folder: Path) -> list[torch.Tensor]:
    """On tokens, as anybody loads the model; then with a picture among them."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    causal: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)
    whole = load_model(folder, dtype="float64", attention="eager").eval()
    pictured = with_picture(whole, tokens())
    assert pictured is not None
    with torch.no_grad():
        return [causal.eval()(tokens()).logits, whole(**pictured).logits]


GROWN: list[tuple[str, dict[str, Any], str]] = [
    (
        "gemma3",
        {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 31},
        "identity",
    ),
    ("gemma3", {"text_config": {"hidden_size": 32, "num_hidden_layers": 5}}, "identity"),
    (
        "llama4",
        {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4},
        "identity_top",
    ),
    ("qwen3_5", {"text_config.hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 5}, "identity"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target", "depth"), GROWN, ids=str)
def test_the_text_model_grows_and_what_is_around_it_stays(
    tmp_path: Path, checkpoint_maker: Any, name: str, target: dict[str, Any], depth: str
) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of(name))
    grown = grow(source, tmp_path / "out", target=target, depth=depth, noise=0.2)
    assert grown.certificate.lossless, grown.certificate.reasons
    assert any("with a picture among them" in note for note in grown.plan.notes)
    for before, after in zip(logits_of(source), logits_of(grown.folder), strict=True):
        assert before.abs().max() > 0.1
        assert (after - before).abs().max() <= 2e-5 * max(1, before.abs().max())
    asked = flat(target)
    written = json.loads((grown.folder / "config.json").read_text())
    assert {key: written["text_config"][key] for key in asked} == asked
    before, after = (
        to_hf_config(json.loads((folder / "config.json").read_text())).to_dict()
        for folder in (source, grown.folder)
    )
    assert after.pop("text_config") != before.pop("text_config")
    if name == "qwen3_5":
        before["vision_config"]["out_hidden_size"] = 24
    assert after == before
    with Checkpoint(source) as small, Checkpoint(grown.folder) as large:
        towers = [tensor for tensor in small.tensors if tensor.startswith(TOWERS[name])]
        assert len(towers) > 10
        assert all((small.read(tensor) == large.read(tensor)).all() for tensor in towers)
        assert {tensor for tensor in large.tensors if tensor.startswith(TOWERS[name])} == set(towers)


@pytest.mark.slow
def test_whole_layers_are_copied_and_lists_of_layers_follow(tmp_path: Path, checkpoint_maker: Any) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of("gemma3"))
    grown = grow(source, tmp_path / "out", target={"num_hidden_layers": 5}, depth=[0, 1, 1, 2, 2])
    written = json.loads((grown.folder / "config.json").read_text())
    assert written["text_config"]["layer_types"] == [
        ["sliding_attention", "full_attention"][kind] for kind in (0, 1, 1, 0, 0)
    ]
    assert written["vision_config"]["num_hidden_layers"] == 3
    with Checkpoint(source) as small, Checkpoint(grown.folder) as large:
        name = "language_model.model.layers.{}.self_attn.q_proj.weight"
        for number, layer in enumerate([0, 1, 1, 2, 2]):
            assert (large.read(name.format(number)) == small.read(name.format(layer))).all()
    AutoModelForCausalLM.from_pretrained(grown.folder)


@pytest.mark.slow
def test_the_plan_says_what_the_projector_writes() -> None:
    lines = plan(config_of("gemma3"), {"hidden_size": 24}).family.schema.splitlines()
    assert "multi_modal_projector.mm_input_projection_weight  tensor 12, residual" in lines
    assert "multi_modal_projector.mm_soft_emb_norm.weight  tensor 12" in lines


@pytest.mark.slow
def test_a_config_as_the_hub_has_it_says_little_and_is_completed() -> None:
    """Gemma 3's 4B: no vocabulary, no heads, no layer_types in its text_config."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    eyes = {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
    }
    eyes |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    config = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": eyes,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
    }
    made = plan(config, {"hidden_size": 5120, "num_hidden_layers": 40})
    assert made.certificate.lossless, made.certificate.reasons
    assert made.source_parameters == 4_300_079_472
    shapes = {step.name: step.shape for step in made.steps}
    assert shapes["language_model.model.layers.39.mlp.down_proj.weight"] == (5120, 10240)
    assert shapes["multi_modal_projector.mm_input_projection_weight"] == (1152, 5120)
    assert shapes["vision_tower.encoder.layers.26.mlp.fc1.weight"] == (4304, 1152)


@pytest.mark.slow
def test_a_projector_that_no_picture_went_through_grows_by_whole_factors_alone() -> None:
    """Mllama's cross-attention reads what its projector writes without a norm in between."""
    text = TEXT | {"num_key_value_heads": 2, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    del text["head_dim"]  # which its class does not know
    eyes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 24,
    }
    eyes |= {"image_size": 28, "patch_size": 14, "intermediate_layers_indices": [1], "vision_output_dim": 32}
    config = to_hf_config({"model_type": "mllama", "text_config": text, "vision_config": eyes}).to_dict()
    with pytest.raises(
        UserError, match=r"hidden_size grows by whole factors alone, since no forward pass here"
    ):
        plan(config, {"hidden_size": 24, "num_attention_heads": 3})
    made = plan(config, {"hidden_size": 32, "num_attention_heads": 4})
    assert made.certificate.lossless
    assert any(note.startswith("not tested: language_model.model.layers.1.cross_attn") for note in made.notes)


@pytest.mark.slow
def test_a_projector_that_computes_in_the_text_models_width_is_seen_with_a_picture() -> None:
    """LLaVA's has an activation between two matrices as wide as the text model: copies pass through it,
    residues' scale does not."""
    config = {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": EYES | {"model_type": "clip_vision_model"},
    }
    config = to_hf_config({"model_type": "llava", **config, "image_token_index": 60}).to_dict()
    with pytest.raises(UserError, match="the logits of a tiny random model move by"):
        plan(config, {"hidden_size": 24})
    made = plan(config, {"hidden_size": 32})
    assert made.certificate.lossless
    assert "with a picture among them" in made.notes[1]


@pytest.mark.slow
def test_a_file_with_the_names_of_an_older_library(tmp_path: Path, checkpoint_maker: Any) -> None:
    """As on the hub: today's library calls the picture tower's tensors otherwise, and knows the older names
    when it loads."""
    source = checkpoint_maker(tmp_path / "source", config_of("gemma3"))
    before = logits_of(source)
    tensors = load_file(source / "model.safetensors")
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in tensors.items()
    }
    save_file(older, source / "model.safetensors", metadata={"format": "pt"})
    grown = grow(source, tmp_path / "out", target={"hidden_size": 32, "num_hidden_layers": 4})
    assert {step.name for step in grown.plan.steps if step.tensor.layer != 3} == set(older)
    for now, then in zip(logits_of(grown.folder), before, strict=True):
        assert (now - then).abs().max() <= 2e-5 * max(1, then.abs().max())


@pytest.mark.slow
def test_in_memory_as_on_disk(tmp_path: Path, checkpoint_maker: Any) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of("llama4"))
    grown = grow(source, tmp_path / "out", target={"hidden_size": 24}, noise=0.2)
    model = grow_model(load_model(source, dtype="float64"), {"hidden_size": 24}, noise=0.2)
    on_disk = load_model(grown.folder, dtype="float64").state_dict()
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in model.state_dict().items())
