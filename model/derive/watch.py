"""Watching a tiny model run: where each stored tensor goes, which of its axes are contracted, what its norms
do.

Everything is read off the library's own class: from the operations that a forward pass dispatches, not from
names.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from outgrow.model.base.errors import in_one_line
from outgrow.model.build import computing_in
from outgrow.model.derive.norms import NO_NORM, find_norms
from outgrow.model.derive.pictures import with_picture
from outgrow.model.derive.places import find_places, parameters_and_buffers
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
    places = find_places(model)
    watch = _Watch(model)
    by_text = _run(model, tokens, watch)
    norms = find_norms(model, watch.inputs, watch.outputs)
    by_name = {}
    for name, site in places.items():
        parameter = site.parameter
        contracted = watch.contracted[parameter]
        used = parameter in watch.touched
        reads = tuple(axis is not None and axis in contracted for axis in site.axes)
        if not used:
            reads = _by_class(model, parameter, reads)
        norm = norms.get(parameter, NO_NORM)
        by_name[name] = Sighting(
            shape=site.shape,
            parameter=parameter,
            reads=reads,
            indexed=parameter in watch.indexed,
            used=used,
            by_text=parameter in by_text,
            norm=norm.kind,
            offset=norm.offset,
            role=norm.role,
        )
    # counters and masks
    for name, tensor in stored(model).items():
        if name not in by_name:
            by_name[name] = _unread(name, tensor)
    return by_name


def _run(model: PreTrainedModel, tokens: torch.Tensor, watch: _Watch) -> set[str]:
    """Watch a forward pass on tokens, and one on a picture where the model takes one.

    Returns:
        The parameters that tokens alone touched.

    Raises:
        Unfit: the model does not run on token ids alone.
    """
    with computing_in("float64"):
        pictured = with_picture(model, tokens)
    in_float64 = computing_in("float64")
    try:
        with torch.no_grad(), in_float64, _hooks(model, watch), watch:
            model(input_ids=tokens, use_cache=False)
            by_text = set(watch.touched)
            if pictured is not None:
                model(**pictured, use_cache=False)
    except Exception as fault:  # the library's classes raise every kind
        reason = in_one_line(fault)
        raise Unfit(f"the model does not run on token ids alone in float64 ({reason})") from None
    return by_text


def _unread(name: str, tensor: torch.Tensor) -> Sighting:
    """Describe a stored tensor that no operation sums over."""
    shape = tuple(tensor.shape)
    unread = (False,) * tensor.ndim
    return Sighting(shape, name, unread, indexed=False, used=True)


def uses(model: PreTrainedModel, tokens: torch.Tensor) -> Uses:
    """Run a model in float64 on text and record the uses of each parameter."""
    watch = _Watch(model)
    with torch.no_grad(), computing_in("float64"), watch:
        model(input_ids=tokens, use_cache=False)
    touched = frozenset(watch.touched)
    contracted = {name: frozenset(axes) for name, axes in watch.contracted.items()}
    indexed = frozenset(watch.indexed)
    convolved = frozenset(watch.convolved)
    return Uses(touched, contracted, indexed, convolved)


def _by_class(model: PreTrainedModel, parameter: str, reads: tuple[bool, ...]) -> tuple[bool, ...]:
    """Tell by a module's class which axes it would sum over, where no forward pass used it.

    Cross-attention without an encoder, for one.
    """
    path, _, own_name = parameter.rpartition(".")
    is_matrix = len(reads) == 2
    if not is_matrix or own_name != "weight":
        return reads
    module = model.get_submodule(path)
    class_name = type(module).__name__
    by_class = {"Linear": (False, True), "Conv1D": (True, False)}
    return by_class.get(class_name, reads)


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
        for name, parameter in parameters_and_buffers(model):
            strides = enumerate(parameter.stride())
            axes = {stride: axis for axis, stride in strides}
            self._follow(parameter, name, axes)

    def _follow(self, tensor: torch.Tensor, name: str, axes: dict[int, int]) -> None:
        self._alive.append(tensor)
        self._axes.setdefault(_storage(tensor), (name, axes))

    def axes_of(self, tensor: Any) -> tuple[str, list[int | None]] | None:
        """Look up (parameter, its axis for each dim of `tensor`), where `tensor` is a view or a plain copy of
        one.
        """
        if not isinstance(tensor, torch.Tensor):
            return None
        entry = self._axes.get(_storage(tensor))
        if entry is None:
            return None
        name, axes = entry
        sizes = zip(tensor.stride(), tensor.shape, strict=True)
        return name, [axes.get(stride) if length > 1 else None for stride, length in sizes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        packet = func.overloadpacket
        # Every parameter among the arguments: position → (name, its axis for each dim).
        sides = {}
        for position, argument in enumerate(args):
            side = self.axes_of(argument)
            if side is not None:
                sides[position] = side
        self.touched.update(name for name, _ in sides.values())
        contracted = CONTRACTIONS.get(packet, ())
        for position, dim in contracted:
            self._contract(sides.get(position), dim)
        first = sides.get(0)
        second = sides.get(1)
        if packet is aten.convolution and second is not None:
            kernel, _ = second
            self.convolved.add(kernel)
            self._contract(second, 1)
        if first is None:
            return out
        name, dims = first
        if packet is aten.embedding:
            self.indexed.add(name)
        is_copy = packet in COPIES
        if is_copy and isinstance(out, torch.Tensor):
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


def _storage(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage.data_ptr()


def _hooks(model: PreTrainedModel, watch: _Watch) -> ExitStack:
    """Keep the inputs and outputs of every module that owns parameters, as long as the stack is open."""
    stack = ExitStack()
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue

        def keep(_: Any, inputs: Any, out: Any, name: str = name) -> None:
            first = inputs[0] if inputs else None
            if isinstance(first, torch.Tensor):
                watch.inputs.append((name, first))
            if isinstance(out, torch.Tensor):
                watch.outputs[name] = out

        hook = module.register_forward_hook(keep)
        stack.callback(hook.remove)
    return stack
