"""From text to batches: documents → tokenizer → memory-mapped shards → windows, each a pure function of what came before.

settings  what is asked for      corpus  documents, streamed      tokenizer  trained or taken
shards    tokens on disk         build   `prepare`, built once    batches    windows of a step
mixture   several sources as one   synthetic/   text made offline   writing/   text by a language model
"""

from __future__ import annotations

from outgrow.train.data.build import prepare
from outgrow.train.data.settings import DataSettings
from outgrow.train.data.shards import TokenData, TokenSplit, open_data
from outgrow.train.data.tokenizer import check_vocabulary

__all__ = ["DataSettings", "TokenData", "TokenSplit", "check_vocabulary", "open_data", "prepare"]
