"""A run as a job that submitit started (hydra/launcher=slurm): its processes find each other.

It is queued again when its time is over.
"""

from __future__ import annotations

import os
import signal


def in_job() -> bool:
    """Check whether submitit started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ and "SUBMITIT_FOLDER" in os.environ


def join() -> None:
    """Name the job's other processes to torch.distributed, in the variables that torchrun sets.

    Each keeps to its own GPU.
    """
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def requeue() -> None:
    """Hand this job, which has saved, to submitit's own handler: it queues the job again, and Hydra's
    launcher runs the same point there.

    The handler ends process 0; the others return, and end with it.
    """
    from submitit import JobEnvironment

    signal.raise_signal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))
