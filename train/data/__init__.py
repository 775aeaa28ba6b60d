"""Data that training reads: token shards, windows of them as batches, several sources as one. Text is made by
train/corpus.

settings   what is asked for       shards     tokens on disk, and their manifest
batches    windows of a step       mixture    several sources as one
tokenizer  trained or taken        pretokenized   tokens that others made, token_files their formats
"""

from __future__ import annotations

from outgrow.train.data.settings import DataSettings
from outgrow.train.data.shards import TokenData, TokenSplit, open_data
from outgrow.train.data.tokenizer import check_vocabulary

__all__ = ["DataSettings", "TokenData", "TokenSplit", "check_vocabulary", "open_data"]
