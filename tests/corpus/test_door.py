"""`outgrow corpus`: leaves, typed settings, and what a user is told."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from outgrow.model.base.errors import UserError
from outgrow.train.corpus.__main__ import COMMANDS, CONF, PrepareSettings, main, settings_from
from outgrow.train.data.settings import DataSettings, disagreements

LEAVES = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
# what a leaf leaves to its user
NEEDED = {
    "prepared": ["data.path=data/prepared"],
    "tokens": ["data.path=x.bin", "data.tokenizer=gpt2"],
    "files": ["data.path=texts"],
    "hub": ["data.dataset=owner/name"],
}


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_can_be_prepared(leaf: str) -> None:
    settings = settings_from(PrepareSettings, "prepare", [f"data={leaf}", *NEEDED.get(leaf, [])])
    assert not disagreements(settings.data)
    home = Path("data", settings.data.name)
    if leaf in ("files", "tokens"):
        assert settings.data.home.parent == home.parent
        assert settings.data.home.name.startswith(f"{leaf}-")
    else:
        assert settings.data.home == home
    assert (
        settings_from(
            PrepareSettings, "prepare", [f"data={leaf}", *NEEDED.get(leaf, []), "data.workers=2"]
        ).data.workers
        == 2
    )


def test_each_text_has_a_folder_of_its_own_and_the_same_text_the_same() -> None:
    def home(*more: str, **changed: str) -> Path:
        settings = settings_from(PrepareSettings, "prepare", ["data=files", "data.path=x", *more])
        return replace(settings.data, **changed).home

    paths = ["texts", "other/texts", "texts/**/*.md", "s3://bucket/texts", "ä" * 300, "x"]
    homes = [home(path=path) for path in paths]
    assert len(set(homes)) == len(paths)
    assert homes == [home(path=path) for path in paths]
    assert homes[2].name.startswith("files-texts-md-")
    assert all(len(folder.name) < 60 for folder in homes)
    # a leaf of a user's own is named after its text
    assert home(name="mine") == Path("data", "mine")
    assert home("data.folder=here") == Path("here")


@pytest.mark.parametrize(
    ("leaf", "key", "value"),
    [
        ("cosmopedia", "config", "cosmopedia-v2"),  # every kind of seed, not one site's
        ("the_stack_smol", "data_dir", "data/python"),
        ("the_stack", "data_dir", "data/python"),
    ],
)
def test_a_leaf_of_the_hub_reads_the_part_that_it_is_named_for(leaf: str, key: str, value: str) -> None:
    assert getattr(settings_from(PrepareSettings, "prepare", [f"data={leaf}"]).data, key) == value


def test_what_the_leaves_share_is_what_holds_where_nothing_is_said() -> None:
    composed = asdict(settings_from(PrepareSettings, "prepare", ["data=files", "data.path=x"]).data)
    assert composed == asdict(DataSettings("files", "files", path="x"))


def test_a_leaf_that_looks_for_near_duplicates_says_by_which_words() -> None:
    said = {}
    for leaf in LEAVES:
        values = OmegaConf.load(CONF / "data" / f"{leaf}.yaml").get("clean", {})
        if "near_duplicates" in values or "words" in values:
            said[leaf] = values.get("words")
    assert said == {"cosmopedia": "prose", "packages": "prose", "the_stack": "code", "the_stack_smol": "code"}


@pytest.mark.slow
def test_a_hub_leaf_says_offline_what_cannot_be_reached(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as status:
        main(["prepare", "data=cosmopedia", f"data.folder={tmp_path / 'tokens'}", "progress=false"])
    assert status.value.code == 2
    message = capsys.readouterr().err
    assert (
        "cannot read dataset=HuggingFaceTB/smollm-corpus config=cosmopedia-v2 split=train from the "
        "Hugging Face hub"
    ) in message
    assert "data=files data.path=FOLDER" in message


def test_faults_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError,
        match=r"(?s)3 faults:.*data\.pth.*data\.clean\.nearduplicates.*did you mean.*data\.workers: expected",
    ):
        settings_from(
            PrepareSettings,
            "prepare",
            ["data=files", "data.pth=x", "data.clean.nearduplicates=1", "data.workers=many"],
        )
    with pytest.raises(SystemExit):
        main(["prepair"])
    assert "did you mean 'prepare'?" in capsys.readouterr().err


def test_the_door_s_former_name_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.data", "prepair"])
    monkeypatch.setattr("outgrow.model.base.interrupt.started", lambda: None)
    with pytest.raises(SystemExit):
        runpy.run_module("outgrow.train.data", run_name="__main__")
    assert "did you mean 'prepare'?" in capsys.readouterr().err


def test_prepare_says_what_became_of_the_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"document number {i // 2} with some words\r\n" * 3)
    (texts / "empty.txt").write_text(" ")
    arguments = [
        f"data.path={texts}",
        f"data.folder={tmp_path / 'tokens'}",
        "data.vocab_size=300",
        "data.validation_fraction=0.5",
    ]
    main(
        [
            "prepare",
            "data=files",
            *arguments,
            "data.clean.normalise=true",
            "data.clean.exact_duplicates=true",
            "progress=false",
        ]
    )
    out = capsys.readouterr().out
    assert "read 30 documents" in out
    assert "empty skipped: 1" in out
    assert "removed, exact duplicate: 15 documents" in out
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert sum(split["documents"] for split in manifest["splits"].values()) == 15


def test_a_leaf_of_ones_own_is_read_wherever_its_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own/data").mkdir(parents=True)
    leaf = "defaults: [base/all@_here_]\nname: mine\ncorpus: files\npath: texts\n"
    (tmp_path / "own/data/mine.yaml").write_text(leaf)
    homes: list[Path] = []

    def prepared(command: str) -> None:
        def read(overrides: list[str], own: Path | None) -> None:
            homes.append(settings_from(PrepareSettings, "prepare", overrides, own).data.home)

        monkeypatch.setitem(COMMANDS, "prepare", read)
        main(command.split())

    monkeypatch.chdir(tmp_path)
    prepared("prepare data=mine --config-dir own")
    prepared("--config-dir=own prepare data=mine")
    assert homes == [Path("data/mine")] * 2
    for given, told in (
        ("data=mine", "error: data=mine: unknown data; known: "),
        ("data=mine --config-dir none", "error: --config-dir none: no such folder; give the one that holds"),
        ("data=mnie --config-dir own", "error: data=mnie: unknown data; did you mean 'mine'?"),
    ):
        with pytest.raises(SystemExit):
            prepared(f"prepare {given}")
        assert capsys.readouterr().err.startswith(told)
