"""A run's name holds what changes its result; a sweep has a folder for each point, and survives one that
fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.runs import record_of
from helpers.toy import at, timeless, weights
from outgrow.experiments.runs import read_runs
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.run.folder import check_same, shorter_run
from outgrow.train.run.record import RunRecord
from outgrow.train.settings import identity
from outgrow.train.start.naming import _short, arm_changes, same_folder
from outgrow.train.start.neutral import is_neutral

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ["experiment=tiny_short", "growth=lossless"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ("", ""),
        ("seed=0 transfer=plain optimizer.learning_rate=0.003", ""),  # the defaults, spelt out
        ("transfer=continued", "-transfer_continued"),
        ("transfer.inherited_rate=0.1 schedule.rewarm=new", "-inherited_rate0.1-rewarm_new"),
        ("optimizer.learning_rate=1e-5", "-lr0.00001"),
        ("optimizer=muon optimizer.momentum=0.9", "-optimizer_muon-momentum0.9"),
        ("train.budget_tokens=2_048_000", "-budget_tokens2048000"),
        ("train.document_mask=true train.gradient_clip=null", "-document_mask_true-gradient_clip_none"),
        ("data.seed=3 optimizer.betas=[0.9,0.99]", "-data_seed3-betas_0.9_0.99"),
        ("data=files data.path=texts", "-data_files-path_texts"),
        (
            "data=prepared data.path=tokens/mine",
            "-data_prepared-path_tokens_mine",
        ),  # another one, another run
        (
            "data=tokens data.path=a.bin data.validation_path=b.bin data.tokenizer=gpt2",
            "-data_tokens-tokenizer_gpt2-path_a.bin-validation_path_b.bin",
        ),
        ("source=runs/mine-scratch-s0/final", "-source_mine_scratch_s0"),
        ("growth.noise=0.25", "-noise0.25"),
        ("target={hidden_size:96,num_hidden_layers:4}", "-hidden_size96-num_hidden_layers4"),
        ("mixture=tiny_textbooks", "-mixture_tiny_textbooks"),
        (
            "train.micro_batch=2 train.compile=true logger=none sharding=full train.attention=sdpa "
            "train.log_every_tokens=4096",
            "",
        ),
    ],
)
def test_a_name_holds_what_changes_the_result(overrides: str, changes: str) -> None:
    assert compose([*GIVEN, *overrides.split()]).name == f"tiny_short-lossless{changes}-s0"


@pytest.mark.slow
def test_a_name_that_is_given_stays(tmp_path: Path) -> None:
    assert compose([*GIVEN, "transfer=continued", "name=mine"]).name == "mine"
    assert compose([*GIVEN, "transfer=continued", "changes=''"]).name == "tiny_short-lossless-s0"


@pytest.mark.slow
def test_a_long_list_of_changes_ends_in_a_hash_and_stays_a_folder() -> None:
    target = ",".join(f"some_very_long_setting_{number}:{number}" for number in range(20))
    names = [compose([*GIVEN, f"target={{{target},last:{last}}}"]).name for last in (1, 2)]
    assert names[0] != names[1]
    assert all(len(name) < 200 and re.search(r"-more_[0-9a-f]{6}-s0$", name) for name in names)
    source = (
        compose([*GIVEN, f"source={'/long' * 20}/a"]).name,
        compose([*GIVEN, f"source={'/long' * 20}x/a"]).name,
    )
    assert source[0] != source[1]


@pytest.mark.slow
def test_what_is_in_no_name_is_told_by_the_sweep_before_it_trains() -> None:
    points = [["train.compile=true", "seed=0"], ["train.compile=false", "seed=0"]]
    (fault,) = same_folder([(point, compose([*GIVEN, *point]).out) for point in points])
    assert "2 points would train in" in fault
    assert "train.compile=true seed=0; train.compile=false seed=0" in fault
    assert same_folder([(point, compose([*GIVEN, *point]).out) for point in (["seed=0"], ["seed=1"])]) == []


def readme_commands() -> list[str]:
    texts = [
        (ROOT / "README.md").read_text(),
        *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))),
    ]
    door = r"^(?:torchrun \S+ \d+ -m outgrow\.train|outgrow train) (?!-m)"
    found = re.findall(door + r"([^#\n]*?)\s*(?:#.*)?$", "\n".join(texts), re.MULTILINE)
    return [command for command in found if "\\" not in command and "'" not in command]


@pytest.mark.slow
def test_no_two_commands_of_the_documents_share_a_folder_with_different_results() -> None:
    results: dict[str, tuple[str, str]] = {}
    commands = readme_commands()
    assert len(commands) >= 8
    for command in commands:
        try:
            settings = compose(command.split())
        except UserError:
            continue  # a placeholder stands in it
        result = json.dumps(identity(settings), sort_keys=True)
        assert results.setdefault(settings.out, (command, result))[1] == result, (
            command,
            results[settings.out][0],
        )


@pytest.mark.parametrize("place", range(5))
def test_all_rates_of_an_arm_with_a_long_name_are_of_one_arm(place: int) -> None:
    """Wherever a rate stands among the labels, and however long it is."""
    labels = [f"label{number}_{'x' * 36}" for number in range(4)]
    arms = set()
    for rate in ("lr0.1", "lr0.0000123"):
        told = _short([*labels[:place], rate, *labels[place:]])
        assert rate in told
        arms.add(tuple(arm_changes("-".join(told))))
    assert arms == {tuple(_short(labels))}
    assert _short(labels)[-1].startswith("more_")


# ---- the comparison ----------------------------------------------------------------------------------------


def finished(folder: Path, *overrides: str) -> Path:
    """A complete run's files, without the training."""
    settings = replace(compose([*GIVEN, *overrides]), out=str(folder / compose([*GIVEN, *overrides]).name))
    out = Path(settings.out)
    out.mkdir()
    (out / "run.json").write_text(json.dumps(record_of(settings).to_json()))
    rows = [{"kind": "eval", "tokens": t, "flops": 2.0 * t, "val_loss": 5 - t / 10} for t in (0, 20)]
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    summary = {
        "start_val_loss": 5.0,
        "final_val_loss": 3.0,
        "tokens": 20,
        "flops": 40.0,
        "bits_per_byte": 1.0,
    }
    (out / "summary.json").write_text(json.dumps(summary))
    return out


@pytest.mark.slow
def test_arms_are_told_apart_by_what_not_all_of_them_change(tmp_path: Path) -> None:
    shared = "schedule=cosine"
    folders = [
        finished(tmp_path, shared, "growth=scratch"),
        finished(tmp_path, shared, "optimizer.learning_rate=0.01"),
        finished(tmp_path, shared, "transfer.inherited_rate=0.1"),
        finished(tmp_path, shared, "growth=source", "train.budget_tokens=2_048_000"),
    ]
    runs, _ = read_runs(folders)
    assert [(run.arm, run.learning_rate) for run in runs] == [
        ("scratch", 0.003),
        ("lossless", 0.01),
        ("lossless-inherited_rate0.1", 0.003),
        ("source", 0.003),
    ]
    assert arm_changes("-schedule_cosine-lr0.01") == ["schedule_cosine"]
    assert is_neutral("changes")


@pytest.mark.slow
def test_keeping_adams_state_of_a_complete_run_does_what_it_says(
    tmp_path: Path, overrides: list[str]
) -> None:
    settings = at(compose(overrides), tmp_path / "run")
    folder = loop.train(settings)
    before = timeless(folder), weights(folder)
    assert not (folder / "final/optimizer.pt").exists()
    loop.train(at(settings, folder, keep_optimizer=True))
    assert (folder / "final/optimizer.pt").is_file()
    assert (folder / "summary.json").is_file()
    assert timeless(folder) == before[0]
    assert all(tensor.equal(before[1][name]) for name, tensor in weights(folder).items())
    stamp = (folder / "final/optimizer.pt").stat().st_mtime_ns
    loop.train(at(settings, folder, keep_optimizer=True))
    assert (folder / "final/optimizer.pt").stat().st_mtime_ns == stamp


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scratch", "arms"),
    [
        ([["schedule=cosine"]], ["scratch"]),
        (
            [
                ["schedule=cosine"],
                ["schedule=cosine", "seed=1"],
                ["schedule=cosine", "optimizer.learning_rate=0.01"],
            ],
            ["scratch"] * 3,
        ),
        # two arms, and one of them is plain
        ([[], ["schedule=cosine"]], ["scratch", "scratch-schedule_cosine"]),
    ],
)
def test_scratch_with_settings_of_its_own_is_still_scratch(
    tmp_path: Path, scratch: list[list[str]], arms: list[str]
) -> None:
    folders = [finished(tmp_path, *own, "growth=scratch") for own in scratch]
    runs, _ = read_runs([*folders, finished(tmp_path), finished(tmp_path, "transfer.inherited_rate=0.1")])
    assert [run.arm for run in runs] == [*arms, "lossless", "lossless-inherited_rate0.1"]


@pytest.mark.slow
def test_a_longer_budget_of_a_complete_run_is_told_the_way(tmp_path: Path) -> None:
    done = finished(tmp_path)
    asked = compose([*GIVEN, "train.budget_tokens=2_048_000"])
    assert shorter_run(replace(asked, out=str(tmp_path / asked.name))) == (
        f"{done} trained this for 1,024,000 tokens; to train what it reached further, and not the whole "
        f"again: growth=source source={done}/final transfer=continued (after train.keep_optimizer=true, "
        "which makes a complete run keep its optimizer's state), under a study= of its own"
    )
    assert shorter_run(compose([*GIVEN])) is None
    with pytest.raises(UserError, match=r"growth=source source=\S+/final transfer=continued"):
        check_same(done, RunRecord.read(done / "run.json", ""), replace(asked, name=done.name, out=str(done)))


# ---- sweeps ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_goes_on_where_a_point_fails_and_ends_with_what_failed(
    tmp_path: Path, overrides: list[str]
) -> None:
    """The first point's rate diverges."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = [
        *overrides,
        "train.gradient_clip=null",
        "optimizer.learning_rate=1e30,1e-3",
        "logger=none",
        "progress=lines",
    ]
    command = [sys.executable, "-m", "outgrow.train", "-m", *given, "out='here/${name}'"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 1, done.stderr
    complete = sorted(path.parent.name for path in tmp_path.glob("here/*/summary.json"))
    assert len(complete) == 1
    assert "lr0.001" in complete[0]
    assert "error: 1 of 2 points failed:" in done.stderr
    assert re.search(r"\n  - \S*lr1e30\S*-s0: .*not finite", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_long_name_stands_shortened_before_a_runs_lines() -> None:
    from outgrow.train.run.log import LONGEST_PREFIX, shortened

    assert shortened("tiny_short-lossless-s0") == "tiny_short-lossless-s0"
    long = "mine-source-data_files-validation_fraction0.25-budget_tokens16384-s0"
    assert shortened(long) == "mine-source-data_files-validation_f…kens16384-s0"
    assert len(shortened(long)) == LONGEST_PREFIX


def test_a_job_that_hydra_runs_composes_the_defaults_of_its_name() -> None:
    """A job on Slurm has nothing composed beforehand, and a Hydra that is running."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from outgrow.model.base.compose import CONF, compose_config

    with initialize_config_dir(str(CONF), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert running is not None
        cfg, faults = compose_config(CONF, "train", ["experiment=tiny"])
        assert (cfg.study, faults) == ("tiny", [])
        assert GlobalHydra.instance().hydra is running
