"""Settings that change nothing in a run's result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a run may be restarted with differently: nothing of it changes a number in the result.
NEUTRAL = (
    *("out", "progress", "dry_run", "forecast", "evaluate", "logger", "changes", "data.folder", "data.path"),
    *("data.validation_path", "data.workers"),
    *(
        "train.keep",
        "train.keep_best",
        "train.keep_optimizer",
        "train.save_every_tokens",
        "train.save_async",
        "train.save_dtype",
    ),
    *("sharding", "train.micro_batch"),  # nothing but rounding
    "schedule.horizons",  # each of them is the run that its budget alone would give
    "train.hang_seconds",
    "train.profile_steps",
    "train.noise_scale",
    "train.diagnostics_every_tokens",
    "train.skip_nonfinite",  # a run that had to stop may go on with more of them
)

# where the same text lies changes nothing, another text does
TEXTS = ("data.path", "data.validation_path")


def is_text(key: str) -> bool:
    """Check for a setting, by its dotted key, that says where a text lies."""
    endings = tuple(f".{text}" for text in TEXTS)
    of_a_source = key.startswith("mixture.sources.") and key.endswith(endings)
    return key in TEXTS or of_a_source


def is_neutral(key: str) -> bool:
    """Check for a setting, by its dotted key, that changes nothing in the result."""
    places = key.startswith("mixture.sources.") and key.endswith(
        (".data.folder", ".data.path", ".data.validation_path", ".data.workers")
    )
    return key in NEUTRAL or key.split(".")[0] in NEUTRAL or places


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as dotted key → value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
