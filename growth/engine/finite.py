"""Refusal of weights that are not finite: a growth would carry one NaN into every copy and into the
logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outgrow.growth.engine.bits import EXPONENT, all_finite
from outgrow.growth.engine.rows import Reader
from outgrow.model.base.errors import UserError


@dataclass(frozen=True, eq=False)
class FiniteReader:
    """A reader that refuses entries that are not finite as it reads them."""

    reader: Reader
    dtypes: Mapping[str, str]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows `start:stop` of a tensor as raw bits, counted as the reader counts them.

        Raises:
            UserError: one of them holds a NaN or an infinity.
        """
        raw = self.reader.read(name, start, stop)
        dtype = self.dtypes[name]
        if dtype not in EXPONENT or all_finite(raw, dtype):  # integers are copied by a growth without schema
            return raw
        unsigned = raw.dtype.type
        largest = np.iinfo(raw.dtype).max
        without_sign = unsigned(largest >> 1)
        magnitude = raw & without_sign
        infinity = EXPONENT[dtype]
        places = np.argwhere(magnitude >= infinity)
        row, *others = places[0]
        is_infinite = magnitude[(row, *others)] == infinity
        coordinates = (row + start, *others)
        position = ", ".join(map(str, coordinates))
        kind = "infinite" if is_infinite else "NaN"
        raise UserError(
            f"{name}: entry [{position}] is {kind}; every copy of it would be too, so nothing is grown: "
            "repair the source, or say nonfinite=allow to copy it as it is"
        )
