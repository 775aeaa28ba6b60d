"""The typed door: what is wrong is told at once, with near matches, before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from outgrow.model.base.compose import CONF, compose_config, load_yaml, sweep_points
from outgrow.model.base.errors import UserError
from outgrow.model.base.overrides import own_folder
from outgrow.model.base.settings import settings_of
from outgrow.train.__main__ import flags_first
from outgrow.train.compose import compose
from outgrow.train.settings import Budget, identity, settings_hash

GOOD = ["growth=scratch", "target=tiny_target"]


def fault(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose([*GOOD, *overrides])
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.bugdet_tokens=5", "train.bugdet_tokens: unknown key; did you mean 'budget_tokens'"),
        ("+train.contxt=5", "train.contxt: unknown key; did you mean 'context'"),
        ("growth=scrach", "unknown growth; did you mean 'scratch'"),
        ("logger=null", "logger=null: unknown logger; known: none, "),
        ("sed=1", "sed: unknown key; did you mean 'seed'"),
        ("nosie=0.3", "nosie: unknown key; did you mean 'growth.noise'?"),
        ("train.lerning_rate=1", "train.lerning_rate: unknown key; did you mean 'optimizer.learning_rate'?"),
        ("bugdet_tokens=5", "bugdet_tokens: unknown key; did you mean 'train.budget_tokens'?"),
        (
            "train.learning_rate=0.01",
            "train.learning_rate: unknown key; did you mean 'optimizer.learning_rate'?",
        ),
        ("budget_tokens=9000", "budget_tokens: unknown key; did you mean 'train.budget_tokens'?"),
        ("seed=a", "seed: expected a whole number; found 'a'"),
        ("train.context=1.5", "train.context: expected a whole number; found 1.5"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected a list of a number (2 of them)"),
        ("optimizer.name=adamv", "optimizer.name: unknown value 'adamv'; did you mean 'adamw'"),
        ("schedule.name=wsb", "schedule.name: unknown value 'wsb'"),
        ("schedule.rewarm=ful", "schedule.rewarm: unknown value 'ful'; did you mean 'full'"),
        ("train.precision=fp16", "train.precision: unknown value 'fp16'"),
        ("data.validation_fraction=2", "data.validation_fraction: must be between 0 and 1"),
        ("train.budget_tokens=4000", "less than one batch of 4096 tokens"),
        ("train.batch_tokens=200", "whole number of windows of train.context=128 tokens; found 200, try 256"),
        ("train.keep=0", "train.keep: must be positive"),
        ("train.micro_batch=0", "train.micro_batch: must be positive, or null"),
        ("train.gradient_clip=0", "train.gradient_clip: must be positive, or null"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: expected a finite number; found nan"),
        ("optimizer.learning_rate=1e400", "optimizer.learning_rate: expected a finite number; found inf"),
        ("optimizer.learning_rate=-1e-3", "optimizer.learning_rate: must be positive; found -0.001"),
        ("optimizer.epsilon=0", "optimizer.epsilon: must be positive"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay: must not be negative"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas: from 0 on, less than 1; found (0.9, 1.0)"),
        ("optimizer.betas=[nan,0.9]", "optimizer.betas[0]: expected a finite number; found nan"),
        ("optimizer.betas=0.9", "optimizer.betas: expected a list of a number (2 of them); found 0.9"),
        ("optimizer.betas=true", "optimizer.betas: expected a list of a number (2 of them); found True"),
        ("seed=-1", "seed: from 0 on, less than 2^63"),
        ("seed=1e30", "seed: from 0 on, less than 2^63"),
        ("data.seed=-1", "data.seed: from 0 on, less than 2^63"),
        ("source_tokens=0", "source_tokens: must be positive, or null"),
        ("forecast.days=-1", "forecast.days: must be positive, or null"),
        ("train.gradient_clip=nan", "train.gradient_clip: expected"),
        ("train.hang_seconds=.inf", "train.hang_seconds: expected"),
        (f"forecast.mfu={10**400}", "forecast.mfu: expected a finite number; found 1000"),
        ("schedule.warmup_fraction=0.9", "more than the budget"),
        ("schedule.decay_fraction=null", "schedule.decay_fraction: missing"),
        ("growth=lossless", "source: missing; growth=lossless starts from one"),
        ("target=null", "target: missing"),
        ("~train.context", "train.context: missing"),
        ("data=files", "data.path: missing"),
        ("name=a/b", "name: must be usable as the name of a folder"),
        ("seed=0,1", "add -m"),
        ("seed", "not of the form key=value"),
    ],
)
def test_a_fault_names_the_key_and_the_way_out(override: str, words: str) -> None:
    assert words in fault(override)


def test_all_faults_are_told_at_once() -> None:
    message = fault("train.bugdet_tokens=5", "sed=1", "optimizer.learning_rate=fast", "growth=scrach")
    assert message.startswith("4 faults:")
    assert all(word in message for word in ("bugdet_tokens", "sed", "optimizer.learning_rate", "scrach"))


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner


def test_what_lacks_a_value_is_not_built_around_it() -> None:
    """A key whose fault was known before is missing in what holds it too: told once, and nothing is built."""

    def disagreements(outer: Outer) -> list[str]:
        return [f"of {outer.inner.size}"]

    known = ["inner.size: must be given"]
    with pytest.raises(UserError) as caught:
        settings_of(Outer, {"inner": {}}, known, disagreements)
    assert str(caught.value) == "inner.size: must be given"


def test_values_arrive_typed() -> None:
    settings = compose(
        [
            *GOOD,
            "optimizer.learning_rate=1",
            "train.budget_tokens=1e6",
            "target={model_type:phi,hidden_size:8}",
            "progress=false",
        ]
    )
    assert settings.optimizer.learning_rate == 1.0
    assert isinstance(settings.train.budget_tokens, int)
    assert settings.target == {"model_type": "phi", "hidden_size": 8}
    assert settings.progress is False
    assert settings.optimizer.betas == (0.9, 0.95)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 3  # type: ignore[misc]


def test_a_leading_tilde_is_expanded_wherever_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = [
        "growth=lossless",
        "target=tiny_target",
        "source=~/lr=0.1",
        "transfer.teacher={model:'~/big',weight:[0.5,0.5],temperature:[1.0,1.0],until:0.5}",
        "data.path=~/texts",
        "data=files",
    ]
    settings = compose(given)
    assert (settings.source, settings.data.path) == (f"{tmp_path}/lr=0.1", f"{tmp_path}/texts")
    assert settings.transfer.teacher is not None
    assert settings.transfer.teacher.model == f"{tmp_path}/big"
    (tmp_path / "study.yaml").write_text("{source: ~/a, runs: [~/b, ~c], nothing: ~}")
    assert load_yaml(tmp_path / "study.yaml") == {
        "source": f"{tmp_path}/a",
        "runs": [f"{tmp_path}/b", "~c"],
        "nothing": None,
    }


@pytest.mark.slow
def test_the_hash_follows_what_changes_the_result_and_nothing_else() -> None:
    base = compose(GOOD)
    for neutral in (
        "out=elsewhere",
        "logger=none",
        "progress=false",
        "train.keep=7",
        "train.save_every_tokens=null",
        "data.folder=/there",
    ):
        assert settings_hash(compose([*GOOD, neutral])) == settings_hash(base), neutral
    for other in (
        "seed=1",
        "train.context=64",
        "growth=tile source=x",
        "optimizer.weight_decay=0",
        "data.vocab_size=999",
    ):
        assert settings_hash(compose([*GOOD, *other.split()])) != settings_hash(base), other
    assert identity(dataclasses.asdict(base)) == identity(base)


def test_tokens_become_steps_once() -> None:
    loop = dataclasses.replace(
        compose(GOOD).train,
        budget_tokens=1050,
        batch_tokens=100,
        context=25,
        eval_every_tokens=240,
        log_every_tokens=1,
        save_every_tokens=None,
    )
    budget = Budget.of(loop)
    assert (budget.steps, budget.rows, budget.eval_every, budget.log_every, budget.save_every) == (
        10,
        4,
        2,
        1,
        None,
    )
    assert [step for step in range(1, 11) if budget.due(3, step)] == [3, 6, 9, 10]
    assert [step for step in range(1, 11) if dataclasses.replace(budget, save_every=5).saves(step)] == [5]


@pytest.mark.parametrize(
    ("second", "joined"),
    [
        ("target={vocab_size:200}", "{hidden_size:96,vocab_size:200}"),
        ("target.vocab_size=200", "{hidden_size:96,vocab_size:200}"),
        ("target.a.b=c", "{hidden_size:96,a:{b:c}}"),
        ("target={hidden_size:80,vocab_size:200}", "{hidden_size:96,hidden_size:80,vocab_size:200}"),
    ],
)
def test_keys_and_values_given_twice_are_told_in_our_words(second: str, joined: str) -> None:
    words = f"target: given 2 times; give all its keys and values at once: 'target={joined}'"
    given = ["target={hidden_size:96}", second]
    assert fault(*given) == words
    with pytest.raises(UserError) as caught:
        sweep_points(["seed=0,1", *given])
    assert str(caught.value) == words
    assert words in compose_config(CONF, "grow", given)[1]


def test_a_file_that_changes_is_composed_anew_and_nothing_composed_is_shared(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("defaults:\n  - size: small\n  - _self_\nsteps: [1]\n")
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "small.yaml").write_text("width: 8\n")
    first, _ = compose_config(tmp_path, "run", ["steps=[2]"])
    first.size.width = 9  # by a caller, on its own copy
    assert compose_config(tmp_path, "run", [])[0] == {"size": {"width": 8}, "steps": [1]}
    (tmp_path / "size" / "small.yaml").write_text("width: 16\n")
    assert compose_config(tmp_path, "run", [])[0].size.width == 16
    (tmp_path / "size" / "large.yaml").write_text("width: 32\n")
    assert compose_config(tmp_path, "run", ["size=large"])[0].size.width == 32


@pytest.mark.slow
def test_of_plain_values_the_last_holds() -> None:
    assert compose([*GOOD, "seed=1", "seed=2"]).seed == 2
    assert compose([*GOOD, "target={hidden_size:96}", "target=tiny_target"]).target == "tiny_target"


def test_a_sweep_is_expanded_in_order() -> None:
    points = sweep_points(["growth=scratch,tile", "seed=0,1", "target=tiny_target", "data.path='a,b'"])
    assert [point[:2] for point in points] == [
        [f"growth={g}", f"seed={s}"] for g in ("scratch", "tile") for s in (0, 1)
    ]
    assert all(point[2:] == ["target=tiny_target", "data.path='a,b'"] for point in points)


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ("seed=range(3)", ["seed=0", "seed=1", "seed=2"]),
        ("seed=range(1,6,2)", ["seed=1", "seed=3", "seed=5"]),
        (
            "optimizer.learning_rate=choice(1e-3,2e-3)",
            ["optimizer.learning_rate=0.001", "optimizer.learning_rate=0.002"],
        ),
        ("schedule=glob(*)", ["schedule=cosine", "schedule=wsd"]),
        ("optimizer=glob(adamw*)", ["optimizer=adamw", "optimizer=adamw_8bit"]),
    ],
)
def test_a_sweep_takes_what_hydras_sweeper_takes(sweep: str, values: list[str]) -> None:
    assert sweep_points([sweep, "growth=scratch"]) == [[value, "growth=scratch"] for value in values]


def test_a_sweep_that_hydras_sweeper_does_not_make_is_refused_in_its_words() -> None:
    with pytest.raises(
        UserError, match=r"BasicSweeper does not support sweep type : INTERVAL_SWEEP; give its values"
    ):
        sweep_points(["optimizer.learning_rate=interval(0,1)"])


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outgrow.train", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=600,
    )


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


@pytest.mark.slow
def test_the_door_answers_a_fault_with_status_2_and_leaves_nothing(tmp_path: Path) -> None:
    for flags in ([], ["-m"]):
        done = run(*flags, *GOOD, "train.bugdet_tokens=5", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("error: train.bugdet_tokens: unknown key")
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_tells_the_fault_of_its_last_point_before_the_first_trains(tmp_path: Path) -> None:
    done = run("-m", *GOOD, "seed=0,a", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: seed: expected a whole number; found 'a'\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", ["--config-dir s=t a=1 -m b=2", "a=1 --config-dir=s=t b=2 -m", "a=1 -cd s=t b=2 -m"]
)
def test_flags_may_stand_anywhere(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s=t").mkdir()
    own, words = own_folder(given.split())
    assert (own, flags_first(words)) == (tmp_path / "s=t", ["-m", "a=1", "b=2"])


@pytest.mark.parametrize("given", ["--config-dir", "--config-dir=", "--config-dir none", "-cd=none"])
def test_a_folder_of_settings_that_is_not_there_is_told(given: str) -> None:
    with pytest.raises(UserError, match=r"^-(-config-dir|cd) (none)?: no such folder; give the one that"):
        own_folder(given.split())


EXPERIMENT = "# @package _global_\nstudy: mine\ntarget: tiny_target\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of the user's own settings: an experiment, and a way to grow."""
    for group in ("experiment", "growth"):
        (tmp_path / "own" / group).mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text(EXPERIMENT)
    tile = (CONF / "growth/tile.yaml").read_text().replace("name: tile", "name: plaster")
    (tmp_path / "own/growth/plaster.yaml").write_text(tile)
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("experiment=mnie growth=scratch target=tiny_target", "unknown experiment; did you mean 'mine'?"),
        ("experiment=mine growth=scrach source=s", "growth=scrach: unknown growth; did you mean 'scratch'"),
        ("experiment=mine growth=plastr source=s", "growth=plastr: unknown growth; did you mean 'plaster'"),
        ("experiment=mine grwoth=scratch source=s", "grwoth: unknown key; did you mean 'growth'?"),
        (
            "experiment=mine growth=scratch train.contxt=1",
            "train.contxt: unknown key; did you mean 'context'?",
        ),
    ],
)
def test_faults_beside_a_folder_of_ones_own_are_told_with_near_matches_of_both(
    own: Path, given: str, told: str
) -> None:
    with pytest.raises(UserError) as fault:
        compose(given.split(), own)
    assert told in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("defaults: [override /data: fils]", "wrong.yaml: data=fils: unknown data; did you mean 'files'?"),
        ("defaults: [/dta: files]", "wrong.yaml: dta=files: unknown group; did you mean 'data'"),
        ("defaults: [override /dta: files]", "In 'experiment/wrong': Could not override 'dta'. No match in"),
        ("trian: {context: 8}", "trian: unknown key; did you mean 'train'"),
        ("train: {contxt: 8}", "train.contxt: unknown key; did you mean 'context'"),
        ("train: {contxt", "wrong.yaml, line 5, column 1: not valid YAML"),
    ],
)
def test_a_fault_of_a_file_of_ones_own_is_told_in_one_line(own: Path, more: str, told: str) -> None:
    (own / "experiment/wrong.yaml").write_text(f"{EXPERIMENT}{more}\n")
    with pytest.raises(UserError) as fault:
        compose(["experiment=wrong", "growth=scratch", "target=tiny_target"], own)
    assert told in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_file_of_ones_own_that_another_would_be_read_for_is_told(own: Path) -> None:
    shutil.copy(CONF / "growth/lemon.yaml", own / "growth/lemon.yaml")  # a copy hides nothing
    (own / "experiment/tiny.yaml").write_text(EXPERIMENT)
    with pytest.raises(
        UserError, match=r"own/experiment/tiny.yaml: .*conf/experiment/tiny.yaml would be read"
    ):
        compose(["experiment=tiny"], own)


def test_a_run_of_ones_own_experiment_is_named_after_what_it_changes_against_that(own: Path) -> None:
    given = ["experiment=mine", "growth=scratch", "optimizer.learning_rate=0.01"]
    assert compose(given, own).name == "mine-scratch-lr0.01-s0"


def test_a_sweep_and_a_growth_find_leaves_of_ones_own(own: Path) -> None:
    from outgrow.growth.__main__ import settings_from as growth_from

    points = sweep_points(["experiment=glob(m*)", "growth=plaster"], own)
    assert points == [["experiment=mine", "growth=plaster"]]
    given = ["source=phi_1_5", "target=phi_2", "growth=plaster", "plan_only=true"]
    assert growth_from([*given, "--config-dir", str(own)]).growth.name == "plaster"


@pytest.mark.slow
def test_a_folder_of_settings_of_ones_own_works_with_a_sweep_wherever_its_flag_stands(tmp_path: Path) -> None:
    """As README says for an installed package."""
    (tmp_path / "settings/experiment").mkdir(parents=True)
    experiment = "# @package _global_\nstudy: mine\ntarget: tiny_target\n"
    (tmp_path / "settings/experiment/mine.yaml").write_text(experiment)
    (tmp_path / "settings/suite").mkdir()
    task = "{task: piqa, group: own, shots: 0, metric: acc}"
    (tmp_path / "settings/suite/few.yaml").write_text(f"name: few\ntasks: [{task}]\n")
    more = ["growth=scratch", "evaluate.suite=few", "dry_run=true", "forecast.gpus=1", "-m", "seed=0,1"]
    done = run("--config-dir", "settings", "experiment=mine", *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\S+): [\d,]+ parameters", done.stdout, re.M) == [
        "mine-scratch-s0",
        "mine-scratch-s1",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_a_tracker_that_is_not_installed_is_told_before_training(flags: list[str], tmp_path: Path) -> None:
    if find_spec("trackio") is not None:
        pytest.skip("trackio is installed here")
    done = run(*flags, *GOOD, "logger=trackio", cwd=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert (
        done.stderr
        == "error: logger=trackio: not installed; pip install -e '.[trackio]', or choose logger=none\n"
    )


def test_extras_are_spelt_as_installers_compare_them() -> None:
    """Old versions of pip look an extra up as it is written, and a built package has it normalised (PEP
    685)."""
    extras = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in extras} == set(extras)


@pytest.mark.slow
def test_the_door_is_light() -> None:
    code = (
        "import sys, outgrow.train.__main__ as door; door.compose(['growth=scratch', 'target=tiny_target']); "
    )
    code += (
        "print([name for name in ('torch', 'transformers', 'accelerate', 'datasets', 'wandb') if name in "
        "sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT).stdout
        == "[]\n"
    )


@pytest.mark.slow
def test_8_bit_adam_is_refused_where_it_would_be_sharded() -> None:
    tiny = ["growth=scratch", "target=tiny_target", "optimizer=adamw_8bit"]
    compose(tiny)
    with pytest.raises(UserError, match="use sharding=none, or optimizer=adamw"):
        compose([*tiny, "sharding=full"])


def test_a_target_replaces_the_one_that_an_experiment_gives() -> None:
    """As a preset's name would: sizes that the experiment grew by are not mixed into it."""
    given = ["experiment=tiny", "growth=lossless"]
    assert compose(given).target == {"num_hidden_layers": 8}
    assert compose([*given, "target={hidden_size:96}"]).target == {"hidden_size": 96}
    assert compose([*given, "target=tiny_target"]).target == "tiny_target"
