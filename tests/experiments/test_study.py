"""A study's definition composes, its stages are skipped when done, a failing run leaves the others their
turn, and Ctrl-C stops it."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import sys
import time
from dataclasses import asdict, replace
from html import escape
from pathlib import Path

import pytest

from helpers.runs import record_of
from outgrow.experiments import products
from outgrow.experiments import study_file as definition
from outgrow.experiments.__main__ import main
from outgrow.experiments.compare import METHOD
from outgrow.experiments.cost import Curve, cost, mean_curve
from outgrow.experiments.ends import RECORD, read_ends
from outgrow.experiments.halving import question
from outgrow.experiments.horizon_report import markdown
from outgrow.experiments.horizons import worths
from outgrow.experiments.judgement import check_held_out
from outgrow.experiments.progress import Display, position
from outgrow.experiments.selection import jobs_of
from outgrow.experiments.study import RunFailed, check_control, complete, run_jobs, run_study
from outgrow.experiments.study_file import (
    HERE,
    Arm,
    Job,
    Study,
    check_arms,
    equal_flops,
    jobs,
    load_study,
    source_job,
    source_jobs,
    takes_source_as_there,
)
from outgrow.experiments.table import check_table
from outgrow.model.base.errors import UserError
from outgrow.model.base.interrupt import Terminated, terminable
from outgrow.model.build import to_hf_config
from outgrow.model.geometry import flops_per_token
from outgrow.model.presets import preset
from outgrow.train.compose import compose
from outgrow.train.run.record import SourceCost, Start
from outgrow.train.settings import identity

STUDIES = sorted(path.parent.name for path in HERE.glob("*/study.yaml"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, where the sources of all studies are complete."""
    monkeypatch.chdir(tmp_path)
    for study in map(load_study, STUDIES):
        for job in source_jobs(study):
            finish(job)
    return tmp_path


def finish(job: Job | None) -> None:
    """The files of a complete run, without the training. A source's config is that of its preset."""
    assert job is not None
    final = job.folder / "final"
    final.mkdir(parents=True)
    target = job.settings.target
    (final / "config.json").write_text(json.dumps(preset(target) if isinstance(target, str) else target))
    ledger = {"tokens": 100, "flops": 5.0, "val_loss": 4.0}
    (final / "ledger.json").write_text(json.dumps(ledger))
    (final / "optimizer.pt").touch()
    source = None if job.arm == "scratch" or job.settings.source is None else SourceCost(None, 100, 5.0, 4.0)
    record = record_of(job.settings, start=Start(source=source))
    (job.folder / "run.json").write_text(json.dumps(record.to_json()))
    (job.folder / "summary.json").write_text("{}")


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Job]]:
    """The whole grid of one seed of every study: composing is the slow part, so it is done once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("grids"))
        studies = [load_study(name) for name in STUDIES]
        for study in studies:
            for job in source_jobs(study):
                finish(job)
        return {study.name: jobs(study, replace(study.full, seeds=study.full.seeds[:1])) for study in studies}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_composes(name: str, elsewhere: Path, grids: dict[str, list[Job]]) -> None:
    study = load_study(name)
    assert study.question
    demo = jobs(study, study.demo)
    for extent, todo, seeds in ((study.demo, demo, len(study.demo.seeds)), (study.full, grids[name], 1)):
        assert (
            len({job.folder for job in todo})
            == len(todo)
            == len(extent.arms) * seeds * len(extent.learning_rate_factors)
        )
        arms = {study.counts_as(job.arm) for job in todo}
        assert study.judged_on or "scratch" in arms
        assert study.judged_on or study.family or arms & {"source", "small"}, (
            "no control: trained longer but not bigger"
        )
    assert len(study.full.seeds) >= 3
    assert study.judged_on or len(study.full.learning_rate_factors) >= 3
    # a full run goes on from the demo
    whole = {folder for job in grids[name] for folder in job.folders}
    assert {folder for job in demo for folder in job.folders} <= whole
    for job in grids[name]:
        tuned = study.arms[job.arm].learning_rate is not None
        rate = f"-lr{job.settings.optimizer.learning_rate:g}" if tuned else ""
        assert job.name == f"{job.settings.study}-{job.arm}{rate}-s0"


@pytest.mark.slow
def test_the_settings_of_each_run_are_those_that_hydra_composes(
    elsewhere: Path, grids: dict[str, list[Job]]
) -> None:
    """Runs of a study share what was composed once; here every override of each goes through Hydra itself."""
    from hydra import compose, initialize_config_dir

    from outgrow.model.base.compose import CONF
    from outgrow.train.compose import settings_from

    for job in grids["tiny_rewarm"]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("train", list(job.overrides))
        assert job.settings == settings_from(composed), job.name


@pytest.mark.slow
def test_the_grid_is_run_on_the_tuning_seeds_only(elsewhere: Path, grids: dict[str, list[Job]]) -> None:
    study = load_study("tiny_rewarm")
    extent = replace(
        study.full, arms=("scratch",), seeds=(0, 1, 2), learning_rate_factors=(0.5, 1, 2), tuning_seeds=(0,)
    )
    rates = [study.arms["scratch"].learning_rate * share for share in (0.5, 1, 2, 1, 1)]
    points = [(job.settings.seed, job.settings.optimizer.learning_rate) for job in jobs(study, extent)]
    assert points == list(zip((0, 0, 0, 1, 2), rates, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_what_is_committed_are_the_runs_that_the_study_defines(
    name: str, grids: dict[str, list[Job]]
) -> None:
    if load_study(name).judged_on:
        results = json.loads((HERE / name / "results.json").read_text())
        assert [arm["arm"] for arm in results["arms"]] == [job.arm for job in grids[name]]
        return
    if (HERE / name / RECORD).is_file():
        ends = read_ends(HERE / name / RECORD)
        defined = {folder.name for job in grids[name] for folder in job.folders}
        seeds = load_study(name).full.seeds
        for end in ends:
            assert end.seed in seeds
            # the grid is that of the first seed
            assert end.name.replace(f"-s{end.seed}-t", f"-s{seeds[0]}-t") in defined
        if load_study(name).family:
            table = products.markdown(products.families(ends))
        else:
            table = markdown(worths(ends), source_paid=not load_study(name).source_is_there)
        assert (HERE / name / "table.md").read_text() == table
        check_table(HERE / name / "README.md", table)
        return
    if not (HERE / name / "comparison.json").is_file():
        assert "**Not run yet.**" in (HERE / name / "README.md").read_text()
        return
    found = json.loads((HERE / name / "comparison.json").read_text())
    assert {run["name"] for run in found["runs"] if run["seed"] == 0} == {job.name for job in grids[name]}
    study = load_study(name)
    repeated = {
        (row["arm"], float(row["learning_rate"]))
        for row in found["rows"]
        if row["n"] == len(study.full.seeds)
    }
    assert repeated == {(arm, study.arms[arm].learning_rate) for arm in study.full.arms}
    check_table(HERE / name / "README.md", (HERE / name / "table.md").read_text())


COMPARED = sorted(path.parent.name for path in HERE.glob("*/comparison.json"))


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_committed_states_the_method_of_today(name: str) -> None:
    found = json.loads((HERE / name / "comparison.json").read_text())
    assert found["method"] == METHOD
    assert f"<p>{escape(METHOD)}</p>" in (HERE / name / "report.html").read_text()


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_committed_follows_from_its_own_curves(name: str) -> None:
    """Every cost and saving of the table, computed again from the curves beside it by the rule of today."""
    found = json.loads((HERE / name / "comparison.json").read_text())
    curves: dict[tuple[str, float], dict[int, Curve]] = {}
    for run in found["runs"]:
        of_arm = curves.setdefault((run["arm"], run["learning_rate"]), {})
        of_arm[run["seed"]] = Curve(*(tuple(run[key]) for key in ("tokens", "flops", "losses")))
    best = {row["arm"]: row["learning_rate"] for row in found["rows"] if row["best"]}
    scratch = curves["scratch", best["scratch"]]
    for row in found["rows"]:
        own, paid = (
            curves[row["arm"], row["learning_rate"]],
            {key: row[key] for key in ("operator_flops", "source_flops")},
        )
        reached = cost(mean_curve(list(own.values())), mean_curve(list(scratch.values())), **paid)
        assert asdict(reached) == {key: row[key] for key in asdict(reached)}, row["arm"]
        pairs = [
            cost(own[seed], scratch[seed], operator_flops=row["operator_flops"]).saving_excluded
            for seed in own
        ]
        assert row["seed_savings"] == ("" if None in pairs else " ".join(map(repr, pairs))), row["arm"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_arms_differ_in_growth_learning_rate_and_what_they_say_only(
    name: str, grids: dict[str, list[Job]]
) -> None:
    arms, (first, *others) = load_study(name).arms, [job for job in grids[name] if job.arm != "source"]
    assert all(override.startswith("schedule.horizons") for override in arms[first.arm].overrides)
    for other in others:
        one, two = identity(first.settings), identity(other.settings)
        changed = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
        differing = {key.replace("growth.options.", "growth.") for key in changed}
        said = tuple(
            override.split("=")[0]
            for override in arms[other.arm].overrides
            if not override.startswith("schedule.horizons")
        )
        said += ("source",) if arms[other.arm].source is not None else ()
        own = ("train.budget_tokens", "schedule.horizons")  # of a control, for equal FLOPs
        counts = own if other.settings.growth.operator == "source" else ()
        assert all(
            key.startswith(("growth.", *said, *counts)) or key in ("name", "optimizer.learning_rate")
            for key in differing
        )
        assert all(any(key.startswith(word) for key in differing) for word in said), (
            "an override that changes nothing"
        )


@pytest.mark.slow
def test_the_control_arm_pays_scratchs_flops(elsewhere: Path) -> None:
    study = load_study("tiny_rewarm")
    by_arm = {job.arm: job.settings.train for job in jobs(study, study.demo)}
    scratch, source = by_arm["scratch"], by_arm["source"]
    paid = (
        scratch.budget_tokens
        // scratch.batch_tokens
        * scratch.batch_tokens
        * flops_per_token(preset("tiny_target"), scratch.context)
    )
    per_step = source.batch_tokens * flops_per_token(preset("tiny_source"), source.context)
    steps = source.budget_tokens / source.batch_tokens
    assert steps == int(steps)
    assert paid <= steps * per_step < paid + per_step


def test_the_control_of_a_mixture_pays_what_each_token_meets(tmp_path: Path) -> None:
    """Two of four experts: twice the dense MLP, and the router."""
    settings = compose(["experiment=operators_experts_source"])
    dense = to_hf_config(settings.target).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(dense))
    context, hidden, units, layers, vocabulary = 128, 32, 64, 2, 320
    budget, horizons = equal_flops(["experiment=operators_experts", "growth=source", f"source={tmp_path}"])
    attention = 4 * hidden**2 + (context + 1) * hidden  # half of the positions are read, on average
    mlp, router = 3 * hidden * units, 4 * hidden
    head = vocabulary * hidden
    share = (head + layers * (attention + 2 * mlp + router)) / (head + layers * (attention + mlp))
    tokens = math.ceil(868_352 / 4096 * share) * 4096
    assert (budget, horizons) == (f"train.budget_tokens={tokens}", f"schedule.horizons=[{tokens}]")


def test_the_control_arm_needs_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train the source first"):
        equal_flops(["experiment=tiny_short", "growth=source"])


def test_a_wrong_definition_names_every_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown study 'tinny'; did you mean 'tiny'"):
        load_study("tinny")
    text = (
        (HERE / "tiny_rewarm" / "study.yaml")
        .read_text()
        .replace("question:", "querstion:")
        .replace("  lossless: {learning_rate:", "  lossless: {learning_rat:")
    )
    (tmp_path / "tiny_rewarm").mkdir()
    (tmp_path / "tiny_rewarm" / "study.yaml").write_text(text)
    monkeypatch.setattr(definition, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_study("tiny_rewarm")
    for words in (
        "querstion: unknown key; did you mean 'question'",
        "question: missing",
        "arms.lossless.learning_rat: unknown key",
    ):
        assert words in str(caught.value)
    (tmp_path / "tiny_rewarm" / "study.yaml").write_text(
        (HERE / "tiny_rewarm" / "study.yaml")
        .read_text()
        .replace("arms: [scratch, source, lossless,", "arms: [scratch, source, losless,")
    )
    with pytest.raises(UserError, match=r"demo\.arms: unknown arm 'losless'; did you mean 'lossless'"):
        load_study("tiny_rewarm")
    (tmp_path / "tiny_rewarm" / "study.yaml").write_text(
        "question: why\nsource: []\nruns: []\narms: {plain: {growth: scratch}}\n"
        "demo: {arms: [plain], seeds: [0]}\n"
        "full: {arms: [plain], seeds: [0], learning_rate_factors: [1, 2]}\njudged_on: [stdlb]\n"
    )
    with pytest.raises(UserError) as caught:
        load_study("tiny_rewarm")
    assert "judged_on: unknown data 'stdlb'; did you mean 'stdlib'" in str(caught.value)
    assert "arms.plain.learning_rate: missing; full has a grid around it" in str(caught.value)
    text = (tmp_path / "tiny_rewarm" / "study.yaml").read_text().replace("judged_on: [stdlb]\n", "")
    named = text.replace("seeds: [0]}", "seeds: [0], arm_overrides: {plian: [seed=1]}}")
    (tmp_path / "tiny_rewarm" / "study.yaml").write_text(named)
    with pytest.raises(
        UserError, match=r"demo\.arm_overrides: 'plian' is not among demo\.arms; did you mean"
    ):
        load_study("tiny_rewarm")
    (tmp_path / "tiny_rewarm" / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=r"demo\.arms: none counts as scratch, .* add it, or judged_on"):
        load_study("tiny_rewarm")


DEFINED_WITH_OWN_LEAVES = """
question: why
source: []
runs: [experiment=mine]
arms: {scratch: {}, plain: {growth: plaster}}
demo: {arms: [scratch, plain], seeds: [0]}
full: {arms: [scratch, plain], seeds: [0]}
judged_on: [letters]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of leaves of one's own, which the study `mine` of the working folder names."""
    monkeypatch.chdir(tmp_path)
    for path, text in (
        ("experiments/mine/study.yaml", DEFINED_WITH_OWN_LEAVES),
        ("own/experiment/mine.yaml", "# @package _global_\nstudy: mine\nsource: x\ntarget: tiny_target\n"),
        ("own/growth/plaster.yaml", "name: plaster\noperator: tile\ndepth: stack\nnoise: 0.0\n"),
        ("own/data/letters.yaml", "defaults: [base/all@_here_]\nname: letters\ncorpus: files\npath: texts\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    return tmp_path / "own"


def test_a_study_may_name_leaves_of_ones_own(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load_study("mine", own)
    todo = jobs(study, study.demo)
    assert [job.name for job in todo] == ["mine-scratch-s0", "mine-plain-s0"]
    assert todo[1].settings.growth.operator == "tile"
    assert pickle.loads(pickle.dumps(todo)) == todo  # as it goes to another process
    assert equal_flops_told(study) == "source=x: no config.json there, and the control arm's budget needs it"
    check_held_out(["letters"], todo)
    asked = question("mine", ["plaster", "scratch", "lag_tokens=300_000"], own)
    (run,) = jobs_of(asked, asked.candidates[0], [300_000])
    assert run.settings.growth.operator == "tile"
    # what only tells of the study needs no such folder
    assert not takes_source_as_there("mine")
    assert main(["study"]) == 0
    assert "mine: why" in capsys.readouterr().out


def equal_flops_told(study: Study) -> str:
    """How the arm `source` of a study is refused whose source is not there."""
    control = replace(study, arms={"source": Arm()})
    with pytest.raises(UserError) as caught:
        jobs(control, replace(study.demo, arms=("source",)))
    return str(caught.value).partition("arms source: ")[2].partition(";")[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("study mine", "experiments/mine/study.yaml: judged_on: unknown data 'letters'; did you mean "),
        ("study mine --config-dir none", "--config-dir none: no such folder; give the one that holds your"),
        ("select mine plaster scratch lag_tokens=9", "experiments/mine/study.yaml: judged_on: unknown data"),
        (
            "select mine plastr scratch lag_tokens=9 -cd own",
            "unknown candidate 'plastr'; did you mean 'plaster'",
        ),
    ],
)
def test_leaves_of_ones_own_that_are_not_there_are_told(
    own: Path, given: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


@pytest.mark.parametrize("key", ["name", "own"])
def test_a_definition_does_not_say_what_the_command_says(own: Path, key: str) -> None:
    path = Path("experiments/mine/study.yaml")
    path.write_text(f"{path.read_text()}{key}: other\n")
    with pytest.raises(UserError, match=f"study.yaml: {key}: unknown key; "):
        load_study("mine", own)


@pytest.mark.slow
def test_only_the_sources_of_the_arms_that_run_are_trained() -> None:
    study = load_study("when_growth_pays")
    assert source_jobs(study, study.demo.arms) == []
    assert [job.name for job in source_jobs(study, ["null_control"])] == ["when_growth_pays-source-narrow"]
    family = load_study("family")
    by_way = ["family-source-small-s0", "family-source-middle-s0"]  # the second has grown from the first
    assert [job.name for job in source_jobs(family, ["large"], [0])] == by_way
    assert [job.name for job in source_jobs(family, ["middle"], [0])] == by_way[:1]
    assert [job.name for job in source_jobs(family, ["scratch"])] == []


@pytest.mark.slow
def test_each_seed_may_have_sources_of_its_own(elsewhere: Path) -> None:
    study = load_study("family_in_depth")
    assert study.sources_per_seed
    sources = {job.name: job.settings for job in source_jobs(study, ["large"], [0, 2])}
    small, middle = ("family_in_depth-source-small", "family_in_depth-source-middle")
    assert list(sources) == [f"{small}-s0", f"{middle}-s0", f"{small}-s2", f"{middle}-s2"]
    assert [run.seed for run in sources.values()] == [0, 0, 2, 2]
    assert sources[f"{middle}-s2"].source == f"runs/{small}-s2/final"
    assert len(source_jobs(study)) == 2 * len(study.full.seeds)
    extent = replace(study.full, arms=("large",), seeds=(2,), learning_rate_factors=(1.0,))
    (job,) = jobs(study, extent)
    assert job.settings.source == f"runs/{middle}-s2/final"


@pytest.mark.parametrize("per_seed", [True, False])
def test_a_source_is_named_as_its_seeds_are_trained(own: Path, per_seed: bool) -> None:
    grown = "runs/mine-source-small{}/final"
    with_seed, without = grown.format("-s${seed}"), grown.format("")
    expected, found = (with_seed, without) if per_seed else (without, with_seed)
    path = Path("experiments/mine/study.yaml")
    sources = (
        f"sources: {{small: [], middle: ['source={found}']}}\nsources_per_seed: {str(per_seed).lower()}\n"
    )
    path.write_text(path.read_text() + sources)
    with pytest.raises(UserError) as fault:
        load_study("mine", own)
    assert f"sources.middle: expected source={expected}, " in str(fault.value)
    assert str(fault.value).endswith(f"found {found}")
    path.write_text(path.read_text().replace(found, expected))
    assert load_study("mine", own).sources["middle"] == (f"source={expected}",)


@pytest.mark.slow
def test_a_control_is_sized_by_a_source_of_the_seeds_that_run(elsewhere: Path) -> None:
    family = load_study("family")
    control = replace(family.arms["middle"], growth="source")
    study = replace(family, arms={**family.arms, "control": control})
    extent = replace(study.full, arms=("control",), seeds=(2,), learning_rate_factors=(1.0,))
    shutil.rmtree("runs/family-source-small-s0")  # nobody trained it
    (job,) = jobs(study, extent)
    assert job.settings.source == "runs/family-source-small-s2/final"
    asked = family.arms["middle"].overrides[-2]
    assert asked == "schedule.horizons=[1187840,2375680]"
    shorter, longer = job.settings.schedule.horizons  # the small network needs more tokens for the FLOPs
    assert 1_187_840 < shorter < longer


@pytest.mark.slow
def test_an_arm_may_start_from_a_source_of_its_own_and_an_extent_shorten_all(elsewhere: Path) -> None:
    study = load_study("from_a_trained_source")
    sources = {job.name: job.settings for job in source_jobs(study)}
    assert sources["from_a_trained_source-source-stable60"].schedule.decay_fraction == 0.0
    demo = replace(study.demo, arms=("scratch", "stable20_lossless", "null_control"))
    scratch, grown, control = jobs(study, demo)
    assert grown.settings.source == "runs/from_a_trained_source-source-stable20/final"
    assert grown.settings.schedule.horizons == (450_560, 1_794_048)  # of the extent
    own = ",".join(map(str, scratch.settings.schedule.horizons))
    assert study.arms["scratch"].overrides == (f"schedule.horizons=[{own}]",)
    assert len(scratch.settings.schedule.horizons) > 2  # its own, not the extent's
    assert control.settings.schedule.horizons == (835_584, 3_325_952)  # for the same FLOPs

    shorter = {name: ("schedule.horizons=[450560]",) for name in ("scratch", "source")}
    demo = replace(demo, arms=(*demo.arms, "source"), arm_overrides=shorter)
    scratch, grown, _, control = jobs(study, demo)
    assert scratch.settings.schedule.horizons == (450_560,)  # after its own
    assert grown.settings.schedule.horizons == (450_560, 1_794_048)
    assert control.settings.schedule.horizons == (835_584,)
    assert scratch.folder.name == "from_a_trained_source-scratch-lr0.024-s0-t450560"  # the same run as ever

    text = (HERE / study.name / "study.yaml").read_text().replace("source: stable60,", "source: stable61,")
    place = elsewhere / "experiments" / study.name
    place.mkdir(parents=True)
    (place / "study.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"arms\.stable60_lossless\.source: unknown source 'stable61'; did you mean"
    ):
        load_study(study.name)


@pytest.mark.slow
def test_an_arm_may_be_a_growth_and_overrides(elsewhere: Path) -> None:
    study = load_study("tiny_rewarm")
    arm = Arm(growth="lossless", overrides=("transfer=distilled", "schedule.rewarm=new"), learning_rate=2e-3)
    study = replace(study, arms=study.arms | {"taught": arm})
    (job,) = jobs(study, replace(study.demo, arms=("taught",)))
    assert (job.arm, job.settings.name, job.settings.growth.name) == (
        "taught",
        "tiny_rewarm-taught-lr0.002-s0",
        "taught",
    )
    assert (
        job.settings.growth.options
        == jobs(study, replace(study.demo, arms=("lossless",)))[0].settings.growth.options
    )
    assert job.settings.transfer.teacher is not None
    assert (job.settings.schedule.rewarm, job.settings.optimizer.learning_rate) == ("new", 2e-3)


@pytest.mark.slow
def test_a_study_of_horizons_without_its_control_is_refused_before_it_trains() -> None:
    study = load_study("when_growth_pays")
    check_control(study, jobs(study, study.demo))
    alone = replace(study.demo, arms=("scratch", "stack_0.8M"))
    with pytest.raises(UserError, match="when_growth_pays: no control among its arms"):
        check_control(study, jobs(study, alone))
    check_control(study, jobs(study, replace(study.demo, arms=("scratch",))))


@pytest.mark.slow
def test_arms_are_composed_before_a_source_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source may take an hour; a control's budget alone waits for it."""
    monkeypatch.chdir(tmp_path)
    study = load_study("from_a_trained_source")
    check_arms(study, study.demo)
    with pytest.raises(UserError, match=r"arms source, null_control.*: no config.json there"):
        jobs(study, study.demo)
    wrong = replace(
        study,
        arms=study.arms | {"grown": Arm(growth="losless", learning_rate=1e-3)},
        demo=replace(study.demo, arms=("scratch", "grown")),
    )
    monkeypatch.setattr("outgrow.experiments.study.load_study", lambda *_: wrong)
    with pytest.raises(UserError, match="growth=losless: unknown growth; did you mean 'lossless'"):
        run_study("from_a_trained_source")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_arm_that_composes_to_no_run_is_named_with_all_its_faults(elsewhere: Path) -> None:
    study = load_study("tiny_rewarm")
    wrong = {
        "taught": Arm(
            growth="lossless", overrides=("transfer=distiled", "train.contxt=3"), learning_rate=1e-3
        ),
        "grown": Arm(growth="losless", learning_rate=1e-3),
        "again": Arm(growth="losless", learning_rate=2e-3),
    }
    study = replace(study, arms=study.arms | wrong)
    demo = replace(study.demo, arms=("scratch", *wrong))
    with pytest.raises(UserError) as caught:
        jobs(study, demo)
    with pytest.raises(UserError) as early:
        check_arms(study, demo)
    assert str(early.value) == str(caught.value)
    for words in (
        "study.yaml, arms taught: 2 faults",
        "transfer=distiled: unknown transfer; did you mean 'distilled'",
        "train.contxt: unknown key; did you mean 'context'",
        "study.yaml, arms grown, again: growth=losless: unknown growth; did you mean 'lossless'",
    ):
        assert words in str(caught.value)


def tiny() -> tuple[Study, Job, list[Job]]:
    study = load_study("tiny_rewarm")
    source = source_job(study)
    assert source is not None
    return study, source, jobs(study, study.demo)


@pytest.mark.slow
def test_a_stage_is_skipped_only_when_it_is_done_and_the_same(elsewhere: Path) -> None:
    _, source, (job, *_) = tiny()
    assert complete(source)
    assert not complete(job, source)
    finish(job)
    assert complete(job, source)
    (job.folder / "summary.json").unlink()
    assert not complete(job, source)  # it goes on from there
    other = replace(job, settings=replace(job.settings, seed=7))
    with pytest.raises(UserError, match="seed"):
        complete(other, source)


@pytest.mark.slow
def test_a_run_from_a_retrained_source_is_refused(elsewhere: Path) -> None:
    _, source, todo = tiny()
    job = next(job for job in todo if job.arm == "lossless")
    finish(job)
    assert complete(job, source)
    ledger = source.folder / "final" / "ledger.json"
    ledger.write_text(json.dumps(json.loads(ledger.read_text()) | {"val_loss": 3.9}))
    with pytest.raises(UserError, match=r"started from a source that .* no longer holds"):
        complete(job, source)


@pytest.mark.slow
def test_a_complete_study_trains_nothing(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import outgrow.experiments.study as module

    _, source, todo = tiny()
    began: list[list[str]] = []
    monkeypatch.setattr(module, "prepare_text", lambda *_: None)
    monkeypatch.setattr(
        module,
        "run_jobs",
        lambda jobs, *_: began.append([job.name for job in jobs]) or [finish(job) for job in jobs],
    )
    finish(todo[1])
    done = run_study("tiny_rewarm")
    assert began == [[job.name for job in todo if job is not todo[1]]]
    assert run_study("tiny_rewarm") == done
    assert len(began) == 1
    assert done.folders == tuple(job.folder for job in todo)
    assert (done.out, done.readme) == (Path("runs/comparison-tiny_rewarm"), None)
    assert f"{len(todo)} runs, {len(todo)} of them complete" in capsys.readouterr().out
    (source.folder / "summary.json").unlink()
    monkeypatch.setattr(
        module,
        "run_jobs",
        lambda jobs, *_: began.append([job.name for job in jobs]) or (source.folder / "summary.json").touch(),
    )
    run_study("tiny_rewarm")
    assert began[-1] == [source.name]


def obey(job: Job, log: str) -> str:
    """Stands in for a training run, in a process of the pool: fails where it is told to."""
    import torch

    print("words of the run", file=sys.stderr)
    if "seed=13" in job.overrides:
        raise UserError("source: missing")
    Path(log).with_suffix(".done").write_text(f"{job.overrides} {torch.get_num_threads()}")
    return log


@pytest.mark.slow
def test_runs_are_spread_over_processes_and_one_that_fails_leaves_the_others_their_turn(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import outgrow.experiments.study as module

    monkeypatch.setattr(module, "cores", lambda: 2)
    _, source, todo = tiny()
    run_jobs(todo[:2], 2, elsewhere / "logs", Display(), obey)
    done = [(elsewhere / "logs" / f"{job.name}.done").read_text() for job in todo[:2]]
    assert done == [f"{job.overrides} 1" for job in todo[:2]]  # one core for each
    assert capsys.readouterr().out.count("done") == 2
    wrong, bad = replace(source, overrides=("seed=13",)), replace(todo[0], overrides=("seed=13",))
    with pytest.raises(
        RunFailed, match=rf"{source.name}: source: missing\n.*its log: .*{source.name}\.log"
    ) as caught:
        run_jobs([wrong, bad, todo[1]], 1, elsewhere / "more", Display(), obey)
    assert str(caught.value).startswith("2 of 3 runs failed:")
    assert (elsewhere / "more" / f"{todo[1].name}.done").exists()


def study_of_sleepers(folder: str, at_once: int) -> None:
    """A study's own process: four runs that note their beginning, sleep, and note SIGTERM."""
    import os
    import signal
    import threading
    from concurrent.futures import process

    run = process._ExecutorManagerThread.run

    def run_slowly(thread: process._ExecutorManagerThread) -> None:
        run(thread)
        time.sleep(1)

    process._ExecutorManagerThread.run = run_slowly  # type: ignore[method-assign]
    os.setpgrp()  # as a terminal's foreground group, which does not ignore Ctrl-C as a shell's background does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    study = load_study("tiny_rewarm")
    job = source_job(study)
    assert job is not None
    todo = [replace(job, name=f"run{number}", overrides=(f"number={number}",)) for number in range(4)]
    try:
        with terminable():
            run_jobs(todo, at_once, Path("logs"), Display(), sleeper)
    except (KeyboardInterrupt, Terminated) as stop:
        assert threading.active_count() == 1  # nobody is left to be woken when the interpreter ends
        sys.exit(75 if isinstance(stop, Terminated) else 130)


def sleeper(job: Job, log: str) -> str:
    import os
    import signal

    def save(*_: object) -> None:
        Path(log).with_suffix(".saved").touch()
        os._exit(75)

    signal.signal(signal.SIGTERM, save)
    Path(log).with_suffix(".begun").touch()
    time.sleep(100)
    return log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at_once", "sent", "status"), [(1, "SIGINT", 130), (2, "SIGINT", 130), (2, "SIGTERM", 75)]
)
def test_a_signal_stops_a_study_within_seconds_and_nothing_new_starts(
    at_once: int, sent: str, status: int, tmp_path: Path
) -> None:
    """A terminal sends Ctrl-C to all processes, a scheduler SIGTERM to the study's own."""
    import multiprocessing
    import os
    import signal

    study = multiprocessing.get_context("spawn").Process(
        target=study_of_sleepers, args=(str(tmp_path), at_once)
    )
    study.start()
    until = time.monotonic() + 600
    while len(list(tmp_path.glob("logs/*.begun"))) < at_once and time.monotonic() < until:
        time.sleep(0.2)
    assert study.pid is not None
    began = time.monotonic()
    send = os.killpg if sent == "SIGINT" else os.kill
    send(study.pid, signal.Signals[sent])
    study.join(600)
    assert study.exitcode == status
    assert time.monotonic() - began < 60  # idle, it takes less than one second
    assert len(list(tmp_path.glob("logs/*.begun"))) == len(list(tmp_path.glob("logs/*.saved"))) == at_once


@pytest.mark.slow
def test_a_source_may_be_a_checkpoint_that_is_there(elsewhere: Path) -> None:
    study = replace(load_study("tiny_rewarm"), source="runs/tiny_short_source-scratch-s0/final")
    assert source_job(study) is None
    assert {
        job.settings.source for job in jobs(study, replace(study.demo, arms=("scratch", "lossless")))
    } == {study.source}


def test_progress_is_read_from_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert position(path) == (0.0, "")
    path.write_text(
        '{"kind": "eval", "tokens": 0, "val_loss": 7.5}\n{"kind": "train", "tokens": 4096, "loss": '
        '7.0}\n{"kind": "tr'
    )
    assert position(path) == (4096, "val loss 7.500")
