"""Exactness at the edges: epsilons that norms share, layers that differ in kind, weights that are not finite or too large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from growth import grow, plan
from growth.door import compose_config
from model.build import load_model
from model.errors import UserError
from tests.conftest import random_model
from tests.test_growth_families import config_of

WIDER = {"hidden_size": 48, "head_dim": 8}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def saved(folder: Path, config: dict[str, Any], **changes: torch.Tensor) -> Path:
    """A random checkpoint, some tensors replaced."""
    random_model(config).save_pretrained(folder)
    save_file(tensors(folder) | changes, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- norms that share an epsilon ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "shared"),
    [
        ("qwen3", {}, ["q_norm", "k_norm"]),
        ("olmo2", {}, ["q_norm", "k_norm"]),
        ("phi", {"qk_layernorm": True}, ["q_layernorm", "k_layernorm"]),
        ("llama", {}, []),
        ("phi", {}, []),
    ],
)
def test_lemon_is_lossless_only_where_no_other_norm_has_its_epsilon(name: str, change: dict[str, Any], shared: list[str]) -> None:
    config = config_of(name) | change | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config |= {"num_key_value_heads": 4} if name == "phi" else {}
    target = {"hidden_size": 48} if name != "phi" else {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8}
    reasons = plan(config, target, "lemon").certificate.reasons
    assert len(reasons) == len(shared), reasons
    assert all(f"{norm}: normalises over" in reason for norm, reason in zip(shared, reasons, strict=True))
    assert plan(config, target | {"hidden_size": 64} | ({"num_attention_heads": 8} if name == "phi" else {}), "lemon").certificate.lossless
    assert plan(config, target, "lossless").certificate.lossless


def test_small_queries_show_that_a_shared_epsilon_is_not_lossless(tmp_path: Path) -> None:
    config = config_of("qwen3") | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    small = {
        name: 0.002 * tensor for name, tensor in tensors(saved(tmp_path / "s", config)).items() if "q_proj" in name or "k_proj" in name
    }
    source = saved(tmp_path / "source", config, **small)
    moved = [grow(source, tmp_path / operator, target=WIDER, operator=operator).receipt for operator in ("lossless", "lemon")]
    relative = [receipt.max_delta / receipt.max_logit for receipt in moved if receipt is not None]
    assert relative[0] < 1e-5 < 1e-4 < relative[1]


@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_lemon_is_refused_its_certificate_where_no_key_sets_the_epsilon(name: str) -> None:
    if name == "opt":
        made = plan(config_of(name), {"hidden_size": 36, "num_attention_heads": 6}, "lemon")
    else:
        from transformers import MixtralConfig

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        made = plan(MixtralConfig(vocab_size=96, num_hidden_layers=2, num_local_experts=2, **sizes).to_dict(), {"hidden_size": 48}, "lemon")
    assert any("no config key is known that sets their epsilon" in reason for reason in made.certificate.reasons)


# ---- families at the edges ------------------------------------------------------------------------------------------------------------

NEMOTRON = {
    "model_type": "nemotron", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hidden", [48, 64])
def test_a_bias_beside_a_scale_that_is_stored_minus_one_is_stored_as_it_is(tmp_path: Path, tied: bool, hidden: int) -> None:
    source = saved(tmp_path / "source", NEMOTRON | {"tie_word_embeddings": tied})
    grown = grow(source, tmp_path / "out", target={"hidden_size": hidden, "head_dim": 8})
    assert grown.certificate.lossless
    assert grown.receipt is not None
    assert grown.receipt.max_delta < 1e-12


def test_new_rows_come_from_the_next_layer_of_the_same_kind(tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig

    sizes = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 2}
    source = saved(tmp_path / "source", Qwen2MoeConfig(vocab_size=96, num_hidden_layers=4, **sizes, **more).to_dict())
    made = grow(source, tmp_path / "out", target={"intermediate_size": 80}, operator="bert2bert_aki", receipt=False).plan
    following = {step.name: step.next_source for step in made.steps if step.next_source}
    assert following["model.layers.0.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight", "layers 1 and 3 have experts instead"
    assert following["model.layers.2.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight", "no other one is left"
    old, new = tensors(source), tensors(tmp_path / "out")
    rows = new["model.layers.0.mlp.up_proj.weight"][40:]
    choices = torch.cdist(rows, old["model.layers.2.mlp.up_proj.weight"])
    assert (choices.min(1).values < 1e-6).all()


# ---- weights that are not finite, or too large ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is_under_noise(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    random_model(config_of("llama")).to(dtype).save_pretrained(tmp_path / "source")
    held = tensors(tmp_path / "source")
    held[name][1, 2] = value
    save_file(held, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    double = {"intermediate_size": 2 * held[name].shape[1]}
    grow(tmp_path / "source", tmp_path / "out", target=double, noise=0.5, nonfinite="allow", receipt=False)
    strange = ~torch.isfinite(tensors(tmp_path / "out")[name])
    assert strange.sum() == 2, "the entry and its copy"
    assert strange[1].sum() == 2


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_what_is_too_large_for_float16_once_scaled_is_an_error_that_names_the_tensor(tmp_path: Path, noise: float) -> None:
    source = tmp_path / "source"
    random_model(config_of("phi")).to(torch.float16).save_pretrained(source)
    held = tensors(source)
    held["model.layers.0.mlp.fc2.weight"][3, 1] = 60_000.0
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    wider = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6}  # of 24: writers × 1.22
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.fc2\.weight: a grown entry is infinite where the source is finite"):
        grow(source, tmp_path / "out", target=wider, noise=noise, receipt=False)
    assert not (tmp_path / "out").exists()
    held["model.layers.0.mlp.fc2.weight"][3, 1] = 600.0
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    grow(source, tmp_path / "out", target=wider, noise=noise, receipt=False)


# ---- operators that are what they say -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hyperclone_noisy", "hyperclone_noisy_diagonal"])
def test_noisy_hyperclones_are_ten_decibels_below_and_leave_the_head(tmp_path: Path, form: str) -> None:
    from growth.__main__ import CONF

    leaf = compose_config(CONF, "grow", [f"growth={form}"])[0]["growth"]
    source = saved(tmp_path / "source", config_of("llama") | {"tie_word_embeddings": False})
    sizes = {key: 2 * config_of("llama")[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")}
    how: dict[str, Any] = {"target": sizes, "operator": "hyperclone", "form": leaf["form"], "receipt": False}
    quiet, noisy = (tensors(grow(source, tmp_path / f"{noise}", noise=noise, **how).folder) for noise in (0.0, float(leaf["noise"])))
    assert torch.equal(noisy["lm_head.weight"], quiet["lm_head.weight"])
    name = "model.layers.0.mlp.down_proj.weight"
    added = (noisy[name] - quiet[name])[:, : noisy[name].shape[1] // 2].double()
    signal = tensors(source)[name].double() / 2
    decibels = 20 * torch.log10(signal.square().mean().sqrt() / added.square().mean().sqrt())
    assert float(decibels) == pytest.approx(10, abs=0.3)


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])
def test_zero_pad_never_learns_in_its_new_entries(tmp_path: Path, name: str) -> None:
    config, wide = config_of(name), {"n_inner": 80} if name == "gpt2" else {"intermediate_size": 80}
    random_model(config).save_pretrained(tmp_path / "source")
    hidden = {"n_embd": 48, "n_head": 8} if name == "gpt2" else {"hidden_size": 48, "num_attention_heads": 8}
    kv = {"phi": {"num_key_value_heads": 8}, "llama": {"num_key_value_heads": 4, "head_dim": 6}}.get(name, {})
    grow(tmp_path / "source", tmp_path / "out", target=wide | hidden | kv, operator="zero_pad", receipt=False)
    model = load_model(tmp_path / "out", dtype="float64", attention="eager")
    tokens = torch.arange(24).reshape(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    old = dict(load_model(tmp_path / "source", dtype="float64").named_parameters())
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        new = np.ones(parameter.shape, bool)
        new[tuple(slice(0, size) for size in old[parameter_name].shape)] = False
        through_mean = ("wte", "wpe", "embed", "dense", "fc2", "c_proj") if name != "llama" else ()  # LayerNorm's, which reaches writers
        apart = ("c_attn",)  # whose parts each have a corner of their own
        if not any(part in parameter_name for part in (*through_mean, *apart)):
            assert (parameter.grad.numpy()[new] == 0).all(), parameter_name
