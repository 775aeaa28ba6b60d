"""A text as a vector: the mean of the last hidden states of any Hugging Face model over the text's first
tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.model.base.errors import UserError, first_line
from outgrow.model.base.quiet import quietly

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 2**13  # in one forward pass
WINDOW = 512  # tokens that see each other, at most


@dataclass(frozen=True)
class Encoder:
    """A loaded model: a causal language model (the source checkpoint itself will do), an encoder, or the
    encoder of a model with both."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int  # that are read of a text
    device: torch.device
    digest: str  # of weights and tokenizer

    @property
    def dimensions(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def window(self) -> int:
        """Tokens in one piece of a text; longer texts are read in several."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return min(WINDOW, positions or WINDOW)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The mean over a text's tokens: float32 (texts, dimensions); a text without a token is all zeros."""
        pieces: list[tuple[int, list[int]]] = []
        window = self.window
        for row, text in enumerate(texts):
            cut = self.tokenizer(text, add_special_tokens=False, verbose=False)
            ids = cut["input_ids"][: self.max_tokens]
            starts = range(0, len(ids), window)
            own = [ids[start : start + window] for start in starts]
            pieces += [(row, piece) for piece in own]
        rows = len(texts)
        total = np.zeros((rows, self.dimensions))
        count = np.zeros(rows)
        lengths = [len(ids) for _, ids in pieces]
        for batch in _batches(lengths):
            chosen = [pieces[number] for number in batch]
            sums = self._sums([ids for _, ids in chosen])
            for (row, ids), values in zip(chosen, sums, strict=True):
                total[row] += values
                count[row] += len(ids)
        means = total / np.maximum(count, 1)[:, None]
        return means.astype(np.float32)

    def _sums(self, ids: list[list[int]]) -> np.ndarray:
        import torch

        width = max(map(len, ids))
        masks = []
        padded = []
        for row in ids:
            gap = [0] * (width - len(row))
            padded.append(row + gap)
            ones = [1] * len(row)
            masks.append(ones + gap)
        mask = torch.tensor(masks, device=self.device)
        tokens = torch.tensor(padded, device=self.device)
        with torch.inference_mode():
            output = self.model(input_ids=tokens, attention_mask=mask)
            states = output.last_hidden_state.float()
            sums = (states * mask[..., None]).sum(1)
        if not bool(torch.isfinite(sums).all()):
            raise UserError("the encoder's hidden states are not finite; choose another encoder=")
        return sums.cpu().numpy()


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Pieces that share a forward pass: alike in length, at most BATCH_TOKENS with their padding."""
    batches: list[list[int]] = []
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = (len(batch) + 1) * lengths[number]
        if not batches or padded > BATCH_TOKENS:
            batch = []
            batches.append(batch)
        batch.append(number)
    return batches


def load_encoder(name: str, revision: str | None, max_tokens: int) -> Encoder:
    """A model and its tokenizer, from a folder or the hub, its weights in safetensors; no code of theirs is
    run.

    Raises:
        UserError: it cannot be reached or read, or lacks weights.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            loaded: Any = AutoModel.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
            )
    except Exception as error:  # transformers, safetensors and the hub's client each raise their own
        raise UserError(
            f"encoder={name}: cannot be loaded ({first_line(error)}); give a folder with config.json, "
            "model.safetensors and its tokenizer, or a name on the Hugging Face hub that can be reached"
        ) from error
    model, report = loaded
    # the pooler comes after the hidden states
    drawn = {key for key in report["missing_keys"] if not key.startswith("pooler.")}
    if drawn or report["mismatched_keys"]:
        raise UserError(
            f"encoder={name}: {len(drawn)} weights are missing, such as {min(drawn, default='')}; give a "
            "complete checkpoint"
        )
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model.config.use_cache = False  # keys and values that nobody reads again
    device = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    )
    assert device is not None
    placed = model.to(device).eval()
    digest = _digest(model, tokenizer)
    return Encoder(placed, tokenizer, max_tokens, device, digest)


def _digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of tokenizer and weights, without the pooler."""
    text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("pooler."):
            values = tensor.detach().cpu().contiguous().numpy()
            digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()


def card(encoder: Encoder, name: str, revision: str | None) -> dict[str, Any]:
    """The facts that a filter has to remember of its encoder."""
    return {
        "encoder": name,
        "revision": revision,
        "max_tokens": encoder.max_tokens,
        "pooling": "mean of the last hidden states",
        "window": encoder.window,
        "dimensions": encoder.dimensions,
        "sha256": encoder.digest,
    }


def load_again(embedding: dict[str, Any], instead: str | None = None) -> Encoder:
    """The encoder that a card tells of, or `instead` of where it was.

    Raises:
        UserError: it cannot be loaded, or is not the same.
    """
    name = instead or str(embedding["encoder"])
    revision = embedding["revision"] if instead is None else None
    encoder = load_encoder(name, revision, int(embedding["max_tokens"]))
    digest = encoder.digest
    expected = embedding["sha256"]
    if digest != expected:
        raise UserError(
            f"encoder {name}: not the one that the filter was fitted on (sha256 {digest[:12]}…, expected "
            f"{str(expected)[:12]}…); name its place with encoder=FOLDER, or fit the filter again"
        )
    return encoder
