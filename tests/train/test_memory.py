"""The memory forecast against PyTorch's own trackers, in a fake process group, at a small shape of every way
of training."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outgrow.model.presets import preset
from outgrow.train.compose import compose
from outgrow.train.machine import memory
from outgrow.train.machine.forecast import forecast
from outgrow.train.settings import Settings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
WAYS = list(itertools.product((False, True), ("plain", "fused")))


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_memory", BENCHMARKS / "bench_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_memory"] = module
    spec.loader.exec_module(module)
    return module


def small(gpus: int, sharding: str, checkpointing: bool, loss: str, *more: str) -> Settings:
    way = (
        f"forecast.gpus={gpus}",
        f"sharding={sharding}",
        f"train.checkpointing={checkpointing}",
        f"train.loss={loss}",
    )
    step = ("train.context=128", "train.micro_batch=4", "train.batch_tokens=49152", "train.precision=bf16")
    settings = compose(["experiment=phi_1b", "growth=lossless", *way, *step, *more])
    return replace(settings, target=preset("phi_2") | SMALL | {"vocab_size": 2048})


def held(
    bench: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, float], dict[str, float]]:
    # The trackers do not see a chunk's logits inside `linear_cross_entropy`; of few tokens they would be most
    # of the peak.
    monkeypatch.setattr(memory, "CHUNK_TOKENS", 1)
    return bench.forecast_parts(forecast(settings).memory), bench.tracked_parts(settings)


def close(told: dict[str, float], tracked: dict[str, float], share: float) -> list[str]:
    """The categories, or the total, that are further off than this share of the tracked peak."""
    peak = sum(tracked.values())
    faults = [
        f"{part}: {told[part]:.0f} for {size:.0f}"
        for part, size in tracked.items()
        if abs(told[part] - size) > share * peak
    ]
    return faults + (
        [f"{sum(told.values()):.0f} for {peak:.0f}"] if abs(sum(told.values()) - peak) > share * peak else []
    )


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "loss"), WAYS)
@pytest.mark.parametrize(("gpus", "sharding"), [(1, "none"), (8, "full"), (96, "full")])
def test_the_forecast_is_what_pytorchs_tracker_counts(
    bench: Any, monkeypatch: pytest.MonkeyPatch, gpus: int, sharding: str, checkpointing: bool, loss: str
) -> None:
    told, tracked = held(bench, small(gpus, sharding, checkpointing, loss), monkeypatch)
    assert abs(sum(told.values()) / sum(tracked.values()) - 1) < 0.1
    assert not close(
        told, tracked, 0.12
    )  # what a layer holds for a moment is rather too much than too little


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["sharding.reshard_after_forward=false", "train.precision=fp32", "optimizer=muon"]
)
def test_other_settings_are_forecast_too(bench: Any, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    told, tracked = held(bench, small(8, "full", True, "plain", change), monkeypatch)
    assert not close(told, tracked, 0.1)


def test_a_wrong_category_is_told() -> None:
    tracked = {"weights": 50.0, "work": 50.0}
    assert close({"weights": 62.0, "work": 38.0}, tracked, 0.1) == ["weights: 62 for 50", "work: 38 for 50"]
    assert close({"weights": 58.0, "work": 58.0}, tracked, 0.1) == ["116 for 100"]


def test_the_published_comparison_holds_what_is_claimed(bench: Any) -> None:
    result = json.loads((BENCHMARKS / "bench_memory.json").read_text())
    ways = {(row["gpus"], row["sharding"], row["checkpointing"], row["loss"]) for row in result["rows"]}
    machines = [(1, "none"), (8, "none"), (8, "full"), (96, "none"), (96, "full")]
    assert ways == {(*machine, *way) for machine in machines for way in WAYS}
    assert all(not close(row["forecast"], row["tracked"], 0.1) for row in result["rows"])
    page = (BENCHMARKS.parent / "docs" / "evidence.md").read_text()
    assert all(line in page for line in bench.table(result["rows"]).splitlines())
