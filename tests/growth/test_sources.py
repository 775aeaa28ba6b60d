"""Sources that are something else, that change while they are read, and what a plan says of itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from outgrow.growth import grow, plan
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.locate import locate

TARGET = {"intermediate_size": 80}


@pytest.fixture
def source(phi_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phi_folder, tmp_path / "source"))


def the_run(source: Path) -> Path:
    run = source.parent / "run"
    shutil.copytree(source, run / "final")
    shutil.copytree(source, run / "start")
    (run / "run.json").write_text("{}")
    return run


def unfinished(source: Path) -> Path:
    run = source.parent / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    return run


def the_folder_around(source: Path) -> Path:
    shutil.copytree(source, source.parent / "around" / "snapshot")
    return source.parent / "around"


def the_file(source: Path) -> Path:
    return source / "model.safetensors"


def an_adapter(source: Path) -> Path:
    folder = source.parent / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "microsoft/phi-2"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def an_adapter_with_a_config(source: Path) -> Path:
    folder = an_adapter(source)
    shutil.copyfile(source / "config.json", folder / "config.json")
    return folder


ADAPTER = (
    "an adapter of 'microsoft/phi-2', which has no weights of its own to grow; merge it into its base first"
)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (the_run, r"holds no config\.json; did you mean '.*run/final'\?"),
        (unfinished, "a run that has no run/final yet; finish it first"),
        (the_folder_around, r"did you mean '.*around/snapshot'\?"),
        (the_file, "a file; give the folder that holds it with its config.json: '.*source'"),
        (an_adapter, ADAPTER),
        (an_adapter_with_a_config, ADAPTER),
    ],
)
def test_a_wrong_folder_is_told_with_the_one_that_was_meant(
    source: Path, tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    wrong = make(source)
    with pytest.raises(UserError, match=words):
        grow(wrong, tmp_path / "out", target=TARGET)
    with pytest.raises(UserError, match=words):
        locate(wrong)


def test_a_checkpoint_of_the_trunk_is_told(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in weights.items() if "lm_head" not in name},
        source / "model.safetensors",
    )
    with pytest.raises(UserError, match="holds the trunk alone"):
        grow(source, tmp_path / "out", target=TARGET)


@pytest.mark.parametrize("worker", [None, "0/1"])
@pytest.mark.parametrize("change", ["in place", "touched", "replaced"])
def test_a_source_that_changes_while_it_is_read_is_told(
    source: Path, tmp_path: Path, change: str, worker: str | None
) -> None:
    file = source / "model.safetensors"

    def meanwhile(done: int, total: int) -> None:
        if done < total:
            return
        if change == "in place":
            with file.open("r+b") as stream:
                stream.seek(-8, os.SEEK_END)
                stream.write(b"12345678")
        elif change == "touched":
            os.utime(file)
        else:
            shutil.copy2(file, source / "new")
            (source / "new").rename(file)

    with pytest.raises(UserError, match=r"model\.safetensors: changed while it was read"):
        grow(source, tmp_path / "out", target=TARGET, progress=meanwhile, worker=worker)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", [0, 1, -1])
def test_workers_agree_on_more_than_the_first_row(source: Path, tmp_path: Path, row: int) -> None:
    how: dict[str, Any] = {"target": TARGET, "max_shard_bytes": 40_000}
    grow(source, tmp_path / "out", worker="0/2", **how)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.self_attn.dense.weight"][row] *= 2
    save_file(weights, source / "model.safetensors")
    assert not grow(source, tmp_path / "out", worker="1/2", **how).complete, (
        "the other's shards were cleared away"
    )


def test_a_plan_and_a_growth_say_of_themselves_five_lines(source: Path, tmp_path: Path) -> None:
    with Checkpoint(source) as checkpoint:
        made = plan(checkpoint, {"hidden_size": 30, "num_hidden_layers": 4}, depth="stack")
    for said in (made, grow(source, tmp_path / "out", target=TARGET)):
        assert len(repr(said).splitlines()) == 5
        assert max(map(len, repr(said).splitlines())) < 200
        assert len(said.describe().splitlines()) > 20
    assert repr(made).splitlines()[3:] == [
        "  layers 3 → 4 by 'stack'",
        f"  certificate: not lossless: {made.certificate.reasons[0]:.100}",
    ]
    assert "model.layers.*.mlp.fc1: ffn <- residual" in made.describe()


def test_an_adapter_beside_weights_is_told(source: Path, tmp_path: Path) -> None:
    (source / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "microsoft/phi-2"}))
    grown = grow(source, tmp_path / "out", target=TARGET, receipt=False)
    assert "adapter_config.json is passed over" in grown.notes[0]
