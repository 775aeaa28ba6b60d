"""The table of model types: every cell a measured value or a named refusal, and a stopped survey goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from outgrow.model.base.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
UNDER = {"versions": {"transformers": "5", "torch": "2"}, "device": "cpu", "precision": "fp32"}
ASKED: dict[str, Any] = {
    "attention": {"sdpa": "ValueError: no SDPA", "eager": True},
    "said": {},
    "head": 0.0,
    "future": 0.0,
    "leak": 1.2,
    "masked_leak": 1.1,
    "shift": 0.0,
    "unreached": ["model.vision.*.weight"],
    "sometimes": [],
    "flops": {"source": "PyTorch's counter", "apart": 0.0},
    "dry run": {"refused": "RuntimeError: a | pipe"},
    "trained": [5.7, 5.0],
}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location(
            "survey_architectures", ROOT / "benchmarks" / "survey_architectures.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "survey_architectures", module)
        spec.loader.exec_module(module)
        return module


def test_a_row_has_a_value_or_a_refusal_in_each_cell(bench: ModuleType) -> None:
    grown = {"axes": {"hidden width": {"confirmed": "any ratio"}, "depth": {"refused": "no"}}}
    assert bench.row("gpt_oss", ASKED, grown, 1e-4) == (
        "| gpt_oss | any ratio | no | no | 5.70 → 5.00 | fused | leaks 1.1 | 1 | eager | counter | no: "
        "RuntimeError: a   pipe |"
    )
    bidirectional = {
        **ASKED,
        "future": 0.5,
        "head": {"refused": "AttributeError"},
        "said": {"is_decoder": True},
    }
    assert "| 5.70 → 5.00 (is_decoder) | no: AttributeError | sees later tokens: 0.5 |" in bench.row(
        "bert", bidirectional, {}, 1e-4
    )
    assert (
        bench.row("blt", {"refused": "no hidden size"}, {}, 1e-4)
        == "| blt | no | no | no | no: no hidden size | | | | | | |"
    )


@pytest.mark.parametrize(
    ("leak", "masked", "shift", "words"),
    [
        (0.0, {"refused": "positions that restart are enough"}, {"refused": "as above"}, "holds"),
        (0.9, 1e-7, 1e-7, "holds by masks"),
        (0.9, 1e-7, 0.3, "holds by masks, positions go on"),
        (0.9, 0.8, 0.0, "leaks 0.8"),
        (0.9, {"refused": "flash-attn takes no masks"}, 0.0, "leaks 0.9"),
        ({"refused": "TypeError"}, {"refused": "TypeError"}, {"refused": "TypeError"}, "no: TypeError"),
    ],
)
def test_documents_are_kept_apart_by_positions_or_by_masks(
    bench: ModuleType, leak: Any, masked: Any, shift: Any, words: str
) -> None:
    story = {**ASKED, "leak": leak, "masked_leak": masked, "shift": shift}
    assert bench.document_mask(story, 1e-4) == words


@pytest.mark.parametrize(
    ("source", "apart", "words"),
    [
        ("PyTorch's counter", 0.0, "counter"),
        ("formula over the family's schema", 0.0, "formula, exact"),
        ("formula over the family's schema", 0.25, "formula, 2e-01 apart"),
        ("formula over the class's parameters: nothing was counted", None, "formula alone"),
    ],
)
def test_flops_are_told_with_their_source(
    bench: ModuleType, source: str, apart: float | None, words: str
) -> None:
    assert bench.flops_from({"source": source, "apart": apart}) == words


def test_all_rows_are_as_wide_as_their_head(bench: ModuleType) -> None:
    text = bench.table(UNDER, {"gpt_oss": ASKED, "blt": {"refused": "no"}})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({line.count("|") for line in rows}) == 1


def test_the_counts_are_of_all_types(bench: ModuleType) -> None:
    text = bench.table(UNDER, {"gpt_oss": ASKED, "blt": {"refused": "no"}})
    assert text.startswith(
        "Of 2 model types (transformers 5, torch 2; cpu, fp32):\n\n* built as a tiny twin: 1 of 2\n* "
        "trained for two"
    )
    counts = dict(line[2:].split(": ") for line in text.splitlines() if line.startswith("* "))
    assert {what: int(count.removesuffix(" of 2")) for what, count in counts.items()} == {
        "built as a tiny twin": 1,
        "trained for two steps": 1,
        "fused loss": 1,
        "document mask holds": 0,
        "document mask holds by masks handed over": 0,
        "text reaches all parameters": 0,
        "SDPA": 0,
        "FLOPs counted, or a formula that is exact": 1,
        "dry run": 0,
    }


def test_the_page_and_the_file_say_the_same_of_every_class_of_the_library(bench: ModuleType) -> None:
    """The table is written by the script alone; each cell of it is measured or a refusal with its reason."""
    found = json.loads(bench.RESULTS.read_text())
    assert bench.table(found["under"], found["types"]) in bench.PAGE.read_text()
    names = {"attention", "said", "head", "future", "leak", "unreached", "sometimes", *bench.COLUMNS}
    assert all(story.get("refused") or names <= story.keys() for story in found["types"].values())
    if found["under"]["versions"]["transformers"] == transformers.__version__:
        assert found["types"].keys() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_what_was_found_under_other_conditions_is_not_taken_over(bench: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "survey.json"
    bench.save(file, UNDER, {"phi": ASKED})
    assert bench.saved(file, UNDER) == {"phi": ASKED}
    assert bench.saved(file, {**UNDER, "device": "cuda"}) == {}
    assert bench.saved(tmp_path / "none.json", UNDER) == {}


def test_the_section_is_put_between_its_markers(bench: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "families.md"
    page.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    bench.write_page(page, "| new |")
    assert page.read_text() == f"before\n{bench.BEGIN}\n\n| new |\n\n{bench.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(UserError, match="has no"):
        bench.write_page(page, "| new |")


def test_the_page_has_a_place_for_the_table(bench: ModuleType) -> None:
    text = bench.PAGE.read_text()
    assert text.index(bench.BEGIN) < text.index(bench.END)


@pytest.mark.slow
def test_one_class_is_asked_everything(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    story = bench.examine("gpt_neo", ["trained"], "cpu", "fp32", bench.write_text(tmp_path))
    assert story["attention"]["eager"] is True
    assert "does not support" in story["attention"]["sdpa"]
    assert (story["head"], story["future"], story["leak"], story["unreached"]) == (0.0, 0.0, 0.0, [])
    assert len(story["trained"]) == 2
    assert bench.examine("musicgen", [], "cpu", "fp32", tmp_path)["refused"].startswith(
        "its config has no hidden size"
    )
