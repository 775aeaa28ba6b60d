"""AdamW with two groups, and the proof that they cover every parameter exactly once.

decayed    matrices: every weight with two or more axes, the output head included where it is untied
untouched  vectors (norm weights, all biases) and embeddings. A norm's weight should stay near 1 and not near 0; an embedding row is only
           updated when its token occurs, so decay would pull rare tokens towards 0 at the rate of frequent ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from train.settings import OptimizerSettings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn, in the two groups above; a tied tensor counts once, as the embedding it is."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    learning = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in learning if p.ndim >= 2 and id(p) not in embeddings]
    untouched = [p for p in learning if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
        {"name": "untouched", "params": untouched, "weight_decay": 0.0},
    ]
    check_cover(model, groups)
    return [group for group in groups if group["params"]]


def check_cover(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raise AssertionError naming each parameter that is in no group or in several."""
    count: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    wrong = {name: count.get(id(p), 0) for name, p in model.named_parameters() if p.requires_grad and count.get(id(p), 0) != 1}
    if wrong:
        raise AssertionError(f"each parameter must be in exactly one optimizer group; found (name: groups) {wrong}")


def adamw(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), in one fused kernel where the parameters' device has one."""
    fused = all(p.device.type in {"cpu", "cuda"} and p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=fused)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer]] = {"adamw": adamw}


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that `settings.name` asks for, over the groups above."""
    return OPTIMIZERS[settings.name](parameter_groups(model, settings.weight_decay), settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write `rate` into every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
