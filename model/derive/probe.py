"""Watching a tiny model of a family: which file tensor each parameter becomes, which of its axes are contracted, what its norms do.

Everything is read off the library's own class: from the operations that a forward pass dispatches, not from names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from outgrow.model.base.errors import UserError
from outgrow.model.build import computing_in, library_class, to_hf_config
from outgrow.model.derive.pictures import with_picture
from outgrow.model.family import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten
# operation → position of each matrix argument and which of its dims (from the end) is summed over
CONTRACTIONS = {
    aten.mm: ((0, -1), (1, -2)),
    aten.addmm: ((1, -1), (2, -2)),
    aten.bmm: ((0, -1), (1, -2)),
    aten.baddbmm: ((1, -1), (2, -2)),
    aten.mv: ((0, -1), (1, -1)),
    aten.addmv: ((1, -1), (2, -1)),
    aten.dot: ((0, -1), (1, -1)),
}
COPIES = (aten._to_copy, aten.clone, aten.contiguous, aten.neg, aten.exp, aten.softplus, aten.sigmoid)
PAINT = 1 << 20  # apart by more than any axis of a tiny model is long


@dataclass(frozen=True)
class Sighting:
    """One stored tensor of the tiny model.

    Attributes:
        shape: as the file has it.
        parameter: the parameter (or buffer) of the built model that it becomes.
        reads: per axis, whether a forward pass summed over it.
        indexed: an embedding: rows are looked up.
        used: whether a forward pass touched it at all.
        by_text: whether one on tokens alone did.
        norm: "layer" or "rms" where it is a norm's scale or shift.
        offset: what the norm adds to its stored scale.
        role: of a norm: "norm" where matrices read its output, "final norm" where the output head does, "post norm" where nothing does.
    """

    shape: tuple[int, ...]
    parameter: str
    reads: tuple[bool, ...]
    indexed: bool
    used: bool
    by_text: bool = True
    norm: str | None = None
    offset: float = 0.0
    role: str = ""


def build(config: Config, device: str = "meta") -> PreTrainedModel:
    """A model of `config` in float64 with eager attention and eager experts; on the meta device it takes no memory.

    Raises:
        UserError: the library's classes refuse the config; the message quotes them.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            hf_config = to_hf_config(config)
            hf_config._experts_implementation = "eager"
            return (
                library_class(hf_config)
                .from_config(hf_config, dtype=torch.float64, attn_implementation="eager", trust_remote_code=False)
                .eval()
            )
    except UserError:
        raise
    except Exception as fault:  # the library's classes raise every kind
        reason = " ".join(str(fault).split())[:200]
        raise UserError(
            f"transformers' class for {config.get('model_type')!r} does not build from this config ({type(fault).__name__}: {reason})"
        ) from None


def stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that the library would save, under the names it would give them; works on the meta device."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that a checkpoint of `config` has, built on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in stored(build(config)).items()}


def named_shapes(config: Config, names: Iterable[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """`shapes`, and which of their names each of `names` stands for, under which an older file may have the same tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = build(config)
    own = {name: tuple(tensor.shape) for name, tensor in stored(model).items()}
    found, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in found if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in found if isinstance(entry, WeightConverter)]

    def loaded(name: str) -> str:
        """The parameter that the library makes of a tensor, or a part of."""
        return str(rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0])

    parts: dict[str, list[str]] = defaultdict(list)
    for name in own:
        parts[loaded(name)].append(name)

    def alike(name: str, other: str) -> int:
        words = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], words))

    return own, {name: name if name in own else max(parts.get(loaded(name), [name]), key=partial(alike, name)) for name in names}


def passed_over(config: Config, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's tensors that the library leaves out as it loads, as the layers that predict further tokens."""
    patterns = build(config)._keys_to_ignore_on_load_unexpected or ()
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def tied_names(config: Config, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's tensors that the library ties to another, which is stored too."""
    tied = build(config).all_tied_weights_keys
    return [name for name in names if any(name == one or one.endswith(f".{name}") or name.endswith(f".{one}") for one in tied)]


def computed(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → shape of every buffer that its class works out anew and no checkpoint has, built on the meta device."""
    model = build(config)
    saved = model.state_dict().keys()
    return {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name not in saved}


def factors(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """Name → value of every single number that its class works out anew and no checkpoint has: buffers, and attributes of modules."""
    model = build(config, "cpu")
    saved = model.state_dict().keys()
    buffers = {name: float(buffer) for name, buffer in model.named_buffers() if name not in saved and buffer.ndim == 0}
    modules = list(model.named_modules())
    attributes = {f"{name}.{key}": value for name, module in modules for key, value in vars(module).items() if type(value) is float}
    return buffers, attributes


def scramble(model: PreTrainedModel, seed: int = 1) -> None:
    """Random values far from any initialisation in every parameter, norm scales and biases included."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64) * 0.2
            parameter.copy_(drawn + 1 if parameter.ndim == 1 and "norm" in name.lower() and "bias" not in name else drawn)


def sightings(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, Sighting]:
    """What a forward pass of the tiny `model` on `tokens` shows of each stored tensor, and one with a picture where it takes pictures.

    Raises:
        UserError: the model does not run on token ids alone.
    """
    scramble(model)
    places = _places(model)
    with computing_in("float64"):
        pictured = with_picture(model, tokens)
    watch = _Watch(model)
    with torch.no_grad():
        try:
            with computing_in("float64"), _hooks(model, watch), watch:
                model(input_ids=tokens, use_cache=False)
                by_text = set(watch.touched)
                if pictured is not None:
                    model(**pictured, use_cache=False)
        except Exception as fault:  # the library's classes raise every kind
            reason = " ".join(str(fault).split())[:200]
            raise UserError(f"the model does not run on token ids alone in float64 ({type(fault).__name__}: {reason})") from None
    norms = _norms(model, watch)
    found = {}
    for name, (shape, parameter, axes) in places.items():
        contracted = watch.contracted[parameter]
        reads = tuple(axis is not None and axis in contracted for axis in axes)
        if parameter not in watch.touched:
            reads = _by_class(model, parameter, reads)
        norm, offset, role = norms.get(parameter, (None, 0.0, ""))
        found[name] = Sighting(
            shape=shape,
            parameter=parameter,
            reads=reads,
            indexed=parameter in watch.indexed,
            used=parameter in watch.touched,
            by_text=parameter in by_text,
            norm=norm,
            offset=offset,
            role=role,
        )
    whole = {name: tensor for name, tensor in stored(model).items() if name not in found}  # counters and masks, in whole numbers
    return found | {name: Sighting(tuple(t.shape), name, (False,) * t.ndim, indexed=False, used=True) for name, t in whole.items()}


@dataclass(frozen=True)
class Uses:
    """What a forward pass did with a model's parameters, by their names.

    Attributes:
        touched: it used them at all.
        contracted: the axes that it summed over, of those where it did.
        indexed: it looked up rows of them.
        convolved: they were kernels.
    """

    touched: frozenset[str]
    contracted: dict[str, frozenset[int]]
    indexed: frozenset[str]
    convolved: frozenset[str]


def uses(model: PreTrainedModel, tokens: torch.Tensor) -> Uses:
    """What a forward pass on text shows of each parameter of a model in float64."""
    watch = _Watch(model)
    with torch.no_grad(), computing_in("float64"), watch:
        model(input_ids=tokens, use_cache=False)
    contracted = {name: frozenset(axes) for name, axes in watch.contracted.items()}
    return Uses(frozenset(watch.touched), contracted, frozenset(watch.indexed), frozenset(watch.convolved))


def _by_class(model: PreTrainedModel, parameter: str, reads: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which axes a module that the forward pass did not use would sum over, by its class (cross-attention without an encoder)."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    if len(reads) != 2 or not parameter.endswith(".weight"):
        return reads
    return {"Linear": (False, True), "Conv1D": (True, False)}.get(type(module).__name__, reads)


class _Watch(TorchDispatchMode):
    """Records which axes of each parameter are summed over, following views and plain copies of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.contracted: dict[str, set[int]] = defaultdict(set)
        self.indexed: set[str] = set()
        self.convolved: set[str] = set()
        self.touched: set[str] = set()
        self.inputs: list[tuple[str, torch.Tensor]] = []  # (module, what it was given)
        self.outputs: dict[str, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []  # so that no storage is used again
        self._axes: dict[int, tuple[str, dict[int, int]]] = {}  # storage → parameter, stride → its axis
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            self._know(parameter, name, dict(zip(parameter.stride(), range(parameter.ndim), strict=True)))

    def _know(self, tensor: torch.Tensor, name: str, axes: dict[int, int]) -> None:
        self._alive.append(tensor)
        self._axes.setdefault(tensor.untyped_storage().data_ptr(), (name, axes))

    def axes_of(self, tensor: Any) -> tuple[str, list[int | None]] | None:
        """(parameter, its axis for each dim of `tensor`), where `tensor` is a view or a plain copy of one."""
        if not isinstance(tensor, torch.Tensor) or (found := self._axes.get(tensor.untyped_storage().data_ptr())) is None:
            return None
        name, axes = found
        sizes = zip(tensor.stride(), tensor.shape, strict=True)
        return name, [axes.get(stride) if length > 1 else None for stride, length in sizes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        for argument in args:
            if (found := self.axes_of(argument)) is not None:
                self.touched.add(found[0])
        for position, dim in CONTRACTIONS.get(packet, ()):
            if (found := self.axes_of(args[position])) is not None and (axis := found[1][dim]) is not None:
                self.contracted[found[0]].add(axis)
        if packet is aten.convolution and (found := self.axes_of(args[1])) is not None:
            self.convolved.add(found[0])
            if found[1][1] is not None:
                self.contracted[found[0]].add(found[1][1])
        if packet is aten.embedding and (found := self.axes_of(args[0])) is not None:
            self.indexed.add(found[0])
        if packet in COPIES and (found := self.axes_of(args[0])) is not None and isinstance(out, torch.Tensor):
            axes = {stride: axis for stride, axis in zip(out.stride(), found[1], strict=True) if axis is not None}
            self._know(out, found[0], axes)
        return out


def _hooks(model: PreTrainedModel, watch: _Watch) -> Any:
    """Keeps what every module that owns parameters is given and gives."""
    from contextlib import ExitStack

    stack = ExitStack()
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue

        def keep(_: Any, given: Any, out: Any, name: str = name) -> None:
            if given and isinstance(given[0], torch.Tensor):
                watch.inputs.append((name, given[0]))
            if isinstance(out, torch.Tensor):
                watch.outputs[name] = out

        stack.callback(module.register_forward_hook(keep).remove)
    return stack


def _norms(model: PreTrainedModel, watch: _Watch) -> dict[str, tuple[str, float, str]]:
    """Parameter → (kind, offset, role) for the parameters of every module that behaves as a norm over its last axis."""
    modules = dict(model.named_modules())
    matrices = {name for name, module in modules.items() if any(p.ndim > 1 for p in module.parameters(recurse=False))}
    head = model.get_output_embeddings()
    heads = {name for name, module in modules.items() if module is head}
    found = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if name not in watch.outputs or not isinstance(weight, torch.Tensor) or weight.ndim != 1 or list(module.children()):
            continue
        if (behaviour := _behaviour(module, weight)) is None:
            continue
        readers = {reader for reader, given in watch.inputs if reader in matrices and _same(given, watch.outputs[name])}
        role = "final norm" if readers & heads else "norm" if readers else "post norm"
        for part, _ in module.named_parameters(recurse=False):
            found[f"{name}.{part}"] = (*behaviour, role)
    return found


def _behaviour(module: torch.nn.Module, weight: torch.Tensor) -> tuple[str, float] | None:
    """("layer" or "rms", offset of its scale) where `module` normalises its last axis, else None."""
    given = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        out, doubled, shifted = module(given), module(2 * given), module(given + 5)
        kept = weight.detach().clone()
        weight.data.zero_()
        unscaled = module(given)
        weight.data.copy_(kept)
    except Exception:  # a module that takes more than one tensor is no plain norm
        return None
    if not torch.allclose(out, doubled, rtol=1e-2, atol=1e-2) or torch.allclose(out, given * weight, rtol=1e-3):
        return None
    bias = getattr(module, "bias", None)
    offset = 0.0 if torch.allclose(unscaled, torch.zeros_like(unscaled) if bias is None else bias.expand_as(unscaled)) else 1.0
    return ("layer" if torch.allclose(out, shifted, rtol=1e-3, atol=1e-3) else "rms"), offset


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape[-1] == other.shape[-1] and one.numel() == other.numel() and bool(torch.equal(one.flatten(), other.flatten()))


def _places(model: PreTrainedModel) -> dict[str, tuple[tuple[int, ...], str, tuple[int | None, ...]]]:
    """File tensor → (shape, parameter, the parameter's axis for each of its axes).

    Every parameter is painted with its own number plus the coordinate along one axis; what the library then would save shows where
    parameter and axis went, through whatever it splits, joins, transposes and renames.
    """
    named = (*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers()))
    saved = {tensor.data_ptr() for tensor in model.state_dict().values()}
    state = {name: tensor for name, tensor in named if tensor.is_floating_point() and tensor.data_ptr() in saved}
    names = list(state)
    kept = {name: tensor.detach().clone() for name, tensor in state.items()}
    places: dict[str, tuple[tuple[int, ...], str, list[int | None]]] = {}
    for axis in range(max(tensor.ndim for tensor in state.values())):
        for number, name in enumerate(names):
            tensor = state[name]
            coordinate: Any = 0
            if axis < tensor.ndim:
                shape = [-1 if dim == axis else 1 for dim in range(tensor.ndim)]
                coordinate = torch.arange(tensor.shape[axis], dtype=tensor.dtype).reshape(shape)
            tensor.data.copy_(torch.zeros_like(tensor) + number * PAINT + coordinate)
        for name, painted in stored(model).items():
            if not painted.is_floating_point() or painted.numel() == 0:
                continue
            parameter = names[min(int(painted.flatten()[0].item() // PAINT), len(names) - 1)]
            place = places.setdefault(name, (tuple(painted.shape), parameter, [None] * painted.ndim))
            for dim in _varying(painted):
                place[2][dim] = axis
    for name, tensor in kept.items():
        state[name].data.copy_(tensor)
    return {name: (shape, parameter, tuple(axes)) for name, (shape, parameter, axes) in places.items()}


def _varying(tensor: torch.Tensor) -> Iterator[int]:
    for dim in range(tensor.ndim):
        if tensor.shape[dim] > 1 and bool((tensor.amax(dim) != tensor.amin(dim)).any()):
            yield dim
