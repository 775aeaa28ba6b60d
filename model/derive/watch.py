"""Watching a tiny model run: where each stored tensor goes, which of its axes are contracted, what its norms
do.

Everything is read off the library's own class: from the operations that a forward pass dispatches, not from
names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from outgrow.model.base.errors import in_one_line
from outgrow.model.build import computing_in
from outgrow.model.derive.pictures import with_picture
from outgrow.model.derive.probe import scramble, stored
from outgrow.model.derive.unfit import Unfit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten
# Operation → position of each matrix argument, and which of its dims (from the end) is summed over.
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

_Stored = tuple[str, dict[int, int]]  # (parameter, stride → its axis)


@dataclass(frozen=True)
class Sighting:
    """One stored tensor of the tiny model, as a forward pass shows it.

    Attributes:
        shape: in the file.
        parameter: the parameter (or buffer) of the built model that it becomes.
        reads: per axis, whether a forward pass summed over it.
        indexed: an embedding: rows are looked up.
        used: a forward pass touched it at all.
        by_text: one on tokens alone did.
        norm: "layer" or "rms" where it is a norm's scale or shift.
        offset: the number that the norm adds to its stored scale.
        role: of a norm: "norm" where matrices read its output, "final norm" where the output head does, "post
            norm" where nothing does.
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


@dataclass(frozen=True)
class Uses:
    """The uses that a forward pass makes of a model's parameters, by their names.

    Attributes:
        touched: used at all.
        contracted: name → the axes that were summed over.
        indexed: rows were looked up.
        convolved: used as kernels.
    """

    touched: frozenset[str]
    contracted: dict[str, frozenset[int]]
    indexed: frozenset[str]
    convolved: frozenset[str]


def sightings(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, Sighting]:
    """Run the tiny `model` on `tokens`, and with a picture where it takes pictures, and record every stored
    tensor.

    Raises:
        Unfit: the model does not run on token ids alone.
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
            raise Unfit(
                f"the model does not run on token ids alone in float64 ({in_one_line(fault)})"
            ) from None
    norms = _norms(model, watch)
    seen = {}
    for name, place in places.items():
        parameter = place.parameter
        contracted = watch.contracted[parameter]
        reads = tuple(axis is not None and axis in contracted for axis in place.axes)
        if parameter not in watch.touched:
            reads = _by_class(model, parameter, reads)
        norm, offset, role = norms.get(parameter, (None, 0.0, ""))
        seen[name] = Sighting(
            shape=place.shape,
            parameter=parameter,
            reads=reads,
            indexed=parameter in watch.indexed,
            used=parameter in watch.touched,
            by_text=parameter in by_text,
            norm=norm,
            offset=offset,
            role=role,
        )
    # counters and masks
    for name, tensor in stored(model).items():
        if name not in seen:
            unread = (False,) * tensor.ndim
            shape = tuple(tensor.shape)
            seen[name] = Sighting(shape, name, unread, indexed=False, used=True)
    return seen


def uses(model: PreTrainedModel, tokens: torch.Tensor) -> Uses:
    """Run a model in float64 on text and record the uses of each parameter."""
    watch = _Watch(model)
    with torch.no_grad(), computing_in("float64"), watch:
        model(input_ids=tokens, use_cache=False)
    contracted = {name: frozenset(axes) for name, axes in watch.contracted.items()}
    indexed = frozenset(watch.indexed)
    convolved = frozenset(watch.convolved)
    return Uses(frozenset(watch.touched), contracted, indexed, convolved)


def _by_class(model: PreTrainedModel, parameter: str, reads: tuple[bool, ...]) -> tuple[bool, ...]:
    """Tell by a module's class which axes it would sum over, where no forward pass used it.

    Cross-attention without an encoder, for one.
    """
    module = model.get_submodule(parameter.rpartition(".")[0])
    is_matrix = len(reads) == 2
    if not is_matrix or not parameter.endswith(".weight"):
        return reads
    by_class = {"Linear": (False, True), "Conv1D": (True, False)}
    return by_class.get(type(module).__name__, reads)


class _Watch(TorchDispatchMode):
    """A record of which axes of each parameter are summed over, through views and plain copies of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.contracted: dict[str, set[int]] = defaultdict(set)
        self.indexed: set[str] = set()
        self.convolved: set[str] = set()
        self.touched: set[str] = set()
        self.inputs: list[tuple[str, torch.Tensor]] = []  # (module, its first argument)
        self.outputs: dict[str, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []  # so that no storage is reused
        self._axes: dict[int, _Stored] = {}  # by storage
        parameters = (*model.named_parameters(), *model.named_buffers())
        for name, parameter in parameters:
            strides = enumerate(parameter.stride())
            axes = {stride: axis for axis, stride in strides}
            self._follow(parameter, name, axes)

    def _follow(self, tensor: torch.Tensor, name: str, axes: dict[int, int]) -> None:
        self._alive.append(tensor)
        storage = tensor.untyped_storage().data_ptr()
        self._axes.setdefault(storage, (name, axes))

    def axes_of(self, tensor: Any) -> tuple[str, list[int | None]] | None:
        """Look up (parameter, its axis for each dim of `tensor`), where `tensor` is a view or a plain copy of
        one.
        """
        if not isinstance(tensor, torch.Tensor):
            return None
        known = self._axes.get(tensor.untyped_storage().data_ptr())
        if known is None:
            return None
        name, axes = known
        sizes = zip(tensor.stride(), tensor.shape, strict=True)
        return name, [axes.get(stride) if length > 1 else None for stride, length in sizes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        # Every parameter among the arguments: position → (name, its axis for each dim).
        known = {}
        for position, argument in enumerate(args):
            side = self.axes_of(argument)
            if side is not None:
                known[position] = side
        self.touched.update(name for name, _ in known.values())
        for position, dim in CONTRACTIONS.get(packet, ()):
            self._contract(known.get(position), dim)
        if packet is aten.convolution and 1 in known:
            self.convolved.add(known[1][0])
            self._contract(known[1], 1)
        if packet is aten.embedding and 0 in known:
            self.indexed.add(known[0][0])
        is_copy = packet in COPIES and 0 in known
        if is_copy and isinstance(out, torch.Tensor):
            name, dims = known[0]
            strides = zip(out.stride(), dims, strict=True)
            axes = {stride: axis for stride, axis in strides if axis is not None}
            self._follow(out, name, axes)
        return out

    def _contract(self, side: tuple[str, list[int | None]] | None, dim: int) -> None:
        """Record that one dim of a parameter was summed over."""
        if side is None:
            return
        parameter, axes = side
        axis = axes[dim]
        if axis is not None:
            self.contracted[parameter].add(axis)


def _hooks(model: PreTrainedModel, watch: _Watch) -> ExitStack:
    """Keep the inputs and outputs of every module that owns parameters, as long as the stack is open."""
    stack = ExitStack()
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue

        def keep(_: Any, inputs: Any, out: Any, name: str = name) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                watch.inputs.append((name, inputs[0]))
            if isinstance(out, torch.Tensor):
                watch.outputs[name] = out

        stack.callback(module.register_forward_hook(keep).remove)
    return stack


def _norms(model: PreTrainedModel, watch: _Watch) -> dict[str, tuple[str, float, str]]:
    """Find every module that behaves as a norm over its last axis: parameter → (kind, offset, role)."""
    modules = dict(model.named_modules())
    matrices = {name for name, module in modules.items() if _has_matrix(module)}
    head = model.get_output_embeddings()
    heads = {name for name, module in modules.items() if module is head}
    norms = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        has_run = name in watch.outputs
        if not has_run or not isinstance(weight, torch.Tensor):
            continue
        if weight.ndim != 1 or list(module.children()):
            continue
        behaviour = _behaviour(module, weight)
        if behaviour is None:
            continue
        out = watch.outputs[name]
        read = [(reader, entries) for reader, entries in watch.inputs if reader in matrices]
        readers = {reader for reader, entries in read if _same(entries, out)}
        role = "norm" if readers else "post norm"
        if readers & heads:
            role = "final norm"
        for part, _ in module.named_parameters(recurse=False):
            norms[f"{name}.{part}"] = (*behaviour, role)
    return norms


def _has_matrix(module: torch.nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return any(parameter.ndim > 1 for parameter in own)


def _behaviour(module: torch.nn.Module, weight: torch.Tensor) -> tuple[str, float] | None:
    """Test whether `module` normalises its last axis: ("layer" or "rms", offset of its scale), else None."""
    numbers = torch.Generator().manual_seed(0)
    width = len(weight)
    inputs = torch.randn(3, width, generator=numbers, dtype=torch.float64)
    try:
        out = module(inputs)
        doubled = module(2 * inputs)
        shifted = module(inputs + 5)
        kept = weight.detach().clone()
        weight.data.zero_()
        unscaled = module(inputs)
        weight.data.copy_(kept)
    except Exception:  # a module that takes more than one tensor is no plain norm
        return None
    # A norm gives the same for twice the input, and is no plain product with its weight.
    same_for_double = torch.allclose(out, doubled, rtol=1e-2, atol=1e-2)
    if not same_for_double:
        return None
    if torch.allclose(out, inputs * weight, rtol=1e-3):
        return None
    bias = getattr(module, "bias", None)
    nothing = torch.zeros_like(unscaled)
    if bias is not None:
        nothing = bias.expand_as(unscaled)
    offset = 0.0 if torch.allclose(unscaled, nothing) else 1.0
    removes_mean = torch.allclose(out, shifted, rtol=1e-3, atol=1e-3)
    return ("layer" if removes_mean else "rms"), offset


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Check that two tensors hold the same entries, in rows of the same length."""
    length = one.shape[-1]
    same_rows = length == other.shape[-1]
    if not same_rows or one.numel() != other.numel():
        return False
    return torch.equal(one.flatten(), other.flatten())


@dataclass
class _Place:
    """One stored tensor: its shape, the parameter that it becomes, and the parameter's axis for each of its
    axes.
    """

    shape: tuple[int, ...]
    parameter: str
    axes: list[int | None]


def _places(model: PreTrainedModel) -> dict[str, _Place]:
    """Find the place of each stored tensor in the model.

    Every parameter is painted with its own number plus the coordinate along one axis; what the library then
    would save shows where parameter and axis went, through whatever it splits, joins, transposes and renames.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    saved = {tensor.data_ptr() for tensor in model.state_dict().values()}
    paintable = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    state = {name: tensor for name, tensor in paintable if tensor.data_ptr() in saved}
    names = list(state)
    kept = {name: tensor.detach().clone() for name, tensor in state.items()}
    places: dict[str, _Place] = {}
    most_axes = max(tensor.ndim for tensor in state.values())
    for axis in range(most_axes):
        for number, tensor in enumerate(state.values()):
            paint = number * PAINT + _coordinate(tensor, axis)
            numbered = torch.zeros_like(tensor) + paint
            tensor.data.copy_(numbered)
        for name, painted in stored(model).items():
            if not painted.is_floating_point() or painted.numel() == 0:
                continue
            first_entry = painted.flatten()[0].item()
            number = int(first_entry // PAINT)
            most = len(names) - 1
            parameter = names[min(number, most)]
            unknown_axes: list[int | None] = [None] * painted.ndim
            unknown = _Place(tuple(painted.shape), parameter, unknown_axes)
            place = places.setdefault(name, unknown)
            for dim in _varying(painted):
                place.axes[dim] = axis
    for name, tensor in kept.items():
        state[name].data.copy_(tensor)
    return places


def _coordinate(tensor: torch.Tensor, axis: int) -> torch.Tensor | int:
    """Number the places along one axis, in a shape that broadcasts; 0 where the tensor has no such axis."""
    if axis >= tensor.ndim:
        return 0
    length = tensor.shape[axis]
    places = torch.arange(length, dtype=tensor.dtype)
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return places.reshape(shape)


def _varying(tensor: torch.Tensor) -> Iterator[int]:
    """Yield the dims along which entries differ."""
    for dim in range(tensor.ndim):
        if tensor.shape[dim] > 1:
            largest = tensor.amax(dim)
            differ = largest != tensor.amin(dim)
            if bool(differ.any()):
                yield dim
