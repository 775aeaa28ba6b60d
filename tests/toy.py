"""A toy run that several files of tests train: its overrides, and what makes two runs the same."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.settings import Settings

SIZES = "hidden_size:16,intermediate_size:32,num_hidden_layers:1,num_attention_heads:2,num_key_value_heads:2"
TARGET = f"target={{model_type:phi,vocab_size:300,max_position_embeddings:32,tie_word_embeddings:false,{SIZES}}}"
CLOCKS = ("seconds", "tokens_per_second")  # the only numbers that two equal runs may tell differently


def toy_overrides(folder: Path) -> list[str]:
    """A run of 6 steps of 8 windows of 16 tokens on a text of some sentences."""
    draw = random.Random(0)
    for i in range(40):
        words = (draw.choice(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs"]) for _ in range(120))
        (folder / f"{i}.txt").write_text(" ".join(words))
    data = ["data=files", f"data.path={folder}", f"data.folder={folder}-tokens", "data.vocab_size=280", "data.validation_fraction=0.3"]
    sizes = ["context=16", "batch_tokens=128", "budget_tokens=768", "eval_tokens=320", "eval_every_tokens=256", "log_every_tokens=256"]
    train = [f"train.{size}" for size in [*sizes, "save_every_tokens=384", "gradient_clip=0.5"]]
    return [*data, *train, "growth=scratch", TARGET, "logger=none", "progress=false", "study=t", "schedule.warmup_fraction=0.2"]


def at(settings: Settings, out: Path, **train: Any) -> Settings:
    return dataclasses.replace(settings, out=str(out), train=dataclasses.replace(settings.train, **train))


def rows(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if kind in (None, row["kind"])]


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit-identical weights and metrics."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert timeless(folder) == timeless(other)


def assert_close_run(folder: Path, other: Path) -> None:
    """The same losses up to float32 rounding."""
    for ours, theirs in zip(timeless(folder), timeless(other), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value == (pytest.approx(theirs[key], rel=2e-5) if isinstance(value, float) else theirs[key]), (ours["step"], key)
