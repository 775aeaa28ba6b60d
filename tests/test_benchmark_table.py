"""The tables of docs/evidence.md and docs/grow.md are those that code makes of the measurements."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.scripts import script

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("bench_growth", ROOT / "benchmarks" / "bench_growth.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_growth", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_table_of_the_measurements(bench: ModuleType) -> None:
    _, rest = bench.PAGE.read_text().split(bench.MARKS[0])
    held, _ = rest.split(bench.MARKS[1])
    assert held == bench.table(json.loads((ROOT / "benchmarks" / "bench_growth.json").read_text()))


@pytest.mark.slow
def test_the_page_of_a_real_model_holds_the_tables_of_its_records() -> None:
    real = script("real_model")
    page = real.PAGE.read_text()
    for marks, table, record in (
        (real.MARKS, real.table, real.RECORD),
        (real.STEPS_MARKS, real.steps_table, real.STEPS_RECORD),
        (real.ITEMS_MARKS, real.items_table, real.ITEMS_RECORD),
    ):
        assert marks[0] + table(json.loads(record.read_text())) + marks[1] in page
    doors = [command.split()[1] for command in real.commands()]
    assert doors == ["grow", "evaluate", "train", "evaluate", "cost", "evaluate"]


def test_medians_and_ratios_are_those_of_the_rounds(bench: ModuleType) -> None:
    def round_of(growth: float, copy: float) -> dict[str, object]:
        seconds = {
            "growth": growth,
            "cp of its result": copy,
            "dd of as many bytes": 4.0,
            "growth of a quarter": growth / 4,
            "start-up": 0.0,
        }
        return {name: bench.Timed(taken, 2 * taken, int(1e6 * taken)) for name, taken in seconds.items()}

    sizes = {"source": 10, "growth": 4_000_000_000, "growth of a quarter": 1_000_000_000}
    rounds = [round_of(1.0, 2.0), round_of(8.0, 2.0), round_of(3.0, 3.0)]
    ratios = bench.growth_ratios(rounds, sizes)
    result = {"load_before": 3.2, "ratios": ratios} | bench.summary(rounds, sizes, 24)
    assert result["seconds"]["growth"] == 3.0
    assert result["peak_bytes"]["growth"] == 8_000_000
    assert result["ratios"]["growth / cp"] == 1.0  # of 0.5, 4 and 1
    assert result["ratios"]["mergekit / growth in depth alone"] is None
    assert result["ratios"]["seconds per byte without start-up, whole / quarter"] == 1.0
    assert "| growth | 4.00 GB | 3.0 | 1.0 to 8.0 | 6.0 | 8 MB |" in bench.table(result)
    assert "growth / cp 1.00" in bench.table(result)
    assert "load average of other work before: 3" in bench.table(result)
    assert "load" not in bench.table(result | {"load_before": 0.2})


def test_experts_were_streamed(bench: ModuleType) -> None:
    record = json.loads((ROOT / "benchmarks" / "bench_growth.json").read_text())[bench.EXPERTS]
    assert record["layers"] == 24
    assert record["peak_bytes"]["upcycling"] < 150e6 < record["peak_bytes"]["mergekit-moe"]
    assert (
        record["peak_bytes"]["a quarter by hand: load, copy, save"] > record["bytes"]["upcycling a quarter"]
    )


def test_a_part_that_is_measured_alone_leaves_the_other_as_it_was(bench: ModuleType) -> None:
    kept = {"machine": "one", "seconds": {"growth": 3.0}}
    mixture = {"machine": "two"}
    both = bench.joined(kept, {"experts": mixture})
    assert both == kept | {"experts": mixture}
    again = {"machine": "three"}
    assert bench.joined(both, {"growth": again}) == again | {"experts": mixture}
    assert bench.joined(both, {"experts": again}) == kept | {"experts": again}


def test_the_passthrough_recipe_names_every_layer_in_order(bench: ModuleType, tmp_path: Path) -> None:
    recipe = bench.merges.passthrough(tmp_path, tmp_path / "source", [0, 1, 2, 3, 2, 3, 3]).read_text()
    ranges = [line.split(":")[1].strip() for line in recipe.splitlines() if "layer_range" in line]
    assert ranges == ["[0, 4]", "[2, 4]", "[3, 4]"]
    assert str((tmp_path / "source").resolve()) in recipe
