"""Sums over tokens, and the ridge regression that they solve.

Shapes:
    t: tokens of calibration text
    i, o: inputs and outputs of a target's matrix, a bias counted as one more input that is always 1
    s: inputs of the source's matrix
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256  # tokens that are summed in the type of the activations; their sums in float64
BLOCKS = 4  # of a Gram matrix's columns: above those on its diagonal it is not computed


def products(one: Tensor, other: Tensor) -> Tensor:
    """Σ over tokens of one·otherᵀ, float64: (t, i), (t, s) → (i, s)."""
    rows = one.shape[1]
    columns = other.shape[1]
    total = torch.zeros(rows, columns, dtype=torch.float64)
    chunks = one.split(CHUNK)
    other_chunks = other.split(CHUNK)
    for left, right in zip(chunks, other_chunks, strict=True):
        total += left.T @ right
    return total


def lower_gram(rows: Tensor) -> Tensor:
    """Σ over tokens of row·rowᵀ, float64, its lower triangle: (t, i) → (i, i)."""
    size = rows.shape[1]
    total = torch.zeros(size, size, dtype=torch.float64)
    width = -(-size // BLOCKS)
    for first in range(0, size, width):
        block = slice(first, first + width)
        below = rows[:, first:]
        total[first:, block] = products(below, rows[:, block])
    return total.tril_()


@dataclass
class Inputs:
    """Sums over tokens that all matrices share which read the same.

    Args:
        read: (t, i) the target's inputs.
        seen: (t, s) the source's.
        ridge: λ, relative to the mean square of an input, summed over tokens.
    """

    read: Tensor
    seen: Tensor
    ridge: float

    def __post_init__(self) -> None:
        gram = lower_gram(self.read)
        mean_square = float(gram.diagonal().mean())
        self._pull = self.ridge * mean_square or 1.0  # inputs may be all zero
        gram.diagonal().add_(self._pull)
        self._factor = torch.linalg.cholesky(gram)
        self._cross = products(self.read, self.seen)

    def fit(self, start: Tensor, targets: Tensor) -> Tensor:
        """Minimise ‖W x − targets y‖² + λ‖W − start‖² over the tokens' inputs x, y: (o, i), (o, s) → (o,
        i)."""
        # W (Σ x xᵀ + λ) = targets Σ y xᵀ + λ start, solved transposed
        aim = self._cross @ targets.T
        aim += self._pull * start.T
        solution = torch.cholesky_solve(aim, self._factor)
        return solution.T

    def flops(self) -> float:
        """FLOPs of the sums and the factor."""
        inputs, source_inputs = self._cross.shape
        return sum_flops(len(self.read), inputs, source_inputs)


def sum_flops(tokens: int, inputs: int, source_inputs: int) -> float:
    """FLOPs of the sums over tokens and of the factor, which matrices share that read the same."""
    square = inputs**2
    gram = tokens * square * (1 + 1 / BLOCKS)
    cross = 2.0 * tokens * inputs * source_inputs
    factor = inputs**3 / 3
    return gram + cross + factor


def fit_flops(outputs: int, inputs: int, source_inputs: int) -> float:
    """FLOPs of fitting one matrix once the sums are there."""
    columns = inputs + source_inputs
    return 2.0 * outputs * inputs * columns
