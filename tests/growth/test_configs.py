"""Configs as they are found: older spellings, switches, layers told apart by their numbers, sizes that a
class does not know."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from helpers.families import FLOOR, config_of, families
from helpers.models import make_checkpoint, random_model
from outgrow.growth import grow, grow_model, plan
from outgrow.growth.moments import inexact
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model, to_hf_config

ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 8}
PHI = {  # as a Phi of transformers 4 is saved
    "model_type": "phi", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
    "num_key_value_heads": None, "vocab_size": 51200, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new",
    "partial_rotary_factor": 0.5, "rope_scaling": None, "rope_theta": 10000.0, "qk_layernorm": False, "tie_word_embeddings": False,
    "torch_dtype": "float16",
}  # fmt: skip


def respelled(folder: Path, lacking: tuple[str, ...] = (), **values: Any) -> Path:
    """The folder with its config.json changed."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in lacking})
    )
    return folder


def moved(source: Path, grown: Path, length: int = 28) -> float:
    """How far the logits of a longer text lie apart, relative to the largest."""
    tokens = torch.randint(60, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before, after = (
            load_model(folder, dtype="float64", attention="eager").eval()(tokens).logits
            for folder in (source, grown)
        )
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("theta", [10000.0, 5e5])
def test_a_config_of_transformers_4_takes_a_preset(theta: float) -> None:
    made = plan(PHI | {"rope_theta": theta}, "phi_2")
    assert made.certificate.lossless, made.certificate.reasons
    assert made.target_parameters == 2_779_683_840
    rope = to_hf_config(made.target_config).rope_parameters
    # a preset is sizes, and the base is none
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (theta, 0.4)


def test_rotary_overrides_of_a_config_of_transformers_4() -> None:
    scaled = PHI | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert plan(scaled, {"intermediate_size": 9000}).certificate.lossless
    for source, rope, reason in (
        (PHI, {"rope_theta": 5e5}, "rope_theta: 10000.0 becomes 500000.0"),
        (scaled, {"factor": 4.0}, "factor: 2.0 becomes 4.0"),
    ):
        made = plan(source, {"rope_parameters": rope})
        assert reason in str(made.certificate)
        assert (
            to_hf_config(made.target_config).rope_parameters.items()
            >= {"partial_rotary_factor": 0.5, **rope}.items()
        )


OLDER: dict[
    str, dict[str, Any]
] = {  # families whose older configs leave out what follows from a layer's number
    "gemma2": {"sliding_window": 4},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
    },
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OLDER)
def test_layers_keep_their_kind_where_the_config_does_not_list_it(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "source", config_of(name, **OLDER[name]))
    kinds = to_hf_config(json.loads((source / "config.json").read_text())).layer_types
    respelled(source, lacking=("layer_types",))
    grown = grow(source, tmp_path / "out", target={"num_hidden_layers": 2 * len(kinds)}, receipt=False)
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.plan.target_config["layer_types"] == [kind for kind in kinds for _ in (0, 1)]
    assert moved(source, grown.folder) <= FLOOR["rms"]
    other = plan(source, {"layer_types": kinds[::-1]})
    assert "config layer_types" in str(other.certificate)


@pytest.mark.parametrize("name", sorted(families()))
def test_what_a_config_leaves_out_is_the_classs_own(name: str) -> None:
    """By the epsilon `lemon` scales the target's; a head dim is no share of the hidden size where the class
    has a number for it."""
    family, known = families()[name], CONFIG_MAPPING[name]().to_dict()
    if family.sets_eps:
        assert family.eps({}) == known[family.field_name("norm_eps")]
    if family.knows("head_dim"):
        small = CONFIG_MAPPING[name](hidden_size=64, num_attention_heads=4).to_dict()
        named = small.get(family.field_name("head_dim"))
        assert family.get({}, "head_dim") == (None if named == 64 // 4 else named)


@pytest.mark.parametrize(
    ("name", "target", "named"),
    [
        ("llama", {"num_attention_heads": 8, "hidden_size": 48}, {"num_key_value_heads": 8}),
        ("qwen2", {"num_attention_heads": 8, "hidden_size": 48}, {"num_key_value_heads": 8}),
        ("phi", {"hidden_size": 48, "num_attention_heads": 8}, {"intermediate_size": 192}),
    ],
)
def test_a_size_that_was_left_out_and_grows_is_named(
    name: str, target: dict[str, int], named: dict[str, int]
) -> None:
    """The class would take 32 key-value heads, or 8,192 units, of its own."""
    whole = config_of(name)
    config = {key: value for key, value in whole.items() if key not in named}
    planned = plan(config, target, depth="identity").target_config
    assert {key: planned[key] for key in named} == named
    assert not named.keys() & plan(config, {"num_hidden_layers": 3}).target_config.keys()


@pytest.mark.parametrize(
    ("name", "switch", "tensor"),
    [
        ("llama", "attention_bias", "model.layers.0.self_attn.k_proj.bias"),
        ("llama", "mlp_bias", "model.layers.0.mlp.down_proj.bias"),
        ("qwen3", "attention_bias", "model.layers.0.self_attn.k_proj.bias"),
        ("phi", "qk_layernorm", "model.layers.0.self_attn.k_layernorm.bias"),
    ],
)
def test_a_switch_that_adds_tensors_is_told_with_what_it_was(name: str, switch: str, tensor: str) -> None:
    config = config_of(name)
    with pytest.raises(UserError) as caught:
        plan(config, {switch: True})
    words = f"leave it as in the source ({switch}:{str(config[switch]).lower()})"
    assert tensor in str(caught.value)
    assert words in str(caught.value)
    assert plan(config, {switch: True}, "scratch").certificate.reasons  # which takes nothing from it


def test_modules_of_a_model_in_memory_without_a_line_are_told() -> None:
    model = random_model(config_of("gpt2", add_cross_attention=True))
    with pytest.raises(UserError, match=r"unknown transformer\.h\.0\.crossattention\.c_attn\.bias"):
        grow_model(model, {"n_inner": 80})


def test_layers_in_another_order_are_told_so() -> None:
    reasons = plan(config_of("llama"), {"intermediate_size": 50}, depth=[1, 0]).certificate.reasons
    assert reasons == ("depth 'list': the layers change their order",)


@pytest.mark.parametrize("value", [None, 0, -6, "6", float("nan")], ids=str)
def test_a_fixed_scale_of_attention_that_is_none_is_told(value: Any) -> None:
    config = config_of("gemma2") | {"query_pre_attn_scalar": value}
    with pytest.raises(UserError, match="query_pre_attn_scalar must be"):
        plan(config, {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 48})
    del config["query_pre_attn_scalar"]  # the class has 256
    assert plan(config, {"intermediate_size": 50}).certificate.lossless


def test_attention_that_is_not_scaled(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", config_of("gpt2", scale_attn_weights=False))
    grown = grow(source, tmp_path / "out", target={"n_embd": 40})
    assert grown.certificate.lossless
    assert moved(source, grown.folder) <= FLOOR["layer"]


@pytest.mark.slow
def test_attention_scaled_by_a_layers_number_is_exact_where_no_layer_moves(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", config_of("gpt2", scale_attn_by_inverse_layer_idx=True))
    for depth, exact in (("identity_top", True), ("identity", False)):
        grown = grow(source, tmp_path / depth, target={"n_layer": 4}, depth=depth)
        assert grown.certificate.lossless == exact == (moved(source, grown.folder) <= FLOOR["layer"])


@pytest.mark.parametrize(
    ("rope", "exact"),
    [
        ({"rope_type": "default"}, True),
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
        ({"rope_type": "yarn", "factor": 4.0}, True),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, True),
        ({"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 2.1, 2.2]}, False),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2],
                "long_factor": [2.0, 2.1, 2.2],
                "factor": 4.0,
            },
            True,
        ),
    ],
    ids=str,
)
def test_more_positions_where_rotary_angles_depend_on_how_many(
    tmp_path: Path, rope: dict[str, Any], exact: bool
) -> None:
    source = make_checkpoint(
        tmp_path / "source", config_of("llama", max_position_embeddings=16, rope_parameters=ROPE | rope)
    )
    grown = grow(source, tmp_path / "out", target={"max_position_embeddings": 64}, receipt=False)
    assert grown.certificate.lossless == exact == (moved(source, grown.folder) <= FLOOR["rms"]), (
        grown.certificate.reasons
    )


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("gpt2", {"head_dim": 8}, "unknown config key 'head_dim'"),
        (
            "gpt2",
            {"num_key_value_heads": 8, "n_head": 8, "n_embd": 48},
            "unknown config key 'num_key_value_heads'",
        ),
        ("opt", {"head_dim": 8}, "unknown config key 'head_dim'"),
        (
            "opt",
            {"word_embed_proj_dim": 48},
            "word_embed_proj_dim 48 must be hidden_size 24, as in the source; leave it out",
        ),
        ("gpt_neox", {"head_dim": 8}, "unknown config key 'head_dim'"),
        ("llama", {"layer_types": ["full_attention"] * 2}, "unknown config key 'layer_types'"),
        (
            "gemma2",
            {"hidden_size": 30},
            "hidden_size 30 is no multiple of num_attention_heads 4, which transformers' class insists on",
        ),
        ("llama", {"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        (
            "qwen3",
            {"head_dim": 7},
            (
                "7 dims of each head would be turned by rotary positions, which turn pairs; choose an even "
                "head dim"
            ),
        ),
        (
            "phi",
            {"intermediate_size": "abc"},
            "intermediate_size must be a positive whole number, found 'abc'",
        ),
        ("phi", {"intermediate_size": 50.5}, "intermediate_size must be a positive whole number, found 50.5"),
        ("phi", {"head_dim": "x"}, "head_dim must be a positive whole number, found 'x'"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads must be a positive whole number, found 0"),
        (
            "llama",
            {"max_position_embeddings": "x"},
            "max_position_embeddings must be a positive whole number, found 'x'",
        ),
        ("gpt2", {"n_positions": "x"}, "n_positions must be a positive whole number, found 'x'"),
        (
            "phi",
            {"hidden_size": 10**12},
            "hidden_size 1,000,000,000,000 is more than any model has (at most 16,777,216)",
        ),
        (
            "phi",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers 1,000,000,000 is more than any model has (at most 16,384)",
        ),
        (
            "phi",
            {"num_attention_heads": 10**5, "head_dim": 10**5},
            "heads × head dim 10,000,000,000 is more than any model has",
        ),
        ("gpt2", {"rope_parameters": {"rope_theta": 1.0}}, "unknown config key 'rope_parameters'"),
    ],
)
def test_what_the_librarys_class_would_not_take_is_told_before_anything_is_written(
    tmp_path: Path, name: str, target: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan(config_of(name), target)


def test_a_source_config_with_absurd_sizes_makes_nothing_of_them(tmp_path: Path) -> None:
    source = respelled(make_checkpoint(tmp_path / "source", config_of("llama")), num_hidden_layers=10**9)
    with pytest.raises(UserError, match="num_hidden_layers 1,000,000,000 is more than any model has"):
        plan(source, {"intermediate_size": 50})


@pytest.mark.parametrize("where", ["config.json", "target"])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mixtral", "num_local_experts"),
        ("deepseek_v3", "n_routed_experts"),
        ("qwen3_5_moe_text", "num_experts"),
        ("ernie4_5_moe", "moe_num_experts"),
        ("mpt", "n_layers"),
        ("bloom", "n_layer"),
    ],
)
def test_counts_without_bound_are_told_before_the_class_makes_one_of_each(
    name: str, key: str, where: str
) -> None:
    count = {key: 10**9}
    config, target = {"model_type": name, "hidden_size": 64}, {"hidden_size": 128}
    config, target = (config | count, target) if where == "config.json" else (config, target | count)
    with pytest.raises(UserError, match=rf"{where}: {key} 1,000,000,000 is more than any model has"):
        plan(config, target)


def test_factors_of_each_rotary_pair_must_be_as_many_as_pairs() -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 2.1, 2.2]}
    config = config_of("phi3", rope_parameters=ROPE | factors | {"rope_type": "longrope"})
    with pytest.raises(
        UserError, match=r"long_factor has 3 entries, wanted is one for each pair of 8 rotary dims"
    ):
        plan(config, {"hidden_size": 32})
    more = {"rope_parameters": {key: [*values, 3.0] for key, values in factors.items()}}
    to_hf_config(plan(config, {"hidden_size": 32, **more}).target_config)


def test_mistral_may_have_a_width_that_its_heads_do_not_divide(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", config_of("mistral", head_dim=6))
    assert grow(source, tmp_path / "out", target={"hidden_size": 30}).certificate.lossless


@pytest.mark.slow
def test_a_head_that_becomes_its_own_keeps_the_function(tmp_path: Path) -> None:
    for name in ("gemma", "gpt2"):
        source = make_checkpoint(tmp_path / name, config_of(name, tie_word_embeddings=True))
        width = families()[name].field_name("hidden_size")
        grown = grow(
            source, tmp_path / f"{name}-out", target={"tie_word_embeddings": False, width: 48}, noise=0.2
        )
        assert grown.certificate.lossless, grown.certificate.reasons
        assert moved(source, grown.folder) <= FLOOR[families()[name].norm]
        assert "the head too, which learns on its own now" in " ".join(inexact(grown.plan))


def test_a_source_that_does_not_run_in_float64_is_told(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", config_of("gpt2", reorder_and_upcast_attn=True))
    with pytest.raises(
        UserError,
        match=r"receipt: the source does not load or run in float64 \(RuntimeError: .*\); receipt=false grows",
    ):
        grow(source, tmp_path / "out", target={"n_inner": 50})
    assert not (tmp_path / "out").exists()
    assert grow(source, tmp_path / "out", target={"n_inner": 50}, receipt=False).certificate.lossless
