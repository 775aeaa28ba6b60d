"""Benchmarks while a network trains: logged beside the loss, and the run is the same with them as without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helpers.toy import rows
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.compose import compose, settings_from
from outgrow.train.settings import BenchmarkSettings, settings_hash
from outgrow.train.suite.suite import BenchmarkTask, Suite, load_suite

TASK = """task: piqa
dataset_path: json
dataset_kwargs: {data_files: {test: piqa.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ITEMS = [
    {"question": "def", "choices": ["name", "import"], "answer": 0},
    {"question": "import", "choices": ["return", "os"], "answer": 1},
]


@pytest.mark.slow
def test_benchmarks_are_logged_and_change_nothing(overrides: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "piqa.yaml").write_text(TASK)
    (tmp_path / "tasks" / "piqa.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    plain = dataclasses.replace(compose(overrides), out=str(tmp_path / "plain"))
    suite = load_suite("commonsense")
    asked = BenchmarkSettings(suite, str(tmp_path / "tasks"), ("piqa",), 2 * plain.train.batch_tokens, None)
    measured = dataclasses.replace(plain, out=str(tmp_path / "measured"), evaluate=asked)
    assert settings_hash(plain) == settings_hash(measured)
    folders = [loop.train(plain), loop.train(measured)]
    found = rows(folders[1], "benchmark")
    assert [row["step"] for row in found] == [2, 4, 6]
    assert all(row["piqa"] in (0.0, 0.5, 1.0) for row in found)
    assert not rows(folders[0], "benchmark")
    losses = [[row["val_loss"] for row in rows(folder, "eval")] for folder in folders]
    assert losses[0] == losses[1]
    steps = [[row["loss"] for row in rows(folder, "train")] for folder in folders]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["evaluate.suite=comonsense"], "evaluate: suite=comonsense: .* did you mean 'commonsense'"),
        (["evaluate.suite=commonsense", "evaluate.only=[piqaa]"], "did you mean 'piqa'"),
        (["evaluate.suite=commonsense", "evaluate.every_tokens=0"], "must be positive"),
        (["evaluate.every_tokens=1000"], "of which suite"),
        (["evaluate.suite=commonsense", "sharding=full"], "needs the whole network"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_trained(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose(["growth=scratch", "target=tiny_target", *given])


SCRATCH = ["growth=scratch", "target=tiny_target"]


def test_a_suite_of_ones_own_is_found_where_its_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "suite").mkdir()
    task = "{task: piqa, group: own, shots: 0, metric: acc}"
    (tmp_path / "suite/mine.yaml").write_text(f"name: mine\ntasks: [{task}]\n")
    (tmp_path / "suite/wrong.yaml").write_text("name: wrong\ntasks: [{task: piqa}]\n")
    settings = compose([*SCRATCH, "evaluate.suite=mine"], tmp_path)
    expected = Suite("mine", (BenchmarkTask("piqa", "own", 0, "acc"),))
    assert settings.evaluate.suite == expected
    # as a run records it, and is read where its folder is not named
    recorded = json.loads(json.dumps(dataclasses.asdict(settings)))
    assert settings_from(recorded).evaluate == settings.evaluate
    for name, own, words in (
        ("mine", None, "evaluate: suite=mine: unknown suite; known: "),
        ("mnie", tmp_path, "evaluate: suite=mnie: unknown suite; did you mean 'mine'?"),
        ("wrong", tmp_path, "3 faults:\n  - evaluate.suite.tasks[0].group: missing"),
    ):
        with pytest.raises(UserError) as told:
            compose([*SCRATCH, f"evaluate.suite={name}"], own)
        assert str(told.value).startswith(words)
