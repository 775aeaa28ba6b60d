"""Processes that hang are named, and a run under torchrun ends with the status that it has alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from helpers.toy import free_port, rows
from outgrow.model.base.errors import UserError
from outgrow.train import __main__ as door
from outgrow.train.machine.watch import HUNG, Sign, Watch, blame, standing, watching
from outgrow.train.run import state
from outgrow.train.run.folder import locked
from outgrow.train.run.signals import REQUEUE, overruled, watched
from outgrow.train.step import drawn

ROOT = Path(__file__).resolve().parents[2]
READING = "train/data/shards.py, line 9 (read)"


def sign(
    beat: int, *, step: int = 7, waits: bool = True, place: str = "train/step.py, line 1 (accumulate)"
) -> Sign:
    return Sign(beat, step, place, waits, "node3")


@pytest.mark.parametrize(
    ("before", "after", "named", "words"),
    [
        (
            [sign(1), sign(4)],
            [sign(3), sign(4)],
            [1],
            "process 1 on node3 gives no sign of life since it was at train/step.py",
        ),
        ([sign(1), None], [sign(3), None], [1], "process 1 has given no sign of life"),
        (
            [sign(1), sign(1, waits=False, place=READING)],
            [sign(3), sign(3, waits=False, place=READING)],
            [1],
            f"process 1 on node3 stands at {READING}",
        ),
        (
            [sign(1, step=6), sign(1), sign(1)],
            [sign(2, step=6), sign(2), sign(2)],
            [0],
            "process 0 on node3 stands at",
        ),
        # nothing tells them apart
        ([sign(1), sign(1)], [sign(2), sign(2)], [0, 1], "process 0 on node3 stands at"),
    ],
)
def test_who_keeps_the_others_waiting(
    before: list[Sign | None], after: list[Sign | None], named: list[int], words: str
) -> None:
    found, said = blame(before, after)
    assert found == named
    assert said.startswith(words)


def test_where_the_main_thread_stands_is_read_from_another() -> None:
    seen: list[tuple[str, bool]] = []
    thread = threading.Thread(target=lambda: seen.append(standing()))
    code = {"__name__": "outgrow.train.step", "thread": thread}
    exec("def accumulate():\n    thread.start()\n    thread.join()\n", code)
    code["accumulate"]()
    ((place, waits),) = seen
    # it may look before its start has returned
    assert re.fullmatch(r"train/step\.py, line [23] \(accumulate\)", place)
    assert not waits


def test_a_process_has_given_a_sign_before_its_first_step() -> None:
    store = torch.distributed.HashStore()
    with watching(store, 1, 2, limit=600.0):
        assert json.loads(store.get("1"))["beat"] == 0


@pytest.mark.slow
def test_a_watch_ends_nothing_while_steps_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(Watch, "_end", lambda self, beat: ended.append(beat))
    watch = Watch(torch.distributed.HashStore(), 0, 1, 3.0)
    watch.start()
    for _ in range(20):  # four seconds, a fifteenth of the limit at a time: a busy machine stretches them
        time.sleep(0.2)
        watch.step()
    assert not ended
    until = time.monotonic() + 600
    while not ended and time.monotonic() < until:
        time.sleep(0.1)
    assert ended
    watch.ended.set()
    watch.thread.join()


@pytest.mark.slow
def test_a_process_that_stands_still_is_named_and_the_run_ends(overrides: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = two_of(*overrides, "train.budget_tokens=25600000", "train.hang_seconds=5", f"out={out}")
    until_it_trains(out, both[0])
    both[1].send_signal(signal.SIGSTOP)
    words = both[0].communicate(timeout=600)[1]
    both[1].kill()
    both[1].communicate()
    assert both[0].returncode == HUNG
    assert "error: no step has ended for 5 s: process 1 on " in words
    assert "gives no sign of life since it was at train/" in words
    assert "The same command goes on from the newest checkpoint" in words


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_another_leaves_alone_says_so_in_one_line(
    overrides: list[str], tmp_path: Path, killed: int
) -> None:
    out = tmp_path / "run"
    both = two_of(*overrides, "train.budget_tokens=25600000", "train.hang_seconds=5", f"out={out}")
    until_it_trains(out, both[0])
    both[killed].kill()
    both[killed].communicate()
    left = both[1 - killed]
    words = left.communicate(timeout=600)[1]
    assert left.returncode == 1
    assert f"error: process {1 - killed}: another process has ended, and its own words tell why" in words
    assert "Traceback" not in words


def two_of(*overrides: str) -> list[subprocess.Popen[str]]:
    """Two processes of one run, without a launcher that would end one with the other."""
    both = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    both["MASTER_PORT"] = str(free_port())
    started = []
    for rank in ("0", "1"):
        environment = {**os.environ, **both, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-m", "outgrow.train", *overrides]
        started.append(
            subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        )
    return started


def until_it_trains(out: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 600
    while not ((out / "metrics.jsonl").exists() and len(rows(out, "train")) > 1) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("error", "alone"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:7. This is …"), True),
        (torch.distributed.DistBackendError("ncclRemoteError: remote process exited or there was …"), True),
        (
            torch.distributed.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed."),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # of a download
    ],
)
def test_only_an_exchange_that_was_left_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, alone: bool
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(door, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(door, "_run", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit if alone else type(error)):
        door.main()
    assert ("process 1: another process has ended" in capsys.readouterr().err) is alone


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_watch_whose_store_ends_is_silent() -> None:
    class Ended(torch.distributed.HashStore):
        def set(self, key: str, value: str) -> None:
            raise torch.distributed.DistNetworkError("Broken pipe")

    watch = Watch(Ended(), 1, 2, 0.01)
    watch.thread.start()
    watch.thread.join(60)
    assert not watch.thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(None, 2), (signal.SIGTERM, REQUEUE), (signal.SIGINT, 130)], ids=str
)
def test_a_run_under_the_launcher_ends_with_the_status_it_has_alone(
    overrides: list[str], tmp_path: Path, number: signal.Signals | None, status: int
) -> None:
    fault = number is None
    out = tmp_path / "run"
    more = [
        "train.budget_tokens=25600000",
        "train.save_every_tokens=null",
        f"out={out}",
        *(["source=nowhere/there"] if fault else []),
    ]
    launcher = [
        sys.executable,
        "-m",
        "outgrow.train.launch",
        "--nproc_per_node",
        "2",
        f"--master-port={free_port()}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "outgrow.train", *overrides, *more]
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, inherited)
    if number is not None:
        until_it_trains(out, process)
        process.send_signal(number)
    words = process.communicate(timeout=600)[1]
    assert process.returncode == status, words
    assert "SignalException" not in words
    assert fault or len(state.complete(out / "checkpoints")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("module", ["outgrow.train.launch", "torch.distributed.run"])
def test_processes_whose_launcher_is_killed_save_and_end(
    overrides: list[str], tmp_path: Path, module: str
) -> None:
    """They would train on, with nobody to stop them, and keep the run's folder locked."""
    out = tmp_path / "run"
    more = ["train.budget_tokens=25600000", "train.save_every_tokens=null", f"out={out}"]
    launcher = [sys.executable, "-m", module, "--nproc_per_node", "2", f"--master-port={free_port()}"]
    command = [*launcher, "-m", "outgrow.train", *overrides, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "words").open("w") as words:
        process = subprocess.Popen(command, cwd=ROOT, stderr=words, env=environment)
        until_it_trains(out, process)
        ranks = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
    _, running = psutil.wait_procs(ranks, timeout=60)
    for rank in running:
        rank.kill()
    assert (len(ranks), running) == (2, [])
    assert len(state.complete(out / "checkpoints")) == 1
    told = (tmp_path / "words").read_text()
    assert "stopped by the end of its launcher after step" in told
    assert "Traceback" not in told
    with locked(out, holds=True):
        pass


@pytest.mark.parametrize(("launched", "told"), [(True, "the end of its launcher"), (False, None)])
def test_the_end_of_a_parent_stops_what_a_launcher_started_alone(
    monkeypatch: pytest.MonkeyPatch, launched: bool, told: str | None
) -> None:
    """What a shell started goes on after the shell."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with watched() as asked:
        assert asked() is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert asked() == told


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, REQUEUE), (signal.SIGINT, 130)], ids=str)
def test_a_signal_before_there_is_a_process_ends_the_launcher(number: signal.Signals, status: int) -> None:
    code = f"from outgrow.train.launch import pass_on; pass_on({int(number)}, None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == status


@pytest.mark.slow
def test_under_plain_torchrun_the_last_line_names_what_keeps_the_status(
    overrides: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = ["train.budget_tokens=25600000", "train.save_every_tokens=null", f"out={out}"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        f"--master-port={free_port()}",
    ]
    command = [*launcher, "-m", "train", *overrides, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    until_it_trains(out, process)
    process.send_signal(signal.SIGTERM)
    words = process.communicate(timeout=600)[1]
    assert process.returncode == 1
    assert len(state.complete(out / "checkpoints")) == 1
    assert f"ends with status 1 instead of {REQUEUE}" in words
    assert "python -m outgrow.train.launch" in words


@pytest.mark.parametrize(
    ("handled", "told"),
    [(None, False), ("SIGTERM,SIGINT,SIGHUP,SIGQUIT", True), ("SIGINT,SIGHUP,SIGQUIT", False)],
    ids=str,
)
def test_only_torchrun_overrules_a_status(
    monkeypatch: pytest.MonkeyPatch, handled: str | None, told: bool
) -> None:
    monkeypatch.delenv("TORCHELASTIC_SIGNALS_TO_HANDLE", raising=False)
    if handled is not None:
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", handled)
    assert ("instead of 75" in overruled(REQUEUE)) is told


@pytest.mark.parametrize(("rank", "words"), [("0", "error: no text\n"), ("1", "error: process 1: no text\n")])
def test_what_a_process_meets_alone_is_told_by_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, words: str
) -> None:
    """A file that one host cannot read would else end the run without a word."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(door, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(door, "_run", lambda _: (_ for _ in ()).throw(UserError("no text")))
    with pytest.raises(SystemExit):
        door.main()
    assert capsys.readouterr().err == words


def test_dropout_is_told_by_the_modules() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

    gpt2 = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    assert "dropout 0.1: masks are drawn for each micro-batch" in str(drawn(GPT2LMHeadModel(gpt2)))
    phi = PhiConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    assert drawn(PhiForCausalLM(phi)) is None
    phi.attention_dropout = 0.2
    assert "attention_dropout 0.2" in str(drawn(PhiForCausalLM(phi)))
    assert drawn(nn.Linear(1, 1)) is None
