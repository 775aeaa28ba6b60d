"""Changes of a plan from a dense MLP to experts, or from few experts to many: the facts that plan, proof and
record share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from outgrow.growth.changes import ExpertCopy, Upcycling
from outgrow.growth.decision import Decision, Step
from outgrow.model.base.errors import UserError
from outgrow.model.family import Config, Tensor
from outgrow.model.mixture import Mixture

FFN = "ffn"  # the space of the units of a dense MLP


@dataclass(frozen=True)
class Expert:
    """Origin of one routed expert.

    Attributes:
        source: of a source that has experts, the one that it copies; 0 of a dense MLP.
        start, stop: which units of it, after growth in width.
        row: which router row it has; experts of the same row are chosen together.
    """

    source: int
    start: int
    stop: int
    row: int


@dataclass(frozen=True, eq=False)
class Change:
    """Continuation of a plan after it has grown within the source's family.

    Attributes:
        within: the plan in that family.
        mixture: the target's family.
        options: the operator's options.
        config: of the target.
        experts: in the order of their numbers, in every layer that has them.
        routed: target tensor → its expert's number, for the matrices of routed experts; router tensors have
            -1.
        shared: how many of the first units every token goes through.
        chosen_before: how many experts a token was sent to; 1 of a dense MLP.
    """

    within: Decision
    mixture: Mixture
    options: Upcycling | ExpertCopy
    config: Config
    experts: tuple[Expert, ...]
    routed: Mapping[str, int]
    shared: int
    chosen_before: int = 1

    @property
    def chosen(self) -> int:
        """Number of experts that a token is sent to."""
        return int(self.config[self.mixture.top_k])

    @property
    def group(self) -> int:
        """Number of experts that have the same router row."""
        row = self.experts[0].row
        return sum(expert.row == row for expert in self.experts)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        return self.mixture.sparse_layers(self.config)

    def idle_parameters(self, plan: Decision) -> int:
        """Number of parameters that one token does not meet: those of the experts that it is not sent to."""
        idle = 1 - self.chosen / len(self.experts)
        number_of = self.routed
        of_experts = [step for step in plan.steps if number_of.get(step.name, -1) >= 0]
        parameters = sum(prod(step.shape) for step in of_experts)
        return round(parameters * idle)

    def active_parameters(self, plan: Decision) -> int:
        """Number of parameters that one token meets."""
        return plan.target_parameters - self.idle_parameters(plan)

    def active_flops(self, plan: Decision) -> int:
        """Forward FLOPs per token of the matrices that it meets, 2 per weight; attention's scores are not
        counted.
        """
        tensors = plan.family.tensors(self.config)
        matrices = (
            prod(tensor.shape) for tensor in tensors if tensor.line.kind == "linear" and not tensor.is_bias
        )
        return 2 * (sum(matrices) - self.idle_parameters(plan))

    def share_of_gradient(self, step: Step) -> float:
        """Share of its source's gradient that a target tensor's is beyond what the maps say: 0 where no
        factor gives it.

        A routed expert of a dense MLP sees the tokens that are sent to it; a copy among m that are chosen
        together sees each with 1/m.
        """
        if step.name not in self.routed:
            return 1.0
        if isinstance(self.options, Upcycling):
            return 0.0
        # of router rows the map counts the copies
        is_router = self.routed[step.name] < 0
        return 1.0 if is_router else 1 / self.group

    def repeats(self, step: Step) -> bool:
        """Check whether a target tensor is of an expert that holds what one before it holds already."""
        number = self.routed.get(step.name, -1)
        if number < 0:
            return False
        expert = self.experts[number]
        before = self.experts[:number]
        return any(_alike(expert, earlier) for earlier in before)

    @property
    def moments_lost(self) -> Iterator[str]:
        """Reasons why moments of experts and routers are not those of the mixture's own gradients."""
        if isinstance(self.options, Upcycling):
            yield (
                "experts and routers start with moments of zero: each expert sees the tokens that are sent "
                "to it, the MLP saw all"
            )
        yield (
            "the routers' load-balancing term, where one is trained on, has gradients that the source had not"
        )

    def summary(self, plan: Decision) -> str:
        """One line: the experts, and what a token meets of them."""
        count = len(self.layers)
        is_everywhere = count >= plan.layers.target
        where = "in every layer" if is_everywhere else f"in {count} of {plan.layers.target} layers"
        shared = f", {self.shared} units shared" if self.shared else ""
        first = self.experts[0]
        units = first.stop - first.start
        return (
            f"{self.mixture.name}: {len(self.experts)} experts of {units} units {where}, {self.chosen} for "
            f"each token{shared}; {self.active_parameters(plan):,} parameters active, "
            f"{self.active_flops(plan):.3g} forward FLOPs in their matrices"
        )

    def to_dict(self) -> dict[str, Any]:
        options = dict(vars(self.options))
        options.pop("width", None)
        return {
            "from": self.within.family.name,
            "width": self.within.operator,
            **options,
            "experts": [[expert.source, expert.start, expert.stop, expert.row] for expert in self.experts],
            "chosen": self.chosen,
            "shared": self.shared,
            "layers": list(self.layers),
            "within": self.within.hash,
        }


def _alike(one: Expert, other: Expert) -> bool:
    same_units = (one.start, one.stop) == (other.start, other.stop)
    return same_units and one.source == other.source


def needed(sizes: Config, mixture: Mixture, key: str) -> int:
    """A size that the target must name.

    Raises:
        UserError: it does not.
    """
    if key not in sizes:
        raise UserError(f"target: {key} is missing, which {mixture.name!r} needs")
    return mixture.size(sizes, key)


def routed_tensors(mixture: Mixture, config: Config, count: int) -> dict[str, int]:
    """Target tensor → its expert, of every layer that has experts; -1 for what routes."""
    modules = filter(None, (mixture.router, mixture.shared_gate))
    routing = [f"{name}.weight" for name in modules]
    if mixture.correction:
        routing.append(mixture.correction)
    patterns = dict.fromkeys(routing, -1)
    for number in range(count):
        for name in mixture.experts.values():
            module = name.replace("#", str(number))
            patterns[f"{module}.weight"] = number
    tensors: dict[str, int] = {}
    for layer in mixture.sparse_layers(config):
        for name, number in patterns.items():
            tensors[name.replace("*", str(layer))] = number
    return tensors


def numbered(tensor: Tensor) -> str:
    """The module of an expert's tensor with `#` for the expert's number."""
    name = tensor.line.name
    if "{" not in name:
        return name
    before = name.partition("{")[0]
    after = name.partition("}")[2]
    return f"{before}#{after}"
