"""Cleaning: what normalising does, which documents go, and that what goes is what brute force finds."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import across, prepare, report
from outgrow.train.corpus import duplicates as module
from outgrow.train.corpus.across import have_near
from outgrow.train.corpus.benchmarks import read_benchmarks, write_benchmarks
from outgrow.train.corpus.duplicates import band_keys, bands, exact, keys, near, signature
from outgrow.train.corpus.normalise import normalised
from outgrow.train.corpus.read.steps import digest_of
from outgrow.train.corpus.words import ngrams, word_hashes, words
from outgrow.train.data import DataSettings
from outgrow.train.data.settings import CleaningSettings, disagreements


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("cafe\u0301", "caf\u00e9"),
        ("\ufeffa\x00b\x1b[0m", "ab[0m"),
        ("def f():\n\treturn 1  \n    \n", "def f():\n\treturn 1"),
        ("\n\n  a\n\n\n\n\nb\n", "  a\n\n\nb"),
        (" \t\n", ""),
        (" " * 100_000 + "x", " " * 100_000 + "x"),  # in time that grows with the text, not with its square
    ],
)
def test_normalising(text: str, expected: str) -> None:
    assert normalised(text) == expected == normalised(expected)


def test_words_of_ascii_are_those_that_any_text_has() -> None:
    numbers = np.random.default_rng(0)
    text = bytes(numbers.integers(0, 128, 20_000, dtype=np.uint8)).decode()
    # a letter that is not ASCII takes the general way
    assert words(text) == words(text + " \u00e4")[:-1]
    assert words("It's a_B 2\x00x\x1c\x7fy") == ["it", "s", "a_b", "2", "x", "y"]


def test_ngrams_are_equal_where_the_words_are() -> None:
    hashes = word_hashes(words("One two, three! ONE two three four"))
    runs = ngrams(hashes, 3)
    assert len(runs) == 5
    assert runs[0] == runs[3]
    assert len(set(runs.tolist())) == 4
    assert ngrams(word_hashes(["one", "two"]), 3).shape == (1,)
    assert ngrams(word_hashes(["b", "a"]), 2) != ngrams(word_hashes(["a", "b"]), 2)


# ---- duplicates --------------------------------------------------------------------------------------------


def edited(count: int, seed: int = 0) -> list[list[str]]:
    """Texts of 200 words, each with some words of an earlier one exchanged."""
    numbers = np.random.default_rng(seed)
    texts = [[f"w{n}" for n in numbers.integers(0, 3000, 200)] for _ in range(count // 4)]
    while len(texts) < count:
        text = list(texts[numbers.integers(len(texts))])
        for place in numbers.integers(0, 200, numbers.integers(0, 14)):
            text[place] = f"w{numbers.integers(0, 3000)}"
        texts.append(text)
    return texts


def jaccard(a: list[str], b: list[str]) -> float:
    one, two = ({tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (a, b))
    return len(one & two) / len(one | two)


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    return edited(160)


@pytest.fixture(scope="module")
def signatures(texts: list[list[str]]) -> np.ndarray:
    return np.stack([signature(word_hashes(text)) for text in texts])


def near_of(signatures: np.ndarray, folder: Path, threshold: float = 0.8) -> dict[int, tuple[int, float]]:
    shape, documents = bands(threshold), np.arange(len(signatures))
    rows = (band_keys(signatures[part], documents[part], shape) for part in np.array_split(documents, 3))
    found: dict[int, tuple[int, float]] = {}
    for match in near(rows, len(signatures) * shape[0], folder, lambda wanted: signatures[wanted], threshold):
        for document, earlier, similarity in zip(
            match.documents.tolist(), match.earlier.tolist(), match.similarity.tolist(), strict=True
        ):
            assert earlier < document
            found[document] = min(found.get(document, (earlier, similarity)), (earlier, similarity))
    return found


@pytest.mark.slow
def test_the_estimate_is_the_similarity(texts: list[list[str]], signatures: np.ndarray) -> None:
    pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
    true = np.array([jaccard(texts[i], texts[j]) for i, j in pairs])
    estimate = np.array([(signatures[i] == signatures[j]).mean() for i, j in pairs])
    assert (true > 0.3).sum() > 100
    assert np.abs(estimate - true).max() < 0.2  # 4.5 standard deviations of 128 draws
    assert abs((estimate - true)[true > 0.3].mean()) < 0.02


@pytest.mark.slow
def test_near_duplicates_are_those_that_brute_force_finds(
    texts: list[list[str]], signatures: np.ndarray, tmp_path: Path
) -> None:
    found = near_of(signatures, tmp_path)
    alike = {
        i: max(((jaccard(texts[i], texts[j]), j) for j in range(i)), default=(0.0, -1))
        for i in range(len(texts))
    }
    sure = {i for i, (similarity, _) in alike.items() if similarity > 0.9}
    assert len(sure) > 20
    assert sure <= set(found)
    assert all(alike[i][0] > 0.65 for i in found)
    assert len(found) < len(texts) / 2
    for i, (j, similarity) in found.items():
        assert similarity == pytest.approx((signatures[i] == signatures[j]).mean())


def test_less_memory_finds_the_same(
    signatures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = near_of(signatures, tmp_path)
    monkeypatch.setattr(module, "MEMORY_BYTES", 1000)  # some 35 files
    seen, inner = [], np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *given: seen.append(len(rows := inner(*given))) or rows)
    assert near_of(signatures, tmp_path) == whole
    assert len(seen) > 20
    assert max(seen) * module.KEY.itemsize < 6000  # of 35,000
    assert not list(tmp_path.iterdir())


def test_texts_without_words_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    assert not near_of(np.stack([signature(word_hashes([]))] * 3), tmp_path)


def test_exact_duplicates_need_every_bit(tmp_path: Path) -> None:
    found = list(
        exact([keys(np.array([5, 5, 7, 5]), np.array([1, 2, 1, 1]), np.array([10, 11, 12, 13]))], 4, tmp_path)
    )
    assert [(match.documents.tolist(), match.earlier.tolist()) for match in found] == [([13], [10])]


def test_what_a_document_costs_on_disk() -> None:
    shape = bands(0.8)
    assert shape == (14, 9)
    assert (module.KEY.itemsize, module.PERMUTATIONS * 4 + shape[0] * module.KEY.itemsize) == (24, 848)


# ---- across the split --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_near_copies_across_the_split_are_those_that_brute_force_finds(texts: list[list[str]]) -> None:
    shingles = [np.unique(ngrams(word_hashes(text), 5)) for text in texts]
    nearest = [max(jaccard(text, other) for other in texts[20:120]) for text in texts[:20]]
    for threshold in (0.5, 0.8, 1.0):
        wanted = [similarity >= threshold for similarity in nearest]
        assert have_near(shingles[:20], shingles[20:120], threshold).tolist() == wanted
        assert 0 < sum(wanted) < 20
    assert have_near([], shingles, 0.8).tolist() == []
    assert have_near(shingles[:2], [], 0.8).tolist() == [False, False]


def put_down(folder: Path, texts: list[str], **changes: object) -> DataSettings:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DataSettings(
        "t",
        "files",
        folder=f"{folder}-tokens",
        path=str(folder),
        vocab_size=300,
        validation_fraction=0.3,
        **changes,
    )  # type: ignore[arg-type]


def documents_of(settings: DataSettings) -> list[str]:
    rows = pyarrow.parquet.read_table(settings.home / "documents.parquet").to_pylist()
    return [row["split"] for row in rows]


def cleaning_of(settings: DataSettings) -> dict[str, dict[str, object]]:
    return dict(json.loads((settings.home / "manifest.json").read_text())["cleaning"])


@pytest.mark.slow
def test_near_copies_across_the_split_are_told_with_the_figure(
    texts: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = texts[:90]
    settings = put_down(tmp_path / "texts", [" ".join(text) for text in texts])
    prepare(settings, progress=False)
    sides = documents_of(settings)
    trained = [text for text, side in zip(texts, sides, strict=True) if side == "train"]
    held_out = [text for text, side in zip(texts, sides, strict=True) if side == "validation"]
    near = sum(max(jaccard(text, other) for other in trained) >= 0.8 for text in held_out)
    assert 0 < near < len(held_out)
    told = cleaning_of(settings)["near_copies_across"]
    assert told == {
        "validation_documents": len(held_out),
        "near_training": near,
        "similarity": 0.8,
        "words": "prose",
        "looked_at": 1.0,
    }
    assert (
        f"validation: {near} of {len(held_out)} documents, {near / len(held_out):.1%}, have a near copy in "
        "training" in capsys.readouterr().err
    )
    assert f"near copies in training: {near} of {len(held_out)} validation" in report.prepared(settings.home)
    # where they are removed, none is left to tell
    cleaned = replace(settings, clean=CleaningSettings(near_duplicates=0.8))
    prepare(cleaned, progress=False)
    assert "near_copies_across" not in cleaning_of(cleaned)
    assert "near copy in training" not in capsys.readouterr().err


@pytest.mark.slow
def test_of_a_large_corpus_a_part_is_looked_at(
    texts: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(across, "LOOK_DOCUMENTS", 120)
    settings = put_down(tmp_path / "texts", [" ".join(text) for text in texts])
    prepare(settings, progress=False)
    told = cleaning_of(settings)["near_copies_across"]
    assert told["validation_documents"] == documents_of(settings)[:120].count("validation")
    assert told["looked_at"] == pytest.approx(120 / 160, rel=0.02)
    assert f"(looked for in {told['looked_at']:.1%} of the text)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("texts", [["one text", "one text", "two texts"], ["a b c d e f"] * 3])
@pytest.mark.parametrize("seed", range(4))
def test_copies_stay_on_one_side_where_a_part_would_be_empty(
    tmp_path: Path, texts: list[str], seed: int
) -> None:
    settings = put_down(tmp_path / "texts", texts, seed=seed)
    data = prepare(settings, progress=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data.tokenizer_folder)
    sides = [
        set(tokenizer.decode(split.tokens[: split.count]).split(tokenizer.eos_token))
        for split in (data.train, data.validation)
    ]
    assert sides[0] & sides[1] == {""}


# ---- benchmarks --------------------------------------------------------------------------------------------

RUN = "a b c d e f g h i j k l m"


def overlap(folder: Path, text: str) -> str | None:
    """The first thing that a text has in common with the benchmarks in a folder."""
    write_benchmarks(str(folder), folder.parent / "ngrams.npz")
    found = words(text)
    hits = read_benchmarks(folder.parent / "ngrams.npz", time.monotonic_ns()).overlaps(
        found, word_hashes(found)
    )
    return hits[0][1] if hits else None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "one.jsonl").write_text(json.dumps({"id": 1, "parts": [{"prompt": f"x y {RUN}"}, "short"]}))
    (folder / "two.txt").write_text(" ".join(f"n{i}" for i in range(20)))
    pyarrow.parquet.write_table(
        pyarrow.table({"q": [" ".join(f"p{i}" for i in range(20))], "n": [1]}), folder / "three.parquet"
    )
    return folder


def test_thirteen_words_in_a_row_are_an_overlap(folder: Path) -> None:
    assert overlap(folder, f"before {RUN.upper().replace(' ', ', ')} after") == f"one.jsonl: {RUN}"
    assert overlap(folder, f"before {RUN[:-2]} after") is None  # twelve
    assert overlap(folder, "z " + " ".join(f"p{i}" for i in range(3, 20))) == "three.parquet: " + " ".join(
        f"p{i}" for i in range(3, 16)
    )
    assert overlap(folder, RUN.replace("g", "q")) is None
    assert overlap(folder, "short") is None


def test_what_cannot_be_looked_for_is_counted(folder: Path) -> None:
    counts = write_benchmarks(str(folder), folder.parent / "ngrams.npz")
    ngrams = {"ngrams": 3 + 8 + 8, "ngram_words": 13, "short_words": 6}
    assert counts == {"files": 3, "texts": 4, "short": 0, "too_short": 1, **ngrams}
    for name in ("one.jsonl", "three.parquet"):
        (folder / name).unlink()
    (folder / "two.txt").write_text("too short")
    with pytest.raises(UserError, match=r"data\.clean\.benchmarks=.*: not one text of 6 words in 1 files"):
        write_benchmarks(str(folder), folder.parent / "ngrams.npz")
    (folder / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json: neither JSON nor JSON lines"):
        write_benchmarks(str(folder), folder.parent / "ngrams.npz")


# ---- the whole ---------------------------------------------------------------------------------------------


@pytest.fixture
def settings(
    tmp_path: Path, folder: Path, texts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> DataSettings:
    monkeypatch.setattr("outgrow.train.corpus.read.files.TASK_BYTES", 9000)
    corpus = tmp_path / "texts"
    corpus.mkdir()
    lines = [" ".join(text) for text in texts[:100]]
    lines[50] = lines[7]  # a copy,
    lines[51] = lines[8] + "  \r\n"  # a copy once normalised,
    lines[52] = "\ufeff"  # nothing then,
    lines[53] = f"{RUN} {lines[53]}"  # and one that has seen the test
    for name, part in (("a", lines[:60]), ("b", lines[60:])):
        (corpus / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in part))
    clean = CleaningSettings(
        normalise=True, exact_duplicates=True, near_duplicates=0.8, benchmarks=str(folder)
    )
    return DataSettings(
        "t",
        "files",
        folder=str(tmp_path / "tokens"),
        path=str(corpus),
        vocab_size=300,
        validation_fraction=0.2,
        clean=clean,
    )


def removed(settings: DataSettings) -> dict[str, tuple[str, str]]:
    rows = pyarrow.parquet.read_table(settings.home / "removed.parquet").to_pylist()
    return {row["document"]: (row["reason"], row["detail"]) for row in rows}


@pytest.mark.slow
def test_every_document_is_kept_or_listed_with_its_reason(settings: DataSettings) -> None:
    data = prepare(settings, progress=False)
    found = removed(settings)
    assert found["a.jsonl:51"] == ("exact_duplicate", "1.000 a.jsonl:8")
    assert found["a.jsonl:52"] == ("exact_duplicate", "1.000 a.jsonl:9")
    assert found["a.jsonl:53"] == ("empty_after_normalising", "")
    assert found["a.jsonl:54"] == ("benchmark_overlap", f"one.jsonl: {RUN}")
    alike = {name: detail for name, (reason, detail) in found.items() if reason == "near_duplicate"}
    assert len(alike) > 10
    assert all(0.8 <= float(detail.split()[0]) <= 1 for detail in alike.values())
    assert data.train.documents + data.validation.documents + len(found) == 100
    counts = json.loads((settings.home / "manifest.json").read_text())["cleaning"]
    assert {reason: count["documents"] for reason, count in counts["removed"].items()} == {
        reason: sum(found == reason for found, _ in found.values()) for reason in dict(found.values())
    }
    assert counts["near_duplicates"] == {
        "words": "prose",
        "shingle_words": 5,
        "permutations": 128,
        "bands": 14,
        "rows": 9,
    }
    assert counts["benchmarks"]["ngrams"] == 19


@pytest.mark.slow
def test_cleaning_is_the_same_for_any_number_of_workers(settings: DataSettings, tmp_path: Path) -> None:
    contents = []
    for count in (1, 3):
        changed = replace(settings, folder=str(tmp_path / f"tokens{count}"), workers=count)
        prepare(changed, progress=False)
        contents.append({path.name: path.read_bytes() for path in changed.home.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_another_benchmark_builds_again(settings: DataSettings, folder: Path) -> None:
    prepare(settings, progress=False)
    (folder / "four.txt").write_text(" ".join(f"q{i}" for i in range(20)))
    prepare(settings, progress=False)
    assert json.loads((settings.home / "manifest.json").read_text())["cleaning"]["benchmarks"]["files"] == 4


def test_a_similarity_that_cannot_be_is_told() -> None:
    faults = disagreements(DataSettings("t", "stdlib", clean=CleaningSettings(near_duplicates=80)))
    assert faults == ["data.clean.near_duplicates: must be a similarity between 0.5 and 1, or null; found 80"]


def test_equal_texts_have_equal_digests() -> None:
    assert digest_of(b"a") == digest_of(b"a") != digest_of(b"b")
    assert len(digest_of(b"")) == 16
