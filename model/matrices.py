"""The parameters of a class that are matrices, as its tiny twin shows: by their use in a forward pass, not by
name.

Shapes: a matrix is (out, in) or, where a class multiplies from the other side, (in, out); a stack of experts
is (expert, out, in) or (expert, in, out). `Parameter.reads` says which axis is in.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.base.quiet import quietly
from outgrow.model.derive import LENGTH, ROWS, Uses, build, scramble, uses
from outgrow.model.family import Config
from outgrow.model.twin import Twin, layerless, tiny_twin

if TYPE_CHECKING:
    import torch

Kind = Literal["matrix", "matrices", "convolution", "embedding", "other", "unused"]


@dataclass(frozen=True)
class Parameter:
    """The use that a class makes of one parameter, in every layer that has it.

    Attributes:
        kind: "matrix": two axes, of which a product sums over one; "matrices": a stack of such, as of experts
            (expert, out, in); "convolution": a kernel over positions, depthwise or not; "embedding": rows are
            looked up (a tied head too); "other": added, multiplied by, exponentiated (norms, biases, A_log);
            "unused": text does not reach it.
        reads: the axes that are summed over.
    """

    kind: Kind
    reads: tuple[int, ...]


def parameters_of(config: Config) -> dict[str, Parameter]:
    """Parameter's name without its layer's number (`layerless`) → what the class of `config` does with it.

    `parameters_of(config)[layerless("model.layers.17.mlp.experts.down_proj")]` → `Parameter("matrices",
    (2,))`.

    Raises:
        UserError: the class does not build or run as a tiny twin.
    """
    return _parameters(tiny_twin(config))


@lru_cache(maxsize=64)
def _parameters(twin: Twin) -> dict[str, Parameter]:
    try:
        with quietly():
            model = build(twin.config, "cpu")
            scramble(model)
            traces = uses(model, twin.tokens(ROWS, LENGTH))
    except UserError:
        raise
    except Exception as fault:  # the library's classes raise every kind
        raise UserError(
            f"a tiny twin of {twin.config.get('model_type')!r} does not run in float64 ({in_one_line(fault)})"
        ) from None
    alike: dict[str, list[Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        contracted = traces.contracted.get(name, ())
        kind = _kind(name, parameter, traces)
        own = Parameter(kind, tuple(sorted(contracted)))
        alike[layerless(name)].append(own)
    # Where some layers use it and others do not, it is what it is used as.
    return {name: min(kinds, key=_is_unused) for name, kinds in alike.items()}


def _is_unused(parameter: Parameter) -> bool:
    return parameter.kind == "unused"


def _kind(name: str, parameter: torch.nn.Parameter, traces: Uses) -> Kind:
    if name in traces.indexed:
        return "embedding"
    if name in traces.convolved:
        return "convolution"
    if name not in traces.contracted:
        return "other" if name in traces.touched else "unused"
    if parameter.ndim < 2:
        return "other"
    return "matrix" if parameter.ndim == 2 else "matrices"
