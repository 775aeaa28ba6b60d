"""Text as it is found: links, devices, encodings, tables, deep JSON, tokens spelt out. Each is read right, or
told."""

from __future__ import annotations

import errno
import gzip
import http.server
import json
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.s3 import CUT, serving
from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare, report
from outgrow.train.corpus.benchmarks import read_benchmarks, write_benchmarks
from outgrow.train.corpus.duplicates import bands, signature
from outgrow.train.corpus.read.corpora import documents, open_corpus
from outgrow.train.corpus.read.document import Tally
from outgrow.train.corpus.tokenise import BATCH_BYTES, in_batches
from outgrow.train.corpus.words import word_hashes, words
from outgrow.train.data import DataSettings
from outgrow.train.data.settings import CleaningSettings
from outgrow.train.data.tokenizer import encoder, train_tokenizer


def read(path: Path | str, tally: Tally | None = None, **settings: object) -> dict[str, str]:
    wanted = DataSettings("t", "files", path=str(path), **settings)  # type: ignore[arg-type]
    return {name: text for name, text, _ in documents(wanted, open_corpus(wanted), tally)}


def prepared(folder: Path, **settings: object) -> dict[str, object]:
    """The manifest of the texts in `folder`."""
    wanted = DataSettings(
        "t", "files", path=str(folder), folder=f"{folder}-tokens", vocab_size=280, **settings
    )  # type: ignore[arg-type]
    prepare(wanted, progress=False)
    return dict(json.loads((wanted.home / "manifest.json").read_text()))


# ---- which files -------------------------------------------------------------------------------------------


def test_links_multiply_nothing_and_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for folder in (inside / "a", elsewhere):
        folder.mkdir(parents=True)
    (inside / "a" / "x.txt").write_text("x")
    (elsewhere / "y.txt").write_text("y")
    (inside / "a" / "up").symlink_to(inside)
    (inside / "b").symlink_to(inside / "a")
    (inside / "other").symlink_to(elsewhere)
    (inside / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(inside)
    assert read(inside) == {"a/x.txt": "x", "again/y.txt": "y"}
    told = capsys.readouterr().err
    assert all(
        f"left out {inside / name}: a link to a folder that is read already" in told
        for name in ("a/up", "b", "other", "again/back")
    )
    assert read(inside / "**/*.txt") == {"a/x.txt": "x", "again/y.txt": "y"}


def test_what_is_no_file_or_not_the_text_is_told_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    for name in ("tokens/tokenizer", "other/tokenizer", "tokens.partial", "closed"):
        (texts / name).mkdir(parents=True)
        (texts / name.partition("/")[0] / "manifest.json").write_text('{"text": "prepared"}')
    (texts / "x.txt").write_text("x")
    os.mkfifo(texts / "fifo.txt")
    os.symlink("/dev/zero", texts / "zero.txt")
    listed = os.scandir

    def refusing(path: str) -> Any:
        if path == str(texts / "closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may list all
    monkeypatch.setattr("outgrow.train.corpus.read.files.TOLD", 6)
    assert read(texts, folder=str(texts / "tokens")) == {"x.txt": "x"}
    told = capsys.readouterr().err
    assert f"{texts / 'fifo.txt'}: neither a file nor a folder (a FIFO)" in told
    assert f"{texts / 'zero.txt'}: neither a file nor a folder (a device)" in told
    assert f"{texts / 'closed'}: cannot be listed (Permission denied)" in told
    assert told.count("prepared tokens, or a build of them") == 3


def test_names_that_are_no_utf8_are_read(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(12):
        Path(os.fsdecode(os.fsencode(texts) + b"/caf\xe9%d.txt" % i)).write_text(f"text number {i}")
    assert prepared(texts, validation_fraction=0.3)["read"]["documents"] == 12  # type: ignore[index]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A folder behind a web server's list of its files."""
    (tmp_path / "www").mkdir()
    for i in range(6):
        lines = [json.dumps({"text": f"file {i} line {j} of some text"}) for j in range(20)]
        (tmp_path / "www" / f"{i}.jsonl").write_text("\n".join(lines))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: object) -> None:
            super().__init__(*given, directory=str(tmp_path / "www"))  # type: ignore[arg-type, misc]

        def log_message(self, *given: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_url_is_read_as_a_folder_is(
    tmp_path: Path, served: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outgrow.train.corpus.read.files.TASK_BYTES", 1500)
    here = DataSettings(
        "t",
        "files",
        path=str(tmp_path / "www"),
        folder=str(tmp_path / "here"),
        vocab_size=280,
        validation_fraction=0.3,
    )
    there = replace(here, path=f"{served}/", folder=str(tmp_path / "there"), workers=workers)
    assert prepare(there, progress=False).fingerprint == prepare(here, progress=False).fingerprint


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a bucket of a stand-in for an S3 server, which the environment names."""
    pytest.importorskip("obstore")
    with serving(tmp_path / "s3") as address:
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }.items():
            monkeypatch.setenv(name, value)
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # an earlier test's: workers have its environment
        folder = tmp_path / "s3" / f"bucket-{address.rpartition(':')[2]}"  # clients are kept by their names
        folder.mkdir(parents=True)
        yield folder
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bucket_is_read_as_a_folder_is(
    tmp_path: Path, bucket: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outgrow.train.corpus.read.files.TASK_BYTES", 1500)
    texts = bucket / "texts"
    (texts / "sub").mkdir(parents=True)
    for i in range(5):
        lines = [json.dumps({"text": f"file {i} line {j} of some text"}) for j in range(20)]
        (texts / f"{i}.jsonl").write_text("\n".join(lines))
    (texts / "sub" / "a.txt.gz").write_bytes(gzip.compress(b"a text of its own"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one row", "two rows"]}), texts / "z.parquet")
    here = DataSettings(
        "t", "files", path=str(texts), folder=str(tmp_path / "here"), vocab_size=280, validation_fraction=0.3
    )
    url = f"s3://{bucket.name}/texts"
    there = replace(here, path=url, folder=str(tmp_path / "there"), workers=workers)
    assert prepare(there, progress=False).fingerprint == prepare(here, progress=False).fingerprint
    assert list(read(f"{url}/**/*.gz")) == ["sub/a.txt.gz"]
    assert next(iter(read(f"{url}/3.jsonl"))) == "3.jsonl:1"
    before = open_corpus(there).stamp()
    (texts / "sub" / "b.txt").write_text("more")
    assert open_corpus(there).stamp() != before


def test_a_bucket_that_refuses_is_told(bucket: Path) -> None:
    with pytest.raises(UserError, match=r"s3://closed/x: cannot be listed \(\w+: .*403"):
        read("s3://closed/x")
    with pytest.raises(UserError, match=r"s3://closed/x\.txt: cannot be listed \(\w+: .*403"):
        read("s3://closed/x.txt")
    (bucket / CUT).write_text("x")
    with pytest.raises(UserError, match=r"s3://bucket-\d+/cut\.txt: cannot be read \(.*403"):
        read(f"s3://{bucket.name}")


def test_an_object_store_without_its_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "obstore.fsspec", None)
    with pytest.raises(UserError, match=r"gs:// needs obstore: pip install -e '\.\[s3\]'"):
        read("gs://bucket/texts")


def test_a_folder_of_a_store_is_listed_as_a_folder_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fsspec

    names = ["b.txt", "a/x.md", ".hidden/x.txt", "a/.x.txt", "t/manifest.json", "t/tokenizer/x.json"]
    names += ["t.partial/work/x.txt", "picture.png", "tokenizer/x.txt", "manifest.json"]
    store = fsspec.filesystem("memory")
    for name in names:
        here = tmp_path / name
        here.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"text": name})
        here.write_text(content)
        store.pipe(f"/bucket/{name}", content.encode())
    there = read("memory://bucket")
    assert there == read(tmp_path)
    assert list(there) == ["a/x.md", "b.txt", "manifest.json:1", "tokenizer/x.txt"]
    told = capsys.readouterr().err.splitlines()
    assert [line.rpartition("/")[2].partition(":")[0] for line in told] == ["t", "t.partial"] * 2


@pytest.mark.slow
def test_a_store_that_refuses_is_told(served: str) -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:\d+/none\.jsonl: cannot be (listed|read)"):
        read(f"{served}/none.jsonl")
    with pytest.raises(
        UserError,
        match=r"data\.path=nosuch://bucket/x: cannot be listed \(ValueError: Protocol not known: nosuch",
    ):
        read("nosuch://bucket/x")


# ---- what is in them ---------------------------------------------------------------------------------------

LINES = '{"text": "Grüße"}\n{"text": "世界"}\n'


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("Grüße", encoding=encoding)
    (tmp_path / "b.jsonl").write_text(LINES, encoding=encoding)
    (tmp_path / "c.json").write_text('{"text": "世界"}', encoding=encoding)
    (tmp_path / "d.csv").write_text("n,text\n1,Grüße\n", encoding=encoding)
    tally = Tally()
    assert list(read(tmp_path, tally).values()) == ["Grüße", "Grüße", "世界", "世界", "Grüße"]
    assert tally == Tally()


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "text".encode("utf-16-le"), bytes(range(128, 256)) * 3]
)
def test_binary_files_are_counted_not_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("text")
    tally = Tally()
    assert read(tmp_path, tally) == {"b.txt": "text"}
    assert tally == Tally(binary_skipped=1)


def test_tables_and_strange_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,n\n"two\nlines",1\n"with, comma",2\n')
    (tmp_path / "b.tsv").write_text("n\ttext\n1\ttabbed\n")
    (tmp_path / "c.jsonl").write_text(
        f'{{"n": {"9" * 10_000}, "text": "long number"}}\n{{"text": "line\u2028separator"}}\n'
    )
    assert list(read(tmp_path).values()) == [
        "two\nlines",
        "with, comma",
        "tabbed",
        "long number",
        "line\u2028separator",
    ]


KINDS = [
    pyarrow.string_view(),
    pyarrow.binary_view(),
    pyarrow.large_binary(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
]


def test_broken_records_are_left_out_up_to_a_share_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    good = [json.dumps({"text": f"line {i} of a text"}) for i in range(30)]
    nested = "[" * 100_000 + "]" * 100_000
    (texts / "a.jsonl").write_text("\n".join([*good, "no JSON", '{"text": 5}', nested]))
    (texts / "b.txt").write_bytes(b"\0")
    read = prepared(texts, max_broken=0.1, validation_fraction=0.3)["read"]
    told = capsys.readouterr().err
    assert (read["documents"], read["broken_skipped"], read["binary_skipped"]) == (30, 3, 1)  # type: ignore[index]
    assert f"left out: {texts / 'a.jsonl'}:31: expected a JSON object; found 'no JSON" in told
    assert "a.jsonl:32: 'text' is a int, not text" in told
    assert "a.jsonl:33: expected a JSON object" in told
    assert "nested too deeply" in told
    said = report.prepared(Path(f"{texts}-tokens"))
    assert "broken skipped: 3" in said
    assert "binary skipped: 1" in said
    with pytest.raises(UserError, match=r"3 of 34 records cannot be read; data\.max_broken=0\.05 of them"):
        prepared(texts, max_broken=0.05, validation_fraction=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_text_of_every_kind_are_text(tmp_path: Path, kind: pyarrow.DataType) -> None:
    plain = pyarrow.array(["one", "two", "one"])
    column = plain.dictionary_encode() if pyarrow.types.is_dictionary(kind) else plain.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert list(read(tmp_path).values()) == ["one", "two", "one"]


def test_columns_of_one_name_are_told(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table([["x"], ["y"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: 2 columns are called 'text'"):
        read(tmp_path)


def test_a_zstd_stream_of_a_wide_window_is_read(tmp_path: Path) -> None:
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    raw = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(raw.compress(b"wide") + raw.flush())
    assert read(tmp_path) == {"a.txt.zst": "wide"}


@pytest.mark.slow
def test_large_rows_of_a_small_parquet_file_take_a_few_of_them_at_a_time(tmp_path: Path) -> None:
    row = "x" * 2**20
    pyarrow.parquet.write_table(pyarrow.table({"text": [row] * 256}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 10**5
    wanted = DataSettings("t", "files", path=str(tmp_path))
    tracemalloc.start()
    peak = 0
    for _ in documents(wanted, open_corpus(wanted)):
        peak = max(peak, pyarrow.total_allocated_bytes())
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20  # of 256
    assert python < 40 * 2**20


# ---- the split ---------------------------------------------------------------------------------------------


def test_copies_lie_on_one_side_of_the_split_and_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i:02d}.txt").write_text(f"this is text number {i % 30} of the collection")
    manifest = prepared(texts, validation_fraction=0.3)
    assert manifest["cleaning"]["copies_kept"] == 30  # type: ignore[index]
    assert "30 of 60 documents are exact copies of an earlier one" in capsys.readouterr().err
    listed = pyarrow.parquet.read_table(f"{texts}-tokens/documents.parquet").to_pylist()
    sides = [{row["split"] for row in listed if int(row["document"][:2]) % 30 == i} for i in range(30)]
    assert {len(side) for side in sides} == {1}


def test_a_book_is_split_at_a_paragraph(tmp_path: Path) -> None:
    book = "\n\n".join(f"Paragraph {i}. It says something of its own, {i * i}." for i in range(200))
    (tmp_path / "book.txt").write_text(book)
    settings = DataSettings(
        "t", "files", path=str(tmp_path / "book.txt"), folder=str(tmp_path / "tokens"), vocab_size=280
    )
    data = prepare(settings, progress=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data.tokenizer_folder)
    first, last = (
        tokenizer.decode(split.tokens[: split.count - 1]) for split in (data.train, data.validation)
    )
    assert first + last == book
    assert first.endswith("\n\n")
    assert 0.03 < len(last) / len(book) < 0.06


@pytest.mark.parametrize("count", [2, 3])
def test_few_documents_fill_both_parts(tmp_path: Path, count: int) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(count):
        (texts / f"{i}.txt").write_text(f"text {i}")
    splits = prepared(texts, validation_fraction=1e-6)["splits"]
    assert [splits[name]["documents"] for name in ("train", "validation")] == [count - 1, 1]  # type: ignore[index]


def test_cleaning_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("\ufeff\x01")
    with pytest.raises(UserError, match=r"cleaning removed all 1 documents; loosen data\.clean"):
        prepared(texts, clean=CleaningSettings(normalise=True))


# ---- duplicates and benchmarks -----------------------------------------------------------------------------


def similarity(one: str, other: str, kind: str) -> float:
    signatures = [signature(word_hashes(words(text, kind))) for text in (one, other)]
    return float((signatures[0] == signatures[1]).mean())


def test_code_that_differs_in_operators_numbers_or_indentation_is_not_the_same() -> None:
    one = "\n".join(f"if a{i}(x):\n        b{i} = c{i} + d{i} * {i}" for i in range(20))
    changes = {
        "operators": one.replace("+", "-"),
        "numbers": one.replace("* ", "* 1"),
        "indentation": one.replace("\n        ", "\n    "),
    }
    assert similarity(one, one.replace("(x)", "( x )"), "code") == 1  # spaces within a line play no part
    assert {name: similarity(one, other, "code") < 0.8 for name, other in changes.items()} == dict.fromkeys(
        changes, True
    )
    assert (
        similarity(one, changes["operators"], "prose")
        == similarity(one, changes["indentation"], "prose")
        == 1
    )


def test_near_copies_are_found_in_scripts_without_spaces() -> None:
    numbers = np.random.default_rng(0)
    text = "".join(map(chr, numbers.integers(0x4E00, 0x9FA5, 400)))
    near = text[:200] + "新" + text[201:]
    assert similarity(text, near, "prose") > 0.9
    assert similarity(text, "".join(map(chr, numbers.integers(0x4E00, 0x9FA5, 400))), "prose") < 0.1


@pytest.mark.parametrize("threshold", [0.995, 1.0])
def test_a_similarity_of_almost_one_finds_the_copies(tmp_path: Path, threshold: float) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i:02d}.txt").write_text(" ".join(f"word{i % 6}x{j}" for j in range(50)) + "." * (i // 6))
    removed = prepared(texts, validation_fraction=0.3, clean=CleaningSettings(near_duplicates=threshold))[
        "cleaning"
    ]["removed"]  # type: ignore[index]
    assert removed["near_duplicate"]["documents"] == 6
    assert bands(threshold)[0] == 1


ITEM = "Café au lait costs twice what a plain coffee costs, so how much are three?"
FORMS = {
    "NFD": "Cafe\u0301 au lait costs twice what a plain coffee costs, so how much are three?",
    "soft hyphens": ITEM.replace("coffee", "cof\u00adfee"),
    "zero width": ITEM.replace("plain", "pl\u200bain"),
    "full width": ITEM.replace("three", "\uff54\uff48\uff52\uff45\uff45"),
    "case and spaces": ITEM.upper().replace(" ", "\n\t"),
}


def overlaps(folder: Path, text: str) -> list[str]:
    write_benchmarks(str(folder), folder.parent / "n.npz")
    hits = read_benchmarks(folder.parent / "n.npz", time.monotonic_ns()).overlaps(
        words(text), word_hashes(words(text))
    )
    return [detail for _, detail in hits]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_a_benchmark_is_found_in_every_spelling(
    tmp_path: Path, form: str, encoding: str, suffix: str, delimiter: str
) -> None:
    folder = tmp_path / "b"
    folder.mkdir()

    def write(question: str) -> None:
        table = f'question{delimiter}answer\n"{question}"{delimiter}6\n'
        (folder / f"items.{suffix}").write_text(table, encoding=encoding)

    write(ITEM)
    assert overlaps(folder, f"Before. {FORMS[form]} After.")
    write(FORMS[form])
    assert overlaps(folder, f"Before. {ITEM} After.")


def test_short_items_and_items_without_spaces_are_looked_for_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    items = ["What is the capital of France?", "他是从哪里来的\u2028谁知道他要去哪里", "too short"]
    (tmp_path / "b" / "a.jsonl").write_text(
        "\n".join(json.dumps({"q": item}, ensure_ascii=False) for item in items)
    )
    assert overlaps(tmp_path / "b", "He asked what is the capital of France, and left") == [
        "a.jsonl: what is the capital of france"
    ]
    assert overlaps(tmp_path / "b", "what is the capital of Spain") == []
    assert overlaps(tmp_path / "b", "问：他是从哪里来的谁知道他要去哪里。")
    assert write_benchmarks(str(tmp_path / "b"), tmp_path / "n.npz")["too_short"] == 1


def test_boilerplate_removes_nothing_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, tests = tmp_path / "texts", tmp_path / "tests"
    texts.mkdir()
    tests.mkdir()
    licence = "permission is hereby granted free of charge to any person obtaining a copy of this software"
    secret = "the answer to the last question of all is of course forty two as everyone knows"
    (tests / "a.txt").write_text(f"{licence} {secret}")
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(f"{licence}. Text number {i}. {secret if i == 7 else ''}")
    cleaning = prepared(texts, validation_fraction=0.3, clean=CleaningSettings(benchmarks=str(tests)))[
        "cleaning"
    ]
    assert cleaning["removed"]["benchmark_overlap"]["documents"] == 1  # type: ignore[index]
    assert "boilerplate, in more than 10 documents, removes none: a.txt: " in capsys.readouterr().err


# ---- tokens ------------------------------------------------------------------------------------------------


def unigram() -> PreTrainedTokenizerFast:
    """A tokenizer of SentencePiece's kind, whose vocabulary holds the end of text, and whose own call begins
    with <s>."""
    pieces = ["<s>", "</s>", "<unk>", "▁", *"abc<s>/", "▁a", "▁b"]
    scores = [
        (piece, 0.0 if i < 3 else -1.0 - len(piece) / 10) for i, piece in enumerate(dict.fromkeys(pieces))
    ]
    inner = Tokenizer(models.Unigram(scores, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_an_end_of_text_that_is_spelt_out_is_text_for_unigram_too() -> None:
    (ids,) = encoder(unigram()).encode(["a</s>b"])
    assert (ids[0], ids[-1]) == (0, 1)  # the first token of the tokenizer's own call, and the end
    assert not {0, 1} & set(ids[1:-1])
    assert "".join(unigram().convert_ids_to_tokens(ids[1:-1])) == "▁a</s>b"


def test_what_the_tokenizers_own_call_puts_in_front_is_written(tmp_path: Path) -> None:
    unigram().save_pretrained(tmp_path / "tokenizer")
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i:02d}.txt").write_text("a b " * (i + 1))
    settings = DataSettings(
        "t", "files", path=str(texts), folder=str(tmp_path / "tokens"), tokenizer=str(tmp_path / "tokenizer")
    )
    data = prepare(replace(settings, validation_fraction=0.3), progress=False)
    ids = data.train.tokens[:]
    starts = np.concatenate([[0], np.flatnonzero(ids == 1)[:-1] + 1])
    assert (ids[starts] == 0).all()
    assert np.count_nonzero(ids == 0) == data.train.documents


def test_texts_are_cut_in_batches_of_so_many_bytes() -> None:
    """The library takes some 60 bytes for one of a text, so that a batch of a thousand large ones is many."""
    large, small = (0, "x" * BATCH_BYTES, False), (1, "x" * (BATCH_BYTES // 4), False)
    assert [len(batch) for batch in in_batches([large, large, *[small] * 9])] == [1, 1, 4, 4, 1]


def test_training_a_tokenizer_on_text_without_spaces_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    train_tokenizer(["=" * 500_000, "a1" * 100_000, "x" * 300_000], vocab_size=400, model_max_length=8)
    assert time.monotonic() - begun < 30  # it was over 200 s
    ordinary = [Path(__file__).read_text()]
    bounded = train_tokenizer(ordinary, vocab_size=400, model_max_length=8).get_vocab()
    monkeypatch.setattr("outgrow.train.data.tokenizer._bounded", lambda text: [text])
    assert bounded == train_tokenizer(ordinary, vocab_size=400, model_max_length=8).get_vocab()
