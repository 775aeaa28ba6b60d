"""The trained tokenizer is deterministic and reversible; a given one is checked before it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from outgrow.model.base.errors import UserError
from outgrow.train.data.shards import TokenData
from outgrow.train.data.tokenizer import (
    PLAIN,
    check_vocabulary,
    encoder,
    entries,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    tokenizer_identity,
    train_tokenizer,
    write_encoder,
)

TEXTS = [Path(__file__).read_text(), "Grüße, 世界 🙂\n\n\tdef f(x):\r\n    return x"] * 2
AGAIN = """
import sys; from outgrow.train.data.tokenizer import *
texts = sys.stdin.read().split("\\0")
print(tokenizer_hash(train_tokenizer(texts, vocab_size=400, model_max_length=64)))
"""


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=400, model_max_length=64)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """What an encoder makes of a text, without its end."""
    (found,) = encoder(tokenizer).encode([text])
    assert found[-1] == tokenizer.eos_token_id
    return found[:-1]


@pytest.mark.slow
def test_another_process_with_another_order_and_thread_count_trains_the_same(
    trained: PreTrainedTokenizerFast,
) -> None:
    environment = {
        "RAYON_NUM_THREADS": "1",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PATH": "",
        "PYTHONUTF8": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", AGAIN],
        input="\0".join(TEXTS[::-1]).encode(),
        env=environment,
        capture_output=True,
        check=True,
    )
    assert result.stdout.decode().strip() == tokenizer_hash(trained)


def test_every_text_comes_back(trained: PreTrainedTokenizerFast) -> None:
    for text in [*TEXTS, " never seen: ½ ∮ \x00 é", "", " "]:
        assert trained.decode(ids(trained, text)) == text


def test_the_folder_is_a_tokenizer_to_others(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(trained, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert (loaded.eos_token, loaded.eos_token_id, loaded.model_max_length, entries(loaded)) == (
        "<|endoftext|>",
        0,
        64,
        400,
    )
    assert loaded(TEXTS[1]).input_ids == ids(trained, TEXTS[1])
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(trained)


def unigram() -> PreTrainedTokenizerFast:
    """A tokenizer of another kind, whose own call begins with <s>, and with a token of its own."""
    scores = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in ("▁", "a", "▁a"))]
    inner = Tokenizer(models.Unigram(scores, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.add_tokens(["aa"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"], "pad_token": "<pad>"})
    return tokenizer


def files_of(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, bytes]:
    save_tokenizer(tokenizer, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_tokenizer_of_no_models_own_is_read_as_auto_tokenizer_reads_it(
    kind: str,
    name: str,
    trained: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "tokenizer"
    save_tokenizer(trained if kind == "bpe" else unigram(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
    by_auto = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)  # it is not asked
    loaded = load_tokenizer(str(folder))
    assert type(loaded) is type(by_auto)
    assert write_encoder(loaded) == write_encoder(by_auto)
    assert files_of(loaded, tmp_path / "own") == files_of(by_auto, tmp_path / "auto")


@pytest.mark.parametrize("change", [{"auto_map": {}}, {"tokenizer_class": "GPT2Tokenizer"}, None])
def test_a_models_own_tokenizer_is_read_by_auto_tokenizer(
    change: dict[str, Any] | None,
    trained: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_tokenizer(trained, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | (change or {})))
    if change is None:
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    asked: list[str] = []

    def from_pretrained(source: str, **_: Any) -> PreTrainedTokenizerFast:
        asked.append(source)
        return trained

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    load_tokenizer(str(tmp_path))
    assert asked == [str(tmp_path)]


@pytest.mark.slow
def test_torch_is_not_imported_for_a_tokenizer_of_no_models_own(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_tokenizer(trained, tmp_path)
    program = (
        "import sys; from outgrow.train.data.tokenizer import import_library, load_tokenizer; "
        "import_library(None); import_library(sys.argv[1]); load_tokenizer(sys.argv[1]); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=True, text=True
    )
    assert result.stdout == "False\n"


def test_an_end_of_text_in_a_text_is_text(trained: PreTrainedTokenizerFast) -> None:
    found = ids(trained, "a<|endoftext|>b")
    assert 0 not in found
    assert trained.decode(found) == "a<|endoftext|>b"
    assert not trained.backend_tokenizer.encode_special_tokens  # the tokenizer itself is not changed


def test_identity_follows_how_a_folders_tokenizer_cuts(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_tokenizer(trained, tmp_path)
    before = tokenizer_identity(str(tmp_path))
    (tmp_path / "README.md").write_text("about")
    assert tokenizer_identity(str(tmp_path)) == before
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text() + " ")
    assert tokenizer_identity(str(tmp_path)) == before
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert tokenizer_identity(str(tmp_path)) != before
    assert (tokenizer_identity("owner/name"), tokenizer_identity(None)) == ("owner/name", None)


def test_entries_count_ids_beyond_a_hole(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(trained, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["never merged"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert entries(load_tokenizer(str(tmp_path))) == 1000


def test_tokenizers_that_do_not_serve_are_refused(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer=nobody/nothing: cannot be loaded"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(UserError, match=r"cannot be loaded .*give a folder"):
        load_tokenizer(str(tmp_path))
    PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no eos token"):
        load_tokenizer(str(tmp_path))


def test_a_vocabulary_larger_than_the_models_is_refused() -> None:
    data = TokenData(Path(), None, None, vocab_size=300, end_of_text_id=0, fingerprint="")  # type: ignore[arg-type]
    check_vocabulary(data, 300)
    with pytest.raises(UserError, match=r"tokenizer has 300 entries, the model's vocab_size is 299"):
        check_vocabulary(data, 299)
