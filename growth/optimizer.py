"""An optimizer's saved state, in and out: PyTorch's or Accelerate's file read under tensor names, and grown
moments put into an optimizer.

Growing itself is `growth.moments`; this file knows how PyTorch numbers parameters and what it calls the
moments. One optimizer may keep Adam's two moments of some parameters and Muon's momentum of others. Muon
counts no steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.growth.arguments import check_arguments
from outgrow.growth.engine.tensors import Tensors, expand
from outgrow.growth.memory import config_of
from outgrow.growth.moments import ADAM, MUON, OPTIMIZER, POWERS, STATE, Rule, moments_plan
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError, first_line
from outgrow.model.base.files import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    _Moments = dict[str, torch.Tensor]  # by name

FILES = ("optimizer.bin", "optimizer.pt")  # as Accelerate calls it; as Transformers and our own trainer do


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """An optimizer's state by stored tensor name.

    Attributes:
        moments: `exp_avg.NAME` and `exp_avg_sq.NAME`, or `momentum_buffer.NAME` → the moment, in the shape of
            the tensor.
        step: how many steps Adam's have averaged.
    """

    moments: Tensors
    step: int


def state_of_source(state: Mapping[str, Any], plan: Plan) -> OptimizerState:
    """A state dict as `torch.optim.Adam`, `AdamW` and `Muon` make it for the source's model, under the names
    of its file's tensors.

    Raises:
        UserError: it is neither Adam's nor Muon's, or its tensors are not the model's.
    """
    from outgrow.model.build import meta_model
    from outgrow.model.conversion import in_file

    parameters = meta_model(plan.source_config).named_parameters()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    groups = state.get("param_groups")
    per_parameter = state.get("state")
    if not isinstance(groups, list) or not isinstance(per_parameter, Mapping):
        raise UserError(
            "optimizer state: expected the keys 'state' and 'param_groups', as optimizer.state_dict() "
            "gives them"
        )
    _check_groups(groups)
    numbering = _numbering(groups, shapes)
    # a parameter that never had a gradient has no entry
    entries = {number: per_parameter[number] for number in numbering if number in per_parameter}
    if not entries:
        raise UserError("optimizer state: empty; was it saved before the first step?")
    named: dict[str, _Moments] = defaultdict(dict)
    for number, entry in entries.items():
        name = numbering[number]
        is_muons = isinstance(entry, Mapping) and "momentum_buffer" in entry
        kinds = MUON if is_muons else ADAM
        _check_entry(entry, kinds, number, name, shapes[name])
        for moment in kinds:
            named[moment][name] = entry[moment]
    _complete(named, shapes)
    stored = {moment: in_file(plan.source_config, tensors) for moment, tensors in named.items()}
    tensors_of_file = plan.growth.source_family.tensors(plan.source_config)
    _complete(stored, {tensor.name: tensor.shape for tensor in tensors_of_file})
    moments: _Moments = {}
    for moment, tensors in stored.items():
        moments |= {f"{moment}.{name}": tensor for name, tensor in tensors.items()}
    steps = [_steps(entry, number) for number, entry in entries.items()]
    return OptimizerState(Tensors(moments), max(steps))


def _check_groups(groups: Sequence[Any]) -> None:
    """Refuse groups that are not as an optimizer saves them."""
    for position, group in enumerate(groups):
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(numbers, list):
            raise UserError(
                f"optimizer state: group {position} has no list of 'params'; expected what "
                "optimizer.state_dict() gives"
            )


def _check_entry(entry: Any, moments: Sequence[str], number: int, name: str, shape: tuple[int, ...]) -> None:
    """Refuse the state of a parameter that lacks one of its moments, or is not of the parameter's shape."""
    import torch

    for moment in moments:
        tensor = entry.get(moment) if isinstance(entry, Mapping) else None
        if not isinstance(tensor, torch.Tensor):
            contents = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
            raise UserError(
                f"optimizer state: parameter {number} ({name}) has no {moment!r}, found "
                f"{contents}; only Adam's and Muon's state grows"
            )
        own = tuple(tensor.shape)
        if own != shape:
            raise UserError(
                f"optimizer state: {moment} of parameter {number} has shape {own}, {name} has {shape}; is it "
                "the state of another model, or were its groups filled in another order?"
            )

        if fault := _unusable(moment, tensor):
            raise UserError(
                f"optimizer state: {moment} of parameter {number} ({name}) {fault}; no optimizer can go on "
                "from it: save the state anew, or go on without it"
            )


def _unusable(moment: str, tensor: torch.Tensor) -> str | None:
    """Say why no step can be taken with these values of a moment; None where it can.

    One such entry makes a weight NaN, and the next step every other.
    """
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"is {tensor.dtype}".replace("torch.", "")
    if not tensor.numel():
        return None
    lowest, highest = map(float, tensor.aminmax())  # NaN where one entry is
    if not (isfinite(lowest) and isfinite(highest)):
        return "has an entry that is not finite"
    is_square = POWERS[moment] == 2
    return "has an entry below zero, and is a mean of squares" if is_square and lowest < 0 else None


def _steps(entry: Mapping[str, Any], number: int) -> int:
    """The number of steps that a parameter's moments have averaged; 0 where it is not told."""
    value = entry.get("step", 0)
    count = -1
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):  # several entries, NaN, infinite
        count = int(value)
    if count < 0:
        raise UserError(
            f"optimizer state: the step of parameter {number} is {value!r}; expected how many it has taken"
        )
    return count


def _complete(moments: Mapping[str, _Moments], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Fill in zeros for what never had a gradient: where its moments would have begun, whichever it will
    have."""
    import torch

    every = [tensor for tensors in moments.values() for tensor in tensors.values()]
    dtype = every[0].dtype
    begun = set(chain.from_iterable(moments.values()))
    for name in shapes.keys() - begun:
        for tensors in moments.values():
            tensors[name] = torch.zeros(shapes[name], dtype=dtype)


def _numbering(groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Parameter number → its name: by the names PyTorch saves, else in the model's order, in one group or
    matrices before vectors.
    """
    numbers = list(chain.from_iterable(group["params"] for group in groups))
    # of those that were trained: frozen ones have no state
    if all("param_names" in group for group in groups):
        saved_names = chain.from_iterable(group["param_names"] for group in groups)
        named = [_plain(str(name)) for name in saved_names]
        strange = set(named) - shapes.keys()
        if unknown := sorted(strange):
            raise UserError(
                f"optimizer state: parameter {unknown[0]!r} is none of the source's ({len(unknown)} are not)"
            )
        if len(named) != len(numbers):
            raise UserError(f"optimizer state: {len(numbers)} parameters and {len(named)} names of them")
        return dict(zip(numbers, named, strict=True))
    if len(numbers) != len(shapes):
        raise UserError(
            f"optimizer state: {len(numbers)} parameters, the source's model has {len(shapes)}; is it the "
            "state of another model?"
        )
    if len(groups) == 1:
        return dict(zip(numbers, shapes, strict=True))
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    first_count = len(groups[0]["params"])
    has_two = len(groups) == 2
    if has_two and first_count == len(matrices):
        others = [name for name in shapes if name not in matrices]
        names = [*matrices, *others]
        return dict(zip(numbers, names, strict=True))
    raise UserError(
        f"optimizer state: {len(groups)} groups without names, so which parameter is which is not known; "
        "build the optimizer from named parameters (groups of (name, parameter) pairs, which PyTorch "
        "saves along), or with one group"
    )


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name


def read_optimizer(path: Path | str, plan: Plan) -> OptimizerState:
    """The state of the source's optimizer from a file, or from a folder that holds one (`optimizer.bin`,
    `optimizer.pt`).

    Raises:
        UserError: there is no such file, or it is no state of Adam's or Muon's for the source's model.
    """
    return state_of_source(read_state(path), plan)


def read_state(path: Path | str) -> Mapping[str, Any]:
    """An optimizer's state dict from such a file or folder.

    It is opened without executing anything that it may contain (`torch.load` with `weights_only`), mapped
    into memory rather than read.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    import torch

    file = Path(path)
    if file.is_dir():
        paths = [file / name for name in FILES]
        files = [path for path in paths if path.is_file()]
        if not files:
            raise UserError(f"optimizer {file}: no {' or '.join(FILES)} in this folder")
        file = files[0]
    if not file.is_file():
        raise UserError(f"optimizer {file}: no such file or folder")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as fault:  # torch reports a damaged or unsafe file in many ways
        raise UserError(
            f"optimizer {file}: cannot be read as a PyTorch file of tensors ({first_line(fault)})"
        ) from None
    if not isinstance(state, Mapping):
        raise UserError(
            f"optimizer {file}: expected a dict as optimizer.state_dict() gives it, found "
            f"{type(state).__name__}"
        )
    return state


def moments_in(path: Path | str) -> list[str]:
    """The kinds of moments in such a file or folder, none where it is no optimizer's state."""
    per_parameter = read_state(path).get("state")
    if not isinstance(per_parameter, Mapping):
        return []
    entries = [entry for entry in per_parameter.values() if isinstance(entry, Mapping)]
    return _kinds(chain.from_iterable(entries))


def named_state(optimizer: torch.optim.Optimizer, model: PreTrainedModel) -> dict[str, Any]:
    """The optimizer's state dict, with the parameters' names beside their numbers, as PyTorch saves them of
    named parameters.

    Raises:
        UserError: it has parameters that are not the model's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    for saved, group in groups:
        identities = [id(parameter) for parameter in group["params"]]
        strangers = [identity for identity in identities if identity not in names]
        if strangers:
            raise UserError(
                f"optimizer: has {len(strangers)} parameters that the model has not; give the optimizer "
                "that trained this very model"
            )
        saved["param_names"] = [names[identity] for identity in identities]
    return state


def grow_optimizer(
    source: torch.optim.Optimizer,
    source_model: PreTrainedModel,
    target: torch.optim.Optimizer,
    target_model: Any,
    plan: Plan,
    moments: Rule = "own",
) -> None:
    """Fill the optimizer of a grown model, in memory, from the source's.

    Args:
        plan: the growth of `source_model` into `target_model`, as `grow_model` followed it.
        moments: how it grows (`growth.moments`).

    Raises:
        UserError: one is not its model's, or both are not optimizers of one kind.
    """
    check_arguments(moments=moments)
    state = state_of_source(named_state(source, source_model), plan)
    growth = moments_plan(plan, state.moments.dtypes, moments)
    grown = dict(expand(growth, state.moments))
    fill(target, target_model, grown, grown.__getitem__, state.step)


def load_optimizer(folder: Path | str, target: torch.optim.Optimizer, target_model: PreTrainedModel) -> None:
    """Fill the optimizer of a grown model from what `grow(…, optimizer=…)` wrote beside the weights in
    `folder`.

    Raises:
        UserError: the folder holds no moments, or other tensors than the model's.
    """
    from safetensors import safe_open

    from outgrow.model.headers import tensor_table

    folder = Path(folder) / OPTIMIZER
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; grow with optimizer=FILE to have the optimizer's moments grown too"
        )
    files = {name: stored.file for name, stored in tensor_table(folder).items()}
    way_out = "grow anew, or go on without it"
    record = read_object(folder / STATE, way_out)
    step = record.get("step")
    if not isinstance(step, int) or step < 0:
        raise UserError(f"{folder / STATE}: its step is {step!r}, expected how many were taken; {way_out}")

    def moment(name: str) -> torch.Tensor:
        with safe_open(files[name], "pt") as file:
            return file.get_tensor(name)

    fill(target, target_model, files, moment, step)


def fill(
    optimizer: torch.optim.Optimizer,
    model: PreTrainedModel,
    moment_names: Collection[str],
    moment: Callable[[str], torch.Tensor],
    step: int,
) -> None:
    """Set the state of every parameter of `model` that `optimizer` has; its learning rates and groups stay.

    Args:
        moment_names: of the moments that there are: `exp_avg.NAME`, `exp_avg_sq.NAME` or
            `momentum_buffer.NAME` of the tensors in the model's file.
        moment: gives one of them.

    Raises:
        UserError: a moment is missing, of another shape than its parameter, or no step can be taken with it.
    """
    import torch

    from outgrow.model.conversion import in_model

    places = _places(optimizer)
    own_keys = chain.from_iterable(keys for _, keys in places.values())
    check_kinds(moment_names, own_keys)
    names = dict.fromkeys(name.partition(".")[2] for name in moment_names)
    state = optimizer.state_dict()
    config = config_of(model)

    def in_parameters(key: str) -> Mapping[str, torch.Tensor]:
        """Collect one kind of moments under the names of the model's parameters, NaN of those that have
        others."""

        def tensor(name: str) -> torch.Tensor:
            if f"{key}.{name}" in moment_names:
                return moment(f"{key}.{name}")
            others = [f"{other}.{name}" for other in POWERS]
            of_name = [other for other in others if other in moment_names]
            if not of_name:
                raise UserError(f"optimizer state: nothing of {name}; is it the state of another model?")
            return torch.full_like(moment(of_name[0]), nan)

        return in_model(config, names, tensor)

    moments = {key: in_parameters(key) for key in _kinds(moment_names)}
    for name, parameter in model.named_parameters():
        if id(parameter) in places:
            number, keys = places[id(parameter)]
            entry = {key: moments[key][name] for key in keys}
            for key, tensor in entry.items():
                _check_filled(key, name, tensor, parameter)
            count = {"step": torch.tensor(float(step))} if keys == ADAM else {}
            state["state"][number] = {**count, **entry}
    optimizer.load_state_dict(state)


def check_kinds(moment_names: Iterable[str], optimizer_keys: Iterable[str]) -> None:
    """Refuse a state that another optimizer made.

    Args:
        moment_names: of the moments that there are, with or without a tensor's name behind.
        optimizer_keys: those that the optimizer goes on from.

    Raises:
        UserError: they are of other kinds.
    """
    there, kinds = _kinds(moment_names), _kinds(optimizer_keys)
    if there != kinds:
        raise UserError(
            f"optimizer state: has {', '.join(there)}, and the optimizer that goes on keeps "
            f"{', '.join(kinds)}; go on with the one that made it, or without it"
        )


def _kinds(moments: Iterable[str]) -> list[str]:
    """The kinds among some moments' names."""
    prefixes = {str(name).partition(".")[0] for name in moments}
    return [key for key in POWERS if key in prefixes]


def _check_filled(moment: str, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    """Refuse a moment that does not fit its parameter, or that no step can be taken with."""
    own = tuple(tensor.shape)
    shape = tuple(parameter.shape)
    fault = _unusable(moment, tensor) if own == shape else f"has shape {own}, and the parameter {shape}"
    if fault:
        raise UserError(
            f"optimizer state: {moment} of {name} {fault}; no optimizer can go on from it: grow the state "
            "anew, or go on without it"
        )


def _places(optimizer: torch.optim.Optimizer) -> dict[int, tuple[int, tuple[str, ...]]]:
    """Each parameter's number in the state dict, and the moments that its group keeps, by identity."""
    places: dict[int, tuple[int, tuple[str, ...]]] = {}
    for group in optimizer.param_groups:
        keys = MUON if "momentum" in group else ADAM
        for parameter in group["params"]:
            places[id(parameter)] = (len(places), keys)
    return places
