"""Paths at the doors: whatever a folder is called, unquoted and with a leading `~`, it is that folder;
settings keep their meaning."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from outgrow.growth import grow
from outgrow.growth.__main__ import CONF, main, settings_from
from outgrow.model.base.compose import compose_config
from outgrow.model.base.errors import UserError
from outgrow.model.base.interrupt import started
from outgrow.model.base.overrides import paths_and_overrides, plain_text

NAMES = [
    "lr=0.1", "a[1]", "[a]", "a (copy)", "(a)", "a#b", "#a", "~a", "a~", "größe", "モデル", "a'b", "a'", 'a"b', "a b", "a;b", "a&b",
    "a!b", "a,b", "a\\b", "a\\", "{a}", "{a:1}", "a:1", "a^b", "<a>", "choice(a)", "glob(x)", "f(x)", "1", "true", "null", "a=[b]=(c)",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.mark.parametrize("start", ["", "models/", "./", "/", "~/"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_that_folder(here: Path, name: str, start: str) -> None:
    if start == "" and name in ("1", "true", "null", "~a"):
        pytest.skip("a value, or a user's home")
    given = f"{here}/{name}" if start == "/" else f"{start}{name}"
    Path(os.path.expanduser(given)).mkdir(parents=True)
    settings = settings_from([f"source={given}", "target=phi_2", "plan_only=true"])
    assert settings.source == os.path.expanduser(given)
    assert Path(settings.source).is_dir()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("a,b", "choice(a)", "glob(x)")])
def test_a_folder_that_is_to_be_made_may_have_any_name_too(here: Path, name: str) -> None:
    settings = settings_from(["source=phi_1_5", "target=phi_2", f"out=grown/{name}"])
    assert settings.out == f"grown/{name}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("target={hidden_size:96}", {"hidden_size": 96}),
        ("target={hidden_size:96,num_hidden_layers:4}", {"hidden_size": 96, "num_hidden_layers": 4}),
        ("growth.depth=[0,1,1]", [0, 1, 1]),
        ("seed=3", 3),
        ("growth.noise=0.5", 0.5),
        ("overwrite=true", True),
        ("revision=null", None),
        ("revision='a=b'", "a=b"),
        ('revision="a b"', "a b"),
        ("revision=", ""),
    ],
)
def test_what_is_no_path_keeps_its_meaning(here: Path, text: str, value: Any) -> None:
    (here / "3").mkdir()  # a folder of that name changes nothing
    cfg, faults = compose_config(CONF, "grow", [text])
    assert not faults
    node: Any = cfg
    for part in text.partition("=")[0].split("."):
        node = node[part]
    assert node == value


@pytest.mark.parametrize("start", ["", "runs/", "~/"])
@pytest.mark.parametrize("name", NAMES)
def test_a_path_beside_overrides_may_have_any_name(here: Path, name: str, start: str) -> None:
    if start == "" and name == "~a":
        pytest.skip("a user's home")
    path = os.path.expanduser(f"{start}{name}")
    Path(path).mkdir(parents=True)
    given = [f"{start}{name}", "devices=[H100]", "nothing"]
    assert paths_and_overrides(given) == ([path, "nothing"], ["devices=[H100]"])


@pytest.mark.parametrize("text", ["target={hidden_size:96", "seed", "source=a,b", "growth.depth=[0,1"])
def test_what_cannot_be_read_is_told_by_its_key_and_not_as_missing(here: Path, text: str) -> None:
    with pytest.raises(UserError) as caught:
        settings_from(["source=phi_1_5", "target=phi_2", "out=x", text])
    assert f"override {text!r}" in str(caught.value)
    assert "missing" not in str(caught.value)


@pytest.mark.parametrize("name", ["LICENSE-caf\udce9", "caf\udce9.py", "caf\udce9.json"])
def test_names_that_are_no_text_are_told_and_kept_all_the_same(
    phi_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """Bytes of an older encoding, in the names of the source's folder, of a file in it and of the result."""
    source = tmp_path / "mod\udce8le"
    shutil.copytree(phi_folder, source)
    (source / name).write_text("{}")
    out = tmp_path / "r\udce9sultat"
    started()
    main([f"source={source}", "target={intermediate_size:48}", f"out={out}", "receipt=false"])
    assert "r\\udce9sultat" in capfd.readouterr().out
    assert (out / name).exists() == (not name.endswith(".py"))
    assert "mod\\udce8le" in (out / "README.md").read_text(encoding="utf-8")


def test_the_door_takes_an_optimizer_by_its_file(here: Path) -> None:
    """conf/optimizer is a group of training; here it is a value."""
    assert (
        settings_from(["source=a", "target=phi_2", "out=x", "optimizer=runs/lr=1/final"]).optimizer
        == "runs/lr=1/final"
    )
    assert settings_from(["source=a", "target=phi_2", "out=x", "optimizer=adamw"]).optimizer == "adamw"


@pytest.mark.slow
def test_training_still_chooses_its_optimizer_by_group(here: Path) -> None:
    from outgrow.train.compose import compose

    assert compose(["experiment=tiny_source", "optimizer=muon"]).optimizer.name == "muon"
    assert compose(["experiment=tiny", "source=~/models/lr=0.1 (best)"]).source == str(
        here / "home/models/lr=0.1 (best)"
    )


def test_a_sweep_passes_paths_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outgrow.model.base.compose import sweep_points

    text = plain_text("source=~/lr=0.1")
    assert sweep_points(["growth=tile,stack", text]) == [["growth=tile", text], ["growth=stack", text]]


@pytest.mark.slow
def test_a_checkpoint_with_its_optimizer_through_the_door(
    phi_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = Path(shutil.copytree(phi_folder, here / "home" / "lr=0.1 [best]"))
    model = AutoModelForCausalLM.from_pretrained(source)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 2, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), source / "optimizer.pt")
    main(
        [
            "source=~/lr=0.1 [best]",
            "target={intermediate_size:80}",
            "out=~/größer (1)",
            "optimizer=~/lr=0.1 [best]",
        ]
    )
    assert (here / "home" / "größer (1)" / "optimizer" / "state.json").is_file()
    assert "certificate: lossless" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_config_never_contradicts_its_tensors(phi_folder: Path, here: Path, key: str) -> None:
    with pytest.raises(
        UserError, match=f"target: {key} 'float32': the grown tensors keep the source's dtype"
    ):
        grow(phi_folder, here / "out", target={"intermediate_size": 80, key: "float32"})
    config = json.loads((phi_folder / "config.json").read_text())
    (here / "target").mkdir()
    (here / "target" / "config.json").write_text(
        json.dumps(config | {"intermediate_size": 80, "dtype": "bfloat16"})
    )
    out = grow(phi_folder, here / "out", target=here / "target").folder
    written = json.loads((out / "config.json").read_text())
    assert {written[name] for name in ("dtype", "torch_dtype") if name in written} == {config["dtype"]}
