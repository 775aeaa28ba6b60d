"""The compute-optimal size: which flat model ends lowest for a budget, and a law L(N, D) if points allow it.

Flat models keep their size from their first token to their last. Their decayed ends at several sizes N
(parameters in matrices and head) and token counts D give, for each budget of FLOPs, the size that ends
lowest; a target above it cannot show anything about growth. With three sizes and three token counts or more,
the law of Hoffmann et al. (2203.15556)

    L(N, D) = E + A / N^alpha + B / D^beta

is fitted to the log of the losses by Huber's loss, and bootstrapped over the runs.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from outgrow.experiments.cost import best_of
from outgrow.experiments.ends import End
from outgrow.experiments.horizons import BaselineCurve
from outgrow.model.base.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_SIZES, LEAST_BUDGETS = 4, 2  # for a frontier
LEAST_OF_LAW = 3  # sizes, and token counts of each of them
DELTA = 1e-3  # of Huber's loss, in log loss, as in 2203.15556
STARTS = ((0.2, 0.4, 0.6), (0.2, 0.4, 0.6))  # of alpha and of beta: the loss has several minima
DRAWS = 200  # of the bootstrap
AROUND = 3  # sizes that must have been measured at a budget for it to have a best one
SLACK = 1.05  # budgets that are as near as this are the same: they are whole steps


_Tuned = tuple[float, int, int]  # learning rate, tokens of a batch, number of the optimizer


@dataclass(frozen=True)
class Flat:
    """The best end of one size at one token count, over rates, batches and optimizers, on shared seeds."""

    parameters: int
    tokens: int
    flops: float
    val_loss: float


@dataclass(frozen=True)
class Best:
    """The size that ends lowest for a budget; `at_edge` of the sizes that were measured there."""

    flops: float
    parameters: int
    val_loss: float
    at_edge: bool


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token."""

    log_e: float
    log_a: float
    log_b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss of a flat model."""
        of_tokens = math.exp(self.log_b) / tokens**self.beta
        return self.floor(parameters) + of_tokens

    def floor(self, parameters: float) -> float:
        """The loss that a size comes down to with text without end."""
        entropy = math.exp(self.log_e)
        of_size = math.exp(self.log_a) / parameters**self.alpha
        return entropy + of_size

    def tokens_for(self, parameters: float, loss: float) -> float | None:
        """The tokens on which a size reaches `loss`; None where it never does."""
        room = loss - self.floor(parameters)
        if room <= 0:
            return None
        log_tokens = (self.log_b - math.log(room)) / self.beta
        return math.exp(log_tokens)


@dataclass(frozen=True)
class ArmWorth:
    """The effective speed-up of an arm's end by the law; None where the law never reaches its loss."""

    end: End
    speedup: float | None
    interval: tuple[float, float] | None  # 95 %, of the bootstrap


def flat_ends(ends: Iterable[End]) -> list[End]:
    """The ends of models that kept their size and inherited nothing."""
    kept_size = [end for end in ends if end.growth is None]
    return [end for end in kept_size if end.source_flops == 0.0]


def flat_points(ends: Iterable[End]) -> list[Flat]:
    """One point for each size and token count, by size."""
    grids: dict[tuple[int, int], list[End]] = defaultdict(list)
    for end in flat_ends(ends):
        grids[end.parameters, end.tokens].append(end)
    return [_flat(grids[key]) for key in sorted(grids)]


def _flat(ends: Sequence[End]) -> Flat:
    """The best of one size's ends at one token count."""
    names = sorted({end.optimizer for end in ends})
    grid: dict[_Tuned, dict[int, End]] = defaultdict(dict)  # by seed
    losses: dict[_Tuned, dict[int, float]] = defaultdict(dict)
    for end in ends:
        key = (end.learning_rate, end.batch_tokens, names.index(end.optimizer))
        grid[key][end.seed] = end
        losses[key][end.seed] = end.val_loss
    best_key = best_of(losses)
    best_losses = losses[best_key].values()
    loss = sum(best_losses) / len(best_losses)
    first = next(iter(grid[best_key].values()))
    return Flat(first.parameters, first.tokens, first.flops, loss)


def check_frontier(points: Sequence[Flat]) -> None:
    """Refuse too few sizes or budgets.

    Raises:
        UserError: saying how many there are.
    """
    counts = _token_counts(points)
    enough = [size for size, count in counts.items() if count >= LEAST_BUDGETS]
    if len(enough) < LEAST_SIZES:
        sizes = [f"{size:,} ({count})" for size, count in counts.items()]
        listing = ", ".join(sizes) or "none"
        raise UserError(
            f"frontier: {len(enough)} sizes of flat models with {LEAST_BUDGETS} horizons or more, expected "
            f"{LEAST_SIZES}; there are, with their horizons: {listing}. Train more sizes (growth=scratch, "
            "schedule.horizons)"
        )


def _token_counts(points: Sequence[Flat]) -> dict[int, int]:
    """Size → its token counts."""
    counts: dict[int, int] = defaultdict(int)
    for point in points:
        counts[point.parameters] += 1
    return dict(counts)


def best_sizes(points: Sequence[Flat]) -> list[Best]:
    """The best size at each budget of a point where three sizes or more were measured.

    Raises:
        UserError: too few sizes or budgets.
    """
    check_frontier(points)
    sizes = sorted({point.parameters for point in points})
    curves = {size: _curve(points, size) for size in sizes}
    budgets = sorted({point.flops for point in points})
    best: list[Best] = []
    for flops in budgets:
        if best and flops < SLACK * best[-1].flops:
            continue
        # The loss of every size that was measured near this budget.
        losses: dict[int, float] = {}
        for size, curve in curves.items():
            loss = _loss_near(curve, flops)
            if loss is not None:
                losses[size] = loss
        if len(losses) >= AROUND:
            lowest = min(losses, key=losses.__getitem__)
            edges = (min(losses), max(losses))
            best.append(Best(flops, lowest, losses[lowest], at_edge=lowest in edges))
    if not best:
        raise UserError(
            "frontier: at no budget are three sizes measured on both sides; give the larger sizes shorter "
            "horizons and the smaller ones longer ones"
        )
    return best


def _loss_near(curve: BaselineCurve, flops: float) -> float | None:
    """The curve's loss at a budget that it reaches but for SLACK."""
    least, most = curve.flops[0], curve.flops[-1]
    near = min(max(flops, least), most)
    apart = near / flops
    if not 1 / SLACK <= apart <= SLACK:
        return None
    return curve.loss_at(near)


def _curve(points: Sequence[Flat], size: int) -> BaselineCurve:
    """One size's loss against FLOPs."""
    own = [point for point in points if point.parameters == size]
    own.sort(key=attrgetter("flops", "val_loss"))
    costs = tuple(point.flops for point in own)
    losses = tuple(point.val_loss for point in own)
    return BaselineCurve(costs, losses)


# ---- the law -----------------------------------------------------------------------------------------------


def may_fit(points: Sequence[Flat]) -> bool:
    """Check for three sizes of three token counts each, or more."""
    counts = _token_counts(points).values()
    enough = [count for count in counts if count >= LEAST_OF_LAW]
    return len(enough) >= LEAST_OF_LAW


def fit(points: Sequence[Flat], start: Law | None = None) -> Law:
    """The law through the points: Huber's loss of the log losses, from several starts or from one.

    Raises:
        UserError: fewer than three sizes with three token counts each.
    """
    import numpy as np
    from scipy.optimize import minimize

    if not may_fit(points):
        raise UserError(
            f"frontier: a law needs {LEAST_OF_LAW} sizes with {LEAST_OF_LAW} horizons each, found "
            f"{_token_counts(points)}; train more, or read the best size alone"
        )
    sizes = np.log([point.parameters for point in points])
    tokens = np.log([point.tokens for point in points])
    losses = np.log([point.val_loss for point in points])
    if start is not None:
        starts = [_vector(start)]
    else:
        exponents = itertools.product(*STARTS)
        starts = [_start(points, alpha, beta) for alpha, beta in exponents]
    best = None
    for first in starts:
        ended = minimize(_huber, first, args=(sizes, tokens, losses), method="L-BFGS-B")
        if best is None or ended.fun < best.fun:
            best = ended
    assert best is not None
    return Law(*map(float, best.x))


def _vector(law: Law) -> list[float]:
    return [law.log_e, law.log_a, law.log_b, law.alpha, law.beta]


def _start(points: Sequence[Flat], alpha: float, beta: float) -> list[float]:
    """A start in which floor, size and tokens share the loss of the smallest, shortest run alike."""
    first = points[0]
    third = math.log(first.val_loss / 3)
    return [
        third,
        third + alpha * math.log(first.parameters),
        third + beta * math.log(first.tokens),
        alpha,
        beta,
    ]


def _huber(law: NDArray[np.float64], sizes: Any, tokens: Any, losses: Any) -> float:
    import numpy as np
    from scipy.special import huber

    log_e, log_a, log_b, alpha, beta = law
    of_size = log_a - alpha * sizes
    of_tokens = log_b - beta * tokens
    floor = np.logaddexp(log_e, of_size)
    expected = np.logaddexp(floor, of_tokens)
    penalties = huber(DELTA, expected - losses)
    return float(penalties.sum() / DELTA)


def bootstrap(ends: Sequence[End], law: Law, draws: int = DRAWS) -> list[Law]:
    """Laws of as many runs, drawn with replacement; a draw with too few points is drawn again.

    The seed is fixed: the same runs give the same interval.
    """
    import numpy as np

    numbers = np.random.default_rng(0)
    flat = flat_ends(ends)
    laws: list[Law] = []
    for _ in range(10 * draws):
        indices = numbers.integers(len(flat), size=len(flat))
        drawn = [flat[index] for index in indices]
        points = flat_points(drawn)
        if may_fit(points):
            laws.append(fit(points, law))
        if len(laws) == draws:
            break
    return laws


def residuals(points: Sequence[Flat], law: Law) -> list[float]:
    """log of the measured loss minus that of the law, point by point."""
    logs = []
    for point in points:
        expected = law.loss(point.parameters, point.tokens)
        logs.append(math.log(point.val_loss / expected))
    return logs


def worth_of_arms(ends: Sequence[End], law: Law, draws: Sequence[Law]) -> list[ArmWorth]:
    """S = L⁻¹(L) / C of every end that is no flat model's, by the law and by each draw of the bootstrap.

    L⁻¹ is what a flat model of the end's size pays for its loss; a token of it costs what one of the measured
    flat models of that size does.
    """
    flat = flat_ends(ends)
    per_token = {end.parameters: end.flops / end.tokens for end in flat}
    arms = [end for end in ends if end not in flat and end.parameters in per_token]
    worths = []
    for end in sorted(arms, key=attrgetter("arm", "tokens", "name")):
        cost = per_token[end.parameters]
        by_law = speedup(end, law, cost)
        by_draws = [speedup(end, draw, cost) for draw in draws]
        worths.append(ArmWorth(end, by_law, interval_of(by_draws)))
    return worths


def speedup(end: End, law: Law, per_token: float) -> float | None:
    """S of one end by the law, at `per_token` FLOPs for a token of a flat model of its size."""
    tokens = law.tokens_for(end.parameters, end.val_loss)
    if tokens is None:
        return None
    return tokens * per_token / end.paid


def interval_of(values: Sequence[float | None]) -> tuple[float, float] | None:
    """The middle 95 % of the bootstrap's values; None where more than one in forty has none."""
    import numpy as np

    numbers = [value for value in values if value is not None]
    least = 0.975 * len(values)
    if len(numbers) < max(least, 2):
        return None
    low, high = np.quantile(numbers, [0.025, 0.975])
    return float(low), float(high)
