"""What a run shows: samples, curves over every clock, pictures, and trackers whose server goes away."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.toy import assert_same_run, at, rows
from outgrow.model.base.errors import Diverged, UserError
from outgrow.train import loop, observing
from outgrow.train.compose import compose
from outgrow.train.run import log as run_log
from outgrow.train.run import trackers, weights_and_biases
from outgrow.train.run.log import Console
from outgrow.train.run.signals import Stopped
from outgrow.train.settings import Settings
from outgrow.train.step import Step


@pytest.fixture(scope="module")
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run. Read only."""
    return loop.train(at(settings, tmp_path_factory.mktemp("runs") / "whole"))


def tracked(settings: Settings, out: Path, *names: Any, mode: Any = "offline") -> Settings:
    logger = dataclasses.replace(settings.logger, trackers=names, mode=mode)
    return dataclasses.replace(at(settings, out), logger=logger, progress="lines")


# ---- samples -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_are_what_the_final_model_writes_at_the_likeliest(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told = json.loads((finished / "samples.json").read_text())
    assert (told["start"]["step"], told["end"]["step"], told["end"]["tokens"]) == (0, 6, 768)
    assert len(told["end"]["samples"]) == 3
    model: Any = AutoModelForCausalLM.from_pretrained(finished / "final").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(finished / "final")
    for start, sample in zip(told["start"]["samples"], told["end"]["samples"], strict=True):
        assert start["prompt"] == sample["prompt"]
        tokens = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        assert tokens.shape == (1, 8)
        for _ in range(8):  # by hand, without a cache
            tokens = torch.cat(
                (tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)), 1
            )
        assert sample["text"] == tokenizer.decode(tokens[0, 8:], skip_special_tokens=True)


def test_samples_that_cannot_be_written_stop_nothing(
    settings: Settings,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(observing, "samples", lambda *_: 1 / 0)
    loop.train(dataclasses.replace(at(settings, tmp_path / "run"), progress="lines"))
    said = capsys.readouterr().out
    assert "no samples at the start (ZeroDivisionError" in said
    assert "no samples at the end (ZeroDivisionError" in said
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "{}",
        '{"start": 5}',
        '{"start": []}',
        '{"start": {"step": 0}}',
        '{"start": {"step": 0, "samples": 7}}',
        '{"start": {"step": 0, "samples": [7]}}',
        '{"start": {"step": null, "samples": [{"prompt": "a", "text": "b"}]}}',
        '{"start": {"step": 0, "samples": [{"prompt": "a"}]}}',
    ],
)
def test_samples_of_another_form_are_none_to_a_tracker(text: str, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(text)
    assert trackers._samples(tmp_path) == {}
    whole = {"step": 0, "samples": [{"prompt": "a", "text": "b"}]}
    (tmp_path / "samples.json").write_text(json.dumps({"start": whole | {"tokens": 0}, "end": whole}))
    assert trackers._samples(tmp_path) == {"start": whole}


# ---- console -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "seconds", "left"),
    [
        (100, 1.0, ", 9 s left"),
        (100, 20.0, ", 3 min left"),
        (500, 7260.0, ", 2 h 01 min left"),
        (0, 0.0, ""),
        (1000, 9.0, ""),
    ],
)
def test_a_line_says_how_long_the_rest_takes(tokens: int, seconds: float, left: str) -> None:
    assert Console(False, "run", 1000).left({"tokens": tokens, "seconds": seconds}) == left


# ---- trackers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_has_curves_over_every_clock_samples_and_the_plan(
    settings: Settings, tmp_path: Path, finished: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    grown = compose_grown(settings, finished)
    folder = loop.train(tracked(grown, tmp_path / "grown", "tensorboard"))
    (events,) = (folder / "tensorboard").rglob("events.out.*")
    read = EventAccumulator(str(events.parent))
    read.Reload()
    told = rows(folder, "eval")
    for tag, places in {
        "eval/val_loss": [row["step"] for row in told],
        "eval_by_tokens/val_loss": [row["tokens"] for row in told],
        "eval_by_gigaflops/val_loss": [round(row["flops"] / 1e9) for row in told],
        "eval_by_seconds/val_loss": [round(row["seconds"]) for row in told],
    }.items():
        found = read.Scalars(tag)
        assert [event.step for event in found] == places, tag
        assert [event.value for event in found] == pytest.approx([row["val_loss"] for row in told]), tag
    assert {"samples/start/text_summary", "samples/end/text_summary"} <= set(read.Tags()["tensors"])
    assert any(tag.startswith("growth/plan") for tag in read.Tags()["images"])
    assert (folder / "start/plan.png").read_bytes().startswith(b"\x89PNG")


def compose_grown(settings: Settings, source: Path) -> Settings:
    """The run grown from `source`, in width and depth."""
    growth = compose(["growth=lossless", "source=x", "target=tiny_target"]).growth
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    return dataclasses.replace(settings, growth=growth, source=f"{source}/final", target=sizes)


@pytest.mark.slow
def test_trackio_is_told_who_the_run_is_and_every_row(
    settings: Settings, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in that has the three calls that Accelerate makes."""
    begun: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []

    class Run:
        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            logged.append(values | {"at": step})

        def finish(self) -> None:
            logged.append({"finished": True})

    fake: Any = types.ModuleType("trackio")
    fake.init = lambda **options: begun.append(options) or Run()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    loop.train(tracked(settings, tmp_path / "run", "trackio"))
    assert_same_run(tmp_path / "run", finished)
    (options,) = begun
    assert (options["name"], options["group"], options["resume"]) == (settings.name, "t", "allow")
    assert options["config"]["start"]["operator"] == "scratch"
    told = [row for row in logged if "eval/val_loss" in row]
    assert [(row["at"], row["tokens"], row["eval/val_loss"]) for row in told] == [
        (row["step"], row["tokens"], row["val_loss"]) for row in rows(finished, "eval")
    ]
    assert all(
        row["eval_by_flops/val_loss"] == row["eval_by_seconds/val_loss"] == row["eval/val_loss"]
        for row in told
    )
    assert any("samples/end" in row for row in logged)
    assert logged[-1] == {"finished": True}


def inspected(folder: Path, *more: str) -> str:
    """What W&B's own reader finds in the one offline record in a run's folder."""
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *more, str(file)]
    elsewhere = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(inspect, capture_output=True, text=True, check=True, env=elsewhere).stdout


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in inspected(folder).splitlines()]


def wandb_record(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the one offline record in a run's folder, and its state and summary."""
    records = wandb_records(folder)
    told = [record["history"]["item"] for record in records if record["type"] == "history"]
    return told, json.loads(inspected(folder, "--summary"))


@pytest.mark.slow
def test_an_offline_record_is_one_across_restarts_says_where_it_is_and_holds_no_step_twice(
    settings: Settings,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine:own")
    monkeypatch.setenv("WANDB_ENTITY", "us")
    asked = dataclasses.replace(tracked(settings, tmp_path / "run", "wandb"), name="a:b#c")
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", killed_at(4))
        with pytest.raises(KeyboardInterrupt):
            loop.train(asked)
    loop.train(asked)
    told, whole = wandb_record(tmp_path / "run")
    losses = [(row["step"], row["eval/val_loss"]) for row in told if "eval/val_loss" in row]
    truth = [(row["step"], row["val_loss"]) for row in rows(tmp_path / "run", "eval")]
    assert losses == truth
    assert whole["summary"]["eval/val_loss"] == {"last": truth[-1][1], "min": min(loss for _, loss in truth)}
    assert [whole["summary"][f"samples/{when}"]["_type"] for when in ("start", "end")] == ["table-file"] * 2
    assert (whole["project"], whole["entity"], whole["name"]) == ("mine_own", "us", "a:b#c")
    assert whole["run_id"].startswith("a_b_c-")
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert (
        f"wandb leet run {os.path.relpath(folder)}; upload it: wandb sync {os.path.relpath(folder)}" in said
    )


@pytest.mark.slow
def test_a_record_says_how_its_run_ended_and_which_arm_it_is(settings: Settings, tmp_path: Path) -> None:
    diverging = dataclasses.replace(settings.optimizer, learning_rate=1e36)
    failing = dataclasses.replace(tracked(settings, tmp_path / "failed", "wandb"), optimizer=diverging)
    changed = dataclasses.replace(failing, changes="-transfer_continued-lr0.01")
    with pytest.raises(Diverged):
        loop.train(changed)
    _, whole = wandb_record(tmp_path / "failed")
    assert (whole["exit_code"], whole["state"]) == (1, "failed")
    assert wandb_run(tmp_path / "failed")["job_type"] == "scratch transfer_continued"


@pytest.mark.parametrize(
    ("fault", "complete", "status"),
    [
        (None, True, 0),
        (UserError("the disk is full"), False, 1),
        (KeyboardInterrupt(), False, 1),
        (Stopped("after step 3", "SIGTERM"), False, 75),
        (Stopped("after step 3", "SIGINT"), False, 130),
        (Stopped("at its end, which is complete", "SIGTERM"), True, 0),
    ],
)
def test_a_tracker_is_told_the_status_that_the_run_ends_with(
    fault: BaseException | None,
    complete: bool,
    status: int,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    tracker = types.SimpleNamespace(finish=ended.append)
    monkeypatch.setattr(run_log, "open_trackers", lambda *_: [tracker])
    run: Any = types.SimpleNamespace(budget_tokens=1)
    raised = pytest.raises(type(fault)) if fault else contextlib.nullcontext()
    with raised, run_log.open_log(tmp_path, settings, run, writes=True):
        if complete:
            (tmp_path / "summary.json").touch()
        if fault:
            raise fault
    assert ended == [status]


def test_wandb_shows_a_run_that_goes_on_as_preempted() -> None:
    calls: list[str] = []
    run = types.SimpleNamespace(
        mark_preempting=lambda: calls.append("preempting"),
        finish=lambda exit_code: calls.append(f"finished {exit_code}"),
    )
    for status in (0, 1, 130, 75):
        weights_and_biases.end(run, status)
    assert calls == ["finished 0", "finished 1", "finished 130", "preempting", "finished 75"]


def test_wandb_that_is_switched_off_has_no_record_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    run = types.SimpleNamespace(disabled=True, offline=False, dir="/nowhere", url="")
    weights_and_biases.say_where(run, print)
    assert capsys.readouterr().out == "W&B is switched off (WANDB_MODE=disabled)\n"


def test_wandb_knows_the_clock_of_every_kind_of_row() -> None:
    """A row of another kind would be drawn over W&B's own counter."""
    room = Path(loop.__file__).parent
    sources = [path.read_text() for path in (room / "loop.py", room / "observing.py")]
    written = {kind for source in sources for kind in re.findall(r'log\.write\(\s*"(\w+)"', source)}
    assert "train" in written
    assert written <= set(weights_and_biases.KINDS)


def test_a_picture_that_cannot_be_read_stops_its_tracker_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: Any = types.SimpleNamespace(name="tensorboard", log_images=lambda *_, **__: None)
    monkeypatch.setitem(trackers.OPENERS, "tensorboard", lambda *_: begun)
    (tmp_path / "start").mkdir()
    (tmp_path / "start/plan.png").write_text("no picture")
    (opened,) = trackers.open_trackers(tmp_path, tracked(settings, tmp_path, "tensorboard"), None, print)  # type: ignore[arg-type]
    assert opened.tracker is None
    assert "tracker tensorboard stopped (" in capsys.readouterr().out


def test_a_folder_that_a_tracker_left_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neverinstalled").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert trackers.installed("accelerate")
    assert not trackers.installed("neverinstalled")


def wandb_run(folder: Path) -> dict[str, Any]:
    """The `run` of the one offline record in a run's folder."""
    (run,) = [record["run"] for record in wandb_records(folder) if record["type"] == "run"]
    found: dict[str, Any] = run
    return found


def killed_at(step: int) -> Any:
    call = Step.__call__

    def killing(self: Step, i: int) -> Any:
        if i == step:
            raise KeyboardInterrupt
        return call(self, i)

    return killing


# ---- a server that goes away -------------------------------------------------------------------------------

PROJECT = {"id": "p", "name": "p", "entity": {"name": "e"}}
BUCKET = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "project": PROJECT}
# of W&B's server, as much as a run needs to begin
ANSWERS = {"UpsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}}}


@contextmanager
def wandb_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    """A stand-in for W&B's server on this machine, which the block may close."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            text = (gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body).decode(
                errors="replace"
            )
            answer = json.dumps(
                {"data": next((data for name, data in ANSWERS.items() if name in text), {})}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_a_wandb_server_that_is_lost_does_not_stop_the_run_nor_keep_it_from_ending(
    settings: Settings,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(weights_and_biases, "FINISH_S", 2)
    with wandb_server(monkeypatch) as server:
        step, calls = Step.__call__, []

        def lost_at_third(self: Any, i: int) -> Any:
            calls.append(i)
            if len(calls) == 3:
                server.shutdown()
                server.server_close()
            return step(self, i)

        monkeypatch.setattr(Step, "__call__", lost_at_third)
        loop.train(tracked(settings, tmp_path / "run", "wandb", mode="online"))
    assert "does not start" not in capsys.readouterr().out  # it was connected
    assert list((tmp_path / "run/wandb").glob("run-*/*.wandb"))  # and has everything on the disk
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_a_wandb_server_that_is_not_there_leaves_the_run_offline(
    settings: Settings,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(weights_and_biases, "START_S", 2)
    with wandb_server(monkeypatch) as server:
        server.shutdown()
        server.server_close()
        loop.train(tracked(settings, tmp_path / "run", "wandb", mode="online"))
    said = capsys.readouterr().out
    assert "W&B cannot be reached (" in said
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb")), said
    assert_same_run(tmp_path / "run", finished)
