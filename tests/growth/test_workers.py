"""Several processes that write one checkpoint: the bytes of one process, whoever is killed, and nobody writes
twice."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from outgrow.growth import grow
from outgrow.growth.engine.workers import Worker
from outgrow.growth.folder import MARK
from outgrow.model.base.errors import UserError

BIGGER = {"hidden_size": 30, "intermediate_size": 50, "num_hidden_layers": 4}
HOW: dict[str, Any] = {"target": BIGGER, "noise": 0.3, "max_shard_bytes": 40_000}
FOLDERS = {"out", "one"}


@pytest.fixture
def one(phi_folder: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one process writes: file name → bytes."""
    return contents(grow(phi_folder, tmp_path / "one", **HOW).folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shares_written_one_after_the_other_are_the_bytes_of_one_process(
    phi_folder: Path, tmp_path: Path, one: dict[str, bytes], order: tuple[int, ...]
) -> None:
    assert len([name for name in one if name.endswith(".safetensors")]) >= 5
    for position, number in enumerate(order):
        assert not (tmp_path / "out").exists()
        grown = grow(phi_folder, tmp_path / "out", worker=f"{number}/3", **HOW)
        assert grown.complete == (position == 2)
        assert (grown.receipt is not None) == grown.complete
    assert contents(tmp_path / "out") == one
    assert {path.name for path in tmp_path.iterdir()} == FOLDERS


def start(source: Path, out: Path, worker: str, *more: str) -> subprocess.Popen[str]:
    target = "target={hidden_size:30,intermediate_size:50,num_hidden_layers:4}"
    arguments = [
        f"source={source}",
        target,
        f"out={out}",
        "growth.noise=0.3",
        "max_shard_gb=0.00004",
        f"worker={worker}",
        *more,
    ]
    command = [sys.executable, "-m", "outgrow.growth", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_workers_at_once_through_the_door(phi_folder: Path, tmp_path: Path, one: dict[str, bytes]) -> None:
    started = [start(phi_folder, tmp_path / "out", f"{number}/3") for number in range(3)]
    said = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert sum("wrote its shards" in out for out, _ in said) == 2
    assert sum("certificate: lossless" in out for out, _ in said) == 1
    assert contents(tmp_path / "out") == one
    assert {path.name for path in tmp_path.iterdir()} == FOLDERS


KILLED = """
import json, os, signal, sys
import outgrow.growth.engine.stream, outgrow.growth.engine.workers
from outgrow.growth import grow
count, limit = 0, int(sys.argv[3])
right = outgrow.growth.engine.stream.Expander.fill
def fill(self, *arguments):
    global count
    count += 1
    if count > limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(self, *arguments)
outgrow.growth.engine.stream.Expander.fill = fill
grow(sys.argv[1], sys.argv[2], worker="0/2", threads=1, **json.loads(sys.argv[4]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 10, 20])
def test_a_killed_worker_goes_on_where_it_was(
    phi_folder: Path, tmp_path: Path, one: dict[str, bytes], limit: int
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    grow(phi_folder, out, worker="1/2", **HOW)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, phi_folder, out, str(limit), json.dumps(HOW)], timeout=600, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert list(partial.glob("*.writing")), "it was killed inside a shard"
    assert grow(phi_folder, out, worker="0/2", **HOW).complete
    assert contents(out) == one
    assert finished == {name: (out / name).stat().st_mtime_ns for name in finished}, (
        "finished shards are not written again"
    )
    assert {path.name for path in tmp_path.iterdir()} == FOLDERS


@pytest.mark.slow
def test_a_worker_killed_while_it_completes_the_folder(
    phi_folder: Path, tmp_path: Path, one: dict[str, bytes], monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    grow(phi_folder, out, worker="0/2", **HOW)
    with monkeypatch.context() as patch:
        # as good as a kill: no handler removes anything
        patch.setattr(importlib.import_module("outgrow.growth.grow"), "verify_structure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            grow(phi_folder, out, worker="1/2", **HOW)
    assert not out.exists()
    assert grow(phi_folder, out, worker="0/2", **HOW).complete
    assert contents(out) == one


def test_a_wrong_result_is_not_kept(phi_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import outgrow.growth.engine.execute

    right = outgrow.growth.engine.execute.scaled
    monkeypatch.setattr(
        outgrow.growth.engine.execute, "scaled", lambda raw, factor, *more: right(raw, factor * 1.01, *more)
    )
    grow(phi_folder, tmp_path / "out", worker="0/2", **HOW)
    with pytest.raises(UserError, match="certified lossless, yet logits moved"):
        grow(phi_folder, tmp_path / "out", worker="1/2", **HOW)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("change", ["seed", "workers", "shards", "weights"])
def test_shards_of_another_growth_are_never_mixed_in(
    phi_folder: Path, tmp_path: Path, one: dict[str, bytes], change: str
) -> None:
    other = {"seed": {"seed": 1}, "shards": {"max_shard_bytes": 45_000}}.get(change, {})
    source = phi_folder
    if change == "weights":
        source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
        weights = load_file(source / "model.safetensors")
        weights["model.layers.1.mlp.fc1.weight"] *= 2
        save_file(weights, source / "model.safetensors")
    grow(source, tmp_path / "out", worker="0/3" if change == "workers" else "0/2", **(HOW | other))
    assert not grow(phi_folder, tmp_path / "out", worker="1/2", **HOW).complete, (
        "the other growth's shards were cleared away"
    )
    assert grow(phi_folder, tmp_path / "out", worker="0/2", **HOW).complete
    assert contents(tmp_path / "out") == one


def test_workers_keep_others_out(phi_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import outgrow.growth.engine.workers
    from outgrow.growth.folder import Place, complete_or_absent

    monkeypatch.setattr(outgrow.growth.engine.workers, "PATIENCE", 0.2)
    out = tmp_path / "out"
    agreed = {"plan": "x"}
    with outgrow.growth.engine.workers.shared_partial(Place(out), Worker(0, 2), agreed) as shared:
        again = outgrow.growth.engine.workers.shared_partial(Place(out), Worker(0, 2), agreed)
        with pytest.raises(UserError, match="worker=0/2: is at work already"), again:
            pass
        with pytest.raises(UserError, match="another growth is being written"):
            grow(phi_folder, out, worker="1/2", **HOW)
        with pytest.raises(UserError, match="another process is writing"):
            grow(phi_folder, out, target=BIGGER)
        assert (shared.folder / MARK).exists()
    with complete_or_absent(out), pytest.raises(UserError, match="another process is writing"):
        grow(phi_folder, out, worker="1/2", **HOW)


def test_of_workers_that_finish_at_once_the_last_to_try_completes_the_folder(tmp_path: Path) -> None:
    from outgrow.growth.engine.workers import shared_partial
    from outgrow.growth.folder import Place

    out, agreed, shards = tmp_path / "out", {"plan": "x"}, {"a.safetensors": [], "b.safetensors": []}
    with shared_partial(Place(out), Worker(0, 2), agreed) as first:
        (first.folder / "a.safetensors").touch()
        with shared_partial(Place(out), Worker(1, 2), agreed) as second:
            assert not first.is_complete(shards), "a shard is missing, and the second is at work"
            (second.folder / "b.safetensors").touch()
            assert second.is_complete(shards), "the first, which looked too early, holds the folder no more"


def test_a_worker_that_starts_while_another_marks_the_folder_joins_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    from outgrow.growth.folder import Place

    place = Place(tmp_path / "out")
    place.partial.mkdir()
    mark = place.partial / MARK
    looks: list[Path] = []
    exists = Path.exists

    def marked_after_the_first_look(path: Path) -> bool:
        if path == mark and not looks:
            looks.append(path)
            mark.touch()
            return False
        return exists(path)

    monkeypatch.setattr(Path, "exists", marked_after_the_first_look)
    with place.open() as lock:
        mark.touch()
        assert lock.take()


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("2/2", "expected i/n, worker i of n counted from 0"),
        ("1", "expected i/n"),
        ("a/b", "expected i/n"),
        ("0/99", "shards for 99 workers; give max_shard_gb="),
    ],
)
def test_workers_that_cannot_be(phi_folder: Path, tmp_path: Path, worker: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grow(phi_folder, tmp_path / "out", worker=worker, **HOW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("worker", ["9", "5/4", "1-2"])
def test_the_door_tells_a_wrong_worker_with_all_else_that_is_wrong(worker: str) -> None:
    from outgrow.growth.__main__ import settings_from

    with pytest.raises(
        UserError, match=rf"3 faults:(?s:.*)threads(?s:.*)worker={worker}: expected i/n(?s:.*)plan.txt"
    ) as told:
        settings_from(
            ["source=a", "target=phi_2", "plan_only=true", f"worker={worker}", "threads=0", "figure=plan.txt"]
        )
    assert "such as 0/4" in str(told.value)


@pytest.mark.slow
def test_a_folder_that_exists_is_kept_from_workers_too(
    phi_folder: Path, tmp_path: Path, one: dict[str, bytes]
) -> None:
    with pytest.raises(UserError, match="exists already"):
        grow(phi_folder, tmp_path / "one", worker="0/2", **HOW)
    before = os.stat(tmp_path / "one").st_ino
    for number in range(2):
        grow(phi_folder, tmp_path / "one", worker=f"{number}/2", overwrite=True, **HOW)
    assert os.stat(tmp_path / "one").st_ino != before
    assert contents(tmp_path / "one") == one
