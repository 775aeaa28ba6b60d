"""Settings of how a corpus is made. Plain values: nothing here imports a library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ExecutorSettings:
    """conf/prepare.yaml, `corpus`. Nothing of the result depends on it; all but `executor` is for a
    cluster."""

    executor: Literal["local", "slurm", "ray"] = "local"
    partition: str | None = None  # slurm: needed
    time: str = "24:00:00"  # slurm: of one task, at most
    memory_gb: int = 4  # a core
    cpus: int = 1  # a task
    at_once: int | None = None  # tasks that run at a time; null: all
    # slurm: a shell line that makes this environment ready on a node, such as `source …/bin/activate`
    setup: str | None = None
    sbatch: dict[str, str] = field(default_factory=dict)  # slurm: more options of sbatch
    poll_seconds: float = 10.0  # between two looks at what is done


def executor_faults(settings: ExecutorSettings) -> list[str]:
    """List what is wrong between well-typed values, one line each."""
    faults = []
    if settings.executor == "slurm" and not settings.partition:
        faults.append("corpus.partition: missing; name the cluster's partition: corpus.partition=NAME")
    for key in ("memory_gb", "cpus", "at_once", "poll_seconds"):
        value = getattr(settings, key)
        if value is not None and value <= 0:
            faults.append(f"corpus.{key}: must be positive; found {value}")
    return faults
