"""Attention for mixed precision on a CPU: what PyTorch's kernel computes in float32, and nobody else's changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.families import config_of
from outgrow.model.build import build_model
from outgrow.train.loss import NextTokenLoss
from outgrow.train.machine import attention
from outgrow.train.machine.attention import fast_mixed_attention, in_blocks, mixed_attention
from outgrow.train.machine.compile import TanhGELU
from outgrow.train.machine.device import session

ROUGH = 2e-2  # of values around 1: what bfloat16 rounds, a few times over
ALLOWED = {"rtol": ROUGH, "atol": ROUGH}


def drawn(heads: int, key_heads: int, length: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values of two rows, each (row, head, token, entry)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, count, length, 8) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def with_gradients(result: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result.float(), *torch.autograd.grad((result.float() * weights).sum(), leaves)]


@pytest.mark.parametrize("length", [1, 63, 64, 129, 200, 300])
def test_attention_in_blocks_is_causal_attention(length: int) -> None:
    leaves = drawn(2, 2, length)
    queries, keys, values = leaves
    blocks = in_blocks(queries * 0.3, keys, values)
    whole = functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3)
    pairs = zip(with_gradients(blocks, leaves), with_gradients(whole, leaves), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_blocks_multiply_five_eighths_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    softmax = Tensor.softmax

    def seen(scores: Tensor, dim: int) -> Tensor:
        shapes.append(scores.shape[2:])
        return softmax(scores, dim)

    monkeypatch.setattr(Tensor, "softmax", seen)
    in_blocks(*drawn(1, 1, 256))
    assert shapes == [(64, 64), (64, 128), (64, 192), (64, 256)]
    assert sum(shape.numel() for shape in shapes) == 5 / 8 * 256 * 256


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("key_heads", "length", "options"),
    [
        (4, 70, {}),
        (2, 130, {"scaling": 0.2}),
        (4, 130, {"is_causal": False}),
        (2, 40, {"mask": "bool"}),
        (4, 40, {"mask": "added"}),
        (4, 40, {"position_bias": True}),
    ],
)
def test_mixed_attention_is_the_librarys_in_bfloat16(
    key_heads: int, length: int, options: dict[str, Any], compiled: bool
) -> None:
    leaves = drawn(4, key_heads, length)
    arguments = dict(options)
    kind = arguments.pop("mask", None)
    seen = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(2)) < 0.7
    seen |= torch.eye(length, dtype=torch.bool)
    masks = {None: None, "bool": seen, "added": torch.where(seen, 0.0, -1e30)}
    if "position_bias" in arguments:
        arguments["position_bias"] = torch.linspace(-1, 1, length).expand(1, 4, length, length)
    module = SimpleNamespace(num_key_value_groups=4 // key_heads, is_causal=True)

    def ours(*operands: Tensor) -> Tensor:
        mask = masks[kind]
        with torch.autocast("cpu", torch.bfloat16):
            wide = mask is not None and mask.is_floating_point()
            given = mask.bfloat16() if wide else mask
            result, weights = mixed_attention(module, *operands, given, **arguments)  # type: ignore[arg-type]
        assert weights is None
        return result

    if compiled:
        torch.compiler.reset()
        ours = torch.compile(ours, backend="eager", fullgraph=True)
    found = ours(*leaves)
    assert found.dtype is torch.bfloat16
    expected, _ = sdpa_attention_forward(module, *leaves, masks[kind], **arguments)  # type: ignore[arg-type]
    pairs = zip(with_gradients(found, leaves), with_gradients(expected, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **ALLOWED)


@pytest.mark.slow
@pytest.mark.parametrize(("longest", "blocks"), [(512, 1), (69, 0)])
def test_a_compiled_layer_of_a_short_context_takes_blocks(
    monkeypatch: pytest.MonkeyPatch, longest: int, blocks: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(attention, "LONGEST", longest)
    monkeypatch.setattr(attention, "in_blocks", lambda *parts: calls.append(1) or in_blocks(*parts))
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)

    def forward(*operands: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mixed_attention(module, *operands, None)[0]  # type: ignore[arg-type]

    torch.compiler.reset()
    torch.compile(forward, backend="eager")(*drawn(4, 4, 70))
    assert len(calls) == blocks


def test_without_autocast_attention_is_the_librarys_to_the_bit() -> None:
    leaves = drawn(4, 2, 20)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    found, _ = mixed_attention(module, *leaves, None)  # type: ignore[arg-type]
    expected, _ = sdpa_attention_forward(module, *leaves, None)  # type: ignore[arg-type]
    assert torch.equal(found, expected)


def test_networks_take_it_for_as_long_as_a_session_in_bfloat16_on_a_cpu_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    library = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with session("bf16"):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mixed_attention
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is library
    with session("fp32"):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is library
    with pytest.raises(KeyboardInterrupt), session("bf16"):
        raise KeyboardInterrupt
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is library


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("family", ["phi", "llama", "gpt2"])
def test_a_network_has_the_losses_and_gradients_of_float32(family: str, apart: bool) -> None:
    network: nn.Module = build_model(config_of(family), seed=0, attention="sdpa").eval()  # no dropout
    windows = torch.randint(2, 61, (2, 17), generator=torch.Generator().manual_seed(0))
    objective = NextTokenLoss(network, fused=True, end_of_text=7 if apart else None)  # type: ignore[arg-type]
    if apart:
        windows[:, 5] = 7
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    exact = objective(windows)
    gradients = torch.autograd.grad(exact, parameters, allow_unused=True)
    with fast_mixed_attention(), torch.autocast("cpu", torch.bfloat16):
        loss = objective(windows)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    for one, other in zip(torch.autograd.grad(loss, parameters, allow_unused=True), gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm() <= 0.05 * other.norm() + 1e-6


@pytest.mark.slow
def test_a_compiler_is_handed_gelu_as_a_formula_in_bfloat16_too() -> None:
    line = torch.linspace(-12.0, 12.0, 4001, dtype=torch.bfloat16)
    ours, theirs = line.clone().requires_grad_(), line.double().requires_grad_()
    torch.compiler.reset()
    value = torch.compile(TanhGELU(), backend="eager", fullgraph=True)(ours)
    assert type(value.grad_fn).__name__ == "MulBackward0"
    expected = functional.gelu(theirs, approximate="tanh")
    slopes = torch.autograd.grad(value.sum(), ours) + torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(value.double(), expected, **ALLOWED)
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=5e-2, atol=5e-2)
