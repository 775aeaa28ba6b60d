"""LESA (2502.13794): a new layer between two is predicted from both, in coordinates that all layers share.

    [W_1 … W_L] = U S [V_1 … V_L]

The matrices of one kind stand side by side, layer by layer. A small network learns on the source's own layers
to tell V_i from V_{i-1} and V_{i+1}; a new layer's matrix is U S times what it tells of the two beside it.
Norms, biases and what is no matrix stay the mean of both. No text is read, and no gradient passes through the
model.

Memory, for one kind at a time: Σ Wᵢ Wᵢᵀ (the Gram matrix, summed layer by layer) and its eigenvectors in
float64, o × o each, and the V of three layers; the V of all layers lie in the unfinished folder meanwhile.
What was predicted of a kind is kept (`kept.py`): after a kill, the same growth goes on with the next.

Shapes:
    o, i: outputs and inputs of a matrix
    b: rows of V in a batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from outgrow.growth.decision import Step, source_names
from outgrow.growth.engine.execute import Expander
from outgrow.growth.engine.seeding import generator
from outgrow.growth.learned.kept import Kept
from outgrow.growth.learned.lessons import LEAST_LAYERS, Lesa
from outgrow.growth.learned.on_disk import Values, Written
from outgrow.growth.plan import Plan
from outgrow.model.dtypes import to_raw

NOISE_FLOOR = 1e-7  # of the largest singular value: below it the Gram matrix holds rounding alone


# ---- the coordinates that layers share ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Basis:
    """U and S of matrices side by side, from the eigenvectors of their Gram matrix.

    Attributes:
        vectors: (o, o) U; in each column the entry that is largest by its size is positive.
        sizes: (o,) S, descending.
    """

    vectors: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, matrices: Iterator[np.ndarray]) -> Basis:
        """Sum up the Gram matrix of (o, i) matrices, one in memory at a time."""
        gram: Any = 0
        for matrix in matrices:
            wide = matrix.astype(np.float64)
            gram = gram + wide @ wide.T
        ascending, vectors = np.linalg.eigh(gram)
        squares = ascending[::-1]
        vectors = vectors[:, ::-1]
        # An eigenvector's sign is anybody's choice, and the prediction depends on it.
        columns = np.arange(len(squares))
        largest = np.abs(vectors).argmax(0)
        signs = np.sign(vectors[largest, columns])
        sizes = np.sqrt(squares.clip(0))
        return cls(vectors * signs, sizes)

    def coordinates(self, matrix: np.ndarray) -> np.ndarray:
        """V = S⁻¹ Uᵀ W: (o, i), zero where S is."""
        floor = NOISE_FLOOR * self.sizes[0]
        is_large = self.sizes > floor
        inverse = np.zeros_like(self.sizes)
        inverse[is_large] = 1 / self.sizes[is_large]
        wide = matrix.astype(np.float64)
        turned = self.vectors.T @ wide
        return inverse[:, None] * turned

    def matrix(self, coordinates: np.ndarray) -> np.ndarray:
        """W = U S V: (o, i)."""
        sized = self.sizes[:, None] * coordinates
        return self.vectors @ sized


# ---- the prediction ----------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """Two rows of V to the row between them: (b, i), (b, i) → (b, i).

    Args:
        inputs: i.
        start: `mean` adds to the mean of both, nothing at first; `random` is the paper's.
    """

    def __init__(self, inputs: int, hidden: int, start: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, inputs),
        )
        self.adds = start == "mean"
        if self.adds:
            last = self.layers[-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        both = torch.cat([before, after], 1)
        output: Tensor = self.layers(both)
        return output + _mean(before, after) if self.adds else output


def distance(output: Tensor, target: Tensor, norm_weight: float) -> Tensor:
    """(1 − λ)·MSE + λ·(difference of the Frobenius norms)²."""
    square = nn.functional.mse_loss(output, target)
    norm = torch.linalg.norm(output)
    target_norm = torch.linalg.norm(target)
    norms = (norm - target_norm).square()
    return (1 - norm_weight) * square + norm_weight * norms


@dataclass
class Kind:
    """The matrices of one kind, their coordinates on disk in units of their root mean square.

    Attributes:
        names: of the source's tensors, layer by layer.
        new: (step, number of the layer before it among `names`) of every new layer.
        turned: stored as inputs × outputs.
    """

    names: list[str]
    turned: bool
    new: list[tuple[Step, int]] = field(default_factory=list)

    def stored(self, values: Values, name: str) -> np.ndarray:
        """(o, i) of a source tensor."""
        matrix = values(name)
        return matrix.T if self.turned else matrix

    @property
    def first(self) -> str:
        """The name in the source's first layer that has the matrix: the kind's own name."""
        return self.names[0]

    def size(self, values: Values) -> tuple[int, int]:
        """(o, i) of each of its matrices."""
        outputs, inputs = self.stored(values, self.first).shape
        return outputs, inputs

    def flops(self, outputs: int, inputs: int, lesson: Lesa) -> tuple[float, float, float]:
        """FLOPs of the basis and V of matrices of that size, of an epoch, and of the new layers."""
        size = outputs * inputs
        layers = len(self.names)
        hidden = lesson.hidden
        gram_and_v = 4.0 * layers * size * outputs
        eigenvectors = 9.0 * outputs**3
        first = 2 * inputs * hidden
        second = hidden**2
        third = hidden * inputs
        biases = 2 * hidden + inputs
        parameters = first + second + third + biases
        learned_layers = layers - 2  # the first and the last have one neighbour
        epoch = 6.0 * parameters * outputs * learned_layers
        turning_back = 2.0 * outputs * size * len(self.new)
        return gram_and_v + eigenvectors, epoch, turning_back


def kinds_of(plan: Plan) -> tuple[dict[str, Kind], list[str]]:
    """The kinds of matrices that new layers have, by the name in the first layer, and the target tensors that
    stay the mean of two.
    """
    kinds: dict[str, Kind] = {}
    means: list[str] = []
    for step in plan.steps:
        if step.source is None or step.beside is None:
            continue
        names = source_names(step.tensor, plan.growth, plan.layers)
        is_matrix = len(step.shape) == 2
        if not is_matrix or len(names) < LEAST_LAYERS:
            means.append(step.name)
            continue
        turned = step.tensor.reads[0]
        kind = kinds.setdefault(names[0], Kind(names, turned))
        before = names.index(step.source)
        kind.new.append((step, before))
    return kinds, means


@dataclass
class Coordinates:
    """The V of all layers of a kind, on disk, in units of their root mean square.

    Attributes:
        held: (layer, o, i).
        unit: the root mean square.
    """

    held: np.ndarray
    unit: float = 1.0

    @classmethod
    def of(cls, kind: Kind, basis: Basis, values: Values, file: Path, dtype: torch.dtype) -> Coordinates:
        """Write the coordinates of every layer to `file`."""
        shape = (len(kind.names), *kind.size(values))
        numpy_dtype = str(dtype).removeprefix("torch.")
        held = open_memmap(file, "w+", numpy_dtype, shape)
        square = 0.0
        for number, name in enumerate(kind.names):
            matrix = kind.stored(values, name)
            coordinates = basis.coordinates(matrix)
            held[number] = coordinates
            square += float(np.square(coordinates).sum())
        mean_square = square / held.size
        unit = sqrt(mean_square) or 1.0
        for layer in held:
            layer /= unit
        return cls(held, unit)

    def __getitem__(self, layer: int) -> Tensor:
        """(o, i) of a layer."""
        in_memory = np.array(self.held[layer])
        return torch.from_numpy(in_memory)

    @property
    def inner(self) -> range:
        """The layers that stand between two others."""
        last = len(self.held) - 1
        return range(1, last)

    def error(self, predict: Callable[[Tensor, Tensor], Tensor]) -> float:
        """The mean square error of what `predict` makes of the neighbours of the inner layers."""
        errors = []
        with torch.no_grad():
            for layer in self.inner:
                before = self[layer - 1]
                after = self[layer + 1]
                between = predict(before, after)
                error = nn.functional.mse_loss(between, self[layer])
                errors.append(float(error))
        return sum(errors) / len(errors)


@dataclass
class Learning:
    """The part of learning that all kinds share.

    Attributes:
        tell: called with the FLOPs of each part, when it is done.
    """

    plan: Plan
    lesson: Lesa
    values: Values
    written: Written
    kept: Kept
    tell: Callable[[float], None]

    def __post_init__(self) -> None:
        formats = {stored.dtype for stored in self.written.tensors.values()}
        self.dtype = torch.float64 if "F64" in formats else torch.float32

    def kind(self, kind: Kind, file: Path) -> dict[str, Any]:
        """Learn one kind and write its new layers, or put back those that an earlier growth has kept; the
        steps and losses of it.
        """
        kept = self.kept.get(kind.first)
        if kept is not None:
            arrays, record = kept
            for tensor, raw in arrays.items():
                self.written.write_raw(tensor, raw)
            return dict(record)
        record = self.predicted(kind, file)
        names = [step.name for step, _ in kind.new]
        raw_of = {name: self.written.raw(name) for name in names}
        self.kept.put(kind.first, raw_of, record)
        return record

    def predicted(self, kind: Kind, file: Path) -> dict[str, Any]:
        """Learn one kind and write its new layers; the steps and losses of it."""
        outputs, inputs = kind.size(self.values)
        of_basis, of_epoch, of_layers = kind.flops(outputs, inputs, self.lesson)
        matrices = (kind.stored(self.values, name) for name in kind.names)
        basis = Basis.of(matrices)
        rows = Coordinates.of(kind, basis, self.values, file, self.dtype)
        self.tell(of_basis)
        predictor = self._predictor(kind, inputs)
        steps, epochs = self.learn(predictor, rows, kind.first, of_epoch)
        for step, before in kind.new:
            with torch.no_grad():
                between = predictor(rows[before], rows[before + 1])
            coordinates = between.double().numpy() * rows.unit
            predicted = basis.matrix(coordinates)
            self.write(step, kind, predicted)
        self.tell(of_layers)
        losses = {
            "neighbours": rows.error(_mean),
            "learned": rows.error(predictor),
            "epochs": epochs,
        }
        return {"steps": steps, "losses": losses}

    def _predictor(self, kind: Kind, inputs: int) -> Predictor:
        """Make the network of a kind; its start depends on the seed and the kind's name alone."""
        numbers = generator(self.plan.growth.seed, "lesa", kind.first)
        seed = int(numbers.integers(1 << 62))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            predictor = Predictor(inputs, self.lesson.hidden, self.lesson.start)
        return predictor.to(self.dtype)

    def learn(
        self, predictor: Predictor, rows: Coordinates, name: str, flops: float
    ) -> tuple[int, list[float]]:
        """Learn every inner layer from its neighbours, some rows at a time; steps, and mean losses of epochs.

        Args:
            flops: of an epoch.
        """
        lesson = self.lesson
        optimizer = torch.optim.AdamW(predictor.parameters(), lesson.learning_rate)
        numbers = generator(self.plan.growth.seed, "lesa", name, "order")
        inner = np.array(rows.inner)
        outputs = rows.held.shape[1]
        steps = 0
        epochs = []
        for _ in range(lesson.epochs):
            losses: list[float] = []
            for layer in numbers.permutation(inner):
                before = rows[layer - 1]
                own = rows[layer]
                after = rows[layer + 1]
                order = torch.from_numpy(numbers.permutation(outputs))
                for batch in order.split(lesson.rows):
                    output = predictor(before[batch], after[batch])
                    loss = distance(output, own[batch], lesson.norm_weight)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(float(loss.detach()))
            mean_loss = sum(losses) / len(losses)
            epochs.append(mean_loss)
            steps += len(losses)
            self.tell(flops)
        return steps, epochs

    def write(self, step: Step, kind: Kind, matrix: np.ndarray) -> None:
        """Put a predicted matrix in its place, grown in width as any source tensor is."""
        assert step.source is not None
        turned = matrix.T if kind.turned else matrix
        stored = np.ascontiguousarray(turned)
        source_dtype = self.plan.source_dtype(step.source)
        one = _One(to_raw(stored, source_dtype))
        alone = replace(step, beside=None)
        grown = Expander(self.plan, alone, one).complete()
        self.written.write_raw(step.name, grown)


def _mean(before: Tensor, after: Tensor) -> Tensor:
    return (before + after) / 2


@dataclass(frozen=True, eq=False)
class _One:
    """A `Reader` of one matrix, whatever the name."""

    raw: np.ndarray

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.raw[start:stop].copy()


def predict_layers(
    plan: Plan,
    lesson: Lesa,
    values: Values,
    written: Written,
    folder: Path,
    kept: Kept,
    progress: Callable[[float, float], None],
) -> dict[str, Any]:
    """Predict the matrices of a plan's new layers and write them in `folder`; return the record of it.

    Args:
        progress: called with (FLOPs done, FLOPs in all), at first with those of kinds that were kept.
    """
    kinds, means = kinds_of(plan)
    flops_of = {name: _flops(kind, values, lesson) for name, kind in kinds.items()}
    total = sum(flops_of.values())
    done = 0.0

    def tell(flops: float) -> None:
        nonlocal done
        done += flops
        progress(done, total)

    # Kinds that an earlier attempt has learnt count as done.
    already = [name for name, kind in kinds.items() if kept.holds(kind.first)]
    spared = [flops_of[name] for name in already]
    tell(sum(spared))
    learning = Learning(plan, lesson, values, written, kept, tell)
    records: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(prefix="layers-", dir=folder) as scratch:
        file = Path(scratch) / "coordinates.npy"
        for name, kind in kinds.items():
            records[name] = learning.kind(kind, file)
    return {
        "steps": sum(record["steps"] for record in records.values()),
        "losses": {name: record["losses"] for name, record in records.items()},
        "matrices": sum(len(kind.new) for kind in kinds.values()),
        "means": len(means),
        "flops": total,
    }


def _flops(kind: Kind, values: Values, lesson: Lesa) -> float:
    """FLOPs of learning a kind and predicting its new layers."""
    outputs, inputs = kind.size(values)
    basis, epoch, layers = kind.flops(outputs, inputs, lesson)
    epochs = epoch * lesson.epochs
    return basis + epochs + layers
