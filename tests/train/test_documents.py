"""Documents packed into one window and kept apart give what each would give alone, under every attention and
for every family."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional

from helpers.families import FAMILIES, config_of
from outgrow.model.base.errors import UserError
from outgrow.model.build import attention_backend, build_model
from outgrow.model.documents import document_positions
from outgrow.train.compose import compose
from outgrow.train.loss import NextTokenLoss, build_loss
from outgrow.train.router import Losses
from outgrow.train.start.way import find_way

END = 1
CPU = torch.device("cpu")
SETTINGS = dataclasses.replace(compose(["growth=scratch", "target=tiny_target"]).train, document_mask=True)
# which makes its masks without looking at positions
MASKED = [family for family in FAMILIES if family != "opt"]


def windows() -> torch.Tensor:
    """Two windows of 20 predicted tokens; documents of 1 to 11 tokens, among them an empty one."""
    tokens = torch.randint(2, 61, (2, 21), generator=torch.Generator().manual_seed(0))
    tokens[0, [4, 5, 16]] = END
    tokens[1, 9] = END
    return tokens


def separate_documents(tokens: torch.Tensor) -> list[torch.Tensor]:
    """Cut by hand: each with the token after it, which is predicted too."""
    cuts = [(0, 0, 4), (0, 4, 5), (0, 5, 16), (0, 16, 20), (1, 0, 9), (1, 9, 20)]
    return [tokens[row : row + 1, first : last + 1] for row, first, last in cuts]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def text_loss(loss: NextTokenLoss) -> torch.Tensor:
    """The summed loss on the windows, without what routers add."""
    found = loss(windows(), "sum")
    return found.text if isinstance(found, Losses) else found


def assert_packed_is_separate(
    network: Any, alone: Any, *, fused: bool, backward: bool = True, masked: bool = False
) -> None:
    """The summed loss and its gradients; `alone` computes each document by itself, with nothing of ours
    between."""
    packed = text_loss(NextTokenLoss(network, fused=fused, end_of_text=END, masked=masked))
    parts = []
    for document in separate_documents(windows()):
        logits = alone(input_ids=document[:, :-1], use_cache=False).logits
        parts.append(
            functional.cross_entropy(logits.float().flatten(0, 1), document[:, 1:].flatten(), reduction="sum")
        )
    separate = torch.stack(parts).sum()
    assert packed.item() == pytest.approx(separate.item(), rel=1e-5)
    joined = text_loss(NextTokenLoss(network, fused=fused))
    assert abs(joined.item() - separate.item()) > 1e-3  # without the mask it is another loss
    if backward:
        packed.backward()
        separate.backward()
        ours, theirs = gradients(network), gradients(alone)
        largest = max(gradient.abs().max().item() for gradient in theirs.values())
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def spread(network: Any) -> Any:
    """Weights so large that what a token attends to changes its logits."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    return network.eval()  # GPT-2 has dropout


def pair(family: str, attention: str) -> tuple[Any, Any]:
    """The same network twice: under `attention`, and under the library's plain one."""
    return tuple(
        spread(build_model(config_of(family), seed=0, attention=name)) for name in (attention, "eager")
    )  # type: ignore[return-value]


# ---- positions ---------------------------------------------------------------------------------------------


def test_positions_restart_at_every_end_of_text() -> None:
    tokens = torch.tensor([[5, 6, END, 7, END, END, 8], [END, 5, 6, 7, 8, 9, END]])
    assert document_positions(tokens, END).tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0]]


# ---- equality ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", MASKED)
def test_packed_documents_are_separate_documents(family: str, attention: str, fused: bool) -> None:
    if family == "gemma2" and (fused or attention == "sdpa"):
        pytest.skip("caps its logits, and its attention's")
    assert_packed_is_separate(*pair(family, attention), fused=fused)


LEAKING: dict[str, dict[str, Any]] = {  # whose classes do not look at positions when they make their masks
    "falcon": {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2},
    "mpt": {"d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 32},
    "gpt_oss": {
        "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 16, "sliding_window": 4,
        "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "attention"),
    [("falcon", "sdpa"), ("falcon", "eager"), ("mpt", "eager"), ("gpt_oss", "eager"), ("opt", "sdpa")],
)
def test_masks_that_are_handed_over_keep_documents_apart(family: str, attention: str) -> None:
    own = {
        "model_type": family,
        "vocab_size": 61,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **LEAKING.get(family, {}),
    }
    config = own if family in LEAKING else config_of(family)
    way = find_way(config, dataclasses.replace(SETTINGS, attention=attention), CPU, "fp32")
    assert way.masked
    assert any(
        "do not keep documents apart" in line and "masks are handed over" in line for line in way.lines
    )
    network, alone = (spread(build_model(config, seed=0, attention=name)) for name in (attention, "eager"))
    assert_packed_is_separate(network, alone, fused=way.fused, masked=True)
    with pytest.raises(AssertionError):
        assert_packed_is_separate(network, alone, fused=way.fused)


@pytest.mark.slow
def test_packed_documents_are_separate_documents_in_flex_attention() -> None:
    """Forward only: PyTorch's FlexAttention has no backward pass on a CPU, and training with it there is
    refused."""
    with pytest.raises(
        UserError,
        match=(
            r"train.attention=flex_attention: phi does not train with it here \(.*; use "
            r"train.attention=sdpa or"
        ),
    ):
        find_way(config_of("phi"), dataclasses.replace(SETTINGS, attention="flex_attention"), CPU, "fp32")
    network, alone = pair("phi", "flex_attention")
    with torch.no_grad():
        assert_packed_is_separate(network, alone, fused=True, backward=False)


# gpt2: only under autocast
@pytest.mark.parametrize("family", [family for family in MASKED if family not in ("gemma2", "gpt2")])
def test_packed_documents_are_separate_documents_in_flash_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's whole flash path, with flash-attn's two functions replaced by PyTorch that follows their
    documentation."""
    from transformers import modeling_flash_attention_utils as flash

    calls = []

    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        **_: Any,
    ) -> Any:
        calls.append("whole")
        return varlen(q[0], k[0], v[0], softmax_scale, causal, [0, q.shape[1]])[None]

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        calls.append("varlen")
        assert cu_seqlens_q.dtype is cu_seqlens_k.dtype is torch.int32
        assert max((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).tolist()) <= max_seqlen_q == max_seqlen_k
        return varlen(q, k, v, softmax_scale, causal, cu_seqlens_q.tolist())

    def varlen(q: Any, k: Any, v: Any, scale: Any, causal: bool, bounds: list[int]) -> Any:
        parts = []
        for first, last in itertools.pairwise(bounds):
            heads = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
            out = functional.scaled_dot_product_attention(
                *heads, is_causal=causal, scale=scale, enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(flash, "_flash_fn", flash_attn_func)
    monkeypatch.setattr(flash, "_flash_varlen_fn", flash_attn_varlen_func)
    monkeypatch.setattr(
        flash, "_process_flash_kwargs_fn", flash._lazy_define_process_function(flash_attn_varlen_func)
    )
    network, alone = pair(family, "eager")
    network.config._attn_implementation = "flash_attention_2"
    packed = NextTokenLoss(network, fused=True, end_of_text=END)(windows(), "sum")
    assert calls == ["varlen"] * 2  # once a layer, for both windows together
    packed.backward()
    reference = NextTokenLoss(alone, fused=True, end_of_text=END)(windows(), "sum")
    reference.backward()
    assert packed.item() == pytest.approx(reference.item(), rel=1e-5)
    ours, theirs = gradients(network), gradients(alone)
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_a_family_that_cannot_keep_documents_apart_is_refused() -> None:
    config = {"model_type": "bloom", "vocab_size": 61, "hidden_size": 24, "n_head": 4, "n_layer": 2}
    with pytest.raises(
        UserError,
        match=(
            r"document_mask=true: .*\(bloom\).* move by 0\.\d+ of the largest .* use "
            r"train.document_mask=false"
        ),
    ):
        find_way(config, SETTINGS, CPU, "fp32")
    find_way(config_of("phi"), SETTINGS, CPU, "fp32")


def test_the_setting_reaches_the_loss() -> None:
    config = config_of("phi")
    network = build_model(config, seed=0)
    assert build_loss(network, SETTINGS, END, fused=True).end_of_text == END
    assert [
        build_loss(network, SETTINGS, END, fused=True, masked=masked).masked for masked in (False, True)
    ] == [False, True]
    assert (
        build_loss(network, dataclasses.replace(SETTINGS, document_mask=False), END, fused=True).end_of_text
        is None
    )


# ---- which attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "package", "capability", "chosen", "reason"),
    [
        (True, True, (8, 0), "flash_attention_2", "flash-attn is installed and the GPU supports it"),
        (True, True, (9, 0), "flash_attention_2", "flash-attn is installed and the GPU supports it"),
        (True, True, (7, 5), "sdpa", "no flash-attn: Turing is older than compute capability 8.0"),
        (True, False, (9, 0), "sdpa", "no flash-attn: the package flash_attn is not installed"),
        (False, True, (9, 0), "sdpa", "no flash-attn: no CUDA GPU"),
    ],
)
def test_flash_attention_is_taken_where_it_runs(
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    package: bool,
    capability: tuple[int, int],
    chosen: str,
    reason: str,
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Turing")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: package or None if name == "flash_attn" else find(name, *more),
    )
    assert attention_backend("auto") == (chosen, reason)
    assert attention_backend("sdpa") == ("sdpa", "asked for")
    assert attention_backend("flex_attention")[0] == "flex_attention"
    if chosen == "flash_attention_2":
        assert attention_backend("flash_attention_2")[0] == chosen
    else:
        with pytest.raises(UserError, match="use attention=auto, or install the extra"):
            attention_backend("flash_attention_2")
