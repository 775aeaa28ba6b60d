"""The training objective as a module: token windows in, nats per token out, with or without the logits ever being whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions, functional

from model.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_TOKENS = 1024  # whose logits are held at a time by the fused loss
RESHAPED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # config keys of networks that change their logits after the head


class NextTokenLoss(nn.Module):
    """A language model with its loss on top, so that whatever wraps a forward pass (DDP, FSDP, autocast) wraps the loss too.

    Attributes:
        network: the Hugging Face model; its names and its weights are what is saved.
        fused: take the head and the cross-entropy together, `CHUNK_TOKENS` at a time. Of 51,200 entries and 8,192 tokens, the logits with
            their gradient are 3.4 GB in float32; here they are 0.2 GB.
    """

    def __init__(self, network: PreTrainedModel, *, fused: bool) -> None:
        super().__init__()
        self.network: Any = network
        self.fused = fused

    def forward(self, windows: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of each token after the first given those before it, in nats, computed in float32.

        Args:
            windows: token ids, (rows, context + 1).
            reduction: "mean" or "sum" over the rows · context predicted tokens.
        """
        inputs, targets = windows[:, :-1], windows[:, 1:].flatten()
        if self.fused:
            hidden = self.network.base_model(input_ids=inputs, use_cache=False).last_hidden_state
            return fused_cross_entropy(hidden.flatten(0, 1), self.network.get_output_embeddings(), targets, reduction)
        logits = self.network(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction=reduction)


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
    """Whether the loss of this network is taken fused: wherever its logits are the head's output and nothing more.

    Args:
        config: of the network, in Hugging Face's names.
        asked: train.loss, "auto", "fused" or "plain".

    Raises:
        UserError: "fused" is asked for where it would compute something else.
    """
    reshaping = [key for key in RESHAPED if config.get(key) is not None]
    if asked == "fused" and reshaping:
        raise UserError(f"train.loss=fused: this network changes its logits after the head ({', '.join(reshaping)}); use train.loss=auto")
    return asked != "plain" and not reshaping
