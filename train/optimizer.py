"""The optimizers and their parameter groups, with the proof that these cover every parameter exactly once.

hidden     matrices between the embeddings and the head: Muon's own where Muon trains, decayed like any matrix
           elsewhere
experts    stacks of such matrices, (expert, out, in): Muon takes each by itself
decayed    the other matrices: the output head, where it is untied
untouched  vectors (norm weights, all biases), kernels of convolutions and embeddings. A norm's weight should
           stay near 1 and not near 0; an embedding row is only updated when its token occurs, so decay would
           pull rare tokens towards 0 at the rate of frequent ones.

Shapes are those of the parameters: matrices (out, in), as a linear layer holds them; their stacks (expert,
out, in), which Muon takes as so many matrices. Moments and momentum have their parameter's shape.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from outgrow.model.base.errors import UserError
from outgrow.model.composite import flat
from outgrow.model.family import has_schema
from outgrow.model.matrices import parameters_of
from outgrow.model.twin import layerless
from outgrow.train.muon import Muon, StackedMuon

if TYPE_CHECKING:
    from outgrow.train.settings import OptimizerSettings

Groups = list[dict[str, Any]]

UNTOUCHED = "untouched"  # the one group without weight decay
# what a run tells of each group
HOLDS = {
    "hidden": "matrices between the embeddings and the head",
    "experts": "stacks of such matrices",
    "decayed": "the output head",
    UNTOUCHED: "norms, biases, embeddings and kernels of convolutions",
}


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """The parameters that learn, in the groups above that are not empty.

    A tied tensor counts once, as the embedding it is.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embeddings = _ids(tables)
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    heads = [] if head is None else [head]
    ends = embeddings | _ids(heads)
    learning = learning_parameters(model)
    multiplied = learning.keys() & matrix_names(model)
    matrices = {id(learning[name]) for name in multiplied} - embeddings
    hidden = matrices - ends

    def group(name: str, weight_decay: float, test: Callable[[Tensor], bool]) -> dict[str, Any]:
        return {
            "name": name,
            "params": [p for p in learning.values() if test(p)],
            "weight_decay": weight_decay,
        }

    groups: Groups = [
        group("hidden", weight_decay, lambda p: id(p) in hidden and p.ndim == 2),
        group("experts", weight_decay, lambda p: id(p) in hidden and p.ndim > 2),
        group("decayed", weight_decay, lambda p: id(p) in matrices and id(p) in ends),
        group(UNTOUCHED, 0.0, lambda p: id(p) not in matrices),
    ]
    check_cover(model, groups)
    return [group for group in groups if group["params"]]


def learning_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    parameters = model.named_parameters()
    return {name: parameter for name, parameter in parameters if parameter.requires_grad}


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    """The identities of all parameters in `modules`."""
    return {id(parameter) for module in modules for parameter in module.parameters()}


def matrix_names(model: nn.Module) -> set[str]:
    """The parameters by which activations are multiplied as matrices, stacks of experts among them.

    Of a family with a schema, and where no tiny twin of the class runs, those of two axes or more. Else what
    the twin shows: kernels of depthwise convolutions, `A_log` and experts' biases have several axes too, and
    are no matrices.
    """
    parameters = model.named_parameters()
    several = {name for name, parameter in parameters if parameter.ndim >= 2}
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return several
    settings = flat(config.to_dict())
    if has_schema(settings):
        return several
    try:
        uses = parameters_of(settings)
    except UserError:
        return several
    kinds = ("matrix", "matrices", "unused")
    others = {name for name, use in uses.items() if use.kind not in kinds}
    return {name for name in several if layerless(name) not in others}


def check_cover(model: nn.Module, groups: Groups) -> None:
    """Raise AssertionError naming each parameter that is in no group or in several."""
    times: Counter[int] = Counter()
    for group in groups:
        times.update(map(id, group["params"]))
    learning = learning_parameters(model)
    counts = {name: times[id(parameter)] for name, parameter in learning.items()}
    wrong = {name: count for name, count in counts.items() if count != 1}
    if wrong:
        raise AssertionError(
            f"each parameter must be in exactly one optimizer group; found (name: groups) {wrong}",
        )


def adamw(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), in one fused kernel where the parameters' device has one."""

    def has_fused(parameter: Tensor) -> bool:
        return parameter.is_floating_point() and parameter.device.type in {"cpu", "cuda"}

    parameters = [p for group in groups for p in group["params"]]
    fused = all(map(has_fused, parameters))
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=fused,
    )


def adamw_8bit(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW whose two moments are kept in 8 bits, block by block (arXiv 2110.02861), as torchao has it.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer=adamw_8bit: it is torchao's, which is not installed; pip install -e '.[low-bit]'",
        ) from error
    rate = settings.learning_rate
    betas = settings.betas
    return AdamW8bit(groups, lr=rate, betas=betas, eps=settings.epsilon)


def muon(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the hidden matrices, AdamW for the
    rest, at one learning rate.

    Muon's step is scaled to the RMS of AdamW's, so that AdamW's learning rate and decay serve both (arXiv
    2502.16982, section 2.2).
    """
    hidden = [group for group in groups if group["name"] == "hidden"]
    experts = [group for group in groups if group["name"] == "experts"]
    rest = [group for group in groups if group["name"] not in ("hidden", "experts")]
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        parts.append(Muon(hidden, settings))
    if experts:
        parts.append(StackedMuon(experts, settings))
    if rest:
        parts.append(adamw(rest, settings))
    return Joined(parts)


class Joined(torch.optim.Optimizer):
    """Several optimizers that step as one: the same groups and the same state, so that it is saved, loaded
    and sharded as one.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Let every part work on this optimizer's own groups and state; loading replaces both."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups = self.param_groups[first:last]
            part.state = self.state
            first = last

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        for part in self.parts:
            part.step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = defaultdict[Tensor, Any](dict, self.state)
        self._share()


Build = Callable[[Groups, Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {"adamw": adamw, "adamw_8bit": adamw_8bit, "muon": muon}


def build_optimizer(
    model: nn.Module,
    settings: OptimizerSettings,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `settings.name` asks for, over the groups above.

    Args:
        rates: parameter → share of the learning rate at which it learns; None: all at the whole rate.
    """
    groups = parameter_groups(model, settings.weight_decay)
    if rates is not None:
        groups = _by_rate(model, groups, rates)
    build = OPTIMIZERS[settings.name]
    return build(groups, settings)


def _by_rate(model: nn.Module, groups: Groups, rates: Mapping[str, float]) -> Groups:
    """The groups split so that each has one rate."""
    parameters = model.named_parameters()
    share = {id(parameter): rates[name] for name, parameter in parameters}
    split: Groups = []
    for group in groups:
        by_rate: dict[float, list[Any]] = defaultdict(list)
        for parameter in group["params"]:
            rate = share[id(parameter)]
            by_rate[rate].append(parameter)
        for rate, own in sorted(by_rate.items()):
            split.append(group | {"params": own, "rate": rate})
    return split


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write `rate`, times a group's own share of it, into every group.

    In place where it is a tensor, which compiled steps read.
    """
    for group in optimizer.param_groups:
        own = rate * group.get("rate", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own
