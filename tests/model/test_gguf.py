"""GGUF sources: unpacked by the library into plain weights, kept in a cache, grown like any other; what
cannot be read is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import outgrow.model.gguf
from helpers.models import random_model
from outgrow.growth import grow
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import SINGLE, locate
from outgrow.model.gguf import unpacked

gguf = pytest.importorskip("gguf")
LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
WORDS = [*map(chr, range(33, 126)), "ab", "<s>", "</s>"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored_name(name: str) -> str:
    """A tensor's name in llama.cpp's spelling."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def turned(name: str, tensor: np.ndarray) -> np.ndarray:
    """Queries and keys as llama.cpp stores them: the halves of each head's rotary pairs side by side."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(path: Path, tensors: dict[str, np.ndarray], architecture: str = "llama") -> Path:
    """Write a GGUF file of a llama, matrices in blocks of 8 bits."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(94)
    writer.add_eos_token_id(95)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored_name(name), gguf.quants.quantize(turned(name, tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in random_model(LLAMA).state_dict().items()}


@pytest.fixture
def file(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    (tmp_path / "models").mkdir()
    return write_gguf(tmp_path / "models" / "tiny.Q8_0.gguf", weights)


def test_a_gguf_is_unpacked_to_the_values_of_its_blocks(file: Path, weights: dict[str, np.ndarray]) -> None:
    folder = locate(file)
    held = load_file(folder / SINGLE)
    assert held.keys() == weights.keys()
    for name, tensor in weights.items():
        blocks = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0) if tensor.ndim == 2 else tensor
        values = (
            gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0) if tensor.ndim == 2 else blocks
        )
        assert torch.equal(held[name], torch.from_numpy(values)), name
        assert held[name].dtype == torch.float32
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["model_type"], config["hidden_size"], config["num_key_value_heads"]) == ("llama", 64, 2)
    assert (folder / "tokenizer.json").exists()


@pytest.mark.slow
def test_it_grows_from_its_path_and_from_its_folder(file: Path, tmp_path: Path) -> None:
    target = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
    one, other = (
        grow(source, tmp_path / f"out{number}", target=target)
        for number, source in enumerate((file, file.parent))
    )
    assert one.certificate.lossless
    assert one.receipt is not None
    assert one.receipt.max_delta < 1e-5 * one.receipt.max_logit
    assert (one.folder / SINGLE).read_bytes() == (other.folder / SINGLE).read_bytes()


def test_it_is_unpacked_once_and_again_when_it_changes(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(*_: Any) -> None:
        raise AssertionError("unpacked twice")

    folder = unpacked(file)
    with monkeypatch.context() as patch:
        patch.setattr(outgrow.model.gguf, "_unpack", once)
        assert unpacked(file) == folder
        os.utime(file, (1, 1))
        with pytest.raises(AssertionError, match="unpacked twice"):
            unpacked(file)
    assert not list(cache.rglob("*.partial"))
    assert unpacked(file) != folder


def test_what_is_no_gguf_or_of_an_unknown_architecture_is_one_error(
    tmp_path: Path, weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(UserError, match=r"text\.gguf: is no GGUF file \(it begins with b'no m'"):
        locate(tmp_path / "text.gguf")
    strange = write_gguf(tmp_path / "strange.gguf", weights, "nonsuch")
    with pytest.raises(
        UserError,
        match=r"strange\.gguf: transformers cannot read this GGUF file \(.*nonsuch.*\); give the checkpoint",
    ):
        locate(strange)
    (tmp_path / "cut.gguf").write_bytes(strange.read_bytes()[:500])
    with pytest.raises(UserError, match=r"cut\.gguf: transformers cannot read this GGUF file"):
        locate(tmp_path / "cut.gguf")
    with pytest.raises(
        UserError, match=r"holds 3 GGUF files \(cut\.gguf, strange\.gguf, text\.gguf\); give one of them"
    ):
        locate(tmp_path)
    monkeypatch.setattr(outgrow.model.gguf, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package gguf; install the extra: pip install -e '\.\[gguf\]'"
    ):
        locate(strange)


def test_a_gguf_that_lacks_a_weight_is_refused(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        locate(write_gguf(tmp_path / "holes.gguf", weights))
