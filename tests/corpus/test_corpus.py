"""Documents: which, in what order, split how, and what happens to those that cannot be taken as they
stand."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.corpus.read.corpora import documents, open_corpus
from outgrow.train.corpus.read.document import Tally
from outgrow.train.corpus.read.steps import digest_of
from outgrow.train.corpus.tokenise import held_out
from outgrow.train.data.settings import DataSettings, disagreements


def read(path: Path | str, tally: Tally | None = None, **settings: object) -> dict[str, str]:
    wanted = DataSettings("t", "files", path=str(path), **settings)  # type: ignore[arg-type]
    return {name: text for name, text, _ in documents(wanted, open_corpus(wanted), tally)}


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "c" / "one.txt").write_text("one")
    (tmp_path / "a.MD").write_text("# two")
    (tmp_path / "b" / "three.py").write_text("three = 3")
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "lines.jsonl").write_text('{"text": "four"}\n\n{"text": "five", "n": 1}\n')
    write_parquet(tmp_path / "rows.parquet", text=["six", None, "seven"], n=[1, 2, 3])
    return tmp_path


def test_a_folder_gives_every_format_by_name(folder: Path) -> None:
    assert list(read(folder).items()) == [
        ("a.MD", "# two"),
        ("b/c/one.txt", "one"),
        ("b/three.py", "three = 3"),
        ("lines.jsonl:1", "four"),
        ("lines.jsonl:3", "five"),
        ("rows.parquet:0", "six"),
        ("rows.parquet:2", "seven"),
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("b", ["c/one.txt", "three.py"]),
        ("b/*.py", ["three.py"]),
        ("**/*.txt", ["b/c/one.txt"]),
        ("b/three.py", ["three.py"]),
        ("b/**/*.[tp]*", ["c/one.txt", "three.py"]),
    ],
)
def test_a_glob_names_documents_from_its_fixed_part(folder: Path, pattern: str, names: list[str]) -> None:
    assert list(read(folder / pattern)) == names


def test_a_folder_with_glob_characters_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a[1]*").mkdir()
    (tmp_path / "a[1]*" / "x.txt").write_text("x")
    assert read(tmp_path / "a[1]*") == {"x.txt": "x"}


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": 1, "body": "yes"}')
    write_parquet(tmp_path / "y.parquet", body=["no"], text=[3])
    assert read(tmp_path, column="body") == {"x.jsonl:1": "yes", "y.parquet:0": "no"}


def test_broken_utf8_is_replaced_and_counted_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "\\ud800x"}\n{"text": "caf\\u00e9"}')
    broken = pyarrow.array([b"caf\xe9", b"good"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "c.parquet")
    tally = Tally()
    assert list(read(tmp_path, tally).values()) == [
        "caf\ufffd",
        "caf\ufffd",
        "?x",
        "café",
        "caf\ufffd",
        "good",
    ]
    assert tally == Tally(utf8_replaced=4)


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "x"}')
    tally = Tally()
    assert list(read(tmp_path, tally)) == ["b.jsonl:3"]
    assert tally == Tally(empty_skipped=3)


def test_documents_stop_at_the_limit_without_reading_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\nthis is not JSON')
    assert list(read(tmp_path, limit_documents=2)) == ["a.jsonl:1", "a.jsonl:2"]


def test_the_standard_library_is_the_same_each_time() -> None:
    settings = DataSettings("t", "stdlib")
    corpus = open_corpus(settings)
    found = list(documents(settings, corpus))
    names = [document.name for document in found]
    assert (
        names == sorted(names) == [document.name for document in documents(settings, open_corpus(settings))]
    )
    assert {"json/decoder.py", "argparse.py"} < set(names)
    assert not [
        name for name in names if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))
    ]
    assert sum(document.bytes for document in found) == corpus.size > 8e6


def test_the_split_depends_on_text_and_seed_alone() -> None:
    texts = [digest_of(b"document %d" % i) for i in range(4000)]
    halves = [
        {
            text
            for text in texts
            if held_out(text, DataSettings("t", "stdlib", seed=seed, validation_fraction=0.1))
        }
        for seed in (0, 1)
    ]
    assert 320 < len(halves[0]) < 480
    assert 320 < len(halves[1]) < 480
    assert len(halves[0] & halves[1]) < 100  # independent: some 40
    more = {text for text in texts if held_out(text, DataSettings("other", "hub", validation_fraction=0.2))}
    assert halves[0] < more  # a larger share only adds


# ---- faults ------------------------------------------------------------------------------------------------


def jsonl(text: str) -> dict[str, bytes]:
    return {"a.jsonl": text.encode()}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (jsonl('{"text": "x"}\n{"text": '), r"a\.jsonl:2: expected a JSON object; found"),
        (jsonl("[1]"), r"a\.jsonl:1: no field 'text'; found list"),
        (jsonl('{"body": "x", "n": 1}'), r"a\.jsonl:1: no field 'text'; found body, n; .*data\.column="),
        (jsonl('{"text": 5}'), r"a\.jsonl:1: 'text' is a int, not text"),
        ({"a.parquet": b"PAR1 this is none"}, r"a\.parquet: corrupted parquet .*fetch the file again"),
        ({"a.parquet": b""}, r"a\.parquet: corrupted parquet"),
        ({"a.png": b""}, r"none of its 1 files ends in \.txt \.md \.py \.json \.jsonl \.csv \.tsv \.parquet"),
        ({}, "it is an empty folder"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_missing_columns_and_other_types_of_parquet_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["x"], n=[1])
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; found body, n; .*data\.column="):
        read(path)
    with pytest.raises(UserError, match=r"a\.parquet: column 'n' holds int64, not text"):
        read(path, column="n")


def test_parquet_damaged_in_its_middle_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[f"{i} {'text ' * i}" for i in range(500)])
    raw = bytearray(path.read_bytes())
    raw[4:400] = gzip.compress(b"x" * 396)[:1] * 396
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.parquet: corrupted parquet"):
        read(path)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(No such file or directory\)"):
        read(tmp_path)


def test_settings_that_cannot_work_are_told_together() -> None:
    settings = DataSettings("t", "files", validation_fraction=1.0, vocab_size=256, limit_tokens=0)
    faults = disagreements(settings)
    assert [fault.split(":")[0] for fault in faults] == [
        "data.path",
        "data.validation_fraction",
        "data.vocab_size",
        "data.limit_tokens",
    ]
    assert disagreements(DataSettings("t", "hub"))[0].startswith("data.dataset: missing")
    assert not disagreements(DataSettings("t", "stdlib"))


# ---- hub ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_is_read_as_datasets_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    home = tmp_path / "dataset"
    home.mkdir()
    lines = [{"body": text, "n": 1} for text in ("one", "", "three", "four")]
    (home / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = DataSettings(
        "t", "hub", dataset=str(home), column="body", streaming=streaming, limit_documents=2
    )
    found = list(documents(settings, open_corpus(settings)))
    assert [(document.name.rsplit(":", 2)[1:], document.text) for document in found] == [
        (["train", "0"], "one"),
        (["train", "2"], "three"),
    ]
    assert any((tmp_path / "cache").glob("**/*.arrow")) is not streaming
    rest = list(documents(settings, open_corpus(settings), Tally(documents=1, item=1)))  # as after a kill
    assert [document.text for document in rest] == ["three"]
    with pytest.raises(UserError, match=r"no column 'text'; found body, n"):
        list(
            documents(
                wrong := DataSettings("t", "hub", dataset=str(home), streaming=streaming), open_corpus(wrong)
            )
        )


def test_a_folder_of_a_dataset_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("python", "java"):
        (tmp_path / "dataset" / "data" / name).mkdir(parents=True)
        (tmp_path / "dataset" / "data" / name / "data.json").write_text(json.dumps({"content": name}))
    settings = DataSettings(
        "t", "hub", dataset=str(tmp_path / "dataset"), data_dir="data/python", column="content"
    )
    assert [document.text for document in documents(settings, open_corpus(settings))] == ["python"]
    before = open_corpus(settings).stamp()
    assert before != open_corpus(replace(settings, data_dir=None)).stamp()
    (tmp_path / "dataset" / "data" / "python" / "more.json").write_text(json.dumps({"content": "more"}))
    assert open_corpus(settings).stamp() != before  # a local folder is looked at again


def test_a_dataset_out_of_reach_is_named_with_the_way_out() -> None:
    settings = DataSettings(
        "t", "hub", dataset="nobody/nothing", config="small", data_dir="a/b", revision="v1"
    )
    with pytest.raises(
        UserError,
        match=(
            r"cannot read dataset=nobody/nothing config=small data_dir=a/b split=train revision=v1 "
            r".*data=files"
        ),
    ):
        list(documents(settings, open_corpus(settings)))
