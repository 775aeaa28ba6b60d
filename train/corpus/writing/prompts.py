"""The prompt of a number: topic × audience × template, in an order that the seed decides, none of them twice.

What makes a model's texts differ is what it is told to differ in: the topic and the reader (phi-1, arXiv
2306.11644 §2.2; TinyStories, arXiv 2305.07759, does it with words).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from outgrow.train.corpus.writing.settings import PromptSettings, topics
from outgrow.train.data.batches import permuted


@dataclass(frozen=True)
class Prompt:
    """One thing to write."""

    number: int
    topic: str
    audience: str
    template: int  # which
    text: str


class Prompts:
    """The prompts of a leaf; the one of a number is computed when it is asked for."""

    def __init__(self, settings: PromptSettings, seed: int) -> None:
        self.topics = topics(settings)
        self.audiences = settings.audiences
        self.templates = settings.templates
        self.seed = seed

    def __len__(self) -> int:
        lists = (self.topics, self.audiences, self.templates)
        return prod(map(len, lists))

    def __getitem__(self, number: int) -> Prompt:
        positions = permuted(np.array([number]), len(self), self.seed)
        drawn = int(positions[0])
        drawn, template = divmod(drawn, len(self.templates))
        topic, audience = (
            self.topics[drawn // len(self.audiences)],
            self.audiences[drawn % len(self.audiences)],
        )
        text = self.templates[template].replace("{topic}", topic).replace("{audience}", audience)
        return Prompt(number, topic, audience, template, text)
