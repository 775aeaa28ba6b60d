"""The training objective as a module: token windows in, nats per token out, with or without the logits ever
being whole.

Documents are packed end to end into windows. Where they are to be kept apart, the end-of-text token opens the
document after it: a token attends to nothing before its document's opening, and positions count from there.
Every token is still predicted, the first of a document from its opening alone.

Shapes, one word per dimension, as in einops:
    rows: windows of one forward pass
    context: tokens that are read of each window, which has context + 1; those after the first are predicted
    tokens: (rows context), both as one dimension, window after window
    hidden: entries of the vector that the head reads
    vocab: entries of the head, one for each token of the vocabulary
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions, functional

from outgrow.model.documents import documents_apart
from outgrow.train.router import Balance, Losses, balanced_forward, has_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from outgrow.train.settings import LoopSettings

CHUNK_TOKENS = 1024  # whose logits are held at a time by the fused loss


class NextTokenLoss(nn.Module):
    """A language model with its loss on top, so that whatever wraps a forward pass (DDP, FSDP, autocast)
    wraps the loss too.

    Attributes:
        network: the Hugging Face model; its names and its weights are what is saved.
        fused: take the head and the cross-entropy together, `CHUNK_TOKENS` at a time. Of 51,200 entries and
            8,192 tokens, the logits with their gradient are 3.4 GB in float32; here they are 0.2 GB.
        end_of_text: the id that opens a document; None lets attention cross documents.
        masked: keep documents apart by masks that are handed over, where restarting positions do not.
    """

    def __init__(
        self, network: PreTrainedModel, *, fused: bool, end_of_text: int | None = None, masked: bool = False
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.fused, self.end_of_text, self.masked, self.routed = (
            fused,
            end_of_text,
            masked,
            has_routers(network),
        )

    def forward(self, windows: Tensor, reduction: str = "mean") -> Any:
        """Cross-entropy of each token after the first given those before it, in nats, computed in float32.

        While a mixture of experts trains, its routers' load-balancing term stands beside it (`Losses`); it is
        never in a validation loss.

        Args:
            windows: token ids, (rows, context + 1).
            reduction: "mean" or "sum" over the predicted tokens, (rows context) of them.
        """
        read, balance = self.read(windows)
        targets = windows[:, 1:].flatten()
        text = self.from_read(read.flatten(0, 1), targets, reduction)
        return balanced(text, balance, targets, reduction)

    def inputs(self, windows: Tensor) -> dict[str, Any]:
        """The network's inputs: all tokens but the last of each window, (rows, context), with a document
        mask if asked for.
        """
        tokens = windows[:, :-1]
        if self.end_of_text is None:
            return {"input_ids": tokens}
        config = self.network.config
        return documents_apart(
            tokens, self.end_of_text, config._attn_implementation, config if self.masked else None
        )

    def read(self, windows: Tensor) -> tuple[Tensor, Balance | None]:
        """The input of the loss: hidden states (rows, context, hidden) if fused, else logits (rows, context,
        vocab).

        While a mixture of experts trains, with its routers' load-balancing term.
        """
        inputs = self.inputs(windows)
        if self.training and self.routed:
            return balanced_forward(self.network, inputs, logits=not self.fused)
        if self.fused:
            output = self.network.base_model(**inputs, use_cache=False)
            return output.last_hidden_state, None
        return self.network(**inputs, use_cache=False).logits, None

    def from_read(self, read: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy from what `read` gives; where it is fused, the logits are never whole.

        Args:
            read: (tokens, hidden) if fused, else (tokens, vocab).
            targets: ids of the predicted tokens, (tokens,).
        """
        if self.fused:
            return fused_cross_entropy(read, self.network.get_output_embeddings(), targets, reduction)
        return functional.cross_entropy(read.float(), targets, reduction=reduction)

    def logits(self, read: Tensor) -> Tensor:
        """(tokens, vocab) from what `read` gives of some tokens."""
        return self.network.get_output_embeddings()(read) if self.fused else read


def balanced(
    text: Tensor,
    balance: Balance | None,
    targets: Tensor,
    reduction: str,
    taught: Tensor | None = None,
) -> Any:
    """The text's loss with the load-balancing term, which weighs as many tokens as the text does.

    Args:
        taught: the objective without the term, where that is not the text's loss alone.
    """
    objective = text if taught is None else taught
    if balance is None:
        return text if taught is None else (objective, text)
    weight = len(targets) if reduction == "sum" else 1
    weighted = objective + weight * balance.weighted
    return Losses(weighted, text, weight * balance.plain)


def build_loss(
    network: PreTrainedModel,
    settings: LoopSettings,
    end_of_text: int,
    *,
    fused: bool,
    masked: bool = False,
) -> NextTokenLoss:
    """The objective that `settings` ask for, fused or plain, as `train.start.way` has found it possible."""
    opening = end_of_text if settings.document_mask else None
    return NextTokenLoss(network, fused=fused, end_of_text=opening, masked=masked)


def fused_cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor, reduction: str) -> Tensor:
    """`cross_entropy(head(hidden), targets)` without the logits of more than `CHUNK_TOKENS` tokens in memory.

    The operands are float32 also under autocast (on a GPU, TF32 multiplies them): of bfloat16 ones, torch
    2.13 returns the loss rounded to bfloat16, which is 1 % off.

    Args:
        hidden: (tokens, hidden).
        targets: (tokens,).
    """
    bias = None if head.bias is None else head.bias.float()
    options = LinearCrossEntropyOptions(batch_chunk_size=min(CHUNK_TOKENS, len(targets)))
    return functional.linear_cross_entropy(
        hidden.float(),
        head.weight.float(),
        targets,
        linear_bias=bias,
        reduction=reduction,
        options=options,
    )
