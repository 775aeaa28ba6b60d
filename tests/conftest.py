"""Shared fixtures: tiny checkpoints with weights far from their initialisation, so that no error hides behind
a zero or a one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.models import TINY, make_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def phi_config() -> dict[str, Any]:
    """A tiny Phi config: 3 layers, 3 heads × 8, half of each head rotary."""
    from outgrow.model.presets import preset

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
    from helpers.toy import toy_overrides

    return toy_overrides(tmp_path_factory.mktemp("text"))
