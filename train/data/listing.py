"""The documents of a prepared folder, in the order of their tokens: which text a token is of, and what `inspect` draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from outgrow.model.base.files import whole_file
from outgrow.train.data.blocks import Workshop
from outgrow.train.data.judge import scores_of
from outgrow.train.data.pack import Lengths

LISTING = "documents.parquet"
SCHEMA = pyarrow.schema([("document", "string"), ("split", "string"), ("tokens", "int64"), ("bytes", "int64"), ("score", "float")])


class Listing:
    """Appends what was kept of each block."""

    def __init__(self, work: Workshop, writer: pyarrow.parquet.ParquetWriter) -> None:
        self._work, self._writer = work, writer

    def add(self, number: int, taken: Lengths) -> None:
        names, scores = self._work.names(number), scores_of(self._work, number)[taken.row]
        columns = [
            [names[row].encode(errors="replace").decode() for row in taken.row.tolist()],
            np.where(taken.validation, "validation", "train").tolist(),
            taken.tokens,
            taken.bytes,
            pyarrow.array(scores, mask=np.isnan(scores)),
        ]
        self._writer.write_table(pyarrow.table(columns, schema=SCHEMA))


@contextmanager
def listing(work: Workshop, target: Path) -> Iterator[Listing]:
    """The file `target`, whole when the block ends well."""
    with whole_file(target) as partial, pyarrow.parquet.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        yield Listing(work, writer)
