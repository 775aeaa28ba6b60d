"""Models whose weights stay on disk: a layer's are read when it is called, and let go when it has answered.

So a forward pass over all calibration text needs one layer of weights, and the activations of that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from outgrow.model.base.errors import UserError, names_of
from outgrow.model.build import empty_model, stored_names
from outgrow.model.dtypes import RAW, is_float, to_float, to_raw
from outgrow.model.family import Config, has_schema
from outgrow.model.headers import tensor_table

Values = Callable[[str], np.ndarray]  # a stored tensor's values by its name, in its own shape

_Place = tuple[nn.Module, str, str]  # (module, its key of a parameter, the name of the stored tensor)


class AtHead(Exception):
    """The forward pass has come to the output head."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__("the output head")
        self.inputs = inputs


class Written:
    """The tensors of a folder that is being made, read and written in place."""

    def __init__(self, folder: Path) -> None:
        self.tensors = tensor_table(folder)

    def raw(self, name: str) -> np.ndarray:
        """A tensor's raw bits, in its own shape."""
        stored = self.tensors[name]
        count = prod(stored.shape)
        raw_type = RAW[stored.dtype]
        raw = np.fromfile(stored.file, raw_type, count, offset=stored.offset)
        return raw.reshape(stored.shape)

    def values(self, name: str) -> np.ndarray:
        """A tensor's values, in the working type."""
        dtype = self.tensors[name].dtype
        return to_float(self.raw(name), dtype)

    def write_raw(self, name: str, raw: np.ndarray) -> None:
        """Put raw bits in a tensor's place."""
        stored = self.tensors[name]
        with stored.file.open("r+b") as file:
            file.seek(stored.offset)
            file.write(np.ascontiguousarray(raw).data.cast("B"))

    def write(self, name: str, values: np.ndarray) -> np.ndarray:
        """Put values in a tensor's place; return them as they are stored, rounded."""
        stored = self.tensors[name]
        raw = to_raw(values, stored.dtype)
        self.write_raw(name, raw)
        return to_float(raw, stored.dtype).reshape(stored.shape)


class OnDisk:
    """A `transformers` model of a config whose parameters are read when they are needed.

    Attributes:
        values: of a stored tensor, by its name.
        model: whose parameters are on the meta device between calls.
        layers: its decoder layers.
        names: parameter name → stored name.

    Raises (on opening):
        UserError: the class's parameters are not those of the file.
    """

    def __init__(self, config: Config, values: Values, stored: Mapping[str, Any], depth: int) -> None:
        dtypes = {entry.dtype for entry in stored.values()}
        self.dtype = torch.float64 if "F64" in dtypes else torch.float32
        model = empty_model(config, dtype=self.dtype)
        self.model = model.eval().requires_grad_(False)
        own = [name for name, _ in self.model.named_parameters()]
        self.names = dict(zip(own, own, strict=True))
        if has_schema(config):
            self.names = stored_names(self.model)
        lacking = [name for name in self.names.values() if name not in stored]
        if lacking:
            raise UserError(
                f"family {config['model_type']!r}: the library makes {names_of(lacking)} of what is stored, "
                "which learned growth does not follow; choose a fixed operator"
            )
        self.values = values
        self.layers: list[nn.Module] = next(
            list(module)
            for module in self.model.modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth
        )
        self._let_all_go(own)

    def _let_all_go(self, own: list[str]) -> None:
        """Empty every parameter, and have each layer, and each module outside of them, fill its own."""
        get = self.model.get_parameter
        first = {id(get(name)): name for name in own}
        self._places: dict[nn.Module, list[_Place]] = {}
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        outside = [module for module in self.model.modules() if id(module) not in inside]
        for unit in (*self.layers, *outside):
            modules = unit.modules() if unit in self.layers else [unit]
            places = [
                (module, key, self.names[first[id(parameter)]])
                for module in modules
                for key, parameter in module._parameters.items()
                if parameter is not None
            ]
            if places:
                self._places[unit] = places
                unit.register_forward_pre_hook(lambda unit, _: self.fill(unit))
                unit.register_forward_hook(lambda unit, *_: self.let_go(unit))
        for unit in self._places:
            self.let_go(unit)

    def fill(self, unit: nn.Module) -> None:
        """Read a unit's parameters."""
        for module, key, name in self._places[unit]:
            module._parameters[key] = self._parameter(self._tensor(name))

    def _tensor(self, name: str) -> Tensor:
        """Read a stored tensor in the type that is computed in."""
        values = torch.from_numpy(self.values(name))
        return values.to(self.dtype)

    def let_go(self, unit: nn.Module) -> None:
        """Leave a unit's parameters without values."""
        for module, key, _ in self._places[unit]:
            parameter = module._parameters[key]
            assert parameter is not None
            empty = torch.empty_like(parameter, device="meta")
            module._parameters[key] = self._parameter(empty)

    @staticmethod
    def _parameter(values: Tensor) -> nn.Parameter:
        return nn.Parameter(values, requires_grad=False)

    def matrices(self, unit: nn.Module) -> dict[nn.Module, str]:
        """The modules of a unit that hold a matrix, and the stored name of it."""
        places = self._places.get(unit, ())
        return {
            module: name
            for module, key, name in places
            if key == "weight" and module.get_parameter("weight").ndim == 2
        }

    @property
    def head(self) -> nn.Module | None:
        """The output head, None where it is the embedding."""
        head = self.model.get_output_embeddings()
        if head is None:
            return None
        embedding = self.model.get_input_embeddings()
        _, _, head_name = self._places[head][0]
        _, _, embedding_name = self._places[embedding][0]
        return None if head_name == embedding_name else head

    def to_head(self, tokens: Tensor) -> Tensor | None:
        """Run (row, position) tokens up to the output head: its inputs, None where the class has none."""
        head = self.model.get_output_embeddings()

        def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            raise AtHead(arguments[0])

        hook = None
        if head is not None:
            hook = head.register_forward_pre_hook(stop, prepend=True)
        try:
            self.model(input_ids=tokens, use_cache=False)
        except AtHead as reached:
            return reached.inputs
        finally:
            if hook is not None:
                hook.remove()
        return None

    def loss(self, tokens: Tensor) -> float:
        """The mean loss of the next token, nats per token: (row, position)."""
        output = self.model(input_ids=tokens, use_cache=False)
        predictions = output.logits[:, :-1]
        following = tokens[:, 1:]
        losses = []
        for row, next_tokens in zip(predictions, following, strict=True):  # one in float64 at a time
            loss = nn.functional.cross_entropy(row.double(), next_tokens)
            losses.append(loss)
        return float(torch.stack(losses).mean())


def values_of(reader: Any, stored: Mapping[str, Any]) -> Values:
    """The values of a reader's tensors by name."""

    def values(name: str) -> np.ndarray:
        entry = stored[name]
        assert is_float(entry.dtype)
        raw = reader.read(name)
        return to_float(raw, entry.dtype).reshape(entry.shape)

    return values
