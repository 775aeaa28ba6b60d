"""One optimizer step: batch i → forward and loss → backward, piece by piece → clip → update. The loop around it knows nothing of these."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from model.errors import UserError
from train.data import TokenSplit
from train.data.batches import batch
from train.optimizer import set_learning_rate
from train.schedule import factor
from train.settings import Budget, Settings
from train.teacher import scheduled
from train.transfer import EntryRates


class Step:
    """Calling it with i trains on batch i, a pure function of the seed and i.

    Args:
        model: a `NextTokenLoss`, prepared by Accelerate.
        optimizer: prepared by Accelerate, over the model's parameters.
        entries: where entries of one tensor learn at rates of their own.
    """

    def __init__(
        self, model: Any, optimizer: Any, accelerator: Accelerator, split: TokenSplit, settings: Settings, entries: EntryRates | None = None
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.split, self.settings = model, optimizer, accelerator, split, settings
        self.entries = entries
        self.budget = Budget.of(settings.train)
        self.share = share_of_batch(self.budget, accelerator)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def rate(self, i: int) -> float:
        """The learning rate of step `i`."""
        from_scratch = self.settings.growth.operator == "scratch"
        return self.settings.optimizer.learning_rate * factor(self.settings.schedule, self.progress(i), from_scratch=from_scratch)

    def progress(self, i: int) -> float:
        """The share of the budget that is spent in the middle of step `i`."""
        return (i + 0.5) / self.budget.steps

    def teaching(self, i: int) -> dict[str, float]:
        """The weight and temperature of the teacher in step `i`; nothing where none teaches."""
        teacher = self.settings.transfer.teacher
        weight, temperature = (0.0, 1.0) if teacher is None else scheduled(teacher, self.progress(i))
        return {"weight": weight, "temperature": temperature} if weight else {}

    def windows(self, i: int) -> Tensor:
        """This process's rows of batch `i`, (rows, context + 1), on its device."""
        loop = self.settings.train
        rows = batch(self.split, seed=self.settings.seed, step=i, batch_size=self.budget.rows, context=loop.context, **self.share)
        return torch.from_numpy(rows).to(self.accelerator.device, non_blocking=True)

    def __call__(self, i: int) -> tuple[Tensor, Tensor]:
        """Train on batch `i`.

        Returns:
            this process's mean loss and the gradient's norm before clipping, both on the device, so that a step waits for nothing.
        """
        set_learning_rate(self.optimizer, self.rate(i))
        torch.manual_seed(step_seed(self.settings.seed, i, self.accelerator.process_index))  # dropout, where a model has any
        loss = self.accumulate(self.windows(i), **self.teaching(i))
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.train.gradient_clip or float("inf"))
        with nullcontext() if self.entries is None else self.entries.applied(self.progress(i)):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def accumulate(self, windows: Tensor, **teaching: float) -> Tensor:
        """Add up the gradient of the mean loss over `windows`, a micro-batch at a time, and return the text's loss."""
        pieces = windows.split(self.settings.train.micro_batch or len(windows))
        loss = torch.zeros((), device=windows.device)
        for i, piece in enumerate(pieces):
            with self.accelerator.no_sync(self.model) if i < len(pieces) - 1 else nullcontext():
                found = self.model(piece, **teaching)
                objective, text = found if teaching else (found, found)
                share = len(piece) / len(windows)  # so that uneven pieces weigh what they hold
                self.accelerator.backward(objective * share)
            loss += text.detach() * share
        return loss


def share_of_batch(budget: Budget, accelerator: Accelerator) -> dict[str, int]:
    """The rows `start:stop` of each batch that this process computes.

    Raises:
        UserError: the processes do not divide the batch.
    """
    world = accelerator.num_processes
    if budget.rows % world:
        raise UserError(
            f"{world} processes do not divide the {budget.rows} windows of a batch (train.batch_tokens / train.context); "
            f"use a number of processes that does, or change train.batch_tokens"
        )
    share = budget.rows // world
    return {"start": accelerator.process_index * share, "stop": (accelerator.process_index + 1) * share}


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of the generator for one step on one process, so that a resumed run draws what an undisturbed one would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {process}".encode()).digest()[:8]) >> 1
