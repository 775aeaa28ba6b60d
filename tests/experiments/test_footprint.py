"""`outgrow cost`: hours from a ledger, a token's time, what is refused, and the table beside published rows."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from helpers.models import TINY, make_checkpoint
from helpers.runs import SOURCE, fabricate
from outgrow.experiments.footprint.__main__ import main
from outgrow.experiments.footprint.footprint import Footprint, footprints, settings_from, training_of
from outgrow.experiments.footprint.speed import milliseconds_per_token
from outgrow.experiments.footprint.table import markdown, published
from outgrow.model.base.errors import UserError
from outgrow.train.run.export import ledger
from outgrow.train.run.record import RunRecord, Summary

CONFIG = {"model_type": "phi", **TINY}
FORECAST = ["measure=false", "devices=[L4]"]
L4 = 121e12  # FLOP/s


def finished(tmp: Path, **changes: Any) -> Path:
    """A run of 200 tokens at 10 FLOPs each in 60 s, with its final checkpoint and ledger."""
    run = fabricate(tmp, "lossless", [4.0, 3.5, 3.0], source=SOURCE, processes=2, **changes)
    final = run / "final"
    final.mkdir()
    (final / "config.json").write_text(json.dumps(CONFIG))
    record, summary = RunRecord.read(run / "run.json", ""), Summary.read(run / "summary.json", "")
    (final / "ledger.json").write_text(json.dumps(ledger(record, summary)))
    return run


def test_hours_are_measured_on_the_runs_device_and_forecast_on_others(tmp_path: Path) -> None:
    measured, forecast = footprints([str(finished(tmp_path))], settings_from([*FORECAST, "mfu=0.25"]))
    assert (measured.kind, measured.device) == ("measured", "a <test> machine")
    assert measured.gpu_hours == 60 * 2 / 3600
    assert measured.gpu_hours_in_all is measured.micro_batch is measured.ms_per_token is None
    assert (forecast.kind, forecast.device, forecast.tokens) == ("forecast", "L4", 200)
    assert forecast.gpu_hours == pytest.approx(200 * 10 / (L4 * 0.25) / 3600, rel=1e-12)
    assert forecast.gpu_hours_in_all == pytest.approx((2000 + 1500) / (L4 * 0.25) / 3600, rel=1e-12)
    assert forecast.context == 64  # the model has no more
    assert forecast.memory_gb == measured.memory_gb > 0.3
    assert forecast.ms_per_token
    assert forecast.micro_batch is None  # its memory is not known


def test_a_checkpoint_without_a_ledger_has_no_training(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (row,) = footprints([str(tmp_path)], settings_from(FORECAST))
    assert row.gpu_hours is row.tokens is row.data_tokens is None
    assert row.ms_per_token


def test_a_checkpoint_with_a_ledger_has_its_tokens(tmp_path: Path) -> None:
    (row,) = footprints([str(finished(tmp_path) / "final")], settings_from(FORECAST))
    assert row.tokens == 200
    assert row.gpu_hours


@pytest.mark.slow
def test_the_size_of_the_data_is_read_where_the_run_says_it_lies(tmp_path: Path) -> None:
    from outgrow.train.compose import compose

    data = tmp_path / "tokens"
    given = compose(
        ["growth=scratch", "target=tiny_target", "data=files", "data.path=x", f"data.folder={data}"]
    )
    run = finished(tmp_path, settings=json.loads(json.dumps(asdict(given))))
    assert training_of(run).data_tokens is None
    _prepared(data)
    assert training_of(run).data_tokens == 1000


def _prepared(folder: Path) -> None:
    """The manifest of a text of 1,000 training tokens."""
    from outgrow.train.data.shards import fingerprint, write_manifest

    folder.mkdir()
    splits = {"train": {"tokens": 1000}, "validation": {"tokens": 10}}
    manifest: dict[str, Any] = {"tokenizer": "t", "dtype": "uint16", "splits": splits}
    write_manifest(folder, manifest | {"fingerprint": fingerprint(manifest)})


def test_a_token_is_timed_on_the_network_at_hand(tmp_path: Path) -> None:
    from outgrow.model.build import build_model

    network: Any = build_model(CONFIG, seed=0).eval()
    calls: list[int] = []
    forward = network.forward
    network.forward = lambda *given, **more: calls.append(1) or forward(*given, **more)
    assert 0 < milliseconds_per_token(network, 12) < 1000
    assert len(calls) == 6  # the prompt's six tokens at once, and five more


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = make_checkpoint(tmp_path / "mine", CONFIG, "float32"), tmp_path / "out"
    assert main([str(folder), f"out={out}", "devices=[H100,'RTX 4090']"]) == 0
    said = capsys.readouterr().out
    assert (out / "cost.md").read_text() in said
    assert "| phi-1.5 | 1.3B | A100-80GB | 1.5K | – | < 3 | 3.5 | 2,048 | 30B | 150B |" in said
    rows = json.loads((out / "cost.json").read_text())["rows"]
    assert [row["device"] for row in rows][1:] == ["H100", "RTX 4090"]
    assert rows[0]["ms_per_token"] > 0
    assert rows[1]["micro_batch"] > rows[2]["micro_batch"] > 1  # 80 GiB and 24 GiB
    with (out / "cost.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["ms_per_token"] for row in table] == [str(row["ms_per_token"]) for row in rows]


def test_forecasts_and_bounds_are_marked() -> None:
    row = Footprint("m", "H100", "forecast", 10**9, 2048, 1234.4, 2000.0, 4, 0.5, 3.54, 10**9, 10**10)
    told = markdown([row], settings_from(FORECAST))
    cells = "| H100 (forecast) | ≈ 1,234 (2,000 with its source) | ≈ 4 | ≥ 0.5 | ≈ 3.54 | 2,048 | 1.00 G | 10.0 G |"
    assert cells in told


def test_published_rows_name_their_source() -> None:
    assert [row.name for row in published()] == ["Llama-7B", "phi-1.5", "phi-1.5-web"]
    assert all(row.source.startswith("arXiv ") and row.note for row in published())


def test_hours_that_are_printed_twice_are_told_with_the_utilisation_that_each_supposes() -> None:
    told = markdown([], settings_from(FORECAST))
    # 6 FLOPs for each of 1.31 G parameters that multiply, and causal attention, by hand
    flops = 150e9 * (6 * 1_312_817_152 + 6 * 24 * 2048 * 2049)
    shares = [flops / (312e12 * 3600 * hours) for hours in (1500, 6100)]
    first, second = (f"{share:.0%}" for share in shares)
    assert f"150B tokens are {flops:.3g} FLOPs" in told
    assert f"1.5K hours take at {first} of the device's peak and its model card's 6.1K" in told
    assert f"at {second}; at 50%, as the forecasts suppose, it would be 2,265." in told
    page = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text()
    assert f"utilisation of {first}, the second of {second}, and `mfu`'s 50% would be 2,265 hours" in page


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["devices=[H101]"], r"unknown device 'H101'; known: .*H100"),
        (["mfu=50"], "a share of the device's peak"),
        (["context=1"], "at least 2"),
        (["devcies=[H100]"], "did you mean 'devices'"),
    ],
)
def test_wrong_settings_are_told(given: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=said):
        footprints([str(tmp_path)], settings_from(given))


def test_what_has_no_ledger_or_is_no_model_is_refused_with_all_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path)
    (run / "final" / "ledger.json").unlink()
    empty, ended = tmp_path / "empty", fabricate(tmp_path, "scratch", [4.0, 3.0])
    empty.mkdir()
    assert main([str(run), str(empty), str(ended), "devices=[H101]"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 4 faults")
    for fault in ("has no ledger", "neither a run's folder nor a checkpoint", "has not ended", "H101"):
        assert fault in error
    assert main([]) == 2
    assert "give runs or checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"own": {"tokens": "many", "flops": 1}, "flops": 1}'])
def test_what_is_no_ledger_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(UserError, match=r"ledger\.json"):
        training_of(tmp_path)
