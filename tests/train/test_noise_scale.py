"""The gradient noise scale: against a mixture of known gradients, and a run's against gradients taken by hand."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.toy import assert_same_run, at, ended, rows, timeless
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.noise_scale import NoiseScale, first_micro_batches
from outgrow.train.run.state import Position
from outgrow.train.settings import Settings, settings_hash
from outgrow.train.step import Step

ALONE: Any = SimpleNamespace(
    process_index=0, num_processes=1, is_fsdp2=False, reduce=lambda tensor, reduction: tensor
)


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose([*overrides, "train.noise_scale=true", "train.micro_batch=2"])


def test_gradients_of_known_scatter_give_their_noise_scale() -> None:
    """Each token's gradient is (0.6, 0.8) and noise of deviation 2 in both entries: tr(Σ) = 8, |G|² = 1."""
    draw = torch.Generator().manual_seed(0)
    position = Position()
    noise = NoiseScale([4], 16, ALONE, position)
    for _ in range(4000):
        tokens = torch.tensor([0.6, 0.8]) + 2 * torch.randn(16, 2, generator=draw)
        noise.see_first([tokens[:4].sum(0) / 16])
        noise.see_batch(float(tokens.mean(0).norm()))
    assert position.noise_gradient / 4000 == pytest.approx(1, rel=0.1)
    assert position.noise_scatter / 4000 == pytest.approx(8, rel=0.1)
    assert noise.close_interval()["noise_scale_tokens"] == pytest.approx(8, rel=0.2)
    assert (position.noise_gradient, position.noise_scatter) == (0.0, 0.0)


def test_a_gradient_that_is_lost_in_the_noise_has_no_scale() -> None:
    noise = NoiseScale([1], 2, ALONE, Position())
    noise.see_first([torch.tensor([2.0])])  # |g_b|² = 16
    noise.see_batch(1.0)  # |G|² ≈ (2 · 1 - 1 · 16) / 1 < 0
    assert noise.close_interval() == {"noise_scale_tokens": None}


def by_hand(step: Step, i: int, first: list[list[int]]) -> tuple[float, float]:
    """Both estimates of step `i` from plain gradients of mean losses; `first` are small batches of windows."""
    every = step.windows(i, range(8))

    def square(windows: list[int]) -> float:
        loss = step.model(every[windows])
        gradients = torch.autograd.grad(loss, list(step.parameters.values()))
        return float(sum(gradient.square().sum() for gradient in gradients))

    context = step.settings.train.context
    large, size = square(list(range(8))), 8 * context
    small, tokens = sum(map(square, first)) / len(first), len(first[0]) * context
    return (size * large - tokens * small) / (size - tokens), (small - large) / (1 / tokens - 1 / size)


def scales(steps: list[tuple[float, float]]) -> list[Any]:
    """The noise scales of three logging intervals of two steps."""
    told: list[Any] = []
    for first in (0, 2, 4):
        gradient, scatter = (sum(values) for values in zip(*steps[first : first + 2], strict=True))
        told.append(pytest.approx(scatter / gradient, rel=1e-2) if gradient > 0 else None)
    return told


# The first micro-batches: of one process, of each of two, and of two that add up each as they go (FSDP).
FIRST = {"one": [[0, 1]], "none": [[0, 1], [4, 5]], "full": [[0, 1, 4, 5]]}


@pytest.mark.slow
def test_a_run_tells_what_gradients_by_hand_tell(
    settings: Settings, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one process and on two; the weights learn as ever."""
    estimates: dict[str, list[tuple[float, float]]] = {kind: [] for kind in FIRST}
    called = Step.__call__

    def spied(self: Step, i: int) -> tuple[float, ...]:
        for kind, first in FIRST.items():
            estimates[kind].append(by_hand(self, i, first))
        return called(self, i)

    monkeypatch.setattr(Step, "__call__", spied)
    folder = loop.train(at(settings, tmp_path / "run"))
    monkeypatch.undo()
    assert [row["noise_scale_tokens"] for row in rows(folder, "train")] == scales(estimates["one"])

    plain = compose([*overrides, "train.micro_batch=2"])
    quiet = loop.train(at(plain, tmp_path / "plain"))
    told_less = [{k: v for k, v in row.items() if k != "noise_scale_tokens"} for row in timeless(folder)]
    assert told_less == timeless(quiet)
    assert settings_hash(plain) == settings_hash(settings)

    for sharding in ("none", "full"):
        shared = dataclasses.replace(settings, sharding=dataclasses.replace(settings.sharding, name=sharding))
        two = ended(at(shared, tmp_path / sharding), processes=2)
        assert [row["noise_scale_tokens"] for row in rows(two, "train")] == scales(estimates[sharding])


@pytest.mark.slow
def test_processes_that_take_their_share_at_once_are_compared(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the gradient of each before DDP averages it; the weights learn as ever."""
    estimates: list[tuple[float, float]] = []
    called = Step.__call__

    def spied(self: Step, i: int) -> tuple[float, ...]:
        estimates.append(by_hand(self, i, [[0, 1, 2, 3], [4, 5, 6, 7]]))
        return called(self, i)

    monkeypatch.setattr(Step, "__call__", spied)
    plain = compose(overrides)
    loop.train(at(plain, tmp_path / "alone"))
    monkeypatch.undo()
    asked = compose([*overrides, "train.noise_scale=true"])
    two = ended(at(asked, tmp_path / "two"), processes=2)
    assert [row["noise_scale_tokens"] for row in rows(two, "train")] == scales(estimates)
    quiet = ended(at(plain, tmp_path / "quiet"), processes=2)
    told_less = [{k: v for k, v in row.items() if k != "noise_scale_tokens"} for row in timeless(two)]
    assert told_less == timeless(quiet)


@pytest.mark.slow
def test_a_run_that_resumes_inside_an_interval_tells_the_same(settings: Settings, tmp_path: Path) -> None:
    folder = ended(at(settings, tmp_path / "whole"))
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "again" / "final")
    assert_same_run(ended(at(settings, tmp_path / "again")), folder)


@pytest.mark.parametrize(
    ("micro_batch", "processes", "words"),
    [
        (None, 1, "takes its 8 windows at once; give train.micro_batch=N, at most 4"),
        (8, 1, "at most 4"),
        (None, 2, "takes its 4 windows at once; give train.micro_batch=N, at most 2"),
        (4, 2, "at most 2"),
        (1, 8, "takes its 1 windows at once; give more windows a step"),
        (1, 9, "takes its 0 windows at once; give more windows a step"),
    ],
)
def test_a_run_with_nothing_to_compare_is_refused(
    settings: Settings, micro_batch: int | None, processes: int, words: str
) -> None:
    """Of several processes, those that share the weights too; others are compared with each other."""
    train = dataclasses.replace(settings.train, micro_batch=micro_batch)
    full = dataclasses.replace(settings.sharding, name="full")
    asked = dataclasses.replace(settings, train=train, sharding=full)
    with pytest.raises(UserError, match=words):
        first_micro_batches(asked, processes)
    apart = dataclasses.replace(settings, train=train)
    if 1 < processes <= 8:
        assert first_micro_batches(apart, processes) == [8 // processes * 16] * processes
    else:
        with pytest.raises(UserError, match=words):
            first_micro_batches(apart, processes)


def test_it_is_refused_before_the_text_is_read(overrides: list[str], tmp_path: Path) -> None:
    asked = compose([*overrides, "train.noise_scale=true", f"out={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"train\.noise_scale: .*at once"):
        loop.train(asked)
    assert not (tmp_path / "run" / "run.json").exists()


def test_shares_of_unlike_size(settings: Settings) -> None:
    """8 windows among 3 processes: 2, 3 and 3, the first one by one."""
    train = dataclasses.replace(settings.train, micro_batch=1)
    assert first_micro_batches(dataclasses.replace(settings, train=train), 3) == [16, 16, 16]
