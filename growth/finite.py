"""Weights that are not finite: a grown model would carry one NaN into every copy, and its logits with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model.errors import UserError

from .execute import Reader

# All exponent bits set mean NaN or infinity in every format; the sign is masked away.
_EXPONENT = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


@dataclass(frozen=True, eq=False)
class FiniteReader:
    """A reader that refuses what is not finite, as it is read."""

    reader: Reader
    dtypes: Mapping[str, str]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of a tensor as raw bits.

        Raises:
            UserError: one of them holds a NaN or an infinity.
        """
        raw = self.reader.read(name, start, stop)
        if self.dtypes[name] not in _EXPONENT:
            return raw  # whole numbers, which a growth without schema copies
        exponent = raw.dtype.type(_EXPONENT[self.dtypes[name]])
        magnitude = raw & raw.dtype.type(np.iinfo(raw.dtype).max >> 1)
        if magnitude.size and magnitude.max() >= exponent:
            where = np.argwhere(magnitude >= exponent)[0]
            place = ", ".join(map(str, (where[0] + start, *where[1:])))
            kind = "infinite" if magnitude[tuple(where)] == exponent else "NaN"
            raise UserError(
                f"{name}: entry [{place}] is {kind}; every copy of it would be too, so nothing is grown: repair the source, or say "
                "nonfinite=allow to copy it as it is"
            )
        return raw
