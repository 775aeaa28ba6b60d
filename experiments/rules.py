"""The rules of a claim that a comparison of decayed ends does not keep, named beside its answer.

What makes a comparison wrong is refused (`horizons.check_alike`); what only makes it weak is named here. The
numbers are those of docs/evidence.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from outgrow.experiments.horizons import End
from outgrow.experiments.runs import NULL_CONTROL, SCRATCH

LEAST_TOKENS = 5  # per parameter, below which the small network trained on wins by arithmetic
LEAST_RATES = 3
LEAST_SEEDS = 3
LEAST_EVAL_TOKENS = 500_000  # of validation, for differences of 0.01 nats


def unheld(ends: Sequence[End]) -> list[str]:
    """One sentence for each rule that the ends do not keep, with its number."""
    remarks = [
        _regime(ends),
        _arms(ends),
        _baseline(ends),
        _rates(ends),
        _seeds(ends),
        _validation(ends),
    ]
    return [remark for remark in remarks if remark is not None]


def _regime(ends: Iterable[End]) -> str | None:
    short = {f"{end.tokens:,}" for end in ends if end.arm == SCRATCH and _per_parameter(end) < LEAST_TOKENS}
    if not short:
        return None
    return (
        f"Rule 1, regime: scratch's ends after {_list(short)} tokens are below {LEAST_TOKENS} tokens a "
        "parameter, where the small network trained on wins whatever the growth."
    )


def _per_parameter(end: End) -> float:
    return end.tokens / end.parameters


def _arms(ends: Iterable[End]) -> str | None:
    arms = {end.arm for end in ends}
    inherit = {end.arm for end in ends if end.source_flops > 0}
    if not inherit or NULL_CONTROL in arms:
        return None
    return (
        f"Rule 2, arms: no {NULL_CONTROL} beside {_list(inherit)}, so a difference between operators may be "
        "one of effective learning rate."
    )


def _baseline(ends: Iterable[End]) -> str | None:
    own = [end for end in ends if end.arm == SCRATCH]
    optimizers = {end.optimizer for end in own}
    batches = {end.batch_tokens for end in own}
    if len(optimizers) > 1 and len(batches) > 1:
        return None
    sizes = _list(f"{size:,}" for size in batches)
    return (
        f"Rule 3, baseline: scratch was given {_list(optimizers)} and batches of {sizes} tokens; a better "
        "one may be among what was not tried."
    )


def _rates(ends: Iterable[End]) -> str | None:
    rates: dict[str, set[float]] = defaultdict(set)
    for end in ends:
        rates[end.arm].add(end.learning_rate)
    few = [arm for arm, tried in rates.items() if len(tried) < LEAST_RATES]
    if not few:
        return None
    return f"Rule 3, tuning: fewer than {LEAST_RATES} learning rates of {_list(few)}."


def _seeds(ends: Iterable[End]) -> str | None:
    seeds: dict[str, set[int]] = defaultdict(set)
    for end in ends:
        seeds[end.arm].add(end.seed)
    few = [arm for arm, tried in seeds.items() if len(tried) < LEAST_SEEDS]
    if not few:
        return None
    return f"Rule 5, seeds: fewer than {LEAST_SEEDS} of {_list(few)}; no headline is made of these."


def _validation(ends: Iterable[End]) -> str | None:
    least = min(end.eval_tokens for end in ends)
    if least >= LEAST_EVAL_TOKENS:
        return None
    return (
        f"Rule 9, validation: {least:,} tokens, fewer than the {LEAST_EVAL_TOKENS:,} that differences of "
        "0.01 nats need."
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
