"""Watching a class start its weights: its own `_init_weights` runs at the model's real sizes, on the meta
device, in no memory.

What it draws and sets is followed on a column of quantiles in each tensor's stead: `normal_(0, σ)` makes it a
normal distribution's, `mul_(x)` multiplies them, `copy_` of numbers that it has worked out keeps those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import TORCH_INIT_FUNCTIONS

from outgrow.model.derive.probe import build, stored
from outgrow.model.family import Config
from outgrow.model.starts import Start

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten
SHARES = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
# entries stay what they are
MOVED = (aten.clone, aten._to_copy, aten.cat, aten.stack, aten.contiguous, aten.index_select, aten.empty_like)
CONSTANT = {aten.zeros: 0.0, aten.ones: 1.0, aten.zeros_like: 0.0, aten.ones_like: 1.0}
MOST = 1 << 22  # entries that a tensor has which is worked out and not followed
SEEDS = 8  # under which what the class works out by chance is seen


def starts(config: Config) -> dict[str, Start]:
    """Name → start of the tensors that a checkpoint of `config` has, without those that the class starts in a
    way that cannot be followed.

    Raises:
        UserError: the class does not build from the config.
    """
    with torch.no_grad(), _Pen() as built:
        model = build({**config, "tie_word_embeddings": False})
    _hold(model, _lost(model, built))
    # What differs between two seeds is worked out by chance: it is seen under more of them.
    first = _once(model, built, 0)
    second = _once(model, built, 1)
    by_chance = {name for name in first if not _same(first[name], second[name])}
    seeds = range(2, SEEDS) if by_chance else ()
    further = [_once(model, built, seed) for seed in seeds]
    runs = [first, second, *further]
    # All else starts as its quantiles tell. They are few: tensors that start alike share them.
    distinct = {id(contents): contents for contents in first.values()}
    alike = {number: _start(contents) for number, contents in distinct.items()}
    followed = {}
    for name, contents in first.items():
        if name in by_chance:
            followed[name] = _drawn([run[name] for run in runs])
        else:
            followed[name] = alike[id(contents)]
    lacking = [name for name in stored(model) if name not in followed]
    if not lacking:
        return followed
    return followed | _alike_in_twin(config, lacking)


def _alike_in_twin(config: Config, names: list[str]) -> dict[str, Start]:
    """Starts of those tensors whose entries are all alike in a tiny twin: numbers that the class has from its
    construction on.
    """
    from outgrow.model.twin import layerless, tiny_twin

    twin = {
        layerless(name): tensor.double()
        for name, tensor in stored(build(tiny_twin(config).config, "cpu")).items()
    }
    same = {name: twin.get(layerless(name), SHARES) for name in names}
    return {
        name: _start(tensor) for name, tensor in same.items() if bool((tensor == tensor.flatten()[0]).all())
    }


def _drawn(samples: list[torch.Tensor]) -> Start:
    """The distribution of what the class works out by chance."""
    entries = torch.cat([one.flatten() for one in samples])
    entries = entries.double()
    return Start(entries.sort().values.numpy())


def _start(contents: torch.Tensor) -> Start:
    values = contents.double().numpy()
    if values.size and (values == values.flat[0]).all():
        return Start(values.flatten()[:1])
    are_quantiles = contents.shape == SHARES.shape
    quantiles = np.sort(values, axis=None)
    return Start(quantiles, None if are_quantiles else values)


def _lost(model: PreTrainedModel, built: _Pen) -> list[str]:
    """The parameters that the class starts in a way that cannot be followed on the meta device (`arange`
    beside them).
    """
    with _started(model, built, 0) as pen:
        return [
            name
            for name, parameter in model.named_parameters()
            if pen.of(parameter) is None and parameter.numel() <= MOST
        ]


def _hold(model: PreTrainedModel, names: list[str]) -> None:
    """Give these parameters entries of their own, which the class can work out."""
    for name in names:
        owner, _, own = name.rpartition(".")
        shape = model.get_parameter(name).shape
        setattr(
            model.get_submodule(owner),
            own,
            torch.nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float64)),
        )


@contextmanager
def _started(model: PreTrainedModel, built: _Pen, seed: int) -> Iterator[_Pen]:
    """Run the class's own initialisation under `seed`, and follow it."""
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    apart = torch.random.fork_rng(devices=[])
    with apart, torch.no_grad(), _Pen(built) as pen, pen.following():
        torch.manual_seed(seed)
        model.initialize_weights()
        yield pen


def _once(model: PreTrainedModel, built: _Pen, seed: int) -> dict[str, torch.Tensor]:
    """File tensor → quantiles of its entries (`SHARES`), or the entries, which the class has worked out under
    `seed`.
    """
    with _started(model, built, seed) as pen:
        contents = {name: pen.of(tensor) for name, tensor in stored(model).items()}
    return {name: values for name, values in contents.items() if values is not None}


@lru_cache(maxsize=64)
def _normal(mean: float, deviation: float, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """The quantiles of a normal distribution's part between two shares of it."""
    shares = low + SHARES * (high - low)
    return torch.special.ndtri(shares) * deviation + mean


@lru_cache(maxsize=64)
def _even(low: float, high: float) -> torch.Tensor:
    return low + SHARES * (high - low)


def _cut(
    tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> torch.Tensor:
    normal = NormalDist(mean, std)
    low = normal.cdf(a)
    high = normal.cdf(b)
    return _normal(mean, std, low, high)


def _orthogonal(tensor: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """The entries of orthogonal rows or columns, one by one: nearly normal."""
    rows = tensor.shape[0]
    columns = tensor.numel() // rows
    least = max(rows, columns)
    return _normal(0.0, gain / least**0.5)


def _lose(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Leave out what cannot be followed."""


FOLLOWED: dict[str, Callable[..., torch.Tensor | None]] = {
    "trunc_normal_": _cut,
    "orthogonal_": _orthogonal,
    "sparse_": _lose,
    "dirac_": _lose,
    "eye_": _lose,
}


class _Pen(TorchDispatchMode):
    """Follows what is written into tensors on the meta device."""

    def __init__(self, before: _Pen | None = None) -> None:
        super().__init__()
        # Storage → quantiles, or all entries; None where it cannot be followed. Tensors are kept, so that no
        # storage is used again.
        self._seen: dict[int, torch.Tensor | None] = {}
        self._alive: list[torch.Tensor] = []
        if before is not None:
            self._seen |= before._seen
            self._alive += before._alive

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Look up a tensor's content: quantiles, or all entries; None where that is not known."""
        if tensor.is_meta:
            return self._seen.get(_storage(tensor))
        if not tensor.isfinite().all():
            return None
        return tensor.detach().double().clone()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Replace the functions of `torch.nn.init` that draw again and again, or do nothing on the meta
        device.
        """
        own: dict[str, Any] = dict(TORCH_INIT_FUNCTIONS)

        def instead(name: str, content: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor]:
            def start(tensor: torch.Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> torch.Tensor:
                if not tensor.is_meta:
                    drawn = own[name](tensor, *args, generator=generator, **kwargs)
                    return cast(torch.Tensor, drawn)
                entries = content(tensor, *args, **kwargs)
                self._keep(tensor, entries)
                return tensor

            return start

        followed = {name: instead(name, content) for name, content in FOLLOWED.items()}
        TORCH_INIT_FUNCTIONS.update(followed)
        try:
            yield
        finally:
            TORCH_INIT_FUNCTIONS.update(own)

    def _keep(self, tensor: torch.Tensor, contents: torch.Tensor | None) -> None:
        self._alive.append(tensor)
        self._seen[_storage(tensor)] = contents

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        into = args[0] if args else None
        if isinstance(into, torch.Tensor) and into.is_meta and func._schema.is_mutable:
            self._write(func, into, args[1:], named)
        elif isinstance(out, torch.Tensor) and out.is_meta and _storage(out) not in self._seen:
            content = self._new(func, args, named)
            self._keep(out, content)
        return out

    def _write(self, func: Any, into: torch.Tensor, args: Any, kwargs: Any) -> None:
        before = self.of(into)
        after = self._written(func, before, into, args, kwargs)
        nbytes = into.numel() * into.element_size()
        is_complete = nbytes == into.untyped_storage().nbytes()
        if is_complete:
            self._keep(into, after)
            return
        # zeros in the row of padding are not learnt from
        if func.overloadpacket is not aten.zero_ and not _same(after, before):
            self._keep(into, None)

    def _written(
        self, func: Any, before: torch.Tensor | None, into: torch.Tensor, args: tuple[Any, ...], kwargs: Any
    ) -> torch.Tensor | None:
        """Compute a tensor's content after an operation in place."""
        match func.overloadpacket, args:
            case (aten.normal_, _):
                return _normal(*_pair(args, (0.0, 1.0)))
            case (aten.uniform_, _):
                return _even(*_pair(args, (0.0, 1.0)))
            case (aten.zero_, _):
                return torch.zeros(1, dtype=torch.float64)
            case (aten.fill_, (value, *_)):
                number = float(value)
                return torch.full((1,), number, dtype=torch.float64)
            case (aten.copy_, (other, *_)):
                return self.of(other if other.is_meta else other.expand(into.shape))
        own = None if before is None else before.clone()
        return _replayed(func, own, args, kwargs)

    def _new(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
        """Compute a new tensor's content."""
        packet = func.overloadpacket
        if packet in CONSTANT:
            value = CONSTANT[packet]
            return torch.full((1,), value, dtype=torch.float64)
        if packet in (aten.full, aten.full_like):
            value = float(args[1])
            return torch.full((1,), value, dtype=torch.float64)
        if packet in MOVED:
            is_list = isinstance(args[0], list | tuple)
            tensors = args[0] if is_list else args[:1]
            parts = [self.of(tensor) for tensor in tensors]
            all_same = all(_same(part, parts[0]) for part in parts)
            return parts[0] if all_same else None
        first = args[0] if args else None
        before = self.of(first) if isinstance(first, torch.Tensor) else None
        return _replayed(func, before, args[1:], kwargs)


def _pair(args: Sequence[Any], missing: Sequence[float]) -> tuple[float, float]:
    """Two numbers, of which PyTorch leaves the last ones out where they are its own."""
    defaults = missing[len(args) :]
    both = [*args[:2], *defaults]
    first, second = both[:2]
    return float(first), float(second)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one, other)


def _replayed(func: Any, contents: torch.Tensor | None, args: Any, kwargs: Any) -> torch.Tensor | None:
    """An operation entry by entry, done to quantiles; None where it is another."""
    values = (*args, *kwargs.values())
    others = [value for value in values if isinstance(value, torch.Tensor)]
    if contents is None:
        return None
    if any(other.numel() > 1 for other in others):
        return None
    try:
        out = func(contents, *args, **kwargs)
    except Exception:  # of any kind, for an operation that a column of numbers does not have
        return None
    same_shape = isinstance(out, torch.Tensor) and out.shape == contents.shape
    return out if same_shape else None
