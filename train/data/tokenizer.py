"""Text to token ids: a byte-level BPE of one's own, or any tokenizer that Hugging Face knows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from outgrow.train.data.shards import TokenData

END_OF_TEXT = "<|endoftext|>"
TRAIN = "train"  # as data.tokenizer: train one, even beside a source that has its own
# characters that a tokenizer is trained on in one piece, where nothing interrupts them: training takes their
# square
LONGEST_RUN = 1024
_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}(?=\S)|\s{{{LONGEST_RUN}}}(?=\s)")
# classes of tokenizer_config.json that are no model's own
PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, model_max_length: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE (GPT-2's kind): any text can be spelt, and decoding gives it back.

    Args:
        texts: read once, in any order; the result is the same.
        vocab_size: at most; a small text gives fewer entries. Id 0 is the end of text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = chain.from_iterable(map(_bounded, texts))
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=model_max_length,
    )


def _bounded(text: str) -> Iterator[str]:
    """A text in pieces without longer runs than LONGEST_RUN; ordinary text in one."""
    start = 0
    for run in _RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def import_library(name: str | None) -> None:
    """Import what loading the tokenizer `name` needs, or training one, which takes a second or more."""
    if name is None or _is_plain(name):
        from transformers import PreTrainedTokenizerFast  # noqa: F401
    else:
        from transformers import AutoTokenizer  # noqa: F401


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or of a model on the hub; no code of theirs is run.

    Raises:
        UserError: it cannot be reached, has no end-of-text token, or no fast form.
    """
    from transformers import PreTrainedTokenizerFast

    source = str(_folder(name) or name)
    try:
        if _is_plain(name):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the hub's client each raise their own
        raise UserError(
            f"data.tokenizer={name}: cannot be loaded ({first_line(error)}); give a folder with tokenizer "
            f"files, or a name on the Hugging Face hub that can be reached; data.tokenizer={TRAIN} trains one"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"data.tokenizer={name}: it has no fast form (tokenizer.json); convert it, or train one "
            f"(data.tokenizer={TRAIN})"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer={name}: it has no eos token to end a document with; set one in its "
            "tokenizer_config.json"
        )
    return tokenizer


def _is_plain(name: str) -> bool:
    """Check for a folder with a tokenizer of no model's own class and without a model. AutoTokenizer reads it
    as PreTrainedTokenizerFast does, but its import is that of torch, which takes longer than all the rest.
    """
    folder = _folder(name)
    if folder is None or (folder / "config.json").exists():
        return False
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return settings["tokenizer_class"] in PLAIN and "auto_map" not in settings
    except (OSError, ValueError, LookupError, TypeError):
        return False  # AutoTokenizer tells what is wrong


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained` reads.

    Raises:
        OSError: it cannot be written; `tokenizers` itself raises a bare Exception.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error)) from error


@dataclass(frozen=True)
class Encoder:
    """Turns documents into ids: what the tokenizer's own call puts in front, the text, the end of text.

    A special token that stands in a text is the text it is, for every kind of tokenizer: only an encoder ends
    a document.
    """

    tokenizer: Tokenizer
    front: tuple[int, ...]
    end: int
    literal: dict[int, tuple[int, ...]]  # special id → the ids of its spelling

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[*self.front, *self._plain(encoding.ids), self.end] for encoding in encodings]

    def _plain(self, ids: list[int]) -> list[int]:
        if self.literal.keys().isdisjoint(ids):
            return ids
        plain: list[int] = []
        for number in ids:
            plain += self.literal.get(number, (number,))
        return plain


def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """The encoder of a tokenizer."""
    return read_encoder(write_encoder(tokenizer))


def write_encoder(tokenizer: PreTrainedTokenizerFast) -> str:
    """The text that `read_encoder` reads, in another process perhaps."""
    special: dict[str, int] = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special[token.content] = number
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    special |= {str(name): int(number) for name, number in named}
    unknown_name = str(tokenizer.unk_token)
    unknown = tokenizer.unk_token_id
    if unknown != tokenizer.eos_token_id:
        special.pop(unknown_name, None)  # stands for text that has no other token
    if unknown_name in special:
        unknown = None
    vocabulary = tokenizer.get_vocab()
    literal = {}
    for content, number in special.items():
        literal[number] = _spelling(content, vocabulary, special, unknown)
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return json.dumps(
        {
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "front": _before(plain, ids),
            "end": tokenizer.eos_token_id,
            "literal": list(literal.items()),
        }
    )


def _before(part: list[int], ids: list[int]) -> list[int]:
    """The ids in front of `part`; none where it is not among them."""
    for start in range(len(ids)):
        end = start + len(part)
        if ids[start:end] == part:
            return ids[:start]
    return []


def _spelling(
    content: str, vocabulary: dict[str, int], special: dict[str, int], unknown: int | None
) -> list[int]:
    """The ids of a special token's characters, the longest pieces first; bytes where a character has none."""
    ids: list[int] = []
    start = 0
    while start < len(content):
        ends = range(len(content), start, -1)
        pieces = (content[start:end] for end in ends)
        candidates = (piece for piece in pieces if piece in vocabulary and piece not in special)
        piece = next(candidates, None)
        if piece:
            ids.append(vocabulary[piece])
            start += len(piece)
            continue
        for byte in content[start].encode():
            number = vocabulary.get(f"<0x{byte:02X}>", unknown)
            if number is not None:
                ids.append(number)
        start += 1
    return ids


def read_encoder(text: str) -> Encoder:
    """The encoder that `write_encoder` wrote; it takes texts whole."""
    from tokenizers import Tokenizer

    values = json.loads(text)
    tokenizer = Tokenizer.from_str(values["tokenizer"])
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    literal = {number: tuple(ids) for number, ids in values["literal"]}
    front = tuple(values["front"])
    return Encoder(tokenizer, front, values["end"], literal)


def entries(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id: what a model's embedding needs, holes and added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def described(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The entry of a tokenizer in the manifest of a token folder."""
    return {
        "sha256": tokenizer_hash(tokenizer),
        "vocab_size": entries(tokenizer),
        "end_of_text_id": tokenizer.eos_token_id,
    }


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A fingerprint of everything that decides how text becomes tokens."""
    text = tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_stamp(name: str | None) -> Any:
    """Sizes and times of a tokenizer's files, by which a change of it is known before it is loaded; a hub
    name stands for itself."""
    folder = None if name is None else _folder(name)
    if folder is None:
        return name
    states = [path.stat() for path in sorted(folder.glob("*")) if path.name in FILES]
    return [[state.st_size, state.st_mtime_ns] for state in states]


def tokenizer_identity(name: str | None) -> str | None:
    """A fingerprint of how a folder's tokenizer, which may change under the same `name`, cuts text and ends
    it; a hub name stands for itself."""
    if name is None or _folder(name) is None:
        return name
    tokenizer = load_tokenizer(name)
    text = f"{tokenizer_hash(tokenizer)} {tokenizer.eos_token}"
    return hashlib.sha256(text.encode()).hexdigest()


def has_tokenizer(folder: Path) -> bool:
    """Check whether a folder holds any tokenizer's files."""
    return any((folder / name).is_file() for name in FILES)


def check_vocabulary(data: TokenData, vocab_size: int) -> None:
    """Refuse a model whose embedding has fewer rows than the tokenizer has ids.

    Raises:
        UserError: it has.
    """
    if data.vocab_size > vocab_size:
        raise UserError(
            f"data: the tokenizer has {data.vocab_size} entries, the model's vocab_size is {vocab_size}; "
            "give the tokenizer that the model was trained with (data.tokenizer=FOLDER; where the "
            "source's folder has none, one is trained here), a smaller data.vocab_size for one that is "
            "trained here, or a larger model"
        )


def _folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None
