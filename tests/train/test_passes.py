"""How often a run reads its text: counted in manifests that are there, told as unknown where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from outgrow.train.data.settings import DataSettings, MixtureSettings, PhaseSettings, SourceSettings
from outgrow.train.data.shards import fingerprint
from outgrow.train.settings import Settings, compose
from outgrow.train.start.passes import passes, shares, training_tokens


def prepared(folder: Path, tokens: int) -> DataSettings:
    folder.mkdir()
    manifest = {"splits": {"train": {"tokens": tokens, "sha256": ""}}, "tokenizer": {"sha256": ""}, "dtype": "<u2"}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": fingerprint(manifest)}))
    return DataSettings("files", "files", path="texts", folder=str(folder))


@pytest.fixture
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)  # 768 tokens


def test_passes_are_the_budget_over_the_tokens_that_are_there(settings: Settings, tmp_path: Path) -> None:
    own = replace(settings, data=prepared(tmp_path / "text", 512))
    assert list(passes(own)) == ["files: 768 of 512 training tokens, 1.50 passes"]
    often = replace(settings, data=prepared(tmp_path / "short", 96))
    (line,) = passes(often)
    assert line == "files: 768 of 96 training tokens, 8.00 passes; more than 4 passes teach little that is new (arXiv 2305.16264)"


def test_a_text_that_is_not_there_yet_is_known_by_its_limit_alone(settings: Settings, tmp_path: Path) -> None:
    data = replace(settings.data, folder=str(tmp_path / "nothing"))
    assert training_tokens(data) is None
    assert "known once it is prepared" in next(passes(replace(settings, data=data)))
    assert training_tokens(replace(data, limit_tokens=1000, validation_fraction=0.05)) == 950


def test_tokens_cut_by_a_sources_tokenizer_are_found_beside_them(settings: Settings, tmp_path: Path) -> None:
    prepared(tmp_path / "text-0123abcd", 64)
    assert training_tokens(replace(settings.data, folder=str(tmp_path / "text"))) == 64


def test_every_source_of_a_mixture_has_its_line(settings: Settings, tmp_path: Path) -> None:
    sources = {name: SourceSettings(prepared(tmp_path / name, tokens)) for name, tokens in (("a", 100), ("b", 1000))}
    phases = (PhaseSettings(weights={"a": 0.5, "b": 0.5}, tokens=400), PhaseSettings(weights={"b": 1.0}))
    mixture = MixtureSettings("two", sources, phases)
    assert shares(mixture, 768) == {"a": 200.0, "b": 568.0}
    assert list(passes(replace(settings, mixture=mixture))) == [
        "a: 200 of 100 training tokens, 2.00 passes",
        "b: 568 of 1,000 training tokens, 0.57 passes",
    ]
    by_passes = replace(mixture, phases=(PhaseSettings(passes={"a": 2.0}), PhaseSettings(weights={"b": 1.0})))
    assert shares(by_passes, 768)["a"] is None
