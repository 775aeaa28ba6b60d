"""Malformed input, one table: what is done to a sound checkpoint, and the exact words with which growing it
is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from outgrow.growth import grow
from outgrow.model.base.errors import UserError

TARGET = {"intermediate_size": 80}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Spoil = Callable[[Path], Any]


def header(
    change: Callable[[dict[str, Any]], Any], *, raw: bytes | None = None, length: int | None = None
) -> Spoil:
    """Change the header of the weights' file in place, or replace its text, or state another length."""

    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + size])
        change(found)
        text = json.dumps(found).encode() if raw is None else raw
        (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :]
        )

    return spoil


def entry(**changes: Any) -> Spoil:
    """Change the first tensor's header entry."""
    return header(lambda found: found[FIRST].update(changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change the stored tensors."""

    def spoil(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        change(stored)
        save_file(stored, folder / WEIGHTS)

    return spoil


def value(name: str, place: tuple[int, ...], number: float, dtype: torch.dtype = torch.float32) -> Spoil:
    """Store one entry as `number`, all tensors in `dtype`."""

    def change(stored: dict[str, torch.Tensor]) -> None:
        for key in stored:
            stored[key] = stored[key].to(dtype)
        stored[name][place] = number

    return tensors(change)


def config(**changes: Any) -> Spoil:
    """Change the config; `...` removes a key."""

    def spoil(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in found.items() if value is not ...})
        )

    return spoil


def index_text(text: str) -> Spoil:
    """An index of this text, and no single file, which would be taken before it."""
    return all_of(lambda folder: (folder / WEIGHTS).unlink(missing_ok=True), file(INDEX, text))


def index(weight_map: Any) -> Spoil:
    return index_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def file(name: str, content: bytes | str) -> Spoil:
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def shards(folder: Path) -> dict[str, str]:
    """Split the weights into two files with an index; return its weight_map."""
    stored = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(stored)
    files = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    for name, held in files.items():
        save_file({key: stored[key] for key in held}, folder / name)
    weight_map = {key: name for name, held in files.items() for key in held}
    index(weight_map)(folder)
    return weight_map


def sharded(change: Callable[[Path, dict[str, str]], Any]) -> Spoil:
    """Split into two shards, then spoil folder and weight_map, and write the map anew."""

    def spoil(folder: Path) -> None:
        weight_map = shards(folder)
        change(folder, weight_map)
        index(weight_map)(folder)

    return spoil


def all_of(*parts: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for part in parts:
            part(folder)

    return spoil


def replaced_by_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def replaced_by_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


FIRST = "lm_head.bias"
FC1 = "model.layers.1.mlp.fc1.weight"
CASES: dict[str, tuple[Spoil, str]] = {
    # ---- the folder ----
    "no config": (lambda folder: (folder / "config.json").unlink(), "SOURCE/config.json: no such file"),
    "config is no JSON": (
        file("config.json", "{"),
        (
            "SOURCE/config.json: not valid JSON (Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1))"
        ),
    ),
    "config is a list": (file("config.json", "[]"), "SOURCE/config.json: expected a JSON object, found list"),
    "config is binary": (
        file("config.json", b"\xff\xfe\x00"),
        (
            "SOURCE/config.json: not valid JSON ('utf-16-le' codec can't decode byte 0x00 in position 2: "
            "truncated data)"
        ),
    ),
    "config nests without end": (
        file("config.json", "[" * 100_000),
        "SOURCE/config.json: not valid JSON (nested too deep)",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        "SOURCE: no weights; expected model.safetensors or model.safetensors.index.json",
    ),
    "pickle weights only": (
        all_of(lambda folder: (folder / WEIGHTS).unlink(), file("pytorch_model.bin", "x")),
        (
            "SOURCE: only pickle weights (pytorch_model.bin), which can run code and are never loaded; "
            "convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        ),
    ),
    "weights are a folder": (replaced_by_folder, "SOURCE/model.safetensors: not a regular file"),
    "weights are a pipe": (replaced_by_pipe, "SOURCE/model.safetensors: not a regular file"),
    "weights are a dangling link": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to("nowhere")),
        "SOURCE: no weights; expected model.safetensors or model.safetensors.index.json",
    ),
    # ---- the config ----
    "no model_type": (
        config(model_type=...),
        (
            "the config names no model_type, so its tensors' roles are unknown; is this a Hugging Face "
            "config.json?"
        ),
    ),
    "unknown model_type": (
        config(model_type="phy"),
        (
            "family 'phy' has no schema here, and none could be derived and confirmed for this growth: "
            "transformers has no causal language model of that type; did you mean 'phi' or 'phi3' or 'hy_v4'?; "
            "what is left: whole layers copied "
            "(growth.depth=stack and no size but the number of layers), or a schema of your own "
            "(docs/families.md, 'Add a family')"
        ),
    ),
    "hidden_size is text": (
        config(hidden_size="24"),
        "config of family 'phi': hidden_size must be a positive whole number, found '24'",
    ),
    "hidden_size is a fraction": (
        config(hidden_size=24.5),
        "config of family 'phi': hidden_size must be a positive whole number, found 24.5",
    ),
    "hidden_size is missing": (
        config(hidden_size=...),
        "config of family 'phi': hidden_size must be a positive whole number, found None",
    ),
    "no layers": (
        config(num_hidden_layers=0),
        "config of family 'phi': num_hidden_layers must be a positive whole number, found 0",
    ),
    "a negative vocabulary": (
        config(vocab_size=-96),
        "config of family 'phi': vocab_size must be a positive whole number, found -96",
    ),
    "heads that do not divide": (
        config(num_attention_heads=5),
        "cannot divide hidden_size into 5 heads: 24 is no multiple of 5; choose sizes that divide",
    ),
    "key-value heads that do not divide": (
        config(num_key_value_heads=2),
        (
            "cannot divide 3 query heads among 2 key-value heads: 3 is no multiple of 2; choose sizes that "
            "divide"
        ),
    ),
    "a layer count that is true": (
        config(num_hidden_layers=True),
        "config of family 'phi': num_hidden_layers must be a positive whole number, found True",
    ),
    "a config of another size": (
        config(intermediate_size=48),
        (
            "3 faults:\n  - model.layers.*.mlp.fc1.weight (3 tensors): 'ffn <- residual + bias' and "
            "config.json give shape (48, 24), the file has (40, 24)\n  - model.layers.*.mlp.fc1.bias (3 "
            "tensors): 'ffn <- residual + bias' and config.json give shape (48,), the file has (40,)\n  - "
            "model.layers.*.mlp.fc2.weight (3 tensors): 'residual <- ffn + bias' and config.json give "
            "shape (24, 48), the file has (24, 40)"
        ),
    ),
    "a config with more layers": (
        config(num_hidden_layers=4),
        "SOURCE: missing model.layers.3.input_layernorm.bias, model.layers.3.input_layernorm.weight, "
        "model.layers.3.mlp.fc1.bias, … (14 in all), which the phi schema and this config require",
    ),
    # ---- one file's header ----
    "an empty file": (
        lambda folder: (folder / WEIGHTS).write_bytes(b""),
        (
            "SOURCE/model.safetensors: 0 bytes is no safetensors file (8 bytes of header length expected); "
            "truncated?"
        ),
    ),
    "seven bytes": (
        file(WEIGHTS, b"1234567"),
        (
            "SOURCE/model.safetensors: 7 bytes is no safetensors file (8 bytes of header length expected); "
            "truncated?"
        ),
    ),
    "header is no JSON": (
        header(len, raw=b"{nonsense"),
        (
            "SOURCE/model.safetensors: the header is not valid JSON (Expecting property name enclosed in "
            "double quotes: line 1 column 2 (char 1)); truncated, or not a safetensors file"
        ),
    ),
    "header is a list": (
        header(len, raw=b"[1, 2]"),
        "SOURCE/model.safetensors: the header must be a JSON object, found list",
    ),
    "header is not text": (
        header(len, raw=b"\xff\xff"),
        (
            "SOURCE/model.safetensors: the header is not valid JSON ('utf-8' codec can't decode byte 0xff "
            "in position 0: invalid start byte); truncated, or not a safetensors file"
        ),
    ),
    "header nests without end": (
        header(len, raw=b"[" * 100_000),
        (
            "SOURCE/model.safetensors: the header is not valid JSON (nested too deep); truncated, or not a "
            "safetensors file"
        ),
    ),
    "a name twice": (
        header(len, raw=b'{"a": {}, "a": {}}'),
        "SOURCE/model.safetensors: the header names 'a' twice",
    ),
    "length past the end": (
        header(len, length=1 << 40),
        (
            "SOURCE/model.safetensors: header of 1,099,511,627,776 bytes announced in a file of 149,313; "
            "truncated, or not a safetensors file"
        ),
    ),
    "length of 2⁶⁴ - 1": (
        header(len, length=(1 << 64) - 1),
        (
            "SOURCE/model.safetensors: header of 18,446,744,073,709,551,615 bytes announced in a file of "
            "149,313; truncated, or not a safetensors file"
        ),
    ),
    "entry is a number": (
        header(lambda found: found.update({FIRST: 3})),
        "SOURCE/model.safetensors: tensor 'lm_head.bias': expected dtype, shape and data_offsets, found 3",
    ),
    "entry without shape": (
        header(lambda found: found[FIRST].pop("shape")),
        (
            "SOURCE/model.safetensors: tensor 'lm_head.bias': expected dtype, shape and data_offsets, "
            "found {'dtype': 'F64', 'data_offsets': [0, 768]}"
        ),
    ),
    "entry with a key too many": (
        entry(code="x"),
        (
            "SOURCE/model.safetensors: tensor 'lm_head.bias': expected dtype, shape and data_offsets, "
            "found {'dtype': 'F64', 'shape': [96], 'data_offsets': [0, 768], 'code': 'x'}"
        ),
    ),
    "a dtype of less than a byte": (
        entry(dtype="F4"),
        (
            "SOURCE/model.safetensors: tensor 'lm_head.bias': dtype F4 packs several numbers into a byte, "
            "and growth copies formats of whole bytes alone: dequantise it first, where the library can "
            "(AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(NEW))"
        ),
    ),
    "unknown dtype": (
        entry(dtype="F7"),
        (
            "SOURCE/model.safetensors: tensor 'lm_head.bias': dtype 'F7' is not supported; supported: F64, "
            "F32, F16, BF16, I64, I32, I16, I8, U8, BOOL, U64, U32, U16, C64, F8_E4M3, F8_E5M2, F8_E8M0, "
            "F8_E4M3FNUZ, F8_E5M2FNUZ"
        ),
    ),
    "dtype is a list": (
        entry(dtype=["F64"]),
        (
            "SOURCE/model.safetensors: tensor 'lm_head.bias': dtype ['F64'] is not supported; supported: "
            "F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL, U64, U32, U16, C64, F8_E4M3, F8_E5M2, "
            "F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ"
        ),
    ),
    "dtype of another size": (
        entry(dtype="F32"),
        "SOURCE/model.safetensors: tensor 'lm_head.bias': 768 bytes stored, but F32 (96,) takes 384",
    ),
    "shape is text": (
        entry(shape="96"),
        "SOURCE/model.safetensors: tensor 'lm_head.bias': shape '96' is not a list of whole numbers",
    ),
    "shape is negative": (
        entry(shape=[-96]),
        "SOURCE/model.safetensors: tensor 'lm_head.bias': shape [-96] is not a list of whole numbers",
    ),
    "shape is true": (
        entry(shape=[True]),
        "SOURCE/model.safetensors: tensor 'lm_head.bias': shape [True] is not a list of whole numbers",
    ),
    "shape is a fraction": (
        entry(shape=[96.0]),
        "SOURCE/model.safetensors: tensor 'lm_head.bias': shape [96.0] is not a list of whole numbers",
    ),
    "an enormous shape": (
        entry(shape=[1 << 40, 1 << 40]),
        (
            "SOURCE/model.safetensors: tensor 'lm_head.bias': 768 bytes stored, but F64 (1099511627776, "
            "1099511627776) takes 9,671,406,556,917,033,397,649,408"
        ),
    ),
    "three offsets": (
        entry(data_offsets=[0, 1, 2]),
        "SOURCE/model.safetensors: tensor 'lm_head.bias': data_offsets [0, 1, 2] are not two whole numbers",
    ),
    "negative offset": (
        entry(data_offsets=[-768, 0]),
        "SOURCE/model.safetensors: tensor 'lm_head.bias': data_offsets [-768, 0] are not two whole numbers",
    ),
    "offsets reversed": (
        entry(data_offsets=[768, 0]),
        "SOURCE/model.safetensors: tensor 'lm_head.bias': -768 bytes stored, but F64 (96,) takes 768",
    ),
    "offsets past the end": (
        entry(data_offsets=[1 << 40, (1 << 40) + 768]),
        (
            "SOURCE/model.safetensors: tensor 'lm_head.weight' starts at byte 5,719 where 4,951 was "
            "expected: it leaves a gap before it"
        ),
    ),
    "overlapping tensors": (
        header(lambda found: found["model.embed_tokens.weight"].update(data_offsets=[0, 18432])),
        (
            "SOURCE/model.safetensors: tensor 'model.embed_tokens.weight' starts at byte 4,925 where 5,693 "
            "was expected: it overlaps the tensor before it"
        ),
    ),
    "a gap": (
        header(lambda found: found.pop("model.layers.0.mlp.fc1.weight")),
        (
            "SOURCE/model.safetensors: tensor 'model.layers.0.mlp.fc2.bias' starts at byte 51,227 where "
            "43,547 was expected: it leaves a gap before it"
        ),
    ),
    "truncated": (
        truncated,
        "SOURCE/model.safetensors: the header describes 148,920 bytes, the file has 148,820; truncated",
    ),
    "trailing bytes": (
        lambda folder: (folder / WEIGHTS).open("ab").write(b"12345678"),
        "SOURCE/model.safetensors: the header describes 148,920 bytes, the file has 148,928; trailing bytes",
    ),
    # ---- several files ----
    "index is no JSON": (
        index_text("{"),
        (
            "SOURCE/model.safetensors.index.json: not valid JSON (Expecting property name enclosed in "
            "double quotes: line 1 column 2 (char 1))"
        ),
    ),
    "index without weight_map": (
        index_text("{}"),
        (
            "SOURCE/model.safetensors.index.json: weight_map must be an object that names a file for every "
            "tensor"
        ),
    ),
    "weight_map is a list": (
        index([]),
        (
            "SOURCE/model.safetensors.index.json: weight_map must be an object that names a file for every "
            "tensor"
        ),
    ),
    "weight_map is empty": (
        index({}),
        (
            "SOURCE/model.safetensors.index.json: weight_map must be an object that names a file for every "
            "tensor"
        ),
    ),
    "weight_map names a number": (
        index({"a": 3}),
        (
            "SOURCE/model.safetensors.index.json: weight_map must be an object that names a file for every "
            "tensor"
        ),
    ),
    "a shard above the folder": (
        index({"a": "../outside.safetensors"}),
        (
            "SOURCE/model.safetensors.index.json: 'a' points to '../outside.safetensors'; shards are "
            ".safetensors files in the same folder, nothing else is opened"
        ),
    ),
    "a shard at the root": (
        index({"a": "/etc/passwd"}),
        (
            "SOURCE/model.safetensors.index.json: 'a' points to '/etc/passwd'; shards are .safetensors "
            "files in the same folder, nothing else is opened"
        ),
    ),
    "a shard that is no safetensors": (
        index({"a": "weights.bin"}),
        (
            "SOURCE/model.safetensors.index.json: 'a' points to 'weights.bin'; shards are .safetensors "
            "files in the same folder, nothing else is opened"
        ),
    ),
    "a shard that is not there": (
        sharded(lambda folder, _: (folder / "two.safetensors").unlink()),
        (
            "SOURCE/model.safetensors.index.json: shard two.safetensors is missing (1 of 2 are); download "
            "the checkpoint again"
        ),
    ),
    "a shard that does not hold its tensor": (
        sharded(lambda _, weight_map: weight_map.update(ghost="one.safetensors")),
        (
            "SOURCE/model.safetensors.index.json: says 'ghost' is in one.safetensors, which does not hold "
            "it; is a shard from another checkpoint?"
        ),
    ),
    "a tensor in two shards": (
        sharded(
            lambda folder, _: save_file(
                {FIRST: torch.ones(2)} | load_file(folder / "two.safetensors"), folder / "two.safetensors"
            )
        ),
        (
            "SOURCE: tensor 'lm_head.bias' is in two.safetensors and in one.safetensors; each must be in "
            "one shard"
        ),
    ),
    "a shard that is truncated": (
        sharded(
            lambda folder, _: (folder / "two.safetensors").write_bytes(
                (folder / "two.safetensors").read_bytes()[:-8]
            )
        ),
        "SOURCE/two.safetensors: the header describes 101,656 bytes, the file has 101,648; truncated",
    ),
    # ---- the tensors ----
    "a tensor is missing": (
        tensors(lambda stored: stored.pop(FC1)),
        "SOURCE: missing model.layers.1.mlp.fc1.weight, which the phi schema and this config require",
    ),
    "three layers are missing": (
        tensors(lambda stored: [stored.pop(name) for name in list(stored) if ".fc1." in name]),
        (
            "SOURCE: missing model.layers.0.mlp.fc1.bias, model.layers.0.mlp.fc1.weight, "
            "model.layers.1.mlp.fc1.bias, … (6 in all), which the phi schema and this config require"
        ),
    ),
    "names in a wrapper": (
        tensors(
            lambda stored: [stored.update({f"module.{name}": stored.pop(name)}) for name in list(stored)]
        ),
        (
            "SOURCE: every tensor's name begins with 'module.', as a wrapper (torch.compile, DDP, PEFT) saves "
            "what it holds; load it into the model itself and write that with save_pretrained"
        ),
    ),
    "names in two wrappers": (
        tensors(
            lambda stored: [
                stored.update({f"_orig_mod.module.{name}": stored.pop(name)}) for name in list(stored)
            ]
        ),
        (
            "SOURCE: every tensor's name begins with '_orig_mod.module.', as a wrapper (torch.compile, DDP, "
            "PEFT) saves what it holds; load it into the model itself and write that with save_pretrained"
        ),
    ),
    "a tensor too many": (
        tensors(lambda stored: stored.update({"model.layers.1.mlp.gate.weight": torch.ones(2)})),
        "SOURCE: unknown model.layers.1.mlp.gate.weight, which the phi schema does not have",
    ),
    "another shape": (
        tensors(lambda stored: stored.update({FC1: torch.ones(40, 23)})),
        (
            "model.layers.1.mlp.fc1.weight: 'ffn <- residual + bias' and config.json give shape (40, 24), "
            "the file has (40, 23)"
        ),
    ),
    "transposed": (
        tensors(lambda stored: stored.update({FC1: stored[FC1].T.contiguous()})),
        (
            "model.layers.1.mlp.fc1.weight: 'ffn <- residual + bias' and config.json give shape (40, 24), "
            "the file has (24, 40)"
        ),
    ),
    "whole numbers": (
        tensors(lambda stored: stored.update({FC1: torch.ones(40, 24, dtype=torch.int64)})),
        (
            "model.layers.1.mlp.fc1.weight: dtype I64; growth computes on F64, F32, F16 and BF16 weights "
            "(dequantise first)"
        ),
    ),
    "a NaN": (
        value(FC1, (3, 5), float("nan")),
        (
            "model.layers.1.mlp.fc1.weight: entry [3, 5] is NaN; every copy of it would be too, so nothing "
            "is grown: repair the source, or say nonfinite=allow to copy it as it is"
        ),
    ),
    "a NaN in bfloat16": (
        value(FC1, (39, 23), float("nan"), torch.bfloat16),
        (
            "model.layers.1.mlp.fc1.weight: entry [39, 23] is NaN; every copy of it would be too, so "
            "nothing is grown: repair the source, or say nonfinite=allow to copy it as it is"
        ),
    ),
    "infinity in float16": (
        value(FC1, (0, 0), float("inf"), torch.float16),
        (
            "model.layers.1.mlp.fc1.weight: entry [0, 0] is infinite; every copy of it would be too, so "
            "nothing is grown: repair the source, or say nonfinite=allow to copy it as it is"
        ),
    ),
    "minus infinity in a bias": (
        value(FIRST, (95,), float("-inf"), torch.float64),
        (
            "lm_head.bias: entry [95] is infinite; every copy of it would be too, so nothing is grown: "
            "repair the source, or say nonfinite=allow to copy it as it is"
        ),
    ),
    # ---- what lies beside ----
    "tokenizer is no JSON": (
        all_of(file("tokenizer.json", "{")),
        (
            "SOURCE/tokenizer.json: not valid JSON (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1))"
        ),
    ),
    "tokenizer without a vocabulary": (
        file("tokenizer.json", "{}"),
        "SOURCE/tokenizer.json: not a tokenizer of the tokenizers library (KeyError: 'model')",
    ),
    "tokenizer larger than the new vocabulary": (
        file("tokenizer.json", json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 101}]})),
        (
            "target: vocab_size 99 is less than the 102 tokens of SOURCE/tokenizer.json; give at least "
            "vocab_size:102"
        ),
    ),
}


def refused(folder: Path) -> str:
    """The words with which growing `folder` is refused; nothing may be left behind."""
    vocabulary = {"vocab_size": 99} if (folder / "tokenizer.json").exists() else {}
    with pytest.raises(UserError) as caught:
        grow(folder, folder.parent / "out", target=TARGET | vocabulary)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    return str(caught.value).replace(str(folder), "SOURCE")


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_exactly_these_words(phi_folder: Path, tmp_path: Path, case: str) -> None:
    spoil, words = CASES[case]
    spoil(Path(shutil.copytree(phi_folder, tmp_path / "source")))
    assert refused(tmp_path / "source") == words


def test_what_is_not_finite_is_copied_when_that_is_allowed(phi_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    value(FC1, (3, 5), float("nan"))(source)
    value(FIRST, (95,), float("inf"))(source)
    grown = grow(source, tmp_path / "out", target=TARGET, nonfinite="allow")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert np.argwhere(stored[FC1].isnan().numpy()).tolist() == [[3, 5], [43, 5]]  # and its copy
    assert stored[FIRST][95] == float("inf")
    assert grown.receipt is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_finite_numbers_pass(phi_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    for place, number in (
        ((0, 0), torch.finfo(dtype).max),
        ((1, 1), torch.finfo(dtype).min),
        ((2, 2), torch.finfo(dtype).tiny / 2),
    ):
        value(FC1, place, number, dtype)(source)
    grow(source, tmp_path / "out", target={"num_hidden_layers": 4}, depth="stack", receipt=False)
    stored = load_file(tmp_path / "out" / WEIGHTS)[FC1]
    assert (stored[0, 0], stored[1, 1]) == (torch.finfo(dtype).max, torch.finfo(dtype).min)


@pytest.mark.slow
def test_shards_that_are_links_are_read_as_the_hubs_cache_lays_them_out(
    phi_folder: Path, tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    blobs.mkdir()
    shutil.copytree(phi_folder, snapshot)
    shards(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    linked = grow(snapshot, tmp_path / "linked", target=TARGET)
    plain = grow(phi_folder, tmp_path / "plain", target=TARGET)
    assert (linked.folder / WEIGHTS).read_bytes() == (plain.folder / WEIGHTS).read_bytes()
    assert not any(path.is_symlink() for path in linked.folder.rglob("*"))


def test_a_tied_head_that_is_stored_too_counts_once(
    phi_config: dict[str, Any], checkpoint_maker: Any, tmp_path: Path
) -> None:
    source = checkpoint_maker(tmp_path / "source", phi_config | {"tie_word_embeddings": True})
    tensors(lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"].clone()}))(
        source
    )
    grown = grow(source, tmp_path / "out", target=TARGET)
    assert grown.certificate.lossless
    assert "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)
    assert grown.receipt is not None
    assert grown.receipt.max_delta < 1e-12


def test_a_source_that_may_only_be_read_is_enough(phi_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    grow(source, tmp_path / "out", target=TARGET)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()} == before
    (tmp_path / "out" / WEIGHTS).open("ab").close()  # what comes out can be written


def test_a_tokenizer_with_room_in_the_new_vocabulary_is_copied(phi_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    file("tokenizer.json", json.dumps({"model": {"vocab": [["a", 0.0]] * 99}}))(source)
    grow(source, tmp_path / "out", target={"vocab_size": 99})
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
