"""Fused activations, checkpointing, compiling and bfloat16: each does what it says, and leaves the numbers as they are."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.activations import ACT2CLS, ACT2FN

from helpers.families import FAMILIES, config_of
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model
from outgrow.train.compose import compose
from outgrow.train.loss import NextTokenLoss
from outgrow.train.machine import device
from outgrow.train.machine.compile import SAME, TanhGELU, fuse_activations, layers_of, speed_up
from outgrow.train.machine.device import session
from outgrow.train.settings import LoopSettings

SETTINGS = compose(["growth=scratch", "target=tiny_target"]).train


def loop(**changes: Any) -> LoopSettings:
    return dataclasses.replace(SETTINGS, **changes)


def windows() -> torch.Tensor:
    return torch.randint(2, 61, (2, 17), generator=torch.Generator().manual_seed(0))


def stepped(
    config: dict[str, Any], settings: LoopSettings
) -> tuple[float, dict[str, torch.Tensor], int, int]:
    """Loss, gradients, how often a layer was computed, and the bytes kept for the backward pass."""
    network = build_model(config, seed=0, attention="eager").train()
    speed_up(network, settings)
    calls, kept = 0, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
        return tensor

    first = layers_of(network)[0]
    next(
        module
        for module in first.modules()
        if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__
    ).register_forward_hook(count)
    torch.manual_seed(0)  # dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = NextTokenLoss(network, fused=False)(windows())
    loss.backward()
    return (
        loss.item(),
        {name: p.grad for name, p in network.named_parameters() if p.grad is not None},
        calls,
        kept,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_computes_layers_twice_keeps_less_and_changes_no_bit(family: str) -> None:
    config = config_of(family)
    loss, gradients, once, whole = stepped(config, loop())
    same, again, twice, less = stepped(config, loop(checkpointing=True))
    assert (same, once, twice) == (loss, 1, 2)
    assert less < 0.5 * whole
    assert gradients.keys() == again.keys()
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_a_network_without_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_model(config_of("phi"), seed=0)
    monkeypatch.setattr(type(network), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"PhiForCausalLM does not support it; use train.checkpointing=false"):
        speed_up(network, loop(checkpointing=True))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_compile_once_for_all_and_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """With AOTAutograd's own backend, which needs no C++ compiler."""
    from torch._dynamo.utils import counters

    compile_layer = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_layer(self, backend="aot_eager"))

    def step(settings: LoopSettings) -> tuple[float, dict[str, torch.Tensor]]:
        network = build_model(config_of("phi", num_hidden_layers=4), seed=0).train()
        speed_up(network, settings)
        loss = NextTokenLoss(network, fused=True)(windows())
        loss.backward()
        return loss.item(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    loss, gradients = step(loop())
    torch.compiler.reset()
    counters.clear()
    compiled, found = step(loop(compile=True, checkpointing=checkpointing))
    assert counters["stats"]["unique_graphs"] in (1, 2)  # not one for each of the 4 layers
    assert compiled == pytest.approx(loss, rel=1e-6)
    assert found.keys() == gradients.keys()  # no name has changed
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_bfloat16_multiplies_in_bfloat16_and_keeps_weights_gradients_and_loss_in_float32() -> None:
    network = build_model(config_of("phi"), seed=0).train()
    seen: dict[str, torch.dtype] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    with session("bf16") as accelerator:
        assert accelerator.mixed_precision == "bf16"
        model = accelerator.prepare(NextTokenLoss(network, fused=True))
        loss = model(windows())
        accelerator.backward(loss)
    exact = NextTokenLoss(build_model(config_of("phi"), seed=0), fused=False)(windows()).item()
    assert len(seen) == 12
    assert set(seen.values()) == {torch.bfloat16}
    assert loss.dtype is torch.float32
    assert (
        {p.dtype for p in network.parameters()}
        == {p.grad.dtype for p in network.parameters() if p.grad is not None}
        == {torch.float32}
    )
    assert loss.item() == pytest.approx(exact, rel=1e-3)
    assert loss.item() != exact


# ---- activation functions in one kernel --------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_an_activation_is_replaced_by_a_kernel_that_computes_the_same_function(name: str) -> None:
    network = nn.Sequential(ACT2FN[name])
    library = network[0]
    fuse_activations(network)
    chains = {
        **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "tanh"),
        "gelu_python": "none",
    }
    assert (network[0] is not library) == (name in chains)
    if name in chains:
        assert network[0].approximate == chains[name]
        at = torch.linspace(-20, 20, 999)
        assert torch.allclose(network[0](at), library(at), rtol=1e-6, atol=1e-6)


def test_gelu_through_a_sigmoid_is_gelu_with_its_derivative_and_keeps_no_more() -> None:
    line = torch.cat([torch.linspace(-12.0, 12.0, 4001), torch.tensor([-1e6, 1e6, 0.0])])
    ours, theirs = line.clone().requires_grad_(), line.double().requires_grad_()
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = TanhGELU()(ours)
    assert "SigmoidGELU" in type(value.grad_fn).__name__
    assert kept == [line.nbytes]
    expected = nn.functional.gelu(theirs, approximate="tanh")
    slopes = torch.autograd.grad(value.sum(), ours) + torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=1e-6, atol=2e-6)


@pytest.mark.slow
def test_a_compiler_is_handed_gelu_as_a_formula_that_it_can_fuse() -> None:
    """Not as a function with a backward pass of its own, whose pieces it would have to run one by one."""
    line = torch.linspace(-12.0, 12.0, 4001)
    ours, theirs = line.clone().requires_grad_(), line.double().requires_grad_()
    torch.compiler.reset()
    value = torch.compile(TanhGELU(), backend="eager", fullgraph=True)(ours)
    assert "SigmoidGELU" not in type(value.grad_fn).__name__
    assert type(value.grad_fn).__name__ == "MulBackward0"
    expected = nn.functional.gelu(theirs, approximate="tanh")
    slopes = torch.autograd.grad(value.sum(), ours) + torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=1e-6, atol=2e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these settings")
def test_a_session_on_a_cpu_keeps_the_memory_that_a_step_frees() -> None:
    """In a process of its own: 64 tensors are freed and allocated again without a page that the system clears."""
    script = (
        "import resource, sys, torch\n"
        "from outgrow.train.machine.device import session\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def step(): return [torch.ones(2**18) for _ in range(64)]\n"
        "with session('fp32'):\n"
        "    step(); step(); before = faults(); step(); print(faults() - before)\n"
    )
    command = [sys.executable, "-P", "-c", script]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert int(result.stdout) < 1000  # of the 16,384 pages of 64 MiB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gelu_is_pytorchs_own_kernel_elsewhere(dtype: torch.dtype) -> None:
    at = torch.linspace(-4, 4, 99, dtype=dtype, requires_grad=True)
    assert torch.equal(TanhGELU()(at), nn.functional.gelu(at, approximate="tanh"))
    assert torch.equal(TanhGELU()(at.detach().float()), nn.GELU(approximate="tanh")(at.detach().float()))


class Almost(nn.Module):
    """GELU, a little off."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off = off

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(given) + self.off * torch.tanh(given)


class Drawn(nn.Module):
    """A module that draws."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given * torch.rand(given.shape)


@pytest.mark.parametrize(
    ("module", "replaced"),
    [(Almost(0.1 * SAME), True), (Almost(100 * SAME), False), (Drawn(), False), (nn.Dropout(0.5), False)],
)
def test_only_the_same_function_is_replaced_and_nothing_is_drawn(module: nn.Module, replaced: bool) -> None:
    network, before = nn.Sequential(nn.Sequential(module)), torch.random.get_rng_state()
    fuse_activations(network)
    assert (network[0][0] is not module) == replaced
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", ["phi", "gpt2", "bloom"])
def test_a_network_with_fused_activations_has_its_losses_and_gradients(family: str) -> None:
    config = config_of(family, **({"n_layer": 2, "n_head": 4} if family == "bloom" else {}))
    plain, fused = (build_model(config, seed=0, attention="eager").double().eval() for _ in range(2))
    fuse_activations(fused)
    assert any(isinstance(module, nn.GELU) for module in fused.modules())
    assert fused.config.to_dict() == plain.config.to_dict()
    assert list(fused.state_dict()) == list(plain.state_dict())
    losses = [NextTokenLoss(network, fused=False)(windows()) for network in (plain, fused)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-9)
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-6, atol=1e-9)


def test_the_backend_of_a_process_group_outlives_what_refers_to_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def join(cpu: bool, hang_seconds: float | None) -> None:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    with monkeypatch.context() as patched:
        patched.setattr(device, "_join_processes", join)
        with session("fp32"):
            (backend,) = device._held
            assert isinstance(backend, distributed.ProcessGroupGloo)
            network = DistributedDataParallel(torch.nn.Linear(2, 2))
            network(torch.ones(1, 2)).sum().backward()
    assert not distributed.is_initialized()
    assert device._held == [backend]  # while the module still refers to the group
    # before `backend`: else the module would free the group while it holds the interpreter's lock
    del network
    with session("fp32"):
        assert device._held == []
