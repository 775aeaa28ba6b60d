"""The doors of growth: whatever comes in, wrong types and sizes without bound included, is answered by one
error of a few words."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from outgrow.growth import grow, plan
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.config import MAX_CONFIG_VALUES, read_config, read_json
from outgrow.model.headers import read_header

TARGET = {"intermediate_size": 80}
WRONG: tuple[Any, ...] = ("x", [], [1], {"a": 1}, True, {})


@pytest.fixture
def source(phi_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phi_folder, tmp_path / "source"))


def with_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(*arguments: Any, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        grow(*arguments, **how)
    assert len(str(caught.value)) < 2500
    return str(caught.value)


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    "key",
    [
        "layer_norm_eps", "initializer_range", "partial_rotary_factor", "rope_theta", "rope_parameters", "rope_scaling", "model_type",
        "layer_types", "tie_word_embeddings", "hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size",
        "max_position_embeddings",
    ],
)  # fmt: skip
def test_a_config_value_of_another_type_is_told(source: Path, tmp_path: Path, key: str, value: Any) -> None:
    fits = {
        "model_type": ["x"],
        "tie_word_embeddings": [True],
        "layer_types": [[]],
        "rope_parameters": [{}, {"a": 1}],
        "rope_scaling": [{}, {"a": 1}],
    }
    if any(value == right and type(value) is type(right) for right in fits.get(key, ())):
        pytest.skip("a value that fits")
    with_config(source, **{key: value})
    for target in (TARGET, {"hidden_size": 30}):
        assert key in refusal(source, tmp_path / "out", target=target)
    assert key in refusal(source, tmp_path / "out", target=TARGET, operator="scratch")


NOT_FINITE = (float("nan"), float("inf"), float("-inf"), -1e-6, 10**400)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *(("layer_norm_eps", value, "must be a finite number of at least 0") for value in NOT_FINITE),
        *(("rope_theta", value, "must be a finite number above 0") for value in (*NOT_FINITE, 0)),
        *(("partial_rotary_factor", value, "must be a finite number of at least 0") for value in NOT_FINITE),
        ("partial_rotary_factor", 1.5, "must be a share of each head, at most 1"),
        ("text_config", 3, "must be keys and values, or null"),
        ("text_config", [], "must be keys and values, or null"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("target", [TARGET, {"hidden_size": 30}], ids=str)
def test_a_number_that_no_network_computes_with_is_told(
    source: Path, tmp_path: Path, key: str, value: Any, words: str, target: dict[str, int]
) -> None:
    """Without a word such a source gave a certificate and logits that are NaN, or a traceback."""
    with_config(source, **{key: value}, **({} if key == "text_config" else {"rope_parameters": None}))
    assert f"{key} {words}" in refusal(source, tmp_path / "out", target=target)


@pytest.mark.parametrize("value", [0, 6], ids=repr)
def test_a_value_that_the_librarys_config_refuses_is_told(source: Path, tmp_path: Path, value: int) -> None:
    with_config(source, layer_norm_eps=value)
    words = refusal(source, tmp_path / "out", target=TARGET, receipt=True)
    assert "transformers refuses it for model_type 'phi'" in words
    assert f"expected float, got int (value: {value})" in words


@pytest.mark.parametrize("value", ["x", [1], True], ids=repr)
@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_theta"])
def test_what_rope_parameters_hold_is_told(source: Path, tmp_path: Path, key: str, value: Any) -> None:
    with_config(
        source,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, key: value},
    )
    assert f"config: rope_parameters: {key} must be a number, or null" in refusal(
        source, tmp_path / "out", target=TARGET
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (3, "target: expected a preset's name, a folder, a config, or overrides such as .*; found 3"),
        (None, "target: expected a preset's name.*; found None"),
        ([1], r"target: expected a preset's name.*; found \[1\]"),
        (dict, "target: expected a preset's name.*; found <class 'dict'>"),
        ({"rope_parameters": "x"}, "rope_parameters must be keys and values"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters: rope_theta must be a number"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps must be a number"),
        ({"tie_word_embeddings": 3}, "tie_word_embeddings must be true, false or null"),
        ({"hidden_size": "x"}, "hidden_size must be a positive whole number"),
        ({3: 4}, "target: expected .* found {3: 4}"),
    ],
)
def test_a_target_of_another_type_is_told(source: Path, tmp_path: Path, target: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        grow(source, tmp_path / "out", target=target)
    with pytest.raises(UserError, match=words):
        plan(source, target)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"noise": "x"}, "noise: expected a number"),
        ({"noise": float("nan")}, "noise: expected a number"),
        ({"operator": 3}, "operator: expected an operator's name; found 3"),
        ({"operator": None}, "operator: expected an operator's name; found None"),
        ({"depth": 3}, "depth: expected a layer map's name, or a list of source layers; found 3"),
        ({"depth": ["a"]}, "depth: expected"),
        ({"seed": "x"}, "seed: expected a whole number; found 'x'"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"overwrite": "yes"}, "overwrite: expected True or False; found 'yes'"),
        ({"receipt": "yes"}, "receipt: expected True, False or None"),
        ({"threads": 0}, "threads: expected a positive whole number; found 0"),
        ({"threads": "2"}, "threads: expected a positive whole number; found '2'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: expected a positive whole number"),
        ({"revision": 3}, "revision: expected a commit or branch, or None"),
        ({"optimizer": 3}, "optimizer: expected a file's or folder's path, or None"),
        ({"nonfinite": "maybe"}, "nonfinite: expected 'refuse' or 'allow'"),
        ({"worker": 3}, "worker: expected 'i/n' or None"),
        ({"progress": 3}, "progress: expected a function or None"),
        ({"threads": 0, "worker": 3}, "2 faults:"),
        ({"out": None}, "out: expected a folder's path; found None"),
        ({"source": 3}, "source 3: expected a folder or a Hugging Face name"),
        ({"source": None}, "source None: expected a folder"),
        ({"source": [1]}, r"source \[1\]: expected a folder"),
        ({"mode": 3}, "mode"),
        ({"worker": "٠/١"}, "worker=٠/١: expected i/n"),
        ({"text": "a.txt", "receipt": False}, "receipt_text 'a.txt': is for a receipt"),
        ({"receipt_text": "a.txt", "receipt": False}, "receipt_text 'a.txt': is for a receipt"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_argument_of_another_type_is_told(
    source: Path, tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    arguments = {"source": source, "out": tmp_path / "out", "target": TARGET} | how
    assert words.replace("\\", "") in refusal(arguments.pop("source"), arguments.pop("out"), **arguments)


@pytest.mark.parametrize("operator", ["lossless", "upcycle"])
@pytest.mark.parametrize("key", ["source", "target", "out"])
@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_told(
    source: Path, tmp_path: Path, name: str, key: str, operator: str
) -> None:
    arguments: dict[str, Any] = {"source": source, "out": tmp_path / "out", "target": TARGET, key: name}
    if operator == "upcycle" and key != "target":
        pytest.skip("targets of a mixture are read elsewhere")
    words = refusal(arguments["source"], arguments["out"], target=arguments["target"], operator=operator)
    assert key in words
    if key != "out":
        with pytest.raises(UserError, match=key):
            plan(arguments["source"], arguments["target"], operator)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "\xff", '{"tokens": "x"}', '{"flops": NaN}', '{"val_loss": [1]}', '{"tokens": -1}'],
)
def test_a_ledger_that_is_none_is_told_before_anything_is_made(
    source: Path, tmp_path: Path, content: str
) -> None:
    (source / "ledger.json").write_text(content)
    told: list[int] = []
    assert "ledger.json: " in refusal(
        source, tmp_path / "out", target=TARGET, progress=lambda done, _: told.append(done)
    )
    assert not told


def test_a_file_in_the_way_of_the_partial_folder_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine")
    assert "out.partial is in the way" in refusal(source, tmp_path / "out", target=TARGET)
    assert (tmp_path / "out.partial").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["model.layers.*.x", "*", "a" * 5000, "model.layers.999999999999999999999.x", "\n", "", "[red]"]
)
def test_a_tensor_name_of_any_kind_is_told_in_few_words(source: Path, tmp_path: Path, name: str) -> None:
    weights = load_file(source / "model.safetensors")
    save_file(weights | {name: weights["lm_head.bias"].clone()}, source / "model.safetensors")
    words = refusal(source, tmp_path / "out", target=TARGET)
    assert "unknown " in words
    assert len(words) < 600


def test_an_index_that_names_a_file_of_five_thousand_characters(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}})
    )
    words = refusal(source, tmp_path / "out", target=TARGET)
    assert "which is longer than a file's name can be" in words
    assert len(words) < 600


# ---- bounds ------------------------------------------------------------------------------------------------


def many_keys(path: Path) -> None:
    path.write_text(json.dumps({f"key_{number}": number for number in range(1_000_000)}))


def many_numbers(path: Path) -> None:
    path.write_text(json.dumps({"a": [0] * 1_000_000}))


def many_lists(path: Path) -> None:
    path.write_text('{"a": [' + "[]," * 1_000_000 + "[]]}")


def much_text(path: Path) -> None:
    path.write_text(json.dumps({"a": "x" * (5 << 20)}))


def a_device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.slow
@pytest.mark.parametrize("make", [many_keys, many_numbers, many_lists, much_text, a_device, a_pipe])
def test_a_config_without_bound_is_refused_in_bounded_time_and_memory(
    source: Path, make: Callable[[Path], None]
) -> None:
    make(source / "config.json")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=r"no honest config\.json|not a regular file"):
        read_config(source)
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("make", [a_device, a_pipe])
@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model.safetensors", "tokenizer.json", "ledger.json"]
)
def test_devices_and_pipes_are_not_waited_for(
    source: Path, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    if name.endswith("index.json"):
        (source / "model.safetensors").unlink()  # which would be taken before it
    make(source / name)
    words = refusal(source, tmp_path / "out", target=TARGET | {"vocab_size": 99})
    assert "not a regular file" in words


def test_as_many_values_as_an_honest_config_holds_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"id2label": {str(n): "x" for n in range(MAX_CONFIG_VALUES - 10)}})
    )
    assert len(read_config(tmp_path)["id2label"]) == MAX_CONFIG_VALUES - 10


@pytest.mark.slow
def test_an_index_of_as_many_tensors_as_the_largest_models_have_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {str(n): "a.safetensors" for n in range(500_000)}})
    )
    assert len(read_json(tmp_path / "model.safetensors.index.json")["weight_map"]) == 500_000


@pytest.mark.slow
def test_a_header_of_millions_of_tensors_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    entries = ",".join(
        f'"t{number:07d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(1_700_000)
    )
    text = f"{{{entries}}}".encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=r"no honest a\.safetensors holds more than"):
        read_header(tmp_path / "a.safetensors")
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_messages_name_what_is_long_by_its_ends() -> None:
    words = str(UserError(f"source {'a' * 5000}z: no such folder"))
    assert words.startswith(f"source {'a' * 100}… (5,002 characters) …aaa")
    assert words.endswith("az: no such folder")
    assert str(UserError("short\nlines")) == "short\nlines"


def test_a_sound_source_still_passes(source: Path) -> None:
    with Checkpoint(source) as checkpoint:
        assert plan(checkpoint, TARGET).certificate.lossless
