"""Families without a schema here: depth by the layers' names, held against transformers' own modules."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import make_checkpoint
from helpers.unwritten import STRANGERS, TINY, config_of
from outgrow.growth import grow, plan
from outgrow.growth.miniature import scaled
from outgrow.growth.verify import measure
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model, load_model, to_hf_config
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.depth_only import outline
from outgrow.model.derive import derive
from outgrow.model.twin import tiny_twin


def layers_of(model: Any) -> torch.nn.ModuleList:
    count = model.config.num_hidden_layers
    return next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("depth", ["stack", "proportional", [0, 1, 1, 2, 2]], ids=str)
def test_depth_grows_without_a_schema(tmp_path: Path, checkpoint_maker: Any, name: str, depth: Any) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of(name))
    grown = grow(source, tmp_path / "out", target={"num_hidden_layers": 5}, depth=depth)
    model = load_model(grown.folder, dtype="float64", attention="eager").eval()
    deeper = config_of(name) | {model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): 5}
    expected = build_model(deeper, seed=0, dtype="float64", attention="eager").eval()
    original = load_model(source, dtype="float64", attention="eager").eval()
    expected.load_state_dict(original.state_dict(), strict=False)
    for layer, number in zip(layers_of(expected), grown.plan.layers.layers, strict=True):
        layer.load_state_dict(copy.deepcopy(layers_of(original)[number].state_dict()))
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert not grown.certificate.lossless
    assert any("has no schema" in note for note in grown.plan.notes)


def test_a_family_that_the_library_does_not_know_grows_in_depth(
    tmp_path: Path, checkpoint_maker: Any
) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of("mpt"))
    config = json.loads((source / "config.json").read_text()) | {
        "model_type": "mine",
        "mlp_only_layers": [2],
        "block_kinds": ["a", "b", "c"],
    }
    (source / "config.json").write_text(json.dumps(config))
    grown = grow(source, tmp_path / "out", target={"n_layers": 4}, depth=[0, 2, 2, 1], receipt=False)
    written = json.loads((grown.folder / "config.json").read_text())
    assert written["n_layers"] == 4
    assert written["mlp_only_layers"] == [1, 2]
    assert written["block_kinds"] == ["a", "c", "c", "b"]
    with Checkpoint(source) as before, Checkpoint(grown.folder) as after:
        assert len(after.tensors) == len(before.tensors) + sum(
            ".blocks.0." in name for name in before.tensors
        )
        for number, layer in enumerate([0, 2, 2, 1]):
            name = "transformer.blocks.{}.ffn.up_proj.weight"
            assert (after.read(name.format(number)) == before.read(name.format(layer))).all()


def test_tensors_that_only_some_layers_have_move_with_their_layer(tmp_path: Path) -> None:
    folder = Path(tmp_path / "odd")
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "odd", "n_layer": 2, "dtype": "float64"}')
    tensors = {
        "h.0.a": torch.ones(2, 3, 4),
        "h.1.a": torch.full((2, 5), 2.0),
        "h.1.b": torch.tensor(7),
        "wte": torch.ones(2),
    }
    save_file(tensors, folder / "model.safetensors")
    grown = grow(folder, tmp_path / "out", target={"n_layer": 4}, depth=[0, 1, 1, 0], receipt=False)
    with Checkpoint(grown.folder) as out:
        shapes = {name: stored.shape for name, stored in out.tensors.items()}
        assert shapes == {
            "h.0.a": (2, 3, 4), "h.1.a": (2, 5), "h.2.a": (2, 5), "h.3.a": (2, 3, 4), "h.1.b": (), "h.2.b": (), "wte": (2,),
        }  # fmt: skip
        assert out.read("h.2.b").item() == 7
    schema = outline({"n_layer": 2}, {name: tuple(tensor.shape) for name, tensor in tensors.items()}).schema
    assert schema.splitlines() == [
        "h.*.a  tensor 2, 3, 4 in layers 0", "h.*.a  tensor 2, 5 in layers 1", "h.*.b  tensor scalar in layers 1", "wte  tensor 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "depth"), [({"n_layers": 5}, "identity"), ({"d_model": 32}, "stack"), ("phi_2", "stack")]
)
def test_a_family_that_nobody_knows_grows_by_whole_layers_alone(
    tmp_path: Path, target: Any, depth: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "n_layers": 2, "d_model": 2}')
    save_file({"h.0.a": torch.ones(2), "h.1.a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError,
        match=r"transformers has no causal language model of that type.*what is left: whole layers copied",
    ):
        plan(tmp_path, target, depth=depth)
    with pytest.raises(
        UserError, match="new layers start as the identity where what writes to the residual stream is zero"
    ):
        plan(
            tmp_path,
            {"n_layers": 3},
            family=outline({"model_type": "mine", "n_layers": 2}, {"h.0.a": (2,), "h.1.a": (2,)}),
        )


@pytest.mark.parametrize(
    ("names", "layers", "message"),
    [
        (["wte"], 2, "no tensor's name has a layer's number"),
        (["h.0.a", "h.1.a"], 3, "no config key says that h.* has 2 layers"),
        (["h.0.a", "h.2.a"], 2, r"not clear: h\.\* \(2 numbers\)"),
        (
            ["encoder.0.a", "encoder.1.a", "decoder.0.a", "decoder.1.a"],
            2,
            r"not clear: decoder\.\* .*, encoder\.\*",
        ),
    ],
)
def test_layers_that_cannot_be_told_apart_are_refused(names: list[str], layers: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        outline({"model_type": "mine", "n_layers": layers}, {name: (2,) for name in names})


DERIVED: dict[str, dict[str, Any]] = {
    "mpt": {"d_model": 24, "n_layers": 4},  # ALiBi's slopes belong to the heads, so head dims grow
    "falcon": {"hidden_size": 24, "num_attention_heads": 3},  # multi-query, fused
    "starcoder2": {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 31},
    # one norm for two blocks, logits scaled, tied
    "cohere": {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 4},
    "gpt_oss": {  # experts in one tensor
        "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 20, "num_hidden_layers": 4,
    },
    # experts in many
    "mixtral": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20},
}  # fmt: skip
HEADS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
# Switches of classes, each with a growth that it asks something special of.
SWITCHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # scales of the norms of queries and keys in two axes, heads and head dim
    "cohere with norms of heads": (
        {"model_type": "cohere", **HEADS, "intermediate_size": 24, "use_qk_norm": True},
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    # the switch for one key-value head is on, and the class passes over it
    "falcon of 40 B and more": (
        {
            "model_type": "falcon", "hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "num_hidden_layers": 2,
            "new_decoder_architecture": True, "alibi": False,
        },
        {"hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 3},
    ),
    # a norm for each head, each a tensor
    "stablelm with norms of heads": (
        {"model_type": "stablelm", **HEADS, "intermediate_size": 24, "qk_layernorm": True},
        {"num_hidden_layers": 5},
    ),
    # what each layer adds is divided by the root of their number
    "minicpm3": (
        {"model_type": "minicpm3", **HEADS, "num_key_value_heads": 4, "intermediate_size": 24, **LATENT},
        {"num_hidden_layers": 5, "intermediate_size": 30},
    ),
    # a hidden size that the heads divide, though the head dim is given; not so in the tiny model with 6 of 64
    "arcee with more heads alone": (
        {"model_type": "arcee", **HEADS, "hidden_size": 48, "head_dim": 8, "intermediate_size": 24},
        {"num_attention_heads": 6, "num_key_value_heads": 3},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHED)
def test_a_derived_schema_minds_the_switches_of_its_class(
    tmp_path: Path, checkpoint_maker: Any, name: str
) -> None:
    switches, target = SWITCHED[name]
    source = checkpoint_maker(tmp_path / "source", to_hf_config({**TINY, **switches}).to_dict())
    grown = grow(source, tmp_path / "out", target=target, noise=0.2)
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt.max_delta <= 2e-5 * max(1, grown.receipt.max_logit)


@pytest.mark.slow
def test_a_number_that_follows_the_layers_is_held_against_a_target_that_names_it(
    tmp_path: Path, checkpoint_maker: Any
) -> None:
    """MiniCPM3's scale_depth, over the root of the layers, is what each of them adds."""
    switches, _ = SWITCHED["minicpm3"]
    config = to_hf_config({**TINY, **switches, "scale_depth": 1.4}).to_dict()
    assert plan(config, {"num_hidden_layers": 12}).target_config["scale_depth"] == pytest.approx(2.8)
    deeper = to_hf_config({**config, "num_hidden_layers": 12})
    reasons = plan(config, deeper).certificate.reasons
    told = "config scale_depth: 1.4, which with 12 layers scales what each of them adds otherwise; 2.8 would"
    assert any(told in reason for reason in reasons), reasons
    source = checkpoint_maker(tmp_path / "source", config)
    kept = grow(source, tmp_path / "out", target={"num_hidden_layers": 5, "scale_depth": 1.4})
    assert not kept.certificate.lossless
    assert kept.receipt.max_delta > 1e-3 * kept.receipt.max_logit


@pytest.mark.slow
@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_schema_grows_losslessly(tmp_path: Path, checkpoint_maker: Any, name: str) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of(name))
    grown = grow(source, tmp_path / "out", target=DERIVED[name], noise=0.2)
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt.max_logit > 0.1
    assert grown.receipt.max_delta <= 2e-5 * max(1, grown.receipt.max_logit)
    assert "confirmed: a tiny random model of the family" in grown.plan.notes[1]


@pytest.mark.slow
def test_a_file_without_the_base_models_prefix_and_with_old_buffers(
    tmp_path: Path, checkpoint_maker: Any
) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of("bloom"))
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(
        tensors | {"h.0.self_attention.masked_bias": torch.ones(1, dtype=torch.bool)},
        source / "model.safetensors",
    )
    grown = grow(source, tmp_path / "out", target={"hidden_size": 32, "n_layer": 4}, receipt=False)
    save_file(tensors, source / "model.safetensors")
    assert measure(source, grown.folder).max_delta <= 1e-12
    with Checkpoint(grown.folder) as out:
        assert "h.3.mlp.dense_h_to_4h.weight" in out.tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "depth", "message"),
    [
        (
            "mpt",
            {"d_model": 24, "n_heads": 3},
            "identity",
            "first token stay: how a head weighs earlier tokens depends on how many heads .* n_heads cannot",
        ),
        # a norm behind the embedding: whole factors
        (
            "bloom",
            {"hidden_size": 24},
            "identity",
            "model move by .* and stay where hidden_size is doubled: in this family it grows by whole factors",
        ),
        # all of a head is turned
        ("cohere", {"head_dim": 16}, "identity", "logits of a tiny random model move by"),
    ],
)
def test_what_is_not_confirmed_is_refused(
    tmp_path: Path, checkpoint_maker: Any, name: str, target: Any, depth: str, message: str
) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of(name))
    with pytest.raises(
        UserError, match=f"none could be derived and confirmed for this growth: .*({message})"
    ):
        grow(source, tmp_path / "out", target=target, depth=depth)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sizes_that_the_class_refuses_are_quoted_as_the_user_has_them() -> None:
    """And not those of the tiny model, on which the growth would be tried."""
    arcee, _ = SWITCHED["arcee with more heads alone"]
    with pytest.raises(UserError, match=r"The hidden size \(32\) is not a multiple of .* heads \(6\)"):
        plan({**TINY, **arcee, "hidden_size": 32}, {"num_attention_heads": 6, "num_key_value_heads": 3})


@pytest.mark.slow
def test_tensors_that_come_with_more_heads_are_told() -> None:
    stablelm, _ = SWITCHED["stablelm with norms of heads"]
    told = (
        r"transformers' class has .*k_layernorm\.norms\.2\.weight, .* there are more tensors, not larger ones"
    )
    with pytest.raises(UserError, match=told):
        plan({**TINY, **stablelm}, {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64})


WIDE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["tile", "random_pad", "scratch"])
def test_an_operator_that_is_not_lossless_grows_head_dims_of_a_derived_family(operator: str) -> None:
    """As it does where the family has a schema of its own: full rotary positions turn other dims, and nobody
    said otherwise."""
    derived = plan(config_of("mixtral", **WIDE), {"head_dim": 16}, operator)
    llama = {"model_type": "llama", **TINY, **WIDE, "intermediate_size": 12, "num_hidden_layers": 2}
    written = plan(to_hf_config(llama).to_dict(), {"head_dim": 16}, operator)
    attention = {step.name: step.shape for step in written.steps if "self_attn" in step.name}
    assert attention == {step.name: step.shape for step in derived.steps if step.name in attention}
    assert derived.notes[1].startswith(
        f"shapes confirmed, not logits: a tiny random model of the family, grown by {operator} (head_dim"
    )
    assert not derived.certificate.lossless


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["lossless", "net2net"])
def test_an_operator_that_claims_to_be_lossless_is_held_to_it(operator: str) -> None:
    """By a derived schema, which knows of no rotary positions, the certificate would be lossless."""
    with pytest.raises(
        UserError,
        match="none could be derived and confirmed for this growth: the logits of a tiny random model move by",
    ):
        plan(config_of("mixtral", **WIDE), {"head_dim": 16}, operator)


@pytest.mark.slow
def test_hidden_size_and_heads_grow_by_ratios_of_their_own() -> None:
    target = {"hidden_size": 80, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}
    grown = plan(config_of("mixtral", **WIDE), target)
    sizes = "hidden_size 64 → 160, num_attention_heads 4 → 12, num_key_value_heads 2 → 4, head_dim None → 16"
    assert sizes in grown.notes[1]
    assert grown.certificate.lossless
    coupled = plan(
        config_of("mixtral", **WIDE),
        {key: size for key, size in target.items() if key != "head_dim"} | {"hidden_size": 120},
        "tile",
    )
    # head dim 8 → 10, as 16 → 20
    assert "hidden_size 64 → 240, num_attention_heads 4 → 12" in coupled.notes[1]


def test_a_smaller_head_dim_is_told_in_the_users_sizes() -> None:
    with pytest.raises(UserError, match="qk 6 is smaller than the source's 8"):
        plan(config_of("mixtral", **WIDE), {"hidden_size": 48, "num_attention_heads": 8}, "tile")


@pytest.mark.parametrize(
    ("tiny", "before", "after", "multiple", "size"),
    [
        (64, 2048, 4096, 1, 128),
        (64, 2048, 2560, 1, 80),
        (4, 71, 80, 1, 5),
        (16, 64, 68, 2, 20),  # 17 is odd
        (2, 8, 10, 1, 3),
        (2, 8, 15, 1, 3),  # not 4, which would be a whole factor
        (64, 64, 64 * 100, 1, 256),
        (64, 64, 64 * 100 + 1, 1, 257),
        (64, 64, 48, 1, 64),
    ],
)
def test_sizes_in_miniature(tiny: int, before: int, after: int, multiple: int, size: int) -> None:
    assert scaled(tiny, before, after, multiple) == size


@pytest.mark.slow
def test_the_hash_of_a_derived_plan_is_the_same_where_the_rehearsal_rounds_otherwise() -> None:
    made = plan(config_of("mixtral", **WIDE), {"intermediate_size": 48})
    other = replace(
        made, notes=(made.notes[0], "confirmed: kept its logits in float64 to 3e-07 of the largest")
    )
    assert other.hash == made.hash
    assert other.to_dict()["notes"] == list(other.notes) != list(made.notes)
    assert made.hash != plan(config_of("mixtral", **WIDE), {"intermediate_size": 40}).hash


@pytest.mark.slow
def test_a_derived_schema_says_what_each_axis_is() -> None:
    assert plan(config_of("gpt_oss"), {"hidden_size": 24}).family.schema.splitlines() == [
        "model.embed_tokens  vocab -> residual",
        "model.layers.*.self_attn.sinks  tensor (kv group)",
        "model.layers.*.self_attn.q_proj  (kv group qk) <- residual + bias",
        "model.layers.*.self_attn.k_proj  (kv qk*) <- residual + bias",
        "model.layers.*.self_attn.v_proj  (kv v) <- residual + bias",
        "model.layers.*.self_attn.o_proj  residual <- (kv group v) + bias",
        "model.layers.*.mlp.router  3 <- residual + bias",
        "model.layers.*.mlp.experts.gate_up_proj  tensor 3, residual*, [ffn | ffn]",
        "model.layers.*.mlp.experts.gate_up_proj_bias  tensor 3, [ffn | ffn]",
        "model.layers.*.mlp.experts.down_proj  tensor 3, ffn*, residual",
        "model.layers.*.mlp.experts.down_proj_bias  tensor 3, residual",
        "model.layers.*.input_layernorm  norm residual",
        "model.layers.*.post_attention_layernorm  norm residual",
        "model.norm  final norm residual",
        "lm_head  vocab <- residual",
    ]


@pytest.mark.slow
def test_a_depth_that_the_librarys_class_would_not_take_is_refused(
    tmp_path: Path, checkpoint_maker: Any
) -> None:
    """DeepSeek's first layers are dense by their number, so a repeated first layer is no layer that its class
    builds in second place."""
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
    }
    latent = {
        "q_lora_rank": 6,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
    }
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    config = to_hf_config({"model_type": "deepseek_v3", **TINY, **sizes, **latent, **experts}).to_dict()
    source = checkpoint_maker(tmp_path / "source", config)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp.*transformers' class wants none"):
        grow(source, tmp_path / "out", target={"num_hidden_layers": 3}, depth=[0, 0, 1])
    grown = grow(
        source, tmp_path / "out", target={"num_hidden_layers": 3, "hidden_size": 24}, depth="identity_top"
    )
    assert grown.certificate.lossless
    assert grown.receipt.max_delta <= 2e-5 * max(1, grown.receipt.max_logit)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (10**4, "n_layer 10,000, but the file has"),
        (10**9, "n_layer 1,000,000,000 is more than any model has"),
    ],
)
def test_a_config_with_more_layers_than_the_file_has_tensors_builds_nothing(
    layers: int, said: str, tmp_path: Path, checkpoint_maker: Any
) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of("bloom"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"n_layer": layers}))
    with pytest.raises(UserError, match=said):
        grow(source, tmp_path / "out", target={"hidden_size": 32})


@pytest.mark.slow
def test_a_deeper_decoder_remembers_keys_and_values_of_all_its_layers(tmp_path: Path) -> None:
    """The library counts them by the encoder's layers, which a decoder alone does not have, so that count
    follows."""
    sizes = {
        "d_model": 16,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 24,
        "decoder_layers": 2,
        "encoder_layers": 2,
    }
    config = to_hf_config({"model_type": "pegasus", **TINY, **sizes, "max_position_embeddings": 32}).to_dict()
    source = make_checkpoint(tmp_path / "source", config)
    grown = grow(source, tmp_path / "out", target={"decoder_layers": 4, "decoder_ffn_dim": 30})
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt is not None  # which the model was run for, as anybody runs it
    assert grown.receipt.max_delta <= 1e-12
    assert grown.plan.target_config["encoder_layers"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("target", [{"hidden_size": 128}, {"num_hidden_layers": 8}], ids=str)
def test_a_class_that_counts_the_list_of_its_layers_and_saves_no_count(
    tmp_path: Path, target: dict[str, int]
) -> None:
    """Nemotron-H: state spaces, experts, attention and an MLP take turns."""
    config = dict(tiny_twin(to_hf_config({"model_type": "nemotron_h"}).to_dict()).config)
    assert config.pop("num_hidden_layers") == len(config["layers_block_type"]) == 4
    source = make_checkpoint(tmp_path / "source", config)
    assert "num_hidden_layers" not in json.loads((source / "config.json").read_text())
    grown = grow(source, tmp_path / "out", target=target)
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt is not None
    assert grown.receipt.max_delta <= 2e-5 * max(1, grown.receipt.max_logit)


def test_a_config_with_infinities_as_the_library_writes_them(tmp_path: Path) -> None:
    to_hf_config({"model_type": "falcon_h1"}).save_pretrained(tmp_path)
    assert '"__float__"' in (tmp_path / "config.json").read_text()
    assert to_hf_config(json.loads((tmp_path / "config.json").read_text())).time_step_limit[1] == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # attention in every third layer only, as a list of three words says
        ("recurrent_gemma", {"num_hidden_layers": 6}),
        ("git", {}),  # beside a tower for pictures
        ("deepseek_v2", {}),  # whose default config has no number of experts for each token
    ],
)
def test_a_tiny_twin_stands_for_all_kinds_of_layers_and_is_tiny(name: str, changes: dict[str, Any]) -> None:
    draft = derive(to_hf_config({"model_type": name, **changes}).to_dict())
    assert sum(prod(shape) for shape in draft.axes.shapes.values()) < 1_000_000
    if name == "recurrent_gemma":
        assert any("q_proj" in tensor for tensor in draft.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["starcoder2", "gpt_oss"])
def test_a_growth_by_a_derived_schema_can_be_followed_again(
    tmp_path: Path, checkpoint_maker: Any, name: str
) -> None:
    from outgrow.growth.record import recorded_plan

    target = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    grown = grow(
        checkpoint_maker(tmp_path / "source", config_of(name)), tmp_path / "out", target=target, receipt=False
    )
    again = recorded_plan(tmp_path / "out")
    assert (again.hash, [step.name for step in again.steps]) == (
        grown.plan.hash,
        [step.name for step in grown.plan.steps],
    )
