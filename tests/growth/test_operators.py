"""Operators: matrices drawn by hand, then receipts on real transformers models in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from outgrow.growth import grow, plan
from outgrow.growth.expansion import AxisMap, Expansion, Fill, concatenate, product
from outgrow.growth.operators import OPERATORS
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint

BIGGER = {"hidden_size": 30, "intermediate_size": 50, "num_hidden_layers": 4}
TARGETS: dict[str, dict[str, Any]] = {
    "phi-2's ratios": BIGGER,
    "width doubled by heads": {"hidden_size": 48, "num_attention_heads": 6},
    "ffn only": {"intermediate_size": 97},
    "depth only, more than double": {"num_hidden_layers": 7},
    "vocabulary": {"vocab_size": 101},
    "width × 3, ffn × 3": {"hidden_size": 72, "intermediate_size": 120},
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("options", [{}, {"noise": 0.5}, {"operator": "lemon"}], ids=str)
def test_lossless_keeps_every_logit(
    tmp_path: Path, phi_folder: Path, name: str, options: dict[str, Any]
) -> None:
    grown = grow(phi_folder, tmp_path / "out", target=TARGETS[name], **options)
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt is not None
    assert grown.receipt.max_delta <= 1e-12
    assert grown.receipt.max_logit > 1, "the logits are large enough for the difference to mean something"


@pytest.mark.parametrize(
    "change", [{"tie_word_embeddings": True}, {"num_key_value_heads": 1}, {"qk_layernorm": True}], ids=str
)
def test_lossless_on_other_phis(
    tmp_path: Path, phi_config: dict[str, Any], checkpoint_maker: Any, change: dict[str, Any]
) -> None:
    source = checkpoint_maker(tmp_path / "source", phi_config | change)
    heads = (
        {"num_attention_heads": 6, "num_key_value_heads": 2}
        if "num_key_value_heads" in change
        else {"num_attention_heads": 6}
    )
    grown = grow(
        source,
        tmp_path / "out",
        target={"hidden_size": 48, "intermediate_size": 57, "num_hidden_layers": 5, **heads},
        noise=0.3,
    )
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt.max_delta <= 1e-12


def test_head_norms_forbid_lossless_head_growth(phi_config: dict[str, Any]) -> None:
    reasons = plan(phi_config | {"qk_layernorm": True}, BIGGER).certificate.reasons
    assert len(reasons) == 2
    assert all("normalises over it" in reason for reason in reasons)


@pytest.mark.slow
def test_certificate_and_receipt_agree(tmp_path: Path, phi_folder: Path) -> None:
    targets = [
        BIGGER,
        {"hidden_size": 48, "num_attention_heads": 6},
        {"intermediate_size": 80},
        {"num_hidden_layers": 6},
        {"vocab_size": 96},
    ]
    depths = ["identity", "stack", "proportional", "interleave", "top"]
    checked = {True: 0, False: 0}
    grid = [(operator, target, "identity") for operator in OPERATORS for target in targets]
    grid += [
        ("lossless", target, depth)
        for target in targets
        if "num_hidden_layers" in target
        for depth in depths[1:]
    ]
    for operator, target, depth in grid:
        try:
            grown = grow(
                phi_folder, tmp_path / "out", target=target, operator=operator, depth=depth, overwrite=True
            )
        except UserError as fault:
            assert "no whole factor" in str(fault)  # noqa: PT017
            continue
        assert grown.certificate.lossless == (grown.receipt.max_delta < 1e-9), (
            operator,
            target,
            depth,
            grown.certificate,
            grown.receipt,
        )
        checked[grown.certificate.lossless] += 1
    assert checked[True] >= 10
    assert checked[False] >= 20


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_low_precision_growth_adds_no_more_error_than_the_cast(
    tmp_path: Path, phi_config: dict[str, Any], checkpoint_maker: Any, dtype: str
) -> None:
    from outgrow.growth.verify import measure

    full = checkpoint_maker(tmp_path / "full", phi_config)
    cast = checkpoint_maker(tmp_path / "cast", phi_config, dtype)
    grown = grow(cast, tmp_path / "grown", target=BIGGER)
    assert {stored.dtype for stored in Checkpoint(grown.folder).tensors.values()} == {
        "BF16" if dtype == "bfloat16" else "F16"
    }
    assert measure(cast, grown.folder).max_delta <= measure(full, cast).max_delta


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in load_file(folder / "model.safetensors").items()}


def test_lossless_blocks_are_the_specified_ones(tmp_path: Path, phi_folder: Path) -> None:
    """growth.md's table, checked entry by entry at 24 → 30 (r = 1, s = 6, ρ = 0.8), head 8 → 10, ffn 40 →
    50."""
    old, new = (
        tensors(phi_folder),
        tensors(grow(phi_folder, tmp_path / "out", target=BIGGER, noise=0.0).folder),
    )
    c, root_rho = 1 / math.sqrt(0.8), math.sqrt(0.8)
    embed = old["model.embed_tokens.weight"]
    expected = np.concatenate([embed, np.repeat(embed.mean(1, keepdims=True), 6, 1)], 1) * c
    np.testing.assert_allclose(new["model.embed_tokens.weight"], expected, rtol=1e-12)

    gamma, beta = old["model.final_layernorm.weight"], old["model.final_layernorm.bias"]
    np.testing.assert_allclose(
        new["model.final_layernorm.weight"], np.r_[gamma, np.full(6, gamma.mean())] * root_rho, rtol=1e-12
    )
    np.testing.assert_allclose(new["model.final_layernorm.bias"], np.r_[beta, np.zeros(6)], rtol=1e-12)
    np.testing.assert_array_equal(new["lm_head.weight"][:, :24], old["lm_head.weight"])
    assert new["lm_head.weight"][:, 24:].std() > 0

    layer = "model.layers.3."  # ← source layer 2
    source = "model.layers.2."
    q_old, q_new = (
        old[source + "self_attn.q_proj.weight"].reshape(3, 8, 24),
        new[layer + "self_attn.q_proj.weight"].reshape(3, 10, 30),
    )
    np.testing.assert_allclose(q_new[:, :8, :24], q_old * math.sqrt(10 / 8), rtol=1e-12)
    assert q_new[:, 8:].std() > 0
    k_new = new[layer + "self_attn.k_proj.weight"].reshape(3, 10, 30)
    np.testing.assert_array_equal(
        k_new[:, :8, :24], old[source + "self_attn.k_proj.weight"].reshape(3, 8, 24)
    )
    assert (k_new[:, 8:] == 0).all()
    o_old, o_new = (
        old[source + "self_attn.dense.weight"].reshape(24, 3, 8),
        new[layer + "self_attn.dense.weight"].reshape(30, 3, 10),
    )
    np.testing.assert_allclose(o_new[:24, :, :8], o_old * c, rtol=1e-12)
    np.testing.assert_allclose(o_new[24:, :, :8], np.broadcast_to(o_old.mean(0), (6, 3, 8)) * c, rtol=1e-12)
    assert (o_new[:, :, 8:] == 0).all()
    np.testing.assert_array_equal(
        new[layer + "mlp.fc1.weight"][40:, :24], old[source + "mlp.fc1.weight"][:10]
    )
    fc2_old, fc2_new = old[source + "mlp.fc2.weight"], new[layer + "mlp.fc2.weight"]
    np.testing.assert_allclose(fc2_new[:24, :10], fc2_old[:, :10] * c / 2, rtol=1e-12)
    np.testing.assert_allclose(fc2_new[:24, 40:], fc2_old[:, :10] * c / 2, rtol=1e-12)
    np.testing.assert_allclose(fc2_new[:24, 10:40], fc2_old[:, 10:] * c, rtol=1e-12)

    idle = "model.layers.1."  # the second copy of source layer 0
    for name in ("self_attn.dense", "mlp.fc2"):
        assert not new[f"{idle}{name}.weight"].any()
        assert not new[f"{idle}{name}.bias"].any()
    assert new[idle + "mlp.fc1.weight"].any()


def test_noise_breaks_the_symmetry_of_copies_and_sums_to_zero(tmp_path: Path, phi_folder: Path) -> None:
    old = tensors(phi_folder)["model.layers.0.mlp.fc2.weight"]
    new = tensors(grow(phi_folder, tmp_path / "out", target={"intermediate_size": 100}, noise=0.5).folder)[
        "model.layers.0.mlp.fc2.weight"
    ]
    first, second, third = new[:, :20], new[:, 40:60], new[:, 80:]  # units 0…19 have three copies, 20…39 two
    np.testing.assert_allclose(first + second + third, old[:, :20], atol=1e-12)
    np.testing.assert_allclose(new[:, 20:40] + new[:, 60:80], old[:, 20:], atol=1e-12)
    spread = (first - second).std() / old.std()
    assert 0.5 / 3 < spread < 0.5


DRAWN_TILES = {  # n = 4 → N = 7
    "edge": [0, 1, 2, 3, 0, 1, 2],
    "middle": [3, 0, 1, 2, 3, 0, 1],  # off = 1
    "center": [-1, 0, 1, 2, 3, -1, -1],
}


@pytest.mark.parametrize("mode", DRAWN_TILES)
def test_tiles_of_the_feed_forward_units(phi_config: dict[str, Any], mode: str) -> None:
    small = phi_config | {"intermediate_size": 4}
    grown = plan(small, {"intermediate_size": 7}, "tile", mode=mode).recipe.expansions["ffn"].write
    assert np.where(grown.copies, grown.index, -1).tolist() == DRAWN_TILES[mode]
    assert (grown.gain == 1).all()


def test_tile_writes_the_drawn_matrix_without_rescaling(tmp_path: Path, phi_folder: Path) -> None:
    old = tensors(phi_folder)
    new = tensors(
        grow(phi_folder, tmp_path / "out", target=BIGGER, operator="tile", depth="proportional").folder
    )
    rows, columns = (np.arange(50) - 5) % 40, (np.arange(30) - 3) % 24
    np.testing.assert_array_equal(
        new["model.layers.0.mlp.fc1.weight"], old["model.layers.0.mlp.fc1.weight"][np.ix_(rows, columns)]
    )
    np.testing.assert_array_equal(
        new["model.layers.3.input_layernorm.weight"], old["model.layers.2.input_layernorm.weight"][columns]
    )
    head = (np.arange(10) - 1) % 8
    q_rows = (np.arange(3)[:, None] * 8 + head).reshape(-1)
    np.testing.assert_array_equal(
        new["model.layers.0.self_attn.q_proj.weight"],
        old["model.layers.0.self_attn.q_proj.weight"][np.ix_(q_rows, columns)],
    )


def test_flat_tiles_mix_heads(tmp_path: Path, phi_folder: Path) -> None:
    grown = grow(phi_folder, tmp_path / "out", target=BIGGER, operator="tile", heads="flat")
    old, new = tensors(phi_folder), tensors(grown.folder)
    flat = (np.arange(30) - 3) % 24
    np.testing.assert_array_equal(
        new["model.layers.0.self_attn.q_proj.weight"],
        old["model.layers.0.self_attn.q_proj.weight"][np.ix_(flat, flat)],
    )
    assert any("not grown space by space" in reason for reason in grown.certificate.reasons)


def test_random_pad_keeps_the_corner_and_draws_the_rest(tmp_path: Path, phi_folder: Path) -> None:
    old, new = (
        tensors(phi_folder),
        tensors(grow(phi_folder, tmp_path / "out", target=BIGGER, operator="random_pad").folder),
    )
    fc1 = new["model.layers.0.mlp.fc1.weight"]
    np.testing.assert_array_equal(fc1[:40, :24], old["model.layers.0.mlp.fc1.weight"])
    fresh = np.r_[fc1[40:].reshape(-1), fc1[:40, 24:].reshape(-1)]
    assert abs(fresh.std() / 0.02 - 1) < 0.1
    assert abs(fresh.mean()) < 0.002
    assert (new["model.layers.0.mlp.fc1.bias"][40:] == 0).all()
    assert (new["model.layers.0.input_layernorm.weight"][24:] == 1).all()


def test_scratch_is_distributed_as_the_librarys_initialisation(tmp_path: Path, phi_folder: Path) -> None:
    from outgrow.model.build import build_model

    grown = grow(phi_folder, tmp_path / "out", target=BIGGER, operator="scratch")
    new = tensors(grown.folder)
    library = build_model(grown.plan.target_config, seed=0).state_dict()
    for name, value in library.items():
        if value.ndim == 1:
            assert np.array_equal(new[name], value.double().numpy()), name
        else:
            assert abs(new[name].std() / value.double().numpy().std() - 1) < 0.15, name


def test_a_plan_broken_on_purpose_is_caught(phi_config: dict[str, Any]) -> None:
    from dataclasses import replace

    good = plan(phi_config, BIGGER)
    assert good.certificate.lossless

    def with_expansion(space: str, **changes: Any) -> Any:
        expansion = replace(good.recipe.expansions[space], **changes)
        recipe = replace(good.recipe, expansions={**good.recipe.expansions, space: expansion})
        steps = tuple(replace(step, maps=recipe.maps(step.tensor)) for step in good.steps)
        return replace(good, recipe=recipe, steps=steps)

    residual, ffn, qk, v = (good.recipe.expansions[space] for space in ("residual", "ffn", "qk", "v"))
    broken = {
        "not divided": with_expansion("ffn", read=ffn.write),
        "writers are scaled": with_expansion("ffn", write=ffn.write.scaled(2), read=ffn.read.scaled(0.5)),
        "expected 1.118": with_expansion("qk", write=qk.write.scaled(1 / math.sqrt(10 / 8))),
        "neither as zero": with_expansion("v", read=v.read.filled(Fill.RANDOM)),
        "hold other than mean": with_expansion("residual", write=residual.write.filled(Fill.ZERO)),
        "variance": with_expansion("residual", write=residual.write.scaled(2)),
        "the final norm: scale": with_expansion("residual", final_scale=residual.scale.scaled(2)),
        "norms: shift": with_expansion("residual", shift=residual.shift.scaled(2)),
        "shift on new indices is read": with_expansion("residual", shift=residual.shift.filled(Fill.RANDOM)),
        "must be zero": replace(
            good, steps=tuple(replace(step, zero=False, source="lm_head.bias") for step in good.steps)
        ),
        "takes lm_head.bias": replace(
            good, steps=tuple(replace(step, source="lm_head.bias") for step in good.steps)
        ),
        "although its layer is to work": replace(
            good, steps=tuple(replace(step, zero=True) for step in good.steps)
        ),
        "not grown space by space": replace(
            good,
            steps=tuple(
                replace(step, maps=tuple(axis.scaled(1.01) for axis in step.maps)) for step in good.steps
            ),
        ),
    }
    for words, plan_ in broken.items():
        assert any(words in reason for reason in plan_.certificate.reasons), (
            words,
            plan_.certificate.reasons,
        )


def test_a_changed_value_that_is_no_size_is_a_reason(phi_config: dict[str, Any]) -> None:
    target = {**phi_config, "hidden_act": "relu", "resid_pdrop": 0.1}
    assert plan(phi_config, target).certificate.reasons == (
        "config hidden_act: 'gelu_new' becomes 'relu', which is no size and may change the function",
    )
    rope = {"rope_parameters": {"rope_theta": 5e5}}
    assert any("rope_theta" in reason for reason in plan(phi_config, rope).certificate.reasons)
    more_turned = plan(phi_config, BIGGER | {"partial_rotary_factor": 0.6}).certificate.reasons
    assert any("4 rotary dims become 6" in reason for reason in more_turned)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ({"hidden_size": 21}, {}, r"residual 21 is smaller than the source's 24 \(hidden_size in"),
        ({"num_hidden_layers": 2}, {}, "layer 2 is smaller than the source's 3"),
        ({"hidden_size": 48, "num_attention_heads": 12}, {}, "qk 4 is smaller"),
        ({"hidden_size": 48, "num_attention_heads": 12}, {}, r"\(hidden_size / num_attention_heads in"),
        ({"tie_word_embeddings": True}, {}, "would be lost"),
        ({}, {"operator": "losless"}, "unknown operator 'losless'; did you mean 'lossless'"),
        ({}, {"mode": "edge"}, "unknown option of operator 'lossless' 'mode'"),
        ({}, {"operator": "tile", "mode": "left"}, "unknown tile mode 'left'"),
        ({}, {"operator": "tile", "heads": 3}, "unknown tile heads"),
        ({}, {"operator": "hyperclone", "form": "diagonl"}, "did you mean 'diagonal'"),
        (BIGGER, {"operator": "hyperclone"}, "residual 24 → 30 is no whole factor"),
        ({"hidden_size": 72}, {"operator": "sparkling"}, "more than double"),
        ({}, {"noise": -1.0}, "noise -1"),
    ],
)
def test_growths_that_cannot_be(
    phi_config: dict[str, Any], target: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(phi_config, target, **options)


def test_axis_maps_compose_like_kronecker_products_and_block_sums() -> None:
    def matrix(grown: AxisMap) -> np.ndarray:
        made = np.zeros((grown.target, grown.source))
        made[np.arange(grown.target), grown.index] = grown.gain * grown.copies
        return made

    left, right = (
        AxisMap.of(2, np.array([0, 1, 0]), gain=[1.0, 2.0, 3.0]),
        AxisMap.of(3, np.array([2, -1, 0, 1]), Fill.ZERO, gain=0.5),
    )
    np.testing.assert_array_equal(matrix(product(left, right)), np.kron(matrix(left), matrix(right)))
    joined = matrix(concatenate(left, right))
    np.testing.assert_array_equal(joined[:3, :2], matrix(left))
    np.testing.assert_array_equal(joined[3:, 2:], matrix(right))
    assert not joined[:3, 2:].any()
    assert not joined[3:, :2].any()


def test_split_readers_sum_to_the_source_over_all_small_sizes() -> None:
    for n, N in itertools.product(range(1, 9), range(1, 20)):
        if n > N:
            continue
        copies = AxisMap.of(n, np.arange(N) % n)
        np.testing.assert_allclose(np.bincount(copies.index, copies.split().gain), 1.0)
        assert copies.number().tolist() == [position // n for position in range(N)]
    assert Expansion.identity(4).write.is_identity


@pytest.mark.slow
def test_randomness_goes_by_name_not_by_threads_or_shards(tmp_path: Path, phi_folder: Path) -> None:
    one = grow(phi_folder, tmp_path / "one", target=BIGGER, noise=0.4, threads=1)
    many = grow(phi_folder, tmp_path / "many", target=BIGGER, noise=0.4, threads=5, max_shard_bytes=20_000)
    other = grow(phi_folder, tmp_path / "other", target=BIGGER, noise=0.4, seed=1)
    assert len(list(many.folder.glob("model-*-of-*.safetensors"))) > 3
    with Checkpoint(one.folder) as a, Checkpoint(many.folder) as b, Checkpoint(other.folder) as c:
        assert all(np.array_equal(a.read(name), b.read(name)) for name in a.tensors)
        assert any(not np.array_equal(a.read(name), c.read(name)) for name in a.tensors)
    assert one.plan.hash == many.plan.hash != other.plan.hash
    assert torch.equal(
        load_file(one.folder / "model.safetensors")["lm_head.bias"],
        load_file(phi_folder / "model.safetensors")["lm_head.bias"],
    )
