"""Which text, cut into which tokens. Plain values: nothing here imports a library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataSettings:
    """A corpus and its tokenizer; `conf/data/*.yaml` are its leaves. Fields of other corpora than the chosen one are not read."""

    name: str
    corpus: Literal["stdlib", "files", "hub"]
    folder: str | None = None  # where the tokens are kept; null: data/<name>
    path: str | None = None  # files: a folder, a file, or a glob (** crosses folders) of the suffixes in corpus.READERS
    dataset: str | None = None  # hub: owner/name, or a folder that `datasets` can read
    config: str | None = None  # hub
    split: str = "train"  # hub
    revision: str | None = None  # hub: pin a commit or tag, for a moved branch is not noticed once the tokens are there
    streaming: bool = True  # hub: read over the network, without a copy on disk
    column: str = "text"  # of a parquet file or dataset; the field of a jsonl line
    limit_documents: int | None = None  # read no more than these
    limit_tokens: int | None = None  # of both splits; the document that reaches it is the last
    tokenizer: str | None = None  # a folder or hub name; null: train a byte-level BPE on the training part
    vocab_size: int = 2048  # of the trained one
    model_max_length: int = 2048  # that the trained one states; a hint for its users, nothing is cut
    validation_fraction: float = 0.05  # of the documents
    seed: int = 0  # of the split
    shard_tokens: int = 2**28  # at most, in one file

    @property
    def home(self) -> Path:
        """The folder that holds the tokens."""
        return Path(self.folder or f"data/{self.name}").expanduser()


def disagreements(settings: DataSettings) -> list[str]:
    """What is wrong between well-typed values, one line each."""
    faults = []
    if settings.corpus == "files" and not settings.path:
        faults.append("data.path: missing; give a folder or a glob: data.path=texts or 'data.path=texts/**/*.md'")
    if settings.corpus == "hub" and not settings.dataset:
        faults.append("data.dataset: missing; give a name on the Hugging Face hub: data.dataset=owner/name")
    if not 0 < settings.validation_fraction < 1:
        faults.append(f"data.validation_fraction: must be between 0 and 1; found {settings.validation_fraction}")
    if settings.tokenizer is None and settings.vocab_size < 257:
        faults.append(f"data.vocab_size: must be at least 257, for 256 bytes and the end of text; found {settings.vocab_size}")
    for key in ("limit_documents", "limit_tokens", "shard_tokens", "model_max_length"):
        value = getattr(settings, key)
        if value is not None and value <= 0:
            faults.append(f"data.{key}: must be positive; found {value}")
    if settings.home.name in ("", ".."):
        faults.append(f"data.folder: must be a folder of its own; found {str(settings.home)!r}")
    return faults
