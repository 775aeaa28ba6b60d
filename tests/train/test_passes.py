"""How often a run reads its text: counted in manifests that are there, told as unknown where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from outgrow.model.base.compose import CONF
from outgrow.train.compose import compose
from outgrow.train.corpus.read.corpora import open_corpus
from outgrow.train.data.settings import DataSettings, MixtureSettings, PhaseSettings, SourceSettings
from outgrow.train.data.shards import fingerprint
from outgrow.train.settings import Budget, Settings
from outgrow.train.start.passes import Stock, passes, shares, stock


def prepared(folder: Path, tokens: int) -> DataSettings:
    folder.mkdir()
    manifest = {
        "splits": {"train": {"tokens": tokens, "sha256": ""}},
        "tokenizer": {"sha256": ""},
        "dtype": "<u2",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": fingerprint(manifest)}))
    return DataSettings("files", "files", path="texts", folder=str(folder))


@pytest.fixture
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)  # 768 tokens


def test_passes_are_the_budget_over_the_tokens_that_are_there(settings: Settings, tmp_path: Path) -> None:
    own = replace(settings, data=prepared(tmp_path / "text", 512))
    assert list(passes(own)) == ["files: 100.0% of the run, 768 tokens of 512, 1.50 passes"]
    often = replace(settings, data=prepared(tmp_path / "short", 96))
    (line,) = passes(often)
    assert line.startswith(
        "files: 100.0% of the run, 768 tokens of 96, 8.00 passes; more than 4 passes teach little that is new"
    )


def test_a_text_that_is_not_there_yet_is_known_by_its_limit_alone(settings: Settings, tmp_path: Path) -> None:
    data = replace(settings.data, folder=str(tmp_path / "nothing"))
    assert stock(data) is None
    assert "known once it is prepared" in next(passes(replace(settings, data=data)))
    limited = replace(data, limit_tokens=1000, validation_fraction=0.05)
    assert stock(limited) == Stock(950, exact=False)
    (line,) = passes(replace(settings, data=replace(limited, limit_tokens=100)))
    assert line.startswith(
        "files: 100.0% of the run, 768 tokens of at most 95, at least 8.08 passes; more than 4"
    )


@pytest.mark.parametrize("changed", ["another path", "another file"])
def test_tokens_of_another_text_say_nothing_of_this_one(
    settings: Settings, tmp_path: Path, changed: str
) -> None:
    for name in ("short", "long"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    there = prepared(tmp_path / "tokens", 8)
    path = tmp_path / "tokens" / "manifest.json"
    data = replace(there, path=str(tmp_path / "short"))
    inputs = {"stamp": open_corpus(data).stamp(), "digest": ""}
    manifest = {**json.loads(path.read_text()), "inputs": inputs}
    path.write_text(json.dumps(manifest | {"fingerprint": fingerprint(manifest)}))
    assert stock(data) == Stock(8, exact=True)
    if changed == "another file":
        (tmp_path / "short" / "b.txt").write_text("more")
    else:
        data = replace(data, path=str(tmp_path / "long"))
    assert stock(data) is None
    assert "known once it is prepared" in next(passes(replace(settings, data=data)))


def test_tokens_cut_by_a_sources_tokenizer_are_found_beside_them(settings: Settings, tmp_path: Path) -> None:
    prepared(tmp_path / "text-0123abcd", 64)
    assert stock(replace(settings.data, folder=str(tmp_path / "text"))) == Stock(64, exact=True)


def test_every_source_of_a_mixture_has_its_line(settings: Settings, tmp_path: Path) -> None:
    sources = {
        name: SourceSettings(prepared(tmp_path / name, tokens), 1.5)
        for name, tokens in (("a", 100), ("b", 1000))
    }
    phases = (PhaseSettings(weights={"a": 0.5, "b": 0.5}, tokens=400), PhaseSettings(weights={"b": 1.0}))
    mixture = MixtureSettings("two", sources, phases)
    stocks = {"a": Stock(100, exact=True), "b": None}
    assert shares(mixture, 768, stocks) == {"a": 200.0, "b": 568.0}
    first, second = passes(replace(settings, mixture=mixture))
    assert first.startswith(
        "a: 26.0% of the run, 200 tokens of 100, 2.00 passes; it is too small: max_passes=1.5 refuses the run"
    )
    assert second == "b: 74.0% of the run, 568 tokens of 1,000, 0.57 passes"
    by_passes = replace(mixture, phases=(PhaseSettings(passes={"a": 2.0}), PhaseSettings(weights={"b": 1.0})))
    assert shares(by_passes, 768, stocks) == {"a": 200.0, "b": 568.0}
    assert shares(by_passes, 768, {"a": None, "b": None})["a"] is None
    by_share = replace(
        mixture, phases=(PhaseSettings(weights={"a": 1.0}, share=0.25), PhaseSettings(weights={"b": 1.0}))
    )
    assert shares(by_share, 768, stocks) == {"a": 192.0, "b": 576.0}


PRESETS = sorted(path.stem for path in CONF.glob("mixture/phi_*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_bounds_the_passes_of_every_source_and_fits_any_budget(name: str) -> None:
    command = (
        (CONF / "mixture" / f"{name}.yaml")
        .read_text()
        .split("# outgrow train ")[1]
        .splitlines()[0]
        .split("  ")[0]
        .split()
    )
    for budget in ([], ["train.budget_tokens=1_400_000_000_000"]):
        asked = compose([*command, *budget])
        assert asked.mixture is not None
        assert all(source.max_passes is not None for source in asked.mixture.sources.values())
        tokens = Budget.of(asked.train).steps * Budget.of(asked.train).tokens_per_step
        read = shares(asked.mixture, tokens, {})
        assert sum(part or 0 for part in read.values()) == pytest.approx(tokens)
        assert name != "phi_1" or (read["exercises"] or 0) / tokens == pytest.approx(0.06)
        lines = list(passes(asked))
        assert len(lines) == len(asked.mixture.sources)
        assert next(line for line in lines if "code" in line).count("refuses the run") == bool(budget)
