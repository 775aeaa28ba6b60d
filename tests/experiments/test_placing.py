"""Where a result goes whose folder nobody named."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from helpers.runs import SOURCE, fabricate
from outgrow.experiments.__main__ import main
from outgrow.experiments.footprint.__main__ import main as cost
from outgrow.experiments.footprint.footprint import CostSettings, Footprint
from outgrow.experiments.placing import RECORD, by_hand, placed
from outgrow.experiments.study_file import results_folder
from outgrow.experiments.suite.__main__ import main as evaluate
from outgrow.experiments.suite.evaluate import Evaluated, EvaluateSettings
from outgrow.model.base import locks
from outgrow.train.corpus.__main__ import main as inspect
from outgrow.train.run.beside import check_beside


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def runs_of(study: str, *seeds: int) -> list[str]:
    """Folders of scratch and an arm, of each seed."""
    own = {"study": study, "settings.study": study}
    folders = []
    for seed in seeds:
        names = [f"runs/{study}-{arm}-s{seed}" for arm in ("scratch", "tile")]
        folders.append(fabricate(Path(), "scratch", [8.0, 4.0], seed=seed, folder=names[0], **own))
        folders.append(
            fabricate(Path(), "tile", [7.0, 3.0], seed=seed, folder=names[1], source=SOURCE, **own)
        )
    return list(map(str, folders))


def filled(default: Path, *inputs: str) -> Path:
    """The folder that a result of the inputs goes to."""
    with placed(None, default, inputs) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(" ".join(inputs))
    return folder


def test_a_comparison_by_hand_leaves_the_studys_own(capsys: pytest.CaptureFixture[str]) -> None:
    own = results_folder("tiny", full=False)
    own.mkdir(parents=True)
    (own / "report.html").write_text("the study's own")
    assert main(["compare", *runs_of("tiny", 0)]) == 0
    assert (own / "report.html").read_text() == "the study's own"
    assert "runs/comparison-tiny-by-hand/report.html" in capsys.readouterr().out


def test_the_full_extent_of_a_study_leaves_the_result_of_the_shorter_one() -> None:
    full, short = results_folder("tiny", full=True), results_folder("tiny", full=False)
    assert (full, short) == (Path("runs/comparison-tiny-full"), Path("runs/comparison-tiny"))
    own = Path("experiments/mine")  # of the working directory, as in a clone
    own.mkdir(parents=True)
    (own / "study.yaml").touch()
    assert results_folder("mine", full=True) == own


def test_a_comparison_of_other_runs_gets_a_folder_beside(capsys: pytest.CaptureFixture[str]) -> None:
    first, further = runs_of("mine", 0), runs_of("mine", 1)
    assert main(["compare", *first]) == 0
    before = Path("runs/comparison-mine/report.html").read_text()
    assert "other runs" not in capsys.readouterr().out
    assert main(["compare", *further]) == 0
    said = "runs/comparison-mine holds a result of other runs; this one goes to runs/comparison-mine-2 (--out"
    assert said in capsys.readouterr().out
    assert Path("runs/comparison-mine/report.html").read_text() == before
    assert main(["compare", *first, *further]) == 0
    assert Path("runs/comparison-mine/report.html").read_text() != before  # more runs: the same, further on


def test_a_result_goes_over_one_of_the_same_runs_alone() -> None:
    default = Path("runs/horizons")
    assert filled(default, "a", "b") == default
    assert filled(default, "b", "a", "c") == default
    assert filled(default, "a") == Path("runs/horizons-2")
    assert filled(default, "d") == Path("runs/horizons-3")
    assert filled(default, "a", "d") == Path("runs/horizons-2")


@pytest.mark.parametrize("record", [None, "{", "7", '{"a": 1}'])
def test_what_was_not_made_by_hand_stays(record: str | None) -> None:
    folder = Path("runs/family")
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("someone's")
    if record is not None:
        (folder / RECORD).write_text(record)
    assert filled(folder, "b") == Path("runs/family-2")


def test_a_folder_that_was_named_is_taken_as_it_is_and_never_unasked() -> None:
    default = Path("runs/frontier")
    filled(default, "a")
    with placed(default, Path("elsewhere"), ["b"]) as folder:
        assert folder == default
    assert filled(default, "a") == Path("runs/frontier-2")


def test_a_result_that_was_not_written_takes_no_folder() -> None:
    default = Path("runs/family")
    assert main(["family", "no/run"]) == 2
    assert filled(default, "b") == default


def test_only_a_study_has_a_folder_of_its_own() -> None:
    assert by_hand("mine") == Path("runs/comparison-mine")
    assert by_hand("tiny") == Path("runs/comparison-tiny-by-hand")


def test_a_table_of_the_costs_of_other_models_gets_a_folder_beside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(names: list[str], settings: CostSettings) -> list[Footprint]:
        return [Footprint(name, "L4", "forecast", 1, 1) for name in names]

    monkeypatch.setattr("outgrow.experiments.footprint.footprint.footprints", rows)
    assert cost(["one"]) == 0
    before = Path("runs/cost/cost.md").read_text()
    assert cost(["other"]) == 0
    assert "this one goes to runs/cost-2 (out=DIR names another)" in capsys.readouterr().out
    assert Path("runs/cost/cost.md").read_text() == before
    assert "**other**" in Path("runs/cost-2/cost.md").read_text()
    assert cost(["other", "one"]) == 0
    assert "**other**" in Path("runs/cost/cost.md").read_text()


@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_a_suites_table_of_other_runs_gets_a_folder_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(runs: list[str], settings: EvaluateSettings) -> list[Evaluated]:
        groups = dict.fromkeys(task.group for task in settings.suite.tasks)
        return [Evaluated(run, Path(run), {}, groups, None) for run in runs]

    monkeypatch.setattr("outgrow.experiments.suite.evaluate.evaluate", scores)
    for given in (["one"], ["other"], ["one", "suite=commonsense"], ["other", "out=named"]):
        assert evaluate(given) == 0
    tables = {str(path): path.read_text() for path in Path().rglob("*.md")}
    expected = {
        "runs/evaluation/phi_2/phi_2.md": "one",
        "runs/evaluation/phi_2-2/phi_2.md": "other",
        "runs/evaluation/commonsense/commonsense.md": "one",
        "named/phi_2.md": "other",
    }
    assert tables.keys() == expected.keys()
    assert all(f"**{run}**" in tables[path] for path, run in expected.items())


@pytest.mark.parametrize("named", [None, Path("named")])
def test_two_commands_at_once_do_not_write_into_one_folder(
    named: Path | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.0)
    default = Path("runs/horizons")
    order: list[str] = []

    def second() -> None:
        with placed(named, default, ["b"]) as folder:
            order.append(str(folder))

    waiting = threading.Thread(target=second)
    with placed(named, default, ["a"]) as folder:
        waiting.start()
        time.sleep(0.3)
        (folder / "report.html").write_text("a")
        order.append(str(folder))
    waiting.join(60)
    assert order == (["named"] * 2 if named else ["runs/horizons", "runs/horizons-2"])
    assert "another command writes there; waiting for another process" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    for out in ("file", "file/below"):
        assert main(["compare", *runs_of(f"mine{len(out)}", 0), "--out", out]) == 2
        assert f"error: {out}: could not be written (" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "horizons", "frontier", "family", "predict --horizons 9"])
def test_no_result_is_written_among_a_runs_files(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, *others = runs_of("mine", 0)
    before = sorted(Path(run).rglob("*"))
    door, *more = command.split()
    for out, told in (
        (
            run,
            f"error: {run}: is a run's folder, and nothing is written among its files; name a folder beside",
        ),
        (
            f"{run}/tables",
            f"error: {run}/tables: lies in {Path(run).absolute()}, a run's folder, and nothing",
        ),
    ):
        assert main([door, run, *others, *more, "--out", out]) == 2
        said = capsys.readouterr().err
        assert said.startswith(told)
        assert said.endswith("(--out DIR)\n")
    assert sorted(Path(run).rglob("*")) == before


WHOLE = {
    "a run's folder": ("run.json",),
    "a checkpoint": ("config.json", "model-00001-of-00001.safetensors"),
    "a prepared text": ("manifest.json", "tokenizer"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_was_measured_is_not_written_into_what_it_was_measured_on(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("theirs").mkdir()
    *some, last = WHOLE[kind]
    for name in some:
        Path("theirs", name).touch()
    check_beside(Path("theirs"), "out=DIR")  # one of the names alone is anyone's
    Path("theirs", last).touch()
    named = ["theirs", "out=theirs"]
    doors: dict[Callable[[list[str]], object], list[str]] = {evaluate: named, cost: named}
    for door, given in {**doors, inspect: ["inspect", "folders=[theirs]", "out=theirs"]}.items():
        with suppress(SystemExit):
            assert door(given) == 2
        assert capsys.readouterr().err.startswith(f"error: theirs: is {kind}, and nothing is written among")


@pytest.mark.parametrize("name", ["table.md", "report.html"])
def test_a_file_of_someone_elses_is_not_written_over(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_of("mine", 0)
    Path("theirs").mkdir()
    Path("theirs", name).write_text("theirs")
    assert main(["compare", *runs, "--out", "theirs"]) == 2
    said = (
        f"error: theirs: {name} would be written over, and no earlier result of this kind is there; move it"
    )
    assert capsys.readouterr().err.startswith(said)
    assert [path.name for path in Path("theirs").iterdir()] == [name]
    Path("theirs", name).rename("theirs/kept.md")
    for _ in range(2):  # its own it may write over
        assert main(["compare", *runs, "--out", "theirs"]) == 0
    assert Path("theirs/kept.md").read_text() == "theirs"


def test_of_a_result_that_cannot_be_written_nothing_appears(capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_of("mine", 0)
    assert main(["compare", *runs, "--out", "named"]) == 0
    before = {path.name: path.read_bytes() for path in Path("named").iterdir() if path.name != "report.html"}
    Path("named/report.html").unlink()
    Path("named/report.html").mkdir()
    runs += runs_of("mine", 1)
    assert main(["compare", *runs, "--out", "named"]) == 2
    assert "error: named: report.html would be written over" in capsys.readouterr().err
    Path("named/report.html").rmdir()
    assert {path.name: path.read_bytes() for path in Path("named").iterdir()} == before


def test_a_path_that_leads_nowhere_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("loop").symlink_to("loop")
    for name in ("loop", "a" * 300):
        for arguments in ([name], [*runs_of(f"of{name[:1]}", 0), "--out", name]):
            assert main(["compare", *arguments]) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"error: {name}: c")
            assert said.count("\n") == 1


@pytest.mark.parametrize("command", [["compare"], ["horizons"], ["cost", "measure=false"], ["evaluate"]])
def test_a_run_that_may_not_be_read_is_told_in_a_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs_of("mine", 0)[0]

    def forbidden(path: Path, **more: object) -> object:
        if path.parent.name == Path(run).name:  # whoever tests may be root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return os.stat(path, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "stat", forbidden)
    door, *more = command
    doors = {"cost": cost, "evaluate": evaluate}
    arguments = [run, *more] if door in doors else [door, run]
    assert doors.get(door, main)(arguments) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"{run}: cannot be read (Permission denied)\n")
    assert said.count("\n") == 1


def test_an_empty_folder_that_was_there_stays_where_nothing_is_written() -> None:
    Path("theirs").mkdir()
    assert main(["family", "no/run", "--out", "theirs"]) == 2
    assert main(["family", "no/run", "--out", "ours"]) == 2
    assert Path("theirs").is_dir()
    assert not Path("ours").exists()


def test_a_fault_of_wandb_is_told_and_the_files_are_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def init(**options: object) -> None:
        raise PermissionError("not writable")

    monkeypatch.setattr(wandb, "init", init)
    assert main(["compare", *runs_of("mine", 0), "--wandb", "--out", "named"]) == 0
    said = "W&B: not mirrored (PermissionError: not writable); the files in named are complete\n"
    assert capsys.readouterr().err == said
    assert Path("named/report.html").is_file()
