"""A program's first moments: Ctrl-C while it imports, files of settings that are no YAML, and folders without
a name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outgrow.growth.__main__ import settings_from
from outgrow.model.base.compose import compose_config, load_yaml
from outgrow.model.base.errors import UserError
from outgrow.train.compose import compose

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = """import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
OUTGROW = """import sys
from outgrow.experiments.command import main
sys.argv[0] = "outgrow"
sys.argv.insert(1, "train")
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "library"),
    [("growth", "numpy"), ("train", "hydra"), ("train.data", "numpy"), ("experiments", "argparse")],
)
def test_ctrl_c_while_a_door_imports_leaves_no_traceback(tmp_path: Path, door: str, library: str) -> None:
    """A stand-in for a library that the door imports sends the signal: the moment is the same every time."""
    stands_in = tmp_path / f"{library}.py"
    stands_in.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", f"outgrow.{door}", "compare", "x"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode in (-signal.SIGINT, 130)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    "command", [["-m", "outgrow.train"], ["-c", OUTGROW]], ids=["train", "outgrow train"]
)
def test_a_queues_signal_while_a_door_imports_asks_for_the_same_command_again(
    tmp_path: Path, command: list[str], number: signal.Signals
) -> None:
    (tmp_path / "hydra.py").write_text(INTERRUPTED.replace("SIGINT", number.name))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    how: Any = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([sys.executable, *command, "experiment=tiny_source"], **how)
    assert (done.returncode, done.stderr) == (os.EX_TEMPFAIL, "")


def test_signals_mean_what_they_did_once_a_door_has_started() -> None:
    code = "import signal, sys; sys.argv = ['-m']; signal.signal(signal.SIGUSR2, signal.SIG_IGN); "
    code += "from outgrow.model.base.interrupt import starting, started; starting(); started(); "
    code += "print([signal.getsignal(n).name for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['SIG_DFL', 'SIG_DFL', 'SIG_IGN']\n"


def test_a_shell_that_has_switched_ctrl_c_off_keeps_it_off() -> None:
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv = ['-m']; "
    code += "from outgrow.model.base.interrupt import starting, started; starting(); started(); "
    code += "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
        == "True\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_has_no_sign_for_is_printed_all_the_same(encoding: str) -> None:
    """A log under an old locale, a file whose name is no text."""
    code = "from outgrow.model.base.interrupt import started; started(); "
    code += r"print('Δ 1 → 2, caf\udce9.py')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    expected = "Δ 1 → 2, caf\udce9.py".encode(encoding, "backslashreplace")
    assert (done.stdout.rstrip(), done.stderr) == (expected, b"")


@pytest.mark.parametrize("text", ["a: [1\nb: {", "a: b: c", "a:\n\t- 1", '"', "a: *nothing"])
def test_a_syntax_error_is_told_with_file_line_and_column(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml, line \d+, column \d+: not valid YAML \(.+\)$"):
        load_yaml(tmp_path / "run.yaml")
    _, faults = compose_config(tmp_path, "run", [])
    assert len(faults) == 1
    assert "run.yaml" in faults[0]


def test_a_file_of_settings_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "run.yaml", tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            load_yaml(path)


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_an_out_without_a_name_is_refused_and_nothing_is_written(out: str) -> None:
    with pytest.raises(UserError, match="out: must be a folder of its own"):
        compose(["experiment=tiny_source", f"out={out}"])
    if not out:
        with pytest.raises(UserError, match="out: missing"):
            settings_from(["source=x", "target=phi_2", "out=", "overwrite=true"])


FAULTS = {
    "grow": ["source=x", "targt=phi_2"],
    "schema": ["sorce=x"],
    "train": ["experiment=tiny", "growth=nope"],
    "corpus": ["prepare", "data=nope"],
    "study": ["nope"],
    "compare": ["nothing"],
    "horizons": ["nothing"],
    "frontier": ["nothing"],
    "family": ["nothing"],
    "predict": ["nothing", "--horizons", "100", "--out", "out"],
}
CODE = """
import sys
from outgrow.experiments.command import main
try:
    status = main()
except SystemExit as stop:
    status = stop.code
print(status, sorted({"torch", "transformers", "accelerate", "datasets", "wandb"} & sys.modules.keys()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("door", FAULTS)
def test_a_fault_is_told_before_torch_is_imported(tmp_path: Path, door: str) -> None:
    """Importing torch takes longer than anyone wants to wait for a misspelt key."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, door, *FAULTS[door]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stdout == "2 []\n"
