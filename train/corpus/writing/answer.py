"""A model's answer to a prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A text with its counts; None where nobody counted."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cut: bool = False  # max_tokens were not enough
    refused: str | None = None  # why there is no text, whenever it is asked
    aside: str | None = None  # why there is no answer, after all attempts; another time there may be one

    @classmethod
    def put_aside(cls, reason: str) -> Answer:
        """No answer: the prompt is put aside, and the others go on."""
        return cls("", None, None, aside=reason)

    @property
    def uncounted(self) -> bool:
        """Check whether it was written, and nobody knows of how many tokens."""
        return not (self.aside or self.refused) and (
            self.prompt_tokens is None or self.completion_tokens is None
        )

    @property
    def fault(self) -> str | None:
        """The reason why it is no document; None where it is one."""
        if self.refused is not None:
            return self.refused
        if not self.text.strip():
            return "empty"
        return "cut off at max_tokens" if self.cut else None
