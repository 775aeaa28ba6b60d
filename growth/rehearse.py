"""Rehearsal of a derived schema: a tiny random model of the family is grown by it, and its logits must stay.

Where these sizes have no lossless growth, an operator that does not promise one has its shapes confirmed: the
grown model loads and runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from outgrow.growth.engine.stream import write_model
from outgrow.growth.operators import default_noise
from outgrow.growth.plan import Plan, decide
from outgrow.growth.recipe import Growth
from outgrow.model.base.errors import UserError, in_one_line, names_of
from outgrow.model.base.quiet import quietly
from outgrow.model.build import computing_in, load_model
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.config import resolve_target
from outgrow.model.derive import (
    Draft,
    Inputs,
    Unfit,
    build,
    drafted_family,
    random_tokens,
    scramble,
    shapes,
    variants,
    whole_config,
    with_picture,
)
from outgrow.model.keys import HEAD_KEYS

NOISE = 0.1  # of a lossless rehearsal, so that copies differ
SAME = 2e-5  # of the largest logit: some library classes compute norms, routers and softmax in float32


@dataclass(frozen=True)
class Rehearsal:
    """A growth of a tiny random model.

    Attributes:
        draft: the schema, with the choices that kept the logits.
        changes: what the tiny config's sizes became.
        error: largest |Δlogit| in float64, relative to the largest logit; None where the operator keeps none.
    """

    draft: Draft
    changes: Mapping[str, int]
    error: float | None


@dataclass(frozen=True)
class Moved:
    """The largest |Δlogit| of a lossless growth, relative to the largest logit: at all positions, and at the
    first, where attention has nothing to weigh.
    """

    all: float
    first: float


@dataclass
class Bench:
    """A tiny random model of a family, saved once and grown again and again.

    Attributes:
        folder: of the tiny models.
        source: the saved tiny model.
        inputs: tokens, and tokens around a picture where it takes pictures.
        logits: of the tiny model for each input.
    """

    draft: Draft
    folder: Path
    source: Checkpoint
    inputs: Sequence[Inputs]
    logits: Sequence[torch.Tensor]
    count: int = 0

    def rehearse(
        self,
        draft: Draft,
        changes: Mapping[str, int],
        depth: str = "identity",
        operator: str = "lossless",
        options: Mapping[str, Any] | None = None,
    ) -> Rehearsal:
        """Grow the tiny model losslessly; where the logits move and `operator` does not promise to keep them,
        by that.

        Raises:
            Unfit: neither is confirmed.
        """
        try:
            return self.rehearse_lossless(draft, changes, depth)
        except Unfit:
            if operator == "lossless":
                raise
            likeliest = self._likeliest(draft)
            rehearsal = self._run(likeliest, changes, depth, operator, options or {})
            if rehearsal is None:  # certified lossless by a schema under which the logits move
                raise
            return rehearsal

    def rehearse_lossless(
        self, draft: Draft, changes: Mapping[str, int], depth: str = "identity"
    ) -> Rehearsal:
        """Grow the tiny model by each variant of `draft` in turn, until one keeps the logits.

        Raises:
            Unfit: none does; the message says by how much the best one moves them, or why the first one, the
                likeliest, does not grow.
        """
        hidden = draft.axes.keys.hidden
        grown = changes.get(hidden, 0)
        is_no_factor = grown % draft.axes.hidden
        if is_no_factor and draft.unproved:
            untested = names_of(draft.unproved)
            raise Unfit(
                f"{hidden} grows by whole factors alone, since no forward pass here goes through {untested}"
            )
        reason = ""
        moved: list[Moved] = []
        for variant in variants(draft):
            try:
                error = self._error(variant, changes, depth)
            except Unfit as fault:
                reason = reason or str(fault)
                continue
            if error.all <= SAME:
                return Rehearsal(variant, changes, error.all)
            moved.append(error)
        measured = [error for error in moved if isfinite(error.all)]
        if measured:
            least = min(error.all for error in measured)
            reason = f"the logits of a tiny random model move by {least:.2g} of the largest"
        message = _with_cause(draft, changes, reason, measured)
        if message == reason and is_no_factor and self._grows_by_two(draft):
            message = (
                f"{reason}, and stay where {hidden} is doubled: in this family it grows by whole factors"
            )
        raise Unfit(message)

    def _grows_by_two(self, draft: Draft) -> bool:
        """Check whether twice the hidden size keeps the logits, with as many heads or twice as many."""
        axes = draft.axes
        for keys in (axes.stream_keys, axes.width_keys):
            twice = axes.times(2, *keys)
            with suppress(Unfit):
                self.rehearse_lossless(draft, twice)
                return True
        return False

    def _likeliest(self, draft: Draft) -> Draft:
        """Find the variant that keeps the logits when there are more heads.

        It tells how queries, keys and values are fused.
        """
        axes = draft.axes
        keys = axes.width_keys if axes.coupled else axes.head_keys
        more = axes.times(2, *keys)
        try:
            return self.rehearse_lossless(draft, more).draft
        except Unfit:
            return draft

    def _run(
        self,
        draft: Draft,
        changes: Mapping[str, int],
        depth: str,
        operator: str,
        options: Mapping[str, Any],
    ) -> Rehearsal | None:
        """Grow without comparing logits; None where the growth is certified to keep them."""
        noise = default_noise(operator)
        plan = self._plan(draft, changes, depth, operator, noise, options)
        if plan.certificate.lossless:
            return None
        self._logits_of(plan)
        return Rehearsal(draft, changes, None)

    def _error(self, draft: Draft, changes: Mapping[str, int], depth: str) -> Moved:
        """Measure how far a lossless growth moves the logits, relative to the largest."""
        plan = self._plan(draft, changes, depth, "lossless", NOISE, {})
        if not plan.certificate.lossless:
            raise Unfit("; ".join(plan.certificate.reasons))
        logits = self._logits_of(plan)
        pairs = zip(logits, self.logits, strict=True)
        errors = torch.stack([_relative_errors(grown, source) for grown, source in pairs])
        return Moved(float(errors.max()), float(errors[:, 0].max()))  # NaN where any is

    def _plan(
        self,
        draft: Draft,
        changes: Mapping[str, int],
        depth: str,
        operator: str,
        noise: float,
        options: Mapping[str, Any],
    ) -> Plan:
        """Decide the growth of the tiny model and check its shapes against the library's class.

        Raises:
            Unfit: it does not grow, or into other shapes than the class wants.
        """
        axes = draft.axes
        family = drafted_family(draft, axes.config, axes.shapes)
        config = whole_config(self.source.config)  # with the layer count of a class that saves none
        try:
            target = resolve_target(changes, config, family)
            growth = Growth(family, config, target)
            plan = decide(growth, operator, options, depth=depth, noise=noise, held=self.source)
        except UserError as fault:  # of the miniature, which nobody asked for
            raise Unfit(str(fault)) from None
        if plan.target_parameters == plan.source_parameters:
            raise Unfit(f"nothing grows with {', '.join(changes)}")
        planned = {step.name: step.shape for step in plan.steps}
        target_shapes = shapes(plan.target_config)
        changed = [name for name, shape in target_shapes.items() if planned.get(name) != shape]
        differing = sorted(changed)
        further = [name for name in differing if name not in planned]
        if further:
            raise Unfit(
                f"transformers' class has {names_of(further)} then, of which the source has nothing: with "
                f"{', '.join(changes)} there are more tensors, not larger ones"
            )
        if differing:
            name = differing[0]
            raise Unfit(
                f"{name} would become {planned[name]} where transformers' class wants "
                f"{target_shapes[name]}: how it follows {', '.join(changes)} was not recognised"
            )
        return plan

    def _logits_of(self, plan: Plan) -> list[torch.Tensor]:
        """Write the model that a plan makes of the tiny one, load it as any other and compute its logits."""
        self.count += 1
        out = self.folder / str(self.count)
        write_model(plan, self.source, out, threads=1)
        return _logits(out, self.inputs)


@contextmanager
def bench(draft: Draft) -> Iterator[Bench]:
    """Save a tiny random model of the family of `draft`, in a folder that goes away with it.

    Raises:
        Unfit: it cannot be saved and loaded again.
    """
    config = draft.axes.config
    tokens = random_tokens(config, draft.axes.keys, seed=1)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, quietly():
        source = Path(folder) / "source"
        model = build(config, "cpu")
        scramble(model, seed=2)
        model.save_pretrained(source)
        with computing_in("float64"):
            pictured = with_picture(model, tokens)
        inputs = [{"input_ids": tokens}]
        if pictured is not None:
            inputs.append(pictured)
        logits = _logits(source, inputs)
        with Checkpoint(source) as checkpoint:
            yield Bench(draft, Path(folder), checkpoint, inputs, logits)


def _with_cause(draft: Draft, changes: Mapping[str, int], reason: str, moved: Sequence[Moved]) -> str:
    """Name the numbers that the class computes from the hidden size or the layers, which no growth can set,
    or heads that are not alike.
    """
    axes = draft.axes
    keys = axes.keys
    more_layers = keys.layers in changes and axes.computed_by_depth and not axes.by_depth
    if more_layers:
        return (
            f"{reason}; {axes.computed_by_depth[0]}, which transformers computes from {keys.layers}, is in "
            "no file"
        )
    computed = axes.computed
    rounded = axes.rounded
    widens = bool(changes.keys() & set(axes.stream_keys))
    if widens and computed:
        return (
            f"{computed[0]} is in no file: transformers computes it from {keys.hidden}, so a wider model's "
            f"would be another's ({reason})"
        )
    if widens and rounded:
        number = f"{rounded[0]}, which transformers computes from {keys.hidden}"
        return f"{reason}; {number}, is rounded to few digits"
    same_dims = not changes.keys() & {keys.head_dim, *HEAD_KEYS}
    more_heads = keys.heads in changes and same_dims
    if more_heads and any(error.first <= SAME for error in moved):
        return (
            f"{reason}, and those of a first token stay: how a head weighs earlier tokens depends on how "
            f"many heads there are, as the slopes of ALiBi do, so {keys.heads} cannot grow losslessly"
        )
    return reason


def _relative_errors(grown: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Compare logits (row, position, token) with those of the source, which may have fewer tokens: the
    largest difference at the first position, and at all.
    """
    tokens = source.shape[-1]
    difference = (grown[..., :tokens] - source).abs()
    first = difference[:, 0].max()
    return torch.stack([first, difference.max()]) / source.abs().max()


def _logits(folder: Path, inputs: Sequence[Inputs]) -> list[torch.Tensor]:
    """Load a model and run it on each input; keys and values are cached where the library does so by
    itself."""
    try:
        model = load_model(folder, dtype="float64", attention="eager").eval()
        with torch.no_grad(), computing_in("float64"):
            return [model(**arguments).logits for arguments in inputs]
    except UserError as fault:
        raise Unfit(str(fault)) from None
    except Exception as fault:  # the library's classes raise every kind
        raise Unfit(f"a tiny model of the family does not load or run ({in_one_line(fault)})") from None
