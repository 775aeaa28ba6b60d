"""The training objective as a module: token windows in, nats per token out, with or without the logits ever being whole.

Documents are packed end to end into windows. Where they are to be kept apart, the end-of-text token opens the document after it: a token
attends to nothing before its document's opening, and positions count from there. Every token is still predicted, the first of a document
from its opening alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions, functional

from model.errors import UserError
from train.router import Balance, Losses, balanced_forward, has_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from train.settings import LoopSettings

CHUNK_TOKENS = 1024  # whose logits are held at a time by the fused loss
RESHAPED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # config keys of networks that change their logits after the head
UNMASKED = ("opt",)  # model types whose library class does not tell documents apart by their positions


class NextTokenLoss(nn.Module):
    """A language model with its loss on top, so that whatever wraps a forward pass (DDP, FSDP, autocast) wraps the loss too.

    Attributes:
        network: the Hugging Face model; its names and its weights are what is saved.
        fused: take the head and the cross-entropy together, `CHUNK_TOKENS` at a time. Of 51,200 entries and 8,192 tokens, the logits with
            their gradient are 3.4 GB in float32; here they are 0.2 GB.
        end_of_text: the id that opens a document; None lets attention cross documents.
    """

    def __init__(self, network: PreTrainedModel, *, fused: bool, end_of_text: int | None = None) -> None:
        super().__init__()
        self.network: Any = network
        self.fused, self.end_of_text, self.routed = fused, end_of_text, has_routers(network)

    def forward(self, windows: Tensor, reduction: str = "mean") -> Any:
        """Cross-entropy of each token after the first given those before it, in nats, computed in float32.

        While a mixture of experts trains, its routers' load-balancing term stands beside it (`Losses`); it is never in a validation loss.

        Args:
            windows: token ids, (rows, context + 1).
            reduction: "mean" or "sum" over the rows · context predicted tokens.
        """
        targets = windows[:, 1:].flatten()
        if self.training and self.routed:
            seen, balance = balanced_forward(self.network, self.inputs(windows), logits=not self.fused)
            if self.fused:
                return balanced(self.from_hidden(seen.flatten(0, 1), targets, reduction), balance, targets, reduction)
            text = functional.cross_entropy(seen.float().flatten(0, 1), targets, reduction=reduction)
            return balanced(text, balance, targets, reduction)
        if self.fused:
            return self.from_hidden(self.hidden(windows).flatten(0, 1), targets, reduction)
        logits = self.network(**self.inputs(windows), use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction=reduction)

    def inputs(self, windows: Tensor) -> dict[str, Any]:
        """What the network takes: all tokens but the last of each window, documents apart where they are to be."""
        tokens = windows[:, :-1]
        if self.end_of_text is None:
            return {"input_ids": tokens}
        return documents_apart(tokens, self.end_of_text, self.network.config._attn_implementation)

    def hidden(self, windows: Tensor) -> Tensor:
        """What the head reads, (rows, context, hidden)."""
        return self.network.base_model(**self.inputs(windows), use_cache=False).last_hidden_state

    def from_hidden(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy from what the head reads, (tokens, hidden), without the logits ever being whole."""
        return fused_cross_entropy(hidden, self.network.get_output_embeddings(), targets, reduction)


def balanced(text: Tensor, balance: Balance | None, targets: Tensor, reduction: str, taught: Tensor | None = None) -> Any:
    """The text's loss with the load-balancing term, which weighs as many tokens as the text does.

    Args:
        taught: the objective without the term, where that is not the text's loss alone.
    """
    objective = text if taught is None else taught
    if balance is None:
        return text if taught is None else (objective, text)
    weight = len(targets) if reduction == "sum" else 1
    return Losses(objective + weight * balance.weighted, text, weight * balance.plain)


def build_loss(network: PreTrainedModel, config: Mapping[str, Any], settings: LoopSettings, end_of_text: int) -> NextTokenLoss:
    """The objective that `settings` ask for, `check_loss` having found it possible."""
    return NextTokenLoss(network, fused=fuses(config, settings.loss), end_of_text=end_of_text if settings.document_mask else None)


def documents_apart(tokens: Tensor, end_of_text: int, attention: str) -> dict[str, Any]:
    """What a forward pass takes so that no token attends to another document.

    transformers makes the masks of SDPA, FlexAttention and its eager attention from positions that restart. flash-attn knows no masks: it
    takes all documents as one row, and where each begins.

    Args:
        tokens: (rows, context).
        attention: a `transformers` attn_implementation.
    """
    positions = document_positions(tokens, end_of_text)
    if attention != "flash_attention_2":
        return {"input_ids": tokens, "position_ids": positions}
    starts = (positions.flatten() == 0).nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([tokens.numel()]))).int()
    longest = tokens.shape[1]  # an upper bound does, and needs no waiting for the device
    rows = {"input_ids": tokens.reshape(1, -1), "position_ids": positions.reshape(1, -1)}
    return {**rows, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def document_positions(tokens: Tensor, end_of_text: int) -> Tensor:
    """Each token's place in its document, (rows, context): 0 at a row's start and at every `end_of_text`.

    `[5, 6, E, 7, E, E, 8]` → `[0, 1, 0, 1, 0, 0, 1]`.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return places - torch.where(tokens == end_of_text, places, 0).cummax(1).values


def fused_cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor, reduction: str) -> Tensor:
    """`cross_entropy(head(hidden), targets)` without the logits of more than `CHUNK_TOKENS` tokens in memory.

    The operands are float32 also under autocast (on a GPU, TF32 multiplies them): of bfloat16 ones, torch 2.13 returns the loss rounded to
    bfloat16, which is 1 % off.

    Args:
        hidden: (tokens, hidden).
        targets: (tokens,).
    """
    bias = None if head.bias is None else head.bias.float()
    options = LinearCrossEntropyOptions(batch_chunk_size=min(CHUNK_TOKENS, len(targets)))
    return functional.linear_cross_entropy(
        hidden.float(), head.weight.float(), targets, linear_bias=bias, reduction=reduction, options=options
    )


def fuses(config: Mapping[str, Any], asked: str) -> bool:
    """Whether the loss of this network is taken fused: where it is not asked for as "plain", and the logits are the head's output alone.

    Args:
        config: of the network, in Hugging Face's names.
        asked: train.loss.
    """
    return asked != "plain" and not reshaping(config)


def check_loss(config: Mapping[str, Any], settings: LoopSettings, device: torch.device) -> None:
    """Refuse what cannot be computed as `settings` ask for it.

    Raises:
        UserError: the fused loss, the document mask or the attention's backward pass cannot be had.
    """
    faults = []
    if settings.attention == "flex_attention" and device.type == "cpu":
        faults.append("train.attention=flex_attention: PyTorch has no backward pass of it on a CPU; use sdpa")
    if settings.loss == "fused" and (keys := reshaping(config)):
        faults.append(f"train.loss=fused: this network changes its logits after the head ({', '.join(keys)}); use train.loss=auto")
    if settings.document_mask and config["model_type"] in UNMASKED:
        faults.append(f"train.document_mask: the library's {config['model_type']} does not keep documents apart; use false")
    UserError.collect(faults)


def reshaping(config: Mapping[str, Any]) -> list[str]:
    """The config keys by which a network changes its logits after the head."""
    return [key for key in RESHAPED if config.get(key) is not None]
