"""Real text for a receipt: windows of a file in the source's own tokens, and greedy continuations of some of
its places.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError, in_one_line, reading

if TYPE_CHECKING:
    import torch

ROWS, LENGTH = 4, 256  # windows whose logits are compared, and tokens of each
PROMPTS, PROMPT, NEW = 10, 24, 24  # places that are continued, tokens before each, and tokens written
LEAST = PROMPT + PROMPTS  # tokens that a text must have
KEY = "receipt.text"  # the setting that names the text
WAY = "put the model's tokenizer files there, or leave receipt.text out: random tokens need none"
MOST_BYTES = 16 << 20  # of the file that are read


@dataclass(frozen=True)
class Continuation:
    """The end of a prompt, and how both models go on: at each place the likeliest token."""

    prompt: str
    source: str
    target: str

    @property
    def is_same(self) -> bool:
        return self.source == self.target


@dataclass(frozen=True, repr=False)
class Passage:
    """A text in the source's tokens.

    Attributes:
        name: of the file, for messages.
        windows: (row, position) spread evenly over it, for logits and perplexity.
        prompts: (prompt, position) spread evenly over it, to be continued.
        decode: from tokens to text.
    """

    name: str
    windows: list[list[int]]
    prompts: list[list[int]]
    decode: Callable[[Sequence[int]], str]

    def laid_side_by_side(self, source: torch.Tensor, target: torch.Tensor) -> tuple[Continuation, ...]:
        """The continuations of both models, (prompt, position) each, as text."""
        before = source.tolist()
        after = target.tolist()
        rows = zip(self.prompts, before, after, strict=True)
        return tuple(Continuation(*map(self.decode, row)) for row in rows)


def read_passage(file: str | Path, source: Path, vocabulary: int, context: int | None) -> Passage:
    """The text of `file` in the tokens of the tokenizer in the folder `source`.

    Args:
        vocabulary: size of the model's.
        context: positions that the model has; None where nothing bounds them.

    Raises:
        UserError: the file is no text, or too short; the source has no tokenizer, or one of other tokens than
            the model's.
    """
    path = Path(file).expanduser()
    text = text_of(path)
    tokenizer = tokenizer_of(source)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # the library makes an empty tokenizer where there are no files of one
    if text.strip() and len(set(tokens)) < 2:
        raise UserError(f"receipt.text: the folder {source} has no tokenizer that knows this text; {WAY}")
    if len(tokens) < LEAST:
        raise UserError(
            f"receipt.text {str(path)!r}: has {len(tokens)} tokens; give a text of at least {LEAST}, "
            "better some thousands"
        )
    if max(tokens) >= vocabulary:
        raise UserError(
            f"receipt.text: the tokenizer in {source} gives token {max(tokens)}, and the model has "
            f"{vocabulary}; is it another model's?"
        )
    most = context or LENGTH
    window = min(LENGTH, len(tokens), most)
    prompt = min(PROMPT, max(1, window - NEW))
    windows = _spread(tokens, ROWS, window)
    prompts = _spread(tokens, PROMPTS, prompt)
    return Passage(str(file), windows, prompts, tokenizer.decode)


def text_of(path: Path, key: str = KEY) -> str:
    """The text at the beginning of a file; `key` is the setting that names it, for messages.

    Raises:
        UserError: it cannot be read, or is no text in UTF-8.
    """
    if not path.is_file():  # a pipe would be waited on for ever
        raise UserError(f"{key} {str(path)!r}: no such file; give a plain text file")
    with reading(path), path.open("rb") as opened:
        content = opened.read(MOST_BYTES)
    try:
        # a long file is cut within a character
        decoder = getincrementaldecoder("utf-8")()
        text = decoder.decode(content, final=len(content) < MOST_BYTES)
    except UnicodeDecodeError as fault:
        raise UserError(
            f"{key} {str(path)!r}: is no text in UTF-8 ({fault.reason} at byte {fault.start:,})"
        ) from None
    if "\0" in text:
        raise UserError(f"{key} {str(path)!r}: holds zero bytes, so it is no text; give a plain text file")
    return text


def tokenizer_of(source: Path, key: str = KEY) -> Any:
    """The tokenizer in a folder; `key` is the setting that needs it, for messages.

    Raises:
        UserError: none could be loaded.
    """
    from transformers import AutoTokenizer

    from outgrow.model.base.quiet import quietly

    try:
        with quietly():
            return AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    except Exception as fault:  # the library raises every kind
        raise UserError(
            f"{key}: no tokenizer could be loaded from {source} ({in_one_line(fault)}); "
            + (WAY if key == KEY else "put the model's tokenizer files there")
        ) from None


def _spread(tokens: list[int], count: int, length: int) -> list[list[int]]:
    """Cut up to `count` stretches of that length, from the first tokens to the last, none of them twice."""
    last = len(tokens) - length
    gaps = max(count - 1, 1)
    starts = sorted({number * last // gaps for number in range(count)})
    return [tokens[start : start + length] for start in starts]


def continued(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """The `NEW` likeliest next tokens of each prompt, one after the other: (prompt, position) → (prompt,
    new).

    The model's own generation config is put aside: penalties and an end of text would hide what the logits
    say.
    """
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    everything = torch.ones_like(prompts)
    written = model.generate(input_ids=prompts, attention_mask=everything)
    return written[:, prompts.shape[1] :]
