"""Layer maps: drawn as literals where the literature draws them, then properties over all small sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.families import config_of
from helpers.models import make_checkpoint
from outgrow.growth import grow
from outgrow.growth.layers import LAYER_MAPS, layer_map
from outgrow.growth.memory import grow_model
from outgrow.growth.origin import Origin, origins
from outgrow.growth.record import recorded_plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model

DRAWN = {
    ("interleave", 3, 6): [0, 0, 1, 1, 2, 2],
    ("interleave", 3, 4): [0, 0, 1, 2],
    ("stack", 3, 6): [0, 1, 2, 0, 1, 2],
    ("stack", 3, 4): [0, 1, 2, 0],
    ("top", 4, 6): [0, 1, 2, 3, 2, 3],
    ("proportional", 2, 4): [0, 0, 1, 1],  # round(1.5) = 2 would be a layer too many
    ("solar", 32, 48): [*range(24), *range(8, 32)],  # SOLAR 10.7B
    ("midas", 6, 8): [0, 1, 2, 3, 2, 3, 4, 5],
    ("llama_pro", 6, 8): [0, 1, 2, 2, 3, 4, 5, 5],
    ("identity", 3, 4): [0, 0, 1, 2],
    ("identity_top", 3, 5): [0, 1, 2, 2, 2],
    ("neighbours", 4, 6): [0, 0, 1, 2, 2, 3],
    ("neighbours", 4, 7): [0, 0, 1, 1, 2, 2, 3],
}


@pytest.mark.parametrize(("rule", "source", "target"), DRAWN)
def test_drawn_maps(rule: str, source: int, target: int) -> None:
    assert list(layer_map(rule, source, target).layers) == DRAWN[rule, source, target]


def test_the_proportional_map_of_phi_repeats_these_sources() -> None:
    layers = layer_map("proportional", 24, 32).layers
    assert sorted({layer for layer in layers if layers.count(layer) > 1}) == [2, 4, 8, 10, 14, 16, 20, 22]


@pytest.mark.parametrize("rule", LAYER_MAPS)
def test_every_map_at_every_small_size(rule: str) -> None:
    for source in range(1, 13):
        assert layer_map(rule, source, source).layers == tuple(range(source))
        for target in range(source, 2 * source + 1):
            try:
                found = layer_map(rule, source, target)
            except UserError:
                assert rule in ("solar", "llama_pro") or (rule == "neighbours" and target == 2 * source)
                continue
            assert len(found.layers) == target
            assert set(found.layers) == set(range(source)), "every source layer is used"
            assert found.is_lossless == (
                target == source or rule in ("identity", "identity_top", "llama_pro")
            )


@pytest.mark.parametrize("rule", ["identity", "identity_top", "interleave", "stack", "proportional"])
def test_more_than_double(rule: str) -> None:
    assert set(layer_map(rule, 2, 7).layers) == {0, 1}


def test_an_explicit_list() -> None:
    assert layer_map([0, 1, 1], 2, 3).layers == (0, 1, 1)
    assert layer_map([0, 1], 2, 2).is_lossless
    assert not layer_map([1, 0], 2, 2).is_lossless


@pytest.mark.parametrize(
    ("depth", "source", "target", "message"),
    [
        ("stak", 3, 4, "unknown depth 'stak'; did you mean 'stack'"),
        ("stack", 4, 3, "fewer than the source's 4"),
        ("top", 2, 5, "at most 4 layers"),
        ("solar", 4, 7, "must be even"),
        ("neighbours", 4, 8, "at most 7 layers come of 4"),
        ("neighbours", 1, 2, "at most 1 layers come of 1"),
        ("llama_pro", 5, 7, "cannot be spread evenly"),
        ([0, 1], 2, 3, "names 2 layers, the target has 3"),
        ([0, 2], 2, 2, "2 is no source layer"),
        ([0, True], 2, 2, "True is no source layer"),
    ],
)
def test_maps_that_cannot_be(depth: object, source: int, target: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layer_map(depth, source, target)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float64"), ("gpt2", "float32"), ("phi", "bfloat16")]
)
@pytest.mark.parametrize("width", [{}, {"vocab_size": 180}])
def test_a_layer_between_two_is_their_mean(
    tmp_path: Path, family: str, dtype: str, width: dict[str, int]
) -> None:
    """Bit for bit, in the stored format; that width grows too changes nothing in it."""
    depth_key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    source = make_checkpoint(tmp_path / "source", config_of(family) | {depth_key: 3}, dtype=dtype)
    before = load_model(source, dtype=dtype).state_dict()
    grown = grow(source, tmp_path / "out", target={depth_key: 4} | width, depth="neighbours", noise=0.0)
    after = load_model(tmp_path / "out", dtype=dtype).state_dict()
    assert grown.plan.layers.shown == ["0", "1", "1+2", "2"]
    assert grown.certificate.reasons[0] == (
        "depth 'neighbours': target layers 2 are means of two layers and work beside them"
    )
    assert recorded_plan(tmp_path / "out").hash == grown.plan.hash
    for name, values in after.items():
        if ".2." in name:
            own, following = before[name.replace(".2.", ".1.")], before[name]
            assert torch.equal(values, (0.5 * own.double() + 0.5 * following.double()).to(values.dtype)), name
            step = next(step for step in grown.plan.steps if step.name == name)
            assert (origins(grown.plan, step) == Origin.NEW).all()
    model = load_model(source, dtype=dtype)
    in_memory = grow_model(model, {depth_key: 4} | width, depth="neighbours", noise=0.0).state_dict()
    assert all(torch.equal(values, after[name]) for name, values in in_memory.items())
