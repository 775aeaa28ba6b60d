"""Every study of horizons runs through to its table, at toy size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from helpers.toy_study import toy_study
from outgrow.experiments import study as study_module
from outgrow.experiments.__main__ import main
from outgrow.experiments.ends import read_ends
from outgrow.experiments.study_file import load_study

FITTED = ["growth.tokens=512", "growth.window=64"]
LEARNED = ["growth.steps=2", "growth.batch_tokens=128", "growth.window=64"]
STUDIES: dict[str, Mapping[str, Sequence[str]]] = {  # name: what arms need to be small
    "operators": {"least_squares": FITTED, "ligo": LEARNED, "lesa": ["growth.epochs=1"]},
    "operators_experts": {},
    "from_a_trained_source": {},
    "family": {},
    "family_in_depth": {},
    "width_or_depth": {},
    "gpu_hour": {},
    "one_million": {},
    "sign_change": {},
    "thirty_thousand": {},
    "four_times": {},
    "in_bfloat16": {},
}
LARGE = ["hidden_size=24", "intermediate_size=48", "num_attention_heads=3", "num_key_value_heads=3"]
TOY = [*(f"target.{size}" for size in LARGE), "train.compile=false"]
SIZES = {"gpu_hour": TOY, "one_million": TOY, "in_bfloat16": ["train.compile=false"]}
# each source's kind, and each way to go on from one; its operators are those of `operators`
OF_SOURCES = ["scratch", "source", "null_control", "lossless", "small60_source", "small60_hyperclone"]
OF_SOURCES += ["phi20_lossless", "stable20_lossless", "lossless_short", "stable60_lossless_none"]
ARMS = {"from_a_trained_source": OF_SOURCES}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_through_to_its_table(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_module, "cores", lambda: 1)  # one thread: two would wait for each other
    toy_study(name, tmp_path, STUDIES[name], SIZES.get(name, ()), ARMS.get(name, ()))
    assert main(["study", name, "--jobs", "1"]) == 0, capsys.readouterr().err
    study = load_study(name)
    out = tmp_path / "runs" / f"comparison-{name}"
    ends = read_ends(out / "ends.json")
    arms = ARMS.get(name, study.demo.arms)
    assert {end.arm for end in ends} == {study.counts_as(arm) for arm in arms}
    table = (out / "table.md").read_text()
    if study.family:
        assert "| middle | 0 |" in table
        return
    assert all(f"\n| {study.counts_as(arm)} | " in table for arm in arms)
