"""Weights of formats that growth computes nothing on: copied byte for byte in depth, refused with the reason
in width; tied heads stored twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.families import config_of
from helpers.models import make_checkpoint
from helpers.unwritten import config_of as unwritten
from outgrow.growth import grow, plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.headers import SINGLE

METHODS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    **{method: {"quant_method": method} for method in ("hqq", "torchao", "quanto", "eetq")},
}
PACKED = {
    "bitsandbytes": torch.uint8, "gptq": torch.int32, "awq": torch.int32, "compressed-tensors": torch.int32,
    "fp8": torch.float8_e4m3fn, "mxfp4": torch.uint8, "hqq": torch.uint8, "torchao": torch.int8, "quanto": torch.int8,
    "eetq": torch.int8,
}  # fmt: skip
WAY = {
    "bitsandbytes": r"dequantise it first \(.*\.dequantize\(\)", "gptq": "the checkpoint that it was made from",
    "awq": "the checkpoint that it was made from", "compressed-tensors": r"CompressedTensorsConfig\(dequantize=True\)",
    "fp8": r"weight has no scales .*weight_scale_inv or .*weight_scale beside it; dequantise", "mxfp4": r"Mxfp4Config\(dequantize=True\)",
    **dict.fromkeys(("hqq", "torchao", "quanto", "eetq"), "dequantise it first, where its library can, or give"),
}  # fmt: skip
DEEPER = {"num_hidden_layers": 4}
NAME = "model.layers.{}.self_attn.q_proj.weight"


def changed(
    source: Path,
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A copy of a checkpoint with other config entries and tensors."""
    shutil.copytree(source, folder)
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | (config or {})))
    save_file(load_file(folder / SINGLE) | (tensors or {}), folder / SINGLE, {"format": "pt"})
    return folder


def packed(source: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The queries' matrices in another format, and what a quantisation keeps beside them."""
    numbers = torch.Generator().manual_seed(0)
    shape = load_file(source / SINGLE)[NAME.format(0)].shape
    made = {}
    for layer in range(3):
        made[NAME.format(layer)] = torch.randint(0, 100, shape, generator=numbers, dtype=torch.uint8).to(
            dtype
        )
    return made


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_quantisation_is_dropped_where_the_tensors_are_plain(
    method: str, phi_folder: Path, tmp_path: Path
) -> None:
    source = changed(phi_folder, tmp_path / "source", {"quantization_config": METHODS[method]})
    grown = grow(source, tmp_path / "out", target={"hidden_size": 30})
    assert grown.receipt is not None
    assert "quantization_config" not in json.loads((grown.folder / "config.json").read_text())
    assert "quantization_config is dropped" in grown.notes[0]
    assert load_model(source).config.to_dict().get("quantization_config") is None


def test_a_quantisation_that_says_nothing_is_left_out_too(phi_folder: Path, tmp_path: Path) -> None:
    source = changed(phi_folder, tmp_path / "source", {"quantization_config": {}})
    grown = grow(source, tmp_path / "out", target={"hidden_size": 30})
    assert grown.receipt is not None
    assert not grown.notes
    assert "quantization_config" not in json.loads((grown.folder / "config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_grow_by_whole_layers_alone(method: str, phi_folder: Path, tmp_path: Path) -> None:
    made = packed(phi_folder, PACKED[method])
    scales = {f"{name}_factor": torch.ones(3) for name in made}
    source = changed(phi_folder, tmp_path / "source", {"quantization_config": METHODS[method]}, made | scales)
    with pytest.raises(
        UserError,
        match=(
            rf"quantised \({method}; \w+\), and growth computes on plain ones: .*{WAY[method]}.* whole "
            r"layers"
        ),
    ):
        grow(source, tmp_path / "out", target={"hidden_size": 30})
    grown = grow(source, tmp_path / "out", target=DEEPER, depth=[0, 1, 1, 2])
    out = load_file(grown.folder / SINGLE)
    for layer, taken in enumerate([0, 1, 1, 2]):
        assert bits(out[NAME.format(layer)]) == bits(made[NAME.format(taken)])
        assert f"{NAME.format(layer)}_factor" in out
    assert json.loads((grown.folder / "config.json").read_text())["quantization_config"] == METHODS[method]


def test_a_quantisation_that_names_layers_by_number_is_refused(phi_folder: Path, tmp_path: Path) -> None:
    said = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.2.mlp"]}
    source = changed(
        phi_folder,
        tmp_path / "source",
        {"quantization_config": said},
        packed(phi_folder, torch.float8_e4m3fn),
    )
    with pytest.raises(UserError, match="names layers by their numbers, which would move"):
        grow(source, tmp_path / "out", target=DEEPER, depth="stack")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint32], ids=str)
def test_a_family_with_a_schema_copies_layers_of_any_format(
    dtype: torch.dtype, phi_folder: Path, tmp_path: Path
) -> None:
    made = packed(phi_folder, dtype)
    source = changed(phi_folder, tmp_path / "source", tensors=made)
    grown = grow(source, tmp_path / "out", target=DEEPER, depth="interleave", receipt=False)
    out = load_file(grown.folder / SINGLE)
    assert [bits(out[NAME.format(layer)]) for layer in range(4)] == [
        bits(made[NAME.format(layer)]) for layer in (0, 0, 1, 2)
    ]
    with pytest.raises(UserError, match=r"q_proj\.weight \(3 tensors\): dtype .*dequantise first"):
        grow(source, tmp_path / "wider", target={"hidden_size": 30}, receipt=False)


# ---- tied heads --------------------------------------------------------------------------------------------


def test_a_tied_head_that_is_stored_and_differs_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tied", config_of("llama") | {"tie_word_embeddings": True})
    other = load_file(source / SINGLE)["model.embed_tokens.weight"] * 1.01
    source = changed(source, tmp_path / "source", tensors={"lm_head.weight": other})
    with pytest.raises(
        UserError,
        match=r"ties the head to model\.embed_tokens\.weight, but lm_head\.weight is stored too and differs",
    ):
        grow(source, tmp_path / "out", target={"num_hidden_layers": 4})


SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TIED = {
    "falcon": {"ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    "cohere": {"intermediate_size": 48},
    "starcoder2": {"intermediate_size": 48},
    "gemma3_text": {"intermediate_size": 48, "query_pre_attn_scalar": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED)
def test_a_derived_family_that_stores_its_tied_head_too_grows(name: str, tmp_path: Path) -> None:
    sizes = {key: size for key, size in SMALL.items() if (name, key) != ("falcon", "head_dim")}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    source = make_checkpoint(
        tmp_path / "tied", {"model_type": name, "tie_word_embeddings": True, **sizes, **TIED[name], **tokens}
    )
    embedding = next(tensor for key, tensor in load_file(source / SINGLE).items() if "embed" in key)
    twice = changed(source, tmp_path / "twice", tensors={"lm_head.weight": embedding.clone()})
    with Checkpoint(twice) as checkpoint:
        assert "lm_head.weight" in checkpoint.tensors
    target = {"num_hidden_layers": 3}
    once, again = (
        grow(source, tmp_path / "once", target=target),
        grow(twice, tmp_path / "again", target=target),
    )
    assert (once.folder / SINGLE).read_bytes() == (again.folder / SINGLE).read_bytes()
    different = changed(source, tmp_path / "different", tensors={"lm_head.weight": embedding * 1.01})
    with pytest.raises(UserError, match=r"lm_head\.weight is stored too and differs"):
        grow(different, tmp_path / "out", target=target)


@pytest.mark.slow
def test_a_head_dim_that_would_follow_the_hidden_size_is_named(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral",
        "intermediate_size": 48,
        "num_local_experts": 2,
        **SMALL,
        "head_dim": None,
    }
    source = make_checkpoint(tmp_path / "source", config)
    with pytest.raises(
        UserError,
        match=(
            r"with hidden_size 64 each of 4 heads would have 16 dims instead of 8, .* give head_dim:8 in "
            r"the target"
        ),
    ):
        grow(source, tmp_path / "out", target={"hidden_size": 64})
    assert grow(source, tmp_path / "out", target={"hidden_size": 64, "head_dim": 8}).certificate.lossless


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "starcoder2"])
def test_a_head_dim_that_grows_by_its_own_key_is_named(name: str) -> None:
    config = unwritten(name, head_dim=8)
    with pytest.raises(
        UserError,
        match=r"head_dim 8 becomes 12, so rotary positions would turn other dims .* keep head_dim:8",
    ):
        plan(config, {"head_dim": 12})
    assert plan(config, {"hidden_size": 32, "head_dim": 8}).certificate.lossless
