"""Tiny models with weights far from their initialisation, so that no error hides behind a zero or a one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}


def random_model(config: dict[str, Any]) -> Any:
    """A float64 model of `config` whose every parameter is random, norm scales and biases included."""
    import torch

    from outgrow.model.build import build_model

    model = build_model(config, seed=0, dtype="float64", attention="eager").eval()
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64)
            parameter.copy_(
                drawn * 0.2 + 1
                if "norm" in name and parameter.ndim == 1 and "bias" not in name
                else drawn * 0.2
            )
    return model


def make_checkpoint(folder: Path, config: dict[str, Any], dtype: str = "float64") -> Path:
    """A saved `random_model`."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    random_model(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
