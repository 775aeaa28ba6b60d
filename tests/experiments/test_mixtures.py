"""Studies of mixtures: which runs, what a change is, and that the committed table is what the committed
results say."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from outgrow.experiments import mixtures, study_file
from outgrow.experiments.cost import verdict
from outgrow.experiments.mixture_figure import Judged
from outgrow.experiments.mixtures import FILE, Study, change, jobs, load, markdown, run
from outgrow.experiments.study_file import HERE
from outgrow.experiments.table import BEGIN, END, check_table
from outgrow.model.base.errors import UserError
from outgrow.train.settings import identity

STUDIES = sorted(path.parent.name for path in HERE.glob(f"*/{FILE}"))


def judged(arm: str, *losses: float) -> Judged:
    curves = tuple(((0.0, 7.0), (10.0, 5.0), (20.0, loss)) for loss in losses)
    return Judged(arm, {"a": 20}, curves, {"text": losses}, {"text": tuple(loss / 2 for loss in losses)})


def test_a_change_is_between_runs_of_one_seed() -> None:
    baseline, other = judged("plain", 5.0, 5.2, 5.4), judged("other", 4.9, 5.1, 5.31)
    difference, interval = change(other, baseline, "text")
    assert difference == pytest.approx(-0.29 / 3)
    # far less than the spread of either
    assert interval == pytest.approx(4.302653 * 0.0057735 / 3**0.5, rel=1e-4)
    assert verdict(difference, interval) == "lower"
    assert verdict(0.1, 0.05) == "higher"
    assert verdict(-0.1, 0.2) == verdict(-0.1, None) == "no change that the seeds can tell"


def test_the_table_says_what_was_read_and_what_changed() -> None:
    study = Study("?", (), {"plain": (), "other": ()}, (0, 1), ("text",), 100)
    lines = markdown(
        study, [judged("plain", 5.0, 5.2), judged("other", 5.5, 5.7)], ["a machine"]
    ).splitlines()
    assert lines[2] == "- `other`: text +0.500 ± 0.000 (higher)"
    assert lines[6] == "| plain | a 20 | 5.100 ± 1.271 |"
    assert lines[7] == "| other | a 20 | 5.600 ± 1.271, +0.500 |"
    assert "100 tokens of each text; 2 seeds" in lines[-1]
    assert lines[-1].endswith("Machine: a machine.")


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_arms_of_a_study_differ_in_their_mixture_alone(name: str) -> None:
    study = dataclasses.replace(load(name), seeds=(0, 1))
    found = jobs(study)
    assert len({job.name for job in found}) == len(found) == len(study.arms) * len(study.seeds)
    plain = identity(found[0].settings)
    for job in found:
        other = identity(job.settings)
        differing = {key for key in {*plain, *other} if plain.get(key) != other.get(key)}
        assert {key for key in differing if not key.startswith("mixture")} <= {"name", "growth.name", "seed"}


@pytest.mark.parametrize("name", [name for name in STUDIES if (HERE / name / "results.json").exists()])
def test_the_committed_table_is_what_the_committed_results_say(name: str) -> None:
    study, folder = load(name), HERE / name
    results = json.loads((folder / "results.json").read_text())
    found = [Judged(**arm) for arm in results["arms"]]
    assert [arm.arm for arm in found] == list(study.arms)
    assert tuple(results["seeds"]) == study.seeds
    assert all(len(losses) == len(study.seeds) for arm in found for losses in arm.losses.values())
    check_table(folder / "README.md", markdown(study, found, results["machine"]))


def test_a_study_that_cannot_be_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_file, "HERE", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / FILE).write_text(
        "question: why\nruns: []\narms: {a: 1}\nseeds: [x]\njudged: []\neval_tokens: 5\n"
    )
    with pytest.raises(UserError, match="unknown study 'mime'; did you mean 'mine'"):
        load("mime")
    with pytest.raises(UserError) as caught:
        load("mine")
    for fault in (
        "judged: unknown key; did you mean 'judged_on'",
        "judged_on: missing",
        "arms.a: expected a list",
        "seeds[0]: expected a whole",
    ):
        assert fault in str(caught.value)


@pytest.mark.slow
def test_a_whole_study_on_small_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms, two seeds, four steps. The text that only one arm reads is the one it is better at."""
    from outgrow.train.loop import train as train_run

    draw = random.Random(0)
    for name, letters in (("own", "abcd"), ("more", "wxyz")):
        (tmp_path / name).mkdir()
        for i in range(30):
            (tmp_path / name / f"{i}.txt").write_text(
                " ".join("".join(draw.choices(letters, k=3)) for _ in range(100))
            )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_file, "HERE", tmp_path)
    # here, without a pool
    monkeypatch.setattr(mixtures, "run_jobs", lambda todo, *rest: [train_run(job.settings) for job in todo])
    sizes = (
        "hidden_size:16,intermediate_size:32,num_hidden_layers:1,num_attention_heads:2,num_key_value_heads:2"
    )
    train = (
        "context=16 batch_tokens=512 budget_tokens=8192 eval_tokens=160 eval_every_tokens=4096 "
        "log_every_tokens=4096"
    )
    runs = [
        "study=m",
        "growth=scratch",
        "data=files",
        f"data.path={tmp_path / 'own'}",
        "data.name=own",
        "data.vocab_size=270",
        "logger=none",
    ]
    runs += [
        f"target={{model_type:phi,vocab_size:300,max_position_embeddings:32,{sizes}}}",
        "data.validation_fraction=0.3",
    ]
    runs += ["optimizer.learning_rate=0.01", *(f"train.{x}" for x in train.split())]
    more = {
        "name": "more",
        "corpus": "files",
        "path": str(tmp_path / "more"),
        "folder": "data/more",
        "validation_fraction": 0.3,
    }
    own = more | {"name": "own", "path": str(tmp_path / "own"), "folder": "data/own"}
    other = ["mixture=tiny_textbooks", "mixture.phases=[{weights:{stdlib:0.25,textbooks:0.75}}]"]
    other += [
        f"++mixture.sources.{k}.data.{key}={v}"
        for k, data in (("stdlib", own), ("textbooks", more))
        for key, v in data.items()
    ]
    study = {"question": "why", "runs": runs, "arms": {"plain": [], "other": other}, "seeds": [0, 1]}
    study |= {"judged_on": ["own", "more"], "eval_tokens": 320}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / FILE).write_text(json.dumps(study))
    (tmp_path / "m" / "README.md").write_text(f"# m\n{BEGIN}\n{END}\n")
    texts = mixtures.open_texts

    def opened(study: Study, display: object) -> object:
        from outgrow.train.corpus import prepare
        from outgrow.train.data.mixture import source_data
        from outgrow.train.data.settings import DataSettings, SourceSettings

        found = texts(dataclasses.replace(study, judged_on=("files",)), display)  # type: ignore[arg-type]
        own = jobs(study)[0].settings.data
        wanted = source_data(SourceSettings(DataSettings(**more)), own, found["files"])  # type: ignore[arg-type]
        assert wanted is not None
        return {"own": found["files"], "more": prepare(wanted, progress=False)}

    monkeypatch.setattr(mixtures, "open_texts", opened)
    plain, mixed = run("m", jobs_at_once=1)
    assert (plain.tokens, mixed.tokens) == ({"own": 8192}, {"stdlib": 2048, "textbooks": 6144})
    assert all(a > b for a, b in zip(plain.losses["more"], mixed.losses["more"], strict=True))
    assert all(a < b for a, b in zip(plain.losses["own"], mixed.losses["own"], strict=True))
    summary = json.loads((tmp_path / "runs/m-plain-s0/summary.json").read_text())
    assert plain.curves[0][-1][1] == pytest.approx(summary["final_val_loss"])
    assert (tmp_path / "m" / "losses.png").stat().st_size > 10_000
    assert "| other | stdlib 2,048, textbooks 6,144 |" in (tmp_path / "m" / "README.md").read_text()
    monkeypatch.setattr(mixtures, "run_jobs", lambda *a: SimpleNamespace())
    assert run("m", jobs_at_once=1)[1].losses == mixed.losses  # nothing is trained again
