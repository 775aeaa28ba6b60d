"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): each matrix moves by its momentum,
orthogonalised by a few Newton-Schulz iterations.

A small network has many small matrices, and a product of two of them takes less time than starting it. So
matrices of one shape are orthogonalised together, as one stack. Numbers, groups and state are those of
PyTorch's Muon.

Shapes: a matrix is (out, in), as a linear layer holds it; a stack of them (matrix, out, in).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from outgrow.train.machine.distribute import local

if TYPE_CHECKING:
    from outgrow.train.settings import OptimizerSettings

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration
ITERATIONS = 5
EPSILON = 1e-7
TOGETHER = 2**20  # entries that are orthogonalised at a time; a matrix of more is alone


class Muon(torch.optim.Muon):
    """PyTorch's Muon, scaled to the RMS of AdamW's step (arXiv 2502.16982, section 2.2), for matrices."""

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        assert settings.momentum is not None
        rate, momentum = settings.learning_rate, settings.momentum
        super().__init__(groups, lr=rate, momentum=momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            matrices: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, matrices, gradients, momenta)
            muon_step(matrices, gradients, momenta, group)


class StackedMuon(torch.optim.Optimizer):
    """The same for stacks of matrices, (expert, out, in): each expert's matrix is orthogonalised by
    itself.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        super().__init__(groups, {"lr": settings.learning_rate, "momentum": settings.momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                # processes that share a stack hold some experts each, every matrix of them whole
                stacks = map(local, (parameter, parameter.grad, state["momentum_buffer"]))
                matrices, gradients, momenta = (list(stack.flatten(0, -3).unbind(0)) for stack in stacks)
                muon_step(matrices, gradients, momenta, group)


def muon_step(
    matrices: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], group: Mapping[str, Any]
) -> None:
    """Change `matrices` and their `momenta` in place: Nesterov momentum, decay, and the orthogonalised step.

    Args:
        matrices: (out, in) each, of any shapes.
        group: their learning rate, weight decay and momentum.
    """
    rate, momentum = float(group["lr"]), group["momentum"]
    updates: list[Tensor] = []
    for own, gradient in zip(momenta, gradients, strict=True):
        own.lerp_(gradient, 1 - momentum)
        updates.append(gradient.lerp(own, momentum))
    for numbers in alike(matrices):
        stack = [updates[number] for number in numbers]
        # one alone is neither copied nor, where processes share it, put together
        steps = [orthogonal(stack[0])] if len(stack) == 1 else orthogonal(torch.stack(stack)).unbind()
        for number, step in zip(numbers, steps, strict=True):
            matrix = matrices[number]
            matrix.mul_(1 - rate * group["weight_decay"])
            matrix.add_(step, alpha=-rate * 0.2 * max(matrix.shape) ** 0.5)


def alike(matrices: list[Tensor]) -> Iterator[list[int]]:
    """The places of matrices that fit into one stack, of `TOGETHER` entries at most, in the order of their
    first.

    A matrix that processes share, or one that is larger by itself, is alone.
    """
    places: dict[Any, list[int]] = defaultdict(list)
    for position, matrix in enumerate(matrices):
        own = position if isinstance(matrix, DTensor) else (matrix.shape, matrix.device)
        places[own].append(position)
    for same in places.values():
        most = max(1, TOGETHER // matrices[same[0]].numel())
        for begin in range(0, len(same), most):
            yield same[begin : begin + most]


def orthogonal(update: Tensor) -> Tensor:
    """The nearest matrices to `update` of singular values near 1, by a quintic Newton-Schulz iteration.

    It runs in bfloat16 on an accelerator and in float32 on a CPU, most of which multiply bfloat16 in a slow
    loop.

    Args:
        update: a matrix (out, in), or a stack of them (matrix, out, in).
    """
    tall = update.shape[-2] > update.shape[-1]
    matrix = update if update.device.type == "cpu" else update.bfloat16()
    matrix = matrix.mT if tall else matrix
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    matrix = matrix / norm.clamp(min=EPSILON)  # so that no singular value is above 1
    add_product = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = matrix @ matrix.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        matrix = add_product(matrix, polynomial, matrix, beta=a)
    return matrix.mT if tall else matrix
