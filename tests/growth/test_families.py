"""Every family against the real transformers class: covered exactly, grown losslessly on every axis that it
allows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import FAMILIES, FLOOR, MULTI_HEAD, SIZES, config_of, growths, renamed
from helpers.models import random_model
from outgrow.growth import grow, plan
from outgrow.growth.memory import follow, plan_of
from outgrow.growth.operators import OPERATORS
from outgrow.model.build import build_model
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.family import families, family_of
from outgrow.model.geometry import parameter_count


@pytest.mark.parametrize("name", sorted(families()))
@pytest.mark.parametrize(
    "change",
    [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"attention_bias": True}],
    ids=str,
)
def test_the_schema_covers_the_real_model_exactly(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    if not change.keys() <= config_of(name).keys():
        pytest.skip("this family has no such choice")
    config = config_of(name, **change)
    model = build_model(config, seed=0)
    # files keep names that the library's own modules have given up, such as GPT-NeoX's embed_out
    model.save_pretrained(tmp_path)
    stored = {key: value.shape for key, value in Checkpoint(tmp_path).tensors.items()}
    assert {
        tensor.name: tensor.shape for tensor in family_of(config).tensors(config) if not tensor.tied
    } == stored
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lossless_on_every_axis(tmp_path: Path, checkpoint_maker: Any, name: str, tied: bool) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of(name, tie_word_embeddings=tied))
    floor = FLOOR[families()[name].norm]
    for axis, sizes in growths(name).items():
        grown = grow(source, tmp_path / axis, target=renamed(name, sizes), noise=0.3)
        assert grown.certificate.lossless, (axis, grown.certificate.reasons)
        assert grown.receipt.max_delta <= floor * max(1, grown.receipt.max_logit), axis
        assert grown.receipt.max_logit > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma2"])
def test_more_query_heads_per_group(tmp_path: Path, checkpoint_maker: Any, name: str) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of(name))
    head = {} if name == "gemma2" else {"hidden_size": 48}
    grown = grow(
        source,
        tmp_path / "out",
        target={"num_attention_heads": 8, "num_key_value_heads": 2, **head},
        noise=0.2,
    )
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt.max_delta <= FLOOR["rms"] * max(1, grown.receipt.max_logit)


@pytest.mark.parametrize("name", ["gpt_neox", "phi"])
def test_head_dims_grow_where_part_of_a_head_is_turned(
    tmp_path: Path, checkpoint_maker: Any, name: str
) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of(name))
    grown = grow(source, tmp_path / "out", target={"hidden_size": 32})
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt.max_delta <= FLOOR["layer"]


@pytest.mark.parametrize(("name", "grown"), [("gpt2", {"n_embd": 32}), ("opt", {"hidden_size": 32})])
def test_head_dims_grow_without_rotary_positions(
    tmp_path: Path, checkpoint_maker: Any, name: str, grown: dict[str, int]
) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of(name))
    assert grow(source, tmp_path / "out", target=grown).receipt.max_delta <= FLOOR["layer"]


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("llama", {"hidden_size": 32, "head_dim": 8}, "6 rotary dims become 8"),
        ("qwen3", {"head_dim": 8}, "q_norm normalises over it"),
        (
            "olmo2",
            {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 36},
            "q_norm normalises over it",
        ),
    ],
)
def test_where_exactness_is_impossible_the_certificate_says_so_and_growth_works(
    tmp_path: Path, checkpoint_maker: Any, name: str, sizes: dict[str, int], reason: str
) -> None:
    grown = grow(checkpoint_maker(tmp_path / "source", config_of(name)), tmp_path / "out", target=sizes)
    assert any(reason in found for found in grown.certificate.reasons), grown.certificate.reasons
    assert grown.receipt.max_delta > 1e-3


def test_layer_types_follow_the_layer_map() -> None:
    config = config_of("gemma2")
    assert plan(config, {"num_hidden_layers": 4}).target_config["layer_types"] == [
        "sliding_attention", "sliding_attention", "full_attention", "full_attention",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_certificate_and_logits_agree(name: str) -> None:
    """Over operators × ratios: whatever is certified keeps every logit, and whatever is not does not."""
    source, floor = random_model(config_of(name)), FLOOR[families()[name].norm]
    tokens = torch.randint(SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0))
    heads = {"num_attention_heads": 8, **({} if name in MULTI_HEAD else {"num_key_value_heads": 4})}
    doubled = {"hidden_size": 48, "intermediate_size": 80, **heads}
    with torch.no_grad():
        if families()[name].other_norms(
            config_of(name)
        ):  # queries and keys as small as fresh ones: where their norms feel an epsilon
            for called, parameter in source.named_parameters():
                parameter.mul_(1e-3 if called.endswith(("q_proj.weight", "k_proj.weight")) else 1.0)
        expected = source(input_ids=tokens).logits
        for operator, (ratio, sizes) in itertools.product(
            OPERATORS, {"doubled": doubled, "uneven": growths(name)["width"]}.items()
        ):
            if ratio == "uneven" and (
                operator == "hyperclone" or (operator == "sparkling" and sizes["hidden_size"] > 2 * 24)
            ):
                continue  # neither takes such a ratio
            made = plan_of(source, renamed(name, sizes), operator, noise=0.2)
            # At an uneven ratio LEMON's form scales epsilon, which OPT has in its code, not in its config.
            moved = (follow(made, source)(input_ids=tokens).logits - expected).abs().max()
            exact = bool(moved <= floor * max(1, expected.abs().max()))
            assert made.certificate.lossless == exact, (operator, ratio, made.certificate.reasons, moved)
            if ratio == "doubled":
                assert exact == (operator in ("lossless", "lemon", "hyperclone")), operator


@pytest.mark.parametrize("form", ["symmetric", "diagonal"])
@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hyperclone_forms(tmp_path: Path, checkpoint_maker: Any, name: str, form: str, noise: float) -> None:
    source = checkpoint_maker(tmp_path / "source", config_of(name, tie_word_embeddings=False))
    heads = {"num_attention_heads": 12, **({} if name in MULTI_HEAD else {"num_key_value_heads": 6})}
    target = renamed(name, {"hidden_size": 72, "intermediate_size": 80, **heads})
    grown = grow(source, tmp_path / "out", target=target, operator="hyperclone", form=form, noise=noise)
    assert grown.certificate.lossless
    assert grown.receipt.max_delta <= FLOOR[families()[name].norm] * max(1, grown.receipt.max_logit)
