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

from outgrow.growth import grow, plan
from outgrow.growth.planning import wanted_config
from outgrow.growth.record import recorded_plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import to_hf_config
from outgrow.model.geometry import parameter_count
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.machine import forecast
from outgrow.train.settings import Settings
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


# Sources whose files list what kind each of their layers is, as the library saves them.
KINDS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "qwen3": {"head_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gpt_oss": {"head_dim": 8, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
}
TINY = {
    "vocab_size": 300, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3,
    "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


def deeper(overrides: list[str], source: Path, layers: int, *more: str) -> Settings:
    """A toy run from `source` into so many layers."""
    base = [given for given in overrides if not given.startswith(("target=", "growth="))]
    return compose([*base, f"source={source}", f"target={{num_hidden_layers:{layers}}}", *more])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_deeper_targets_lists_of_layers_follow_the_layer_map(
    name: str, overrides: list[str], checkpoint_maker: Any, tmp_path: Path
) -> None:
    """As `outgrow grow` makes them, for an arm that grows, for scratch, and in a dry run."""
    config = to_hf_config({"model_type": name, **TINY, **KINDS[name]}).to_dict()
    source = checkpoint_maker(tmp_path / "source", config)
    kinds = config["layer_types"]
    for depth, layers in (("identity", [0, 0, 1, 1, 2]), ("stack", [0, 1, 2, 0, 1])):
        settings = deeper(overrides, source, 5, "growth=lossless", f"growth.depth={depth}")
        target = start.target_config(settings, source)
        made = plan(source, {"num_hidden_layers": 5}, depth=depth)
        assert list(made.layers.layers) == layers
        assert target["layer_types"] == made.target_config["layer_types"] == [kinds[i] for i in layers]
        assert to_hf_config(target).num_hidden_layers == 5
        assert forecast.target(settings) == target
    scratch = deeper(overrides, source, 5, "growth=scratch")
    default = deeper(overrides, source, 5, "growth=lossless")
    assert start.target_config(scratch, source) == start.target_config(default, source)
    smaller = start.target_config(deeper(overrides, source, 2, "growth=scratch"), source)
    assert smaller["layer_types"] == kinds[:2]
    controls = wanted_config(config, {"num_hidden_layers": 5})  # of which a study counts the FLOPs
    assert controls["layer_types"] == [kinds[i] for i in (0, 0, 1, 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_source_that_lists_the_kinds_of_its_layers_trains_deeper(
    name: str, overrides: list[str], checkpoint_maker: Any, tmp_path: Path
) -> None:
    source = checkpoint_maker(
        tmp_path / "source", to_hf_config({"model_type": name, **TINY, **KINDS[name]}).to_dict(), "float32"
    )
    budget = ["train.budget_tokens=256", "train.eval_every_tokens=256"]
    losses = {}
    for growth in ("source", "lossless", "scratch"):
        settings = deeper(
            overrides, source, 5, f"growth={growth}", f"out={tmp_path / f'run-{growth}'}", *budget
        )
        summary = json.loads((loop.train(settings) / "summary.json").read_text())
        losses[growth] = summary["start_val_loss"]
    assert losses["lossless"] == pytest.approx(losses["source"], rel=1e-5)
    assert losses["scratch"] != pytest.approx(losses["source"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("{model_type:gpt2}", "target: model_type 'gpt2' differs from the source's 'llama'; a family grows"),
        ("FOLDER", "target: model_type 'gpt2' differs from the source's 'llama'; a family grows"),
        ("{hidden_size:8}", "is smaller than the source's"),
        ("{num_hidden_layers:2}", "is smaller than the source's"),
        ("{hidden_size:24,nonesuch:3}", "unknown config key 'nonesuch'"),
    ],
)
def test_a_dry_run_refuses_a_target_in_the_words_of_the_run(
    target: str, fault: str, overrides: list[str], checkpoint_maker: Any, tmp_path: Path
) -> None:
    source = checkpoint_maker(tmp_path / "source", {"model_type": "llama", **TINY})
    other = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 4, "n_head": 4}
    folder = checkpoint_maker(tmp_path / "other", other)
    base = [given for given in overrides if not given.startswith(("target=", "growth="))]
    asked = target.replace("FOLDER", str(folder))
    settings = compose(
        [*base, f"source={source}", f"target={asked}", "growth=lossless", f"out={tmp_path / 'run'}"]
    )
    said = []
    for door in (loop.train, forecast.target):
        with pytest.raises(UserError) as refused:
            door(settings)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert fault in said[0]


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
