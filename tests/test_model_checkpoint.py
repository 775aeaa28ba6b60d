"""Reading checkpoints that strangers wrote: what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import INDEX, SINGLE, Checkpoint, locate
from model.dtypes import to_float, to_raw
from model.errors import UserError


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start: int = 0, stop: int = 8, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


HEADERS = {
    "not JSON": (b"{nonsense", b"", None, "not valid JSON"),
    "not an object": ([1, 2], b"", None, "must be a JSON object, found list"),
    "a name twice": (b'{"a": {}, "a": {}}', b"", None, "names 'a' twice"),
    "length past the end": ({"a": entry()}, b"", 1 << 40, "truncated, or not a safetensors file"),
    "negative length": ({"a": entry()}, b"", (1 << 64) - 1, "truncated, or not a safetensors file"),
    "entry is no object": ({"a": 3}, b"", None, "expected dtype, shape and data_offsets"),
    "key missing": ({"a": {"dtype": "F32", "shape": [2]}}, b"", None, "expected dtype, shape and data_offsets"),
    "key too many": ({"a": entry() | {"pickle": "x"}}, b"\0" * 8, None, "expected dtype, shape and data_offsets"),
    "unknown dtype": ({"a": entry(dtype="F8_E4M3")}, b"\0" * 8, None, "dtype 'F8_E4M3' is not supported"),
    "shape is text": ({"a": entry(shape="2")}, b"\0" * 8, None, "is not a list of whole numbers"),
    "negative shape": ({"a": entry(shape=(-2,))}, b"\0" * 8, None, "is not a list of whole numbers"),
    "boolean shape": ({"a": entry(shape=(True,))}, b"\0" * 8, None, "is not a list of whole numbers"),
    "fractional shape": ({"a": entry(shape=(2.0,))}, b"\0" * 8, None, "is not a list of whole numbers"),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 4, 8]}}, b"\0" * 8, None, "are not two whole numbers"),
    "negative offset": ({"a": entry(-8, 0)}, b"\0" * 8, None, "are not two whole numbers"),
    "offsets reversed": ({"a": entry(8, 0)}, b"\0" * 8, None, "-8 bytes stored"),
    "size and shape disagree": ({"a": entry(0, 12)}, b"\0" * 12, None, r"12 bytes stored, but F32 \(2,\) takes 8"),
    "enormous shape": ({"a": entry(0, 8, (1 << 40, 1 << 40))}, b"\0" * 8, None, "bytes stored, but F32"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, None, "overlaps the tensor before it"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20, None, "leaves a gap before it"),
    "truncated": ({"a": entry(0, 8)}, b"\0" * 4, None, "truncated"),
    "trailing bytes": ({"a": entry(0, 8)}, b"\0" * 12, None, "trailing bytes"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_malformed_header_is_refused_before_any_weight_is_read(tmp_path: Path, case: str) -> None:
    header, data, length, message = HEADERS[case]
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / SINGLE, header, data, length=length)
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint(tmp_path)
    assert SINGLE in str(caught.value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "points to '../outside.safetensors'"),
        ({"a": "/etc/passwd"}, "points to '/etc/passwd'"),
        ({"a": "weights.bin"}, "points to 'weights.bin'"),
        ({"a": "absent.safetensors"}, "shard absent.safetensors is missing"),
        ({"a": 3}, "must be an object that names a file"),
        ([], "must be an object that names a file"),
        ({}, "must be an object that names a file"),
        ({"ghost": SINGLE}, "which does not hold it"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / SINGLE, {"a": entry()}, b"\0" * 8)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("one.safetensors", "two.safetensors"):
        write(tmp_path / name, {"a": entry(), "b" + name[0]: entry(8, 16)}, b"\0" * 16)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"bo": "one.safetensors", "bt": "two.safetensors"}}))
    with pytest.raises(UserError, match="each must be in one shard"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json: no such file"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": "[]"}, "expected a JSON object, found list"),
        ({"config.json": "{}"}, "no weights; expected model.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, r"only pickle weights \(pytorch_model.bin\).*never loaded"),
        ({"config.json": "{}", SINGLE: "x"}, "1 bytes is no safetensors file"),
        ({"config.json": "{}", INDEX: "{}"}, "must be an object that names a file"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere", "a/b/c", "../x"])
def test_a_missing_source_is_told(source: str) -> None:
    with pytest.raises(UserError, match="no such folder, and not a Hugging Face name"):
        locate(source)


def test_a_hub_name_without_network_is_told() -> None:
    with pytest.raises(UserError, match=r"'someone/some-model'.*hub did not give it.*hf download someone/some-model"):
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
