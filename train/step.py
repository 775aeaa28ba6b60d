"""One optimizer step: batch i → forward and loss → backward, piece by piece → clip → update.

The loop around it knows nothing of these.

Shapes: a batch is (rows, context + 1) token ids over all processes. Each process takes a range of its rows,
a piece of them (a micro-batch) at a time; a loss is a sum over a piece's (rows context) predicted tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from outgrow.model.base.errors import UserError
from outgrow.train.data import TokenSplit
from outgrow.train.data.batches import batch
from outgrow.train.machine.distribute import accumulating, local, total_norm
from outgrow.train.optimizer import set_learning_rate
from outgrow.train.router import Losses
from outgrow.train.schedule import factor
from outgrow.train.settings import Settings
from outgrow.train.start.teacher import scheduled
from outgrow.train.start.transfer import EntryRates


class Step:
    """Calling it with i trains on batch i, a pure function of the seed and i.

    Args:
        model: a `NextTokenLoss`, prepared by Accelerate.
        optimizer: prepared by Accelerate, over the model's parameters.
        entries: where entries of one tensor learn at rates of their own.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        accelerator: Accelerator,
        split: TokenSplit,
        settings: Settings,
        entries: EntryRates | None = None,
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.split, self.settings, self.entries = split, settings, entries
        self.budget = settings.budget
        self.share = Share.of(
            self.budget.rows,
            settings.train.micro_batch,
            accelerator.process_index,
            accelerator.num_processes,
        )
        weights = self.weights()
        self.parameters = {name: parameter for name, parameter in weights.items() if parameter.requires_grad}

    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters, frozen ones too, by the network's own names."""
        return {name.split("network.")[-1]: parameter for name, parameter in self.model.named_parameters()}

    def rate(self, i: int) -> float:
        """The learning rate of step `i`."""
        from_scratch = self.settings.growth.operator == "scratch"
        tokens = (i + 0.5) * self.budget.tokens_per_step
        share = factor(self.settings.schedule, self.progress(i), from_scratch=from_scratch, tokens=tokens)
        return self.settings.optimizer.learning_rate * share

    def progress(self, i: int) -> float:
        """The share of the budget that is spent in the middle of step `i`."""
        return self.budget.progress(i)

    def teaching(self, i: int) -> dict[str, float]:
        """The weight and temperature of the teacher in step `i`; nothing where none teaches."""
        teacher = self.settings.transfer.teacher
        weight, temperature = (0.0, 1.0) if teacher is None else scheduled(teacher, self.progress(i))
        return {"weight": weight, "temperature": temperature} if weight else {}

    def windows(self, i: int, rows: range) -> Tensor:
        """These rows of batch `i`, (rows, context + 1), on this process's device."""
        windows = batch(
            self.split,
            seed=self.settings.seed,
            step=i,
            batch_size=self.budget.rows,
            context=self.settings.train.context,
            start=rows.start,
            stop=rows.stop,
        )
        return torch.from_numpy(windows).to(self.accelerator.device)

    def __call__(self, i: int) -> tuple[float, ...]:
        """Train on batch `i`.

        Returns:
            the mean loss over the batch, the gradient's norm before clipping, and where there is one, the
            routers' load-balancing term without its coefficient, all of all processes.

        Raises:
            NotFinite: one of them is not finite. Weights and optimizer state are as they were before.
        """
        set_learning_rate(self.optimizer, self.rate(i))
        text, router = self.accumulate(i)
        parts = [text] if router is None else [text, router]
        losses = self.accelerator.reduce(torch.stack(parts), reduction="sum")
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        total = total_norm(gradients)
        # The one place where a step waits for the device: what is not finite must not be used.
        norm, loss, *balance = torch.stack((total, *losses)).tolist()
        if not all(map(math.isfinite, (norm, loss, *balance))):
            fault = self.fault(i + 1, loss, norm)
            self.optimizer.zero_grad()
            raise fault
        if self.settings.train.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                list(self.parameters.values()),
                self.settings.train.gradient_clip,
                total,
            )
        with nullcontext() if self.entries is None else self.entries.applied(self.progress(i)):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm, *balance

    def accumulate(self, i: int) -> tuple[Tensor, Tensor | None]:
        """Add up the gradient of the mean loss over batch `i`, a micro-batch at a time (gradient
        accumulation).

        The loss is averaged over tokens, not over micro-batches, on any number of processes.

        Returns:
            this process's part of the mean loss on the text, and of the routers' load-balancing term where
            there is one.
        """
        teaching = self.teaching(i)
        mean, router = torch.zeros((), device=self.accelerator.device), None
        windows, begin = self.windows(i, self.share.rows), self.share.rows.start
        for piece in self.share.pieces:
            last = piece is self.share.pieces[-1]
            torch.manual_seed(step_seed(self.settings.seed, i, piece.start))  # dropout, where a model has any
            rows = windows[piece.start - begin : piece.stop - begin]
            # take part with a row that counts nothing: sharded processes run the layers together
            if not len(piece):
                rows = self.windows(i, range(1))
            with nullcontext() if last else accumulating(self.model, self.accelerator):
                output = self.model(rows, reduction="sum", **teaching)
                losses = Losses(*output) if isinstance(output, tuple) else Losses(output, output)
                share = bool(len(piece)) / self.budget.tokens_per_step
                # Gradients are averaged over the processes.
                self.accelerator.backward(losses.objective * share * self.accelerator.num_processes)
            mean += losses.text.detach() * share
            if losses.router is not None:
                router = losses.router.detach() * share + (0.0 if router is None else router)
        return mean, router

    def fault(self, step: int, loss: float, norm: float) -> NotFinite:
        """Name the tensor that is not finite: a weight, else the gradient nearest to the loss, where backward
        met it first.
        """
        story = f"step {step}: the loss is {loss} and the gradient norm {norm}; not finite: "
        if names := self.broken_weights():
            return NotFinite(f"{story}weight {names[0]}", weights=True)
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        names = self.not_finite(
            {name: gradient for name, gradient in gradients.items() if gradient is not None}
        )
        more = f"{len(names) - 1} more of {len(self.parameters)} tensors"
        return NotFinite(story + (f"gradient of {names[-1]}, and of {more}" if names else "loss alone"))

    def check_weights(self, step: int) -> None:
        """Raise NotFinite where a weight is not finite after `step` steps: no loss has met it yet, and such a
        state is not to be kept.
        """
        if names := self.broken_weights():
            raise NotFinite(f"after step {step}: not finite: weight {names[0]}", weights=True)

    def broken_weights(self) -> list[str]:
        """The names of the trained weights that are not finite."""
        return self.not_finite({name: p.detach() for name, p in self.parameters.items()})

    def not_finite(self, tensors: dict[str, Tensor]) -> list[str]:
        """The names of those that are not finite on any process."""
        return self.flagged(tensors, lambda tensor: (~tensor.isfinite()).any())

    def beyond(self, dtype: torch.dtype) -> list[str]:
        """The names of the weights, frozen ones too, with a finite value that rounds to infinity in
        `dtype`."""

        def rounds_to_infinity(tensor: Tensor) -> Tensor:
            extremes = torch.stack(tensor.aminmax())
            return extremes.to(dtype).isinf().any()

        weights = {name: parameter.detach() for name, parameter in self.weights().items()}
        return self.flagged(weights, rounds_to_infinity)

    def flagged(self, tensors: dict[str, Tensor], test: Callable[[Tensor], Tensor]) -> list[str]:
        """The names of those of which `test` is true on any process."""
        parts = [local(tensor) for tensor in tensors.values()]
        flags = [test(part) if part.numel() else part.new_zeros(()).bool() for part in parts]
        counts = self.accelerator.reduce(torch.stack(flags).float(), reduction="sum").tolist()
        return [name for name, count in zip(tensors, counts, strict=True) if count]


class NotFinite(UserError):
    """A loss, a gradient or a weight was not finite; nothing was trained on it.

    Args:
        weights: a weight is not finite, so that no later step can be finite either.
    """

    def __init__(self, message: str, *, weights: bool = False) -> None:
        super().__init__(message)
        self.weights = weights

    def with_way_out(self, saved: int | None) -> UserError:
        """The same for a run that stops at it, the newest state with finite weights saved after step `saved`,
        if any is.
        """
        kept = "has saved no state before it" if saved is None else f"has saved the state after step {saved}"
        passing = "" if self.weights else ", or pass over such steps with train.skip_nonfinite=N"
        return UserError(
            f"{self}. The run stops here and {kept}: lower optimizer.learning_rate or lengthen "
            f"schedule.warmup_fraction under a new name={passing}"
        )


@dataclass(frozen=True)
class Share:
    """The part of each batch that one process computes: `rows`, in as many `pieces` (micro-batches) as every
    process has.
    """

    rows: range
    pieces: tuple[range, ...]

    @classmethod
    def of(cls, rows: int, micro_batch: int | None, process: int, processes: int) -> Share:
        """Divide `rows` so that shares differ by at most one.

        A piece has up to `micro_batch` rows, the last fewer or none.

        8 rows by 2 on processes 0 and 1 of 3: 0‥2 as (0‥1, 2‥2) and 2‥5 as (2‥4, 4‥5).
        """
        own = range(rows * process // processes, rows * (process + 1) // processes)
        most = -(-rows // processes)
        size = min(micro_batch or most, most)
        pieces = [own[first : first + size] for first in range(0, most, size)]
        return cls(own, tuple(pieces))


def step_seed(seed: int, step: int, row: int) -> int:
    """The seed of the generator for the micro-batch that begins at `row` of a step's batch.

    A resumed run draws what an undisturbed one would have drawn, and so does a run on other processes whose
    micro-batches are the same.
    """
    digest = hashlib.sha256(f"{seed} {step} {row}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def drawn(network: nn.Module) -> str | None:
    """A line on a network with dropout; None for one without.

    Its modules are asked, whatever a config calls it.
    """
    rates: dict[str, float] = {}
    for module in network.modules():
        own = {"dropout": module.p} if isinstance(module, nn.Dropout) else vars(module)
        numbers = {key: value for key, value in own.items() if "drop" in key and isinstance(value, float)}
        rates |= {key: numbers[key] for key in numbers if 0.0 < numbers[key] <= 1.0}
    if not rates:
        return None
    listed = ", ".join(f"{key} {rates[key]:g}" for key in sorted(rates))
    return (
        f"{listed}: masks are drawn for each micro-batch, so losses depend on train.micro_batch and on the "
        "number of processes"
    )
