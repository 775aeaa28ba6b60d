"""The null control against zero_pad: the same function at the source's size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from helpers.families import config_of
from helpers.models import random_model
from outgrow.growth import grow
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model, to_hf_config
from outgrow.model.config import read_config
from outgrow.train.compose import compose
from outgrow.train.start.null_control import norm_gain, scale_norms
from outgrow.train.start.source import begin, starting_model
from outgrow.train.start.stages import stages_of

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose epsilon is too small to be seen: the wider norm's counts half as much."""
    folder = tmp_path_factory.mktemp("source")
    random_model(config_of("llama", head_dim=8, rms_norm_eps=1e-12)).save_pretrained(folder)
    return folder


def test_a_source_with_scaled_norms_is_the_padded_network(source: Path, tmp_path: Path) -> None:
    width = read_config(source)["hidden_size"]
    how = {"target": {"hidden_size": 2 * width, "head_dim": 8}, "operator": "zero_pad", "receipt": False}
    grow(source, tmp_path / "out", **how)
    padded = load_model(tmp_path / "out", dtype="float64", attention="eager")
    control = load_model(source, dtype="float64", attention="eager")
    plain = control(input_ids=TOKENS).logits
    scale_norms(control, 2**0.5)
    logits = control(input_ids=TOKENS).logits
    # the class takes its norms in float32
    assert torch.allclose(logits, padded(input_ids=TOKENS).logits, atol=1e-5)
    assert not torch.allclose(logits, plain, atol=1e-2)


def test_a_norm_that_scales_by_one_plus_its_weight_hands_on_as_much_more() -> None:
    model = random_model(config_of("gemma"))
    norm = next(module for module in model.modules() if isinstance(module, GemmaRMSNorm))
    inputs = torch.randn(3, norm.weight.numel(), dtype=torch.float64)
    before = norm(inputs)
    scale_norms(model, 1.5)
    assert torch.allclose(norm(inputs), 1.5 * before, atol=1e-5)  # taken in float32


def test_the_arm_takes_its_gain_from_the_targets_width(
    source: Path, overrides: list[str], tmp_path: Path
) -> None:
    own = [text for text in overrides if not text.startswith("target=")]
    config = read_config(source)
    width = config["hidden_size"]
    run = [*own, "growth=null_control", f"source={source}", f"out={tmp_path}"]
    settings = compose([*run, f"target={{hidden_size:{4 * width}}}"])
    assert norm_gain(settings, config) == 2.0
    (stage,) = stages_of(settings, config)
    network = starting_model(settings, stage, source, tmp_path, "eager")
    stored = load_model(source)
    assert torch.equal(network.model.norm.weight, 2 * stored.model.norm.weight)
    assert torch.equal(network.lm_head.weight, stored.lm_head.weight)
    assert begin(settings, stage, source, tmp_path).lossless is False
    plain = compose([*own, "growth=source", f"source={source}", f"out={tmp_path}"])
    assert norm_gain(plain, config) == 1.0


def test_the_gain_is_read_from_a_mixture_too() -> None:
    dense = to_hf_config(compose(["experiment=operators_experts_source"]).target).to_dict()
    wider = "target={model_type:mixtral,hidden_size:128,num_local_experts:4,num_experts_per_tok:2}"
    settings = compose(["experiment=operators_experts", "growth=null_control", "schedule.horizons=[]", wider])
    assert norm_gain(settings, dense) == 2.0


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("target={num_hidden_layers:8}", "is not above the source's .*use growth=source"),
        ("target=null", "target: missing"),
        ("growth.norm_gain=1.2", "growth.norm_gain: expected target"),
    ],
)
def test_a_control_without_a_wider_target_is_refused(
    target: str, fault: str, source: Path, overrides: list[str], tmp_path: Path
) -> None:
    own = [text for text in overrides if not text.startswith("target=")]
    settings = compose([*own, "growth=null_control", f"source={source}", f"out={tmp_path}", target])
    with pytest.raises(UserError, match=fault):
        norm_gain(settings, read_config(source))
