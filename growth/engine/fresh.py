"""Fresh entries of a target tensor, drawn by name and position.

Shapes: see `growth.engine.execute`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from outgrow.growth.decision import Finish, Step
from outgrow.growth.engine.bits import lookup, normal_bits
from outgrow.growth.engine.rows import Format, SourceRows
from outgrow.growth.engine.seeding import Draws, normal
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.plan import Plan
from outgrow.model.dtypes import is_short
from outgrow.model.starts import Start


@dataclass(frozen=True, eq=False)
class Fresh:
    """The entries of one target tensor that come from no source, as the library's class starts them.

    Attributes:
        matrix: (M, N) of the target.
        column_map: of the target's columns.
        source: the rows whose root mean square fresh entries are drawn at, where the plan says so.
    """

    plan: Plan
    step: Step
    format: Format
    matrix: tuple[int, int]
    column_map: AxisMap
    source: SourceRows
    _streams: dict[str, Draws] = field(default_factory=dict)

    def numbers(self, part: str, width: int, rows: np.ndarray) -> np.ndarray:
        """(len(rows), width) random 32-bit numbers that depend on seed, tensor, part and position alone."""
        stream = self._stream(part, width, np.uint32)
        return stream.of(rows)

    def _stream(self, part: str, width: int, kind: type[np.unsignedinteger]) -> Draws:
        """Random integers of one part of the tensor, row by row; the same stream at every call."""
        if part not in self._streams:
            seed = self.plan.growth.seed
            name = self.step.name
            self._streams[part] = Draws(width, kind, seed, name, part)
        return self._streams[part]

    @property
    def offset(self) -> float:
        """The number that the module adds to the stored scale of a norm (not to its bias)."""
        tensor = self.step.tensor
        return 0.0 if tensor.is_bias else tensor.line.offset

    @cached_property
    def zero(self) -> np.ndarray:
        """(1,) a true zero as it is stored, raw."""
        return self._constant(0.0)

    def _constant(self, value: float) -> np.ndarray:
        """Encode a true value as it is stored."""
        stored_value = value - self.offset
        stored = np.full(1, stored_value)
        return self.format.encoded(stored)

    @cached_property
    def columns(self) -> np.ndarray:
        """(N,) mask of the columns that are fresh."""
        return self.column_map.fill == Fill.RANDOM

    @cached_property
    def column_count(self) -> int:
        return int(self.columns.sum())

    def entries(self, part: str, rows: np.ndarray, width: int) -> np.ndarray:
        """Initialise raw entries as the library's class does: norm scales 1, biases 0, else normal, where the
        plan says so at the source's root mean square.

        They depend on seed, tensor, part ("rows" or "columns") and position alone: (b, width).
        """
        start = self.plan.starts.get(self.step.name)
        if start is not None and start.places is not None:
            return self._placed(start.places, part, rows)
        constant = self._same_everywhere(start)
        if constant is not None:
            shape = (len(rows), width)
            return np.broadcast_to(constant, shape)
        short = is_short(self.format.dtype)
        kind = np.uint16 if short else np.uint32
        finish = self.step.finish or Finish()
        alike = rows // finish.alike
        stream = self._stream(part, width, kind)
        draws = stream.of(alike)
        deviation = finish.deviation
        if deviation is None and start is not None:
            mean, deviation = start.normal or (None, None)
            if mean != 0:  # not a normal distribution around zero
                return self._drawn(start, draws)
        if deviation is None:
            deviation = self._deviation
        may_match = self.plan.fresh == "match" and self.step.source is not None
        if may_match and finish.deviation is None:
            deviation = self.source.root_mean_square or deviation
        if short:
            table = normal_bits(deviation, self.format.dtype)
            return lookup(table, draws)
        values = normal(draws) * deviation
        return self.format.rounded(values)

    def _same_everywhere(self, start: Start | None) -> np.ndarray | None:
        """(1,) the raw entry of a tensor that starts with one number throughout; None of others."""
        if start is not None:
            is_constant = len(start.quantiles) == 1
            return self.format.encoded(start.quantiles) if is_constant else None
        tensor = self.step.tensor
        if tensor.is_bias:
            return self._constant(0.0)
        is_norm = tensor.line.kind.endswith("norm")
        return self._constant(1.0) if is_norm else None

    @property
    def _deviation(self) -> float:
        config = self.plan.growth.target_config
        family = self.plan.family
        return family.init_deviation(config, self.step.tensor)

    def _placed(self, places: np.ndarray, part: str, rows: np.ndarray) -> np.ndarray:
        """Encode entries that the class gives by their place in the tensor: (b, width)."""
        entries = places.reshape(self.matrix)
        entries = entries[rows]
        if part == "columns":
            entries = entries[:, self.columns]
        return self.format.encoded(entries)

    def _drawn(self, start: Start, draws: np.ndarray) -> np.ndarray:
        """Turn random integers into entries of a distribution that is not normal around 0."""
        bits = 8 * draws.itemsize
        shares = (draws + 0.5) / 2.0**bits
        values = start.of(shares)
        return self.format.rounded(values)
