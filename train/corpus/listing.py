"""The documents of a prepared folder, in the order of their tokens: which text a token is of, and what
`inspect` draws."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from outgrow.model.base.files import whole_file
from outgrow.train.corpus.tokenise import Lengths
from outgrow.train.corpus.verdicts import scores_of
from outgrow.train.corpus.workshop import Workshop

LISTING = "documents.parquet"
SCHEMA = pyarrow.schema(
    [("document", "string"), ("split", "string"), ("tokens", "int64"), ("bytes", "int64"), ("score", "float")]
)


def write_listing(work: Workshop, folder: Path, lengths_of_tasks: Iterable[tuple[int, Lengths]]) -> None:
    """List what was taken of each task in a file in `folder`, whole or not at all."""
    with (
        whole_file(folder / LISTING) as partial,
        pyarrow.parquet.ParquetWriter(partial, SCHEMA, compression="zstd") as writer,
    ):
        for task, lengths in lengths_of_tasks:
            names = work.names(task)
            scores = scores_of(work, task)[lengths.row]
            columns = [
                [names[row].encode(errors="replace").decode() for row in lengths.row.tolist()],
                np.where(lengths.validation, "validation", "train").tolist(),
                lengths.tokens,
                lengths.bytes,
                pyarrow.array(scores, mask=np.isnan(scores)),
            ]
            writer.write_table(pyarrow.table(columns, schema=SCHEMA))
