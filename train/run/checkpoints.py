"""Checkpoints that a run writes and takes up: writing goes on beside the training, and only what is intact is
taken up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from outgrow.model.base.errors import UserError
from outgrow.train.run import state
from outgrow.train.settings import LoopSettings

LAST_WRITE_SECONDS = 600.0  # that a run which ends with an error gives its last checkpoint


class Saver:
    """Writes checkpoints under `folder`, one at a time, and drops the old ones.

    Args:
        newest: the step of the checkpoint that the run resumed from, if it did.
        averaged: the averaged weights, where there are any.
        run: the hash of the run's settings, which its checkpoints tell.
    """

    def __init__(
        self,
        folder: Path,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        settings: LoopSettings,
        newest: int | None,
        averaged: Mapping[str, Tensor] | None = None,
        run: str | None = None,
    ) -> None:
        self.folder = folder
        self.objective = objective
        self.optimizer = optimizer
        self.settings = settings
        self.main = accelerator.is_main_process
        self.newest = newest
        self.averaged = averaged
        self.run = run
        # A group of its own: the thread's messages must not get between those of the training, nor need a
        # GPU.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.thread: Thread | None = None
        self.fault: BaseException | None = None

    def save(self, position: state.Position, metrics: str) -> None:
        """Begin to write the checkpoint of `position`, and see it written where saving is not to be
        asynchronous.

        The newest checkpoint is not written again.

        Args:
            metrics: the run's rows so far, on the main process.

        Raises:
            UserError: this checkpoint, or the one before, could not be written.
        """
        self.wait()
        if position.step == self.newest:
            return
        self.newest = position.step
        contents = state.tensors(self.objective, self.optimizer, self.averaged)
        if self.settings.save_async:
            contents = {key: tensor.to("cpu", copy=True) for key, tensor in contents.items()}
        arguments = (asdict(position), contents, metrics)
        self.thread = Thread(target=self._write, args=arguments, daemon=True)
        self.thread.start()
        if not self.settings.save_async:
            self.wait()

    def wait(self) -> None:
        """Wait until what was begun is on the disk.

        Raises:
            UserError: it could not be written.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.fault is not None:
            fault = self.fault
            self.fault = None
            raise fault

    def _write(self, position: Mapping[str, Any], contents: Mapping[str, Tensor], metrics: str) -> None:
        try:
            path = state.folder_of(self.folder, position["step"])
            state.write(path, position, contents, self.group, main=self.main, metrics=metrics, run=self.run)
            if self.main:
                state.drop_old(
                    self.folder,
                    self.settings.keep,
                    position["best_step"] if self.settings.keep_best else None,
                )
        except BaseException as fault:
            self.fault = fault


@contextmanager
def saving(*arguments: Any) -> Iterator[Saver]:
    """A `Saver` of these arguments, whose last checkpoint is on the disk when the block ends, also when it
    ends with an error.
    """
    saver = Saver(*arguments)
    try:
        yield saver
        saver.wait()
    finally:
        if saver.thread is not None:
            saver.thread.join(LAST_WRITE_SECONDS)


def newest_intact(
    folder: Path, accelerator: Accelerator, say: Callable[[str], None], run: str | None = None
) -> Path | None:
    """The newest checkpoint under `folder` whose bytes are those that were written, by the run with settings
    of that hash.

    None where there is no checkpoint.

    Damaged ones that are newer, and another run's, are told and set aside. Every process has to ask, and all
    get the same answer.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    faults: dict[Path, str] = {}
    for path in reversed(state.complete(folder, tidy=accelerator.is_main_process)):
        fault = next(filter(None, gather_object([_fault(path, accelerator, run)])), None)
        if fault is None:
            _set_aside(faults, path, accelerator, say)
            return path
        faults[path] = fault
    if faults:
        lines = "".join(f"\n  - {fault}" for fault in faults.values())
        raise UserError(
            f"{folder}: no checkpoint is intact; delete this folder to train the run from its start "
            f"again:{lines}",
        )
    return None


def _fault(path: Path, accelerator: Accelerator, run: str | None) -> str | None:
    try:
        state.check(path, accelerator.process_index, accelerator.num_processes, run)
    except UserError as error:
        return str(error)
    return None


def _set_aside(
    faults: Mapping[Path, str],
    chosen: Path,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> None:
    """Let the main process move damaged checkpoints away, so that they no longer count among the newest, and
    tell of it.
    """
    for path, fault in faults.items() if accelerator.is_main_process else ():
        aside = state.set_aside(path)
        say(f"{fault}: {aside.name} is of no use, and the run goes on from {chosen.name}")
