"""The rows of each batch that a process computes, and their micro-batches."""

from __future__ import annotations

from dataclasses import dataclass


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
        begin = rows * process // processes
        end = rows * (process + 1) // processes
        own = range(begin, end)
        most = -(-rows // processes)
        size = min(micro_batch or most, most)
        begins = range(0, most, size)
        pieces = [own[begin : begin + size] for begin in begins]
        return cls(own, tuple(pieces))
