"""Deriving: what a tiny model shows, held against the schemas written by hand; and tiny twins of configs."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.families import config_of
from outgrow.model import derive as package
from outgrow.model.base.errors import UserError
from outgrow.model.derive import derive, drafted_family, shapes, variants, whole_config
from outgrow.model.derive.roles import Choices
from outgrow.model.derive.shrink import kept_layers, shrunken
from outgrow.model.family import Config, Family, families, family_of

INTERLEAVED = {"gpt_neox"}


def roles(family: Family, config: Config) -> dict[str, tuple[str, str, float]]:
    """Tensor → what it is and over which axes; one query per key-value head has no group to speak of."""
    return {
        tensor.name: (
            tensor.line.kind,
            " x ".join(map(str, tensor.axes)).replace("(group qk)", "qk"),
            tensor.line.offset,
        )
        for tensor in family.tensors(config)
        if not tensor.tied
    }


@pytest.mark.parametrize("name", sorted(families()))
def test_a_derived_schema_is_the_one_written_by_hand(name: str) -> None:
    config = whole_config(config_of(name) | ({"intermediate_size": None} if name == "opt" else {}))
    by_hand = family_of(config)
    draft = next(
        draft
        for draft in variants(derive(config))
        if (draft.choices.fused == "heads") == (name in INTERLEAVED)
    )
    derived = drafted_family(draft, config, shapes(config))
    assert roles(derived, config) == roles(by_hand, config)
    assert [str(line) for line in derived.lines] == derived.schema.splitlines()
    assert derived.norm == by_hand.norm
    assert derived.ties(config) == by_hand.ties(config)
    assert {space: derived.sizes(config)[space] for space in by_hand.sizes(config)} == by_hand.sizes(config)


def test_the_worked_example_is_what_the_class_shows() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    config = whole_config({"model_type": "starcoder2", **sizes, "intermediate_size": 24, "vocab_size": 61})
    draft = derive(config)
    probes = draft.axes
    table = [line.split("  ") for line in str(package.__doc__).splitlines()]
    rows = [[cell.strip() for cell in cells if cell.strip()] for cells in table]
    shown = {row[0]: row[1:] for row in rows if row and row[0].endswith(".weight")}
    assert len(shown) == 7
    assert probes.keys.ffn is not None
    assert probes.by_queries is not None
    assert probes.by_kv is not None
    moved = (probes.by_hidden, probes.by_queries, probes.by_kv, probes.by_key[probes.keys.ffn])
    for ending, cells in shown.items():
        name = next(name for name in draft.tensors if name.endswith(f".{ending}"))
        seen = draft.tensors[name]
        axes = zip(seen.shape, seen.reads, strict=True)
        twin = ", ".join(f"[{length}]" if reads else str(length) for length, reads in axes)
        shapes_moved = [", ".join(map(str, shapes[name])) for shapes in moved]
        assert cells == [twin, *shapes_moved, ", ".join(map(str, draft.templates(name)))]
    schema = drafted_family(draft, config, shapes(config)).schema.splitlines()
    lines = [line.strip() for line in str(package.__doc__).splitlines() if line.startswith("    model.")]
    assert len(lines) == 7
    assert set(lines) <= set(schema)


def test_choices_are_tried_in_their_written_order() -> None:
    order = list(Choices.in_order())
    assert order[:3] == [Choices(), Choices(fused="heads"), Choices(gates="units")]
    assert len(set(order)) == len(order) == 2**6


def test_experts_and_what_stands_behind_fused_tensors() -> None:
    small = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "vocab_size": 61,
    }
    config = whole_config(
        {"model_type": "mixtral", **small, "num_key_value_heads": 2, "num_local_experts": 5}
    )
    schema = drafted_family(derive(config), config, shapes(config)).schema.splitlines()
    assert sorted(line for line in schema if "moe" in line) == [
        "model.layers.*.block_sparse_moe.experts.{0..4}.w1  ffn <- residual",
        "model.layers.*.block_sparse_moe.experts.{0..4}.w2  residual <- ffn",
        "model.layers.*.block_sparse_moe.experts.{0..4}.w3  ffn <- residual",
        "model.layers.*.block_sparse_moe.gate  5 <- residual",
    ]


def test_a_tiny_twin_keeps_a_layer_of_each_kind() -> None:
    config: dict[str, Any] = {
        "num_hidden_layers": 6, "hidden_size": 4096, "embed_size": 4096, "vocab_size": 32000, "eos_token_id": 31999,
        "layer_types": ["full", "linear", "linear", "full", "linear", "linear"], "mlp_only_layers": [3, 4], "hidden_act": "silu",
    }  # fmt: skip
    kept = kept_layers(config, 6)
    assert kept == (0, 1, 3, 4)
    assert shrunken(config, "num_hidden_layers", kept) == {
        "num_hidden_layers": 4, "hidden_size": 64, "embed_size": 64, "vocab_size": 101, "eos_token_id": 100,
        "layer_types": ["full", "linear", "full", "linear"], "mlp_only_layers": [2, 3], "hidden_act": "silu",
    }  # fmt: skip


def test_a_tiny_twin_is_as_deep_as_the_rhythm_of_its_layers() -> None:
    assert kept_layers(
        {"attn_layer_period": 5, "attn_layer_offset": 4, "expert_layer_period": 2}, 32
    ) == tuple(range(5))
    assert kept_layers(
        {"full_attention_interval": 4, "layer_types": ["linear", "linear", "linear", "full"] * 2}, 8
    ) == (0, 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mine"}, "transformers has no causal language model of that type"),
        ({"model_type": "bert", "hidden_size": "wide"}, "refuses it for model_type 'bert'"),
        ({"model_type": "blt"}, "its config has no hidden size"),
        ({"model_type": "inkling2_text"}, "does not run on token ids alone in float64"),
        # it wants numbers of experts
        ({"model_type": "dots1"}, r"does not build from this config \(TypeError: empty\(\)"),
    ],
)
def test_what_cannot_be_derived_is_told(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        derive(config)
