"""In which dtype the start of a run is stored: what it is loaded in loses nothing of a 16-bit source, and a
float32 one's plan stays."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from outgrow.growth import grow
from outgrow.growth.record import recorded_plan
from outgrow.model.base.errors import UserError
from outgrow.model.geometry import parameter_count
from outgrow.train.settings import compose
from outgrow.train.start import source as start
from outgrow.train.start.stages import stages_of

WIDER = {"hidden_size": 36, "num_hidden_layers": 4}


def begun(overrides: list[str], source: Path, folder: Path) -> Path:
    """The folder of the start that a run from `source` would train."""
    text = [given for given in overrides if not given.startswith("target=")]
    target = f"target={{{','.join(f'{key}:{value}' for key, value in WIDER.items())}}}"
    settings = compose([*text, target, f"source={source}", "growth=lossless"])
    first = stages_of(settings, start.target_config(settings, source))[0]
    start.begin(settings, first, source, folder)
    return first.start(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", None), ("float64", None)],
)
def test_a_start_is_stored_so_that_nothing_of_it_is_rounded(
    overrides: list[str], phi_config: dict[str, Any], checkpoint_maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    dtype: str, stored: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(start, "_draw", lambda *given: None)
    source = checkpoint_maker(tmp_path / "source", phi_config, dtype)
    folder = begun(overrides, source, tmp_path / "run")
    found = load_file(folder / "model.safetensors")
    wanted = grow(source, tmp_path / "grown", target=WIDER, dtype=stored)
    expected = load_file(wanted.folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, stored or dtype)}
    assert recorded_plan(folder).hash == wanted.plan.hash
    if stored is None:
        assert "dtype" not in json.loads((folder / "growth.json").read_text())["plan"]
    else:  # which rounding to the source's dtype would have changed
        assert any(
            not torch.equal(tensor, tensor.to(getattr(torch, dtype)).float()) for tensor in found.values()
        )


def test_a_network_that_no_memory_holds_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = compose(["experiment=tiny", "growth=scratch", "target=tiny_target"])
    first = stages_of(settings, start.target_config(settings, None))[0]
    needed = 4 * parameter_count(first.config)
    monkeypatch.setattr(start, "build_model", lambda *_, **__: "built")
    monkeypatch.setattr(start.psutil, "virtual_memory", lambda: SimpleNamespace(total=needed - 1))
    with pytest.raises(
        UserError, match=r"target: its [0-9,]+ parameters need .* GiB of memory; give smaller"
    ):
        start.starting_model(settings, first, None, tmp_path, "eager")
    monkeypatch.setattr(start.psutil, "virtual_memory", lambda: SimpleNamespace(total=needed))
    assert start.starting_model(settings, first, None, tmp_path, "eager") == "built"
