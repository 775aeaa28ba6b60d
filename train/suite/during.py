"""Benchmarks while a network trains: a small suite, measured every so many tokens and told beside the
loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outgrow.train.data.tokenizer import load_tokenizer
from outgrow.train.suite.harness import Harness

if TYPE_CHECKING:
    from accelerate import Accelerator

    from outgrow.train.data import TokenData
    from outgrow.train.settings import BenchmarkSettings

BATCH = 8


class Benchmarks:
    """A run's suite, loaded before its first step. Programs that the network writes are never run here.

    Raises:
        UserError: the harness is not installed, or a benchmark's data cannot be read.
    """

    def __init__(self, settings: BenchmarkSettings, data: TokenData) -> None:
        assert settings.suite is not None
        self.suite = settings.suite.of(settings.only)
        self.limit = settings.limit
        self.harness = Harness(
            None if settings.tasks is None else Path(settings.tasks).expanduser().resolve()
        )
        self.loaded = self.harness.load(self.suite.tasks, run_code=False)
        self.tokenizer = load_tokenizer(str(data.tokenizer_folder))

    def measure(self, network: Any, accelerator: Accelerator) -> dict[str, float]:
        """Task → score, of 1; the network goes on as it was."""
        learning = network.training
        network.eval()
        try:
            with torch.no_grad(), accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                model = self.harness.model(network, self.tokenizer, BATCH)
                return {
                    task.task: self.harness.score(
                        task, self.loaded[task.task], model, limit=self.limit, run_code=False
                    ).value
                    for task in self.suite.tasks
                }
        finally:
            network.train(learning)
