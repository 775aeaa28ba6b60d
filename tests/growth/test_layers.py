"""Layer maps: drawn as literals where the literature draws them, then properties over all small sizes."""

from __future__ import annotations

import pytest

from outgrow.growth.layers import LAYER_MAPS, layer_map
from outgrow.model.base.errors import UserError

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
                assert rule in ("solar", "llama_pro")
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
        ("llama_pro", 5, 7, "cannot be spread evenly"),
        ([0, 1], 2, 3, "names 2 layers, the target has 3"),
        ([0, 2], 2, 2, "2 is no source layer"),
        ([0, True], 2, 2, "True is no source layer"),
    ],
)
def test_maps_that_cannot_be(depth: object, source: int, target: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layer_map(depth, source, target)  # type: ignore[arg-type]
