"""Speed and memory at equal numbers: fused activation functions, compiled layers, activations that are
recomputed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer

from outgrow.model.base.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from outgrow.train.settings import LoopSettings


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The repeated layers of a Hugging Face network, first to last."""
    return [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]


class TanhGELU(nn.GELU):
    """`nn.GELU(approximate="tanh")`; while training on a CPU, in float32 or compiled, through a sigmoid:
    PyTorch's CPU kernel takes a slow hyperbolic tangent forward, and the same again backward.
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        on_cpu = type(input) is Tensor and input.device.type == "cpu"
        if on_cpu and input.requires_grad:
            if torch.compiler.is_compiling():
                return _gelu(input)
            if input.dtype is torch.float32:
                return SigmoidGELU.apply(input)
        return super().forward(input)


SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715
PIECE = 2**16  # of numbers: five arrays of them fit a core's cache


def _gelu(inputs: Tensor) -> Tensor:
    """GELU by tanh in one line, which a compiler makes one kernel forward and one backward of."""
    return inputs * torch.sigmoid(SLOPE * (inputs + CUBIC * inputs * inputs * inputs))


class SigmoidGELU(torch.autograd.Function):
    """x · σ(SLOPE · (x + CUBIC · x³)), which is GELU by tanh, since 1 + tanh(z) = 2 · σ(2z).

    The forward pass keeps the derivative in the input's place, so the backward pass is one product. It goes
    through the input in pieces that stay in a core's cache, so its intermediate values take no memory to
    speak of.
    """

    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1)
        value = torch.empty_like(flat)
        derivative = torch.empty_like(flat)
        pieces = [tensor.split(PIECE) for tensor in (flat, value, derivative)]
        for piece in zip(*pieces, strict=True):
            _gelu_and_slope(*piece)
        context.save_for_backward(derivative.view(inputs.shape))
        return value.view(inputs.shape)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (derivative,) = context.saved_tensors
        return gradient * derivative


def _gelu_and_slope(inputs: Tensor, value: Tensor, slope: Tensor) -> None:
    """Write GELU by tanh, and its derivative, of `inputs`. Each line is a pass: they are as few as PyTorch's
    kernels allow."""
    square = inputs * inputs
    gate = torch.addcmul(inputs, square, inputs, value=CUBIC, out=slope).mul_(SLOPE).sigmoid_()
    torch.mul(inputs, gate, out=value)
    # σ + x · σ · (1 − σ) · SLOPE · (1 + 3 · CUBIC · x²)
    bend = torch.addcmul(value, value, gate, value=-1.0)
    gate.add_(bend, alpha=SLOPE).addcmul_(bend, square, value=3 * CUBIC * SLOPE)


# Activation functions for which there is one kernel forward and one backward, or about as little.
FUSED = (TanhGELU(), nn.GELU(), nn.SiLU(), nn.Mish())
SAME = 1e-7  # of max(1, |x|), in float64: less than float32 rounds


def fuse_activations(network: nn.Module) -> None:
    """Put PyTorch's fused kernel in the place of every activation module that computes the same function as a
    chain of elementwise ones, such as the library's `gelu_new`.

    Each module is measured, value and derivative, not known by name. One that agrees to the bit already is
    the kernel, and stays. Modules that hold tensors, or come from PyTorch, are none.
    """
    for parent in list(network.modules()):
        for name, module in parent.named_children():
            kernel = _fused(module)
            if kernel is not None:
                setattr(parent, name, kernel)


def _fused(module: nn.Module) -> nn.Module | None:
    """The kernel of FUSED that computes the function of `module` otherwise than it does; None where there is
    none."""
    parts = [*module.children(), *module.parameters(), *module.buffers()]
    if parts or type(module).__module__.startswith("torch."):
        return None
    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        line = torch.linspace(-12.0, 12.0, 2048, dtype=torch.float64)
        at = line.view(2, 4, 256)
        try:
            own = _value_and_slope(module, at)
        except Exception:  # no function of one tensor; the library's classes raise every kind
            return None
        tolerance = SAME * at.abs().clamp(min=1.0)
        for kernel in FUSED:
            theirs = _value_and_slope(kernel, at)
            pairs = list(zip(own, theirs, strict=True))
            apart = ((one - other).abs() for one, other in pairs)
            if all(bool((gap <= tolerance).all()) for gap in apart):
                same = all(torch.equal(one, other) for one, other in pairs)
                return None if same else kernel
    return None


def _value_and_slope(function: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise function's values and derivatives."""
    inputs = at.clone().requires_grad_()
    value = function(inputs)
    (slope,) = torch.autograd.grad(value.sum(), inputs)
    return value.detach(), slope


def speed_up(network: PreTrainedModel, settings: LoopSettings) -> None:
    """Change `network` in place; names, weights and config stay as they are.

    always         activation functions in one kernel (`fuse_activations`)
    checkpointing  each layer keeps its input alone and computes the rest again in the backward pass (arXiv
                   1604.06174): about a third more FLOPs, for activations of one layer instead of all
    compile        each layer on its own, so that one compilation serves them all and a deep network compiles
                   as fast as a shallow one

    Raises:
        UserError: the network's family does not support checkpointing.
    """
    model: Any = network
    fuse_activations(network)
    if settings.checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"train.checkpointing: {type(network).__name__} does not support it; use "
                "train.checkpointing=false",
            )
        # older name
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if settings.compile:
        for layer in layers_of(network) or [model.base_model]:
            layer.compile()
