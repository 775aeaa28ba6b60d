"""Tensors in memory for the streaming engine: read as raw bits, written back as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from outgrow.growth.engine.execute import Expander
from outgrow.growth.engine.rows import Reader
from outgrow.growth.plan import Plan
from outgrow.model.base.errors import UserError
from outgrow.model.dtypes import RAW
from outgrow.model.headers import Stored

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16


@dataclass(frozen=True, eq=False)
class Tensors:
    """Named tensors on any device, as a `Reader`."""

    tensors: Mapping[str, torch.Tensor]

    def stored(self) -> dict[str, Stored]:
        """Describe the tensors as a file would: name → format and shape.

        Raises:
            UserError: a tensor has a dtype that no file can hold.
        """
        kinds = {name: tensor.dtype for name, tensor in self.tensors.items()}
        unknown = {name: dtype for name, dtype in kinds.items() if dtype not in DTYPES}
        faults = [f"{name}: {dtype} cannot be grown" for name, dtype in unknown.items()]
        UserError.collect(faults)
        dtypes = self.dtypes
        return {
            name: Stored(Path(), 0, dtypes[name], tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        }

    @property
    def dtypes(self) -> dict[str, str]:
        """Name → safetensors dtype of every tensor."""
        return {name: DTYPES[tensor.dtype] for name, tensor in self.tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read raw rows `start:stop` of a tensor, as a `Reader` counts them; the caller may write to them."""
        tensor = self.tensors[name]
        matrix = tensor
        if tensor.ndim > 2:
            matrix = rearrange(tensor, "... column -> (...) column")
        rows = matrix[start:stop].detach()
        rows = rows.to("cpu", copy=True, memory_format=torch.contiguous_format)
        integer = _INTEGERS[rows.element_size()]
        raw_type = RAW[DTYPES[rows.dtype]]
        return rows.view(integer).numpy().view(raw_type)


def expand(plan: Plan, reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every target tensor of a plan, (name, tensor), in the plan's order."""
    kinds = {name: kind for kind, name in DTYPES.items()}
    for step in plan.steps:
        rows = Expander(plan, step, reader).complete()
        integers = rows.view(f"i{rows.itemsize}")
        kind = kinds[plan.dtype(step)]
        yield step.name, torch.from_numpy(integers).view(kind)
