"""The schema notation: what parses, what it means, and what is refused."""

from __future__ import annotations

import pytest

from outgrow.model.family import families
from outgrow.model.notation import Parts, Product, Space, parse_axis, parse_line, parse_schema, size

SIZES = {"kv": 3, "group": 2, "qk": 5, "v": 7, "residual": 11, "ffn": 13}


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("residual", 11),
        ("(kv group qk)", 30),
        ("[ffn | ffn]", 26),
        ("(kv [qk | qk* | v])", 51),
        ("[(kv group qk) | (kv qk*) | (kv v)]", 66),
    ],
)
def test_an_axis_prints_as_it_was_written_and_has_the_length_of_its_spaces(text: str, length: int) -> None:
    axis = parse_axis(text)
    assert str(axis) == text
    assert size(axis, SIZES) == length


@pytest.mark.parametrize("name", sorted(families()))
def test_every_line_of_a_schema_prints_itself(name: str) -> None:
    family = families()[name]
    written = [" ".join(line.split()) for line in family.schema.splitlines() if line.strip()]
    assert [" ".join(str(line).split()) for line in family.lines] == written
    assert [parse_line(str(line)) for line in family.lines] == list(family.lines)


@pytest.mark.parametrize(
    "text",
    [
        "a.*.b  ffn <- residual + bias[use_bias] scaled^-1 tied to c.weight if tie unless mute in layers 0,2",
        "a  vocab -> residual scaled",
        "a.norm  post norm+1 residual + bias if parallel",
        "a.{0..7}.w  [(kv group ?) | (kv ?)] <- 1408",
        "a.*.conv.weight  tensor (2 ffn*), 1, 4 in layers 1",
        "a.scale  tensor scalar",
    ],
)
def test_all_marks_of_a_line_are_printed(text: str) -> None:
    assert str(parse_line(text)) == text


def test_axes_parse_into_a_tree() -> None:
    assert parse_axis("(kv [qk* | v])") == Product((Space("kv"), Parts((Space("qk", dual=True), Space("v")))))


def test_the_arrow_gives_direction_and_storage_order() -> None:
    stored_out_in = parse_line("mlp.fc1  ffn <- residual + bias")
    stored_in_out = parse_line("mlp.c_fc  residual -> ffn")
    assert (
        (stored_out_in.out, stored_out_in.into)
        == (stored_in_out.out, stored_in_out.into)
        == (Space("ffn"), Space("residual"))
    )
    assert (stored_out_in.transposed, stored_in_out.transposed) == (False, True)
    assert (stored_out_in.bias, stored_in_out.bias) == (True, False)


def test_marks_of_a_line() -> None:
    line = parse_line(
        "lm_head  vocab <- residual + bias tied to wte.weight if tie_word_embeddings unless headless"
    )
    assert (line.bias, line.tied_to, line.tied_if, line.condition) == (
        True,
        "wte.weight",
        "tie_word_embeddings",
        "!headless",
    )
    assert parse_line("ln_f  final norm+1 residual").kind == "final norm"
    assert parse_line("ln_f  final norm+1 residual").offset == 1.0
    assert parse_line("embed  vocab -> residual scaled").scaled
    assert parse_line("embed  vocab -> residual").kind == "embedding"


@pytest.mark.parametrize(
    "text",
    ["fc1 ffn residual", "fc1 ffn <- (residual", "fc1 ffn <- [residual ffn]", "fc1 ffn <- ()x)", "fc1"],
)
def test_what_is_no_line_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"schema line|axis|closed|expected"):
        parse_line(text)


def test_a_schema_skips_comments_and_blank_lines() -> None:
    assert [
        line.name for line in parse_schema("# a comment\n\n a ffn <- residual # why\n b residual <- ffn\n")
    ] == ["a", "b"]


def test_numbers_whole_tensors_repeated_names_and_kept_layers() -> None:
    line = parse_line("model.layers.*.experts.{0..2}.w{1..2}  residual <- (2 ffn) in layers 0,3")
    assert line.names == [f"model.layers.*.experts.{i}.w{j}" for i in range(3) for j in (1, 2)]
    assert line.only == (0, 3)
    assert size(line.axes[1], {"ffn": 5}) == 10
    whole = parse_line("experts.down_proj  tensor 4, ffn*, residual")
    assert (whole.kind, whole.into, [str(axis) for axis in whole.axes]) == (
        "tensor",
        None,
        ["4", "ffn*", "residual"],
    )
    assert parse_line("gate  tensor scalar").axes == ()


def test_a_matrix_may_be_multiplied_by_a_power_of_the_hidden_size() -> None:
    powers = [
        parse_line(f"a.router  4 <- residual{text}").scaled
        for text in ("", " scaled", " scaled^-1", " scaled^-0.5")
    ]
    assert powers == [0.0, 0.5, -1.0, -0.5]
