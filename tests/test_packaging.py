"""The installed package: one importable name, every file that its doors need, from any working directory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

from outgrow.experiments.command import DOORS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "growth", "train", "experiments", "conf")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = SETTINGS["project"], SETTINGS["tool"]["setuptools"]


def test_every_folder_with_code_is_packaged() -> None:
    folders = {
        path.parent.relative_to(ROOT) for room in ROOMS[:-1] for path in (ROOT / room).rglob("__init__.py")
    }
    assert {"outgrow.conf", *(f"outgrow.{'.'.join(folder.parts)}" for folder in folders)} == set(
        SETUPTOOLS["packages"]
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment that has the wheel, and reads what it depends on from this one."""
    clone, fresh = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("fresh")
    for room in ROOMS:
        shutil.copytree(ROOT / room, clone / room, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    venv.create(fresh, with_pip=True, symlinks=True)
    install = [
        fresh / "bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        clone,
    ]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if "No matching distribution found for setuptools" in done.stderr or "Connection" in done.stderr:
        pytest.skip("no package index can be reached, and building a wheel needs setuptools from it")
    assert done.returncode == 0, done.stderr
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    return fresh / "bin"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("outgrow --help", "outgrow study tiny"),
        ("outgrow grow source=phi_1_5 target=phi_2 growth=lossless plan_only=true", "certificate: lossless"),
        ("outgrow train experiment=tiny_source dry_run=true", "FLOP"),
        ("outgrow study", "tiny: "),
        ("python -m outgrow.growth source=phi_1_5 target=phi_2 plan_only=true", "certificate: lossless"),
    ],
)
def test_every_door_starts_where_a_users_files_have_our_names(
    installed: Path, tmp_path: Path, command: str, words: str
) -> None:
    for name in ("train.py", "growth.py", "conf.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')")
    (tmp_path / "model").mkdir()
    program, *arguments = command.split()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [installed / program, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@pytest.mark.slow
def test_the_wheel_has_its_compiled_loops_and_settings(installed: Path) -> None:
    code = "import outgrow.growth.engine.bits as bits, outgrow.model.base.compose as compose; "
    code += "print(bits.compiled is not None, (compose.CONF / 'train.yaml').is_file(), compose.__file__)"
    done = subprocess.run([installed / "python", "-c", code], capture_output=True, text=True, check=True)
    compiled, has_settings, file = done.stdout.split()
    assert has_settings == "True"
    assert str(installed.parent) in file
    assert compiled == str(shutil.which("gcc") is not None or shutil.which("cc") is not None)


def with_dependencies(names: Iterable[str]) -> set[str]:
    """The distributions of that name, and all that they need without extras."""
    known: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        lines = [line for line in metadata.requires(name) or [] if "extra ==" not in line]
        waiting += filter(has_distribution, (re.split(r"[^\w.-]", line)[0] for line in lines))
    return known


def has_distribution(name: str) -> bool:
    """Whether it is installed: what a marker asks for on other systems is not."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def light(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and what it needs without extras; the libraries are links
    to those of this one."""
    fresh = tmp_path_factory.mktemp("light")
    venv.create(fresh, with_pip=False, symlinks=True)
    (site,) = fresh.glob("lib/python*/site-packages")
    (wheel,) = installed.parent.glob("lib/python*/site-packages")
    for path in (wheel / "outgrow", *wheel.glob("scaled_knowledge_transfer*.dist-info")):
        (site / path.name).symlink_to(path)
    needed = [re.split(r"[^\w-]", line)[0] for line in PROJECT["dependencies"]]
    for name in with_dependencies(needed):
        for top in {file.parts[0] for file in metadata.files(name) or [] if file.parts[0] != ".."}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    return fresh / "bin/python"


@pytest.mark.slow
def test_growing_a_checkpoint_needs_no_extra(light: Path, tmp_path: Path, phi_folder: Path) -> None:
    def outgrow(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from outgrow.experiments.command import main; sys.exit(main())"
        return subprocess.run(
            [light, "-c", code, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    growth = ("grow", f"source={phi_folder}", "target={intermediate_size:80}")
    done = outgrow(*growth, "out=grown")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grown/growth.json").is_file()
    for arguments in (
        (*growth, "out=more", "receipt=true"),
        ("train", "experiment=tiny_source", "logger=none"),
    ):
        done = outgrow(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(
            r"error: \w+ is not installed, .*pip install 'scaled-knowledge-transfer\[train\]'.*\n",
            done.stderr,
        ), done.stderr
    assert not (tmp_path / "more").exists()


def test_an_unknown_command_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from outgrow.experiments.command import main

    monkeypatch.setattr(sys, "argv", ["outgrow", "grwo"])
    taken = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert main() == 2
    assert (
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
    ) == taken  # nothing is left behind
    assert "unknown command 'grwo'; did you mean 'grow'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", DOORS)
def test_every_command_leads_to_a_door(command: str) -> None:
    from importlib import import_module

    assert callable(import_module(DOORS[command][0]).main)
