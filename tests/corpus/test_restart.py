"""The same bytes whatever the number of workers and the executor, and after kill −9 at any moment, without
doing again what was whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import executors, prepare
from outgrow.train.corpus.executors import nothing
from outgrow.train.corpus.settings import ExecutorSettings
from outgrow.train.corpus.workers import AHEAD, pool
from outgrow.train.data import DataSettings

WORDS = np.array(
    [
        "the",
        "model",
        "grows",
        "a",
        "wider",
        "layer",
        "and",
        "deeper",
        "one",
        "while",
        "its",
        "logits",
        "stay",
        "same",
    ]
)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSettings:
    """Two hundred documents in files of ten, read by twenty tasks, packed into shards of 3,000 tokens."""
    monkeypatch.setattr("outgrow.train.corpus.read.files.TASK_BYTES", 1000)
    texts, numbers = tmp_path / "texts", np.random.default_rng(0)
    texts.mkdir()
    for i in range(20):
        lines = [f'{{"text": "{" ".join(numbers.choice(WORDS, 60 + i))}"}}' for _ in range(10)]
        (texts / f"{i:02d}.jsonl").write_text("\n".join(lines))
    return DataSettings(
        "t",
        "files",
        folder=str(tmp_path / "tokens"),
        path=str(texts),
        vocab_size=300,
        validation_fraction=0.2,
        shard_tokens=3000,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit", [{}, {"limit_documents": 57}, {"limit_bytes": 20_000, "limit_tokens": 4000}]
)
def test_the_number_of_workers_changes_no_byte(
    settings: DataSettings, tmp_path: Path, limit: dict[str, int]
) -> None:
    found = []
    for count in (1, 2):
        changed = replace(settings, folder=str(tmp_path / f"tokens{count}"), workers=count, **limit)
        prepare(changed, progress=False)
        found.append(contents(changed.home))
    assert found[0] == found[1]
    read = json.loads(found[0]["manifest.json"])["read"]
    assert read["documents"] == limit.get("limit_documents", read["documents"])
    assert limit.get("limit_bytes", 0) <= read["bytes"] < limit.get("limit_bytes", 10**6) + 500


@pytest.mark.slow
def test_what_lies_behind_a_limit_may_be_broken_for_any_number_of_workers(
    settings: DataSettings, tmp_path: Path
) -> None:
    (Path(settings.path or "") / "07.jsonl").write_text("no JSON\n" * 10)
    for count in (1, 2):
        changed = replace(
            settings, folder=str(tmp_path / f"tokens{count}"), workers=count, limit_documents=70
        )
        prepare(changed, progress=False)
        with pytest.raises(UserError, match=r"07\.jsonl:1: expected a JSON object"):
            prepare(replace(changed, limit_documents=71), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_relative_folder_lies_where_the_process_is_now(
    settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    changed = replace(settings, folder="data/tokens", path="../texts", workers=count)
    fingerprints = set()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        fingerprints.add(prepare(changed, progress=False).fingerprint)
        assert (tmp_path / name / "data/tokens/manifest.json").is_file()
    assert len(fingerprints) == 1
    # the second leaves nothing where the first was built
    assert not (tmp_path / "first/data/tokens.partial").exists()


class Killed(BaseException):
    """Nothing catches it to clean up: what is on disk stays as at a kill."""


def tasks_done(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch, stage: str, stop: int | None = None
) -> int:
    """Prepare, and count the tasks that are done of a stage; before number `stop` of them, the build is
    killed."""
    inner, count = executors._run_task, 0

    def counting(executor: executors.LocalExecutor, rank: int) -> None:
        nonlocal count
        if executor.logging_dir.path.endswith(f"/{stage}"):
            if count == stop:
                raise Killed
            count += 1
        inner(executor, rank)

    with monkeypatch.context() as patch:
        patch.setattr("outgrow.train.corpus.executors._run_task", counting)
        if stop is None:
            prepare(settings, progress=False)
        else:
            with pytest.raises(Killed):
                prepare(settings, progress=False)
    return count


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "stop"), [("read", 1), ("read", 15), ("tokenise", 7), ("pack", 2)])
def test_tasks_that_are_done_are_not_done_again(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch, stage: str, stop: int
) -> None:
    whole = replace(settings, folder=settings.home.with_name("whole").as_posix())
    tasks = tasks_done(whole, monkeypatch, stage)
    assert tasks_done(settings, monkeypatch, stage, stop) == stop < tasks
    assert not settings.home.exists()
    assert tasks_done(settings, monkeypatch, stage) == tasks - stop
    assert contents(settings.home) == contents(whole.home)


@pytest.mark.slow
def test_after_a_change_what_other_files_were_read_to_is_kept(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks_done(settings, monkeypatch, "tokenise", 0)
    path, read = Path(settings.path or "") / "03.jsonl", list[str]()
    path.write_text(path.read_text().replace("model", "modal"))
    from outgrow.train.corpus.read import steps

    inner = steps.content_of
    with monkeypatch.context() as patch:
        patch.setattr(steps, "content_of", lambda file: read.append(file.name) or inner(file))
        first = prepare(settings, progress=False)
    assert read == ["03.jsonl"]
    fresh = replace(settings, folder=settings.home.with_name("fresh").as_posix())
    assert first.fingerprint == prepare(fresh, progress=False).fingerprint


@pytest.mark.slow
def test_a_tokenizer_that_changed_since_the_build_was_stopped_is_taken(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small, large = (
        prepare(
            replace(settings, folder=str(tmp_path / str(size)), vocab_size=size), progress=False
        ).tokenizer_folder
        for size in (290, 300)
    )
    own = shutil.copytree(small, tmp_path / "own")
    cut = replace(settings, tokenizer=str(own))
    tasks_done(cut, monkeypatch, "tokenise", 1)
    shutil.copytree(large, own, dirs_exist_ok=True)
    fresh = replace(cut, folder=str(tmp_path / "fresh"))
    assert tasks_done(cut, monkeypatch, "read") == tasks_done(fresh, monkeypatch, "read")
    assert contents(cut.home) == contents(fresh.home)


PROCESS = """
import sys
import outgrow.train.corpus.read.files
from outgrow.train.data.settings import CleaningSettings, DataSettings
if __name__ == "__main__":
    outgrow.train.corpus.read.files.TASK_BYTES = 1000
    from outgrow.train.corpus import prepare
    prepare(eval(sys.argv[1]), progress=False)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_build_that_goes_on(settings: DataSettings, tmp_path: Path) -> None:
    whole = replace(settings, folder=str(tmp_path / "whole"), workers=1)
    prepare(whole, progress=False)
    script = tmp_path / "script.py"
    script.write_text(PROCESS)
    settings = replace(settings, workers=2)
    command = [sys.executable, str(script), repr(settings)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    partial = settings.home.with_name("tokens.partial")
    for wanted in ("work/stages/read/completions/00003", "work/lengths/000002.npz", "train-00001.bin"):
        process = subprocess.Popen(command, env=environment)
        until = time.monotonic() + 600
        while not (partial / wanted).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert contents(settings.home) == contents(whole.home)


def test_a_worker_that_is_killed_is_told(settings: DataSettings) -> None:
    with pytest.raises(UserError, match=r"a worker process was killed.*data\.workers=1"), pool(2) as run:
        list(run(os._exit, [(9,)], nothing))


def test_jobs_are_drawn_as_they_are_needed() -> None:
    drawn = []

    def jobs():  # type: ignore[no-untyped-def]
        for i in range(100):
            drawn.append(i)
            yield (-i,)

    with pool(2) as run:
        results = run(abs, jobs(), lambda: drawn.append(-1))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        assert drawn == [
            *range(2 * AHEAD),
            -1,
            2 * AHEAD,
            2 * AHEAD + 1,
        ]  # the rest waits, `meanwhile` did not
        assert list(results) == list(range(3, 100))


def test_one_worker_is_this_process() -> None:
    done: list[object] = []
    with pool(1) as run:
        assert (
            list(run(lambda i: done.append(i) or os.getpid(), [(0,), (1,)], lambda: done.append("first")))
            == [os.getpid()] * 2
        )
    assert done == ["first", 0, 1]


# ---- a scheduler -------------------------------------------------------------------------------------------

SBATCH = """#!{python}
# A stand-in for sbatch: every task of the array at once, one after another, as Slurm would start it on a node.
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
last = int(re.search(r"--array=0-([0-9]+)", script).group(1))
dependent = any(argument.startswith("--dependency") for argument in sys.argv) or "--dependency" in script
for task in range(0 if dependent else last + 1):
    environment = os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here", "RUN_OFFSET": "0"}}
    kill = os.environ.get("KILL") == f"{{re.search('job-name=(.*)', script).group(1)}} {{task}}"
    if not kill:
        subprocess.run(["bash", sys.argv[-1]], env=environment, capture_output=True)
print("Submitted batch job 17")
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's commands, in front of the path."""
    folder = tmp_path / "bin"
    launch = f"#!{sys.executable}\nfrom datatrove.tools.launch_pickled_pipeline import main\nmain()\n"
    programs = {
        "sbatch": SBATCH.format(python=sys.executable),
        "scontrol": "#!/bin/sh\necho here\n",
        "squeue": "#!/bin/sh\nexit 1\n",
        "launch_pickled_pipeline": launch,
    }
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return folder


SLURM = ExecutorSettings("slurm", partition="any", poll_seconds=0.1)


@pytest.fixture
def few(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> DataSettings:
    """The same in three tasks: each is a process of its own."""
    monkeypatch.setattr("outgrow.train.corpus.read.files.TASK_BYTES", 30_000)
    return replace(settings, shard_tokens=40_000)


@pytest.mark.slow
def test_the_scheduler_makes_the_same_bytes_and_goes_on_after_a_killed_task(
    few: DataSettings, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (replace(few, folder=str(tmp_path / name)) for name in ("here", "there"))
    prepare(here, progress=False)
    monkeypatch.setenv("KILL", "tokenise 1")
    with pytest.raises(
        UserError,
        match=r"tokenise: Slurm job 17 has ended, and 1 of its 3 tasks are not done \(the first: 1\)",
    ):
        prepare(there, progress=False, executor=SLURM)
    monkeypatch.delenv("KILL")
    prepare(there, progress=False, executor=SLURM)
    assert contents(here.home) == contents(there.home)


@pytest.mark.slow
def test_what_is_wrong_with_the_input_is_told_by_the_one_who_waits(few: DataSettings, cluster: Path) -> None:
    (Path(few.path or "") / "05.jsonl.gz").write_bytes(b"none")
    with pytest.raises(UserError, match=r"05\.jsonl\.gz: corrupted gz"):
        prepare(few, progress=False, executor=SLURM)


def test_a_scheduler_out_of_reach_is_told(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"corpus\.executor=slurm: sbatch failed .*No such file"):
        prepare(settings, progress=False, executor=SLURM)
    with pytest.raises(UserError, match=r"corpus\.partition: missing"):
        prepare(settings, progress=False, executor=ExecutorSettings("slurm"))


def test_a_ray_cluster_out_of_reach_is_told(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise ConnectionError("no answer\nfrom 127.0.0.1:6379")

    ray = ModuleType("ray")
    ray.is_initialized = lambda: False  # type: ignore[attr-defined]
    ray.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    told = (
        r"corpus\.executor=ray: RAY_ADDRESS=127\.0\.0\.1:6379 cannot be reached .*no answer\); name a cluster"
    )
    with pytest.raises(UserError, match=told):
        prepare(settings, progress=False, executor=ExecutorSettings("ray"))
    assert not settings.home.exists()


def test_rays_executor_is_quiet_and_its_first_warning_is_told(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(executor: executors.RayExecutor) -> None:
        executors.logger.info("Will run pipeline on 20 incomplete ranks.")
        executors.logger.warning("Task 0 failed with retriable error WorkerCrashedError: out of memory")

    ray = ModuleType("ray")
    ray.is_initialized = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(executors.RayExecutor, "run", run)
    lines: list[str] = []
    executors.logger.add(lines.append)
    told = r"20 of 20 tasks are not done \(the first: 0; Task 0 .*: out of memory\); see"
    with pytest.raises(UserError, match=told):
        prepare(settings, progress=False, executor=ExecutorSettings("ray"))
    assert lines == []
