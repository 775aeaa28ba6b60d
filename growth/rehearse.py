"""Confirming a derived schema: a tiny random model of the family is grown by it, and its logits must stay.

Where no lossless growth of these sizes is, an operator that does not promise one has its shapes confirmed: the grown model loads and runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from outgrow.growth.engine.stream import write_model
from outgrow.growth.operators import default_noise
from outgrow.growth.plan import Plan, decide
from outgrow.growth.recipe import Growth
from outgrow.model.base.errors import UserError
from outgrow.model.base.quiet import quietly
from outgrow.model.build import computing_in, load_model
from outgrow.model.checkpoint import Checkpoint, names_of
from outgrow.model.config import resolve_target
from outgrow.model.derive import random_tokens
from outgrow.model.derive.pictures import Inputs, with_picture
from outgrow.model.derive.probe import build, scramble, shapes
from outgrow.model.derive.roles import Draft
from outgrow.model.derive.schema import drafted_family, variants

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


@dataclass
class Bench:
    """A tiny random model of a family, saved once and grown as often as one likes.

    Attributes:
        folder: of the tiny models.
        source: the saved tiny model.
        inputs: what it is run on: tokens, and tokens around a picture where it takes pictures.
        logits: what it makes of each.
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
        """Grow the tiny model losslessly; where that does not keep the logits and `operator` does not promise to, by that.

        Raises:
            UserError: neither is confirmed.
        """
        try:
            return self.rehearse_lossless(draft, changes, depth)
        except UserError:
            if operator == "lossless":
                raise
            rehearsal = self._run(self._likeliest(draft), changes, depth, operator, options or {})
            if rehearsal is None:  # certified lossless by a schema under which the logits move
                raise
            return rehearsal

    def rehearse_lossless(self, draft: Draft, changes: Mapping[str, int], depth: str = "identity") -> Rehearsal:
        """Grow the tiny model by `draft`, by each of its variants in turn, until one keeps the logits.

        Raises:
            UserError: none does; the message says by how much the best one moves them, or why the first one, the likeliest, does not grow.
        """
        hidden = draft.axes.keys.hidden
        if changes.get(hidden, 0) % draft.axes.hidden and draft.unproved:
            raise UserError(f"{hidden} grows by whole factors alone, since no forward pass here goes through {names_of(draft.unproved)}")
        reason, least = "", float("inf")
        for variant in variants(draft):
            try:
                error = self._error(variant, changes, depth)
            except UserError as fault:
                reason = reason or str(fault)
                continue
            if error <= SAME:
                return Rehearsal(variant, changes, error)
            least = min(least, error)
        if isfinite(least):
            reason = f"the logits of a tiny random model move by {least:.2g} of the largest"
        if changes.keys() & set(draft.axes.stream_keys):
            hidden, (computed, rounded) = draft.axes.keys.hidden, (draft.axes.computed, draft.axes.rounded)
            if computed:
                reason = (
                    f"{computed[0]} is in no file: transformers computes it from {hidden}, so a wider model's would be another's ({reason})"
                )
            elif rounded:
                reason = f"{reason}; {rounded[0]}, which transformers computes from {hidden}, is rounded to few digits"
        raise UserError(reason)

    def _likeliest(self, draft: Draft) -> Draft:
        """The variant that keeps the logits when there are more heads, which tells how queries, keys and values are fused."""
        axes = draft.axes
        more = axes.times(2, *(axes.width_keys if axes.coupled else axes.head_keys))
        try:
            return self.rehearse_lossless(draft, more).draft
        except UserError:
            return draft

    def _run(self, draft: Draft, changes: Mapping[str, int], depth: str, operator: str, options: Mapping[str, Any]) -> Rehearsal | None:
        """A growth whose logits are not compared; None where it is certified to keep them."""
        plan = self._plan(draft, changes, depth, operator, default_noise(operator), options)
        if plan.certificate.lossless:
            return None
        self._logits_of(plan)
        return Rehearsal(draft, changes, None)

    def _error(self, draft: Draft, changes: Mapping[str, int], depth: str) -> float:
        """How far a lossless growth moves the logits, relative to the largest."""
        plan = self._plan(draft, changes, depth, "lossless", NOISE, {})
        if not plan.certificate.lossless:
            raise UserError("; ".join(plan.certificate.reasons))
        pairs = zip(self._logits_of(plan), self.logits, strict=True)
        errors = [(a[..., : b.shape[-1]] - b).abs().max() / b.abs().max() for a, b in pairs]
        return float(torch.stack(errors).max())  # NaN where any is

    def _plan(self, draft: Draft, changes: Mapping[str, int], depth: str, operator: str, noise: float, options: Mapping[str, Any]) -> Plan:
        """The growth of the tiny model, held against the library's class.

        Raises:
            UserError: it does not grow, or into other shapes than the class wants.
        """
        family = drafted_family(draft, draft.axes.config, draft.axes.shapes)
        config = self.source.config
        growth = Growth(family, config, resolve_target(changes, config, family))
        plan = decide(growth, operator, options, depth=depth, noise=noise, held=self.source)
        if plan.target_parameters == plan.source_parameters:
            raise UserError(f"nothing grows with {', '.join(changes)}")
        planned, wanted = {step.name: step.shape for step in plan.steps}, shapes(plan.target_config)
        if differ := sorted(name for name, shape in wanted.items() if planned.get(name) != shape):
            raise UserError(
                f"{differ[0]} would become {planned.get(differ[0], 'none')} where transformers' class wants {wanted[differ[0]]}: how it "
                f"follows {', '.join(changes)} was not recognised"
            )
        return plan

    def _logits_of(self, plan: Plan) -> list[torch.Tensor]:
        """The logits of the model that a plan makes of the tiny one, loaded from disk as any other."""
        self.count += 1
        out = self.folder / str(self.count)
        write_model(plan, self.source, out, threads=1)
        return _logits(out, self.inputs)


@contextmanager
def bench(draft: Draft) -> Iterator[Bench]:
    """A tiny random model of the family of `draft`, in a folder that goes away with it.

    Raises:
        UserError: it cannot be saved and loaded again.
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
        inputs = [{"input_ids": tokens}, *([] if pictured is None else [pictured])]
        logits = _logits(source, inputs)
        with Checkpoint(source) as checkpoint:
            yield Bench(draft, Path(folder), checkpoint, inputs, logits)


def _logits(folder: Path, inputs: Sequence[Inputs]) -> list[torch.Tensor]:
    try:
        model = load_model(folder, dtype="float64", attention="eager").eval()
        with torch.no_grad(), computing_in("float64"):
            return [model(**given).logits for given in inputs]  # remembering keys and values where the library does so by itself
    except UserError:
        raise
    except Exception as fault:  # the library's classes raise every kind
        reason = " ".join(str(fault).split())[:200]
        raise UserError(f"a tiny model of the family does not load or run ({type(fault).__name__}: {reason})") from None
