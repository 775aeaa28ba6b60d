"""The training objective as a module: token windows in, nats per token out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NextTokenLoss(nn.Module):
    """A language model with its loss on top, so that whatever wraps a forward pass (DDP, FSDP, autocast) wraps the loss too.

    Attributes:
        network: the Hugging Face model; its names and its weights are what is saved.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, windows: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of each token after the first given those before it, in nats, computed in float32.

        Args:
            windows: token ids, (rows, context + 1).
            reduction: "mean" or "sum" over the rows · context predicted tokens.
        """
        logits = self.network(input_ids=windows[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)
