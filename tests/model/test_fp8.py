"""FP8 sources: weights dequantised as they are read, held against PyTorch's formats and against what
`transformers` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from helpers.models import make_checkpoint
from outgrow.growth import grow, plan
from outgrow.growth.verify import measure
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.fp8 import Dequantised, dequantised, numbers
from outgrow.model.headers import SINGLE

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    **SIZES,
}
SCALE = "_scale_inv"
WIDER = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}


def quantised(
    folder: Path, blocks: tuple[int, int] | None, scale: torch.dtype = torch.float32, **said: Any
) -> Path:
    """A checkpoint in bfloat16 whose layers' matrices are stored in 8 bits, with a factor for each block (or
    one for all)."""
    make_checkpoint(folder, LLAMA, "bfloat16")
    tensors = load_file(folder / SINGLE)
    for name in [name for name, tensor in tensors.items() if ".layers." in name and tensor.ndim == 2]:
        weight = tensors[name].float()
        height, width = blocks or weight.shape
        rows, columns = (-(-size // block) for size, block in zip(weight.shape, (height, width), strict=True))
        padded = torch.zeros(rows * height, columns * width)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        tiles = padded.reshape(rows, height, columns, width)
        factors = (
            (tiles.abs().amax((1, 3)) / 448).log2().ceil().exp2()
            if scale != torch.float32
            else tiles.abs().amax((1, 3)) / 448
        )
        small = (tiles / factors[:, None, :, None]).reshape(padded.shape)[
            : weight.shape[0], : weight.shape[1]
        ]
        tensors[name] = small.contiguous().to(torch.float8_e4m3fn)
        stored = factors if scale != torch.uint8 else factors.log2().add(127)
        tensors[name + SCALE] = stored.to(scale) if blocks else stored.reshape(()).clone()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    entry = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": blocks and list(blocks),
        **said,
    }
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    return folder


def plain(folder: Path) -> Dequantised:
    with Checkpoint(folder) as checkpoint:
        made = dequantised(checkpoint)
    assert made is not None
    return made


@pytest.mark.parametrize(("name", "kind"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)])
def test_every_number_of_a_format_is_pytorchs(name: str, kind: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(kind).float()
    assert torch.equal(torch.from_numpy(numbers(name)).nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


@pytest.mark.parametrize(
    ("blocks", "scale", "said"),
    [
        ((16, 32), torch.float32, {}),
        ((32, 16), torch.bfloat16, {}),
        ((32, 32), torch.uint8, {"scale_fmt": "ue8m0"}),
        (None, torch.float32, {}),
    ],
    ids=["blocks", "bfloat16 scales", "exponents", "one scale"],
)
def test_the_weights_are_those_that_the_library_loads(
    blocks: tuple[int, int] | None, scale: torch.dtype, said: dict[str, Any], tmp_path: Path
) -> None:
    folder = quantised(tmp_path / "source", blocks, scale, **said)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    held = plain(folder).state_dict()
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name
    model = load_model(folder, dtype="bfloat16")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")


def test_blocks_that_the_sizes_are_no_multiple_of_and_rows_read_in_parts(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "source", (40, 24))
    stored, view = load_file(folder / SINGLE), plain(folder)
    name = "model.layers.1.mlp.down_proj.weight"  # 64 × 96
    factors = stored[name + SCALE].repeat_interleave(40, 0).repeat_interleave(24, 1)[:64, :96]
    expected = (stored[name].float() * factors).bfloat16()
    for start, stop in ((0, 64), (37, 45), (63, 64)):
        rows = torch.from_numpy(view.read(name, start, stop).view("i2")).view(torch.bfloat16)
        assert torch.equal(rows, expected[start:stop])


@pytest.mark.slow
def test_growth_dequantises_on_the_way_and_its_receipt_holds(tmp_path: Path) -> None:
    source = quantised(tmp_path / "source", (16, 16))
    load_model(source, dtype="bfloat16").save_pretrained(tmp_path / "plain")
    grown, other = (
        grow(tmp_path / name, tmp_path / f"{name} grown", target=WIDER) for name in ("source", "plain")
    )
    assert grown.certificate.lossless
    assert grown.receipt is not None
    assert (grown.receipt.exact_delta or 1) < 1e-5 * grown.receipt.max_logit
    assert (grown.folder / SINGLE).read_bytes() == (other.folder / SINGLE).read_bytes()
    assert "quantization_config" not in json.loads((grown.folder / "config.json").read_text())
    assert "dequantised into bfloat16" in grown.notes[0]
    assert plan(source, WIDER).hash == grown.plan.hash
    assert measure(source, grown.folder).kl < 1e-3
    deeper = grow(source, tmp_path / "deeper", target={"num_hidden_layers": 3}, depth="stack")
    assert (
        load_file(deeper.folder / SINGLE)["model.layers.2.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    ), "byte for byte"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_block_size": [16]}, "weight_block_size must be two positive whole numbers; found"),
        ({"weight_block_size": [16, 0]}, "weight_block_size must be two positive whole numbers; found"),
        ({"weight_block_size": [64, 16]}, r"_scale_inv has shape \(.*\) where \(.*\) is expected"),
        ({"quant_method": "mxfp4"}, r"quantised \(mxfp4; F8_E4M3\).*Mxfp4Config\(dequantize=True\)"),
        (
            {"quant_method": "gptq"},
            "give the checkpoint that it was made from, since no library makes plain weights",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_dequantised_is_told(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = quantised(tmp_path / "source", (16, 16), **change)
    with pytest.raises(UserError, match=words):
        grow(source, tmp_path / "out", target=WIDER)


def test_a_matrix_without_its_scale_is_told(tmp_path: Path) -> None:
    source = quantised(tmp_path / "source", (16, 16))
    tensors = load_file(source / SINGLE)
    del tensors["model.layers.0.mlp.up_proj.weight" + SCALE]
    save_file(tensors, source / SINGLE, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"up_proj\.weight has no scales \S+weight_scale_inv or \S+weight_scale beside"
    ):
        grow(source, tmp_path / "out", target=WIDER)


# ---- X.weight_scale, as vLLM, llm-compressor, FBGEMM and ModelOpt write it ---------------------------------


def scaled(
    folder: Path,
    shape: str,
    config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    more: dict[str, torch.Tensor] | None = None,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in bfloat16 whose layers' matrices are 8-bit floats × factors of a shape, and its weights by
    PyTorch's own arithmetic."""
    make_checkpoint(folder, LLAMA, "bfloat16")
    tensors = load_file(folder / SINGLE)
    plain = dict(tensors)
    numbers_drawn = torch.Generator().manual_seed(0)
    for name in [name for name, tensor in tensors.items() if ".layers." in name and tensor.ndim == 2]:
        rows, columns = tensors[name].shape
        sizes = {"one": (), "[1]": (1,), "rows": (rows,), "[rows, 1]": (rows, 1), "blocks": (-(-rows // 40), -(-columns // 24)),
                 "groups": (rows, columns // 16)}[shape]  # fmt: skip
        factors = (torch.rand(sizes, generator=numbers_drawn) + 0.5).to(dtype)
        small = (tensors[name].float() * 20).to(torch.float8_e4m3fn)
        entries = factors.float()
        if shape == "rows":
            entries = entries[:, None]
        if shape == "blocks":
            entries = entries.repeat_interleave(40, 0).repeat_interleave(24, 1)[:rows, :columns]
        if shape == "groups":
            entries = entries.repeat_interleave(16, 1)
        plain[name] = (small.float() * entries).bfloat16()
        tensors[name], tensors[f"{name}_scale"] = small, factors
        tensors[name.replace(".weight", ".input_scale")] = torch.tensor(0.25)
    save_file(tensors | (more or {}), folder / SINGLE, {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    return folder, plain


def compressed(**weights: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, **weights},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    }
    groups = {"group_0": group}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


@pytest.mark.parametrize(
    ("shape", "config", "dtype"),
    [
        ("one", compressed(strategy="tensor"), torch.float32),
        ("[1]", compressed(strategy="tensor"), torch.bfloat16),
        ("[rows, 1]", compressed(strategy="channel"), torch.float32),
        ("[rows, 1]", compressed(strategy="channel"), torch.bfloat16),
        ("blocks", compressed(strategy="block", block_structure=[40, 24]), torch.float32),
        ("groups", compressed(strategy="group", group_size=16), torch.float32),
        ("one", {"quant_method": "fp8", "activation_scheme": "static"}, torch.float32),
        ("rows", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, torch.float32),
        ("one", {"quant_method": "modelopt", "quant_algo": "FP8"}, torch.float32),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_factors_of_every_shape_give_the_weights_of_pytorchs_arithmetic(
    shape: str, config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, expected = scaled(tmp_path / "source", shape, config, dtype)
    view = plain(folder)
    held = view.state_dict()
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor, expected[name]), name
    name = "model.layers.1.mlp.down_proj.weight"
    part = torch.from_numpy(view.read(name, 37, 45).view("i2")).view(torch.bfloat16)
    assert torch.equal(part, expected[name][37:45])
    model = load_model(folder, dtype="bfloat16")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "weights", "dtype"),
    [
        ("one", {"strategy": "tensor"}, torch.float32),
        ("[rows, 1]", {"strategy": "channel"}, torch.bfloat16),
        ("blocks", {"strategy": "block", "block_structure": [40, 24]}, torch.float32),
        ("groups", {"strategy": "group", "group_size": 16}, torch.float32),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_such_weights_are_those_that_compressed_tensors_decompresses(
    shape: str, weights: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    config = compressed(**weights) | {"quantization_status": "compressed", "ignore": ["lm_head"]}
    folder, _ = scaled(tmp_path / "source", shape, config, dtype)
    way = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=way)
    decompressed = model.state_dict()
    held = plain(folder).state_dict()
    for name, tensor in held.items():
        assert torch.equal(tensor, decompressed[name]), name


def test_growth_takes_such_weights_and_tells_which_scales_it_drops(tmp_path: Path) -> None:
    key = {"model.layers.0.self_attn.k_scale": torch.tensor([0.5])}
    source, weights = scaled(tmp_path / "source", "[rows, 1]", compressed(strategy="channel"), more=key)
    other = make_checkpoint(tmp_path / "plain", LLAMA, "bfloat16")
    save_file(weights, other / SINGLE, {"format": "pt"})
    one, two = (grow(folder, tmp_path / f"{folder.name} out", target=WIDER) for folder in (source, other))
    assert one.certificate.lossless
    assert (one.folder / SINGLE).read_bytes() == (two.folder / SINGLE).read_bytes()
    assert "quantization_config" not in json.loads((one.folder / "config.json").read_text())
    assert one.notes[0].startswith("weights quantised by compressed-tensors are dequantised into bfloat16")
    assert "15 scales of activations (model.layers." in one.notes[0]


NAME = "model.layers.0.mlp.up_proj.weight"  # 96 × 64


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        ({}, {f"{NAME}_scale": torch.ones(3)}, r"up_proj\.weight_scale has shape \(3,\) where \(\) or \(96,\) is"),
        ({}, {f"{NAME}_scale": torch.ones(1, 64)}, r"up_proj\.weight_scale has shape \(1, 64\) where"),
        ({}, {f"{NAME}_scale": torch.ones(96, dtype=torch.int64)}, r"weight_scale holds I64, which are no factors"),
        ({}, {f"{NAME}_zero_point": torch.zeros(96, 1)}, r"up_proj\.weight_zero_point shifts its weights; dequ"),
        ({}, {NAME: torch.ones(96, 8, dtype=torch.int32)}, r"up_proj\.weight holds I32, which is neither plain"),
        ({"transform_config": {"config_groups": {"u": {}}}}, {}, "its transform_config turns what runs through"),
        ({"config_groups": {
            str(size): {"weights": {"block_structure": [size, size]}} for size in (16, 32)
        }}, {}, r"blocks of several sizes \(\(16, 16\), \(32, 32\)\)"),
        ({"config_groups": {"0": {"weights": {"block_structure": "16x16"}}}}, {}, "block_structure must be two pos"),
        ({"quant_method": "quark"}, {}, r"quantised \(quark; F8_E4M3\).*: dequantise it first, where its library"),
    ],
    ids=["shape", "columns", "integers", "zero point", "packed", "transform", "sizes", "text", "method"],
)  # fmt: skip
def test_what_is_not_known_of_them_is_refused(
    config: dict[str, Any], more: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    source, _ = scaled(tmp_path / "source", "[rows, 1]", compressed(strategy="channel") | config, more=more)
    with pytest.raises(UserError, match=words):
        grow(source, tmp_path / "out", target=WIDER)
