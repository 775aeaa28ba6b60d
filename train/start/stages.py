"""Stages: the stretches of a run in which its network keeps its size, and what each of them costs.

A run has one stage, unless its growth leaf lists several: then it trains a smaller network, grows it and goes
on, in one folder, on one clock, with one schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from outgrow.growth.moments import Rule
from outgrow.growth.planning import plan
from outgrow.growth.resolve import known_family
from outgrow.model.base.errors import UserError
from outgrow.model.config import resolve_target
from outgrow.model.family import Family
from outgrow.model.geometry import flops_per_token, unpaid_flops_per_token
from outgrow.model.keys import follow_layers
from outgrow.train.run.folder import START
from outgrow.train.run.record import Span
from outgrow.train.settings import GrowthSettings, Settings, StageSettings

FOLDER = "stages"


@dataclass(frozen=True)
class Stage:
    """One stretch.

    Attributes:
        number: from 0.
        first, last: steps done before it and after it.
        config: of its network.
        growth: the growth that makes its network: the run's own, and later that of what the stage before
            left.
        rule: how the optimizer's state grows from the stage before (`growth.moments`); reset: it begins anew.
    """

    number: int
    first: int
    last: int
    config: dict[str, Any]
    growth: GrowthSettings
    rule: Rule = "reset"

    def start(self, folder: Path) -> Path:
        """The folder of the weights that it starts from, in a run's folder."""
        if self.number == 0:
            return folder / START
        return folder / FOLDER / str(self.number)

    def averaged_start(self, folder: Path) -> Path:
        """The folder of the averaged weights (EMA) that a later stage starts from."""
        return folder / FOLDER / f"{self.number}-ema"


def stages_of(settings: Settings, config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of a run whose last network has `config`.

    Raises:
        UserError: a stage has no step, or the family is unknown to the library too.
    """
    steps = settings.budget.steps
    growth = settings.growth
    if not growth.stages:
        return (Stage(0, 0, steps, dict(config), growth),)
    resolved = known_family(config)
    last_config = resolved.config or config
    stages: list[Stage] = []
    for number, stage in enumerate(growth.stages):
        first = stages[-1].last if stages else 0
        is_last = number == len(growth.stages) - 1
        last = steps if is_last else _last_step(stage, settings)
        if last <= first:
            raise UserError(
                f"growth.stages[{number}]: from step {first} to {last} of {steps} there is no step; raise "
                "train.budget_tokens",
            )
        own = growth
        if number > 0:
            options = dict(stage.options)
            own = GrowthSettings(growth.name, stage.operator, options)
        own_config = _config_of(last_config, resolved.family, stage)
        stages.append(Stage(number, first, last, own_config, own, stage.rule))
    return tuple(stages)


def _last_step(stage: StageSettings, settings: Settings) -> int:
    """The step after which a stage ends that another one follows."""
    budget = settings.budget
    if stage.until_tokens is not None:
        return round(stage.until_tokens / budget.tokens_per_step)
    assert stage.until is not None
    return round(stage.until * budget.steps)


def _config_of(config: Mapping[str, Any], family: Family, stage: StageSettings) -> dict[str, Any]:
    """The run's last config with a share of its layers, and with other sizes."""
    depth = family.require(config, "num_hidden_layers")
    count = max(1, round(stage.layers * depth))
    own = {family.field_name("num_hidden_layers"): count, **stage.sizes}
    smaller = resolve_target(own, config, family)
    first = range(count)
    return {key: follow_layers(key, value, first, depth) for key, value in smaller.items()}


def check_growths(stages: Sequence[Stage], settings: Settings) -> None:
    """Plan the growth between every two stages, before anything is trained.

    Raises:
        UserError: a stage does not grow into the next one.
    """
    for before, stage in pairwise(stages):
        growth = stage.growth
        try:
            plan(before.config, stage.config, growth.operator, seed=settings.seed, **growth.options)
        except UserError as fault:
            raise UserError(f"growth.stages[{stage.number}]: {fault}") from None


def spans_of(
    stages: Sequence[Stage],
    settings: Settings,
    teacher: Mapping[str, Any] | None,
    frozen: Mapping[int, Collection[str]],
) -> list[Span]:
    """FLOPs of a run's steps: its networks forward and backward, and while it teaches, the teacher forward.

    A forward pass is a third of both.

    Args:
        teacher: its config, if there is one.
        frozen: the tensors that learn nothing, by the number of the stage; what they need no gradient for is
            not counted.
    """
    budget = settings.budget
    context = settings.train.context
    taught_steps, teaching = 0, 0.0
    if settings.transfer.teacher is not None and teacher is not None:
        until = settings.transfer.teacher.until
        teaching = flops_per_token(teacher, context) / 3
        shares = map(budget.progress, range(budget.steps))
        taught_steps = sum(share < until for share in shares)

    ends = {stage.last for stage in stages}
    if teaching:
        ends.add(taught_steps)
    spans = []
    for last in sorted(ends - {0}):
        stage = next(stage for stage in stages if last <= stage.last)
        learn_nothing = frozen.get(stage.number, ())
        unpaid = unpaid_flops_per_token(stage.config, context, learn_nothing)
        own = flops_per_token(stage.config, context) - unpaid
        taught = teaching if last <= taught_steps else 0.0
        spans.append(Span(last, own + taught))
    return spans
