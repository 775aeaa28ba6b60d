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
from outgrow.model.build import load_model
from outgrow.model.gguf import unpacked
from outgrow.model.headers import SINGLE
from outgrow.model.locate import locate

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
KINDS = gguf.GGMLQuantizationType
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


def blocks_of(tensor: np.ndarray, kind: Any) -> np.ndarray:
    """A tensor in blocks of a kind; any bits, where the package has no code that makes them."""
    try:
        return gguf.quants.quantize(tensor, kind)
    except NotImplementedError:
        entries, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // entries * size)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    matrices: str = "Q8_0",
    more: dict[str, np.ndarray] | None = None,
    scaling: str | None = None,
    most: int = 0,
) -> Path:
    """Write a GGUF file of a llama, matrices in blocks of a kind, `more` under their own names; in parts of
    at `most` so many tensors."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=most)
    hidden = tensors["model.norm.weight"].shape[0]
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96 if hidden == 64 else hidden)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(94)
    writer.add_eos_token_id(95)
    for name, tensor in tensors.items():
        kind = KINDS[matrices if tensor.ndim == 2 else "F32"]
        writer.add_tensor(stored_name(name), blocks_of(turned(name, tensor), kind), raw_dtype=kind)
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor)
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
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # any bits may be a NaN's
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_blocks_of_every_kind_have_the_values_that_the_package_gives_them(kind: str, tmp_path: Path) -> None:
    config = LLAMA | {"hidden_size": 256, "intermediate_size": 256}
    weights = {name: tensor.float().numpy() for name, tensor in random_model(config).state_dict().items()}
    held = load_file(locate(write_gguf(tmp_path / "tiny.gguf", weights, matrices=kind)) / SINGLE)
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        values = gguf.quants.dequantize(blocks_of(weights[name], KINDS[kind]), KINDS[kind])
        assert np.array_equal(held[name].numpy(), values, equal_nan=True), name


def write_like(path: Path, model: Any, architecture: str, more: dict[str, Any] | None = None) -> Path:
    """Write a GGUF file of a model: its tensors, what the library's own table says of its config, and `more`."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    names = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    stored = gguf.get_tensor_name_map(names[architecture], model.config.num_hidden_layers)
    told = GGUF_CONFIG_MAPPING[architecture].items()
    entries = {key: getattr(model.config, entry or "", None) for key, entry in told} | (more or {})
    for key, value in entries.items():
        write: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32}
        if type(value) in write:
            write[type(value)](f"{architecture}.{key}", value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        added = (
            1 if architecture.startswith("gemma") and name.endswith("norm.weight") else 0
        )  # in llama.cpp's
        writer.add_tensor(stored.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy() + added)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_computes_the_same(read: Any, model: Any) -> None:
    tokens = torch.arange(24)[None]
    expected = model.eval()(input_ids=tokens).logits
    assert torch.allclose(read.eval()(input_ids=tokens).logits, expected, atol=1e-5)


OTHER = LLAMA | {"head_dim": 16, "tie_word_embeddings": True, "pad_token_id": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "architecture"), [("qwen2", "qwen2"), ("starcoder2", "starcoder2"), ("stablelm", "stablelm")]
)
def test_files_of_other_architectures_compute_what_their_models_do(
    kind: str, architecture: str, tmp_path: Path
) -> None:
    model = random_model(OTHER | {"model_type": kind}).float()
    read = load_model(unpacked(write_like(tmp_path / "tiny.gguf", model, architecture)))
    assert read.config.model_type == kind
    assert_computes_the_same(read, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "architecture", "config", "entries", "said"),
    [
        ("gemma3_text", "gemma3", {"query_pre_attn_scalar": 16}, {}, "query_pre_attn_scalar=16, which no such"),
        ("gemma2", "gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.5, "sliding_window": 8},
         {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 30.0}, "attn_logit_softcapping=1.5 is the file"),
        ("gemma2", "gemma2", {"query_pre_attn_scalar": 32, "head_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 46},
         {}, "query_pre_attn_scalar=32, which no such file holds, is as llama.cpp has it"),
        ("starcoder2", "starcoder2", {"sliding_window": 8}, {"attention.sliding_window": 8}, "sliding_window=8 is the file's own"),
        ("gemma2", "gemma2", {"query_pre_attn_scalar": 16}, {"attention.sliding_window": None},
         "sliding_window=4096 is of transformers' class: the file says nothing of it"),
    ],
    ids=["gemma3", "softcap", "gemma2 27b", "window", "no window"],
)  # fmt: skip
def test_numbers_that_the_library_takes_from_its_class_are_the_files_own(
    kind: str,
    architecture: str,
    config: dict[str, Any],
    entries: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has no place for softcaps and windows, and Gemma's scale of attention is in no file: it would compute
    with those of its own."""
    model = random_model(OTHER | {"model_type": kind} | config).float()
    read = load_model(unpacked(write_like(tmp_path / "tiny.gguf", model, architecture, entries)))
    assert f"note: {tmp_path / 'tiny.gguf'}: {said}" in capsys.readouterr().err
    assert_computes_the_same(read, model)


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
    with pytest.raises(
        UserError, match=r"holds 2 GGUF files \(strange\.gguf, text\.gguf\); give one of them"
    ):
        locate(tmp_path)
    monkeypatch.setattr(outgrow.model.gguf, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package gguf; install the extra: pip install -e '\.\[gguf\]'"
    ):
        locate(strange)


def test_a_model_in_parts_is_to_be_merged(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    write_gguf(tmp_path / "tiny.gguf", weights, most=8)
    first, _, last = sorted(tmp_path.glob("*.gguf"))
    assert first.name == "tiny-00001-of-00003.gguf"
    merged = tmp_path / "tiny-merged.gguf"
    told = rf"is one of 3 parts of a model.*--merge {first} {merged}\), then give source={merged}"
    for given in (tmp_path, first, last):
        with pytest.raises(UserError, match=told):
            locate(given)
    write_gguf(tmp_path / "tiny.Q4_0.gguf", weights)
    with pytest.raises(UserError, match=r"holds 4 GGUF files .* give one of them"):
        locate(tmp_path)


DAMAGED = {
    "cut in its counts": lambda data: data[:20],
    "cut in its header": lambda data: data[:500],
    "cut in its list of tokens": lambda data: data[: data.index(b"tokenizer.ggml.tokens") + 60],
    "cut in its scores, which are numbers": lambda data: data[: data.index(b"tokenizer.ggml.scores") + 60],
    "cut in its last tensor": lambda data: data[:-10],
    "more entries than any has": lambda data: _with_count(data, 16),
    "more tensors than any has": lambda data: _with_count(data, 8),
    "more scores than any has": lambda data: _with_count(data, data.index(b"tokenizer.ggml.scores") + 29),
    "zeros in its header": lambda data: data[:40] + bytes(200) + data[240:],
    "a later version": lambda data: data[:4] + b"\x09\0\0\0" + data[8:],
}


def _with_count(data: bytes, place: int) -> bytes:
    """A file whose count at a place has a bit flipped, its 40th."""
    count = int.from_bytes(data[place : place + 8], "little") ^ (1 << 40)
    return data[:place] + count.to_bytes(8, "little") + data[place + 8 :]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_gguf_is_told_before_anything_is_unpacked(
    damage: str, file: Path, tmp_path: Path, cache: Path
) -> None:
    data = DAMAGED[damage](file.read_bytes())
    (tmp_path / "cut.gguf").write_bytes(data)
    told = rf"cut\.gguf: its header does not describe the {len(data):,} bytes that are there .* download it again"
    with pytest.raises(UserError, match=told):
        locate(tmp_path / "cut.gguf")
    assert not [path for path in cache.rglob("*") if path.name.endswith("safetensors")]


def test_what_the_library_would_pass_over_is_refused(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    """Without a word it drops the scaling of rotary frequencies, and tensors that its class has no place for."""
    factors = {"rope_freqs.weight": np.full(8, 4, np.float32)}
    with pytest.raises(UserError, match=r"rotary frequencies are scaled \(rope_freqs\.weight\)"):
        locate(write_gguf(tmp_path / "factors.gguf", weights, more=factors))
    with pytest.raises(UserError, match=r"rotary frequencies are scaled \(yarn\), which transformers passes"):
        locate(write_gguf(tmp_path / "yarn.gguf", weights, scaling="yarn"))
    stablelm = random_model(OTHER | {"model_type": "stablelm"}).float()
    with pytest.raises(UserError, match=r"8 dimensions of a head rotate, of which transformers makes 4"):
        locate(write_like(tmp_path / "part.gguf", stablelm, "stablelm", {"rope.dimension_count": 8}))
    bias = {"blk.0.attn_q.bias": np.ones(64, np.float32)}
    with pytest.raises(UserError, match=r"transformers passes over 64 of its [\d,]+ numbers; give the"):
        locate(write_gguf(tmp_path / "bias.gguf", weights, more=bias))
    assert locate(write_gguf(tmp_path / "none.gguf", weights, scaling="none")).is_dir()


def test_a_matrix_of_another_shape_is_named(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"] = np.ones((32, 64), np.float32)
    with pytest.raises(UserError, match=r"mismatched keys: .*model\.layers\.1\.mlp\.up_proj\.weight"):
        locate(write_gguf(tmp_path / "shape.gguf", weights))


def test_a_gguf_that_lacks_a_weight_is_refused(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        locate(write_gguf(tmp_path / "holes.gguf", weights))
