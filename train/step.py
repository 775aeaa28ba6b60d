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
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from outgrow.model.base.errors import Diverged, UserError
from outgrow.train.data import TokenSplit
from outgrow.train.data.batches import batch
from outgrow.train.machine.distribute import accumulating, local, total_norm
from outgrow.train.optimizer import set_learning_rate
from outgrow.train.router import Losses
from outgrow.train.schedule import factor
from outgrow.train.settings import Settings
from outgrow.train.share import Share
from outgrow.train.start.teacher import scheduled
from outgrow.train.start.transfer import EntryRates

if TYPE_CHECKING:
    from outgrow.train.noise_scale import NoiseScale


class Step:
    """Calling it with i trains on batch i, a pure function of the seed and i.

    Args:
        model: a `NextTokenLoss`, prepared by Accelerate.
        optimizer: prepared by Accelerate, over the model's parameters.
        entries: where entries of one tensor learn at rates of their own.
        noise: what estimates the gradient noise scale, if it is asked for.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        accelerator: Accelerator,
        split: TokenSplit,
        settings: Settings,
        entries: EntryRates | None = None,
        noise: NoiseScale | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.split = split
        self.settings = settings
        self.entries = entries
        self.noise = noise
        self.budget = settings.budget
        self.share = Share.of(
            self.budget.rows,
            settings.train.micro_batch,
            accelerator.process_index,
            accelerator.num_processes,
        )
        weights = self.weights().items()
        self.parameters = {name: weight for name, weight in weights if weight.requires_grad}

    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters, frozen ones too, by the network's own names."""
        parameters = self.model.named_parameters()
        return {name.split("network.")[-1]: parameter for name, parameter in parameters}

    def gradients(self) -> list[Tensor]:
        """The gradients that there are, of the trained weights."""
        gradients = (parameter.grad for parameter in self.parameters.values())
        return [gradient for gradient in gradients if gradient is not None]

    def rate(self, i: int) -> float:
        """The learning rate of step `i`."""
        settings = self.settings
        progress = self.progress(i)
        from_scratch = settings.growth.operator == "scratch"
        tokens = (i + 0.5) * self.budget.tokens_per_step
        share = factor(settings.schedule, progress, from_scratch=from_scratch, tokens=tokens)
        return settings.optimizer.learning_rate * share

    def progress(self, i: int) -> float:
        """The share of the budget that is spent in the middle of step `i`."""
        return self.budget.progress(i)

    def teaching(self, i: int) -> dict[str, float]:
        """The weight and temperature of the teacher in step `i`; nothing where none teaches."""
        teacher = self.settings.transfer.teacher
        if teacher is None:
            return {}
        weight, temperature = scheduled(teacher, self.progress(i))
        return {"weight": weight, "temperature": temperature} if weight else {}

    def windows(self, i: int, rows: range) -> Tensor:
        """Rows of batch `i` on this process's device, (rows, context + 1)."""
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
        parts = torch.stack([text] if router is None else [text, router])
        losses = self.accelerator.reduce(parts, reduction="sum")
        total = total_norm(self.gradients())
        # The one place where a step waits for the device: what is not finite must not be used.
        figures = torch.stack((total, *losses)).tolist()
        norm, loss, *balance = figures
        if not all(map(math.isfinite, figures)):
            fault = self.fault(i + 1, loss, norm)
            self.optimizer.zero_grad()
            raise fault
        if self.noise is not None:
            self.noise.see_batch(norm)
        if self.settings.train.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                list(self.parameters.values()),
                self.settings.train.gradient_clip,
                total,
            )
        entries = self.entries
        with nullcontext() if entries is None else entries.applied(self.progress(i)):
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
        accelerator = self.accelerator
        pieces = self.share.pieces
        teaching = self.teaching(i)
        mean = torch.zeros((), device=accelerator.device)
        router = None
        windows = self.windows(i, self.share.rows)
        begin = self.share.rows.start
        for piece in pieces:
            last = piece is pieces[-1]
            seed = step_seed(self.settings.seed, i, piece.start)
            torch.manual_seed(seed)  # dropout, where a model has any
            rows = windows[piece.start - begin : piece.stop - begin]
            # take part with a row that counts nothing: sharded processes run the layers together
            if not len(piece):
                rows = self.windows(i, range(1))
            with nullcontext() if last else accumulating(self.model, accelerator):
                output = self.model(rows, reduction="sum", **teaching)
                losses = Losses.of(output)
                share = bool(len(piece)) / self.budget.tokens_per_step
                # Gradients are averaged over the processes.
                accelerator.backward(losses.objective * share * accelerator.num_processes)
            if self.noise is not None and piece is pieces[0]:
                self.noise.see_first(self.gradients())
            mean += losses.text.detach() * share
            if losses.router is not None:
                balance = losses.router.detach() * share
                router = balance if router is None else balance + router
        return mean, router

    def fault(self, step: int, loss: float, norm: float) -> NotFinite:
        """Name the tensor that is not finite: a weight, else the gradient nearest to the loss, where backward
        met it first.
        """
        story = f"step {step}: the loss is {loss} and the gradient norm {norm}; not finite: "
        if names := self.broken_weights():
            return NotFinite(f"{story}weight {names[0]}", weights=True)
        parameters = self.parameters.items()
        gradients = ((name, parameter.grad) for name, parameter in parameters)
        present = {name: gradient for name, gradient in gradients if gradient is not None}
        names = self.not_finite(present)
        if not names:
            return NotFinite(f"{story}loss alone")
        others = len(names) - 1
        more = f"{others} more of {len(self.parameters)} tensors"
        return NotFinite(f"{story}gradient of {names[-1]}, and of {more}")

    def check_weights(self, step: int) -> None:
        """Raise NotFinite where a weight is not finite after `step` steps: no loss has met it yet, and such a
        state is not to be kept.
        """
        if names := self.broken_weights():
            raise NotFinite(f"after step {step}: not finite: weight {names[0]}", weights=True)

    def broken_weights(self) -> list[str]:
        """The names of the trained weights that are not finite."""
        return self.not_finite(detached(self.parameters))

    def not_finite(self, tensors: dict[str, Tensor]) -> list[str]:
        """The names of those that are not finite on any process."""

        def has_not_finite(tensor: Tensor) -> Tensor:
            return (~tensor.isfinite()).any()

        return self.flagged(tensors, has_not_finite)

    def beyond(self, dtype: torch.dtype) -> list[str]:
        """The names of the weights, frozen ones too, with a finite value that rounds to infinity in
        `dtype`."""

        def rounds_to_infinity(tensor: Tensor) -> Tensor:
            extremes = torch.stack(tensor.aminmax())
            return extremes.to(dtype).isinf().any()

        return self.flagged(detached(self.weights()), rounds_to_infinity)

    def flagged(self, tensors: dict[str, Tensor], test: Callable[[Tensor], Tensor]) -> list[str]:
        """The names of those of which `test` is true on any process."""

        def flag(part: Tensor) -> Tensor:
            return test(part) if part.numel() else part.new_zeros(()).bool()

        flags = [flag(local(tensor)) for tensor in tensors.values()]
        own = torch.stack(flags).float()
        counts = self.accelerator.reduce(own, reduction="sum").tolist()
        counted = zip(tensors, counts, strict=True)
        return [name for name, count in counted if count]


class NotFinite(UserError):
    """A loss, a gradient or a weight was not finite; nothing was trained on it.

    Args:
        weights: a weight is not finite, so that no later step can be finite either.
    """

    def __init__(self, message: str, *, weights: bool = False) -> None:
        super().__init__(message)
        self.weights = weights

    def with_way_out(self, saved: int | None) -> Diverged:
        """The same for a run that stops at it, the newest state with finite weights saved after step `saved`,
        if any is.
        """
        fact = "has saved no state before it" if saved is None else f"has saved the state after step {saved}"
        passing = "" if self.weights else ", or pass over such steps with train.skip_nonfinite=N"
        return Diverged(
            f"{self}. The run stops here and {fact}: lower optimizer.learning_rate or lengthen "
            f"schedule.warmup_fraction under a new name={passing}"
        )


def detached(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The values of `parameters`, outside the graph of the loss."""
    return {name: parameter.detach() for name, parameter in parameters.items()}


def step_seed(seed: int, step: int, row: int) -> int:
    """The seed of the generator for the micro-batch that begins at `row` of a step's batch.

    A resumed run draws what an undisturbed one would have drawn, and so does a run on other processes whose
    micro-batches are the same.
    """
    text = f"{seed} {step} {row}"
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def drawn(network: nn.Module) -> str | None:
    """A line on a network with dropout; None for one without.

    Its modules are asked, whatever a config calls it.
    """
    rates: dict[str, float] = {}
    for module in network.modules():
        attributes = {"dropout": module.p} if isinstance(module, nn.Dropout) else vars(module)
        for key, value in attributes.items():
            is_rate = isinstance(value, float) and 0.0 < value <= 1.0
            if "drop" in key and is_rate:
                rates[key] = value
    if not rates:
        return None
    parts = [f"{key} {rates[key]:g}" for key in sorted(rates)]
    return (
        f"{', '.join(parts)}: masks are drawn for each micro-batch, so losses depend on train.micro_batch, "
        "and on the number of processes unless that is given and divides the windows of each"
    )
