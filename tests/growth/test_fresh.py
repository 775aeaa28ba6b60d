"""The scale of fresh entries (growth.fresh): the class's own deviation, or the source tensor's root mean
square."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import make_checkpoint, random_model
from outgrow.growth import grow, grow_model, plan
from outgrow.growth.record import recorded_plan
from outgrow.model.base.errors import UserError
from outgrow.train.compose import compose
from outgrow.train.settings import settings_hash

WIDER = {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 5, "num_key_value_heads": 5}
INIT = 0.02  # the class's own deviation


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_fresh_entries_are_the_same_numbers_at_the_scale_of_the_source(phi_config: dict[str, Any]) -> None:
    """random_pad keeps the source in a corner: all other entries of a matrix are drawn, at its root mean square
    instead of 0.02; vectors are 0 and 1 as ever."""
    source = random_model(phi_config)
    ours, theirs = (
        weights(grow_model(source, WIDER, "random_pad", fresh=fresh)) for fresh in ("match", "init")
    )
    matrices = 0
    for name, small in weights(source).items():
        corner = tuple(slice(length) for length in small.shape)
        assert torch.equal(ours[name][corner], theirs[name][corner])
        fresh = torch.ones(ours[name].shape, dtype=torch.bool)
        fresh[corner] = False
        if small.ndim == 1 or not fresh.any():
            assert torch.equal(ours[name], theirs[name])
            continue
        matrices += 1
        scale = small.square().mean().sqrt() / INIT
        torch.testing.assert_close(ours[name][fresh], theirs[name][fresh] * scale, rtol=1e-12, atol=0)
    assert matrices == 3 * 6 + 2


@pytest.mark.parametrize("operator", ["lossless", "net2net", "tile", "zero_pad"])
def test_the_certificate_does_not_depend_on_it(phi_config: dict[str, Any], operator: str) -> None:
    source = random_model(phi_config)
    tokens = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(3))
    init, match = (plan(phi_config, WIDER, operator, fresh=fresh) for fresh in ("init", "match"))
    assert init.certificate == match.certificate
    if match.certificate.lossless:
        grown = grow_model(source, WIDER, operator, fresh="match")
        with torch.no_grad():
            moved = grown(input_ids=tokens).logits - source(input_ids=tokens).logits
        assert moved.abs().max() < 1e-10


def test_a_tensor_of_zeros_is_no_scale(phi_config: dict[str, Any]) -> None:
    source = random_model(phi_config)
    name = "model.layers.0.mlp.fc1.weight"
    with torch.no_grad():
        weights(source)[name].zero_()
    ours, theirs = (
        weights(grow_model(source, WIDER, "random_pad", fresh=fresh)) for fresh in ("match", "init")
    )
    assert torch.equal(ours[name], theirs[name])


def test_plans_are_what_they_were_unless_it_is_asked_for(phi_config: dict[str, Any]) -> None:
    plain, init, match = (
        plan(phi_config, WIDER, "random_pad", **asked)
        for asked in ({}, {"fresh": "init"}, {"fresh": "match"})
    )
    assert plain.hash == init.hash != match.hash
    assert "fresh" not in plain.to_dict()
    assert match.to_dict()["fresh"] == "match"
    assert "fresh entries matched to the source" in str(match)
    assert "matched" not in str(plain)


def test_plan_record_and_card_name_it(tmp_path: Path, phi_folder: Path) -> None:
    grown = grow(phi_folder, tmp_path / "out", target=WIDER, operator="lossless", fresh="match")
    assert "growth.fresh=match" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["plan"]["fresh"] == "match"
    assert recorded_plan(tmp_path / "out").hash == grown.plan.hash
    assert grown.certificate.lossless


def test_a_mixture_is_matched_where_it_is_widened(tmp_path: Path) -> None:
    llama = {"model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8}  # fmt: skip
    wide = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 24}
    decided = plan(llama, wide, "upcycle", width="random_pad", fresh="match")
    assert decided.fresh == "match"
    assert decided.hash != plan(llama, wide, "upcycle", width="random_pad").hash
    source = make_checkpoint(tmp_path / "llama", llama, "float32")
    grow(source, tmp_path / "out", target=wide, operator="upcycle", width="random_pad", fresh="match")
    assert recorded_plan(tmp_path / "out").fresh == "match"


@pytest.mark.parametrize(
    ("operator", "fresh", "words"),
    [
        ("scratch", "match", "fresh 'match': operator 'scratch' inherits nothing to match"),
        ("lossless", "mach", "fresh: expected 'init' or 'match'; found 'mach'"),
    ],
)
def test_what_cannot_be_matched_is_refused(
    phi_config: dict[str, Any], operator: str, fresh: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        plan(phi_config, WIDER, operator, fresh=fresh)  # type: ignore[arg-type]


def test_the_door_of_training_takes_it_and_names_runs_by_it() -> None:
    asked = ["experiment=tiny", "growth=lossless"]
    before, match = compose(asked), compose([*asked, "growth.fresh=match"])
    assert (before.name, match.name) == ("tiny-lossless-s0", "tiny-lossless-fresh_match-s0")
    assert settings_hash(before) != settings_hash(match)
    older = json.loads(json.dumps(before.growth.options))
    assert older.pop("fresh") == "init"
    with pytest.raises(UserError, match=r"growth\.fresh: operator scratch grows nothing"):
        compose(["experiment=tiny", "growth=scratch", "growth.fresh=match"])
    with pytest.raises(UserError, match=r"growth\.fresh: expected init or match; found 'mach'"):
        compose([*asked, "growth.fresh=mach"])
