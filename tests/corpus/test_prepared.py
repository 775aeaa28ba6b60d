"""A token folder that was made elsewhere: used as it is, or refused for what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare
from outgrow.train.corpus.build import cut_by
from outgrow.train.data import DataSettings
from outgrow.train.data.settings import CleaningSettings, disagreements
from outgrow.train.data.shards import fingerprint
from outgrow.train.data.tokenizer import train_tokenizer

TEXTS = [f"Text {i}: " + " ".join(str(i * j) for j in range(80)) for i in range(40)]


def copied(folder: Path) -> DataSettings:
    return DataSettings("prepared", "prepared", path=str(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tokens of a text that is gone, copied elsewhere."""
    root = tmp_path_factory.mktemp("made")
    texts = root / "texts"
    texts.mkdir()
    for number, text in enumerate(TEXTS):
        (texts / f"{number}.txt").write_text(text)
    settings = DataSettings(
        "files", "files", path=str(texts), folder=str(root / "tokens"), vocab_size=300, workers=1
    )
    prepare(settings, progress=False)
    shutil.rmtree(texts)
    return Path(shutil.copytree(root / "tokens", root / "elsewhere" / "tokens"))


def test_it_is_used_as_it_is_where_its_text_is_gone(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    data = prepare(copied(made))
    manifest = json.loads((made / "manifest.json").read_text())
    assert data.fingerprint == manifest["fingerprint"]
    assert data.train.count == manifest["splits"]["train"]["tokens"] > 1000
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_a_source_with_the_tokenizer_that_cut_it_reads_it_and_another_is_refused(
    made: Path, tmp_path: Path
) -> None:
    settings = copied(made)
    assert cut_by(settings, made / "tokenizer") == settings
    train_tokenizer(TEXTS[:5], vocab_size=290, model_max_length=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cut by another tokenizer than the source's"):
        cut_by(settings, tmp_path)


def test_a_manifest_that_points_outside_its_folder_is_refused(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "tokens"))
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    (folder / shard["file"]).rename(tmp_path / "outside.bin")
    shard["file"] = "../outside.bin"
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"'../outside.bin', which lies outside"):
        prepare(copied(folder))


def test_a_folder_without_tokens_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokens here; give a folder that `outgrow corpus prepare` made"):
        prepare(copied(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="no tokens here"):
        prepare(copied(tmp_path / "other"))


def test_a_copy_that_is_cut_is_told(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "tokens"))
    shard = folder / "train-00000.bin"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"train-00000.bin should have {size} bytes, has 100; .* or copied"):
        prepare(copied(folder))


def test_what_only_a_text_can_be_asked_for_is_refused_at_once() -> None:
    settings = DataSettings(
        "prepared",
        "prepared",
        folder="tokens",
        tokenizer="gpt2",
        limit_tokens=5,
        clean=CleaningSettings(exact_duplicates=True),
    )
    assert [fault.partition(":")[0] for fault in disagreements(settings)] == [
        "data.path",
        "data.folder",
        "data.tokenizer",
        "data.limit_tokens",
        "data.clean",
    ]
