"""Reading checkpoints: where they are looked for, and that their numbers are read as the safetensors library
reads them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.dtypes import to_float, to_raw
from outgrow.model.headers import SINGLE
from outgrow.model.locate import locate


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere", "a/b/c", "../x"])
def test_a_missing_source_is_told_with_the_folder_that_a_relative_one_is_seen_from(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = "" if source.startswith("/") else f" in {tmp_path}"
    with pytest.raises(UserError, match=f"no such folder{where}, and not a Hugging Face name"):
        locate(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("my_lama", r"did you mean '.*my_llama'\?$"),
        ("nothing_alike", "of the form owner/name$"),
        ("tiny-scratch-s0/final", r"the result of the run '.*tiny-scratch-s0': let that run end first$"),
    ],
)
def test_a_missing_source_is_told_with_what_it_may_be(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "my_llama").mkdir()
    with pytest.raises(UserError, match=words):
        locate(tmp_path / source)


def test_a_hub_name_without_network_is_told() -> None:
    with pytest.raises(
        UserError, match=r"'someone/some-model'.*hub did not give it.*hf download someone/some-model"
    ):
        locate("someone/some-model")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_values_are_those_safetensors_reads(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    save_file({"other": torch.ones(3), "a": tensor}, tmp_path / SINGLE)
    with Checkpoint(tmp_path) as checkpoint:
        stored = checkpoint.tensors["a"]
        values = to_float(checkpoint.read("a", 2, 6), stored.dtype)
    assert np.array_equal(values, load_file(tmp_path / SINGLE)["a"][2:6].double().numpy())


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 10_000)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.00390625, 1.01171875, 3.3e38])
    values = torch.cat([values, special])
    ours = to_raw(values.numpy(), "BF16")
    assert np.array_equal(ours, values.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert np.isnan(to_float(to_raw(np.array([np.nan], np.float32), "BF16"), "BF16")[0])


def test_a_file_that_shrinks_while_it_is_read_is_told(phi_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(phi_folder, tmp_path / "copy"))
    with Checkpoint(folder) as checkpoint:
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:5000])
        with pytest.raises(UserError, match="ends early inside tensor"):
            _ = [checkpoint.read(name) for name in checkpoint.tensors]


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_a_file_of_somebody_elses_is_told(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As on a shared machine; the tests themselves may run as a user who may read everything."""
    opened = Path.open

    def refusing(path: Path, *how: Any, **more: Any) -> Any:
        if path == phi_folder / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(Permission denied\)"):
        Checkpoint(phi_folder)


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_disk_that_does_not_give_the_weights_is_told(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with Checkpoint(phi_folder) as checkpoint:
        monkeypatch.setattr(os, call, failing)
        with pytest.raises(UserError, match=rf"{SINGLE}: cannot be read \(Input/output error\)"):
            checkpoint.read("model.embed_tokens.weight")
