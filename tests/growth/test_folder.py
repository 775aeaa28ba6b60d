"""The grown folder: loadable, whole or absent, and what a killed, failed or refused growth leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import outgrow.model.base.atomic
from helpers.families import config_of
from helpers.models import make_checkpoint
from helpers.unwritten import config_of as stranger
from outgrow.growth import grow, plan
from outgrow.growth import grow as grow_function
from outgrow.growth.card import model_card
from outgrow.growth.verify import loaded_otherwise
from outgrow.model.base.atomic import make_whole
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint

growth_module: Any = sys.modules["outgrow.growth.grow"]  # the package has a function of that name

BIGGER = {"hidden_size": 30, "intermediate_size": 50, "num_hidden_layers": 4}


@pytest.fixture
def source(phi_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint with a tokenizer beside it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    vocabulary = {"<|endoftext|>": 0, **{chr(97 + i): i + 1 for i in range(26)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    (folder / "ledger.json").write_text('{"tokens": 7}')
    return folder


def test_the_card_names_a_base_model_of_the_hub_and_no_folder_here(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent.parent)
    here = f"{source.parent.name}/{source.name}"
    decided = plan(source, target=BIGGER)
    assert model_card(decided, here, None).startswith("---\ntags: [grown]\n")
    assert model_card(decided, "owner/name", None).startswith("---\nbase_model: owner/name\n")


@pytest.mark.slow
def test_a_grown_folder_loads_with_transformers_alone(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = grow(source, tmp_path / "out", target=BIGGER, max_shard_bytes=50_000).folder
    loaded, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.num_hidden_layers == 4
    assert loaded.config.rope_parameters["partial_rotary_factor"] == 0.4
    assert AutoTokenizer.from_pretrained(out).decode([1, 2]) == AutoTokenizer.from_pretrained(source).decode(
        [1, 2]
    )
    assert loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)
    recipe = json.loads((out / "growth.json").read_text())
    assert recipe["source"]["ledger"] == {"tokens": 7}
    assert recipe["certificate"] == {"lossless": True, "reasons": []}
    assert recipe["receipt"]["max_delta"] <= 1e-12
    assert recipe["plan"]["layers"] == [0, 0, 1, 2]
    assert recipe["plan"]["identity_layers"] == [1]
    assert recipe["plan"]["tensors"]["lm_head.weight"]["source"] == "lm_head.weight"
    assert "lossless" in (out / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.slow
def test_an_existing_folder_is_replaced_only_when_asked_and_only_by_a_whole_one(
    source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = grow(source, tmp_path / "out", target=BIGGER).folder
    before = (out / "growth.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        grow(source, out, target=BIGGER, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _full)
        with pytest.raises(UserError, match="the disk is full"):
            grow(source, out, target=BIGGER, seed=1, overwrite=True)
    assert (out / "growth.json").read_bytes() == before
    grow(source, out, target=BIGGER, seed=1, overwrite=True)
    assert (out / "growth.json").read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.slow
def test_at_every_moment_there_is_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    out, missing, done = tmp_path / "out", 0, False
    out.mkdir()
    (out / "config.json").write_text("{}")

    def look() -> None:
        nonlocal missing
        while not done:
            missing += not (out / "config.json").exists()

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(500):
        with make_whole(out) as partial:
            partial.mkdir()
            (partial / "config.json").write_text(str(number))
    done = True
    reader.join()
    assert missing == 0
    assert (out / "config.json").read_text() == "499"


def test_a_file_system_that_cannot_exchange_folders_replaces_them_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgrow.model.base.atomic, "exchange", lambda *_: False)
    for text in ("old", "new"):
        with make_whole(tmp_path / "out") as partial:
            partial.mkdir()
            (partial / "file").write_text(text)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_verified_does_not_load(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it killed while the receipt is measured, the folder that stays would have no config."""
    measured, right = [], growth_module.measure_growth

    def measure(plan: Any, reader: Any, before: Path, folder: Path, **how: Any) -> Any:
        measured.append(folder)
        with pytest.raises(UserError, match=r"config\.json: no such file"):
            Checkpoint(folder)
        return right(plan, reader, before, folder, **how)

    monkeypatch.setattr(growth_module, "measure_growth", measure)
    out = grow(source, tmp_path / "out", target=BIGGER).folder
    assert measured == [tmp_path / "out.partial"]
    assert Checkpoint(out).config["hidden_size"] == 30


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync", "rename"])
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: Any, call: str) -> None:
    monkeypatch.setattr(os, call, _full)
    with pytest.raises(UserError, match=r"the disk is full.*nothing was kept"):
        grow(source, tmp_path / "out", target=BIGGER)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EFBIG, r"a file would be larger than .*nothing was kept; make smaller files \(max_shard_gb\)"),
        (errno.EMFILE, r"more files would be open.*nothing was kept; make larger files \(max_shard_gb\)"),
        (errno.EIO, r"cannot be written \(Input/output error\); nothing was kept"),
        (errno.ESTALE, r"cannot be written \(Stale file handle\)"),
        (errno.EBUSY, r"cannot be written \(Device or resource busy\)"),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "rename"])
def test_whatever_a_file_system_answers_is_told_in_a_line(
    source: Path, tmp_path: Path, monkeypatch: Any, call: str, number: int, told: str
) -> None:
    def refusing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refusing)
    with pytest.raises(UserError, match=rf"out {tmp_path / 'out'}: {told}"):
        grow(source, tmp_path / "out", target=BIGGER)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_place_that_cannot_be_written_is_told(source: Path) -> None:
    with pytest.raises(UserError, match=r"out /proc/grown: cannot be written"):
        grow(source, "/proc/grown", target=BIGGER)


def test_a_companion_that_may_not_be_read_is_not_taken_for_a_place_that_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refusing(path: Path, *how: Any, **more: Any) -> Any:
        if path == source / "tokenizer.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read \(Permission denied\)"):
        grow(source, tmp_path / "out", target=BIGGER, receipt=False)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_fault_while_writing_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import outgrow.growth.engine.execute

    monkeypatch.setattr(outgrow.growth.engine.execute.Expander, "_expand_columns", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grow(source, tmp_path / "out", target=BIGGER)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_wrong_schema_is_caught_by_the_receipt(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import outgrow.growth.engine.execute

    right = outgrow.growth.engine.execute.scaled
    monkeypatch.setattr(
        outgrow.growth.engine.execute, "scaled", lambda raw, factor, *more: right(raw, factor * 1.01, *more)
    )
    with pytest.raises(
        UserError,
        match=r"certified lossless, yet logits moved .* fault of the phi schema or of operator 'lossless'",
    ):
        grow(source, tmp_path / "out", target=BIGGER)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.slow
def test_a_folder_that_the_library_loads_otherwise_is_blamed_itself(
    source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import outgrow.model.build

    right = outgrow.model.build.load_model

    def otherwise(folder: Path, **how: Any) -> Any:
        loaded = right(folder, **how)
        if Path(folder) == source:
            loaded.get_parameter("model.layers.1.mlp.fc1.bias").data += 0.1
        return loaded

    monkeypatch.setattr(outgrow.model.build, "load_model", otherwise)
    with pytest.raises(
        UserError, match=r"source: transformers loads model\.layers\.1\.mlp\.fc1\.bias otherwise than stored"
    ) as told:
        grow(source, tmp_path / "out", target=BIGGER)
    assert "schema" not in str(told.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("config", [config_of("llama"), stranger("mixtral")], ids=["written", "derived"])
def test_every_stored_tensor_is_held_against_what_the_library_loads(
    config: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    import outgrow.model.build

    folder, right = (
        make_checkpoint(tmp_path / "source", config, dtype="bfloat16"),
        outgrow.model.build.load_model,
    )
    assert loaded_otherwise(folder, "float64") == []

    def otherwise(folder: Path, **how: Any) -> Any:
        loaded = right(folder, **how)
        for parameter in loaded.parameters():
            parameter.data += 0.1
        return loaded

    monkeypatch.setattr(outgrow.model.build, "load_model", otherwise)
    assert sorted(loaded_otherwise(folder, "float64")) == sorted(load_file(folder / "model.safetensors"))


def test_a_folder_that_is_no_checkpoint_is_never_replaced(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no checkpoint folder, so it is not replaced"):
        grow(source, precious, target=BIGGER, overwrite=True)
    assert (precious / "chapter.tex").read_text() == "years of work"


KILLED = """
import os, sys, signal
import outgrow.growth.engine.execute
from outgrow.growth import grow, plan
count, limit = 0, int(sys.argv[3])
right = outgrow.growth.engine.execute.Expander.fill
def fill(self, *arguments):
    global count
    count += 1
    if count > limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(self, *arguments)
outgrow.growth.engine.execute.Expander.fill = fill
grow(sys.argv[1], sys.argv[2], target={"hidden_size": 30, "intermediate_size": 50, "num_hidden_layers": 4}, receipt=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 20, 40])
def test_kill_9_leaves_no_folder_and_the_next_growth_succeeds(
    source: Path, tmp_path: Path, limit: int
) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, source, out, str(limit)], timeout=600, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.partial").exists()
    assert grow(source, out, target=BIGGER).receipt.max_delta <= 1e-12
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_two_growths_into_one_folder_are_refused_and_the_first_goes_on(source: Path, tmp_path: Path) -> None:
    from outgrow.growth.folder import complete_or_absent

    with complete_or_absent(tmp_path / "out") as first:
        with pytest.raises(UserError, match="another process is writing"):
            grow(source, tmp_path / "out", target=BIGGER)
        assert first.exists()


@pytest.mark.slow
def test_the_engine_does_not_import_torch() -> None:
    code = (
        "import sys, outgrow.growth, outgrow.growth.__main__; sys.exit('torch' in sys.modules or "
        "'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_buffers_of_older_checkpoints_are_passed_over(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file(
        tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        source / "model.safetensors",
    )
    assert grow_function(source, tmp_path / "out", target=BIGGER).certificate.lossless


def door(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outgrow.growth", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_the_door_grows_and_says_what_it_did(source: Path, tmp_path: Path) -> None:
    target = "target={hidden_size:30,intermediate_size:50,num_hidden_layers:4}"
    done = door(
        f"source={source}", target, "growth=lossless", f"out={tmp_path / 'out'}", "growth.depth=stack"
    )
    assert done.returncode == 0, done.stderr
    assert "certificate: not lossless" in done.stdout
    assert "target layers 3 work although" in done.stdout
    assert (tmp_path / "out" / "growth.json").exists()


@pytest.mark.slow
def test_the_door_prints_a_plan_of_phi_without_weights() -> None:
    started = time.perf_counter()
    done = door("source=phi_1_5", "target=phi_2", "plan_only=true")
    assert done.returncode == 0, done.stderr
    assert "1,418,270,720 → 2,779,683,840 parameters, 5,559,367,680 bytes" in done.stdout
    assert "certificate: lossless" in done.stdout
    assert "[0]   1    2    3   [3]   4    5    6   [6]" in done.stdout
    assert time.perf_counter() - started < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["source: missing", "target: missing"]),
        (
            ["sorce=x", "growth=losless", "treads=2"],
            ["did you mean 'source'", "did you mean 'lossless'", "did you mean 'threads'"],
        ),
        (["source=phi_1_5", "target=phi_2"], ["out: missing"]),
        (
            ["source=phi_1_5", "target=phi_2", "plan_only=maybe"],
            ["plan_only: expected true or false; found 'maybe'"],
        ),
        (["source=phi_1_5", "target=phi_2", "out=x", "growth=source"], ["growth=source: a training arm"]),
        (
            ["source=phi_1_5", "target=phi_2", "plan_only=true", "figure=x.docx"],
            ["no picture's name; end it in .png, .pdf, .svg"],
        ),
        (["source=phi_1_5", "target=phi_2", "plan_only=true", "threads=0"], ["threads: must be positive"]),
        (
            ["source=phi_2", "target=phi_1_5", "plan_only=true"],
            ["residual 2048 is smaller", "layer 24 is smaller", "ffn 8192 is smaller"],
        ),
        (
            ["source=microsoft/phi-1_5", "target=phi_2", "out=x"],
            ["source 'microsoft/phi-1_5'", "check name and network"],
        ),
    ],
)
def test_the_door_tells_every_fault_at_once(arguments: list[str], messages: list[str]) -> None:
    done = door(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr
