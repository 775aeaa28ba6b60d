"""The time of a generated token, measured by greedy generation on the device at hand."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from outgrow.model.base.quiet import quietly

NEW_TOKENS, WARM_UP = 48, 16  # tokens that are written, and the first of them, which are not counted


class TokenClock(StoppingCriteria):
    """Stops nothing; notes the time after each token, its computation done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def milliseconds_per_token(network: Any, context: int) -> float:
    """The median time of a token of one sequence, written greedily until `context` is full; reading the
    prompt and the first tokens are left out.

    The prompt's tokens are drawn at random: they change no time.
    """
    new = min(NEW_TOKENS, context // 2)
    warm_up = min(WARM_UP, new // 3)
    numbers = torch.Generator().manual_seed(0)
    rows = network.get_input_embeddings().weight.shape[0]
    shape = (1, context - new)
    prompt = torch.randint(rows, shape, generator=numbers).to(network.device)
    clock = TokenClock()
    with quietly(), torch.no_grad():
        network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    times = [after - before for before, after in pairwise(clock.times)]
    return 1e3 * median(times[warm_up:] or times)
