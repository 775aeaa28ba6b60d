"""Where a result goes whose folder nobody named."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.runs import SOURCE, fabricate
from outgrow.experiments.__main__ import main
from outgrow.experiments.placing import RECORD, by_hand, placed
from outgrow.experiments.study_file import results_folder


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
