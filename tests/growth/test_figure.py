"""The picture of a plan holds what the plan says, and the terminal's layer map is read back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import unwritten as strangers
from outgrow.growth import grow, plan
from outgrow.growth.card import layer_map, space_bar
from outgrow.growth.figure import build, draw, grown_matrix, shown_step
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.dtypes import to_float

BIGGER = {"hidden_size": 30, "intermediate_size": 60, "num_hidden_layers": 5}


def test_the_layer_map_says_which_source_feeds_which_target(phi_config: dict[str, Any]) -> None:
    for depth in ("identity", "stack", "proportional"):
        made = plan(phi_config, {"num_hidden_layers": 25}, depth=depth)
        read: list[tuple[str, str]] = []
        for targets, sources in zip(*[iter(layer_map(made, 60))] * 2, strict=True):
            assert max(len(targets), len(sources)) <= 60
            read += zip(targets.split()[1:], sources.split()[1:], strict=True)
        expected = [
            (str(i), f"[{s}]" if idle else str(s))
            for i, (s, idle) in enumerate(zip(made.layers.layers, made.layers.identity, strict=True))
        ]
        assert read == expected


def test_bars_show_shares(phi_config: dict[str, Any]) -> None:
    made = plan(phi_config, BIGGER | {"intermediate_size": 80})
    assert space_bar(made, "ffn") == "█" * 10 + "▒" * 10  # 40 → 80
    assert space_bar(made, "residual") == "█" * 16 + "·" * 4  # 24 → 30
    assert space_bar(made, "vocab") == "█" * 20


@pytest.mark.slow
def test_the_matrix_in_the_picture_is_the_one_that_is_written(phi_folder: Path, tmp_path: Path) -> None:
    grown = grow(phi_folder, tmp_path / "out", target=BIGGER, noise=0.2)
    with Checkpoint(phi_folder) as source, Checkpoint(tmp_path / "out") as written:
        step = shown_step(grown.plan)
        assert step.name == "model.layers.0.self_attn.q_proj.weight"
        expected = to_float(written.read(step.name), "F64")
        assert np.array_equal(grown_matrix(grown.plan, step, source), expected)
        figure = build(grown.plan, source)
        images = [
            np.asarray(image.get_array())
            for part in figure.subfigs
            for axes in part.axes
            for image in axes.get_images()
        ]
        assert any(image.shape == expected.shape and np.array_equal(image, expected) for image in images)
        draw(grown.plan, tmp_path / "plan.png", source)
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.size == (1650, 1260)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    texts = " ".join(
        text.get_text()
        for text in build(grown.plan).findobj(match=lambda artist: hasattr(artist, "get_text"))
    )
    assert "certified lossless" in texts
    assert "24 → 30" in texts


@pytest.mark.slow
def test_a_small_source_beside_a_large_result_is_shown_by_magnitude_too(phi_folder: Path) -> None:
    """Were its signs kept, the negative half of it would be black on a scale that begins at zero."""
    with Checkpoint(phi_folder) as source:
        made = plan(
            source, {"hidden_size": 240, "num_attention_heads": 30, "num_hidden_layers": 4}, depth="stack"
        )
        figure = build(made, source)
        images = [image for part in figure.subfigs for axes in part.axes for image in axes.get_images()]
        shown = [np.asarray(image.get_array()) for image in images]
        expected = np.abs(to_float(source.read("model.layers.0.self_attn.q_proj.weight"), "F64"))
    assert any(part.shape == (24, 24) and np.allclose(part, expected) for part in shown)
    assert images[0].get_clim() == images[1].get_clim()
    assert np.quantile(expected, 0.99) <= images[0].get_clim()[1]
    texts = " ".join(
        text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
    )
    assert "(1 reason)" in texts
    assert f"{made.source_parameters:,} → " in texts


@pytest.mark.slow
def test_a_picture_without_weights_and_a_name_that_is_no_picture(
    phi_config: dict[str, Any], tmp_path: Path
) -> None:
    made = plan(phi_config, BIGGER, "tile")
    draw(made, tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")
    for name in ("plan.txt", "nowhere/plan.png"):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            draw(made, tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [("mpt", {"n_layers": 5}), ("starcoder2", {"hidden_size": 32, "num_attention_heads": 4})],
)
def test_a_family_without_a_schema_has_its_picture_too(
    tmp_path: Path, checkpoint_maker: Any, name: str, target: dict[str, int]
) -> None:
    source = checkpoint_maker(tmp_path / "source", strangers.config_of(name))
    with Checkpoint(source) as checkpoint:
        made = plan(checkpoint, target, depth="stack")
        draw(made, tmp_path / "plan.png", checkpoint)
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert "target" in layer_map(made)[0]
