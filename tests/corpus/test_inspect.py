"""`inspect`: what it counts is what is there, and its picture is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare
from outgrow.train.corpus.__main__ import main
from outgrow.train.corpus.inspect import LENGTHS, SCORES, inspect, report
from outgrow.train.data import DataSettings
from outgrow.train.data.settings import CleaningSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty documents, four of them twice."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(f"document {i} says é " + "word " * i)
    for i in range(4):
        (texts / f"copy{i}.txt").write_text(f"document {i} says é " + "word " * i)
    (texts / "empty.txt").write_text("")
    settings = DataSettings(
        "t",
        "files",
        folder=str(tmp_path / "tokens"),
        path=str(texts),
        vocab_size=280,
        validation_fraction=0.3,
        shard_tokens=300,
        clean=CleaningSettings(exact_duplicates=True),
    )
    prepare(settings, progress=False)
    return settings.home


def score(folder: Path) -> None:
    """Give the documents scores, as a filter would have, and list twenty that it removed."""
    kept = pyarrow.parquet.read_table(folder / "documents.parquet")
    scores = pyarrow.array(np.linspace(0.5, 1, kept.num_rows), pyarrow.float32())
    pyarrow.parquet.write_table(kept.set_column(4, "score", scores), folder / "documents.parquet")
    gone = [
        {"document": f"{i}", "bytes": 1, "reason": "low_score", "detail": f"{i / 50:.3f}"} for i in range(20)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(gone), folder / "removed.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cleaning"]["filter"] = {
        "keep": 0.5,
        "kept": kept.num_rows,
        "scored": 20 + kept.num_rows,
        "threshold": 0.5,
        "ties": 1,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_samples_are_the_documents_that_they_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outgrow.train.corpus.inspect.BATCH", 7)
    found = inspect(folder, samples=50, characters=30, seed=0)
    assert len(found.samples) == 40
    for sample in found.samples:
        text = (folder.parent / "texts" / sample.document).read_text()
        assert sample.text == text[:30]
        assert sample.score is None
    few = [inspect(folder, samples=2, characters=30, seed=seed).samples for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert [sample.split for sample in few[0]] == ["train", "train", "validation", "validation"]


def test_lengths_are_counted(folder: Path) -> None:
    found = inspect(folder, samples=0, characters=10, seed=0)
    tokens = pyarrow.parquet.read_table(folder / "documents.parquet")["tokens"].to_numpy()
    assert (found.lengths == np.histogram(tokens, LENGTHS)[0]).all()
    assert (found.total("documents"), found.total("tokens")) == (40, tokens.sum())


def test_scores_of_kept_and_removed_are_counted(folder: Path) -> None:
    score(folder)
    found = inspect(folder, samples=1, characters=10, seed=0)
    assert (found.kept_scores.sum(), found.low_scores.sum()) == (40, 20)
    assert not found.kept_scores[SCORES[:-1] < 0.5].any()
    assert "| 0.1–0.2 | 5 | 0 |" in report([found])


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(folder)
    main(["inspect", f"folders=[{folder},{folder}]", f"out={tmp_path / 'seen'}", "check=true"])
    text = capsys.readouterr().out
    assert (tmp_path / "seen" / "inspection.md").read_text() == text.rstrip("\n") + "\n"
    assert "| tokens | 40 |" in text
    assert "| tokens | exact duplicate | 4 |" in text
    assert "| tokens | empty skipped | 1 |" in text
    assert text.count("50.0%") == 2
    assert (tmp_path / "seen" / "inspection.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_inspected_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no tokens here"):
        inspect(tmp_path / "nowhere", samples=1, characters=1, seed=0)
    (folder / "documents.parquet").unlink()
    with pytest.raises(UserError, match=r"no documents\.parquet in it; prepare it again"):
        inspect(folder, samples=1, characters=1, seed=0)
    with pytest.raises(SystemExit):
        main(["inspect", "samples=-1"])
    assert "folders: missing" in capsys.readouterr().err
