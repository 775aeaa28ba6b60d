"""The rules of a claim that a comparison of decayed ends does not keep, named beside its answer.

What makes a comparison wrong is refused (`horizons.check_alike`); what only makes it weak is named here. The
numbers are those of docs/evidence.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from outgrow.experiments.cost import LEAST_SEEDS
from outgrow.experiments.ends import End
from outgrow.experiments.frontier import LEAST_BUDGETS, LEAST_SIZES, flat_points
from outgrow.experiments.horizons import Horizon, best_points
from outgrow.experiments.runs import NULL_CONTROL, SCRATCH
from outgrow.experiments.study_file import read_study, studies

LEAST_TOKENS = 5  # per parameter, below which the small network trained on wins by arithmetic
LEAST_RATES = 3
LEAST_EVAL_TOKENS = 500_000  # of validation, for differences of 0.01 nats


def unheld(ends: Sequence[End]) -> list[str]:
    """One sentence for each rule that the ends do not keep, with its number."""
    remarks = [
        _regime(ends),
        _frontier(ends),
        _arms(ends),
        _kinds(ends),
        _baseline(ends),
        _control(ends),
        _rates(ends),
        _edges(ends),
        _seeds(ends),
        _receipt(ends),
        _validation(ends),
        _seen(ends),
    ]
    return [remark for remark in remarks if remark is not None]


def unrun(study: str, ends: Iterable[End]) -> str | None:
    """A sentence on the arms of a study's definition without an end: a negative result may be among them."""
    if study not in studies():
        return None
    definition = read_study(study)
    arms = {definition.counts_as(arm) for arm in definition.full.arms}
    missing = arms - {end.arm for end in ends}
    if not missing:
        return None
    return f"Rule 12, negative results: {_list(missing)} of this study, not run or left out, may be some."


def _regime(ends: Iterable[End]) -> str | None:
    own = [end for end in ends if end.arm == SCRATCH]
    short = {f"{end.tokens:,}" for end in own if end.tokens_per_parameter < LEAST_TOKENS}
    if not short:
        return None
    return (
        f"Rule 1, regime: scratch's ends after {_list(short)} tokens are below {LEAST_TOKENS} tokens a "
        "parameter, where the small network trained on wins whatever the growth."
    )


def _frontier(ends: Iterable[End]) -> str | None:
    counts = Counter(point.parameters for point in flat_points(ends))
    sizes = [size for size, count in counts.items() if count >= LEAST_BUDGETS]
    if len(sizes) >= LEAST_SIZES:
        return None
    return (
        f"Rule 1, regime: {len(sizes)} sizes of flat models at {LEAST_BUDGETS} budgets or more, fewer than "
        f"{LEAST_SIZES}, so these ends do not show that the target is not too large for its budget."
    )


def _arms(ends: Iterable[End]) -> str | None:
    arms = {end.arm for end in ends}
    inherit = {end.arm for end in ends if end.source_flops > 0}
    if not inherit or NULL_CONTROL in arms:
        return None
    return (
        f"Rule 2, arms: no {NULL_CONTROL} beside {_list(inherit)}, so a difference between operators may be "
        "one of effective learning rate."
    )


def _kinds(ends: Iterable[End]) -> str | None:
    ends = list(ends)
    largest = max(end.parameters for end in ends)
    sourceless = [end for end in ends if not end.source_flops]
    # of scratch's size without a source: it has grown inside, whether its record tells of the growth or not
    silent = [end for end in sourceless if end.parameters == largest and end.arm != SCRATCH]
    of_growth = [end for end in ends if end.growth is not None]
    inside = bool(silent or of_growth)
    inherits = any(end.source_flops > 0 and end.parameters == largest for end in ends)  # no control does
    if inside and inherits:
        return None
    kinds = {"grows inside its run": inside, "starts from a trained source": inherits}
    lacking = " or ".join(kind for kind, present in kinds.items() if not present)
    return f"Rule 2, arms: none {lacking}."


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


def _control(ends: Sequence[End]) -> str | None:
    largest = max(end.parameters for end in ends)
    small = [end for end in ends if end.parameters < largest]
    large = [end for end in ends if end.parameters == largest]
    own = [end for end in large if end.arm == SCRATCH]
    lacking = _baselines(own) - _baselines(small)
    if not small or not lacking:
        return None
    pairs = _list(f"{optimizer} with batches of {size:,} tokens" for optimizer, size in lacking)
    return f"Rule 3, baseline: the control was not given {pairs}, which scratch was."


def _baselines(ends: Iterable[End]) -> set[tuple[str, int]]:
    """The pairs of optimizer and batch that some ends were given."""
    return {(end.optimizer, end.batch_tokens) for end in ends}


def _rates(ends: Iterable[End]) -> str | None:
    rates: dict[str, set[float]] = defaultdict(set)
    for end in ends:
        rates[end.arm].add(end.learning_rate)
    few = [arm for arm, tried in rates.items() if len(tried) < LEAST_RATES]
    if not few:
        return None
    return f"Rule 3, tuning: fewer than {LEAST_RATES} learning rates of {_list(few)}."


def _edges(ends: Iterable[End]) -> str | None:
    ends = list(ends)
    rates: dict[Horizon, set[float]] = defaultdict(set)
    for end in ends:
        rates[end.arm, end.optimizer, end.tokens].add(end.learning_rate)
    edge: set[str] = set()
    for point in best_points(ends):
        tried = rates[point.arm, point.optimizer, point.tokens]
        if point.at_edge and len(tried) >= LEAST_RATES:
            edge.add(point.arm)
    if not edge:
        return None
    return f"Rule 3, tuning: the best learning rate is at the edge of its grid at a horizon of {_list(edge)}."


def _seeds(ends: Iterable[End]) -> str | None:
    seeds: dict[str, set[int]] = defaultdict(set)
    for end in ends:
        seeds[end.arm].add(end.seed)
    few = [arm for arm, tried in seeds.items() if len(tried) < LEAST_SEEDS]
    if not few:
        return None
    return f"Rule 5, seeds: fewer than {LEAST_SEEDS} of {_list(few)}; no headline is made of these."


def _receipt(ends: Iterable[End]) -> str | None:
    inherit = [end for end in ends if end.source_flops > 0]
    untold = {end.arm for end in inherit if end.start is None}
    unmeasured = {end.arm for end in inherit if end.start is not None and not end.start.is_whole}
    remarks = []
    if untold:
        remarks.append(
            f"the losses at step 0 and max |Δlogit| of {_list(untold)} stand in their run.json, not here"
        )
    if unmeasured:
        remarks.append(f"none was measured of {_list(unmeasured)}")
    return _sentence("Rule 8, receipt", remarks)


def _seen(ends: Iterable[End]) -> str | None:
    inherit = [end for end in ends if end.source_flops > 0]
    unsure = {end.arm for end in inherit if end.rereads is None}
    uncounted = {end.arm for end in inherit if end.start is None or end.start.passes is None}
    remarks = []
    if unsure:
        remarks.append(f"{_list(unsure)} may read text again that their source has read")
    if uncounted:
        whose = "" if uncounted == unsure else f" of {_list(uncounted)}"
        remarks.append(f"the passes over the text{whose} are told when a run starts, not here")
    return _sentence("Rule 10, what was seen", remarks)


def _sentence(rule: str, remarks: Sequence[str]) -> str | None:
    """The remarks on one rule as a sentence; None without any."""
    return f"{rule}: {'; '.join(remarks)}." if remarks else None


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
