"""Receipts: in which precision they are measured, what they say of it, and what they contradict."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from helpers.families import config_of
from helpers.models import random_model
from outgrow.growth import grow
from outgrow.growth.verify import compare_logits, fitting_dtype

TARGET = {"intermediate_size": 80}


def test_float64_is_used_where_the_larger_model_fits_and_the_receipt_says_when_it_does_not(
    phi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grow(phi_folder, tmp_path / "double", target=TARGET).receipt.to_dict()["note"] == ""  # type: ignore[union-attr]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    assert (fitting_dtype(7_500), fitting_dtype(7_501)) == ("float64", "float32")
    receipt = grow(phi_folder, tmp_path / "single", target=TARGET).receipt
    assert receipt is not None
    assert (receipt.dtype, "float64 does not fit into memory" in receipt.note) == ("float32", True)
    assert 0 < receipt.max_delta < 1e-4 * receipt.max_logit


def test_a_float32_norm_is_named_as_the_floor(tmp_path: Path) -> None:
    random_model(config_of("llama")).save_pretrained(tmp_path / "source")
    kept, moved = (
        grow(tmp_path / "source", tmp_path / f"{head}", target={"hidden_size": 48, "head_dim": head}).receipt
        for head in (6, 12)
    )
    assert kept is not None
    assert moved is not None
    assert (kept.dtype, moved.dtype) == ("float64", "float64")
    assert "computes RMSNorm in float32" in kept.note
    assert moved.note == "", "more rotary dims are the cause there"


def test_a_receipt_is_what_its_words_say() -> None:
    numbers = torch.Generator().manual_seed(0)
    before, noise = (
        torch.randn(2, 5, 7, generator=numbers, dtype=torch.float64),
        torch.randn(2, 5, 7, generator=numbers, dtype=torch.float64),
    )
    tokens = torch.randint(7, (2, 5), generator=numbers)
    receipt: Any = compare_logits(before, before + 0.1 * noise, tokens, "float64")
    p, q = before.softmax(-1), (before + 0.1 * noise).softmax(-1)
    assert receipt.max_delta == pytest.approx(0.1 * float(noise.abs().max()))
    assert receipt.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    picked = before.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    assert receipt.loss_source == pytest.approx(-float(picked.mean()))
    assert (receipt.tokens, receipt.note) == (10, "")
