"""`outgrow evaluate` on local tasks: each score measured once, published rows beside ours, the same score
after a lossless growth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from helpers.tasks import QUESTIONS, write_task
from outgrow.experiments.suite.__main__ import main
from outgrow.experiments.suite.evaluate import (
    Evaluated,
    Scores,
    are_others,
    checkpoint_of,
    evaluate,
    settings_from,
    titles,
)
from outgrow.experiments.suite.figure import draw
from outgrow.experiments.suite.table import markdown, published
from outgrow.model.base.errors import UserError
from outgrow.train.suite.suite import load_suite


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny network, tasks, and the network grown without loss."""
    from outgrow.growth import grow
    from outgrow.model.build import build_model
    from outgrow.model.presets import preset
    from outgrow.train.data.tokenizer import save_tokenizer, train_tokenizer

    place = tmp_path_factory.mktemp("place")
    text = " ".join(f"{item['question']}{''.join(item['choices'])}" for item in QUESTIONS) * 20  # type: ignore[arg-type]
    tokenizer = train_tokenizer([text], vocab_size=300, model_max_length=128)
    build_model(preset("tiny_source") | {"vocab_size": 512}, seed=0).save_pretrained(place / "small")
    save_tokenizer(tokenizer, place / "small")
    grow(
        place / "small",
        place / "large",
        target={"intermediate_size": 2 * preset("tiny_source")["intermediate_size"]},
    )
    (place / "tasks").mkdir()
    for name in ("piqa", "boolq"):
        write_task(place / "tasks", name)
    return place


def keys(place: Path, *more: str) -> list[str]:
    return [f"tasks={place / 'tasks'}", f"out={place / 'out'}", "only=[piqa,boolq]", *more]


@pytest.mark.slow
def test_a_lossless_growth_keeps_every_score_and_none_is_measured_twice(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    runs = [str(place / "small"), str(place / "large")]
    assert main([*runs, *keys(place)]) == 0
    said = capsys.readouterr().out
    assert said.count(": piqa ") == said.count(": boolq ") == 2
    assert said.startswith("small: piqa ")
    result = json.loads((place / "out" / "phi_2.json").read_text())
    small, large = result["runs"]
    assert small["scores"] == large["scores"]
    assert set(small["scores"]) == {"piqa", "boolq"}
    assert (place / "out" / "phi_2.png").stat().st_size > 10_000
    from outgrow.train.suite.harness import Harness

    monkeypatch.setattr(Harness, "load", lambda *_, **__: pytest.fail("measured again"))
    again = evaluate(runs, settings_from(keys(place)))
    assert [each.scores for each in again] == [small["scores"]] * 2


def test_a_score_on_local_items_is_none_of_the_published_benchmark(place: Path, tmp_path: Path) -> None:
    suite, tasks = load_suite("phi_2"), tmp_path / "tasks"
    piqa = next(task for task in suite.tasks if task.task == "piqa")
    for name in ("piqa", "boolq"):
        write_task(tasks, name)

    def scores(*given: str) -> Scores:
        return Scores(tmp_path / "out", place / "small", settings_from(given))

    scores(f"tasks={tasks}").put(piqa, {"value": 0.5})
    assert scores(f"tasks={tasks}").get(piqa) == 0.5
    assert scores().get(piqa) is None
    assert scores(f"tasks={place / 'out'}").get(piqa) is None
    (tasks / "boolq.jsonl").write_text("{}")
    assert scores(f"tasks={tasks}").get(piqa) == 0.5
    (tasks / "piqa.jsonl").write_text("{}")
    assert scores(f"tasks={tasks}").get(piqa) is None


def test_local_items_are_told_in_every_table() -> None:
    suite = load_suite("commonsense")
    ours = Evaluated("mine", Path("x"), {"piqa": 0.5}, {"commonsense": None}, None, ("piqa",))
    told = markdown(suite, [ours])
    assert told.count("**mine (local items)**") == 2
    assert "Local items: piqa of ours" in told


def test_a_local_file_may_say_that_it_holds_the_benchmarks_own_items(tmp_path: Path) -> None:
    for name in ("piqa", "boolq"):
        write_task(tmp_path, name)
    with (tmp_path / "boolq.yaml").open("a") as file:
        file.write("metadata: {version: 1.0, benchmark_items: true}\n")
    assert are_others(tmp_path, "piqa")
    assert not are_others(tmp_path, "boolq")
    assert not are_others(tmp_path, "arc_easy"), "no local file"
    assert not are_others(None, "piqa")


@pytest.mark.parametrize(
    ("suite", "row"),
    [("phi_2", "| Phi-1.5 | – | 64.5 | 54.0 | 40.2 | 35.9 | – |"), ("commonsense", "| Phi-1.5 | 75.2 |")],
)
def test_a_published_average_stands_beside_the_same_benchmarks_alone(suite: str, row: str) -> None:
    """Phi-2's 68.8 is of five benchmarks. Where a source gives none, or of others, it is the mean as of ours."""
    ours = Evaluated("mine", Path("x"), {}, {}, None)
    told = markdown(load_suite(suite), [ours])
    assert row in told
    assert ("| Phi-2 |" in told) == (suite == "phi_2")


@pytest.mark.slow
def test_what_stops_keeps_what_was_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from outgrow.train.suite.harness import Harness

    measured: list[str] = []
    score: Any = Harness.score

    def once(self: Any, asked: Any, *rest: Any, **more: Any) -> Any:
        if measured:
            raise KeyboardInterrupt
        measured.append(asked.task)
        return score(self, asked, *rest, **more)

    monkeypatch.setattr(Harness, "score", once)
    assert main([str(place / "small"), *keys(place, f"out={place / 'stopped'}")]) == 130
    assert [path.stem for path in (place / "stopped" / "scores").rglob("*.json")] == ["piqa"]


def test_the_table_sets_ours_beside_what_was_published() -> None:
    suite = load_suite("phi_2")
    ours = Evaluated(
        "mine",
        Path("x"),
        {"gsm8k_cot": 0.125},
        {task.group: None for task in suite.tasks} | {"math": 0.125},
        10,
    )
    told = markdown(suite, [ours])
    assert "| Phi-2 | 59.2 | 68.8 | 62.0 | 61.1 | 53.7 | – |" in told
    assert "| **mine** | – | – | – | 12.5 | – | – |" in told
    assert "| Gemini Nano 2 | 42.4 | – | – | – | – | – |" in told
    assert "| gsm8k_cot | – | – | 40.2 | 44.6 | 12.5 |" in told
    assert "| boolq | 79.3 | – | 75.8 | 72.8 | – |" in told
    assert "the first 10 items" in told


def test_published_rows_name_their_source_and_columns_of_the_suite() -> None:
    suite = load_suite("phi_2")
    tasks, groups = {task.task for task in suite.tasks}, {task.group for task in suite.tasks}
    for row in published():
        assert row.source.startswith(("https://", "arXiv "))
        assert row.note
        assert set(row.tasks) <= tasks
        assert set(row.groups) <= groups
        assert all(
            0 < value < 100 and math.isfinite(value) for value in (*row.groups.values(), *row.tasks.values())
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("error:constrained_layout not applied")
@pytest.mark.parametrize("name", ["mine", "SmolLM2-135M-Instruct.Q4_1-b4c0df2190a1"])
@pytest.mark.parametrize("limit", [None, 100])
def test_the_picture_has_room_for_names_and_a_panel_for_each_group_that_has_a_number(
    tmp_path: Path, name: str, limit: int | None
) -> None:
    suite = load_suite("commonsense")
    draw(
        suite,
        [Evaluated(name, tmp_path, {}, {task.group: None for task in suite.tasks}, limit, ("piqa",))],
        tmp_path / "p.png",
    )
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["limt=3"], "did you mean 'limit'"),
        (["batch=0"], "must be positive"),
        (["limit=0"], "must be positive"),
        (["suite=phi_3"], "phi_2"),
        (["dtype=int8"], "float32"),
    ],
)
def test_wrong_settings_are_told(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings_from(given)


def test_what_is_no_checkpoint_or_has_no_tokenizer_is_refused(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match=r"neither a run's folder nor a checkpoint"):
        checkpoint_of(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="the run has not ended"):
        checkpoint_of(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (place / "small").glob("*"):
        if "token" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    # it is told before any data are fetched
    monkeypatch.setattr("outgrow.train.suite.harness.Harness.load", None)
    assert main([str(place / "small"), str(bare), *keys(place)]) == 2
    assert f"{bare}: it has no tokenizer" in capsys.readouterr().err
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(UserError, match=r"text\.gguf: is no GGUF file"):
        checkpoint_of(tmp_path / "text.gguf")
    with pytest.raises(UserError, match="a file; give the folder that holds it"):
        checkpoint_of(bare / "config.json")
    assert main([]) == 2
    assert "give runs or checkpoints" in capsys.readouterr().err


def test_runs_whose_folders_have_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = ["grown/small", str(tmp_path / "runs/small/final"), "runs/large", "."]
    assert titles(runs) == ["grown/small", str(tmp_path / "runs/small/final"), "large", Path.cwd().name]
    assert titles(runs[1:]) == ["small", "large", Path.cwd().name]


def test_a_suite_of_ones_own_is_read_from_the_folder_that_holds_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own/suite").mkdir(parents=True)
    task = "{task: piqa, group: own, shots: 0, metric: acc}"
    Path("own/suite/mine.yaml").write_text(f"name: mine\ntasks: [{task}]\n")
    Path("own/suite/wrong.yaml").write_text("name: wrong\ntasks: [{task: piqa}]\n")
    monkeypatch.setattr(Scores, "get", lambda *_: 0.5)
    assert main([str(place / "small"), "suite=mine", "--config-dir", "own"]) == 0
    assert "| **small** | 50.0 |" in capsys.readouterr().out
    for given, told in (
        ("suite=mine", "error: suite=mine: unknown suite; known: "),
        ("suite=mine -cd none", "error: -cd none: no such folder; give the one that holds your leaves"),
        ("suite=wrong --config-dir own", "error: 3 faults:\n  - suite.tasks[0].group: missing"),
    ):
        assert main([str(place / "small"), *given.split()]) == 2
        assert capsys.readouterr().err.startswith(told)
