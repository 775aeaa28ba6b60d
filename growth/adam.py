"""Adam's saved state, in and out: PyTorch's or Accelerate's file read under tensor names, and grown moments
put into an optimizer.

Growing itself is `growth.moments`; this file knows how PyTorch numbers parameters and what it calls the
moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.growth.engine.tensors import Tensors, expand
from outgrow.growth.memory import config_of
from outgrow.growth.moments import OPTIMIZER, POWERS, STATE, moments_plan
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError, first_line
from outgrow.model.base.files import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    _Moments = dict[str, torch.Tensor]  # by parameter

FILES = ("optimizer.bin", "optimizer.pt")  # as Accelerate calls it; as Transformers and our own trainer do


@dataclass(frozen=True, eq=False)
class AdamState:
    """Adam's state by stored tensor name.

    Attributes:
        moments: `exp_avg.NAME` and `exp_avg_sq.NAME` → the moment, in the shape of the tensor.
        step: how many steps it has averaged.
    """

    moments: Tensors
    step: int


def adam_state(state: Mapping[str, Any], plan: Plan) -> AdamState:
    """A state dict as `torch.optim.Adam` and `AdamW` make it for the source's model, under the names of its
    file's tensors.

    Raises:
        UserError: it is no Adam state, or its tensors are not the model's.
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
    named: dict[str, _Moments] = {moment: {} for moment in POWERS}
    steps = []
    for number, name in _numbering(groups, shapes).items():
        entry = per_parameter.get(number)
        if entry is None:  # a parameter that never had a gradient
            continue
        _check_entry(entry, number, name, shapes[name])
        steps.append(_steps(entry, number))
        for moment, tensors in named.items():
            tensors[name] = entry[moment]
    if not any(named.values()):
        raise UserError("optimizer state: empty; was it saved before the first step?")
    moments: dict[str, torch.Tensor] = {}
    for moment, tensors in named.items():
        every_parameter = _complete(tensors, shapes)
        stored = in_file(plan.source_config, every_parameter)
        moments |= {f"{moment}.{name}": tensor for name, tensor in stored.items()}
    complete = _complete(moments, _wanted(plan))
    return AdamState(Tensors(complete), max(steps))


def _check_groups(groups: Sequence[Any]) -> None:
    """Refuse groups that are not as an optimizer saves them."""
    for place, group in enumerate(groups):
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(numbers, list):
            raise UserError(
                f"optimizer state: group {place} has no list of 'params'; expected what "
                "optimizer.state_dict() gives"
            )


def _check_entry(entry: Any, number: int, name: str, shape: tuple[int, ...]) -> None:
    """Refuse the state of a parameter that is not Adam's, or not of the parameter's shape."""
    import torch

    for moment in POWERS:
        tensor = entry.get(moment) if isinstance(entry, Mapping) else None
        if not isinstance(tensor, torch.Tensor):
            found = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
            raise UserError(
                f"optimizer state: parameter {number} ({name}) has no {moment!r}, found "
                f"{found}; only Adam's state grows"
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
    told = entry.get("step", 0)
    count = -1
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):  # several entries, NaN, infinite
        count = int(told)
    if count < 0:
        raise UserError(
            f"optimizer state: the step of parameter {number} is {told!r}; expected how many it has taken"
        )
    return count


def _wanted(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The name and shape of every moment of the source's file."""
    family = plan.growth.source_family
    wanted = {}
    for moment in POWERS:
        for tensor in family.tensors(plan.source_config):
            wanted[f"{moment}.{tensor.name}"] = tensor.shape
    return wanted


def _complete(
    moments: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Fill in zeros for what never had a gradient: where its moments would have begun."""
    import torch

    dtype = next(iter(moments.values())).dtype
    return {
        name: moments[name] if name in moments else torch.zeros(shape, dtype=dtype)
        for name, shape in shapes.items()
    }


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


def read_adam(path: Path | str, plan: Plan) -> AdamState:
    """The state of the source's optimizer from a file, or from a folder that holds one (`optimizer.bin`,
    `optimizer.pt`).

    It is opened without executing anything that it may contain (`torch.load` with `weights_only`), mapped
    into memory rather than read.

    Raises:
        UserError: there is no such file, or it is no Adam state of the source's model.
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
    return adam_state(state, plan)


def grow_adam(
    source: torch.optim.Optimizer,
    source_model: PreTrainedModel,
    target: torch.optim.Optimizer,
    target_model: Any,
    plan: Plan,
) -> None:
    """Fill the optimizer of a grown model, in memory, from the source's.

    Args:
        plan: the growth of `source_model` into `target_model`, as `grow_model` followed it.
    """
    state = adam_state(source.state_dict(), plan)
    growth = moments_plan(plan, state.moments.dtypes)
    grown = dict(expand(growth, state.moments))
    names = [step.name for step in plan.steps]
    moment = grown.__getitem__
    fill(target, target_model, names, moment, state.step)


def load_adam(folder: Path | str, target: torch.optim.Optimizer, target_model: PreTrainedModel) -> None:
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
            f"{folder}: no such folder; grow with optimizer=FILE to have Adam's moments grown too"
        )
    files = {name: stored.file for name, stored in tensor_table(folder).items()}
    way_out = "grow anew, or go on without it"
    record = read_object(folder / STATE, way_out)
    step = record.get("step")
    if not isinstance(step, int) or step < 0:
        raise UserError(f"{folder / STATE}: its step is {step!r}, expected how many were taken; {way_out}")

    def moment(name: str) -> torch.Tensor:
        if name not in files:
            raise UserError(f"{folder}: no {name}; is it the state of another model?")
        with safe_open(files[name], "pt") as file:
            return file.get_tensor(name)

    first_moments = [name for name in files if name.startswith("exp_avg.")]
    names = [name.removeprefix("exp_avg.") for name in first_moments]
    fill(target, target_model, names, moment, step)


def fill(
    optimizer: torch.optim.Optimizer,
    model: PreTrainedModel,
    names: Sequence[str],
    moment: Callable[[str], torch.Tensor],
    step: int,
) -> None:
    """Set Adam's state of every parameter of `model` that `optimizer` has; its learning rates and groups
    stay.

    Args:
        names: of the tensors in the model's file.
        moment: gives the moment `exp_avg.NAME` or `exp_avg_sq.NAME` of such a tensor.

    Raises:
        UserError: a moment is of another shape than its parameter, or no step can be taken with it.
    """
    import torch

    from outgrow.model.conversion import in_model

    numbers = _numbers(optimizer)
    state = optimizer.state_dict()
    config = config_of(model)

    def in_parameters(key: str) -> Mapping[str, torch.Tensor]:
        """Collect one kind of moments under the names of the model's parameters."""
        return in_model(config, names, lambda name: moment(f"{key}.{name}"))

    moments = {key: in_parameters(key) for key in POWERS}
    for name, parameter in model.named_parameters():
        if id(parameter) in numbers:
            number = numbers[id(parameter)]
            entry = {key: moments[key][name] for key in POWERS}
            for key, tensor in entry.items():
                _check_filled(key, name, tensor, parameter)
            count = torch.tensor(float(step))
            state["state"][number] = {"step": count, **entry}
    optimizer.load_state_dict(state)


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


def _numbers(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Each parameter's number in the state dict, by identity."""
    groups = optimizer.param_groups
    parameters = chain.from_iterable(group["params"] for group in groups)
    return {id(parameter): number for number, parameter in enumerate(parameters)}
