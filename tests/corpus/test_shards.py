"""Tokens on disk: what is written is the text, it is built once, whole or not at all, and rebuilt when it has
to be."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare
from outgrow.train.corpus.read.corpora import documents, open_corpus
from outgrow.train.corpus.read.steps import digest_of
from outgrow.train.corpus.tokenise import held_out
from outgrow.train.data import DataSettings, TokenData, open_data
from outgrow.train.data.settings import CleaningSettings
from outgrow.train.data.shards import Tokens, dtype_of

SKIPPED = ("empty_skipped", "too_long_skipped", "binary_skipped", "broken_skipped", "programs_failed")
WORDS = [
    "the",
    "model",
    "grows",
    "a",
    "wider",
    "layer",
    "and",
    "a",
    "deeper",
    "one",
    "while",
    "its",
    "logits",
    "stay",
]


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    """Forty documents, the last with broken UTF-8, in shards of 500 tokens."""
    texts = tmp_path / "texts"
    texts.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(" ".join(numbers.choice(WORDS, 60)))
    (texts / "99.txt").write_bytes(b"caf\xe9")
    return DataSettings(
        "t",
        "files",
        folder=str(tmp_path / "tokens"),
        path=str(texts),
        vocab_size=280,
        validation_fraction=0.2,
        shard_tokens=500,
    )


def build(settings: DataSettings) -> TokenData:
    return prepare(settings, progress=False)


def is_validation(text: str, settings: DataSettings) -> bool:
    return held_out(digest_of(text.encode()), settings)


def stamp(settings: DataSettings) -> int:
    return settings.home.stat().st_ino


# ---- what is written ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tokens_are_the_documents_each_with_its_end(settings: DataSettings) -> None:
    data = build(settings)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_folder)
    seen = set()
    for split in (data.train, data.validation):
        wanted = [
            d
            for d in documents(settings, open_corpus(settings))
            if is_validation(d.text, settings) == (split.name == "validation")
        ]
        ids = split.tokens[:]
        assert ids.dtype == np.dtype("<u2")
        assert tokenizer.decode(ids) == "".join(document.text + "<|endoftext|>" for document in wanted)
        assert (split.documents, split.bytes) == (
            len(wanted),
            sum(len(document.text.encode()) for document in wanted),
        )
        assert np.count_nonzero(ids == data.end_of_text_id) == len(wanted) > 1
        assert split.bytes_per_token == split.bytes / len(ids)
        seen |= {document.name for document in wanted}
    assert len(seen) == 41
    assert data.vocab_size == 280


@pytest.mark.slow
def test_the_manifest_says_what_was_read(settings: DataSettings) -> None:
    build(settings)
    manifest = json.loads((settings.home / "manifest.json").read_text())
    counts = {"documents": 41, "bytes": sum(split["bytes"] for split in manifest["splits"].values())}
    assert manifest["read"] == {
        "empty_skipped": 0,
        "utf8_replaced": 1,
        "too_long_skipped": 0,
        "binary_skipped": 0,
        "broken_skipped": 0,
        "programs_failed": 0,
        **counts,
    }
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    for name, split in manifest["splits"].items():
        raw = b"".join(path.read_bytes() for path in sorted(settings.home.glob(f"{name}-*.bin")))
        assert split["sha256"] == hashlib.sha256(raw).hexdigest()
        assert [shard["tokens"] for shard in split["shards"][:-1]] == [500] * (len(split["shards"]) - 1)
        assert sum(shard["tokens"] for shard in split["shards"]) == split["tokens"]
    assert len(manifest["splits"]["train"]["shards"]) > 2
    assert sorted(path.name for path in settings.home.parent.iterdir()) == ["texts", "tokens", "tokens.lock"]


@pytest.mark.slow
def test_the_tokenizer_never_sees_the_validation_part(settings: DataSettings) -> None:
    for path in Path(settings.path or "").iterdir():
        text = "zq" * 200 + path.name
        if is_validation(text, settings):
            path.write_text(text)
    vocabulary = AutoTokenizer.from_pretrained(build(settings).tokenizer_folder).get_vocab()
    assert not [entry for entry in vocabulary if "zq" in entry]
    assert max(map(len, vocabulary.keys() - {"<|endoftext|>"})) > 3


@pytest.mark.slow
def test_a_given_tokenizer_is_taken(settings: DataSettings, tmp_path: Path) -> None:
    first = build(settings)
    own = shutil.copytree(first.tokenizer_folder, tmp_path / "own")
    second = build(replace(settings, folder=str(tmp_path / "second"), tokenizer=str(own), vocab_size=300))
    assert second.fingerprint == first.fingerprint


def test_wide_vocabularies_take_four_bytes() -> None:
    assert [dtype_of(size).itemsize for size in (2048, 65536, 65537)] == [2, 2, 4]


@pytest.mark.slow
def test_reading_stops_with_the_document_that_reaches_the_limit(settings: DataSettings) -> None:
    whole = build(settings)
    limited = build(replace(settings, limit_tokens=2500, limit_bytes=10**6))
    counts = limited.train.count + limited.validation.count
    assert 2500 <= counts < 2500 + 200 < whole.train.count
    assert (limited.train.tokens[:] == whole.train.tokens[: limited.train.count]).all()


@pytest.mark.parametrize("lengths", [[7], [3, 4], [1, 1, 5, 2]])
def test_tokens_slice_as_one_array(lengths: list[int]) -> None:
    whole = np.arange(sum(lengths), dtype=np.uint16)
    tokens = Tokens(np.split(whole, np.cumsum(lengths)[:-1]))
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 2):
            part = tokens[start:stop]
            assert (part.tolist(), part.dtype) == (whole[start:stop].tolist(), whole.dtype)
    assert tokens[-2:].tolist() == whole[-2:].tolist()


# ---- built once, and again when it has to be ---------------------------------------------------------------


@pytest.mark.slow
def test_what_is_there_is_opened_not_built(settings: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    first, before = build(settings), stamp(settings)
    monkeypatch.setattr("outgrow.train.corpus.build._build", lambda *_: pytest.fail("built again"))
    with monkeypatch.context() as patch:
        patch.setattr("outgrow.train.corpus.build.content_of", lambda *_: pytest.fail("read again"))
        assert build(replace(settings, name="other")).fingerprint == first.fingerprint
        words = CleaningSettings(words="code")  # without near_duplicates nothing is compared by them
        assert build(replace(settings, clean=words)).fingerprint == first.fingerprint
    os.utime(Path(settings.path or "") / "00.txt", (1, 1))  # touched, not changed
    moved = settings.home.parent / "moved"
    shutil.copytree(settings.path or "", moved)
    assert build(replace(settings, path=str(moved))).fingerprint == first.fingerprint
    assert stamp(settings) == before


@pytest.mark.slow
def test_a_folder_of_the_format_before_is_read_as_it_is(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, path = build(settings), settings.home / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["format"] = 2
    for later in ("max_broken", "data_dir", "validation_path"):
        del manifest["settings"][later]
    del manifest["settings"]["clean"]["words"]
    path.write_text(json.dumps(manifest))
    monkeypatch.setattr("outgrow.train.corpus.build._build", lambda *_: pytest.fail("built again"))
    assert build(settings).fingerprint == first.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["content", "new file", "renamed", "vocab_size", "seed", "validation_fraction", "shard_tokens"]
)
def test_a_change_builds_again(settings: DataSettings, change: str) -> None:
    first, before, texts = build(settings), stamp(settings), Path(settings.path or "")
    kept = first.train.tokens[:].copy()
    if change == "content":
        text = (texts / "00.txt").read_text()
        (texts / "00.txt").write_text(text[::-1])  # as long as before
    elif change == "new file":
        (texts / "41.md").write_text("more")
    elif change == "renamed":
        (texts / "00.txt").rename(texts / "zz.txt")
    else:
        value = getattr(settings, change)
        settings = replace(settings, **{change: value + 1 if isinstance(value, int) else value + 0.2})
    second = build(settings)
    assert stamp(settings) != before
    # how the tokens are laid out is not what they are
    assert (second.fingerprint == first.fingerprint) == (change == "shard_tokens")
    assert (first.train.tokens[:] == kept).all()  # who has it open goes on reading what it had


@pytest.mark.slow
def test_rebuilding_the_same_gives_the_same_bytes(settings: DataSettings) -> None:
    build(settings)
    before = {path: path.read_bytes() for path in settings.home.rglob("*") if path.is_file()}
    shutil.rmtree(settings.home)
    build(settings)
    assert {path: path.read_bytes() for path in settings.home.rglob("*") if path.is_file()} == before


PROCESS = """
import sys, outgrow.train.corpus.build as build
from outgrow.train.data.settings import CleaningSettings, DataSettings
inner = build._build
build._build = lambda *all: (print("built"), inner(*all))
settings = eval(sys.argv[1])
sys.stdin.read()  # all start together
print(build.prepare(settings, progress=False).fingerprint)
"""


@pytest.mark.slow
def test_of_several_processes_one_builds(settings: DataSettings) -> None:
    command = [sys.executable, "-c", PROCESS, repr(settings)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.flush()
    for process in running:
        process.stdin.close()  # type: ignore[union-attr]
    outputs = [process.stdout.read().split() for process in running]  # type: ignore[union-attr]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert sum(output.count("built") for output in outputs) == 1
    assert {output[-1] for output in outputs} == {build(settings).fingerprint}


# ---- faults ------------------------------------------------------------------------------------------------


def test_a_build_that_fails_leaves_nothing_that_opens(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # between the last shard and the manifest
    monkeypatch.setattr("outgrow.train.corpus.pipeline.short", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(settings)
    assert sorted(path.name for path in settings.home.parent.iterdir()) == [
        "texts",
        "tokens.lock",
        "tokens.partial",
    ]
    for folder in (settings.home, settings.home.with_name("tokens.partial")):
        with pytest.raises(UserError, match=r"no tokens here|no token folder"):
            open_data(folder)


@pytest.mark.slow
def test_a_rebuild_that_fails_keeps_the_former(settings: DataSettings) -> None:
    first, texts = build(settings), Path(settings.path or "")
    (texts / "broken.jsonl").write_text("no JSON")
    with pytest.raises(UserError, match=r"broken\.jsonl:1"):
        build(settings)
    assert open_data(settings.home).fingerprint == first.fingerprint


def test_the_remains_of_a_killed_build_are_swept_away(settings: DataSettings) -> None:
    partial = settings.home.with_name("tokens.partial")
    partial.mkdir()
    (partial / "train-00099.bin").write_bytes(b"left over")
    build(settings)
    assert not partial.exists()
    assert not (settings.home / "train-00099.bin").exists()


@pytest.mark.parametrize("limit", [1000, 20000])  # the text does not fit; a shard does not
def test_a_full_disk_is_told_and_leaves_nothing_that_opens(settings: DataSettings, limit: int) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    for i in range(40):
        (Path(settings.path or "") / f"more{i}.txt").write_text(" ".join([f"{i}", *WORDS * 40]))
    settings = replace(settings, shard_tokens=10**6)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        with pytest.raises(UserError, match=r"tokens.*not be written \(.*\).* (free space|make room)"):
            build(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert not settings.home.exists()
    assert build(settings).train.documents > 40  # with room again, the same command goes on


def test_a_folder_that_is_something_else_is_left_alone(settings: DataSettings) -> None:
    settings.home.mkdir()
    build(settings)  # an empty one serves
    for changed in (
        replace(settings, folder=settings.path),
        replace(settings, folder=f"{settings.path}/00.txt"),
    ):
        with pytest.raises(UserError, match="there, but no token folder"):
            build(changed)
    assert (Path(settings.path or "") / "00.txt").is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda home: os.truncate(home / "train-00001.bin", 998),
            r"train-00001\.bin should have 1000 bytes, has 998; delete the folder",
        ),
        (
            lambda home: (home / "validation-00000.bin").unlink(),
            r"validation-00000\.bin should have 1000 bytes, is missing",
        ),
        (lambda home: (home / "manifest.json").write_text('{"settings": '), r"manifest\.json cannot be read"),
        (lambda home: (home / "manifest.json").write_text("[]"), r"manifest\.json is not a manifest"),
        (
            lambda home: (home / "tokenizer" / "tokenizer.json").unlink(),
            r"tokenizer/tokenizer\.json is missing",
        ),
    ],
)
def test_damage_is_told_before_anything_is_read(settings: DataSettings, damage: object, message: str) -> None:
    build(settings)
    damage(settings.home)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        build(settings)


def test_opening_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokens here"):
        open_data(tmp_path / "nowhere")


def test_a_corpus_without_text_or_without_one_split_is_refused(
    settings: DataSettings, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"not one document in the text \(left out: 1 empty\)"):
        build(replace(settings, path=str(tmp_path / "empty")))
    with pytest.raises(UserError, match=r"not one validation document among the first 1 tokens"):
        build(replace(settings, limit_tokens=1))
    with pytest.raises(UserError, match=r"2 faults:\n.*validation_fraction.*\n.*vocab_size"):
        build(replace(settings, validation_fraction=0.0, vocab_size=0))


@pytest.mark.slow
def test_progress_is_shown_on_stderr_or_not_at_all(
    settings: DataSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    build(settings)
    assert capfd.readouterr() == ("", "")
    prepare(replace(settings, vocab_size=290))
    out, err = capfd.readouterr()
    assert out == ""
    assert "settings changed: vocab_size 280 → 290" in err
    assert "tokenising" in err
