"""The fused loss against the plain one, family by family: values, gradients, and what it never holds in
memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.profiler import profile

from helpers.families import FAMILIES, config_of
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model
from outgrow.train import loss
from outgrow.train.compose import compose
from outgrow.train.loss import NextTokenLoss, fused_cross_entropy
from outgrow.train.start.way import find_way, fuses

VOCAB, CONTEXT = 61, 16
CPU = torch.device("cpu")
SETTINGS = compose(["growth=scratch", "target=tiny_target"]).train


def windows(rows: int = 3) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(0))


def value_and_gradients(
    config: dict[str, Any], *, fused: bool, reduction: str = "mean"
) -> tuple[float, dict[str, torch.Tensor]]:
    model = NextTokenLoss(
        build_model(config, seed=0, attention="eager"), fused=fused
    ).eval()  # GPT-2 and OPT have dropout
    with torch.no_grad():
        for parameter in model.parameters():  # no zero biases, no weight at 1
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    found = model(windows(), reduction)
    found.backward()
    return found.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_is_plain_in_value_and_every_gradient(
    family: str, tied: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 20)  # 48 tokens in 20 + 20 + 8
    config = config_of(family, tie_word_embeddings=tied)
    if not fuses(config, "auto"):
        pytest.skip("caps its logits")
    plain, expected = value_and_gradients(config, fused=False, reduction=reduction)
    fused, found = value_and_gradients(config, fused=True, reduction=reduction)
    assert fused == pytest.approx(plain, rel=1e-6)
    assert found.keys() == expected.keys()
    assert any("embed" in name or "wte" in name for name in found)
    # a key's bias has no gradient but that
    rounding = 1e-6 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=rounding, msg=name)


def test_phis_head_has_a_bias_and_it_gets_its_gradient() -> None:
    _, expected = value_and_gradients(config_of("phi"), fused=False)
    _, found = value_and_gradients(config_of("phi"), fused=True)
    bias = found["network.lm_head.bias"]
    assert bias.abs().max() > 1e-3
    torch.testing.assert_close(bias, expected["network.lm_head.bias"])


def test_a_network_that_caps_its_logits_is_not_fused() -> None:
    assert config_of("gemma2")["final_logit_softcapping"]
    config = config_of("gemma2", final_logit_softcapping=0.5)
    assert not fuses(config, "auto")
    with pytest.raises(
        UserError,
        match=r"train.loss=fused: .*the head over the base model's output is not its logits \(.* apart",
    ):
        find_way(config, dataclasses.replace(SETTINGS, loss="fused"), CPU, "fp32")
    assert not find_way(config, SETTINGS, CPU, "fp32").fused
    plain, _ = value_and_gradients(config, fused=False)
    fused, _ = value_and_gradients(config, fused=True)
    assert abs(plain - fused) > 1e-2  # the fused loss would have been another one
    assert (fuses(config_of("phi"), "auto"), fuses(config_of("phi"), "plain")) == (True, False)


def test_every_family_but_the_capped_one_is_fused() -> None:
    assert [family for family in FAMILIES if not fuses(config_of(family), "auto")] == ["gemma2"]


def test_under_bfloat16_autocast_the_loss_keeps_its_digits() -> None:
    """Operands in bfloat16 would return it rounded to 8 bits."""
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2048, 32, generator=draw), torch.nn.Linear(32, 500)
    targets = torch.randint(0, 500, (2048,), generator=draw)
    exact = functional.cross_entropy(head(hidden), targets).item()
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_cross_entropy(hidden, head, targets, "mean")
    assert found.dtype is torch.float32
    assert found.item() == pytest.approx(exact, rel=1e-6)


def test_the_logits_are_never_whole() -> None:
    """The largest piece of memory that forward and backward ask for, told by PyTorch's own profiler."""
    tokens, vocab = 4096, 500
    hidden, head = torch.randn(tokens, 8, requires_grad=True), torch.nn.Linear(8, vocab)
    targets = torch.zeros(tokens, dtype=torch.int64)

    def largest(fused: bool) -> int:
        with profile(profile_memory=True) as profiled:
            if fused:
                fused_cross_entropy(hidden, head, targets, "mean").backward()
            else:
                functional.cross_entropy(head(hidden), targets).backward()
        events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    assert largest(fused=False) >= tokens * vocab * 4
    assert largest(fused=True) <= loss.CHUNK_TOKENS * vocab * 4
