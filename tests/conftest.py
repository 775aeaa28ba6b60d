"""Shared fixtures: tiny checkpoints with weights far from their initialisation, so that no error hides behind a zero or a one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

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

    from model.build import build_model

    model = build_model(config, seed=0, dtype="float64", attention="eager").eval()
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64)
            parameter.copy_(drawn * 0.2 + 1 if "norm" in name and parameter.ndim == 1 and "bias" not in name else drawn * 0.2)
    return model


def make_checkpoint(folder: Path, config: dict[str, Any], dtype: str = "float64") -> Path:
    """A saved `random_model`."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    random_model(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def phi_config() -> dict[str, Any]:
    """A tiny Phi config: 3 layers, 3 heads × 8, half of each head rotary."""
    from model.presets import preset

    return preset("tiny_source") | TINY | {"num_key_value_heads": 3, "dtype": "float64"}


@pytest.fixture(scope="session")
def phi_folder(tmp_path_factory: pytest.TempPathFactory, phi_config: dict[str, Any]) -> Path:
    """A saved float64 Phi of `phi_config`. Read only: copy it before you change it."""
    return make_checkpoint(tmp_path_factory.mktemp("phi") / "source", phi_config)


@pytest.fixture(scope="session")
def checkpoint_maker() -> Callable[..., Path]:
    """`make_checkpoint`, for tests that need a checkpoint of their own."""
    return make_checkpoint


@pytest.fixture(scope="session")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The toy run: 6 steps of 8 windows of 16 tokens on a text of some sentences."""
    from toy import toy_overrides

    return toy_overrides(tmp_path_factory.mktemp("text"))
