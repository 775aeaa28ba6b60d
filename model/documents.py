"""Documents packed end to end into one row and kept apart: what a `transformers` model takes so that no token
attends to another document.

The end-of-text token opens the document after it: a token attends to nothing before its document's opening,
and positions count from there.

Shapes: rows, the windows of a batch; context, the tokens of each; (rows context), all as one row, as
flash-attn takes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def documents_apart(
    tokens: Tensor, end_of_text: int, attention: str, masked: PretrainedConfig | None = None
) -> dict[str, Any]:
    """Compose the inputs of a forward pass under which no token attends to another document.

    transformers makes the masks of SDPA, FlexAttention and its eager attention from positions that restart.
    flash-attn knows no masks: it takes all documents as one row, and where each begins.

    Args:
        tokens: (rows, context).
        attention: a `transformers` attn_implementation.
        masked: the config of a class that does not look at positions; its masks are made here and handed
            over, one for each kind of layer.
    """
    positions = document_positions(tokens, end_of_text)
    if attention != "flash_attention_2":
        masks = {}
        if masked is not None:
            masks["attention_mask"] = document_masks(masked, positions)
        return {"input_ids": tokens, "position_ids": positions, **masks}
    starts = (positions.flatten() == 0).nonzero().flatten()
    end = starts.new_tensor([tokens.numel()])
    bounds = torch.cat((starts, end)).int()
    longest = tokens.shape[1]  # an upper bound does, and needs no waiting for the device
    rows = {"input_ids": tokens.reshape(1, -1)}
    rows["position_ids"] = positions.reshape(1, -1)
    return {
        **rows,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def document_masks(config: PretrainedConfig, positions: Tensor) -> Any:
    """The library's masks for documents whose positions (rows, context) restart, as it makes them for
    generation: one, or one for each kind of attention that the config lists, sliding windows included.
    """
    from transformers.masking_utils import create_masks_for_generate

    shape = (*positions.shape, 1)
    blank = torch.empty(shape, device=positions.device)  # whose shape and dtype alone count
    arguments: dict[str, Any] = {"attention_mask": None, "past_key_values": None}
    arguments["position_ids"] = positions
    return create_masks_for_generate(config=config.get_text_config(), inputs_embeds=blank, **arguments)


def document_positions(tokens: Tensor, end_of_text: int) -> Tensor:
    """Each token's place in its document, (rows, context): 0 at a row's start and at every `end_of_text`.

    `[5, 6, E, 7, E, E, 8]` → `[0, 1, 0, 1, 0, 0, 1]`.
    """
    length = tokens.shape[1]
    places = torch.arange(length, device=tokens.device)
    places = places.expand_as(tokens)
    ends = torch.where(tokens == end_of_text, places, 0)
    return places - ends.cummax(1).values
