"""Checkpoints, run folders and files: whole or absent, one owner, one set of settings."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.runs import record_of
from outgrow.model.base.atomic import remove
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import read_object, whole_folder, write_json, write_text
from outgrow.model.build import build_model
from outgrow.train.compose import compose
from outgrow.train.machine.device import peak_flops
from outgrow.train.optimizer import build_optimizer
from outgrow.train.run import folder, state
from outgrow.train.run.clock import Meter
from outgrow.train.run.record import RunRecord, Span, Summary, signed
from outgrow.train.settings import OptimizerSettings

SETTINGS = OptimizerSettings(
    name="adamw", learning_rate=0.1, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.5
)


def trained(model: nn.Module, seed: int = 0) -> torch.optim.Optimizer:
    """An optimizer of `model` that holds moments."""
    optimizer, generator = build_optimizer(model, SETTINGS), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_brings_everything_back(tmp_path: Path, phi_config: dict[str, Any], tied: bool) -> None:
    config = phi_config | {"tie_word_embeddings": tied}
    model, other = build_model(config, seed=0), build_model(config, seed=1)
    optimizer, fresh = trained(model), build_optimizer(other, SETTINGS)
    position = state.Position(
        step=7,
        tokens=70,
        best_val_loss=1 / 3,
        best_step=6,
        flops=1e9 / 3,
        seconds=0.1,
        loss_sum=2 / 3,
        loss_count=2,
    )
    path = state.folder_of(tmp_path, 7)
    state.write(path, asdict(position), state.tensors(model, optimizer))
    assert state.read(path, other, fresh) == position
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for ours, theirs in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


def checkpoint(folder: Path, step: int, model: nn.Module | None = None) -> Path:
    """A checkpoint of `model` with an optimizer that has moments."""
    model = model or nn.Linear(2, 2)
    held = state.tensors(model, trained(model))
    state.write(
        state.folder_of(folder, step),
        asdict(state.Position(step=step)),
        held,
        metrics=f'{{"kind": "eval", "step": {step}}}\n',
    )
    return state.folder_of(folder, step)


def test_the_newest_and_the_best_are_kept_and_the_half_written_are_no_checkpoints(tmp_path: Path) -> None:
    for step in (8, 9, 99_999_999, 100_000_000):
        checkpoint(tmp_path, step)
    state.drop_old(tmp_path, keep=2, best=8)
    (tmp_path / "step-00000011.partial").mkdir()
    (tmp_path / "step-00000012").mkdir()  # as a copy that was cut off leaves it: no state.json
    assert [path.name for path in state.complete(tmp_path)] == [
        "step-00000008",
        "step-99999999",
        "step-100000000",
    ]
    assert (tmp_path / "step-00000011.partial").exists()
    state.complete(tmp_path, tidy=True)
    assert not (tmp_path / "step-00000011.partial").exists()


def test_of_a_checkpoint_that_is_a_link_the_link_is_dropped(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path / "other_disk", 1)
    (tmp_path / "run").mkdir()
    state.folder_of(tmp_path / "run", 1).symlink_to(kept)
    newer = checkpoint(tmp_path / "run", 2)
    state.drop_old(tmp_path / "run", keep=1)
    assert list((tmp_path / "run").iterdir()) == [newer]
    state.check(kept)


def test_a_checkpoint_under_another_steps_name_is_none(tmp_path: Path) -> None:
    named = checkpoint(tmp_path, 3).rename(state.folder_of(tmp_path, 9))
    with pytest.raises(UserError, match="it is the state after step 3, under another step's name"):
        state.check(named)


def test_a_checkpoint_that_a_kill_leaves_half_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)

    def half(path: Path, **_: Any) -> None:
        next(path.glob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        state.drop_old(tmp_path, keep=1)
    assert state.complete(tmp_path) == [new]
    assert not old.exists()


def flipped(file: Path, place: int = -1) -> None:
    """Change one bit of the file."""
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)


def zeroed(file: Path) -> None:
    """Lose the second half of the file, as a disk does that has not written a block."""
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2] + bytes(size - size // 2))


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def edited(file: Path) -> None:
    file.write_text(file.read_text().replace('"step": 1', '"step": 2'))


@pytest.mark.parametrize("damage", [cut_off, Path.unlink, flipped, zeroed])
@pytest.mark.parametrize("pattern", ["*.safetensors", "metrics.jsonl"])
def test_every_damage_to_a_file_of_a_checkpoint_is_found(
    tmp_path: Path, damage: Callable[[Path], None], pattern: str
) -> None:
    path = checkpoint(tmp_path, 1)
    state.check(path)
    (file,) = path.glob(pattern)
    damage(file)
    with pytest.raises(UserError, match=r"checkpoint .*step-00000001: cannot be loaded \(.+\)"):
        state.check(path)


@pytest.mark.parametrize(
    "damage",
    [cut_off, zeroed, edited, lambda file: file.write_text("[]"), lambda file: file.write_text("{}")],
)
def test_every_damage_to_the_record_of_a_checkpoint_is_found(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = checkpoint(tmp_path, 1)
    damage(path / state.STATE)
    with pytest.raises(UserError, match=r"checkpoint .*step-00000001: cannot be loaded \(.+\)"):
        state.check(path)


def test_a_checkpoint_of_another_run_is_none_of_this_one(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = state.folder_of(tmp_path, 1)
    held = state.tensors(model, trained(model))
    state.write(path, asdict(state.Position(step=1)), held, run="aaa")
    state.check(path, run="aaa")
    with pytest.raises(UserError, match="it is of another run, with settings aaa, not bbb"):
        state.check(path, run="bbb")
    os.link(path / state.STATE, tmp_path / "kept.json")  # as the copy of a trunk is
    state.adopt(path, "bbb")
    state.check(path, run="bbb")
    assert json.loads((tmp_path / "kept.json").read_text())["run"] == "aaa"
    state.check(checkpoint(tmp_path, 2), run="bbb")  # an older one does not say


def test_a_record_tells_what_was_edited_or_damaged_in_it(tmp_path: Path) -> None:
    record = signed({"name": "x", "loss": math.nan, "sizes": (1, 2)})
    assert record["loss"] is None
    write_json(tmp_path / "summary.json", signed(summary_of(3.0)))
    assert Summary.read(tmp_path / "summary.json", "").final_val_loss == 3.0
    edited = (tmp_path / "summary.json").read_text().replace("3.0", "2.0")
    (tmp_path / "summary.json").write_text(edited)
    with pytest.raises(UserError, match=r"summary\.json: it was edited or damaged after .*; run it again"):
        Summary.read(tmp_path / "summary.json", "run it again")
    write_json(tmp_path / "older.json", summary_of(2.0))
    assert Summary.read(tmp_path / "older.json", "").final_val_loss == 2.0


def summary_of(loss: float) -> dict[str, Any]:
    return Summary(5.0, loss, 1.5, tokens=100, flops=1e3).to_json()


def test_several_processes_read_every_file_of_a_checkpoint_once(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    flipped(next(path.glob("*.safetensors")))
    faults = []
    for process in range(2):
        try:
            state.check(path, process, 2)
        except UserError as error:
            faults.append(str(error))
    assert len(faults) == 1


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    path, model = checkpoint(tmp_path, 1, nn.Linear(3, 2)), nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"checkpoint .*step-00000001: cannot be loaded \(.+\)"):
        state.read(path, model, build_optimizer(model, SETTINGS))


def test_a_checkpoint_holds_readable_tensors_and_text_alone(
    tmp_path: Path, phi_config: dict[str, Any]
) -> None:
    """No pickle, which could hold code; tied tensors once; every parameter and its moments under its own
    name."""
    model = build_model(phi_config | {"tie_word_embeddings": True}, seed=0)
    path = checkpoint(tmp_path, 1, model)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".jsonl"}
    (shard,) = path.glob("*.safetensors")
    slots = ("model", "optimizer/step", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    assert sorted(load_file(shard)) == sorted(f"{slot}/{name}" for slot in slots for name in names)


@pytest.mark.parametrize(
    ("there", "lost"),
    [
        ('{"kind": "eval", "step": 5}\n', False),
        # rows after the checkpoint, the last cut off
        ('{"kind": "eval", "step": 5}\n{"kind": "train", "step": 7}\n{"st', False),
        ('{"kind": "ev', True),
        ("", True),
        (None, True),
        ('[]\n{"kind": "eval", "step": 5}\n', True),
    ],
)
def test_metrics_are_those_of_the_checkpoint(tmp_path: Path, there: str | None, lost: bool) -> None:
    path, saved = tmp_path / "metrics.jsonl", checkpoint(tmp_path, 5)
    if there is not None:
        path.write_text(there)
    assert state.restore_metrics(path, saved) == lost
    assert path.read_text() == '{"kind": "eval", "step": 5}\n'
    assert not state.restore_metrics(path, None)
    assert path.read_text() == ""


# ---- files -------------------------------------------------------------------------------------------------


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with whole_folder(target) as partial:
        (partial / "a").write_text("first")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), whole_folder(target) as partial:
        (partial / "a").write_text(str(1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (target / "a").read_text() == "first"
    with whole_folder(target) as partial:
        (partial / "b").write_text("third")
    assert [path.name for path in target.iterdir()] == ["b"]


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    write_json(tmp_path / "f", {"a": [math.nan, 1.5], "b": {"c": -math.inf, "d": (True, "NaN")}})
    assert json.loads((tmp_path / "f").read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5],
        "b": {"c": None, "d": [True, "NaN"]},
    }


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000])
def test_what_is_no_json_object_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(UserError, match=r"/f: .*; the way out$"):
        read_object(tmp_path / "f", "the way out")


FULL = "No space left on device"


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, FULL),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError(f"I/O error: {FULL} (os error 28)"),
    ],
)
def test_a_full_or_unwritable_disk_is_one_clear_error_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    (tmp_path / "f").write_text("before")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(fault))
    with pytest.raises(
        UserError,
        match=r"/f: could not be written \(.*(No space left on device|Read-only file system).* free space",
    ):
        write_text(tmp_path / "f", "after")
    assert (tmp_path / "f").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_lies_in_the_place_of_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(UserError, match=r"/f: could not be written \(Is a directory\).*: move what lies in"):
        write_text(tmp_path / "f", "text")


def test_a_folder_that_another_process_has_begun_meanwhile_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes that write one checkpoint, any may be the first to make its folder."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", lambda _: False)  # as it was a moment ago
        (tmp_path / "made.partial").mkdir()
        remove(tmp_path / "made.partial")
    with whole_folder(tmp_path / "made") as partial:
        (partial / "a").touch()
    assert (tmp_path / "made" / "a").exists()


def test_other_faults_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), whole_folder(tmp_path / "made"):
        raise RuntimeError("a bug")


# ---- the run folder ----------------------------------------------------------------------------------------


def test_a_folder_of_other_files_is_no_run_folder(tmp_path: Path) -> None:
    assert folder.read_run(tmp_path / "new") is None
    (tmp_path / "start").mkdir()
    (tmp_path / "start.former.partial").mkdir()
    (tmp_path / "run.json.partial").touch()
    assert folder.read_run(tmp_path) is None  # what a run killed at its start leaves
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex and no run\.json"):
        folder.read_run(tmp_path)
    for text in (
        "{",
        "[]",
        "null",
        '{"settings": {}}',
        '{"settings": 3, "settings_hash": "x", "data": {}, "start": {}, "target_config": {}}',
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match="not a run's record"):
            folder.read_run(tmp_path)


@pytest.mark.slow
def test_a_run_is_its_own_and_no_other(tmp_path: Path) -> None:
    settings = compose(["growth=scratch", "target=tiny_target"])
    (tmp_path / "run.json").write_text(json.dumps(record_of(settings).to_json()))
    run = RunRecord.read(tmp_path / "run.json", "")
    folder.check_same(tmp_path, run, settings)
    assert (run.study, run.arm, run.seed, run.name) == (
        "run",
        "scratch",
        0,
        "run-scratch-target_tiny_target-s0",
    )
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: the run has 0\.003, asked is 0\.1"):
        folder.check_same(
            tmp_path, run, compose(["growth=scratch", "target=tiny_target", "optimizer.learning_rate=0.1"])
        )


@pytest.mark.slow
def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from outgrow.train.run.folder import locked\nwith "
        "locked(pathlib.Path(sys.argv[1]), True): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    (tmp_path / "run.json").touch()
    with folder.locked(tmp_path, True):
        other = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert "another process is training this run right now" in other.stderr
        with folder.locked(tmp_path, False):  # the other ranks of the same run
            pass
    assert subprocess.run(command, env=environment).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"], "a lock leaves nothing behind"


def test_a_run_folder_that_is_a_link_is_the_folder_that_it_names(tmp_path: Path) -> None:
    real = tmp_path / "other_disk"
    real.mkdir()
    (tmp_path / "run").symlink_to(real)
    with (
        folder.locked(tmp_path / "run", True),
        pytest.raises(UserError, match="another process is training this run"),
        folder.locked(real, True),
    ):
        pass


def test_a_summary_that_is_not_of_the_rows_beside_it_ends_no_run(tmp_path: Path) -> None:
    rows = '{"kind": "eval"}\n'
    (tmp_path / folder.METRICS).write_text(rows)
    summary = summary_of(3.0) | {"metrics": sha256(rows.encode()).hexdigest()}
    write_json(tmp_path / folder.SUMMARY, signed(summary))
    folder.check_end(tmp_path)
    assert "its final/ is gone" in folder.end_gone(tmp_path)
    way_out = "delete summary.json, and the same command goes on from the newest checkpoint"
    (tmp_path / folder.METRICS).write_text(rows * 2)
    with pytest.raises(UserError, match=f"the end of other rows than metrics.jsonl holds; {way_out}"):
        folder.check_end(tmp_path)
    (tmp_path / folder.SUMMARY).write_text("")
    with pytest.raises(UserError, match=f"summary.json: cannot be read .*; {way_out}"):
        folder.check_end(tmp_path)


def test_a_run_that_is_refused_before_it_began_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text"), folder.locked(tmp_path / "runs" / "a", True):
        raise UserError("no text")
    assert not (tmp_path / "runs" / "a").exists()


# ---- speed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", None),
        ("Intel(R) Xeon(R) Processor", "bf16", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops(name, precision) == peak


def test_mfu_is_the_share_of_all_devices_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = Meter(state.Position(), 2, tokens_per_step=1000, spans=[Span(9, 6.0)], peak=1500.0)
    for loss in (4.0, 2.0):
        meter.count(loss, 0.5)
    now[0] += 4.0
    with meter.paused():
        now[0] += 50.0  # an evaluation, off the clock
    assert meter.close_interval() == {"loss": 3.0, "grad_norm": 0.5, "tokens_per_second": 500.0, "mfu": 1.0}
    assert meter.clocks() == {"step": 2, "tokens": 2000, "flops": 12000.0, "seconds": 4.0}
