"""Diagnostics of copies and new entries, against plain PyTorch on matrices whose copies are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from helpers.models import make_checkpoint
from helpers.toy import assert_close_run, at, ended, rows, timeless, weights, without_target
from outgrow.growth import grow
from outgrow.growth.expansion import AxisMap
from outgrow.model.build import load_model
from outgrow.model.config import read_config
from outgrow.model.presets import preset
from outgrow.train.compose import compose
from outgrow.train.run.clock import Meter
from outgrow.train.run.diagnostics import Diagnostics
from outgrow.train.run.log import _diagnosis
from outgrow.train.run.state import Position
from outgrow.train.run.symmetry import copied_pairs, cosine
from outgrow.train.settings import Budget, GrowthSettings, settings_hash
from outgrow.train.start.stages import Stage

SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
Looked = tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("source") / "phi", preset("tiny_source") | SMALL, "float32"
    )


@pytest.fixture(scope="module")
def look(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Looked]:
    """A step of plain gradient descent on a grown network: its row, and the weights before and after it."""

    def looked(
        operator: str, target: dict[str, Any], rate: float = 0.1, origin: Path = source, **options: Any
    ) -> Looked:
        folder = tmp_path_factory.mktemp("grown") / operator
        grow(origin, folder, target=target, operator=operator, receipt=False, **options)
        network = load_model(folder)
        stage = Stage(0, 0, 6, read_config(folder), GrowthSettings(operator, operator, {}))
        budget = Budget(6, 1, 1, None, 1, None, keep_best=False, diagnostics_every=4)
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        meter = Meter(Position(), 1, 1, (), None)
        diagnostics = Diagnostics(network, optimizer, stage, folder, budget, meter)
        before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
        tokens = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(3))
        with diagnostics.step(1):
            network(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = {name: weight.detach().clone() for name, weight in network.named_parameters()}
        with diagnostics.step(2):
            optimizer.step()
        assert diagnostics.row == {}
        with diagnostics.step(1):
            optimizer.step()  # of no gradient
        return first_row(network, diagnostics, optimizer, before, after, tokens), before, after

    return looked


def first_row(
    network: Any, diagnostics: Diagnostics, optimizer: Any, before: Any, after: Any, tokens: Tensor
) -> dict[str, float]:
    """The row of the first step, taken again from the same weights."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(before[name])
    with diagnostics.step(1):
        network(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in network.named_parameters():
        assert torch.equal(weight, after[name])
    return diagnostics.row


def rms(*tensors: Tensor) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).double().square().mean().sqrt().item()


def test_pairs_of_a_map_drawn_by_hand() -> None:
    copies, originals = copied_pairs(AxisMap.of(3, np.array([2, 0, 1, 0, -1, 2, 0])))
    assert copies.tolist() == [3, 5, 6]
    assert originals.tolist() == [1, 0, 1]


def test_cosines_of_rows_pass_over_zeros() -> None:
    ones = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    others = torch.tensor([[4.0, 3.0], [1.0, 1.0], [0.0, -2.0]])
    torch.testing.assert_close(cosine(ones, others), torch.tensor([0.96, 0.0]))


def test_copies_of_a_doubled_network(look: Callable[..., Looked]) -> None:
    """Copies in turn: unit j + 24 of the MLP copies unit j, index i + 16 of the residual stream index i."""
    row, before, after = look("lossless", WIDE)
    layers = [f"model.layers.{layer}.mlp" for layer in range(2)]
    written = [
        cosine_similarity(after[f"{m}.fc1.weight"][24:], after[f"{m}.fc1.weight"][:24]) for m in layers
    ]
    read = [
        cosine_similarity(after[f"{m}.fc2.weight"].T[24:], after[f"{m}.fc2.weight"].T[:24]) for m in layers
    ]
    assert row["copy_cosine/ffn_written"] == pytest.approx(torch.cat(written).mean().item(), abs=1e-6)
    assert row["copy_cosine/ffn_read/layer_1"] == pytest.approx(read[1].mean().item(), abs=1e-6)
    embedding = after["model.embed_tokens.weight"]
    assert "copy_cosine/residual_written" in row
    assert "copy_cosine/layer" not in row
    assert not torch.equal(before["model.embed_tokens.weight"], embedding)


def test_copies_stay_equal_while_nothing_moves(look: Callable[..., Looked]) -> None:
    row, *_ = look("lossless", WIDE, rate=0.0, noise=0.0)
    cosines = {key: value for key, value in row.items() if key.startswith("copy_cosine/")}
    assert cosines
    assert all(value == pytest.approx(1.0, abs=1e-6) for value in cosines.values())
    assert {value for key, value in row.items() if key.startswith("update_rms")} == {0.0}


def test_norms_by_origin_of_a_padded_network(look: Callable[..., Looked]) -> None:
    """The source lies in the first corner of each tensor, and all else is new."""
    row, before, after = look(
        "random_pad",
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 40},
    )
    small = load_model_shapes(after)
    for kind, tensors in (
        ("weight", after),
        ("update", {name: after[name] - before[name] for name in after}),
    ):
        inherited = {name: tensor[corner(small[name])] for name, tensor in tensors.items()}
        fresh = []
        for name, tensor in tensors.items():
            rest = torch.ones(tensor.shape, dtype=torch.bool)
            rest[corner(small[name])] = False
            fresh.append(tensor[rest])
        assert row[f"{kind}_rms"] == pytest.approx(rms(*tensors.values()), rel=1e-6)
        assert row[f"{kind}_rms/original"] == pytest.approx(rms(*inherited.values()), rel=1e-6)
        assert row[f"{kind}_rms/new"] == pytest.approx(rms(*fresh), rel=1e-6)
        assert f"{kind}_rms/copy" not in row
        layer = [tensor for name, tensor in tensors.items() if ".layers.1." in name]
        assert row[f"{kind}_rms/layer_1"] == pytest.approx(rms(*layer), rel=1e-6)


def load_model_shapes(after: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The source's shape of each tensor: 32 → 16 and 40 → 24 on every axis, words as they are."""
    return {
        name: tuple({32: 16, 40: 24}.get(length, length) for length in tensor.shape)
        for name, tensor in after.items()
    }


def corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(length) for length in shape)


def test_units_that_nothing_reaches_are_dead(look: Callable[..., Looked]) -> None:
    """zero_pad: new units are written and read as zero, so that no gradient ever comes to them; lossless with a
    residue: new units are copies, and all are reached."""
    row, *_ = look("zero_pad", {"intermediate_size": 40})
    assert (row["dead_units"], row["dead_units/new"], row["dead_units/original"]) == (32, 32, 0)
    assert (row["unread_units"], row["unread_units/layer_0"]) == (32, 16)
    row, *_ = look("lossless", {"intermediate_size": 40})
    assert (row["dead_units"], row["unread_units"], row["dead_units/copy"]) == (0, 0, 0)


def test_repeated_layers_are_compared_whole(look: Callable[..., Looked]) -> None:
    row, _, after = look("lossless", {"num_hidden_layers": 4}, depth="stack")
    pairs = [
        (after[name], after[name.replace(f".{layer}.", f".{layer - 2}.")])
        for layer in (2, 3)
        for name in after
        if f".layers.{layer}." in name and after[name].ndim == 2
    ]
    cosines = [cosine_similarity(one.flatten(), other.flatten(), dim=0).item() for one, other in pairs]
    assert len(pairs) == 12
    assert row["copy_cosine/layer"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert 0.9 < row["copy_cosine/layer"] < 1.0
    assert "copy_cosine/layer/layer_2" in row


@pytest.mark.slow
def test_experts_that_were_one_mlp_are_compared(look: Callable[..., Looked], tmp_path: Path) -> None:
    """The library holds them in one tensor; they are told apart as in the file."""
    config = (
        preset("tiny_source") | SMALL | {"model_type": "llama", "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    )
    dense = make_checkpoint(
        tmp_path / "llama",
        {
            key: value
            for key, value in config.items()
            if key
            not in (
                "partial_rotary_factor",
                "layer_norm_eps",
                "rope_parameters",
                "qk_layernorm",
                "resid_pdrop",
                "embd_pdrop",
            )
        },
        "float32",
    )
    target = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    row, *_ = look("upcycle", target, rate=0.0, origin=dense)
    assert row["copy_cosine/expert"] == pytest.approx(1.0, abs=1e-6)
    moved, *_ = look("upcycle", target, rate=1.0, origin=dense)
    assert 0.5 < moved["copy_cosine/expert"] < 1.0 - 1e-6
    assert moved["update_rms/copy"] > 0


# ---- in a run ----------------------------------------------------------------------------------------------


def run_overrides(overrides: list[str], *more: str) -> list[str]:
    return [*overrides, "train.diagnostics_every_tokens=256", *more]


def test_they_change_no_result(overrides: list[str]) -> None:
    assert settings_hash(compose(overrides)) == settings_hash(compose(run_overrides(overrides)))


@pytest.mark.slow
def test_a_run_that_is_looked_at_is_the_run_that_is_not(overrides: list[str], tmp_path: Path) -> None:
    plain = ended(at(compose(overrides), tmp_path / "plain"))
    looked = ended(at(compose(run_overrides(overrides)), tmp_path / "looked"))
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(looked)[name])
    assert timeless(plain) == [row for row in timeless(looked) if row["kind"] != "diagnostics"]
    own = rows(looked, "diagnostics")
    assert [row["step"] for row in own] == [1, 2, 4, 6]
    assert own[-1]["weight_rms"] == pytest.approx(rms(*weights(looked).values()), rel=1e-5)
    assert not [
        key for key in own[0] if key.startswith("copy_cosine") or key.endswith("/new")
    ]  # from scratch


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_tell_what_one_tells(overrides: list[str], tmp_path: Path, sharding: str) -> None:
    """Of a grown start, whose source is a toy run's end."""
    small = ended(at(compose(overrides), tmp_path / "small"))
    wide = [
        "growth=lossless",
        f"source={small / 'final'}",
        "target={hidden_size:32,num_attention_heads:4,num_key_value_heads:4}",
    ]
    kept = [one for one in without_target(overrides) if not one.startswith("growth=")]
    asked = run_overrides([*kept, *wide], f"sharding={sharding}")
    one = ended(at(compose([*asked, "sharding=none"]), tmp_path / "one"))
    two = ended(at(compose(asked), tmp_path / "two"), processes=2)
    assert_close_run(two, one)
    assert "copy_cosine/kv_written" in rows(one, "diagnostics")[0]
    assert "dead_units/copy" in rows(one, "diagnostics")[0]


def test_a_row_is_told_in_a_line() -> None:
    row = {
        "weight_rms": 0.1, "update_rms": 1e-3, "update_rms/new": 2e-3, "update_rms/layer_0": 1e-3,
        "copy_cosine/ffn_written": 0.98765, "copy_cosine/ffn_written/layer_0": 0.5, "dead_units": 3, "dead_units/new": 3,
    }  # fmt: skip
    assert _diagnosis(row) == (
        "cosine of copies: ffn_written 0.9877; 3 dead units; update rms 1.00e-03; of new entries 2.00e-03"
    )
