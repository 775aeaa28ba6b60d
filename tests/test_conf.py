"""The conf tree, globbed and never listed: every leaf composes, and the arms of a study differ in nothing but
growth and name."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from outgrow.model.base.compose import CONF
from outgrow.train.compose import compose
from outgrow.train.settings import identity

OTHER_DOORS = {"prompts"}  # groups that train.yaml has no use for; their own tests compose them
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in OTHER_DOORS)
LEAVES = [(group, leaf.stem) for group in GROUPS for leaf in sorted((CONF / group).glob("*.yaml"))]
EXPERIMENTS = [leaf for group, leaf in LEAVES if group == "experiment"]
ARMS = [leaf for group, leaf in LEAVES if group == "growth"]
NEEDED = {  # what a leaf leaves to its user
    ("data", "files"): ["data.path=texts"],
    ("data", "hub"): ["data.dataset=owner/name"],
    ("data", "prepared"): ["data.path=tokens/x"],
    ("data", "tokens"): ["data.path=x.bin", "data.tokenizer=gpt2"],
}


def test_the_walk_finds_the_tree() -> None:
    assert {"growth", "data", "optimizer", "schedule", "logger", "experiment"} <= set(GROUPS)
    assert len(LEAVES) >= 12


@pytest.mark.slow
# of conf/evaluate.yaml: tests/train/test_suite.py
@pytest.mark.parametrize(("group", "leaf"), [leaf for leaf in LEAVES if leaf[0] != "suite"])
def test_every_leaf_composes(group: str, leaf: str) -> None:
    # its sources name a tokenizer
    needed = NEEDED.get((group, leaf), ["data=fineweb_edu"] if group == "mixture" else [])
    settings = compose(
        [*([] if group == "experiment" else ["source=x", "target=tiny_target"]), f"{group}={leaf}", *needed]
    )
    if group != "experiment":
        assert (
            getattr(settings, group).name == leaf
            if group in ("growth", "optimizer", "schedule", "mixture")
            else getattr(settings, group)
        )


# key: value # the default in words | another: in words | a third
ALTERNATIVES = re.compile(r"^( *)(\w+): \S+ # .*? \| (.+)$")


def alternatives() -> list[tuple[str, str]]:
    """What the comments of conf/train.yaml and conf/schedule offer instead of a default, as (leaf,
    override)."""
    offered = []
    for file in (CONF / "train.yaml", *sorted((CONF / "schedule").glob("*.yaml"))):
        group, lines = "" if file.parent == CONF else "schedule.", file.read_text().splitlines()
        for i, line in enumerate(lines):
            if match := ALTERNATIVES.match(line):
                over = next(
                    (above for above in reversed(lines[:i]) if match[1] and re.match(r"\w", above)), ""
                )
                parent = f"{over.partition(':')[0]}." if over else group
                offered += [
                    (file.stem, f"{parent}{match[2]}={words.split()[0].rstrip(':')}")
                    for words in match[3].split(" | ")
                ]
    return offered


def test_comments_offer_alternatives() -> None:
    assert {
        ("train", "train.attention=eager"),
        ("train", "progress=false"),
        ("wsd", "schedule.decay=sqrt"),
    } <= {*alternatives()}


@pytest.mark.parametrize(("leaf", "override"), alternatives())
def test_what_a_comment_offers_is_taken(leaf: str, override: str) -> None:
    schedule = "wsd" if leaf == "train" else leaf
    assert compose(["source=x", "target=tiny_target", f"schedule={schedule}", override])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_is_a_delta_that_opens_with_its_command(experiment: str) -> None:
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert re.search(rf"(outgrow train|-m outgrow\.train)( -m)? experiment={experiment}\b", lines[1])
    assert compose([f"experiment={experiment}"]).study == experiment


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_arms_of_an_experiment_differ_only_in_growth_and_name(experiment: str) -> None:
    given = [f"experiment={experiment}", "source=x"]
    if compose(
        [*given, "growth=scratch"]
    ).schedule.horizons:  # with them, growth on the way is placed by tokens
        given.append("schedule.horizons=[]")
    scratch = identity(compose([*given, "growth=scratch"]))
    for arm in ARMS:
        other = identity(compose([*given, f"growth={arm}"]))
        differing = {key for key in {*scratch, *other} if scratch.get(key) != other.get(key)}
        assert {key for key in differing if not key.startswith("growth.")} <= {"name"}, arm
        assert other["name"] == f"{experiment}-{arm}-source_x-s0"


@pytest.mark.slow
def test_runs_are_named_without_a_clock() -> None:
    settings = compose(["experiment=tiny", "growth=tile", "seed=2"])
    assert (settings.name, settings.out) == ("tiny-tile-s2", "runs/tiny-tile-s2")
    assert asdict(compose(["experiment=tiny", "growth=tile", "seed=2"])) == asdict(settings)


def test_hydra_leaves_nothing_behind() -> None:
    hydra = OmegaConf.load(CONF / "train.yaml").hydra
    assert hydra.job.chdir is False
    assert hydra.output_subdir is None
    assert (hydra.run.dir, hydra.sweep.dir, hydra.sweep.subdir) == (".", ".", ".")


@pytest.mark.slow
def test_the_tiny_study_starts_from_what_the_tiny_source_leaves() -> None:
    assert compose(["experiment=tiny"]).source == str(Path(compose(["experiment=tiny_source"]).out) / "final")
    assert compose(["experiment=tiny"]).data == compose(["experiment=tiny_source"]).data
