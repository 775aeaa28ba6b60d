"""Samples: greedy continuations of fixed pieces of the validation text, so that two runs can be laid side by
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from outgrow.train.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from outgrow.train.data import TokenData

COUNT, PROMPT_TOKENS, NEW_TOKENS = 3, 16, 48


@dataclass(frozen=True)
class Sample:
    """A piece of the validation text, and how the network goes on."""

    prompt: str
    text: str


@torch.no_grad()
def samples(
    network: PreTrainedModel,
    data: TokenData,
    windows: Sequence[np.ndarray],
    accelerator: Accelerator,
) -> list[Sample]:
    """Continue the first tokens of some windows, spread over the validation text, greedily.

    Args:
        windows: validation batches, each (rows, context + 1).
    """
    rows = [row for batch in windows for row in batch]
    numbers = range(min(COUNT, len(rows)))
    count = len(rows)
    spread = [number * count // COUNT for number in numbers]
    chosen = np.stack([rows[number] for number in spread])
    context = chosen.shape[1] - 1
    length = min(PROMPT_TOKENS, context // 2)
    beginnings = torch.from_numpy(chosen[:, :length])
    prompts = beginnings.to(accelerator.device)
    model: Any = network
    training = model.training
    model.eval()
    # each length would be compiled anew
    with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
        written = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=min(NEW_TOKENS, context - length),
            do_sample=False,
            pad_token_id=data.end_of_text_id,
            eos_token_id=data.end_of_text_id,
        )
    model.train(training)
    decode: Any = load_tokenizer(str(data.tokenizer_folder)).decode
    continuations = []
    for row in written.tolist():
        text = decode(row[length:], skip_special_tokens=True)
        prompt = decode(row[:length])
        continuations.append(Sample(prompt, text))
    return continuations
