"""Adam's saved state, in and out: PyTorch's or Accelerate's file read under tensor names, and grown moments put into an optimizer.

Growing itself is `growth.moments`; this file knows how PyTorch numbers parameters and what it calls the moments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UserError

from .moments import OPTIMIZER, POWERS, STATE, moments_plan
from .plan import Plan
from .tensors import Tensors, expand

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

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


def adam_state(state: Mapping[str, Any], names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> AdamState:
    """A state dict as `torch.optim.Adam` and `AdamW` make it, under tensor names.

    Args:
        names: parameter → tensor name in the order of the model's parameters (`model.build.stored_names`).
        shapes: of each tensor.

    Raises:
        UserError: it is no Adam state, or its tensors are not the model's.
    """
    groups, per_parameter = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(per_parameter, Mapping):
        raise UserError("optimizer state: expected the keys 'state' and 'param_groups', as optimizer.state_dict() gives them")
    named = {}
    for number, name in _numbering(groups, names, shapes).items():
        entry = per_parameter.get(number)
        if entry is None:  # a parameter that never had a gradient
            continue
        for moment in POWERS:
            if moment not in entry:
                raise UserError(
                    f"optimizer state: parameter {number} ({name}) has no {moment!r}, found {sorted(entry)}; only Adam's state grows"
                )
            if tuple(entry[moment].shape) != shapes[name]:
                raise UserError(
                    f"optimizer state: {moment} of parameter {number} has shape {tuple(entry[moment].shape)}, {name} has {shapes[name]}; "
                    "is it the state of another model, or were its groups filled in another order?"
                )
            named[f"{moment}.{name}"] = entry[moment]
    if not named:
        raise UserError("optimizer state: empty; was it saved before the first step?")
    steps = [int(entry["step"]) for entry in per_parameter.values() if "step" in entry]
    return AdamState(_complete(named, shapes), max(steps, default=0))


def _numbering(groups: Sequence[Mapping[str, Any]], names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Parameter number → tensor name: by the names PyTorch saves, else in the model's order, in one group or matrices before vectors."""
    numbers = [number for group in groups for number in group["params"]]
    if len(numbers) != len(names):
        raise UserError(
            f"optimizer state: {len(numbers)} parameters, the source's model has {len(names)}; is it the state of another model?"
        )
    if all("param_names" in group for group in groups):
        given = [_plain(name) for group in groups for name in group["param_names"]]
        if unknown := sorted(set(given) - names.keys()):
            raise UserError(f"optimizer state: parameter {unknown[0]!r} is none of the source's ({len(unknown)} are not)")
        return {number: names[name] for number, name in zip(numbers, given, strict=True)}
    stored = list(names.values())
    if len(groups) == 1:
        return dict(zip(numbers, stored, strict=True))
    matrices = [name for name in stored if len(shapes[name]) > 1]
    if len(groups) == 2 and len(groups[0]["params"]) == len(matrices):
        return dict(zip(numbers, [*matrices, *(name for name in stored if len(shapes[name]) == 1)], strict=True))
    raise UserError(
        f"optimizer state: {len(groups)} groups without names, so which parameter is which is not known; build the optimizer from named "
        "parameters (groups of (name, parameter) pairs, which PyTorch saves along), or with one group"
    )


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name


def read_adam(path: Path | str, plan: Plan) -> AdamState:
    """The state of the source's optimizer from a file, or from a folder that holds one (`optimizer.bin`, `optimizer.pt`).

    It is opened without executing anything that it may contain (`torch.load` with `weights_only`), mapped into memory rather than read.

    Raises:
        UserError: there is no such file, or it is no Adam state of the source's model.
    """
    import torch

    from model.build import parameter_names

    file = Path(path)
    if file.is_dir():
        found = [file / name for name in FILES if (file / name).is_file()]
        if not found:
            raise UserError(f"optimizer {file}: no {' or '.join(FILES)} in this folder")
        file = found[0]
    if not file.is_file():
        raise UserError(f"optimizer {file}: no such file or folder")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as fault:  # torch reports a damaged or unsafe file in many ways
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise UserError(f"optimizer {file}: cannot be read as a PyTorch file of tensors ({reason})") from None
    if not isinstance(state, Mapping):
        raise UserError(f"optimizer {file}: expected a dict as optimizer.state_dict() gives it, found {type(state).__name__}")
    shapes = {tensor.name: tensor.shape for tensor in plan.family.tensors(plan.source_config)}
    return adam_state(state, parameter_names(plan.source_config), shapes)


def _complete(moments: dict[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """With zeros for parameters that never had a gradient: where their moments would have begun."""
    import torch

    dtype = next(iter(moments.values())).dtype
    zeros = {f"{moment}.{name}": (shape, moment) for name, shape in shapes.items() for moment in POWERS}
    return Tensors({name: moments[name] if name in moments else torch.zeros(shape, dtype=dtype) for name, (shape, _) in zeros.items()})


def grow_adam(
    source: torch.optim.Optimizer, source_model: PreTrainedModel, target: torch.optim.Optimizer, target_model: Any, plan: Plan
) -> None:
    """Fill the optimizer of a grown model, in memory, from the source's.

    Args:
        plan: the growth of `source_model` into `target_model`, as `grow_model` followed it.
    """
    from model.build import stored_names

    shapes = {tensor.name: tensor.shape for tensor in plan.family.tensors(plan.source_config)}
    state = adam_state(source.state_dict(), stored_names(source_model), shapes)
    grown = dict(expand(moments_plan(plan, state.moments.dtypes), state.moments))
    fill(target, target_model, grown.__getitem__, state.step)


def load_adam(folder: Path | str, target: torch.optim.Optimizer, target_model: PreTrainedModel) -> None:
    """Fill the optimizer of a grown model from what `grow(…, optimizer=…)` wrote beside the weights in `folder`.

    Raises:
        UserError: the folder holds no moments, or other tensors than the model's.
    """
    from safetensors import safe_open

    from model.checkpoint import tensor_table

    folder = Path(folder) / OPTIMIZER
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; grow with optimizer=FILE to have Adam's moments grown too")
    where = {name: stored.file for name, stored in tensor_table(folder).items()}
    step = json.loads((folder / STATE).read_text())["step"]

    def moment(name: str) -> torch.Tensor:
        if name not in where:
            raise UserError(f"{folder}: no {name}; is it the state of another model?")
        with safe_open(where[name], "pt") as file:
            return file.get_tensor(name)

    fill(target, target_model, moment, step)


def fill(optimizer: torch.optim.Optimizer, model: PreTrainedModel, moment: Callable[[str], torch.Tensor], step: int) -> None:
    """Set Adam's state of every parameter of `model` that `optimizer` has; its learning rates and groups stay."""
    import torch

    from model.build import stored_names

    stored, numbers, state = stored_names(model), _numbers(optimizer), optimizer.state_dict()
    for name, parameter in model.named_parameters():
        if id(parameter) in numbers:
            entry = {key: moment(f"{key}.{stored[name]}") for key in POWERS}
            state["state"][numbers[id(parameter)]] = {"step": torch.tensor(float(step)), **entry}
    optimizer.load_state_dict(state)


def _numbers(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Each parameter's number in the state dict, by identity."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {id(parameter): number for number, parameter in enumerate(parameters)}
