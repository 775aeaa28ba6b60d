"""A family of models: several sizes as products, each grown from the trunk of the one before, counted as a
whole.

Product k is the decayed end of size k. Product k + 1 was grown from k's trunk, as it stood where k began to
decay, so what k + 1 inherited is paid once: the family costs

    paid of the last + Σ over the others (paid of k − what k + 1's source had paid)

where the difference is k's own decay. The same losses from scratch cost Σ over k of L_k⁻¹(loss of k), read on
the curve of scratch's decayed ends at size k.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from outgrow.experiments.cost import half_interval, undecided
from outgrow.experiments.ends import RECORD, End, unlike_faults, write_ends
from outgrow.experiments.horizon_answer import seeds_text
from outgrow.experiments.horizon_report import markdown_table, millions, read_inputs
from outgrow.experiments.horizons import BaselineCurve, best_points, curve_of_seeds, envelope
from outgrow.experiments.publish import Writer, write_together
from outgrow.experiments.runs import SCRATCH
from outgrow.experiments.table import write_csv
from outgrow.model.base.errors import UserError

TABLE, LINES = "table.md", "family.csv"
HEADINGS = (
    *("product", "seed", "parameters", "tokens", "TFLOP in all", "of which inherited", "loss"),
    "TFLOP of scratch at this loss",
)


@dataclass(frozen=True)
class Product:
    """One size of one seed's family. `scratch_flops`: None where its loss is outside of scratch's curve."""

    arm: str
    seed: int
    parameters: int
    tokens: int
    paid: float  # with all that it inherited
    inherited: float
    val_loss: float
    scratch_flops: float | None


@dataclass(frozen=True)
class Family:
    """The products of one seed, smallest first."""

    products: tuple[Product, ...]

    @property
    def flops(self) -> float:
        """The FLOPs of all products, each trunk paid once."""
        pairs = itertools.pairwise(self.products)
        decays = [smaller.paid - larger.inherited for smaller, larger in pairs]
        largest = self.products[-1]
        return largest.paid + sum(decays)

    @property
    def scratch_flops(self) -> float | None:
        """The FLOPs of as many scratch runs that end at the same losses; None where one is out of range."""
        costs = [product.scratch_flops for product in self.products]
        numbers = [cost for cost in costs if cost is not None]
        if len(numbers) < len(costs):
            return None
        return sum(numbers)

    @property
    def saving(self) -> float | None:
        """The share of scratch's FLOPs that the family does without."""
        scratch = self.scratch_flops
        return None if scratch is None else 1.0 - self.flops / scratch


def families(ends: Iterable[End]) -> list[Family]:
    """The family of every seed that has all sizes: at each size the grown arm's longest end, at the smallest
    size scratch's.

    Raises:
        UserError: different texts, fewer than two sizes, a size without scratch's curve or with several grown
            arms, or a product that ended before the trunk that the next one was grown from.
    """
    ends = list(ends)
    UserError.collect(unlike_faults(ends))
    sizes: dict[int, list[End]] = defaultdict(list)
    for end in ends:
        sizes[end.parameters].append(end)
    if len(sizes) < 2:
        raise UserError(
            f"a family has two sizes or more; found {len(sizes)} ({', '.join(map(str, sizes))} parameters)"
        )
    by_seed: dict[int, list[Product]] = defaultdict(list)
    for number, size in enumerate(sorted(sizes)):
        for product in _products(sizes[size], smallest=number == 0):
            by_seed[product.seed].append(product)
    of_each_size = [products for products in by_seed.values() if len(products) == len(sizes)]
    complete = [Family(tuple(products)) for products in of_each_size]
    if not complete:
        raise UserError("no seed has a product of every size; train the missing ones")
    for family in complete:
        _check(family)
    return complete


def _products(ends: Sequence[End], *, smallest: bool) -> list[Product]:
    """The products of one size, seed by seed."""
    points = best_points(ends)
    size = ends[0].parameters
    present = {point.arm for point in points}
    if SCRATCH not in present:
        names = ", ".join(sorted(present))
        raise UserError(
            f"{size} parameters: no {SCRATCH} arm, on whose curve the product is read; found {names}; "
            "a family has scratch runs of every size (study family)"
        )
    arms = {SCRATCH} if smallest else present - {SCRATCH}
    if len(arms) != 1:
        names = ", ".join(sorted(arms)) or "none"
        raise UserError(f"{size} parameters: expected one grown arm, the product of this size; found {names}")
    (arm,) = arms
    own = [point for point in points if point.arm == arm]
    product = max(own, key=lambda point: (point.tokens, -point.val_loss))
    scratch = envelope(points)
    return [_product(end, curve_of_seeds(scratch, {end.seed})) for end in product.ends]


def _product(end: End, curve: BaselineCurve | None) -> Product:
    return Product(
        arm=end.arm,
        seed=end.seed,
        parameters=end.parameters,
        tokens=end.tokens,
        paid=end.paid,
        inherited=end.source_flops,
        val_loss=end.val_loss,
        scratch_flops=None if curve is None else curve.cost_of(end.val_loss),
    )


def _check(family: Family) -> None:
    for smaller, larger in itertools.pairwise(family.products):
        if larger.inherited > smaller.paid:
            raise UserError(
                f"{larger.arm} of {larger.parameters} parameters inherited {larger.inherited:.4g} FLOPs, "
                f"more than the {smaller.paid:.4g} of the product before it: it was not grown from that "
                "product's trunk"
            )


def answer(measured: Sequence[Family]) -> str:
    """The finding in one sentence."""
    count = len(measured[0].products)
    seeds = seeds_text(family.products[0].seed for family in measured)
    savings = [family.saving for family in measured if family.saving is not None]
    if len(savings) < len(measured):
        return (
            f"A product ends outside of the range of its scratch's curve, so the {count} products cannot be "
            f"held against scratch at equal losses ({seeds})."
        )
    mean = sum(savings) / len(savings)
    half = half_interval(savings)
    interval = "" if half is None else f" ± {100 * half:.0f}"
    word = "fewer" if mean > 0 else "more"
    share = f"{100 * abs(mean):.0f}{interval} % {word} FLOPs"
    doubt = undecided(len(measured))
    known_by = f"{doubt}; {seeds}" if doubt else seeds
    return (
        f"{count} products, each grown from the trunk of the one before, take {share} than {count} scratch "
        f"runs that end at the same losses ({known_by})."
    )


def cells(product: Product) -> list[str]:
    """One row of the table, under HEADINGS."""
    scratch = product.scratch_flops
    return [
        product.arm,
        str(product.seed),
        f"{product.parameters:,}",
        millions(product.tokens),
        f"{product.paid / 1e12:.2f}",
        f"{product.inherited / 1e12:.2f}",
        f"{product.val_loss:.4f}",
        "out of range" if scratch is None else f"{scratch / 1e12:.2f}",
    ]


def markdown(measured: Sequence[Family]) -> str:
    """The block that a README carries: the answer, and every product of every seed."""
    rows = [cells(product) for family in measured for product in family.products]
    return f"{answer(measured)}\n\n{markdown_table(HEADINGS, rows)}"


def write(inputs: Sequence[str], out: Path) -> list[str]:
    """Write table and records of the family in `inputs` into `out`; return what a reader should see.

    Raises:
        UserError: a folder is no run, the ends are no family, or `out` cannot be written.
    """
    _, ends, left_out = read_inputs(inputs)
    measured = families(ends)
    products = [asdict(product) for family in measured for product in family.products]
    writers: dict[str, Writer] = {
        TABLE: lambda path: path.write_text(markdown(measured), encoding="utf-8"),
        RECORD: lambda path: write_ends(path, ends),
        LINES: lambda path: write_csv(products, path),
    }
    paths = write_together(out, writers)
    notes = [folder.note for folder in left_out]
    files = [f"  {path}" for path in paths]
    return [markdown(measured), *notes, *files]
