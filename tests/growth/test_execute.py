"""Execution: the arithmetic on raw bits, random numbers by position, and blocks of any size."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import outgrow.growth.engine.bits
import outgrow.growth.engine.execute
from helpers.unwritten import EXPERTS
from outgrow.growth import grow, plan
from outgrow.growth.engine.bits import (
    accumulate,
    add,
    all_finite,
    floats,
    lookup,
    normal_bits,
    rounded,
    scaled,
)
from outgrow.growth.engine.execute import Expander
from outgrow.growth.engine.seeding import Draws, normal, quantiles
from outgrow.model.build import to_hf_config
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.dtypes import to_float

BIGGER = {"hidden_size": 30, "intermediate_size": 50, "num_hidden_layers": 4}
ALL = np.arange(1 << 16, dtype=np.uint16)


def strided(values: np.ndarray, axes: int) -> np.ndarray:
    """The same values where rows are apart, as the columns of a block are."""
    shape = {1: (-1,), 2: (-1, 16), 3: (-1, 4, 4)}[axes]
    rows = values.reshape(shape)
    apart = np.zeros((*[size + 3 for size in rows.shape[:-1]], rows.shape[-1] + 5), values.dtype)
    view = apart[tuple(slice(0, size) for size in rows.shape)]
    view[...] = rows
    return view


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize(
    ("factor", "offset"), [(0.5, 0.0), (1 / np.sqrt(0.8), 0.0), (-1e-6, 0.0), (3e4, 0.0), (1.1, 1.0)]
)
def test_products_are_rounded_once_to_nearest(
    dtype: str, factor: float, offset: float, axes: int, loops: str
) -> None:
    """Of every number of the format, against PyTorch's rounding; infinite and subnormal ones too."""
    torch_type = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    stored = torch.from_numpy(ALL.view(np.int16).copy()).view(torch_type)
    factors = torch.tensor(factor, dtype=torch.float32)
    exact = ((stored.float() + offset) * factors - offset if offset else stored.float() * factors).to(
        torch_type
    )
    values, out = strided(ALL, axes), strided(np.zeros_like(ALL), axes)
    with np.errstate(all="ignore"):
        each = rounded(floats(values, dtype), np.full(values.shape, factor), dtype, offset)
    for found in (scaled(values, factor, dtype, offset), scaled(values, factor, dtype, offset, out), each):
        same = torch.from_numpy(found.reshape(-1).view(np.int16).copy()).view(torch_type)
        assert torch.equal(torch.isnan(same), torch.isnan(exact))
        assert torch.equal(same.nan_to_num(1.0), exact.nan_to_num(1.0))
    rows = values.reshape(-1, 16)
    row = scaled(rows[:1], factor, dtype, offset, np.zeros_like(rows))  # one for all
    np.testing.assert_array_equal(row, np.broadcast_to(scaled(rows[:1], factor, dtype, offset), rows.shape))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_finite_is_what_has_no_largest_exponent(dtype: str, loops: str) -> None:
    finite = np.isfinite(to_float(ALL, dtype))
    assert all_finite(ALL[finite], dtype)
    assert all_finite(ALL[finite][::2], dtype)
    assert all_finite(ALL[:0], dtype)
    assert not any(all_finite(np.append(ALL[:100], wrong).astype(np.uint16), dtype) for wrong in ALL[~finite])


def test_what_is_not_scaled_keeps_its_bits_even_nan_and_offset() -> None:
    assert scaled(ALL, 1.0, "BF16", 1.0) is ALL
    finite = ALL[np.isfinite(ALL.view(np.float16))]
    np.testing.assert_array_equal(floats(finite, "F16").astype(np.float16).view(np.uint16), finite)


@pytest.fixture(params=["numpy", "compiled"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of going over 16-bit entries."""
    if request.param == "numpy":
        monkeypatch.setattr(outgrow.growth.engine.bits, "compiled", None)
    elif outgrow.growth.engine.bits.compiled is None:
        pytest.skip("installed without a C compiler")
    return str(request.param)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_sums_are_rounded_to_nearest_with_ties_to_even(dtype: str, axes: int, loops: str) -> None:
    numbers = np.random.default_rng(0)
    torch_type = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    for deviation in (1e-8, 1e-6, 1e-3, 0.5, 100.0, 1e5):
        values = strided((numbers.standard_normal(len(ALL)) * deviation).astype(np.float32), axes)
        found = strided(ALL, axes)
        with np.errstate(all="ignore"):
            add(found, values, dtype)
        stored = torch.from_numpy(ALL.view(np.int16).copy()).view(torch_type).float()
        exact = (stored + torch.from_numpy(values.reshape(-1).copy())).to(torch_type)
        same = torch.from_numpy(found.reshape(-1).view(np.int16).copy()).view(torch_type)
        assert torch.equal(torch.isnan(same), torch.isnan(exact))
        assert torch.equal(same.nan_to_num(1.0), exact.nan_to_num(1.0))
    # ± 1 and its successor, half a step up: ties
    between = np.array([0x3C00, 0x3C01, 0xBC00, 0xBC01], np.uint16)
    add(between, np.array([1, 1, -1, -1], np.float32) * np.float32(2.0**-11), "F16")
    np.testing.assert_array_equal(between, [0x3C00, 0x3C02, 0xBC00, 0xBC02])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("entry", [np.uint16, np.float32])
def test_lookups_are_lookups(entry: Any, axes: int, loops: str) -> None:
    table = np.random.default_rng(0).permutation(1 << 16).astype(entry)
    index = strided(np.random.default_rng(1).integers(0, 1 << 16, 4096).astype(np.uint16), axes)
    out = strided(np.zeros(4096, entry), axes)
    around = out.base.copy()
    assert lookup(table, index, out) is out
    np.testing.assert_array_equal(out, table[index])
    np.testing.assert_array_equal(lookup(table, index), table[index])
    around[tuple(slice(0, size) for size in out.shape)] = out
    np.testing.assert_array_equal(out.base, around, "nothing beside it was touched")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_rows_are_summed_one_after_the_other(dtype: str, loops: str) -> None:
    finite = ALL[np.isfinite(to_float(ALL, dtype)) & (np.abs(to_float(ALL, dtype)) < 1e4)]
    rows = strided(np.random.default_rng(0).choice(finite, 40 * 16), 2)
    expected = np.full(16, 0.1, np.float32)
    for row in to_float(np.ascontiguousarray(rows), dtype):
        expected = expected + row
    for parts in ((0, 40), (0, 1, 7, 40)):
        total = np.full(16, 0.1, np.float32)
        for start, stop in itertools.pairwise(parts):
            accumulate(rows[start:stop], total, dtype)
        np.testing.assert_array_equal(total, expected)


def test_compiled_loops_refuse_what_they_cannot_go_over() -> None:
    if outgrow.growth.engine.bits.compiled is None:
        pytest.skip("installed without a C compiler")
    table, index = np.zeros(1 << 16, np.uint16), np.zeros((4, 6), np.uint16)
    for arguments in (
        (table[:100], index, index.copy()),  # a table too short
        (table[::-1], index, index.copy()),
        (table.astype(np.uint64), index, index.copy()),
        (table, index, np.zeros((4, 5), np.uint16)),
        (table, index, np.zeros((4, 6), np.uint32)),
        (table, index.astype(np.uint32), index.copy()),
        (table, index.T, np.zeros((6, 4), np.uint16)),
        (table, index.reshape(2, 2, 2, 3), index.reshape(2, 2, 2, 3).copy()),
        (table, np.uint16(3), np.zeros((), np.uint16)),
    ):
        with pytest.raises((ValueError, BufferError)):
            outgrow.growth.engine.bits.compiled.lookup(*arguments)
    frozen = index.copy()
    frozen.flags.writeable = False
    for stored, values in (
        (frozen, np.zeros((4, 6), np.float32)),
        (index, np.zeros((4, 6))),
        (index, np.zeros((4, 5), np.float32)),
    ):
        with pytest.raises((ValueError, BufferError)):
            outgrow.growth.engine.bits.compiled.add(stored, values, False)
    for source, out in (
        (index, frozen),
        (index, index[:3].copy()),
        (index.astype(np.uint32), index.copy()),
        (index, np.zeros((4, 6))),
    ):
        with pytest.raises((ValueError, BufferError)):
            outgrow.growth.engine.bits.compiled.scale(source, 0.5, False, out)
    total = np.zeros(6, np.float32)
    for rows, sums in (
        (index[0], total),
        (index, total[:5]),
        (index, np.zeros(6)),
        (index.T, total[:4]),
        (index.astype(np.float32), total),
    ):
        with pytest.raises((ValueError, BufferError)):
            outgrow.growth.engine.bits.compiled.accumulate(rows, False, sums)
    for wrong in (index.T, index.astype(np.uint32)):
        with pytest.raises((ValueError, BufferError)):
            outgrow.growth.engine.bits.compiled.largest(wrong)
    outgrow.growth.engine.bits.compiled.lookup(table, index[:0], index[:0])
    np.testing.assert_array_equal(index, 0)


def test_all_numbers_of_a_format_are_its_numbers() -> None:
    infinite = np.array([0x7C00, 0xFC00, 0x7E00], np.uint16)
    assert np.isposinf(floats(infinite, "F16")[0])
    assert np.isnan(floats(infinite, "F16")[2])


@pytest.mark.parametrize(("width", "dtype"), [(5, np.uint16), (8, np.uint16), (3, np.uint32)])
def test_draws_go_by_position(width: int, dtype: Any) -> None:
    whole = Draws(width, dtype, 7, "name").rows(0, 40)
    pieces = Draws(width, dtype, 7, "name")
    for start, count in ((10, 5), (0, 3), (3, 7), (39, 1), (15, 24)):
        np.testing.assert_array_equal(pieces.rows(start, count), whole[start : start + count])
    assert not np.array_equal(whole, Draws(width, dtype, 8, "name").rows(0, 40))
    assert not np.array_equal(whole, Draws(width, dtype, 7, "other").rows(0, 40))
    assert len(np.unique(whole)) > 0.95 * whole.size


def test_normal_numbers_are_normal() -> None:
    from scipy import stats

    draws = Draws(1 << 18, np.uint32, 0, "normal").rows(0, 1)[0]
    short = quantiles()[Draws(1 << 18, np.uint16, 0, "short").rows(0, 1)[0]]
    for values in (normal(draws), short):
        assert stats.kstest(values, "norm").pvalue > 0.01
        assert abs(values.std() - 1) < 0.005
    every = quantiles().astype(np.float64)
    np.testing.assert_allclose(every, stats.norm.ppf((np.arange(65536) + 0.5) / 65536), atol=1e-6)
    assert abs(np.square(every).mean() - 1) < 1e-4
    shares = np.arange(65536, dtype=np.uint32) << 16
    np.testing.assert_array_less(normal(shares), normal(shares | 0xFFFF))
    np.testing.assert_allclose(normal(shares | 0xFFFF)[:-1], normal(shares)[1:], atol=1e-4)
    assert np.abs(normal(np.array([0, 0xFFFFFFFF], np.uint32))).max() < 5
    np.testing.assert_array_equal(
        normal_bits(0.5, "F16"), (quantiles() / 2).astype(np.float16).view(np.uint16)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float16", {"noise": 0.5}),
        ("float32", {"operator": "random_pad"}),
        ("bfloat16", {"operator": "net2net", "noise": 0.5}),
    ],
)
def test_bits_do_not_depend_on_the_size_of_blocks_nor_on_compiled_loops(
    tmp_path: Path,
    monkeypatch: Any,
    checkpoint_maker: Any,
    phi_config: dict[str, Any],
    dtype: str,
    options: dict[str, Any],
) -> None:
    source = checkpoint_maker(tmp_path / "source", phi_config, dtype)
    target = BIGGER | {"vocab_size": 101}
    grow(source, tmp_path / "large", target=target, receipt=False, **options)
    for size in (1, 300):  # one row a block; a few
        monkeypatch.setattr(outgrow.growth.engine.execute, "BLOCK_BYTES", size)
        monkeypatch.setattr(outgrow.growth.engine.bits, "compiled", None)
        grow(source, tmp_path / "small", target=target, receipt=False, overwrite=True, **options)
        with Checkpoint(tmp_path / "large") as large, Checkpoint(tmp_path / "small") as small:
            for name in large.tensors:
                np.testing.assert_array_equal(small.read(name), large.read(name), err_msg=name)


@pytest.mark.slow
def test_experts_in_one_tensor_are_grown_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: Any, checkpoint_maker: Any
) -> None:
    """(expert, in, out): an expert's matrix is never held whole, and the bits are those of one block."""

    class Recording:
        largest = 0

        def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            rows = checkpoint.read(name, start, stop)
            self.largest = max(self.largest, rows.nbytes)
            return rows

    config = to_hf_config(
        {"model_type": "gpt_oss", **EXPERTS["gpt_oss"], "vocab_size": 61, "pad_token_id": None}
    ).to_dict()
    with Checkpoint(checkpoint_maker(tmp_path / "source", config, "float16")) as checkpoint:
        made = plan(checkpoint, {"hidden_size": 32, "intermediate_size": 18}, noise=0.1)
        steps = [step for step in made.steps if len(step.shape) == 3]
        assert {step.tensor.name.rsplit(".", 1)[1] for step in steps} == {"gate_up_proj", "down_proj"}
        whole = [Expander(made, step, checkpoint).complete() for step in steps]
        silent = [Expander(replace(made, noise=0.0), step, checkpoint).complete() for step in steps]
        for noisy, plain, step in zip(whole, silent, steps, strict=True):
            added = to_float(noisy, "F16").astype(np.float64) - to_float(plain, "F16")
            # copies that are read
            first, second = (
                (added[:, :6], added[:, 12:]) if "down" in step.name else (added[:, :16], added[:, 16:])
            )
            assert min(np.abs(first).max(), np.abs(second).max()) > 1e-2
            np.testing.assert_allclose(first + second, 0, atol=1e-3)
        monkeypatch.setattr(outgrow.growth.engine.execute, "BLOCK_BYTES", 200)
        for step, noisy, plain in zip(steps, whole, silent, strict=True):
            np.testing.assert_array_equal(Expander(made, step, checkpoint).complete(), noisy)
            expander = Expander(replace(made, noise=0.0), step, reader := Recording())
            assert expander.matrix == (3 * step.shape[1], step.shape[2])
            assert max(stop - start for start, stop in expander.blocks()) * step.shape[2] * 2 <= 200
            np.testing.assert_array_equal(expander.complete(), plain)
            assert 0 < reader.largest <= 200


def test_new_tokens_are_the_mean_of_the_old_also_where_columns_come_from_the_next_layer(
    tmp_path: Path, phi_folder: Path
) -> None:
    out = grow(
        phi_folder, tmp_path / "out", target=BIGGER | {"vocab_size": 101}, operator="bert2bert_aki"
    ).folder
    with Checkpoint(out) as grown:
        embedding = to_float(grown.read("model.embed_tokens.weight"), "F64")
    # 10⁻³ of their RMS apart
    np.testing.assert_allclose(embedding[96:], np.broadcast_to(embedding[:96].mean(0), (5, 30)), atol=1.5e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_noise_has_the_strength_that_was_asked_for(
    tmp_path: Path, checkpoint_maker: Any, phi_config: dict[str, Any], dtype: str
) -> None:
    """fc1 is tall enough for its root mean square to be taken from some of its rows, which is where strength
    is measured against."""
    source = checkpoint_maker(tmp_path / "source", phi_config | {"intermediate_size": 2048}, dtype)
    stored = load_file(source / "model.safetensors")
    stored["model.layers.0.mlp.fc1.weight"] *= torch.linspace(0, 2, 2048, dtype=getattr(torch, dtype))[
        :, None
    ]
    save_file(stored, source / "model.safetensors")
    double = {"hidden_size": 48, "num_attention_heads": 6}
    for name, noise in (("plain", 0.0), ("noisy", 0.5)):
        grow(source, tmp_path / name, target=double, noise=noise, receipt=False)
    code = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype]
    with (
        Checkpoint(source) as old,
        Checkpoint(tmp_path / "plain") as plain,
        Checkpoint(tmp_path / "noisy") as noisy,
    ):
        name = "model.layers.0.mlp.fc1.weight"
        weights, before, after = (
            to_float(file.read(name), code).astype(np.float64) for file in (old, plain, noisy)
        )
    added = after - before
    # half of it, as the weights of a reader of two copies are halved
    strength = 0.5 * np.sqrt(np.square(weights).mean()) / 2
    np.testing.assert_allclose(added[:, :24].std(), strength, rtol=0.05)
    assert abs(added[:, :24].mean()) < 0.02 * strength
    resolution = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[dtype]
    np.testing.assert_allclose(
        after[:, :24] + after[:, 24:], weights, atol=2 * resolution * np.abs(after).max()
    )
