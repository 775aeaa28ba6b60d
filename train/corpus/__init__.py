"""Token shards from text, as steps of datatrove's in the order of pipeline.py: that file is the whole way,
read top to bottom.

read/       files, datasets and generators, as documents
normalise   one spelling
duplicates  exact and near
across      near copies of validation text in training, told
benchmarks  overlaps with tests
filter/     the educational filter
tokenise    ids of each document, and their shards
workshop    where all this lies until it is done
verdicts    what became of each document
executors   this machine, Slurm or Ray
workers     processes on this machine
build       `prepare`: built once, whole or absent

Training reads what this writes (train/data) and needs none of it.
"""

from __future__ import annotations

from outgrow.train.corpus.build import prepare

__all__ = ["prepare"]
