"""Judging a study's arms on other texts: what a change is, that the committed table is what the committed
results say, and a whole study of two mixtures."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from outgrow.experiments import judgement, study, study_file
from outgrow.experiments.__main__ import main
from outgrow.experiments.cost import verdict
from outgrow.experiments.judgement import Judged, Judgement
from outgrow.experiments.judgement_report import RECORD, draw, markdown
from outgrow.experiments.study_file import HERE, load_study
from outgrow.experiments.table import BEGIN, END, check_table
from outgrow.model.base.errors import UserError
from outgrow.train.data.settings import DataSettings, SourceSettings

JUDGED = sorted(path.parent.name for path in HERE.glob(f"*/{RECORD}"))


def judged(arm: str, *losses: float) -> Judged:
    curves = tuple(((0.0, 7.0), (10.0, 5.0), (20.0, loss)) for loss in losses)
    return Judged(arm, {"a": 20}, curves, {"text": losses}, {"text": tuple(loss / 2 for loss in losses)})


def test_a_change_is_between_runs_of_one_seed() -> None:
    baseline, other = judged("plain", 5.0, 5.2, 5.4), judged("other", 4.9, 5.1, 5.31)
    difference, interval = Judgement((baseline, other), (0, 1, 2), 100, "a machine").change(other, "text")
    assert difference == pytest.approx(-0.29 / 3)
    # far less than the spread of either
    assert interval == pytest.approx(4.302653 * 0.0057735 / 3**0.5, rel=1e-4)
    assert verdict(difference, interval) == "lower"
    assert verdict(0.1, 0.05) == "higher"
    assert verdict(-0.1, 0.2) == verdict(-0.1, None) == "no change that the seeds can tell"


def test_the_table_says_what_was_read_and_what_changed() -> None:
    arms = (judged("plain", 5.0, 5.2), judged("other", 5.5, 5.7))
    lines = markdown(Judgement(arms, (0, 1), 100, "a machine")).splitlines()
    assert lines[2] == "- `other`: text +0.500 ± 0.000 (higher)"
    assert lines[6] == "| plain | a 20 | 5.100 ± 1.271 |"
    assert lines[7] == "| other | a 20 | 5.600 ± 1.271, +0.500 |"
    assert "100 tokens of each text; 2 seeds" in lines[-1]
    assert lines[-1].endswith("Machine: a machine.")


@pytest.mark.parametrize("name", JUDGED)
def test_the_committed_table_is_what_the_committed_results_say(name: str) -> None:
    definition, results = load_study(name), json.loads((HERE / name / RECORD).read_text())
    arms = tuple(Judged(**arm) for arm in results["arms"])
    assert tuple(arm.arm for arm in arms) == definition.full.arms
    assert tuple(results["seeds"]) == definition.full.seeds
    assert all(len(losses) == len(definition.full.seeds) for arm in arms for losses in arm.losses.values())
    # the first record told several machines, and left the number of tokens to the study
    machine = results["machine"] if isinstance(results["machine"], str) else "; ".join(results["machine"])
    judgement = Judgement(arms, definition.full.seeds, results.get("eval_tokens", 16_384), machine)
    assert judgement.texts == definition.judged_on
    check_table(HERE / name / "README.md", markdown(judgement))


@pytest.fixture
def texts(tmp_path: Path) -> Mapping[str, Mapping[str, object]]:
    """Two texts of other letters, as data settings."""
    draw = random.Random(0)
    for name, letters in (("own", "abcd"), ("more", "wxyz")):
        (tmp_path / name).mkdir()
        for number in range(30):
            words = ["".join(draw.choices(letters, k=3)) for _ in range(100)]
            (tmp_path / name / f"{number}.txt").write_text(" ".join(words))
    shared = {"corpus": "files", "validation_fraction": 0.3, "limit_documents": 20_000}
    return {
        name: shared | {"name": name, "path": str(tmp_path / name), "folder": str(tmp_path / "data" / name)}
        for name in ("own", "more")
    }


class Runs:
    """A study `m` in the working folder, its runs trained in this process, judged on `own` and `more`."""

    def __init__(self, folder: Path, texts: Mapping[str, Mapping[str, object]]) -> None:
        self.folder, self.texts = folder, texts
        self.trained: list[str] = []

    def define(self, first: str, other: Sequence[str]) -> None:
        """Two arms from scratch, the second with overrides; two seeds of sixteen steps."""
        sizes = (
            "hidden_size:16,intermediate_size:32,num_hidden_layers:1,num_attention_heads:2,"
            "num_key_value_heads:2"
        )
        train = (
            "context=16 batch_tokens=512 budget_tokens=8192 eval_tokens=320 eval_every_tokens=4096 "
            "log_every_tokens=4096"
        )
        runs = ["study=m", "growth=scratch", "data=files", "data.vocab_size=270", "logger=none"]
        runs += [f"data.{key}={value}" for key, value in self.texts["own"].items() if key != "corpus"]
        runs += [f"target={{model_type:phi,vocab_size:300,max_position_embeddings:32,{sizes}}}"]
        runs += ["optimizer.learning_rate=0.01", *(f"train.{setting}" for setting in train.split())]
        arms = {first: {"growth": "scratch"}, "other": {"growth": "scratch", "overrides": list(other)}}
        extent = {"arms": [first, "other"], "seeds": [0, 1]}
        definition = {"question": "why", "source": [], "runs": runs, "arms": arms, "judged_on": ["files"]}
        self.folder.mkdir(parents=True)
        text = json.dumps(definition | {"demo": extent, "full": extent})
        (self.folder / study_file.DEFINITION).write_text(text)
        (self.folder / "README.md").write_text(f"# m\n{BEGIN}\n{END}\n")

    def train(self, todo: Sequence[study_file.Job], *_: object) -> None:
        from outgrow.train.loop import train

        self.trained.extend(train(job.settings).name for job in todo)

    def arms(self) -> list[Judged]:
        return [Judged(**arm) for arm in json.loads((self.folder / RECORD).read_text())["arms"]]


@pytest.fixture
def runs(texts: Mapping[str, Mapping[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    from outgrow.train.corpus import prepare
    from outgrow.train.data.mixture import source_data

    made, open_texts = Runs(tmp_path / "experiments" / "m", texts), judgement.open_texts

    def both(leaves: Sequence[str], job: study_file.Job, own: DataSettings) -> Mapping[str, object]:
        (data,) = open_texts(leaves, job, own).values()
        wanted = source_data(SourceSettings(DataSettings(**texts["more"])), own, data)  # type: ignore[arg-type]
        assert wanted is not None
        return {"own": data, "more": prepare(wanted, progress=False)}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judgement, "open_texts", both)
    monkeypatch.setattr(study, "run_jobs", made.train)
    return made


JUDGED_BY = ("study=m", "growth=scratch", "logger=none", "progress=false")


def job(arm: str, *overrides: str) -> study_file.Job:
    return study_file.job_of(arm, ["experiment=tiny_mixture", *JUDGED_BY, *overrides])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "faults"),
    [
        ([], []),
        (["mixture=tiny_textbooks"], []),
        # a source that holds out less of the judged text, or other documents of it
        (
            ["mixture=tiny_textbooks", "mixture.sources.textbooks.data.validation_fraction=0.01"],
            ["textbooks: arm other, mixture.sources.textbooks.data.validation_fraction: 0.01, and "],
        ),
        (
            ["mixture=tiny_textbooks", "mixture.sources.textbooks.data.seed=7"],
            ["textbooks: arm other, mixture.sources.textbooks.data.seed: 7, and "],
        ),
        (
            ["data.validation_fraction=0.02"],
            ["stdlib: arm other, data.validation_fraction: 0.02, and data=stdlib"],
        ),
        # held out is more than is judged on
        (["mixture=tiny_textbooks", "mixture.sources.textbooks.data.validation_fraction=0.5"], []),
    ],
)
def test_no_arm_is_judged_on_text_that_it_is_trained_on(overrides: list[str], faults: list[str]) -> None:
    todo = [job("plain"), job("other", *overrides)]
    leaves = ["stdlib", "textbooks", "exercises"]
    if not faults:
        judgement.check_held_out(leaves, todo)
        return
    with pytest.raises(UserError) as caught:
        judgement.check_held_out(leaves, todo)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(faults)
    for line, fault in zip(lines, faults, strict=True):
        assert f"judged_on: {fault}" in line


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_evaluations_have_their_picture(tmp_path: Path, count: int) -> None:
    curve = tuple((100.0 * number, 5.0 - number) for number in range(count))
    arms = [Judged(arm, {"own": 200}, (curve,), {"own": (3.0,)}, {"own": (1.0,)}) for arm in ("a", "b")]
    draw(arms, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000


@pytest.mark.slow
def test_costs_are_compared_where_scratch_is_among_arms_that_read_the_same() -> None:
    definition = load_study("tiny_mixture")
    scratch = replace(definition.arms["plain"], counts_as="scratch")
    with_scratch = replace(definition, arms=definition.arms | {"plain": scratch})
    todo = study_file.jobs(with_scratch, replace(definition.demo, arms=("plain", "textbooks")))
    assert study.comparable_costs(with_scratch, todo[:1])
    assert not study.comparable_costs(with_scratch, todo)
    assert not study.comparable_costs(definition, todo[:1])


@pytest.mark.slow
def test_arms_of_different_mixtures_are_judged_on_every_text(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text that only one arm reads is the one it is better at."""
    other = ["mixture=tiny_textbooks", "mixture.phases=[{weights:{stdlib:0.25,textbooks:0.75}}]"]
    for source, name in (("stdlib", "own"), ("textbooks", "more")):
        other += [f"++mixture.sources.{source}.data.{key}={value}" for key, value in runs.texts[name].items()]
    runs.define("plain", other)
    assert main(["study", "m", "--full"]) == 0, capsys.readouterr().err
    assert runs.trained == ["m-plain-s0", "m-other-s0", "m-plain-s1", "m-other-s1"]
    plain, mixed = arms = runs.arms()
    assert (plain.arm, mixed.arm) == ("plain", "other")
    assert (plain.tokens, mixed.tokens) == ({"own": 8192}, {"stdlib": 2048, "textbooks": 6144})
    assert all(a > b for a, b in zip(plain.losses["more"], mixed.losses["more"], strict=True))
    assert all(a < b for a, b in zip(plain.losses["own"], mixed.losses["own"], strict=True))
    summary = json.loads(Path("runs/m-plain-s0/summary.json").read_text())
    assert plain.curves[0][-1][1] == pytest.approx(summary["final_val_loss"])
    assert plain.losses["own"][0] == pytest.approx(summary["final_val_loss"], rel=1e-5)
    assert (runs.folder / "losses.png").stat().st_size > 10_000
    readme = (runs.folder / "README.md").read_text()
    assert "| other | stdlib 2,048, textbooks 6,144 |" in readme
    assert "320 tokens of each text; 2 seeds" in readme
    assert "| other | stdlib 2,048, textbooks 6,144 |" in capsys.readouterr().out
    assert not (runs.folder / "comparison.json").exists()
    assert main(["study", "m", "--full"]) == 0
    assert len(runs.trained) == 4  # nothing is trained again
    assert runs.arms() == arms


@pytest.mark.slow
def test_arms_that_read_the_same_are_compared_by_costs_and_judged_too(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.define("scratch", ["optimizer.weight_decay=0.3"])
    assert main(["study", "m"]) == 0, capsys.readouterr().err
    out = Path("runs/comparison-m")
    table, costs = (out / "table.md").read_text(), json.loads((out / "comparison.json").read_text())
    assert table.index(costs["answer"][1:]) < table.index("Against `scratch`, at equal tokens:")
    losses = json.loads((out / RECORD).read_text())["arms"][1]["losses"]
    finals = [run["losses"][-1] for run in costs["runs"] if run["arm"] == "other"]
    assert losses["own"] == pytest.approx(finals, rel=1e-5)
