"""Exactness at the edges: epsilons that norms share, layers that differ in kind, weights that are not finite
or too large."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.families import config_of, renamed
from helpers.models import random_model
from outgrow.growth import grow, grow_model, plan
from outgrow.growth.layers import among_kinds
from outgrow.growth.operators import OPERATORS, default_noise
from outgrow.growth.recipe import Recipe
from outgrow.growth.record import recorded_plan
from outgrow.model.base.compose import compose_config
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model
from outgrow.model.family import families

WIDER = {"hidden_size": 48, "head_dim": 8}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def saved(folder: Path, config: dict[str, Any], **changes: torch.Tensor) -> Path:
    """A random checkpoint, some tensors replaced."""
    random_model(config).save_pretrained(folder)
    save_file(tensors(folder) | changes, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- norms that share an epsilon ---------------------------------------------------------------------------


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
def test_lemon_is_lossless_only_where_no_other_norm_has_its_epsilon(
    name: str, change: dict[str, Any], shared: list[str]
) -> None:
    config = (
        config_of(name)
        | change
        | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    )
    config |= {"num_key_value_heads": 4} if name == "phi" else {}
    target = (
        {"hidden_size": 48} if name != "phi" else {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8}
    )
    reasons = plan(config, target, "lemon").certificate.reasons
    assert len(reasons) == len(shared), reasons
    assert all(f"{norm}: normalises over" in reason for norm, reason in zip(shared, reasons, strict=True))
    assert plan(
        config, target | {"hidden_size": 64} | ({"num_attention_heads": 8} if name == "phi" else {}), "lemon"
    ).certificate.lossless
    assert plan(config, target, "lossless").certificate.lossless


@pytest.mark.slow
def test_small_queries_show_that_a_shared_epsilon_is_not_lossless(tmp_path: Path) -> None:
    config = config_of("qwen3") | {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    small = {
        name: 0.002 * tensor
        for name, tensor in tensors(saved(tmp_path / "s", config)).items()
        if "q_proj" in name or "k_proj" in name
    }
    source = saved(tmp_path / "source", config, **small)
    moved = [
        grow(source, tmp_path / operator, target=WIDER, operator=operator).receipt
        for operator in ("lossless", "lemon")
    ]
    relative = [receipt.max_delta / receipt.max_logit for receipt in moved if receipt is not None]
    assert relative[0] < 1e-5 < 1e-4 < relative[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_lemon_is_refused_its_certificate_where_no_key_sets_the_epsilon(name: str) -> None:
    if name == "opt":
        made = plan(config_of(name), {"hidden_size": 36, "num_attention_heads": 6}, "lemon")
    else:
        from transformers import MixtralConfig

        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        made = plan(
            MixtralConfig(vocab_size=96, num_hidden_layers=2, num_local_experts=2, **sizes).to_dict(),
            {"hidden_size": 48},
            "lemon",
        )
    assert any(
        "no config key is known that sets their epsilon" in reason for reason in made.certificate.reasons
    )


# ---- families at the edges ---------------------------------------------------------------------------------

NEMOTRON = {
    "model_type": "nemotron", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hidden", [48, 64])
def test_a_bias_beside_a_scale_that_is_stored_minus_one_is_stored_as_it_is(
    tmp_path: Path, tied: bool, hidden: int
) -> None:
    source = saved(tmp_path / "source", NEMOTRON | {"tie_word_embeddings": tied})
    grown = grow(source, tmp_path / "out", target={"hidden_size": hidden, "head_dim": 8})
    assert grown.certificate.lossless
    assert grown.receipt is not None
    assert grown.receipt.max_delta < 1e-12


@pytest.mark.slow
def test_new_rows_come_from_the_next_layer_of_the_same_kind(tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    }
    more = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 2,
    }
    source = saved(
        tmp_path / "source", Qwen2MoeConfig(vocab_size=96, num_hidden_layers=4, **sizes, **more).to_dict()
    )
    made = grow(
        source, tmp_path / "out", target={"intermediate_size": 80}, operator="bert2bert_aki", receipt=False
    ).plan
    following = {step.name: step.next_source for step in made.steps if step.next_source}
    assert following["model.layers.0.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight", (
        "layers 1 and 3 have experts instead"
    )
    assert following["model.layers.2.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight", (
        "no other one is left"
    )
    old, new = tensors(source), tensors(tmp_path / "out")
    rows = new["model.layers.0.mlp.up_proj.weight"][40:]
    choices = torch.cdist(rows, old["model.layers.2.mlp.up_proj.weight"])
    assert (choices.min(1).values < 1e-6).all()


# ---- weights that are not finite, or too large -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is_under_noise(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
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


MIXTURE = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 2}
# Operator and target, and the tensor whose entry [1, 2] is no number: it reaches a mean of rows and of columns
# (LayerNorm's residue), new tokens, and entries that are drawn anew like those that they replace.
MEANS = [
    ("phi", "lossless", {"hidden_size": 36, "num_attention_heads": 6}, "model.layers.0.mlp.fc2.weight"),
    ("phi", "lossless", {"hidden_size": 36, "num_attention_heads": 6}, "model.embed_tokens.weight"),
    ("llama", "lossless", {"vocab_size": 90}, "model.embed_tokens.weight"),
    ("llama", "drop_upcycle", MIXTURE, "model.layers.0.mlp.up_proj.weight"),
    ("llama", "drop_upcycle", MIXTURE, "model.layers.0.mlp.down_proj.weight"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "operator", "target", "tensor"), MEANS)
def test_a_mean_is_that_of_the_finite_entries(
    tmp_path: Path, name: str, operator: str, target: dict[str, Any], tensor: str, dtype: torch.dtype
) -> None:
    random_model(config_of(name)).to(dtype).save_pretrained(tmp_path / "source")
    held = tensors(tmp_path / "source")
    how: dict[str, Any] = {"operator": operator, "noise": 0.0, "nonfinite": "allow", "receipt": False}
    sound = tensors(grow(tmp_path / "source", tmp_path / "sound", target=target, **how).folder)
    held[tensor][1, 2] = float("nan")
    save_file(held, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    grown = tensors(grow(tmp_path / "source", tmp_path / "out", target=target, **how).folder)
    strange = {key: int((~torch.isfinite(values)).sum()) for key, values in grown.items()}
    copies = 1 if operator == "lossless" else 2
    assert sum(strange.values()) <= copies, strange
    for key, values in grown.items():  # a mean without one of its entries is near the mean
        finite = torch.isfinite(values)
        assert (values[finite] - sound[key][finite]).abs().max() < 0.2


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_what_is_too_large_for_float16_once_scaled_is_an_error_that_names_the_tensor(
    tmp_path: Path, noise: float
) -> None:
    source = tmp_path / "source"
    random_model(config_of("phi") | {"qk_layernorm": True}).to(torch.float16).save_pretrained(source)
    held = tensors(source)
    held["model.layers.0.mlp.fc2.weight"][3, 1] = 60_000.0
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    wider = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6}  # of 24: writers × 1.22
    with pytest.raises(
        UserError,
        match=r"model\.layers\.0\.mlp\.fc2\.weight: a grown entry is infinite where the source is finite",
    ):
        grow(source, tmp_path / "out", target=wider, noise=noise, receipt=False)
    assert not (tmp_path / "out").exists()
    held["model.layers.0.mlp.fc2.weight"][3, 1] = 600.0
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    grow(source, tmp_path / "out", target=wider, noise=noise, receipt=False)


# ---- operators that are what they say ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hyperclone_noisy", "hyperclone_noisy_diagonal"])
def test_noisy_hyperclones_are_ten_decibels_below_and_leave_the_head(tmp_path: Path, form: str) -> None:
    from outgrow.growth.__main__ import CONF

    leaf = compose_config(CONF, "grow", [f"growth={form}"])[0]["growth"]
    source = saved(tmp_path / "source", config_of("llama") | {"tie_word_embeddings": False})
    sizes = {
        key: 2 * config_of("llama")[key]
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    }
    how: dict[str, Any] = {"target": sizes, "operator": "hyperclone", "form": leaf["form"], "receipt": False}
    quiet, noisy = (
        tensors(grow(source, tmp_path / f"{noise}", noise=noise, **how).folder)
        for noise in (0.0, float(leaf["noise"]))
    )
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
        # LayerNorm's, which reaches writers
        through_mean = ("wte", "wpe", "embed", "dense", "fc2", "c_proj") if name != "llama" else ()
        apart = ("c_attn",)  # whose parts each have a corner of their own
        if not any(part in parameter_name for part in (*through_mean, *apart)):
            assert (parameter.grad.numpy()[new] == 0).all(), parameter_name


# ---- sixteen bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_copies_of_a_noisy_split_sum_to_the_source_but_for_one_rounding(
    tmp_path: Path, name: str, times: int, dtype: torch.dtype
) -> None:
    random_model(config_of(name)).to(dtype).save_pretrained(tmp_path / "source")
    key, tensor = (
        ("n_inner", "transformer.h.1.mlp.c_proj.weight")
        if name == "gpt2"
        else ("intermediate_size", "model.layers.1.mlp.down_proj.weight")
    )
    width = config_of(name)[key]
    grow(tmp_path / "source", tmp_path / "out", target={key: times * width}, noise=0.5, receipt=False)
    old, new = (tensors(tmp_path / folder)[tensor].double() for folder in ("source", "out"))
    old, new = (old.T, new.T) if name == "gpt2" else (old, new)
    copies = new.reshape(len(new), times, width)
    rounding = torch.finfo(dtype).eps / 2 * copies[:, -1].abs() + 1e-7  # of the last copy, to nearest
    assert ((copies.sum(1) - old).abs() <= rounding).all()
    assert (copies[:, 0] - copies[:, 1]).std() > 0.1 * old.std() / times


def test_sixteen_bit_sources_keep_their_writers_bits_where_the_epsilon_is_free() -> None:
    def gain_and_epsilon(name: str, **change: Any) -> tuple[float, float]:
        made = plan(
            config_of(name, **change),
            {"hidden_size": 36, "head_dim": 6}
            if name != "opt"
            else {"hidden_size": 36, "num_attention_heads": 6},
        )
        assert made.certificate.lossless
        before, after = (made.family.eps(config) for config in (made.source_config, made.target_config))
        return float(made.recipe.expansions["residual"].write.gain[0]), after / before

    root = (36 / 24) ** 0.5
    assert gain_and_epsilon("llama", dtype="bfloat16") == pytest.approx((1.0, 24 / 36))
    assert gain_and_epsilon("llama", dtype="float16") == pytest.approx((1.0, 24 / 36))
    assert gain_and_epsilon("llama", dtype="float32") == pytest.approx((root, 1.0))
    assert gain_and_epsilon("llama") == pytest.approx((root, 1.0))
    assert gain_and_epsilon("qwen3", dtype="bfloat16") == pytest.approx((root, 1.0)), (
        "queries and keys have the epsilon too"
    )
    assert gain_and_epsilon("opt", dtype="bfloat16") == pytest.approx((root, 1.0)), "no key sets the epsilon"
    asked = plan(config_of("llama", dtype="bfloat16"), {"hidden_size": 36, "head_dim": 6}, dtype="float32")
    assert asked.recipe.eps_factor == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_result_in_float32_is_exact_where_bfloat16_rounds(tmp_path: Path, name: str) -> None:
    random_model(config_of(name)).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    more = {"num_key_value_heads": 6} if name == "phi" else {"num_key_value_heads": 3}
    target = {"hidden_size": 36, "num_attention_heads": 6, "intermediate_size": 60, **more}
    stored = grow(tmp_path / "source", tmp_path / "stored", target=target)
    wide = grow(tmp_path / "source", tmp_path / "wide", target=target, dtype="float32")
    assert stored.receipt is not None
    assert wide.receipt is not None
    assert wide.receipt.exact_delta is None
    assert wide.receipt.max_delta < 1e-5 < stored.receipt.max_delta < 2 * (stored.receipt.cast_delta or 0)
    assert (stored.receipt.exact_delta or 1) < 1e-5
    assert "stored in bfloat16; grown in float32" in stored.receipt.note
    assert not (tmp_path / "stored" / "float32").exists()
    assert any("the weights are stored in bfloat16" in remark for remark in stored.plan.remarks)
    assert not any("rounding" in remark for remark in wide.plan.remarks)
    assert {tensor.dtype for tensor in tensors(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert recorded_plan(tmp_path / "wide").hash == wide.plan.hash != stored.plan.hash
    inside = grow_model(load_model(tmp_path / "source", dtype="bfloat16"), target, dtype="float32")
    outside = load_model(tmp_path / "wide")
    assert all(torch.equal(values, outside.get_parameter(key)) for key, values in inside.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", ["random", "fresh"])
@pytest.mark.parametrize(("name", "matrix"), [("llama", "down_proj"), ("phi", "fc2"), ("gpt2", "c_proj")])
def test_a_matrix_that_is_five_percent_too_large_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, matrix: str, start: str, dtype: torch.dtype
) -> None:
    """A fresh model's layers add little to its logits, so that little shows of a fault."""
    from outgrow.model.build import build_model

    model = random_model(config_of(name)) if start == "random" else build_model(config_of(name), seed=0)
    model.to(dtype).save_pretrained(tmp_path / "source")
    heads = {"llama": 4, "phi": 8}
    target = renamed(name, {"hidden_size": 48, "num_attention_heads": 8})
    target |= {"num_key_value_heads": heads[name]} if name in heads else {}
    grow(tmp_path / "source", tmp_path / "right", target=target)
    maps = Recipe.maps

    def wrong(self: Recipe, tensor: Any) -> Any:
        first, *rest = maps(self, tensor)
        return (first.scaled(1.05 if tensor.name.endswith(f"{matrix}.weight") else 1.0), *rest)

    monkeypatch.setattr(Recipe, "maps", wrong)
    how = (
        "logits of the same growth in float32 moved by" if dtype == torch.bfloat16 else "yet logits moved by"
    )
    with pytest.raises(UserError, match=how):
        grow(tmp_path / "source", tmp_path / "wrong", target=target)
    assert not (tmp_path / "wrong").exists()


# ---- noise, and what a plan is remarked on -----------------------------------------------------------------


@pytest.mark.parametrize("operator", sorted(OPERATORS.keys() - {"none"}))
def test_every_door_has_the_same_default_noise(operator: str) -> None:
    from outgrow.growth.__main__ import CONF

    leaf = (
        compose_config(CONF, "grow", [f"growth={operator}"])[0]["growth"]
        if operator != "hyperclone"
        else {"noise": 0.0}
    )
    assert (
        plan(config_of("llama"), {"intermediate_size": 80}, operator).noise
        == leaf["noise"]
        == default_noise(operator)
    )
    assert (
        inspect.signature(grow).parameters["noise"].default
        is inspect.signature(grow_model).parameters["noise"].default
        is None
    )


def test_copies_that_stay_equal_are_counted(tmp_path: Path) -> None:
    config, target = (
        config_of("llama"),
        {"intermediate_size": 57, "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4},
    )
    told = plan(config, target, noise=0.0).remarks[0]
    assert told.startswith(
        "43 copies are read evenly (residual 24, ffn 17, kv 2); without dropout on them or noise they stay equal"
    )
    assert not any("read evenly" in remark for remark in plan(config, target).remarks)
    assert told in plan(config, target, noise=0.0).describe()
    saved(tmp_path / "source", config)
    grow(tmp_path / "source", tmp_path / "out", target=target, noise=0.0)
    assert told in (tmp_path / "out" / "README.md").read_text()
    model = load_model(tmp_path / "out", dtype="float64", attention="eager")
    step, tokens = torch.optim.SGD(model.parameters(), lr=0.1), torch.arange(24).reshape(2, 12)
    for _ in range(2):
        step.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        step.step()
    rows = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    torch.testing.assert_close(rows[40:], rows[:17], rtol=1e-9, atol=1e-12)


# Dropout → which copies it sets apart: rows of up_proj (feed-forward units), v_proj (heads), down_proj (the
# residual stream), by their names in the class.
FALLS_ON = [
    ("llama", {"attention_dropout": 0.3}, "kv"),
    ("gpt2", {"attn_pdrop": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "kv"),
    ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.3, "embd_pdrop": 0.0}, "residual"),
    ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rates", "space"), FALLS_ON)
def test_dropout_sets_apart_only_the_copies_that_it_falls_on(
    name: str, rates: dict[str, float], space: str
) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 8}
    target = renamed(name, sizes | ({"num_key_value_heads": 4} if name == "llama" else {}))
    config = config_of(name, **rates)
    told = [
        remark for remark in plan(config, target, noise=0.0).remarks if "copies are read evenly" in remark
    ]
    assert len(told) == 1
    assert [key for key in config if "drop" in key and key in told[0]] == [key for key in rates if rates[key]]
    model = grow_model(random_model(config), target, noise=0.0).train()
    layer = {"llama": "model.layers.0.", "gpt2": "transformer.h.0."}[name]
    rows = (
        {"ffn": "mlp.up_proj", "kv": "self_attn.v_proj", "residual": "mlp.down_proj"}
        if name == "llama"
        else {"ffn": "mlp.c_fc", "kv": "attn.c_proj", "residual": "mlp.c_proj"}
    )
    step, tokens = torch.optim.SGD(model.parameters(), lr=0.1), torch.arange(48).reshape(4, 12)
    for _ in range(3):
        step.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        step.step()
    apart = []
    for held, module in rows.items():
        weight = model.get_parameter(f"{layer}{module}.weight").detach()
        weight = weight.T if name == "gpt2" and held != "kv" else weight
        half = len(weight) // 2
        if not torch.allclose(weight[half:], weight[:half], rtol=1e-9, atol=1e-12):
            apart.append(held)
    assert apart == ([space] if space else [])


@pytest.mark.parametrize(
    ("change", "target", "how", "told"),
    [
        ({}, {"num_hidden_layers": 5}, {"depth": "stack"}, "5 layers are no whole multiple of 2"),
        ({"tie_word_embeddings": True}, {"hidden_size": 48, "head_dim": 6}, {"operator": "tile"}, "starts above ln(vocabulary)"),
        ({}, {"hidden_size": 48, "head_dim": 6}, {"operator": "zero_pad"}, "is a null control"),
        ({}, {"hidden_size": 48, "head_dim": 6, "intermediate_size": 50}, {}, "hidden_size 48, intermediate_size 50: no multiple of 64"),
        ({}, {"head_dim": 10}, {"operator": "random_pad"}, "head dim 10 is no multiple of 8"),
        ({}, {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6}, {},
         "num_key_value_heads 3 cannot be shared evenly by 2, 4, 8"),
    ],
)  # fmt: skip
def test_remarks(change: dict[str, Any], target: dict[str, Any], how: dict[str, Any], told: str) -> None:
    assert sum(told in remark for remark in plan(config_of("llama", **change), target, **how).remarks) == 1


@pytest.mark.parametrize(
    ("dense", "name", "key"),
    [
        ("llama", "mixtral", "num_local_experts"),
        ("qwen3", "qwen3_moe", "num_experts"),
        ("olmo2", "flex_olmo", "num_experts"),
    ],
)
def test_experts_that_devices_cannot_share_are_named(dense: str, name: str, key: str) -> None:
    target = {"model_type": name, key: 6, "num_experts_per_tok": 2}
    remarks = plan(config_of(dense), target, "upcycle").remarks
    assert any(f"{key} 6 cannot be shared evenly by 4, 8 devices" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("delta", "noise", "wider", "told"),
    [(0.0, 0.5, False, True), (0.0, 0.0, True, True), (0.0, 0.5, True, False), (1e-3, 0.0, False, False)],
)
def test_copies_of_experts_that_stay_equal_are_counted(
    delta: float, noise: float, wider: bool, told: bool
) -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    source = plan(config_of("llama"), experts, "upcycle").target_config
    target = {"num_local_experts": 4, "num_experts_per_tok": 2} | ({"intermediate_size": 80} if wider else {})
    remarks = plan(source, target, "expert_copy", delta=delta, noise=noise).remarks
    assert any("2 experts have the weights and the router rows of others" in each for each in remarks) == told


def test_a_growth_without_a_fault_has_no_remarks() -> None:
    config = config_of(
        "llama",
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=8,
    )
    target = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 4,
    }
    assert plan(config, target).remarks == ()
    assert plan(config, target, operator="lossless", depth="stack").remarks == ()


@pytest.mark.parametrize(
    ("card", "told", "head"),
    [
        (None, "the source's folder names none", None),
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n", "the source's, apache-2.0, holds", "license: apache-2.0"),
        ("---\nlicense: other\nlicense_name: gem\nlicense_link: https://a.b/c\n---\n",
         "the source's, gem (https://a.b/c), holds", "license_name: gem"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "the source's, mit, apache-2.0, holds", "- apache-2.0"),
        (f"---\nlicense: other\nlicense_name: {'a b ' * 40}\n---\n", "the source's, a b a b", "license: other"),
        ("---\nlicense: [a\n---\n", "names none", None),
        ("# license: mit\n", "names none", None),
    ],
)  # fmt: skip
def test_the_card_carries_the_licence_of_the_source(
    tmp_path: Path, phi_folder: Path, card: str | None, told: str, head: str | None
) -> None:
    shutil.copytree(phi_folder, tmp_path / "source")
    if card is not None:
        (tmp_path / "source" / "README.md").write_text(card)
    grow(tmp_path / "source", tmp_path / "out", target={"intermediate_size": 80}, receipt=False)
    front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)[1:]
    assert told in body
    assert head is None or head in front.splitlines()
    assert ("license" in front) == (head is not None)
    entries = yaml.safe_load(front)
    stated = {} if head is None else yaml.safe_load((card or "").split("---\n", 2)[1])
    assert all(entries[key] == value for key, value in stated.items() if key != "tags")


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"])
def test_the_text_of_a_licence_goes_with_what_is_grown(tmp_path: Path, phi_folder: Path, name: str) -> None:
    shutil.copytree(phi_folder, tmp_path / "source")
    (tmp_path / "source" / name).write_text("terms")
    grow(tmp_path / "source", tmp_path / "out", target={"intermediate_size": 80}, receipt=False)
    assert (tmp_path / "out" / name).read_text() == "terms"
    assert (
        f"the source's terms hold for what was grown from it, as in {name}."
        in (tmp_path / "out" / "README.md").read_text()
    )


# ---- layers that differ in kind ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "layers"),
    [
        ("DMMM", "DMMMMM", "0 1 1* 2 2* 3"),
        ("DDMM", "DDMMMM", "0 1 2 2* 2* 3"),
        ("DMDM", "DMDMDM", "0 1 2 1* 2* 3"),
        ("DM", "DMDM", "0 0 0 0"),
        ("DM", "MMMM", None),
    ],
)
def test_new_layers_are_copies_of_their_own_kind(source: str, target: str, layers: str | None) -> None:
    found = among_kinds(source, target)
    if layers is None:
        assert found is None
        return
    assert found is not None
    assert found.is_lossless
    assert all(source[layer] == kind for layer, kind in zip(found.layers, target, strict=True))
    if layers != "0 0 0 0":
        assert (
            " ".join(
                f"{layer}*" if idle else f"{layer}"
                for layer, idle in zip(found.layers, found.identity, strict=True)
            )
            == layers
        )


@pytest.mark.slow
def test_depth_grows_where_the_first_layer_alone_is_dense(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, max_position_embeddings=64,
    ).to_dict()  # fmt: skip
    source = saved(tmp_path / "source", config)
    grown = grow(source, tmp_path / "out", target={"num_hidden_layers": 5})
    assert grown.certificate.lossless
    assert grown.plan.layers.layers[0] == 0
    assert 0 not in grown.plan.layers.layers[1:]
    assert grown.receipt is not None
    assert grown.receipt.max_delta < 2e-5 * grown.receipt.max_logit


# ---- fresh entries -----------------------------------------------------------------------------------------

LARGE = {
    "vocab_size": 400,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}


@pytest.mark.parametrize("name", sorted({family.name for family in families().values()}))
def test_scratch_starts_every_tensor_as_the_class_does(tmp_path: Path, name: str) -> None:
    from outgrow.model.build import build_model

    key = "init_std" if name == "opt" else "initializer_range"
    config = config_of(name, **{key: 0.05})
    sizes = renamed(name, LARGE) | ({"word_embed_proj_dim": 96} if name == "opt" else {})
    sizes |= {"num_key_value_heads": 6} if name == "phi" else {}
    source = saved(tmp_path / "source", config)
    made = grow(source, tmp_path / "out", target=sizes, operator="scratch", receipt=False).plan
    mine, theirs = (
        load_model(tmp_path / "out").state_dict(),
        build_model(made.target_config, seed=1).state_dict(),
    )
    for tensor_name, expected in theirs.items():
        found = mine[tensor_name]
        assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=0.01), tensor_name
        if expected.ndim > 1:
            assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.1), tensor_name
        else:
            assert torch.equal(found, expected), tensor_name


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_near_the_mean_and_apart_from_each_other(tmp_path: Path, tied: bool) -> None:
    source = saved(tmp_path / "source", config_of("llama", tie_word_embeddings=tied))
    grow(source, tmp_path / "out", target={"vocab_size": 161}, receipt=False)
    old, new = tensors(source), tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        rows, rms = new[name][61:].double(), old[name].double().square().mean().sqrt()
        away = rows - old[name].double().mean(0)
        assert float(away.square().mean().sqrt() / rms) == pytest.approx(1e-3, rel=0.05)
        assert torch.unique(rows, dim=0).shape == rows.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_a_deviation_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="initializer_range must be a finite number of at least 0"):
        plan(config_of("llama") | {"initializer_range": value}, {"intermediate_size": 80})
