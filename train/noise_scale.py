"""The gradient noise scale (McCandlish et al., 1812.06162): the batch size, in tokens, up to which a larger
batch pays, estimated while training (train.noise_scale=true).

The squared norm of a batch's mean gradient is, on average over batches of B tokens, |G|² + tr(Σ)/B: the true
gradient's, and what single tokens' gradients scatter. So two sizes b < B tell both (appendix A.1),

    |G|²  ≈ (B·|g_B|² - b·|g_b|²) / (B - b)
    tr(Σ) ≈ (|g_b|² - |g_B|²) / (1/b - 1/B)

and the simple noise scale is tr(Σ) / |G|². Both are noisy, so each is summed over a logging interval before
they are divided. b is the first micro-batch of each process, B the whole batch. Where each of several
processes takes its share at once (DDP), its gradient is seen just before it is averaged with the others'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from outgrow.model.base.errors import UserError
from outgrow.train.machine.distribute import total_norm
from outgrow.train.share import Share

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import GradBucket

    from outgrow.train.run.state import Position
    from outgrow.train.settings import Settings


class NoiseScale:
    """Sums up both estimates of a run's steps in `position`, so that a run that resumes goes on with them.

    Args:
        own: tokens in the first micro-batch of each process.
        batch: tokens of a whole batch.
    """

    def __init__(self, own: list[int], batch: int, accelerator: Accelerator, position: Position) -> None:
        self.accelerator = accelerator
        self.position = position
        process = accelerator.process_index
        processes = accelerator.num_processes
        # A loss is divided by the batch's tokens. What is sharded is added up over the processes each time,
        # else a gradient is its process's own until the last micro-batch, times the processes.
        if accelerator.is_fsdp2:
            self.small: float = sum(own)
            self.factor = batch / self.small
        else:
            self.small = processes / sum(1 / tokens for tokens in own)
            self.factor = batch / (processes * own[process])
        self.batch = batch
        self.square = torch.zeros(())
        self.parts: list[Tensor] | None = None  # squared norms of this process's own buckets

    def watch(self, model: nn.Module) -> None:
        """See the gradient of a process's only micro-batch before DDP averages it, a bucket at a time."""
        if isinstance(model, DistributedDataParallel):
            self.parts = []
            # DDP refuses annotations that are not evaluated
            model.register_comm_hook(self.parts, lambda parts, bucket: _seen(parts, bucket))

    def see_first(self, gradients: list[Tensor]) -> None:
        """Take the gradients that the first micro-batch of a step has left."""
        norm = total_norm(gradients)
        if self.parts is not None:
            norm = torch.stack(self.parts).sum().sqrt()
            self.parts.clear()
        square = (norm * self.factor).square()
        self.square = self.accelerator.reduce(square, reduction="mean")

    def see_batch(self, norm: float) -> None:
        """Take the norm of the whole batch's gradient, and count the step."""
        b = self.small
        B = self.batch
        small = float(self.square)
        large = norm**2
        gradient = (B * large - b * small) / (B - b)
        scatter = (small - large) / (1 / b - 1 / B)
        self.position.noise_gradient += gradient
        self.position.noise_scatter += scatter

    def close_interval(self) -> dict[str, float | None]:
        """Return the noise scale of the steps since the last call, in tokens.

        None where the gradient's own norm is lost in the noise.
        """
        position = self.position
        gradient = position.noise_gradient
        scatter = position.noise_scatter
        position.noise_gradient = position.noise_scatter = 0.0
        return {"noise_scale_tokens": scatter / gradient if gradient > 0 else None}


def _seen(parts: list[Tensor], bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Note the squared norm of a bucket of gradients, then average it as DDP does by itself."""
    gradient = bucket.buffer()
    parts.append(gradient.square().sum())
    everyone = torch.distributed.group.WORLD
    assert everyone is not None
    return allreduce_hook(everyone, bucket)


def first_micro_batches(settings: Settings, processes: int) -> list[int]:
    """The tokens in the first micro-batch of each process.

    Raises:
        UserError: there is nothing to compare: a process takes its share of a batch at once, alone or with
            others that add up their gradients as they go (sharding).
    """
    rows = settings.budget.rows
    size = settings.train.micro_batch
    shares = [Share.of(rows, size, process, processes) for process in range(processes)]
    fewest = min(len(share.rows) for share in shares)
    at_once = len(shares[0].pieces) < 2
    seen_apart = processes > 1 and settings.sharding.name == "none"
    if (at_once and not seen_apart) or not fewest:
        way = (
            f"give train.micro_batch=N, at most {fewest // 2}"
            if fewest > 1
            else "give more windows a step (train.batch_tokens)"
        )
        raise UserError(
            "train.noise_scale: compares the gradient of a micro-batch with the whole batch's, and each "
            f"process takes its {fewest} windows at once; {way}"
        )
    return [len(share.pieces[0]) * settings.train.context for share in shares]
