"""Mixtures of experts: the certificate against logits of the library's own classes, the experts against
matrices cut by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.models import random_model
from outgrow.growth import grow, grow_model, plan
from outgrow.growth.moments import inexact, moments_plan
from outgrow.growth.record import recorded_plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model, to_hf_config
from outgrow.model.flops import counted
from outgrow.model.mixture import mixtures

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# Dense family → the mixture, the key of its experts' number, and what else its config must say.
PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("mixtral", "num_local_experts", {}),
    "mistral": ("mixtral", "num_local_experts", {}),
    "qwen2": ("qwen2_moe", "num_experts", {"shared_expert_intermediate_size": 12}),
    "qwen3": ("qwen3_moe", "num_experts", {}),
    "olmo2": ("flex_olmo", "num_experts", {}),
    "qwen3 to dots1": ("dots1", "n_routed_experts", {"n_shared_experts": 1, "routed_scaling_factor": 2.5}),
}
TOKENS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
EXACT = 1e-6  # of the largest logit: routers, norms and softmax compute in float32


def dense(pair: str, **changes: Any) -> Any:
    """A random float64 model of a pair's dense family."""
    name = pair.split()[0]
    return random_model(to_hf_config({"model_type": name, **SIZES, **changes}).to_dict())


def wanted(pair: str, experts: int, chosen: int, **changes: Any) -> dict[str, Any]:
    """The overrides that turn a pair's dense family into the mixture."""
    name, count, more = PAIRS[pair]
    return {"model_type": name, count: experts, "num_experts_per_tok": chosen, **more, **changes}


def logits(model: Any) -> torch.Tensor:
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products refuse float64
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def moved(before: Any, after: Any) -> float:
    """The largest difference of two logits, of the largest logit."""
    one, other = logits(before), logits(after)
    return float((one - other).abs().max() / one.abs().max())


# ---- the certificate and the receipt -----------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("granularity", "rate", "groups"), [(1, 4, 1), (1, 4, 2), (2, 2, 1), (2, 4, 3), (3, 2, 2), (4, 2, 1)]
)
@pytest.mark.parametrize("pair", PAIRS)
def test_certificate_and_logits_agree(
    pair: str, granularity: int, rate: int, groups: int, normalised: bool
) -> None:
    """Families × granularity G × expansion rate E × experts for each token T = groups · G × weights divided
    by their sum or not."""
    name, experts, chosen = PAIRS[pair][0], granularity * rate, granularity * groups
    if name == "mixtral" and not normalised:
        pytest.skip("Mixtral always divides by the sum")
    own = {} if name == "mixtral" else {"norm_topk_prob": normalised}
    if name == "dots1":  # its shared expert has as many units as a routed one
        if 24 % (granularity + 1):
            pytest.skip("24 units make no such parts")
        own["moe_intermediate_size"] = 24 // (granularity + 1)
    source, target = dense(pair), wanted(pair, experts, chosen, **own)
    made = plan(source.config.to_dict(), target, "upcycle", granularity=granularity)
    grown = grow_model(source, target, "upcycle", granularity=granularity)
    whole = normalised or (chosen == experts and name != "dots1")  # a softmax over all experts sums to 1
    assert made.certificate.lossless == whole, made.certificate.reasons
    assert (moved(source, grown) < EXACT) == whole
    if not whole:
        assert made.certificate.reasons[0].startswith("config norm_topk_prob is false: the combine weights")


WIDER = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(("depth", "noise"), [("identity", 0.5), ("identity", 0.0), ("stack", 0.5)])
@pytest.mark.parametrize("pair", ["llama", "qwen2", "qwen3", "olmo2"])
def test_width_depth_heads_and_noise_grow_in_the_same_plan(pair: str, depth: str, noise: float) -> None:
    units = {"llama": {"intermediate_size": 20}, "olmo2": {"intermediate_size": 20}}.get(
        pair, {"moe_intermediate_size": 20}
    )
    sizes = WIDER
    source, target = dense(pair), wanted(pair, 6, 2, **sizes, **units)
    made = plan(source.config.to_dict(), target, "upcycle", granularity=2, depth=depth, noise=noise)
    assert made.certificate.lossless == (depth == "identity"), made.certificate.reasons
    after = grow_model(source, target, "upcycle", granularity=2, depth=depth, noise=noise)
    assert after.config.hidden_size == sizes["hidden_size"]
    assert len(after.model.layers) == 3
    assert (moved(source, after) < 5 * EXACT) == (depth == "identity")


@pytest.mark.parametrize("sparse", ["every_other", "last_half", [0], [1, 2]])
@pytest.mark.parametrize("pair", ["qwen2", "qwen3"])
def test_some_layers_stay_dense(pair: str, sparse: str | list[int]) -> None:
    source = dense(pair, num_hidden_layers=3)
    after = grow_model(source, wanted(pair, 4, 2), "upcycle", sparse=sparse)
    kept = {"every_other": [0, 2], "last_half": [0]}.get(str(sparse)) or [
        layer for layer in range(3) if layer not in sparse
    ]
    assert after.config.mlp_only_layers == kept
    assert [hasattr(layer.mlp, "experts") for layer in after.model.layers] == [
        number not in kept for number in range(3)
    ]
    assert moved(source, after) < EXACT


# ---- what stands in the way --------------------------------------------------------------------------------


def test_the_factor_split_over_three_matrices_is_not_lossless() -> None:
    """Megatron's s^(1/3) on gate, up and down: right for ReLU² alone, not with SwiGLU."""
    source, target = dense("llama"), wanted("llama", 8, 4)
    made = plan(source.config.to_dict(), target, "upcycle", granularity=4, scale="split")
    assert not made.certificate.lossless
    assert (
        "experts.{0..7}.w1: is scaled by 1.587, expected 1: its nonlinearity does not pass a scale on"
        in made.certificate.reasons[0]
    )
    assert moved(source, grow_model(source, target, "upcycle", granularity=4, scale="split")) > 0.05


@pytest.mark.parametrize(
    ("operator", "options", "reason"),
    [
        ("upcycle", {"copy_noise": 0.1}, "experts: copies carry noise of 0.1"),
        ("drop_upcycle", {}, "experts: 12 units of each are drawn anew"),
        ("upcycle", {"width": "tile", "depth": "stack"}, "depth 'stack'"),
    ],
)
def test_every_condition_that_fails_is_named(operator: str, options: dict[str, Any], reason: str) -> None:
    deeper = {"num_hidden_layers": 3} if "depth" in options else {}
    source, target = dense("llama"), wanted("llama", 4, 2, **deeper)
    reasons = plan(source.config.to_dict(), target, operator, **options).certificate.reasons
    assert any(reason in told for told in reasons), reasons
    assert moved(source, grow_model(source, target, operator, **options)) > 1e-4


def test_groups_that_tie_are_not_certified() -> None:
    """Which of equal logits are chosen is the library's affair."""
    reasons = plan(
        dense("llama").config.to_dict(), wanted("llama", 4, 2), "upcycle", granularity=2, router_std=0.0
    ).certificate.reasons
    assert [reason[:40] for reason in reasons] == ["router rows of zeros: all groups tie, so"]


def test_a_router_of_zeros_gives_every_copy_the_same_weight() -> None:
    """Then the weights sum to T / n without being divided, and the scale n / T undoes that."""
    source, target = dense("qwen3"), wanted("qwen3", 4, 2, norm_topk_prob=False)
    assert plan(source.config.to_dict(), target, "upcycle", router_std=0.0).certificate.lossless
    assert moved(source, grow_model(source, target, "upcycle", router_std=0.0)) < EXACT


def test_a_window_of_some_layers_is_none_of_all() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    source = dense("qwen3", **windows)
    reasons = plan(source.config.to_dict(), wanted("qwen3", 4, 2), "upcycle").certificate.reasons
    assert any("config use_sliding_window: True" in reason for reason in reasons)
    assert moved(source, grow_model(source, wanted("qwen3", 4, 2), "upcycle")) > 1e-4


def test_windows_of_mistral_and_of_some_layers_of_qwen2_stay() -> None:
    for pair, windows in (
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ):
        source = dense(pair, **windows)
        assert plan(source.config.to_dict(), wanted(pair, 4, 2), "upcycle").certificate.lossless
        assert moved(source, grow_model(source, wanted(pair, 4, 2), "upcycle")) < EXACT


# ---- the experts themselves --------------------------------------------------------------------------------


def of_file(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_experts_are_the_blocks_of_the_mlp(tmp_path: Path) -> None:
    """Granularity 2, 6 experts: e holds block e mod 2 of 12 units, down × 2; the router's rows are alike in
    twos."""
    source = dense("llama")
    source.save_pretrained(tmp_path / "source")
    grow(
        tmp_path / "source", tmp_path / "out", target=wanted("llama", 6, 2), operator="upcycle", granularity=2
    )
    before, after = of_file(tmp_path / "source"), of_file(tmp_path / "out")
    for layer in range(2):
        gate, up, down = (
            before[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        for expert in range(6):
            held = slice(12 * (expert % 2), 12 * (expert % 2) + 12)
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            assert (after[f"{name}.w1.weight"] == gate[held]).all()
            assert (after[f"{name}.w3.weight"] == up[held]).all()
            assert (after[f"{name}.w2.weight"] == 2 * down[:, held]).all()
        router = after[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert (router[::2] == router[1::2]).all()
        assert len(np.unique(router[:, 0])) == 3
        assert 0.01 < router.std() < 0.03


@pytest.mark.parametrize("value", ["x", -1, [-1], [True], 1.5, {"a": 1}], ids=str)
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("qwen3_moe", "mlp_only_layers"),
        ("qwen3_moe", "decoder_sparse_step"),
        ("dots1", "first_k_dense_replace"),
    ],
)
def test_layers_that_stay_dense_are_said_in_numbers(kind: str, key: str, value: Any) -> None:
    config = {"model_type": kind, "num_hidden_layers": 4, key: value}
    with pytest.raises(UserError, match=f"config of family '{kind}': {key} must be "):
        mixtures()[kind].sparse_layers(config)


def test_units_that_are_dropped_are_the_same_in_gate_up_and_down(tmp_path: Path) -> None:
    source = dense("llama", intermediate_size=400, hidden_size=32, num_attention_heads=8)
    source.save_pretrained(tmp_path / "source")
    grow(
        tmp_path / "source",
        tmp_path / "out",
        target=wanted("llama", 2, 1),
        operator="drop_upcycle",
        drop=0.25,
    )
    before, after = of_file(tmp_path / "source"), of_file(tmp_path / "out")
    drawn = {}
    for layer in range(2):
        gate, up, down = (
            before[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        for expert in range(2):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            w1, w3, w2 = (after[f"{name}.{part}.weight"] for part in ("w1", "w3", "w2"))
            units = [
                frozenset(np.flatnonzero(changed))
                for changed in ((w1 != gate).any(1), (w3 != up).any(1), (w2 != down).any(0))
            ]
            assert len(set(units)) == 1
            chosen = sorted(drawn.setdefault((layer, expert), units[0]))
            assert len(chosen) == 100
            for new, old in (
                (w1[chosen], gate[chosen]),
                (w3[chosen], up[chosen]),
                (w2[:, chosen], down[:, chosen]),
            ):
                assert new.mean() == pytest.approx(old.mean(), abs=4 * old.std() / np.sqrt(old.size))
                assert new.std() == pytest.approx(old.std(), rel=0.06)
    assert len(set(drawn.values())) == 4  # each layer and expert its own


def test_a_shared_expert_behind_a_gate_of_zeros_is_doubled(tmp_path: Path) -> None:
    source = dense("qwen2")
    source.save_pretrained(tmp_path / "source")
    grow(tmp_path / "source", tmp_path / "out", target=wanted("qwen2", 4, 2), operator="upcycle")
    before, after = of_file(tmp_path / "source"), of_file(tmp_path / "out")
    down, name = before["model.layers.1.mlp.down_proj.weight"], "model.layers.1.mlp"
    assert (after[f"{name}.shared_expert.down_proj.weight"] == 2 * down[:, :12]).all()
    assert (after[f"{name}.experts.3.down_proj.weight"] == down[:, 12:]).all()
    assert not after[f"{name}.shared_expert_gate.weight"].any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_threads_or_shards(tmp_path: Path, dtype: str) -> None:
    dense("qwen2").to(getattr(torch, dtype)).save_pretrained(tmp_path / "source")
    target = wanted("qwen2", 4, 2, hidden_size=24, num_attention_heads=6, num_key_value_heads=3)
    for out, how in (("one", {"threads": 1}), ("many", {"threads": 3, "max_shard_bytes": 9000})):
        grow(tmp_path / "source", tmp_path / out, target=target, operator="drop_upcycle", **how)
    one = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    many = {name: load_file(tmp_path / "many" / file)[name] for name, file in index.items()}
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())
    assert one.keys() == many.keys()


# ---- copies of experts -------------------------------------------------------------------------------------


def mixture(pair: str, **changes: Any) -> Any:
    """A random float64 mixture of 3 different experts, of which a token takes 2."""
    config = {**SIZES, "moe_intermediate_size": 12, "norm_topk_prob": True, **wanted(pair, 3, 2), **changes}
    return random_model(to_hf_config(config).to_dict())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 40, "num_hidden_layers": 3}])
@pytest.mark.parametrize("pair", ["llama", "qwen3", "olmo2"])
def test_copies_chosen_together_keep_the_function(pair: str, sizes: dict[str, int]) -> None:
    source, count = mixture(pair), PAIRS[pair][1]
    for chosen, delta, kept in ((4, 0.0, True), (2, 0.0, False), (4, 0.5, False)):
        target = {count: 6, "num_experts_per_tok": chosen, **sizes}
        made = plan(source.config.to_dict(), target, "expert_copy", delta=delta)
        assert made.certificate.lossless == kept, made.certificate.reasons
        assert (moved(source, grow_model(source, target, "expert_copy", delta=delta)) < 5 * EXACT) == kept


def test_copies_of_a_router_that_does_not_divide_share_its_weight() -> None:
    source = mixture("qwen3", norm_topk_prob=False)
    target = {"num_experts": 6, "num_experts_per_tok": 4}
    assert plan(source.config.to_dict(), target, "expert_copy", delta=0.0).certificate.lossless
    assert moved(source, grow_model(source, target, "expert_copy", delta=0.0)) < EXACT


def test_router_rows_of_further_copies_are_moved_a_little(tmp_path: Path) -> None:
    source = mixture("qwen3")
    source.save_pretrained(tmp_path / "source")
    grow(tmp_path / "source", tmp_path / "out", target={"num_experts": 6}, operator="expert_copy")
    before, after = (of_file(tmp_path / name)["model.layers.0.mlp.gate.weight"] for name in ("source", "out"))
    assert (after[::2] == before).all()
    apart = np.abs(after[1::2] - before)
    assert 0.0008 < apart.max() <= 1e-3
    assert (apart > 0).all()


# ---- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_the_folder_loads_generates_and_can_be_planned_again(tmp_path: Path, pair: str) -> None:
    from transformers import AutoModelForCausalLM

    dense(pair).save_pretrained(tmp_path / "source")
    sizes = {"moe_intermediate_size": 8, "n_shared_experts": 1} if "dots1" in pair else {}
    how = {"sparse": "last_half"} if pair in ("qwen2", "qwen3", "qwen3 to dots1") else {}
    grown = grow(
        tmp_path / "source", tmp_path / "out", target=wanted(pair, 4, 2, **sizes), operator="upcycle", **how
    )
    assert grown.certificate.lossless
    assert grown.receipt is not None
    assert grown.receipt.max_delta < EXACT * grown.receipt.max_logit
    assert recorded_plan(tmp_path / "out").hash == grown.plan.hash
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(report.values())
    assert type(model).__name__ == model.config.architectures[0]
    generated = model.generate(TOKENS[:1, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)
    assert "experts of" in repr(grown.plan)
    assert "parameters active" in (tmp_path / "out" / "README.md").read_text()


def test_a_plan_needs_no_torch() -> None:
    """So that growing a large model into experts takes little memory."""
    code = (
        "import sys; from outgrow.growth import plan; from outgrow.model.presets import PRESETS; config = "
        "PRESETS['tiny_source'] | {'model_type': 'llama', 'rms_norm_eps': 1e-6}; made = plan(config, "
        "{'model_type': 'mixtral', 'num_local_experts': 4, 'num_experts_per_tok': 2}, 'upcycle'); assert "
        "made.certificate.lossless; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_active_and_total_parameters_are_those_of_the_model() -> None:
    source = dense("qwen2", num_hidden_layers=4)
    target = wanted("qwen2", 8, 2)
    made = plan(source.config.to_dict(), target, "upcycle", sparse="last_half")
    model = build_model(made.target_config, seed=0)
    assert made.target_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert made.change is not None
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert made.change.active_parameters(made) == made.target_parameters - experts * 6 // 8
    attention = counted(made.target_config, 64)
    assert attention is not None
    assert made.change.active_flops(made) == pytest.approx(attention.matrices, rel=1e-3)


# ---- Adam's moments ----------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradient of the text's loss under the names of the file."""
    from outgrow.model.conversion import in_file

    model.set_experts_implementation("eager") if model._can_set_experts_implementation() else None
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return in_file(model.config.to_dict(), {name: p.grad for name, p in model.named_parameters()})


def grown_gradients(
    source: Any, target: dict[str, Any], operator: str, **how: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The source's gradients grown as first moments, and the grown model's own."""
    from outgrow.growth.optimizer import Tensors, expand

    made = plan(source.config.to_dict(), target, operator, noise=0.0, **how)
    first = {
        f"{moment}.{name}": tensor
        for moment in ("exp_avg", "exp_avg_sq")
        for name, tensor in gradients(source).items()
    }
    moments = dict(expand(moments_plan(made, Tensors(first).dtypes), Tensors(first)))
    own = gradients(grow_model(source, target, operator, noise=0.0, **how))
    assert moments.keys() == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in own}
    return moments, own


def test_moments_beside_the_experts_follow_and_theirs_start_at_zero() -> None:
    moments, own = grown_gradients(dense("qwen2"), wanted("qwen2", 4, 2), "upcycle", sparse="last_half")
    for name, gradient in own.items():
        moment = moments[f"exp_avg.{name}"]
        if ".experts." in name or name.endswith((".mlp.gate.weight", "shared_expert_gate.weight")):
            assert not moment.any()
        else:
            assert torch.allclose(moment, gradient, rtol=1e-4, atol=1e-7), name
    made = plan(dense("qwen2").config.to_dict(), wanted("qwen2", 4, 2), "upcycle", noise=0.0)
    assert any("each expert sees the tokens that are sent to it" in reason for reason in inexact(made))


def test_copies_of_experts_share_their_gradients() -> None:
    target = {"num_experts": 6, "num_experts_per_tok": 4}
    moments, own = grown_gradients(mixture("qwen3"), target, "expert_copy", delta=0.0)
    for name, gradient in own.items():
        assert torch.allclose(moments[f"exp_avg.{name}"], gradient, rtol=1e-3, atol=1e-6), name


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "target", "options", "message"),
    [
        ("llama", wanted("llama", 6, 4), {"granularity": 4}, "num_local_experts 6 is no multiple of the granularity 4"),
        ("llama", wanted("llama", 8, 2), {"granularity": 4}, "num_experts_per_tok 2 is no multiple of the granularity 4"),
        ("llama", wanted("llama", 4, 8), {}, "num_experts_per_tok 8 is more than num_local_experts 4"),
        ("llama", wanted("llama", 5, 5), {"granularity": 5}, "24 units of the MLP cannot be cut into parts of or by 5"),
        ("llama", {"model_type": "mixtral", "num_local_experts": 4}, {}, "num_experts_per_tok is missing"),
        ("llama", {"num_local_experts": 4}, {}, "model_type is missing, the family of the mixture; from 'llama': mixtral"),
        ("llama", {"model_type": "mixtral", "num_experts": 4}, {}, "unknown config key 'num_experts'; did you mean 'num_local_experts'"),
        ("llama", wanted("llama", 4, 2), {"granularty": 2}, "option of operator 'upcycle': 'granularty'; did you mean 'granularity'"),
        ("llama", wanted("llama", 4, 2), {"sparse": "every_other"}, "every layer has experts, so layers [0] cannot stay dense"),
        ("llama", wanted("llama", 4, 2), {"width": "losless"}, "width 'losless': no operator of this name"),
        ("llama", wanted("llama", 4, 2), {"router_std": -1}, "router_std -1: expected a number of at least 0"),
        ("llama", wanted("llama", 4, 2, intermediate_size=7), {}, "cannot be cut into parts of or by 7"),
        ("llama", wanted("llama", 4, 2, hidden_size=8), {}, "residual 8 is smaller than the source's 16"),
        ("llama", wanted("qwen3", 4, 2), {}, "q_norm.weight only in the target"),
        ("olmo2", {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}, {}, "input_layernorm.weight only in the target"),
        ("llama", {"model_type": "phimoe", "num_local_experts": 4, "num_experts_per_tok": 2}, {}, "model.norm.bias only in the target"),
        ("llama", {"model_type": "nonesuch"}, {}, "transformers has no causal language model of that type"),
        ("qwen2", wanted("qwen2", 4, 2, shared_expert_intermediate_size=0), {}, "shared_expert_intermediate_size must be a positive whole"),
        ("qwen2", wanted("qwen3", 4, 2) | {"model_type": "qwen2_moe"}, {}, "shared_expert_intermediate_size is missing"),
        ("qwen3", wanted("qwen3", 4, 2), {"sparse": [5]}, "5 is no target layer"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(
    pair: str, target: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config = to_hf_config({"model_type": pair, **SIZES}).to_dict()
    with pytest.raises(UserError) as fault:
        plan(config, target, "upcycle", **options)
    assert message in str(fault.value)


def test_biases_that_mixtral_has_not_are_named() -> None:
    config = to_hf_config({"model_type": "llama", **SIZES, "attention_bias": True}).to_dict()
    with pytest.raises(UserError, match="config attention_bias: True has no counterpart in 'mixtral'"):
        plan(config, wanted("llama", 4, 2), "upcycle")


def test_experts_that_do_not_divide_are_refused() -> None:
    config = mixture("qwen3").config.to_dict()
    with pytest.raises(UserError, match=r"num_experts 4 is no multiple of the source's 3"):
        plan(config, {"num_experts": 4}, "expert_copy")
    with pytest.raises(UserError, match="has experts already; growth=expert_copy makes more of them"):
        plan(config, {"model_type": "qwen3_moe", "num_experts": 6}, "upcycle")


def test_nothing_is_written_where_a_growth_is_refused(tmp_path: Path) -> None:
    dense("llama").save_pretrained(tmp_path / "source")
    with pytest.raises(UserError):
        grow(
            tmp_path / "source",
            tmp_path / "out",
            target=wanted("llama", 6, 4),
            operator="upcycle",
            granularity=4,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
