"""Horizons: every decayed end is, to the bit, the run that its budget alone would have given."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from helpers.toy import assert_same_run, rows
from outgrow.model.base.errors import UserError
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.data.settings import MixtureSettings, PhaseSettings, SourceSettings
from outgrow.train.loop import train_horizons
from outgrow.train.run.horizons import branch_step, depends_on_budget, stable_checkpoint
from outgrow.train.schedule import ScheduleSettings, factor, stable_steps
from outgrow.train.settings import Settings, horizon_runs

HORIZONS = (768, 1280, 2048)  # 6, 10 and 16 steps of 128 tokens
HALF_DECAYS = "schedule.decay_fraction=0.5"
DEEPER = "target={model_type:phi,vocab_size:300,max_position_embeddings:32,tie_word_embeddings:false,hidden_size:16,"
DEEPER += "intermediate_size:32,num_hidden_layers:4,num_attention_heads:2,num_key_value_heads:2}"


@pytest.fixture(scope="session")
def trunk(overrides: list[str]) -> Settings:
    """A run with three horizons that grows from two to four layers in its stable phase."""
    asked = [
        f"schedule.horizons={list(HORIZONS)}",
        "schedule.warmup_tokens=192",
        "schedule.decay_fraction=0.5",
        "growth=g_stack",
        DEEPER,
    ]
    stages = (
        "growth.stages=[{until_tokens:256,layers:0.5},{until:1.0,operator:lossless,depth:stack,noise:0.0}]"
    )
    return compose(
        [
            *[o for o in overrides if not o.startswith(("target", "growth", "train.eval_every"))],
            *asked,
            stages,
        ]
    )


def placed(settings: Settings, folder: Path) -> Settings:
    return dataclasses.replace(settings, out=str(folder / settings.name))


@pytest.fixture(scope="session")
def horizons(trunk: Settings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of the three horizons. Read only."""
    return train_horizons(placed(trunk, tmp_path_factory.mktemp("horizons")))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_a_horizon_is_the_run_that_its_budget_alone_gives(
    trunk: Settings, horizons: list[Path], number: int, tmp_path: Path
) -> None:
    alone = horizon_runs(placed(trunk, tmp_path))[number]
    assert_same_run(horizons[number], loop.train(alone))


@pytest.mark.slow
def test_muons_state_grows_in_the_trunk_that_a_horizon_takes_over(
    overrides: list[str], tmp_path: Path
) -> None:
    own = [o for o in overrides if not o.startswith(("target", "growth", "train.eval_every"))]
    stages = "growth.stages=[{until_tokens:256,layers:0.5},{until:1.0,depth:stack,noise:0.0,moments:copied}]"
    asked = [
        f"schedule.horizons={list(HORIZONS[:2])}",
        "schedule.warmup_tokens=192",
        DEEPER,
        "optimizer=muon",
    ]
    settings = compose([*own, *asked, "growth=g_stack", stages])
    folders = train_horizons(placed(settings, tmp_path / "trunk"))
    assert "trunk" in json.loads((folders[1] / "run.json").read_text())
    alone = horizon_runs(placed(settings, tmp_path))[1]
    assert_same_run(folders[1], loop.train(alone))


@pytest.mark.slow
def test_each_goes_on_from_the_longest_trunk_before_it_and_pays_for_it(horizons: list[Path]) -> None:
    records = [json.loads((folder / "run.json").read_text()) for folder in horizons]
    assert "trunk" not in records[0]
    assert [(Path(record["trunk"]["folder"]).name, record["trunk"]["step"]) for record in records[1:]] == [
        (horizons[0].name, 3),
        (horizons[1].name, 5),
    ]
    for folder, record, tokens in zip(horizons, records, HORIZONS, strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["tokens"], record["budget_tokens"]) == (tokens, tokens)
        first, last = record["spans"]
        assert summary["flops"] == pytest.approx(
            256 * first["flops_per_token"] + (tokens - 256) * last["flops_per_token"]
        )
    rates = [row["learning_rate"] for row in rows(horizons[2], "train")]
    assert rates[3] == 3e-3 > rates[-1]  # step 8: still at the peak; the last: decayed


@pytest.mark.slow
def test_a_longer_horizon_is_added_to_a_trunk_that_exists(
    trunk: Settings, horizons: list[Path], tmp_path: Path
) -> None:
    for folder in horizons[:2]:
        shutil.copytree(folder, tmp_path / folder.name)
    folders = train_horizons(placed(trunk, tmp_path))
    assert_same_run(folders[2], horizons[2])
    assert json.loads((folders[2] / "run.json").read_text())["trunk"]["step"] == 5


@pytest.mark.slow
def test_growth_at_a_share_of_each_horizon_has_no_trunk_to_share(
    overrides: list[str], tmp_path: Path
) -> None:
    own = [o for o in overrides if not o.startswith(("target", "growth", "train.eval_every"))]
    asked = [
        f"schedule.horizons={list(HORIZONS[::2])}",
        "schedule.warmup_tokens=192",
        DEEPER,
        "growth=three_steps",
        "schedule.decay_fraction=0.25",
    ]
    settings = compose([*own, *asked])
    folders = train_horizons(placed(settings, tmp_path / "together"))
    for folder, run in zip(folders, horizon_runs(placed(settings, tmp_path)), strict=True):
        assert_same_run(folder, loop.train(run))
        assert "trunk" not in json.loads((folder / "run.json").read_text())
        assert stable_checkpoint(folder) is None
    # quarters of 6 and of 16 steps of 128 tokens
    grown_at = [[row["tokens"] for row in rows(folder, "growth")] for folder in folders]
    assert grown_at == [[256, 384, 512], [512, 1024, 1536]]


@pytest.mark.parametrize(
    ("asked", "depends"),
    [
        ([], False),
        (["growth=stack_in_trunk", "growth.stages=[{until_tokens:256},{until:1.0}]"], False),
        (["growth=three_steps"], True),
        (["growth=stack_in_trunk", "growth.stages=[{until_tokens:128},{until:0.5},{until:1.0}]"], True),
        (["growth=lossless", "source=small", "transfer=distilled"], True),
        (["growth=lossless", "source=small", "schedule.rewarm=new"], True),
    ],
)
def test_a_trunk_is_shared_where_a_run_does_not_depend_on_its_budget(
    overrides: list[str], asked: list[str], depends: bool
) -> None:
    horizons = ["schedule.horizons=[768]", "schedule.warmup_tokens=128", "schedule.decay_fraction=0.25"]
    settings = compose([*overrides, *horizons, *asked])
    assert depends_on_budget(settings) is depends
    assert (branch_step(settings) is None) is depends
    sources = {name: SourceSettings(settings.data) for name in "ab"}
    first = PhaseSettings(weights={"a": 1.0}, tokens=256)
    for end, is_share in ((first, False), (dataclasses.replace(first, tokens=None, share=0.5), True)):
        mixture = MixtureSettings("two", sources, (end, PhaseSettings(weights={"b": 1.0})))
        assert depends_on_budget(dataclasses.replace(settings, mixture=mixture)) is (depends or is_share)


def test_a_run_whose_trunk_is_gone_before_it_took_it_over_says_so(
    trunk: Settings, horizons: list[Path], tmp_path: Path
) -> None:
    for folder in horizons[:2]:
        shutil.copytree(folder, tmp_path / folder.name)
    begun = tmp_path / horizons[1].name
    record = json.loads((begun / "run.json").read_text())
    record["trunk"]["folder"] = str(tmp_path / "gone")
    del record["sha256"]
    shutil.rmtree(begun)
    begun.mkdir()
    (begun / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="which is gone; delete the folder to train it from its beginning"):
        train_horizons(placed(trunk, tmp_path))


def half_lost(checkpoint: Path) -> None:
    """Zeros where a disk has lost a block."""
    shard = next(checkpoint.glob("*.safetensors"))
    size = shard.stat().st_size
    data = shard.read_bytes()[: size // 2] + bytes(size - size // 2)
    shard.unlink()  # it may be a hard link
    shard.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [[1], [0, 1]])
def test_a_damaged_trunk_is_told_and_a_shorter_one_or_none_is_taken(
    trunk: Settings,
    horizons: list[Path],
    tmp_path: Path,
    damaged: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in horizons[:2]:
        shutil.copytree(folder, tmp_path / folder.name)
    for number in damaged:
        kept = stable_checkpoint(tmp_path / horizons[number].name)
        assert kept is not None
        half_lost(kept)
    asked = dataclasses.replace(placed(trunk, tmp_path), progress="lines")
    longest = train_horizons(asked)[2]
    assert capsys.readouterr().out.count("no trunk to go on from") == len(damaged)
    taken = json.loads((longest / "run.json").read_text()).get("trunk")
    assert (taken and taken["step"]) == (3 if damaged == [1] else None)
    assert_same_run(longest, horizons[2])


def test_a_trunk_that_is_damaged_before_it_was_taken_over_is_told(
    trunk: Settings, horizons: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(horizons[0], tmp_path / horizons[0].name)
    record = json.loads((horizons[1] / "run.json").read_text())
    record["trunk"]["folder"] = str(tmp_path / horizons[0].name)
    del record["sha256"]
    begun = tmp_path / horizons[1].name
    begun.mkdir()
    (begun / "run.json").write_text(json.dumps(record))
    kept = stable_checkpoint(tmp_path / horizons[0].name)
    assert kept is not None
    half_lost(kept)
    with pytest.raises(
        UserError, match=r"goes on from a state that is damaged .*; delete the folder to train"
    ):
        train_horizons(placed(trunk, tmp_path))


def test_another_trunk_is_refused_with_what_differs(
    trunk: Settings, horizons: list[Path], tmp_path: Path
) -> None:
    other = dataclasses.replace(trunk, optimizer=dataclasses.replace(trunk.optimizer, learning_rate=1e-3))
    longer = horizon_runs(placed(other, tmp_path))[2]
    with pytest.raises(UserError, match=r"optimizer.learning_rate: the trunk has 0.003, asked is 0.001"):
        loop.train(longer, trunks=horizons[:1])


def test_the_kept_state_is_the_last_before_the_decay(horizons: list[Path]) -> None:
    assert [kept.name for folder in horizons if (kept := stable_checkpoint(folder))] == [
        "step-00000003",
        "step-00000005",
        "step-00000008",
    ]


def test_the_rates_of_two_budgets_are_equal_until_the_shorter_one_decays() -> None:
    settings = ScheduleSettings("wsd", 0.05, 0.0, "full", 0.25, warmup_tokens=1000)
    rates = [
        [factor(settings, (i + 0.5) / n, from_scratch=True, tokens=100 * (i + 0.5)) for i in range(n)]
        for n in (37, 61)
    ]
    shared = stable_steps(settings, 37)
    assert shared == 28
    assert rates[0][:shared] == rates[1][:shared]
    assert rates[0][shared] < rates[1][shared] == 1.0
    assert rates[0][:3] == [0.05, 0.15, 0.25]


@pytest.mark.parametrize(("shape", "expected"), [("linear", 0.5), ("sqrt", 1 - 0.5**0.5)])
def test_decay_is_linear_or_one_minus_root(shape: str, expected: float) -> None:
    settings = ScheduleSettings("wsd", 0.0, 0.0, "full", 0.2, decay=shape)  # type: ignore[arg-type]
    assert factor(settings, 0.9, from_scratch=True) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (["schedule.horizons=[768]"], "schedule.warmup_tokens=N, a warm-up that all of them share"),
        (["schedule.horizons=[1280,768]", "schedule.warmup_tokens=128"], "each longer than the one before"),
        (["schedule.horizons=[64]", "schedule.warmup_tokens=0"], "at least a batch"),
        (["schedule.warmup_tokens=9999"], "schedule.warmup_tokens: between 0 and the budget of 768"),
        (
            ["growth=deep_progressive", "schedule.horizons=[768]", "schedule.warmup_tokens=128", HALF_DECAYS],
            "growth at 0.6 of each horizon is inside its decay, from 0.5; let it grow earlier",
        ),
        (
            [
                "growth=g_stack",
                "schedule.horizons=[768]",
                "schedule.warmup_tokens=128",
                "growth.stages=[{until_tokens:700},{until:1.0}]",
            ],
            "growth after 700 tokens is inside the decay of the shortest horizon, from 576; let it grow earlier",
        ),
        (
            ["growth=g_stack", "growth.stages=[{layers:0.5},{until:1.0}]"],
            "each ends at until=SHARE or after until_tokens=N",
        ),
    ],
)
def test_horizons_that_cannot_be_are_refused(overrides: list[str], asked: list[str], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        compose([*overrides, *asked])
