"""Least squares: each matrix of a grown model is fitted to the source's activations, in closed form.

One forward pass of the target over all calibration text does it: when the pass comes to a matrix, its inputs
are known; it is fitted, written in its place and used. The source's layer of the same weights runs just
before, on its own inputs, which a first pass of the source has left on disk. Memory: a layer of each model,
the activations of the text in it, and three square matrices in float64 as large as the widest input (the
feed-forward size) squared. The layers that a pass has fitted are kept (`kept.py`): after a kill, the same
growth runs them as they are and goes on with the next.

Shapes:
    t: tokens of calibration text
    i, o: inputs and outputs of a target's matrix, a bias counted as one more input that is always 1
    s: inputs of the source's matrix
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from outgrow.growth.expansion import Fill
from outgrow.growth.learned.kept import Kept
from outgrow.growth.learned.matrices import Matrix, matrices
from outgrow.growth.learned.on_disk import OnDisk, Written
from outgrow.growth.learned.sums import Inputs, fit_flops, sum_flops
from outgrow.growth.learned.text import Calibration
from outgrow.growth.plan import Plan
from outgrow.model.geometry import flops_per_token

HEAD = "head"
FITTED = (Fill.COPY, Fill.MEAN, Fill.ZERO)  # rows that the source says something about

_Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a layer beside its hidden states


@dataclass
class Fitting:
    """One pass over the target.

    Attributes:
        scratch: a folder for the inputs of the source's layers.
        kept: the layers that an earlier pass has fitted.
        names, fits, flops: tensors and matrices that were fitted since the last piece was kept, and what that
            took.
        fitted, paid: matrices and FLOPs of all pieces.
    """

    plan: Plan
    ridge: float
    source: OnDisk
    target: OnDisk
    written: Written
    scratch: Path
    kept: Kept
    names: list[str] = field(default_factory=list)
    fits: int = 0
    flops: float = 0.0
    fitted: int = 0
    paid: float = 0.0
    _done: set[str] = field(default_factory=set)  # names of pieces
    _calls: dict[int, _Call] = field(default_factory=dict)
    _seen: dict[str, Tensor] = field(default_factory=dict)  # source tensor → what its module read
    _last: tuple[Tensor, Tensor, Inputs] | None = None

    def run(self, tokens: Tensor, progress: Callable[[int], None]) -> None:
        """Fit every matrix of the layers, and the output head where it is a matrix of its own.

        Args:
            progress: called with how many of the target's layers are fitted: those of an earlier pass at
                first, then before each and at the end.
        """
        matrix_of = matrices(self.plan)
        layers = self.target.layers
        for number in range(len(layers)):
            self._put_back(_piece(number))
        progress(len(self._done))
        self._put_back(HEAD)
        with self._keeping_inputs():
            source_end = self.source.to_head(tokens)
        for number, layer in enumerate(layers):
            if _piece(number) not in self._done:
                self._watch(number, layer, matrix_of, progress)
        end = self.target.to_head(tokens)
        progress(len(layers))
        if HEAD not in self._done:
            self._fit_head(matrix_of, source_end, end)

    def _watch(
        self, number: int, layer: nn.Module, matrix_of: dict[str, Matrix], progress: Callable[[int], None]
    ) -> None:
        """Have a layer of the target fitted when the pass comes to it, and kept when it has answered."""
        source_first = self._source_first(number, progress)
        layer.register_forward_pre_hook(source_first, prepend=True)
        modules = self.target.matrices(layer)
        for module, weight in modules.items():
            matrix = matrix_of.get(weight)
            if matrix is not None:
                module.register_forward_pre_hook(self._fitted_first(matrix))
        piece = _piece(number)
        layer.register_forward_hook(lambda *_: self._keep(piece))

    def _put_back(self, piece: str) -> None:
        """Write what an earlier pass has fitted in its place, if it was kept."""
        contents = self.kept.get(piece)
        if contents is None:
            return
        arrays, counts = contents
        for name, raw in arrays.items():
            self.written.write_raw(name, raw)
        self._count(counts)
        self._done.add(piece)

    def _keep(self, piece: str) -> None:
        """Keep what was fitted since the last piece."""
        raw = {name: self.written.raw(name) for name in self.names}
        counts = {"matrices": self.fits, "flops": self.flops}
        self.kept.put(piece, raw, counts)
        self._count(counts)
        self.names = []
        self.fits = 0
        self.flops = 0.0

    def _count(self, counts: dict[str, Any]) -> None:
        """Add up what is said of a piece."""
        self.fitted += counts["matrices"]
        self.paid += counts["flops"]

    def _fit_head(self, matrix_of: dict[str, Matrix], source_end: Tensor | None, end: Tensor | None) -> None:
        """Fit the output head, where both models have one of their own."""
        head = self.target.head
        if head is None or end is None:
            return
        if self.source.head is None or source_end is None:
            return
        modules = self.target.matrices(head)
        weight = modules[head]
        matrix = matrix_of[weight]
        self.target.fill(head)
        self._seen[matrix.source] = source_end
        self._fit(matrix, head, end)
        self.target.let_go(head)
        self._keep(HEAD)

    def _hidden_file(self, number: int) -> Path:
        """Name the file of the hidden states that a layer of the source reads."""
        return self.scratch / f"{number}.npy"

    @contextmanager
    def _keeping_inputs(self) -> Iterator[None]:
        """Keep how every layer of the source is called, its hidden states on disk."""

        def keeper(number: int) -> Any:
            def keep(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                others = dict(named)
                rest = arguments[1:]
                hidden = arguments[0] if arguments else others["hidden_states"]
                others.pop("hidden_states", None)
                file = self._hidden_file(number)
                np.save(file, hidden.numpy())
                self._calls[number] = (rest, others)

            return keep

        hooks = []
        for number, layer in enumerate(self.source.layers):
            keep = keeper(number)
            hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
            hooks.append(hook)
        yield
        for hook in hooks:
            hook.remove()

    def _source_first(self, number: int, progress: Callable[[int], None]) -> Any:
        """Run the source's layer before the target's layer of that number, and keep what its matrices
        read."""

        def run(*_: Any) -> None:
            progress(number)
            source = self.plan.layers.layers[number]
            layer = self.source.layers[source]
            self._seen = {}
            self._last = None
            hooks = []
            modules = self.source.matrices(layer)
            for module, weight in modules.items():
                keep = self._seen_by(weight)
                hook = module.register_forward_pre_hook(keep)
                hooks.append(hook)
            file = self._hidden_file(source)
            array = np.load(file, allow_pickle=False)
            hidden = torch.from_numpy(array)
            rest, named = self._calls[source]
            layer(hidden, *rest, **named)
            for hook in hooks:
                hook.remove()

        return run

    def _seen_by(self, weight: str) -> Any:
        """Keep what the source's matrix of that name reads."""

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._seen[weight] = arguments[0]

        return keep

    def _fitted_first(self, matrix: Matrix) -> Any:
        def run(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen = self._seen.get(matrix.source)
            if seen is None:
                return
            read = arguments[0]
            # an expert sees a share of the tokens, and not the source's
            same_tokens = seen.shape[:-1] == read.shape[:-1]
            if same_tokens:
                self._fit(matrix, module, read)

        return run

    def _fit(self, matrix: Matrix, module: Any, read: Tensor) -> None:
        """Fit a module's matrix to what it reads, write it, and use it as it is stored."""
        has_bias = matrix.bias is not None
        weight = module.weight.double().numpy()
        bias = module.bias.double().numpy() if has_bias else None
        rows = matrix.joined(weight, bias)
        start = torch.from_numpy(rows)
        target_rows = matrix.targets(self.source.values)
        targets = torch.from_numpy(target_rows)
        seen = self._seen[matrix.source]
        inputs = self._inputs(read, seen, has_bias)
        fitted = inputs.fit(start, targets)
        outputs, width = fitted.shape
        source_width = targets.shape[1]
        self.flops += fit_flops(outputs, width, source_width)
        self.fits += 1
        # Of rows that are drawn the source says nothing: they stay.
        is_drawn = ~np.isin(matrix.outputs.fill, FITTED)
        fitted[is_drawn] = start[is_drawn]
        for parameter, name, values in matrix.parted(fitted.numpy()):
            stored = self.written.write(name, values)
            used = getattr(module, parameter)
            used.copy_(torch.from_numpy(stored))
            self.names.append(name)

    def _inputs(self, read: Tensor, seen: Tensor, biased: bool) -> Inputs:
        """The sums over tokens, made once for matrices that read the same."""
        if self._last is not None:
            last_read, last_seen, inputs = self._last
            if last_read is read and last_seen is seen:
                return inputs
        rows = _rows(read, biased)
        source_rows = _rows(seen, biased)
        inputs = Inputs(rows, source_rows, self.ridge)
        self.flops += inputs.flops()
        self._last = (read, seen, inputs)
        return inputs


def _piece(number: int) -> str:
    """Name what is kept of a layer of the target."""
    return f"layer-{number}"


def _rows(inputs: Tensor, biased: bool) -> Tensor:
    """(t, i) of a module's inputs, with a constant 1 where it has a bias."""
    rows = inputs.flatten(0, -2)
    if not biased:
        return rows
    one_column = rows[:, :1]
    ones = torch.ones_like(one_column)
    return torch.cat([rows, ones], 1)


def fit(
    plan: Plan,
    ridge: float,
    source: OnDisk,
    target: OnDisk,
    written: Written,
    text: Calibration,
    folder: Path,
    kept: Kept,
    progress: Callable[[float, float], None],
) -> dict[str, Any]:
    """Fit the matrices that are written in `folder`; return what it took, for the record.

    Args:
        progress: called with (FLOPs done, FLOPs in all, estimated).
    """
    passes = _flops_of_passes(plan, text)
    fits = expected_flops(plan, text.fit.size)
    expected = passes + fits
    layers = plan.layers.target

    def tell(fitted: int) -> None:
        done = expected * fitted / layers
        progress(done, expected)

    tokens = torch.from_numpy(text.fit)
    with TemporaryDirectory(prefix="activations-", dir=folder) as scratch, torch.no_grad():
        fitting = Fitting(plan, ridge, source, target, written, Path(scratch), kept)
        fitting.run(tokens, tell)
    flops = fitting.paid + passes
    return {"steps": 0, "matrices": fitting.fitted, "flops": flops}


def _flops_of_passes(plan: Plan, text: Calibration) -> float:
    """FLOPs of a pass of the source, its layers once more for each of their copies, and one of the target."""
    length = text.fit.shape[1]
    layers = plan.layers
    once = flops_per_token(plan.source_config, length) / 3  # forward alone
    again = once * layers.target / layers.source
    grown = flops_per_token(plan.target_config, length) / 3
    per_token = once + again + grown
    return text.fit.size * per_token


def expected_flops(plan: Plan, tokens: int) -> float:
    """Estimate the FLOPs of the fits, before any is made: matrices of a layer that stand side by side in its
    schema and read the same axis are taken to read the same.
    """
    total = 0.0
    last = None
    for matrix in matrices(plan).values():
        weight = matrix.weight
        tensor = weight.tensor
        reads = tensor.reads.index(True)
        writes = tensor.reads.index(False)
        inputs = weight.shape[reads]
        outputs = weight.shape[writes]
        source_inputs = weight.maps[reads].source
        total += fit_flops(outputs, inputs, source_inputs)
        own = (tensor.layer, tensor.axes[reads])
        if own != last:
            total += sum_flops(tokens, inputs, source_inputs)
        last = own
    return total
