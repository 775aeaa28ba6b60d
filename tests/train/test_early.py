"""What is wrong with a new run's source is told before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.compose import compose
from outgrow.train.settings import Settings
from outgrow.train.start.early import check_source

ROOT = Path(__file__).resolve().parents[2]
LARGER = "target={num_hidden_layers:5}"
CODE = """import json, sys
from outgrow.train.__main__ import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["train", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, end.code
print(sorted({"torch", "transformers", "accelerate"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def text(overrides: list[str]) -> list[str]:
    """The toy run without its target."""
    return [given for given in overrides if not given.startswith("target=")]


def run(text: list[str], out: Path, source: Path | str, *more: str) -> Settings:
    return compose([*text, f"source={source}", f"out={out}", "growth=lossless", LARGER, *more])


@pytest.mark.slow
def test_faults_of_the_source_and_of_its_growth_are_told_without_torch(
    text: list[str], phi_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "README").touch()
    cut = Path(shutil.copytree(phi_folder, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((phi_folder / "model.safetensors").read_bytes()[:5000])
    faults = {
        f"source={tmp_path}/nowhere": "no such folder, and not a Hugging Face name",
        f"source={tmp_path}/README": "a file; give the folder that holds it",
        f"source={tmp_path}/empty": "config.json",
        f"source={cut}": "model.safetensors",
        "target={num_hidden_layers:2}": "target: layer 2 is smaller than the source's 3",
        "target={hiden_size:48}": "target: unknown config key 'hiden_size'; did you mean 'hidden_size'",
        "growth.depth=[0,1,2,9]": "4 layers",
    }
    given = [*text, f"source={phi_folder}", f"out={tmp_path / 'run'}", "growth=lossless"]
    asked = json.dumps(
        [[*given, *([] if fault.startswith("target") else [LARGER]), fault] for fault in faults]
    )
    done = subprocess.run([sys.executable, "-c", CODE, asked], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    told = done.stderr.split("error: ")[1:]
    assert len(told) == len(faults)
    for fault, words in zip(told, faults.values(), strict=True):
        assert words in fault
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_can_be_grown_is_let_through(
    text: list[str], phi_folder: Path, phi_config: dict[str, Any], tmp_path: Path
) -> None:
    check_source(run(text, tmp_path / "run", phi_folder))
    check_source(run(text, tmp_path / "run", phi_folder, "growth=scratch"))
    check_source(run(text, tmp_path / "run", phi_folder, "growth=source"))
    check_source(run(text, tmp_path / "run", "owner/name"))  # is looked up on the Hub when the run begins


@pytest.mark.parametrize("horizon", [None, 512])
def test_a_run_that_has_begun_needs_its_source_no_more(
    text: list[str], tmp_path: Path, horizon: int | None
) -> None:
    horizons = [] if horizon is None else ["schedule.warmup_tokens=128", f"schedule.horizons=[{horizon},768]"]
    settings = run(text, tmp_path / "run", tmp_path / "gone", *horizons)
    with pytest.raises(UserError, match="no such folder"):
        check_source(settings)
    begun = tmp_path / ("run" if horizon is None else f"run-t{horizon}")
    begun.mkdir()
    (begun / "run.json").touch()
    check_source(settings)
