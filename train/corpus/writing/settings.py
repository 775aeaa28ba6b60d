"""Settings of what a language model writes, and how. Plain values: nothing here imports a library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from outgrow.model.base.compose import CONF, compose_config
from outgrow.model.base.errors import UserError
from outgrow.model.base.settings import settings_of

PLACES = ("{topic}", "{audience}")


@dataclass(frozen=True)
class PromptSettings:
    """conf/prompts: one prompt for each topic × audience × template."""

    name: str
    topics: tuple[str, ...]
    topics_file: str | None  # more of them, one a line
    audiences: tuple[str, ...]
    templates: tuple[str, ...]  # with {topic} and {audience} in them


@dataclass(frozen=True)
class WriteSettings:
    """conf/write.yaml."""

    prompts: PromptSettings
    out: str
    model: str
    server: str | None
    key_variable: str
    number: int
    seed: int
    system: str | None
    temperature: float
    top_p: float
    max_tokens: int
    at_once: int
    timeout_seconds: float
    attempts: int
    dollars_per_million_prompt_tokens: float
    dollars_per_million_completion_tokens: float
    most_dollars: float | None
    progress: bool

    def cost(self, prompt_tokens: int | None, completion_tokens: int | None) -> float:
        """Dollars for so many tokens; those that nobody counted cost nothing here."""
        prompt_cost = (prompt_tokens or 0) * self.dollars_per_million_prompt_tokens
        return (prompt_cost + (completion_tokens or 0) * self.dollars_per_million_completion_tokens) / 1e6


# What may differ when a run goes on: nothing of it changes what is asked.
NEUTRAL = ("out", "server", "key_variable", "number", "at_once", "timeout_seconds", "attempts",
           "most_dollars", "progress",
           "dollars_per_million_prompt_tokens", "dollars_per_million_completion_tokens")  # fmt: skip


def identity(settings: WriteSettings) -> dict[str, Any]:
    """Everything that decides what is asked of whom; the topics of a file as they are now."""
    values = asdict(settings)
    for key in NEUTRAL:
        del values[key]
    prompts = values["prompts"] | {"topics": topics(settings.prompts), "topics_file": None}
    lists = {key: list(value) for key, value in prompts.items() if isinstance(value, tuple)}
    return values | {"prompts": prompts | lists}


def topics(settings: PromptSettings) -> tuple[str, ...]:
    """The topics of the leaf, and those of its file.

    Raises:
        UserError: the file cannot be read.
    """
    if settings.topics_file is None:
        return settings.topics
    try:
        path = Path(settings.topics_file).expanduser()
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts.topics_file={settings.topics_file}: cannot be read ({error}); give a text file, one "
            "topic a line"
        ) from error
    topics = [line.strip() for line in lines]
    every = [*settings.topics, *filter(None, topics)]
    return tuple(dict.fromkeys(every))


def settings_from(overrides: Sequence[str], own: Path | None = None) -> WriteSettings:
    """Typed settings from `key=value` arguments.

    Raises:
        UserError: every unknown, missing and mistyped key and every value that cannot work, at once.
    """
    cfg, faults = compose_config(CONF, "write", list(overrides), own)
    return settings_of(WriteSettings, cfg, faults, _disagreements)


def _disagreements(settings: WriteSettings) -> list[str]:
    positive = ("number", "max_tokens", "at_once", "timeout_seconds", "attempts")
    faults = [
        f"{key}: must be positive; found {getattr(settings, key)}"
        for key in positive
        if getattr(settings, key) <= 0
    ]
    if not 0 < settings.top_p <= 1:
        faults.append(f"top_p: must be above 0 and at most 1; found {settings.top_p}")
    prices = (settings.dollars_per_million_prompt_tokens, settings.dollars_per_million_completion_tokens)
    if min(prices) < 0:
        faults.append(f"dollars_per_million_…_tokens: must not be negative; found {min(prices)}")
    most_dollars = settings.most_dollars
    if most_dollars is not None and (most_dollars <= 0 or not any(prices)):
        faults.append(
            "most_dollars: positive, and with prices: give dollars_per_million_prompt_tokens and "
            "…_completion_tokens"
        )
    if settings.temperature < 0:
        faults.append(f"temperature: must not be negative; found {settings.temperature}")
    server = settings.server
    if server is not None and not server.startswith(("http://", "https://")):
        faults.append(
            f"server: expected a URL such as http://127.0.0.1:8000/v1; found {settings.server!r}; null for "
            "a model on this machine"
        )
    if not settings.out.endswith(".jsonl"):
        faults.append(f"out: expected a file name that ends in .jsonl; found {settings.out!r}")
    lists = {
        "topics": topics(settings.prompts),
        "audiences": settings.prompts.audiences,
        "templates": settings.prompts.templates,
    }
    empty = [key for key, entries in lists.items() if not entries]
    faults += [f"prompts.{key}: none; give at least one" for key in empty]
    for key, entries in lists.items():
        counts = Counter(entries)
        twice = [entry for entry, count in counts.items() if count > 1]
        faults += [f"prompts.{key}: twice {entry!r}" for entry in twice]
    for template in settings.prompts.templates:
        missing = [name for name in PLACES if name not in template]
        faults += [f"prompts.templates: no {name} in {template!r}" for name in missing]
    most = prod(map(len, lists.values()))
    if 0 < most < settings.number:
        faults.append(
            f"number: there are {most} prompts of topic × audience × template, {settings.number} are asked "
            "for; give more topics"
        )
    return faults
