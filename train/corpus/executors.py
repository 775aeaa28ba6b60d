"""Executors of a step's tasks: this machine (workers.py), Slurm or Ray (datatrove's executors). The bytes are
the same for each."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger, setup_default_logger

from outgrow.model.base.errors import UserError, first_line
from outgrow.model.keys import without
from outgrow.train.corpus.progress import bar
from outgrow.train.corpus.settings import ExecutorSettings
from outgrow.train.corpus.workers import Meanwhile, Run, pool


def nothing() -> None:
    """Do nothing meanwhile."""


class Stage(Protocol):
    """Does a pipeline, once for each of its tasks; those that were done before are not done again. While
    others are at work, this process does `meanwhile`.
    """

    def __call__(
        self,
        name: str,
        pipeline: list[PipelineStep],
        tasks: int,
        *,
        title: str = "",
        meanwhile: Meanwhile = nothing,
    ) -> None: ...


@contextmanager
def stages(settings: ExecutorSettings, workers: int, folder: Path, *, progress: bool) -> Iterator[Stage]:
    """Yield what runs pipelines, each with its statistics and its record of tasks done in a folder of its
    name under `folder`.

    Raises:
        UserError: a worker was killed, a task failed, or the scheduler cannot be reached.
    """
    # fsspec keeps what it opened under a relative name, wherever this process goes
    folder = folder.absolute()
    if settings.executor == "local":
        with pool(workers) as run:

            def local(
                name: str,
                pipeline: list[PipelineStep],
                tasks: int,
                *,
                title: str = "",
                meanwhile: Meanwhile = nothing,
            ) -> None:
                with bar(title, tasks, progress and bool(title)) as advance:
                    LocalExecutor(pipeline, tasks, folder / name, run, advance, meanwhile).run()

            yield local
        return
    make = _slurm if settings.executor == "slurm" else _ray

    def elsewhere(
        name: str,
        pipeline: list[PipelineStep],
        tasks: int,
        *,
        title: str = "",
        meanwhile: Meanwhile = nothing,
    ) -> None:
        meanwhile()
        make(settings, workers, name, pipeline, tasks, folder / name)

    yield elsewhere


# ---- this machine ------------------------------------------------------------------------------------------


class LocalExecutor(PipelineExecutor):
    """datatrove's executor over concurrent.futures, or in this process."""

    def __init__(
        self,
        pipeline: list[PipelineStep],
        tasks: int,
        folder: Path,
        run: Run,
        advance: Callable[[int], None],
        meanwhile: Meanwhile,
    ) -> None:
        super().__init__(pipeline, str(folder))
        self.tasks = tasks
        self._run = run
        self._advance = advance
        self._meanwhile = meanwhile

    def __getstate__(self) -> dict[str, Any]:
        return without(vars(self), ("_run", "_advance", "_meanwhile"))

    @property
    def world_size(self) -> int:
        return self.tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        unknown = {f"datatrove_{key}": "-1" for key in ("cpus_per_task", "mem_per_cpu", "gpus_on_node")}
        return DistributedEnvVars(datatrove_node_ips="localhost", datatrove_executor="LOCAL", **unknown)

    def run(self) -> None:
        missing = self.get_incomplete_ranks()
        self._advance(self.tasks - len(missing))
        jobs = ((self, rank) for rank in missing)
        for _ in self._run(_run_task, jobs, self._meanwhile):
            self._advance(1)


def _run_task(executor: LocalExecutor, rank: int) -> None:
    logger.disable("datatrove")  # its lines would go through the progress bars; the files of statistics stay
    fresh = deepcopy(executor) if hasattr(executor, "_run") else executor
    fresh._run_for_rank(rank)


# ---- a cluster ---------------------------------------------------------------------------------------------


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Keep datatrove's log off the terminal meanwhile, and yield the warnings in it as they come."""
    warnings: list[str] = []
    logger.remove()
    logger.add(lambda line: warnings.append(line.record["message"]), level="WARNING")
    try:
        yield warnings
    finally:
        setup_default_logger()


class TellsFaults(PipelineExecutor):
    """A cluster's executor whose tasks leave what is wrong with their input where the one who waits for them
    finds it."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        except UserError as fault:
            with self.logging_dir.open(f"faults/{rank:05d}", "w") as file:
                file.write(str(fault))
            raise

    def forget_faults(self) -> None:
        """Remove what the tasks of an earlier attempt left."""
        if self.logging_dir.isdir("faults"):
            self.logging_dir.rm("faults", recursive=True)

    def fault(self) -> str | None:
        """The fault in the input of the first task that failed for it."""
        for path in self.logging_dir.list_files("faults") if self.logging_dir.isdir("faults") else []:
            with self.logging_dir.open(path, "r") as file:
                return str(file.read())
        return None


class SlurmExecutor(TellsFaults, SlurmPipelineExecutor):
    """datatrove's for Slurm."""


class RayExecutor(TellsFaults, RayPipelineExecutor):
    """datatrove's for Ray."""


def _slurm(
    settings: ExecutorSettings,
    workers: int,
    name: str,
    pipeline: list[PipelineStep],
    tasks: int,
    folder: Path,
) -> None:
    """Submit a job array, and wait until its tasks are done.

    Raises:
        UserError: the scheduler cannot be reached, a task failed, or the job ended with tasks undone.
    """
    executor = SlurmExecutor(
        pipeline,
        tasks,
        time=settings.time,
        partition=settings.partition or "",
        mem_per_cpu_gb=settings.memory_gb,
        cpus_per_task=settings.cpus,
        workers=settings.at_once or -1,
        job_name=name,
        env_command=settings.setup,
        sbatch_args=dict(settings.sbatch),
        logging_dir=str(folder),
        with_srun=False,
        requeue=False,
    )
    submitted = folder / "job"
    if not executor.get_incomplete_ranks():
        return
    if not (
        submitted.is_file() and _is_queued(submitted.read_text())
    ):  # else it was submitted before the one who waited was stopped
        executor.forget_faults()
        try:
            with overheard():
                executor.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"corpus.executor=slurm: sbatch failed ({error}); start this where jobs can be submitted, "
                "or with corpus.executor=local"
            ) from error
        submitted.write_text(str(executor.job_id))
    job = submitted.read_text()
    while executor.get_incomplete_ranks():
        queued = _is_queued(job)
        if (fault := executor.fault()) is not None:
            raise UserError(fault)
        if not queued and (left := executor.get_incomplete_ranks()):
            raise UserError(
                f"{name}: Slurm job {job} has ended, and {len(left)} of its {tasks} tasks are not done "
                f"(the first: {left[0]}); see {folder / 'slurm_logs'}. The same command goes on with them"
            )
        time.sleep(settings.poll_seconds if queued else 0)


def _is_queued(job: str) -> bool:
    """Check whether Slurm still knows the job as waiting or running."""
    try:
        listing = subprocess.run(
            ["squeue", "--noheader", "--job", job], capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    return listing.returncode == 0 and bool(listing.stdout.strip())


def _ray(
    settings: ExecutorSettings,
    workers: int,
    name: str,
    pipeline: list[PipelineStep],
    tasks: int,
    folder: Path,
) -> None:
    """Run the tasks on the Ray cluster that RAY_ADDRESS names, or on a local one.

    Raises:
        UserError: Ray is not installed or cannot be reached, or a task failed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("corpus.executor=ray needs ray: pip install -e '.[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False)
        except Exception as error:  # Ray raises bare ones, and those of its client
            address = os.environ.get("RAY_ADDRESS")
            where = f"RAY_ADDRESS={address}" if address else "a local cluster"
            raise UserError(
                f"corpus.executor=ray: {where} cannot be reached or started ({first_line(error)}); name a "
                "cluster that runs, or give corpus.executor=local"
            ) from error
    with overheard():  # that the folder has to be shared, which docs/data.md says
        executor = RayExecutor(
            pipeline,
            tasks,
            workers=settings.at_once or -1,
            cpus_per_task=settings.cpus,
            mem_per_cpu_gb=settings.memory_gb,
            logging_dir=str(folder),
        )
    executor.forget_faults()
    with overheard() as warnings:
        executor.run()
    if (fault := executor.fault()) is not None:
        raise UserError(fault)
    if left := executor.get_incomplete_ranks():
        cause = f"; {warnings[0]}" if warnings else ""
        raise UserError(
            f"{name}: {len(left)} of {tasks} tasks are not done (the first: {left[0]}{cause}); see "
            f"{folder / 'logs'}. The same command goes on with them"
        )
