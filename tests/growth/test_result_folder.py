"""Nothing is deleted that growth did not make: not the source, not what lies beside a result, not a folder of
the same name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from outgrow.growth import grow
from outgrow.growth.folder import (
    MARK,
    RECIPE,
    STRETCH,
    STRETCHES,
    Place,
    complete_or_absent,
    files_in,
    strangers,
)
from outgrow.model.base.errors import UserError
from outgrow.model.base.locks import Lock

TARGET = {"intermediate_size": 80}
Contents = dict[str, bytes | str]


def contents(folder: Path) -> Contents:
    """Everything under a folder: files by their bytes, links by where they point."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
    }


@pytest.fixture
def source(phi_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phi_folder, tmp_path / "models" / "source"))


def grown_there(source: Path, out: Path) -> None:
    grow(source, out, target=TARGET)


def its_own_folder(source: Path, tmp_path: Path) -> Path:
    return source


def a_link_to_it(source: Path, tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(source)
    return tmp_path / "link"


def a_folder_around_it(source: Path, tmp_path: Path) -> Path:
    (source.parent / "config.json").write_text("{}")
    return source.parent


def a_grown_folder_around_it(source: Path, tmp_path: Path) -> Path:
    grown_there(source, tmp_path / "around")
    source.rename(tmp_path / "around" / "source")
    source.parent.rmdir()
    (tmp_path / "models").mkdir()
    source.symlink_to(tmp_path / "around" / "source")
    return tmp_path / "around"


def the_folder_of_its_shards(source: Path, tmp_path: Path) -> Path:
    grown_there(source, tmp_path / "blobs")
    shutil.rmtree(source)
    source.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (source / path.name).symlink_to(path)
    return tmp_path / "blobs"


def a_name_whose_partial_it_is(source: Path, tmp_path: Path) -> Path:
    shutil.rmtree(source)
    source.symlink_to(tmp_path / "out.partial")
    shutil.copytree(tmp_path / "kept", tmp_path / "out.partial")
    (tmp_path / "out.partial" / MARK).write_text("{}")
    return tmp_path / "out"


@pytest.mark.parametrize("worker", [None, "0/1"])
@pytest.mark.parametrize(
    "place",
    [
        its_own_folder,
        a_link_to_it,
        a_folder_around_it,
        a_grown_folder_around_it,
        the_folder_of_its_shards,
        a_name_whose_partial_it_is,
    ],
)
def test_what_is_read_is_never_replaced(
    source: Path, tmp_path: Path, place: Callable[[Path, Path], Path], worker: str | None
) -> None:
    shutil.copytree(source, tmp_path / "kept")
    out = place(source, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="which is read for this growth; choose another folder"):
        grow(source, out, target=TARGET, overwrite=True, worker=worker)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["notes.txt", "runs/phi/metrics.jsonl", "optimizer.bin", "optimizer/optimizer.bin", ".git/HEAD"]
)
def test_a_result_with_something_else_in_it_is_not_replaced(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    grown_there(source, out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=rf"holds {name.split('/')[0]}.*, which growth did not make, so it is not replaced"
    ):
        grow(source, out, target=TARGET, overwrite=True)
    assert contents(tmp_path) == before
    shutil.rmtree(out / name.split("/")[0]) if "/" in name else (out / name).unlink()
    grow(source, out, target=TARGET, overwrite=True, seed=1)


def edited(out: Path) -> str:
    (out / "README.md").write_text("years of work")
    return "README.md"


def trained_on(out: Path) -> str:
    weights = load_file(out / "model.safetensors")
    weights["model.layers.1.mlp.fc1.weight"] *= 1.01  # of the same size
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return "model.safetensors"


def another_tokenizer(out: Path) -> str:
    (out / "generation_config.json").write_text('{"do_sample": true}')
    return "generation_config.json"


@pytest.mark.parametrize("worker", [None, "0/1"])
@pytest.mark.parametrize("change", [edited, trained_on, another_tokenizer])
def test_a_result_that_was_changed_since_is_not_replaced(
    source: Path, tmp_path: Path, change: Callable[[Path], str], worker: str | None
) -> None:
    out = tmp_path / "out"
    grown_there(source, out)
    grow(source, out, target=TARGET, overwrite=True, worker=worker)
    name = change(out)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"holds {name} \(changed since\), which growth did not make"):
        grow(source, out, target=TARGET, overwrite=True, worker=worker)
    assert contents(tmp_path) == before


def test_a_fingerprint_sees_a_change_anywhere_in_a_small_file_and_a_retrained_large_one(
    tmp_path: Path,
) -> None:
    file = tmp_path / "file"
    for size in (0, 1, STRETCH, 5 * STRETCH, STRETCHES * STRETCH):
        content = bytearray(size)
        file.write_bytes(content)
        before = files_in(tmp_path)["file"]
        assert before == files_in(tmp_path)["file"]
        for place in {0, size // 3, size - 1} & set(range(size)):
            file.write_bytes(content[:place] + b"x" + content[place + 1 :])
            assert files_in(tmp_path)["file"] != before
        file.write_bytes(bytes(size + 1))
        assert files_in(tmp_path)["file"] != before
    file.write_bytes(bytes(3 * STRETCHES * STRETCH))
    before = files_in(tmp_path)["file"]
    file.write_bytes(b"x" * (3 * STRETCHES * STRETCH))
    assert files_in(tmp_path)["file"] != before


def test_a_result_of_an_older_growth_is_replaced_by_its_names(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    grown_there(source, out)
    record = json.loads((out / RECIPE).read_text())
    (out / RECIPE).write_text(json.dumps(record | {"files": sorted(record["files"])}))
    grow(source, out, target=TARGET, overwrite=True, seed=1)
    assert json.loads((out / RECIPE).read_text())["files"].keys() == record["files"].keys()
    assert not strangers(out)


def test_a_checkpoint_that_growth_did_not_make_is_not_replaced(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "mine")
    before = contents(tmp_path)
    with pytest.raises(
        UserError,
        match=r"holds config\.json, generation_config\.json, model\.safetensors, which growth did not make",
    ):
        grow(source, tmp_path / "mine", target=TARGET, overwrite=True)
    assert contents(tmp_path) == before


def test_an_empty_folder_is_replaced_when_asked(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    grow(source, tmp_path / "out", target=TARGET, overwrite=True)
    assert not strangers(tmp_path / "out")


def own_folder(partial: Path, tmp_path: Path) -> None:
    partial.mkdir()
    (partial / "chapter.tex").write_text("years of work")


def own_checkpoint(partial: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "grown", partial)


def own_file(partial: Path, tmp_path: Path) -> None:
    partial.write_text("years of work")


def link_to_a_folder(partial: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / MARK).write_text("{}")  # even to one that growth is filling
    partial.symlink_to(tmp_path / "thesis")


def dangling_link(partial: Path, tmp_path: Path) -> None:
    partial.symlink_to(tmp_path / "nowhere")


@pytest.mark.parametrize("worker", [None, "0/1"])
@pytest.mark.parametrize("make", [own_folder, own_checkpoint, own_file, link_to_a_folder, dangling_link])
def test_a_users_own_partial_is_left_alone(
    source: Path, tmp_path: Path, make: Callable[[Path, Path], None], worker: str | None
) -> None:
    grown_there(source, tmp_path / "grown")
    make(tmp_path / "out.partial", tmp_path)
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=r"out\.partial is in the way and was not made by growth, so it is left alone"
    ):
        grow(source, tmp_path / "out", target=TARGET, worker=worker)
    assert contents(tmp_path) == before


def test_a_users_own_former_is_left_alone(source: Path, tmp_path: Path) -> None:
    grown_there(source, tmp_path / "out")
    own_folder(tmp_path / "out.former.partial", tmp_path)
    before = contents(tmp_path)
    with pytest.raises(
        UserError,
        match=r"out\.former\.partial is in the way and holds chapter\.tex, which growth did not make",
    ):
        grow(source, tmp_path / "out", target=TARGET, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_between_look_and_lock_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out, right = tmp_path / "out", Lock.take

    def take(lock: Lock, **how: bool) -> bool:
        out.mkdir(exist_ok=True)
        (out / "chapter.tex").write_text("years of work")
        return right(lock, **how)

    monkeypatch.setattr(Lock, "take", take)
    with pytest.raises(UserError, match="exists"):
        grow(source, out, target=TARGET, overwrite=overwrite)
    assert contents(out) == {"chapter.tex": b"years of work"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["out/chapter.tex", "out"])
def test_what_appears_while_it_is_written_is_kept(
    source: Path, tmp_path: Path, name: str, overwrite: bool
) -> None:
    def write() -> None:
        with complete_or_absent(tmp_path / "out", overwrite=overwrite) as partial:
            (partial / "config.json").write_text("{}")
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("years of work")

    with pytest.raises(UserError, match="exists"):
        write()
    assert (tmp_path / name).read_text() == "years of work"
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_that_another_process_completed_meanwhile_is_not_cleared(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is on the folder, which the other process has renamed to `out` by the time it is ours."""
    right = Lock.take

    def take(lock: Lock, **how: bool) -> bool:
        place = Place(tmp_path / "out", overwrite=True)
        place.clear()
        (place.partial / "config.json").write_text("{}")
        (place.partial / RECIPE).write_text('{"files": ["config.json", "growth.json"]}')
        place.publish()
        return right(lock, **how)

    monkeypatch.setattr(Lock, "take", take)
    with pytest.raises(UserError, match="was completed by another process meanwhile"):
        grow(source, tmp_path / "out", target=TARGET, overwrite=True)
    assert contents(tmp_path / "out").keys() == {"config.json", RECIPE}


KILLED = """
import os, signal, sys
import outgrow.growth.folder
from outgrow.growth import grow
call, number, exchanges = sys.argv[3], int(sys.argv[4]), sys.argv[5] == "True"
if not exchanges:
    outgrow.growth.folder.exchange = lambda *_: False
count = 0
def killing(right):
    def call(*arguments, **more):
        global count
        count += 1
        if count > number:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*arguments, **more)
    return call
publish = outgrow.growth.folder.Place.publish
def publishing(self):
    setattr(os, call, killing(getattr(os, call)))
    publish(self)
outgrow.growth.folder.Place.publish = publishing
grow(sys.argv[1], sys.argv[2], target={"intermediate_size": 80}, overwrite=True, receipt=False, seed=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize(
    ("call", "number"), [("rename", 0), ("rename", 1), ("unlink", 0), ("unlink", 2), ("rmdir", 0)]
)
def test_what_a_kill_leaves_while_a_folder_is_replaced_is_cleaned_by_the_next_growth(
    source: Path, tmp_path: Path, call: str, number: int, exchanges: bool
) -> None:
    out = tmp_path / "out"
    grown_there(source, out)
    command = [sys.executable, "-c", KILLED, source, out, call, str(number), str(exchanges)]
    killed = subprocess.run(command, timeout=600, check=False, capture_output=True, text=True)
    if exchanges and (call, number) == ("rename", 1):
        assert killed.returncode == 0, killed.stderr  # one step less
    else:
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert {path.name for path in tmp_path.iterdir()} > {"models"}
    grow(source, out, target=TARGET, overwrite=True, receipt=False)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}
    assert not strangers(out)
    assert MARK not in contents(out)


def test_what_a_kill_left_of_the_replaced_folder_goes_although_the_next_growth_is_refused(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    grown_there(source, out)
    shutil.copytree(out, tmp_path / "out.former.partial")
    with pytest.raises(UserError, match="exists already"):
        grow(source, out, target=TARGET)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}


@pytest.mark.parametrize("length", [241, 247, 248, 255, 300])
def test_a_name_that_is_too_long_is_told_before_anything_is_made(
    source: Path, tmp_path: Path, length: int
) -> None:
    with pytest.raises(UserError, match="File name too long"):
        grow(source, tmp_path / ("o" * length), target=TARGET)
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


@pytest.mark.parametrize("out", ["", ".", "/", "..", "new/..", "models/.."])
def test_no_name_at_all(source: Path, out: str) -> None:
    with pytest.raises(UserError, match="names no folder"):
        grow(source, out, target=TARGET, overwrite=True)


def test_a_result_reached_through_a_link_is_replaced_where_the_link_is(source: Path, tmp_path: Path) -> None:
    grown_there(source, tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    grow(source, tmp_path / "out", target=TARGET, overwrite=True, seed=1)
    assert not (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "elsewhere") == before


def test_the_record_names_every_file(source: Path, tmp_path: Path) -> None:
    from outgrow.model.config import read_json

    how: dict[str, Any] = {"target": TARGET, "max_shard_bytes": 40_000}
    alone = grow(source, tmp_path / "out", **how).folder
    together = grow(source, tmp_path / "workers", worker="0/1", **how).folder
    for folder in (alone, together):
        assert set(read_json(folder / RECIPE)["files"]) == set(contents(folder))
