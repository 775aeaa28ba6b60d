"""Growth of checkpoints whose language model stands beside other towers: the text model grows, the others stay, pictures included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from growth import grow, plan
from model.build import load_model, to_hf_config
from model.checkpoint import Checkpoint
from model.derive.pictures import with_picture

TEXT = {
    "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 3, "intermediate_size": 24,
    "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
EYES = {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 20, "image_size": 28, "patch_size": 7}
COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "vision_config": EYES,
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
    },
}


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
    ("gemma3", {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 31}, "identity"),
    ("gemma3", {"text_config": {"hidden_size": 32, "num_hidden_layers": 5}}, "identity"),
]


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
    asked = target.get("text_config", target)
    written = json.loads((grown.folder / "config.json").read_text())
    assert {key: written["text_config"][key] for key in asked} == asked
    before, after = (to_hf_config(json.loads((folder / "config.json").read_text())).to_dict() for folder in (source, grown.folder))
    assert after.pop("text_config") != before.pop("text_config")
    assert after == before
    with Checkpoint(source) as small, Checkpoint(grown.folder) as large:
        towers = [name for name in small.tensors if name.startswith("vision_tower")]
        assert len(towers) > 10
        assert all((small.read(name) == large.read(name)).all() for name in towers)
        assert {name for name in large.tensors if name.startswith("vision_tower")} == set(towers)


def test_whole_layers_are_copied_and_lists_of_layers_follow(tmp_path: Path, checkpoint_maker: Any) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of("gemma3"))
    grown = grow(source, tmp_path / "out", target={"num_hidden_layers": 5}, depth=[0, 1, 1, 2, 2])
    written = json.loads((grown.folder / "config.json").read_text())
    assert written["text_config"]["layer_types"] == [["sliding_attention", "full_attention"][kind] for kind in (0, 1, 1, 0, 0)]
    assert written["vision_config"]["num_hidden_layers"] == 3
    with Checkpoint(source) as small, Checkpoint(grown.folder) as large:
        name = "language_model.model.layers.{}.self_attn.q_proj.weight"
        for number, layer in enumerate([0, 1, 1, 2, 2]):
            assert (large.read(name.format(number)) == small.read(name.format(layer))).all()
    AutoModelForCausalLM.from_pretrained(grown.folder)


def test_the_plan_says_what_the_projector_writes() -> None:
    lines = plan(config_of("gemma3"), {"hidden_size": 24}).family.schema.splitlines()
    assert "multi_modal_projector.mm_input_projection_weight  tensor 12, residual" in lines
    assert "multi_modal_projector.mm_soft_emb_norm.weight  tensor 12" in lines
