"""Tokens that other tools made: every format read bit for bit, where it lies; the tokenizer is checked, cut
files are told."""

from __future__ import annotations

import difflib
import inspect
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare
from outgrow.train.data import DataSettings, TokenData
from outgrow.train.data.batches import batch, validation_batches
from outgrow.train.data.pretokenized import SAME, agreement, token_bytes
from outgrow.train.data.settings import CleaningSettings, disagreements
from outgrow.train.data.shards import check_data
from outgrow.train.data.token_files import describe
from outgrow.train.data.tokenizer import encoder, load_tokenizer, train_tokenizer

SOURCE = inspect.getsource(difflib)
TEXTS = [f"für naïve 模型 {SOURCE[i * 300 : i * 300 + 150 + 7 * (i % 20)]}" for i in range(60)]
VOCAB = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a byte-level BPE."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS[:30], vocab_size=VOCAB, model_max_length=256).save_pretrained(folder)
    return str(folder)


def cut(tokenizer: str, texts: list[str] = TEXTS) -> list[list[int]]:
    """The ids of each text, with their end of text."""
    loaded = load_tokenizer(tokenizer)
    return [
        [*encoder(loaded).tokenizer.encode(text, add_special_tokens=False).ids, loaded.eos_token_id]
        for text in texts
    ]


def flat(documents: list[list[int]], dtype: str = "<u2") -> np.ndarray:
    return np.concatenate(documents).astype(dtype)


# ---- the formats, written as their tools write them --------------------------------------------------------


def raw(path: Path, documents: list[list[int]], dtype: str = "<u2") -> Path:
    path.write_bytes(flat(documents, dtype).tobytes())
    return path


def datatrove(folder: Path, documents: list[list[int]], width: int = 2) -> Path:
    path = raw(folder / "00000.ds", documents, f"<u{width}")
    ends = np.cumsum([len(document) for document in documents])
    path.with_name("00000.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    path.with_name("00000.ds.metadata").write_text(f"gpt2|{width}\n{ends[-1]}\n1 kT")
    return path


def megatron(folder: Path, documents: list[list[int]], code: int = 8, dtype: str = "<u2") -> Path:
    path = raw(folder / "a_text_document.bin", documents, dtype)
    lengths = np.array([len(document) for document in documents], "<i4")
    places = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    index = head + lengths.tobytes() + places.tobytes() + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    path.with_suffix(".idx").write_bytes(index)
    return path


def olmo(folder: Path, documents: list[list[int]]) -> Path:
    return raw(folder / "part-0-00000.npy", documents)


def numpy_saved(folder: Path, documents: list[list[int]]) -> Path:
    np.save(folder / "saved.npy", flat(documents, "<i4"))
    return folder / "saved.npy"


def nanogpt(folder: Path, documents: list[list[int]]) -> Path:
    return raw(folder / "train.bin", documents)


def nanogpt_wide(folder: Path, documents: list[list[int]]) -> Path:
    return raw(folder / "wide.bin", documents, "<u4")


def llm_c(folder: Path, documents: list[list[int]]) -> Path:
    ids = flat(documents)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    (folder / "fineweb_train_000001.bin").write_bytes(header.tobytes() + ids.tobytes())
    return folder / "fineweb_train_000001.bin"


def megatron_wide(folder: Path, documents: list[list[int]]) -> Path:
    return megatron(folder, documents, 4, "<i4")


def datatrove_wide(folder: Path, documents: list[list[int]]) -> Path:
    return datatrove(folder, documents, 4)


Writer = Callable[[Path, list[list[int]]], Path]
FORMATS: list[Writer] = [
    datatrove,
    datatrove_wide,
    megatron,
    megatron_wide,
    olmo,
    numpy_saved,
    nanogpt,
    nanogpt_wide,
    llm_c,
]


@pytest.fixture(params=FORMATS, ids=lambda writer: writer.__name__)
def writer(request: pytest.FixtureRequest) -> Writer:
    return request.param


def settings(tmp_path: Path, tokenizer: str, path: Path, **more: object) -> DataSettings:
    plain = DataSettings(
        "t",
        "tokens",
        folder=str(tmp_path / "opened"),
        path=str(path),
        tokenizer=tokenizer,
        validation_fraction=0.2,
    )
    return replace(plain, **more)  # type: ignore[arg-type]


def opened(*arguments: object, **more: object) -> TokenData:
    return prepare(settings(*arguments, **more), progress=False)  # type: ignore[arg-type]


def test_every_format_is_read_where_it_lies(tmp_path: Path, tokenizer: str, writer: Writer) -> None:
    documents = cut(tokenizer)
    path = writer(tmp_path, documents)
    data = opened(tmp_path, tokenizer, path)
    ends = np.cumsum([len(document) for document in documents])
    held_out = next(end for end in ends if end >= ends[-1] - round(0.2 * ends[-1]))  # where a document ends
    assert np.array_equal(data.train.tokens[:], flat(documents)[:held_out])
    assert np.array_equal(data.validation.tokens[:], flat(documents)[held_out:])
    kept = int(np.searchsorted(ends, held_out)) + 1
    assert (data.train.documents, data.validation.documents) == (kept, 60 - kept)
    assert data.train.bytes == sum(len(text.encode()) for text in TEXTS[:kept])
    # nothing is copied
    assert sorted(file.name for file in (tmp_path / "opened").iterdir()) == ["manifest.json", "tokenizer"]
    assert data.end_of_text_id == 0
    assert data.vocab_size == VOCAB
    rows = batch(data.train, seed=0, step=0, batch_size=4, context=16)
    assert rows.shape == (4, 17)
    assert rows.dtype == np.int64
    assert next(validation_batches(data.validation, context=16, tokens=64)).max() < VOCAB
    check_data(tmp_path / "opened")


def test_the_same_ids_have_the_same_fingerprint_wherever_they_lie(tmp_path: Path, tokenizer: str) -> None:
    documents = cut(tokenizer)
    first = opened(tmp_path, tokenizer, olmo(tmp_path, documents))
    (tmp_path / "b").mkdir()
    moved = opened(tmp_path, tokenizer, nanogpt(tmp_path / "b", documents))
    assert moved.fingerprint == first.fingerprint
    inode = (tmp_path / "opened").stat().st_ino
    opened(tmp_path, tokenizer, tmp_path / "b" / "train.bin")
    assert (tmp_path / "opened").stat().st_ino == inode  # not read again
    other = opened(tmp_path, tokenizer, nanogpt(tmp_path / "b", documents[1:]))
    assert other.fingerprint != first.fingerprint


def test_several_files_each_give_their_end_or_some_are_given_to_validate_on(
    tmp_path: Path, tokenizer: str
) -> None:
    documents = cut(tokenizer)
    raw(tmp_path / "train.bin", documents[:40])
    raw(tmp_path / "val.bin", documents[40:])
    data = opened(tmp_path, tokenizer, tmp_path)
    assert data.train.count + data.validation.count == len(flat(documents))
    assert data.validation.tokens[:][-1] == 0
    given = opened(tmp_path, tokenizer, tmp_path, validation_path=str(tmp_path / "val.bin"))
    assert np.array_equal(given.train.tokens[:], flat(documents[:40]))
    assert np.array_equal(given.validation.tokens[:], flat(documents[40:]))
    assert (given.train.documents, given.validation.documents) == (40, 20)
    with pytest.raises(UserError, match="none is left to train on"):
        opened(tmp_path, tokenizer, tmp_path, validation_path=str(tmp_path))


def test_a_text_without_an_end_is_one_document(tmp_path: Path, tokenizer: str) -> None:
    ids = [i for document in cut(tokenizer) for i in document if i]
    data = opened(tmp_path, tokenizer, raw(tmp_path / "book.bin", [ids]))
    assert (data.train.documents, data.validation.documents) == (1, 1)
    assert data.validation.count == round(0.2 * len(ids))


def test_megatron_s_own_writer_is_read(tmp_path: Path) -> None:
    """Two documents, [5 6 | 7 8 0] of two sequences and [9 10 0], as megatron-core 0.16.1's
    IndexedDatasetBuilder wrote them."""
    (tmp_path / "a.bin").write_bytes(bytes.fromhex("0500060007000800000009000a000000"))
    index = (
        "4d4d494449445800000100000000000000080300000000000000030000000000000002000000030000000300000000000000000000000400000000000000"
        "0a00000000000000000000000000000002000000000000000300000000000000"
    )
    (tmp_path / "a.idx").write_bytes(bytes.fromhex(index))
    file = describe(tmp_path / "a.bin")
    assert file.ids(file.dtypes[0]).tolist() == [5, 6, 7, 8, 0, 9, 10, 0]
    assert [file.end(i) for i in range(2)] == [5, 8]
    assert [file.documents_before(place) for place in (0, 4, 5, 7, 8)] == [0, 0, 1, 1, 2]


def test_datatrove_s_own_files_are_read_as_it_reads_them(tmp_path: Path, tokenizer: str) -> None:
    writing, reading = (
        pytest.importorskip("datatrove.pipeline.tokens.tokenizer"),
        pytest.importorskip("datatrove.utils.dataset"),
    )
    documents = cut(tokenizer)
    file = writing.TokenizedFile(
        str(tmp_path), "00000.ds", tokenizer_name_or_path=tokenizer, save_final_metadata=True
    )
    for document in documents:
        file.write(document, None)
    file.close()
    theirs = reading.DatatroveFileDataset(str(tmp_path / "00000.ds"), seq_len=15)
    ours = describe(tmp_path / "00000.ds")
    assert (ours.documents, ours.tokenizer) == (60, tokenizer)
    read = np.concatenate([theirs[i]["input_ids"].numpy() for i in range(len(theirs))])
    assert np.array_equal(ours.ids(ours.dtypes[0])[: len(read)], read)
    assert len(read) > 500


# ---- whose tokens ------------------------------------------------------------------------------------------


def test_another_tokenizer_is_told(tmp_path: Path, tokenizer: str, writer: Writer) -> None:
    """It has as many entries, and learnt from another part of the same text."""
    other = train_tokenizer(TEXTS[30:], vocab_size=VOCAB, model_max_length=256)
    other.save_pretrained(tmp_path / "other")
    path = writer(tmp_path, cut(tokenizer))
    with pytest.raises(
        UserError, match=r"data\.tokenizer=.*other: it is not the tokenizer of .*of the ids are the same"
    ):
        opened(tmp_path, str(tmp_path / "other"), path)
    assert not (tmp_path / "opened").exists()


def test_the_share_that_is_the_same_tells_tokenizers_apart(tokenizer: str) -> None:
    near = train_tokenizer(TEXTS[:31], vocab_size=VOCAB, model_max_length=256)
    pieces = [np.array(document) for document in cut(tokenizer, TEXTS[30:])]
    assert agreement(iter(pieces), load_tokenizer(tokenizer)) == 1.0
    assert agreement(iter(pieces), near) < SAME
    # an id of nobody
    assert agreement(iter([np.array([VOCAB - 1, VOCAB])]), load_tokenizer(tokenizer)) == 0.0


def test_an_id_that_the_tokenizer_has_not_is_told_with_its_place(tmp_path: Path, tokenizer: str) -> None:
    ids = flat(cut(tokenizer))
    ids[1234] = VOCAB
    ids.tofile(tmp_path / "a.bin")
    with pytest.raises(
        UserError, match=r"a\.bin: the id at place 1,234 is 400, and data\.tokenizer has 400 entries"
    ):
        opened(tmp_path, tokenizer, tmp_path / "a.bin")


@pytest.mark.parametrize("writer", [datatrove, megatron])
def test_documents_that_end_with_another_token_are_told(
    tmp_path: Path, tokenizer: str, writer: Writer
) -> None:
    documents = [[*document[:-1], 5] for document in cut(tokenizer)]
    with pytest.raises(
        UserError,
        match=(
            r"do not end with the end of text .*'<\|endoftext\|>', 0\), most often with .* "
            r"\(5\).*--append-eod"
        ),
    ):
        opened(tmp_path, tokenizer, writer(tmp_path, documents))


def test_bytes_are_counted_from_ids(tokenizer: str) -> None:
    widths, loaded = token_bytes(load_tokenizer(tokenizer)), load_tokenizer(tokenizer)
    for document, line in zip(cut(tokenizer), TEXTS, strict=True):
        assert widths[document].sum() == len(line.encode())
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<s>": 0, "<0xE6>": 1, "▁ab": 2, "é": 3}
    pieces = Tokenizer(models.Unigram([(token, 0.0) for token in vocab], unk_id=0, byte_fallback=True))
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<s>")
    assert token_bytes(fast).tolist() == [0, 1, 3, 2]
    assert loaded.eos_token_id == 0


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [datatrove, datatrove_wide, megatron, megatron_wide, numpy_saved, llm_c])
@pytest.mark.parametrize("missing", [1, 2, 100])
def test_a_file_that_is_cut_off_is_told(tmp_path: Path, tokenizer: str, writer: Writer, missing: int) -> None:
    path = writer(tmp_path, cut(tokenizer))
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(UserError, match=rf"{path.name}: .*cut off or damaged"):
        opened(tmp_path, tokenizer, path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("missing", [1, 3])
def test_raw_ids_tell_of_a_cut_within_one(tmp_path: Path, tokenizer: str, missing: int) -> None:
    path = nanogpt(tmp_path, cut(tokenizer))
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(UserError, match="no whole number of ids"):
        opened(tmp_path, tokenizer, path)


@pytest.mark.parametrize("name", ["00000.ds.index", "00000.ds.metadata", "a_text_document.idx"])
@pytest.mark.parametrize("left", [0, 7, 33, 60])
def test_an_index_that_is_cut_off_is_told(tmp_path: Path, tokenizer: str, name: str, left: int) -> None:
    path = (megatron if name.endswith("idx") else datatrove)(tmp_path, cut(tokenizer))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: min(left, len(whole) - 12)])
    with pytest.raises(UserError, match="cut off or damaged"):
        opened(tmp_path, tokenizer, path)


def test_an_index_that_lies_is_told(tmp_path: Path, tokenizer: str) -> None:
    path = megatron(tmp_path, cut(tokenizer))
    index = bytearray(path.with_suffix(".idx").read_bytes())
    index[34 + 4 : 34 + 8] = struct.pack("<i", 2**31 - 1)
    path.with_suffix(".idx").write_bytes(index)
    with pytest.raises(UserError, match="do not lie one behind the other"):
        opened(tmp_path, tokenizer, path)
    index[9:18] = struct.pack("<QB", 1, 7)
    path.with_suffix(".idx").write_bytes(index)
    with pytest.raises(UserError, match="type 7 of an id"):
        opened(tmp_path, tokenizer, path)


def test_what_is_no_row_of_ids_is_told(tmp_path: Path, tokenizer: str) -> None:
    np.save(tmp_path / "two.npy", np.zeros((3, 4), np.int32))
    np.save(tmp_path / "real.npy", np.zeros(4, np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"(?s)4 faults:.*empty\.bin.*objects\.npy: an array.*real\.npy.*two\.npy"
    ):
        opened(tmp_path, tokenizer, tmp_path)
    with pytest.raises(UserError, match="no such token file"):
        opened(tmp_path, tokenizer, tmp_path / "none.bin")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"none of its 1 files ends in \.ds \.bin \.npy"):
        opened(tmp_path, tokenizer, tmp_path / "texts")


def test_a_loss_mask_is_not_passed_over(tmp_path: Path, tokenizer: str) -> None:
    path = datatrove(tmp_path, cut(tokenizer))
    path.with_name("00000.ds.loss").write_bytes(b"\x01")
    with pytest.raises(UserError, match="loss mask"):
        opened(tmp_path, tokenizer, path)


def test_types_that_differ_are_told(tmp_path: Path, tokenizer: str) -> None:
    llm_c(tmp_path, cut(tokenizer))
    numpy_saved(tmp_path, cut(tokenizer))
    with pytest.raises(
        UserError, match=r"ids of type uint16, and .*saved\.npy has int32; read them as two sources"
    ):
        opened(tmp_path, tokenizer, tmp_path)


def test_what_cannot_be_asked_of_tokens_is_told_at_once() -> None:
    asked = DataSettings("t", "tokens", limit_tokens=5, clean=CleaningSettings(normalise=True))
    assert [fault.split(":")[0] for fault in disagreements(asked)] == [
        "data.path",
        "data.tokenizer",
        "data.limit_tokens",
        "data.clean",
    ]


def test_a_file_that_changes_is_checked_again(tmp_path: Path, tokenizer: str) -> None:
    documents = cut(tokenizer)
    path = nanogpt(tmp_path, documents)
    before = opened(tmp_path, tokenizer, path)
    raw(path, documents[::-1])
    after = opened(tmp_path, tokenizer, path)
    assert after.fingerprint != before.fingerprint
    assert json.loads((tmp_path / "opened" / "manifest.json").read_text())["read"]["documents"] == 60
    path.unlink()
    with pytest.raises(UserError, match="no such token file"):
        opened(tmp_path, tokenizer, path)
