"""Sweeps as jobs: Hydra's submitit launcher on submitit's own local executor, and the sbatch file that the
Slurm leaf makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.toy import assert_close_run, rows
from outgrow.model.base.compose import CONF
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.machine import slurm

submitit = pytest.importorskip("submitit", reason="submitit is an extra")
ROOT = Path(__file__).resolve().parents[2]
WAIT = 300  # seconds, at most, for what takes a few


def launched(overrides: list[str], folder: Path, *more: str) -> subprocess.Popen[str]:
    """A sweep in jobs of two tasks each, started in `folder`."""
    launcher = [
        "hydra/launcher=submitit_local",
        "hydra.launcher.tasks_per_node=2",
        "hydra.launcher.timeout_min=10",
        f"hydra.sweep.dir={folder}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [
        sys.executable,
        "-m",
        "train",
        "-m",
        *launcher,
        f"hydra.sweep.dir={folder}",
        *overrides,
        "name='s${seed}'",
        f"out='{folder}/${{name}}'",
        *more,
    ]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output(process: subprocess.Popen[str]) -> str:
    """What it said; it is ended where it does not end by itself."""
    try:
        return process.communicate(timeout=WAIT)[0]
    finally:
        process.kill()


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.rglob("*_log.*")))


@pytest.mark.slow
def test_two_points_of_two_tasks_give_the_losses_of_one_process(overrides: list[str], tmp_path: Path) -> None:
    process = launched(overrides, tmp_path, "seed=0,1")
    said = output(process)
    assert process.returncode == 0, said + logs(tmp_path)
    for seed in (0, 1):
        run = json.loads((tmp_path / f"s{seed}/run.json").read_text())
        assert run["processes"] == 2  # the tasks have found each other: their gradients were all-reduced
        alone = loop.train(compose([*overrides, f"seed={seed}", f"out={tmp_path}/alone{seed}"]))
        assert_close_run(tmp_path / f"s{seed}", alone)  # the same seeds and batches, whatever launcher


def tasks_of(folder: Path) -> list[int]:
    """The processes that submitit's controller started for the jobs of `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if (
            b"submitit.core._submit" in words
            and str(folder).encode() in words
            and b"SUBMITIT_LOCAL_GLOBALID=" in variables
        ):
            found.append(int(path.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the job's tasks in /proc")
def test_a_job_whose_time_is_over_saves_is_queued_again_and_resumes(
    overrides: list[str], tmp_path: Path
) -> None:
    steps = [
        "budget_tokens=38400",
        "log_every_tokens=1280",
        "eval_every_tokens=null",
        "save_every_tokens=null",
    ]
    long = [*overrides, *(f"train.{key}" for key in steps)]
    process, metrics = launched(long, tmp_path, "seed=0"), tmp_path / "s0/metrics.jsonl"
    try:
        end = time.monotonic() + WAIT
        while (
            not (metrics.exists() and '"step": 20,' in metrics.read_text())
            and time.monotonic() < end
            and process.poll() is None
        ):
            time.sleep(0.05)
        tasks = tasks_of(tmp_path)
        assert len(tasks) == 2, logs(tmp_path)
        for task in tasks:  # as the executor does shortly before the time is over
            os.kill(task, signal.SIGUSR2)
    finally:
        said = output(process)
    told = logs(tmp_path)
    assert process.returncode == 0, said + told
    assert "stopped by SIGUSR2 after step" in told
    assert "this job is timed-out" in told
    assert "Requeued job" in told
    assert [row["step"] for row in rows(tmp_path / "s0", "train")] == list(range(10, 301, 10))
    assert_close_run(tmp_path / "s0", loop.train(compose([*long, f"out={tmp_path}/alone"])))


@pytest.mark.slow
def test_the_slurm_leaf_asks_for_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin and submitit make the sbatch file themselves; only `srun`, which they look for, is a
    stand-in."""
    from hydra import compose as compose_whole
    from hydra import initialize_config_dir
    from hydra.core.plugins import Plugins

    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    overrides = [
        "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.nodes=2",
        "experiment=phi_1b",
        "growth=lossless",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose_whole("train", [*overrides, f"hydra.sweep.dir={tmp_path}"], return_hydra_config=True)
    cfg.hydra.job.name = "train"
    made: list[Any] = []

    def map_array(self: Any, *_: Any) -> list[Any]:
        made.append(self._executor)
        return []

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", map_array)
    launcher: Any = Plugins.instance()._instantiate(cfg.hydra.launcher)
    launcher.setup(hydra_context=None, task_function=None, config=cfg)
    launcher.launch([["seed=0"]], 0)
    assert made[0].max_num_timeout == 100
    text = made[0]._make_submission_file_text("python", "uid")
    wanted = [
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=1440",
        "--partition=gpu",
        "--signal=USR2@300",
        "--open-mode=append",
    ]
    assert [line for line in wanted if f"#SBATCH {line}\n" not in text] == []
    assert compose(overrides[:1] + overrides[3:]).study == "phi_1b"  # and our own door takes the leaf


def test_without_submitit_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import outgrow.train.__main__ as door

    monkeypatch.setattr(door, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install -e '.\[slurm\]'"):
        door._check_sweep(["hydra/launcher=slurm", "seed=0"])


def test_without_srun_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import outgrow.train.__main__ as door

    monkeypatch.setattr(door.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"hydra/launcher=slurm: no srun on this machine"):
        door._check_sweep(["hydra/launcher=slurm", "seed=0"])


def test_a_process_that_submitit_did_not_start_is_in_no_job() -> None:
    assert not slurm.in_job()
