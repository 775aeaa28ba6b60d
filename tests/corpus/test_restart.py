"""The same bytes whatever the number of workers, and after kill −9 at any moment, without doing again what was whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.data import DataSettings, prepare
from outgrow.train.data.shards import ShardWriter
from outgrow.train.data.workers import workers

WORDS = np.array(["the", "model", "grows", "a", "wider", "layer", "and", "deeper", "one", "while", "its", "logits", "stay", "same"])


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSettings:
    """Two hundred documents in files of ten, read in some twenty blocks, packed into shards of 3,000 tokens."""
    monkeypatch.setattr("outgrow.train.data.blocks.BLOCK_BYTES", 4000)
    texts, numbers = tmp_path / "texts", np.random.default_rng(0)
    texts.mkdir()
    for i in range(20):
        lines = [f'{{"text": "{" ".join(numbers.choice(WORDS, 60 + i))}"}}' for _ in range(10)]
        (texts / f"{i:02d}.jsonl").write_text("\n".join(lines))
    return DataSettings(
        "t", "files", folder=str(tmp_path / "tokens"), path=str(texts), vocab_size=300, validation_fraction=0.2, shard_tokens=3000
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_number_of_workers_changes_no_byte(settings: DataSettings, tmp_path: Path) -> None:
    found = []
    for count in (1, 3):
        changed = replace(settings, folder=str(tmp_path / f"tokens{count}"), workers=count)
        prepare(changed, progress=False)
        found.append(contents(changed.home))
    assert found[0] == found[1]
    assert len([name for name in found[0] if name.startswith("train-")]) > 3


class Killed(BaseException):
    """Nothing catches it to clean up: what is on disk stays as at a kill."""


def calls(settings: DataSettings, monkeypatch: pytest.MonkeyPatch, where: str, stop: int | None = None) -> int:
    """Prepare, and count how often `where` is called; before call number `stop`, the build is killed."""
    module, name = where.rsplit(".", 1)
    inner, count = getattr(sys.modules[module], name), 0

    def counting(*arguments: object) -> object:
        nonlocal count
        if count == stop:
            raise Killed
        count += 1
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(where, counting)
        if stop is None:
            prepare(settings, progress=False)
        else:
            with pytest.raises(Killed):
                prepare(settings, progress=False)
    return count


@pytest.mark.parametrize("stop", [1, 7, 15])
@pytest.mark.parametrize("where", ["train.data.build.stage", "train.data.pack.encode_block"])
def test_blocks_that_are_whole_are_not_done_again(settings: DataSettings, monkeypatch: pytest.MonkeyPatch, where: str, stop: int) -> None:
    whole = replace(settings, folder=settings.home.with_name("whole").as_posix())
    blocks = calls(whole, monkeypatch, where)
    assert calls(settings, monkeypatch, where, stop) == stop < blocks
    assert not settings.home.exists()
    assert calls(settings, monkeypatch, where) == blocks - stop
    assert contents(settings.home) == contents(whole.home)


def test_shards_that_were_finished_are_kept(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = settings.home.with_name("tokens.partial")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "entry", lambda self: (_ for _ in ()).throw(Killed))  # between the last shard and the manifest
        with pytest.raises(Killed):
            prepare(settings, progress=False)
    first = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in partial.glob("train-*.bin")}
    assert not list(partial.glob("work/ids/000000.*"))  # in finished shards: needed no more
    prepare(settings, progress=False)
    again = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in settings.home.glob("train-*.bin")}
    assert [name for name in first if first[name] != again[name]] == [max(first)]  # but the last one, which is not full


def test_other_text_does_not_go_on_in_an_old_build(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("outgrow.train.data.build._tokenizer", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(settings, progress=False)
    path = Path(settings.path or "") / "00.jsonl"
    path.write_text(path.read_text().replace("model", "modal"))
    fresh = replace(settings, folder=settings.home.with_name("fresh").as_posix())
    assert prepare(settings, progress=False).fingerprint == prepare(fresh, progress=False).fingerprint


PROCESS = """
import sys
import outgrow.train.data.blocks
from outgrow.train.data.settings import CleaningSettings, DataSettings
if __name__ == "__main__":
    train.data.blocks.BLOCK_BYTES = 4000
    from outgrow.train.data import prepare
    prepare(eval(sys.argv[1]), progress=False)
"""


def test_kill_9_at_any_moment_leaves_a_build_that_goes_on(settings: DataSettings, tmp_path: Path) -> None:
    whole = replace(settings, folder=str(tmp_path / "whole"), workers=1)
    prepare(whole, progress=False)
    script = tmp_path / "script.py"
    script.write_text(PROCESS)
    settings = replace(settings, workers=2)
    command = [sys.executable, str(script), repr(settings)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    partial = settings.home.with_name("tokens.partial")
    for wanted in ("work/text/000003.json", "work/lengths/000002.npz", "train-00001.bin"):
        process = subprocess.Popen(command, env=environment)
        until = time.monotonic() + 60
        while not (partial / wanted).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert contents(settings.home) == contents(whole.home)


def test_a_worker_that_is_killed_is_told(settings: DataSettings) -> None:
    with pytest.raises(UserError, match=r"a worker process was killed.*data\.workers=1"), workers(2) as run:
        list(run(os._exit, [(9,)]))


def test_jobs_are_drawn_as_they_are_needed() -> None:
    drawn = []

    def jobs():  # type: ignore[no-untyped-def]
        for i in range(100):
            drawn.append(i)
            yield (-i,)

    with workers(2) as run:
        results = run(abs, jobs())
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        assert len(drawn) < 10
        assert list(results) == list(range(3, 100))
