"""Bad input: a clear error or a counted skip, never silence."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from transformers import AutoTokenizer

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare
from outgrow.train.corpus.read.corpora import documents, open_corpus
from outgrow.train.corpus.read.document import Tally
from outgrow.train.data import DataSettings
from outgrow.train.data.shards import check_data, fingerprint

LINES = "".join(json.dumps({"text": f"line {i} of some text"}) + "\n" for i in range(400)).encode()


def read(path: Path, tally: Tally | None = None, **settings: object) -> dict[str, str]:
    wanted = DataSettings("t", "files", path=str(path), **settings)  # type: ignore[arg-type]
    return {name: text for name, text, _ in documents(wanted, open_corpus(wanted), tally)}


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix == "gz" else zstandard.compress
    # in two pieces
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(
        pack(LINES[: len(LINES) // 2]) + pack(LINES[len(LINES) // 2 :])
    )
    (tmp_path / f"b.txt.{suffix}").write_bytes(pack(b"text"))
    (tmp_path / f"c.json.{suffix}").write_bytes(pack(b'[{"text": "one"}, {"text": "two"}]'))
    (tmp_path / f"d.png.{suffix}").write_bytes(pack(b"picture"))
    found = read(tmp_path)
    assert list(found)[:2] == [f"a.jsonl.{suffix}:1", f"a.jsonl.{suffix}:2"]
    assert list(found.items())[400:] == [
        (f"b.txt.{suffix}", "text"),
        (f"c.json.{suffix}:1", "one"),
        (f"c.json.{suffix}:2", "two"),
    ]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["ends early", "other bytes", "none of it"])
def test_damaged_and_truncated_streams_are_named(tmp_path: Path, suffix: str, damage: str) -> None:
    raw = (
        gzip.compress(LINES)
        if suffix == "gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(LINES)
    )
    middle = len(raw) // 2
    raw = {
        "ends early": raw[:-9],
        "other bytes": raw[:middle] + b"\xff" * 40 + raw[middle + 40 :],
        "none of it": b"text",
    }[damage]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(raw)
    with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}: corrupted {suffix} .*fetch the file again"):
        read(tmp_path)


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"row {i}" for i in range(1000)]}), tmp_path / "a.parquet"
    )
    os.truncate(tmp_path / "a.parquet", 900)
    with pytest.raises(UserError, match=r"a\.parquet: corrupted parquet"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "one", "n": {"m": 1}}', ["one"]),
        ('[{"text": "one"}, {"text": null}, {"text": "three"}]', ["one", "three"]),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),  # lines under the name of the whole
    ],
)
def test_json_is_a_list_an_object_or_lines(tmp_path: Path, content: str, expected: list[str]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert list(read(tmp_path).values()) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "one"}, {"body": "two"}]', r"a\.json:2: no field 'text'; found body"),
        ('[{"text": "one"}', r"a\.json: expected a JSON object"),
        ("[1]", r"a\.json:1: no field 'text'; found int"),
    ],
)
def test_json_that_is_none_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_one_broken_file_of_many_is_left_out_and_empty_ones_are_counted(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02d}.json").write_text(json.dumps({"text": f"text {i}"}))
    (tmp_path / "broken.json").write_text('{"text": "cut off')
    for name in ("a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt"):
        (tmp_path / name).write_bytes(b"")
    tally = Tally()
    assert len(read(tmp_path, tally, max_broken=0.1)) == 30
    assert tally == Tally(broken_skipped=1, empty_skipped=4)
    with pytest.raises(UserError, match=r"broken\.json: expected a JSON object.*\n1 of 35 records cannot"):
        read(tmp_path)


def test_a_json_file_too_large_for_one_piece_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outgrow.train.corpus.read.formats.JSON_BYTES", 20)
    (tmp_path / "a.json").write_text('[{"text": "longer than that"}]')
    with pytest.raises(
        UserError, match=r"a\.json: more than 20 bytes of JSON in one piece; write it as \.jsonl"
    ):
        read(tmp_path)


def test_documents_too_long_are_skipped_and_counted_in_every_format(tmp_path: Path) -> None:
    long, lines = "é" * 60, [{"text": "x" * 101}, {"text": "short"}, {"text": "y" * 100}]
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "c.json").write_text(json.dumps(lines))
    (tmp_path / "d.md.gz").write_bytes(gzip.compress(b"z" * 10**6))
    pyarrow.parquet.write_table(pyarrow.table({"text": [long, "short"]}), tmp_path / "e.parquet")
    tally = Tally()
    assert list(read(tmp_path, tally, max_document_bytes=100)) == [
        "b.jsonl:2",
        "b.jsonl:3",
        "c.json:2",
        "c.json:3",
        "e.parquet:1",
    ]
    assert tally == Tally(too_long_skipped=5)


def test_a_line_too_long_for_memory_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "' + b"x" * 3 * 2**20 + b'"}\n{"text": "next"}\n{"text": "' + b"y" * 2**21
    )
    tally = Tally()
    assert read(tmp_path, tally, max_document_bytes=100) == {"a.jsonl:2": "next"}
    assert tally.too_long_skipped == 2


# ---- the build ---------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i:02d}.txt").write_text(f"number {i} of some short texts " * 3)
    return DataSettings(
        "t",
        "files",
        folder=str(tmp_path / "tokens"),
        path=str(texts),
        vocab_size=280,
        validation_fraction=0.3,
        shard_tokens=100,
    )


@pytest.mark.slow
def test_a_document_longer_than_a_shard_is_cut_over_several(settings: DataSettings) -> None:
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 5000)))
    (Path(settings.path or "") / "10.txt").write_text(text)
    data = prepare(settings, progress=False)
    split = next(split for split in (data.train, data.validation) if split.count > 1500)
    assert (
        max(
            shard["tokens"]
            for shard in json.loads((settings.home / "manifest.json").read_text())["splits"][split.name][
                "shards"
            ]
        )
        == 100
    )
    assert text in AutoTokenizer.from_pretrained(data.tokenizer_folder).decode(split.tokens[:])


@pytest.mark.slow
def test_a_source_that_ends_early_is_told(settings: DataSettings, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(replace(settings, limit_documents=50, limit_tokens=10**6))
    err = capsys.readouterr().err
    assert "the text ended early: data.limit_documents=50, and there were 20" in err
    assert "the text ended early: data.limit_tokens=1,000,000, and there were" in err
    short = json.loads((settings.home / "manifest.json").read_text())["short"]
    assert short["limit_documents"] == {"asked": 50, "found": 20}
    prepare(replace(settings, limit_documents=20, limit_tokens=100))
    assert json.loads((settings.home / "manifest.json").read_text())["short"] == {}


def test_a_manifest_that_was_changed_is_told(settings: DataSettings) -> None:
    prepare(settings, progress=False)
    path = settings.home / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["documents"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not match its own fingerprint"):
        prepare(settings, progress=False)
    del manifest["splits"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not a manifest of tokens"):
        prepare(settings, progress=False)


def test_a_check_reads_every_byte(settings: DataSettings) -> None:
    prepare(settings, progress=False)
    check_data(settings.home)
    shard = settings.home / "train-00001.bin"
    raw = bytearray(shard.read_bytes())
    raw[17] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match="the train shards are not the bytes that the manifest tells of"):
        check_data(settings.home)
    raw[17] ^= 1
    shard.write_bytes(raw)
    tokenizer = settings.home / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"].pop()
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not the tokenizer that the manifest tells of"):
        check_data(settings.home)
    tokenizer.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        check_data(settings.home)


def test_the_fingerprint_is_of_the_manifest(settings: DataSettings) -> None:
    data = prepare(settings, progress=False)
    assert fingerprint(json.loads((settings.home / "manifest.json").read_text())) == data.fingerprint
