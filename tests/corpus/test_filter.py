"""The educational-value filter: the stored forest is scikit-learn's, the embedding is the model's, and the
best share is exactly that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import brier_score_loss, precision_score, recall_score
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare
from outgrow.train.corpus.__main__ import main
from outgrow.train.corpus.filter.embed import load_again, load_encoder
from outgrow.train.corpus.filter.fit import FitSettings, fit, read_labels, report
from outgrow.train.corpus.filter.forest import ARRAYS, Forest, load
from outgrow.train.corpus.filter.rules import RULES, label, measure
from outgrow.train.corpus.filter.score import threshold
from outgrow.train.data import DataSettings
from outgrow.train.data.settings import CleaningSettings, disagreements
from outgrow.train.data.tokenizer import save_tokenizer, train_tokenizer

NUMBERS = np.random.default_rng(0)


# ---- the forest --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> tuple[RandomForestClassifier, np.ndarray]:
    features = NUMBERS.standard_normal((400, 6)).astype(np.float32)
    labels = (features[:, 0] * features[:, 1] + 0.5 * NUMBERS.standard_normal(400) > 0).astype(int)
    forest = RandomForestClassifier(30, min_samples_leaf=2, random_state=0).fit(features[:300], labels[:300])
    return forest, np.concatenate(
        [features, np.round(features, 1), forest.estimators_[0].tree_.threshold[:6][None].astype(np.float32)]
    )


CARD: dict[str, Any] = {"embedding": {"dimensions": 6}}


def test_a_stored_forest_scores_as_scikit_learn_does_to_the_bit(
    fitted: tuple[RandomForestClassifier, np.ndarray], tmp_path: Path
) -> None:
    classifier, features = fitted
    Forest.of(classifier).save(tmp_path, CARD)
    stored, card = load(tmp_path)
    expected = classifier.predict_proba(features)[:, 1]
    assert (stored.scores(features) == expected).all()
    assert len(np.unique(expected)) > 100
    assert card["embedding"] == {"dimensions": 6}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filter.json", "forest.safetensors"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("left", lambda a: a.__setitem__(0, 0), "a child is no node that follows"),  # a cycle would never end
        ("right", lambda a: a.__setitem__(0, 10**9), "a child is no node that follows"),
        ("feature", lambda a: a.__setitem__(0, 6), "a feature is none of the embedding's"),
        ("roots", lambda a: a.__setitem__(0, -5), "a root is no node"),
        ("value", lambda a: a.__setitem__(0, np.nan), "a value is no probability"),
    ],
)
def test_a_damaged_forest_is_refused_before_it_is_followed(
    fitted: tuple[RandomForestClassifier, np.ndarray],
    tmp_path: Path,
    name: str,
    change: Callable[[np.ndarray], None],
    message: str,
) -> None:
    forest = Forest.of(fitted[0])
    change(getattr(forest, name))
    forest.save(tmp_path, CARD)
    with pytest.raises(UserError, match=f"damaged .{message}"):
        load(tmp_path)


def test_what_is_no_filter_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no filter"):
        load(tmp_path)
    (tmp_path / "filter.json").write_text("{}")
    (tmp_path / ARRAYS).write_bytes(b"pickle")
    with pytest.raises(UserError, match="no filter"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("distinct", [3, 10**6])
def test_the_best_share_is_exact_with_ties(keep: float, distinct: int) -> None:
    scores = (NUMBERS.integers(0, distinct, 1000) / distinct).astype(np.float32)
    scores[::7] = np.nan
    there = np.sort(scores[~np.isnan(scores)])[::-1]
    found = threshold(lambda: np.array_split(scores, 9), keep)
    kept = int(np.ceil(keep * len(there)))
    assert (found["scored"], found["kept"], found["threshold"]) == (len(there), kept, there[kept - 1])
    assert found["ties"] == kept - (there > there[kept - 1]).sum()
    assert threshold(lambda: [scores[:0]], keep)["kept"] == 0


# ---- embeddings --------------------------------------------------------------------------------------------

TEXTS = [
    f"def function_{i}(argument):\n    '''Return {i}.'''\n    return argument + {i}\n" * (1 + i % 5)
    for i in range(40)
] + [""]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=280, model_max_length=64), folder)
    return folder


@pytest.fixture(scope="module")
def source(
    tmp_path_factory: pytest.TempPathFactory,
    phi_config: dict[str, Any],
    checkpoint_maker: Callable[..., Path],
    tokenizer_folder: Path,
) -> Path:
    folder = checkpoint_maker(
        tmp_path_factory.mktemp("source") / "model", {**phi_config, "vocab_size": 280}, "float32"
    )
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
def test_a_text_is_the_mean_hidden_state_of_the_causal_model(source: Path) -> None:
    found = load_encoder(str(source), None, 48).embed(TEXTS)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(source),
    )
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"][:48]
        if ids:
            with torch.no_grad():
                states = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(vector, states, rtol=1e-4, atol=1e-4 * np.abs(states).max())
        else:
            assert not vector.any()
    assert max(len(tokenizer(text)["input_ids"]) for text in TEXTS) > 48


def test_a_long_text_is_read_in_windows(source: Path) -> None:
    encoder, text = load_encoder(str(source), None, 150), "".join(TEXTS[:20])
    assert encoder.window == 64  # of the model
    ids = encoder.tokenizer(text)["input_ids"][:150]
    parts = []
    for start in (0, 64, 128):
        with torch.no_grad():
            parts.append(
                encoder.model(
                    input_ids=torch.tensor([ids[start : start + 64]])[:, : 150 - start]
                ).last_hidden_state[0]
            )
    expected = torch.cat(parts)[:150].mean(0).numpy()
    np.testing.assert_allclose(
        encoder.embed([text])[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )


def test_any_encoder_of_hugging_face_will_do(tmp_path: Path, tokenizer_folder: Path) -> None:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    BertModel(BertConfig(vocab_size=280, **sizes)).save_pretrained(tmp_path / "bert")
    for path in tokenizer_folder.iterdir():
        (tmp_path / "bert" / path.name).write_bytes(path.read_bytes())
    encoder = load_encoder(str(tmp_path / "bert"), None, 100)
    assert encoder.embed(TEXTS[:3]).shape == (3, 16)


def test_an_encoder_that_changed_or_is_not_whole_is_refused(source: Path, tmp_path: Path) -> None:
    embedding = {
        "encoder": str(source),
        "revision": None,
        "max_tokens": 48,
        "sha256": load_encoder(str(source), None, 48).digest,
    }
    assert load_again(embedding).digest == embedding["sha256"]
    with pytest.raises(UserError, match="not the one that the filter was fitted on"):
        load_again(embedding | {"sha256": "0" * 64})
    with pytest.raises(UserError, match=r"encoder=nobody/nothing: cannot be loaded"):
        load_encoder("nobody/nothing", None, 48)
    from safetensors.torch import load_file, save_file

    weights = load_file(source / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, such as .*q_proj"):
        load_encoder(str(tmp_path), None, 48)


# ---- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"document": "a", "label": 2}', "l:1: expected"),
        ('{"document": "a", "label": 1}\n{"document": "a", "label": 0}', "l:2: a has another label above"),
        ("\n{", "l:2: not JSON"),
        ("[1]", "l:1: expected"),
    ],
)
def test_labels_that_are_none_are_told(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "l").write_text(lines)
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path / "l")


def test_the_report_is_what_scikit_learn_reports() -> None:
    labels, scores = NUMBERS.integers(0, 2, 500), NUMBERS.random(500)
    scores = np.clip(scores * 0.7 + labels * 0.3, 0, 1)
    found = report(labels, scores)
    assert found["precision"] == pytest.approx(precision_score(labels, scores >= 0.5), abs=1e-4)
    assert found["recall"] == pytest.approx(recall_score(labels, scores >= 0.5), abs=1e-4)
    assert found["brier"] == pytest.approx(brier_score_loss(labels, scores), abs=1e-4)
    best = np.argsort(-scores)[:50]
    assert found["best"][0] == {
        "kept": 0.1,
        "precision": pytest.approx(labels[best].mean()),
        "recall": found["best"][0]["recall"],
    }
    assert sum(row["samples"] for row in found["calibration"]) == 500
    perfect = report(np.array([0] * 50 + [1] * 50), np.array([0.0] * 50 + [1.0] * 50))
    assert (perfect["precision"], perfect["recall"], perfect["brier"], perfect["calibration_error"]) == (
        1,
        1,
        0,
        0,
    )


def test_the_rules_measure_what_they_say() -> None:
    good = '"""What this module is about, in a sentence."""\n' + "".join(
        f'def compute_{name}(value):\n    """Return the value, {name} and well."""\n    return value\n\n\n'
        for name in ("first", "second", "third") * 6
    )
    assert label(good)[0] == 1
    assert measure(good)["docstring_share"] == 1
    table = good + "TABLE = {\n" + "    0x41: 'a',\n" * 40 + "}\n"
    assert measure(table)["table_share"] > 0.25
    for text, broken in (
        ("def f(:", "Python can parse it"),
        (good.replace('"""', "#"), "half of its functions and classes"),
        (table, "less than a quarter of its lines are tables"),
        (
            good.replace("compute_", "f_").replace("value", "x").replace("third", "c"),
            "4 letters",
        ),
    ):
        value, _, reasons = label(text)
        assert value == 0
        assert any(broken in reason for reason in reasons), (broken, reasons)
    assert set(label("x = 1")[2]) <= set(RULES)


# ---- the whole ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred documents, half of them code, half tables."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(100):
        text = TEXTS[i % 40] + f"# {i}" if i % 2 else " ".join(map(str, NUMBERS.integers(0, 9999, 60)))
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def filter_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path, source: Path) -> Path:
    folder = tmp_path_factory.mktemp("filter")
    lines = [
        json.dumps({"document": f"{i:02d}.txt", "label": i % 2, "annotator": "a test"}) for i in range(80)
    ]
    (folder / "labels.jsonl").write_text("\n".join(lines))
    settings = FitSettings(
        str(source), None, max_tokens=48, trees=20, min_samples_leaf=2, held_out=0.4, seed=0
    )
    card = fit(
        settings, DataSettings("t", "files", path=str(corpus)), folder / "labels.jsonl", folder / "fitted"
    )
    assert card["held_out"]["precision"] == card["held_out"]["recall"] == 1  # numbers are told from code
    assert 20 <= card["held_out"]["samples"] <= 44
    return folder / "fitted"


@pytest.fixture
def settings(
    corpus: Path, filter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DataSettings:
    monkeypatch.setattr("outgrow.train.corpus.read.files.TASK_BYTES", 2000)
    clean = CleaningSettings(filter=str(filter_folder), keep=0.3)
    return DataSettings(
        "t",
        "files",
        folder=str(tmp_path / "tokens"),
        path=str(corpus),
        vocab_size=280,
        validation_fraction=0.3,
        clean=clean,
    )


@pytest.mark.slow
def test_the_best_share_is_kept_and_the_rest_listed(settings: DataSettings) -> None:
    data = prepare(settings, progress=False)
    assert data.train.documents + data.validation.documents == 30
    kept = pyarrow.parquet.read_table(settings.home / "documents.parquet").to_pylist()
    gone = pyarrow.parquet.read_table(settings.home / "removed.parquet").to_pylist()
    assert len(kept) + len(gone) == 100
    assert {row["reason"] for row in gone} == {"low_score"}
    assert min(row["score"] for row in kept) >= max(float(row["detail"]) for row in gone) - 5e-4
    assert all(int(row["document"][:2]) % 2 for row in kept)  # code
    assert sum(row["tokens"] for row in kept) == data.train.count + data.validation.count
    found = json.loads((settings.home / "manifest.json").read_text())["cleaning"]["filter"]
    assert (found["keep"], found["scored"], found["kept"]) == (0.3, 100, 30)
    assert found["threshold"] == min(row["score"] for row in kept)


@pytest.mark.slow
def test_scores_are_not_computed_again_after_a_kill(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(replace(settings, folder=settings.home.with_name("whole").as_posix()), progress=False)
    calls: list[int] = []

    def counted(inner: Callable[..., Any], stop: int) -> Callable[..., Any]:
        def scores(self: Any, texts: list[str]) -> np.ndarray:
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(len(texts))
            return inner(self, texts)

        return scores

    from outgrow.train.corpus.filter.score import Filter

    inner = Filter.scores
    monkeypatch.setattr(Filter, "scores", counted(inner, 3))
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, progress=False)
    monkeypatch.setattr(Filter, "scores", counted(inner, -1))
    assert prepare(settings, progress=False).fingerprint == whole.fingerprint
    assert sum(calls) == 100


@pytest.mark.slow
def test_another_filter_builds_again(settings: DataSettings, filter_folder: Path, tmp_path: Path) -> None:
    prepare(settings, progress=False)
    before = settings.home.stat().st_ino
    # only a place
    prepare(replace(settings, clean=replace(settings.clean, encoder="/nowhere/it/matters")), progress=False)
    assert settings.home.stat().st_ino == before
    other = tmp_path / "other"
    other.mkdir()
    for path in filter_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "filter.json").write_text((other / "filter.json").read_text() + "\n")
    prepare(replace(settings, clean=replace(settings.clean, filter=str(other))), progress=False)
    assert settings.home.stat().st_ino != before


def test_too_few_labels_and_unknown_documents_are_told(corpus: Path, source: Path, tmp_path: Path) -> None:
    settings = FitSettings(
        str(source), None, max_tokens=48, trees=5, min_samples_leaf=2, held_out=0.4, seed=0
    )
    data, labels = DataSettings("t", "files", path=str(corpus)), tmp_path / "l"
    labels.write_text('{"document": "01.txt", "label": 1}\n{"document": "elsewhere.txt", "label": 0}')
    with pytest.raises(UserError, match=r"1 of its documents are not in data=t, such as elsewhere\.txt"):
        fit(settings, data, labels, tmp_path / "out")
    labels.write_text('{"document": "01.txt", "label": 1}')
    with pytest.raises(UserError, match="at least 10 of each are needed"):
        fit(settings, data, labels, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_filter_and_keep_go_together() -> None:
    faults = disagreements(DataSettings("t", "stdlib", clean=CleaningSettings(keep=1.5)))
    assert [fault.split(":")[0] for fault in faults] == ["data.clean", "data.clean.keep"]


@pytest.mark.slow
def test_the_commands_label_fit_and_score(
    corpus: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"document": f"{i:02d}.txt", "label": i % 2}) for i in range(100)]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    common = [
        "data=files",
        f"data.path={corpus}",
        f"filter={tmp_path / 'f'}",
        "max_tokens=48",
        "trees=5",
        "held_out=0.4",
        "progress=false",
    ]
    main(["fit", *common, f"encoder={source}", f"labels={tmp_path / 'labels.jsonl'}"])
    assert "held out:" in capsys.readouterr().out
    main(["score", *common, f"scores={tmp_path / 's.parquet'}"])
    assert "100 documents" in capsys.readouterr().out
    scores = pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert [row["document"] for row in scores] == [f"{i:02d}.txt" for i in range(100)]
    main(["label", *common, f"labels={tmp_path / 'new.jsonl'}"])
    assert "0 documents labelled 1, 100 labelled 0. Demonstration labels" in capsys.readouterr().out
    assert len((tmp_path / "new.jsonl").read_text().splitlines()) == 100
