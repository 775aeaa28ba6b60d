"""The benchmarks' own arithmetic, and that what they set side by side does the same work. No time is
asserted: machines differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.scripts import FOLDER, script
from outgrow.model.build import build_model
from outgrow.model.geometry import flops_per_token
from outgrow.model.presets import preset
from outgrow.train.machine.forecast import GIB


@pytest.mark.slow
def test_the_loop_and_the_bare_loop_end_at_the_same_loss(tmp_path: Path) -> None:
    bench = script("bench_train")
    work = bench.work_of(tmp_path, 4)
    ours, bare = bench.ours(work, tmp_path / "run"), bench.bare(work, tmp_path)
    assert ours.loss == pytest.approx(bare.loss, rel=1e-6)
    assert min(ours.wall, ours.cpu, bare.wall, bare.cpu) > 0
    drawn = bench.nanogpt(work, tmp_path / "drawn")  # other windows of the same text
    assert ours.loss != drawn.loss == pytest.approx(ours.loss, rel=1e-2)


def test_a_ratio_says_how_many_times_as_fast_we_are() -> None:
    bench = script("bench_train")
    mine, other = (
        [bench.Timed(wall, wall, 0.0) for wall in walls] for walls in ((2.0, 2.0, 2.0), (4.0, 1.0, 3.0))
    )
    assert bench.ratio(mine, other, "wall") == 1.5


def test_the_published_result_holds_what_is_claimed() -> None:
    result = json.loads((FOLDER / "bench_train.json").read_text())
    assert result["ours_over"]["bare"]["cpu"] >= 0.97
    assert min(result["ours_over"][name]["cpu"] for name in ("nanoGPT's loop", "Trainer")) > 1
    assert result["flops_per_second"] < result["matrix_flops"]
    assert result["loading_over_training"] >= 100
    page = (FOLDER.parent / "docs" / "evidence.md").read_text()
    assert all(
        line in page for line in script("bench_train").table(result).splitlines() if line.startswith("| ")
    )


def test_a_small_networks_step_is_told_as_it_was_measured() -> None:
    bench = script("bench_step")
    result = json.loads((FOLDER / "bench_step.json").read_text())
    assert bench.table(result) in (FOLDER.parent / "docs" / "evidence.md").read_text()
    losses = {name: row["losses"] for name, row in result["contenders"].items()}
    for name, own in losses.items():
        first = losses[f"{name.split(',')[0]}, ours"]
        assert own[0] == pytest.approx(first[0], rel=1e-6)  # the same network and tokens
        assert own == pytest.approx(first, rel=1e-5)  # and the same training, but for Muon's bfloat16
    wide, narrow, products = (taken["backward"] for taken in result["attention"].values())
    assert products < wide < narrow / 4  # what the page and train/machine/attention.py say of the kernel


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # attention has no rule for batches of seeds
def test_two_seeds_as_one_network_have_the_gradients_of_each() -> None:
    pair = script("bench_step").TwoSeeds(32)
    windows = torch.randint(320, (2, 2, 9))
    both = pair.as_one(windows)
    for number, own in enumerate(pair.in_turn(windows)):
        for name, gradient in own.items():
            torch.testing.assert_close(both[name][number], gradient, rtol=1e-4, atol=1e-7)


def test_runs_side_by_side_are_told_as_they_were_measured() -> None:
    bench = script("bench_pairs")
    result = json.loads((FOLDER / "bench_pairs.json").read_text())
    assert bench.table(result) in (FOLDER.parent / "docs" / "evidence.md").read_text()
    for forms in result["widths"].values():
        library, *ours, mixed = (forms[form]["losses"] for form in bench.FORMS if form != bench.PRODUCTS)
        for losses in ours:  # the same training, but for Muon's bfloat16 in the library
            assert losses == pytest.approx(library, rel=1e-4)
        assert mixed == pytest.approx(library, rel=1e-3)
        # what the page says: a compiled step runs at four fifths of the bound in float32 or more, and in
        # bfloat16 past it, at twice the library's rate
        rates = {form: forms[form]["tokens_per_second"] for form in bench.FORMS}

        def times(form: str, base: str, rates: dict[str, list[float]] = rates) -> float:
            return median(own / other for own, other in zip(rates[form], rates[base], strict=True))

        assert times(bench.COMPILED, bench.PRODUCTS) > 0.8
        assert times(bench.MIXED, bench.PRODUCTS) > 1
        assert times(bench.MIXED, "library") > 2


def test_the_products_alone_are_those_of_a_step() -> None:
    bench = script("bench_pairs")
    with FlopCounterMode(display=False) as counter:
        bench.contender(bench.PRODUCTS, 32).step(torch.zeros(bench.WINDOWS, bench.CONTEXT + 1))
    network = build_model(bench.phi(32), seed=0)
    matrices = [own.weight.numel() for own in network.modules() if isinstance(own, torch.nn.Linear)]
    tokens = bench.WINDOWS * bench.CONTEXT
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 6 * sum(matrices) * tokens


def test_near_duplicates_are_told_as_they_were_measured() -> None:
    bench = script("bench_duplicates")
    result = json.loads((FOLDER / "bench_duplicates.json").read_text())
    page = (FOLDER.parent / "docs" / "data.md").read_text()
    assert bench.table(result) in page
    assert f"bench_duplicates.py --documents {result['documents']}`" in page
    told = result["seconds_until_a_killed_worker_is_told"]
    assert told["datatrove"] is None
    assert f"told {told['ours']} s later" in page
    assert f"not ended after {bench.PATIENCE_SECONDS} s" in page
    for rows in result["scripts"].values():
        ours, *others = rows.values()
        assert all(ours["precision"] > other["precision"] + 0.3 for other in others)


@pytest.mark.slow
def test_a_gpu_gets_what_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("bench_gpu")
    monkeypatch.setattr(bench, "LAYERS", (4, 1))  # 9.2 and 5.4 GB of weights, gradients and moments
    assert bench.shape(8 * GIB, 2048, toy=False)["num_hidden_layers"] == 1
    config = bench.shape(16 * GIB, 2048, toy=False)
    assert config["num_hidden_layers"] == 4
    lean, lavish = (
        bench.Way("sdpa", compile=False, checkpointing=c, loss=loss)
        for c, loss in ((True, "fused"), (False, "plain"))
    )
    assert bench.fitting(config, lean, 2048, 16 * GIB) > bench.fitting(config, lavish, 2048, 16 * GIB) >= 1
    assert bench.fitting(config, lean, 2048, 8 * GIB) == 0


@pytest.mark.slow
def test_utilisation_is_model_flops_over_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("bench_gpu")
    monkeypatch.setattr(bench, "peak_flops", lambda *_: 1e12)
    config = preset("tiny_target")
    found = bench.measure(config, bench.Way("sdpa", compile=False, checkpointing=True, loss="fused"), 2, 32)
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops_per_token(config, 32) / 1e12)
    assert len(found["seconds"]) == bench.WARM + bench.COUNTED
    assert 6 < found["last_loss"] < 8.5


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_toy_size_and_says_what_it_could_not_run(tmp_path: Path) -> None:
    choices = [
        "--attention",
        "sdpa",
        "flash_attention_2",
        "--compile",
        "false",
        "--checkpointing",
        "true",
        "--loss",
        "fused",
    ]
    command = [
        sys.executable,
        str(FOLDER / "bench_gpu.py"),
        "--toy",
        *choices,
        "--out",
        str(tmp_path / "result.json"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=FOLDER.parent, env=environment()
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    (row,) = result["ways"]
    assert (row["attention"], row["checkpointing"], row["loss"], row["rows"]) == ("sdpa", True, "fused", 2)
    assert row["tokens_per_second"] > 0
    assert "flash_attention_2: no CUDA GPU" in result["not_run"][0]
    assert "| sdpa | False | True | fused | 2 |" in done.stdout


def test_without_a_gpu_the_gpu_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("bench_gpu")
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA GPU here; --toy runs the same"):
        bench.main()


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}


def row(task: str, who: str, documents: int, cpu: float) -> dict[str, object]:
    names = {"task": task, "processes": 1, "who": who, "documents": documents}
    return names | {
        "seconds": cpu,
        "cpu_seconds": cpu,
        "megabytes_per_second": 10 / cpu,
        "peak_megabytes": 1000,
    }


def test_the_pages_of_data_hold_the_tables_of_the_measurements() -> None:
    bench = script("bench_data")
    measured = json.loads(bench.RECORD.read_text()) if bench.RECORD.is_file() else None
    killed = bench.killed_worker()
    assert (
        bench.MARKS[0] + bench.steps_table(measured, killed) + bench.MARKS[1] in bench.STEPS_PAGE.read_text()
    )
    page = bench.PAGE.read_text()
    assert bench.MARKS[0] + (bench.table(measured) if measured else "It has not been run") in page


def test_each_step_of_data_is_told_with_both_rates() -> None:
    bench = script("bench_data")
    names = [(task, who) for task in bench.TASKS for who in ("prepare", "datatrove")]
    rows = [row(task, who, 40 + number, number + 1.0) for number, (task, who) in enumerate(names)]
    facts = {"bytes": 10**7, "vocab_size": 1000, "rounds": 1, "machine": "a machine", "load_average": [0.5]}
    lines = bench.steps_table({**facts, "rows": rows}, {"ours": 1, "patience": 2}).splitlines()
    (reading,) = [line for line in lines if line.startswith("| reading |")]
    told = "10.0 MB a second of CPU, 40 documents stay; 5.0 MB a second of CPU, 41 documents stay |"
    assert reading.endswith(told)
    assert "not measured" not in "".join(lines)
    table = bench.table({**facts, "rows": rows})
    assert "| read | 1 | prepare | 40 | 10.00 | 10.00 | 1,000 |" in table
