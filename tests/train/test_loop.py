"""Whole runs at toy size: exact resume, equal splits, every way to start, and what a run leaves in its
folder."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from helpers.toy import assert_close_run, assert_same_run, at, rows, weights, without_target
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model
from outgrow.model.presets import preset
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.corpus import prepare
from outgrow.train.data.batches import batch, validation_batches
from outgrow.train.evaluate import evaluate
from outgrow.train.loss import NextTokenLoss
from outgrow.train.run import state
from outgrow.train.run.log import Console, Log
from outgrow.train.run.record import signed
from outgrow.train.run.samples import Sample
from outgrow.train.settings import Settings
from outgrow.train.share import Share
from outgrow.train.step import Step

ROOT = Path(__file__).resolve().parents[2]
LARGER = "target={hidden_size:24,intermediate_size:48,num_hidden_layers:2}"


@pytest.fixture(scope="session")
def settings(overrides: list[str]) -> Settings:
    return compose(overrides)


@pytest.fixture(scope="session")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the undisturbed run. Read only."""
    return loop.train(dataclasses.replace(settings, out=str(tmp_path_factory.mktemp("runs") / "whole")))


# ---- what a run leaves -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_the_folder_that_others_read(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints",
        "final",
        "metrics.jsonl",
        "run.json",
        "samples.json",
        "summary.json",
    ]
    assert [row["step"] for row in rows(finished, "eval")] == [0, 2, 4, 6]
    assert [row["step"] for row in rows(finished, "train")] == [2, 4, 6]
    assert rows(finished)[0]["tokens"] == rows(finished)[0]["flops"] == 0
    assert rows(finished)[0]["seconds"] < rows(finished)[1]["seconds"]
    run, last = json.loads((finished / "run.json").read_text()), rows(finished)[-1]
    summary = json.loads((finished / "summary.json").read_text())
    assert (last["tokens"], summary["steps"], run["budget_tokens"]) == (768, 6, 768)
    assert last["flops"] == summary["flops"] == pytest.approx(768 * run["flops_per_token"])
    assert (summary["start_val_loss"], summary["final_val_loss"]) == (
        rows(finished)[0]["val_loss"],
        last["val_loss"],
    )
    assert summary["final_val_loss"] < summary["start_val_loss"] < math.log(300) + 0.1
    assert last["bits_per_byte"] == pytest.approx(
        last["val_loss"] / math.log(2) / run["data"]["bytes_per_token"]
    )
    keys = {
        "kind",
        "step",
        "tokens",
        "flops",
        "seconds",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "mfu",
    }
    assert rows(finished, "train")[0].keys() == keys


def test_the_final_folder_loads_and_gives_the_logged_loss(finished: Path, settings: Settings) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "final").eval()
    data = prepare(settings.data, progress=False)
    windows = np.concatenate(list(validation_batches(data.validation, context=16, tokens=320)))
    with torch.no_grad():
        loss = NextTokenLoss(model, fused=False)(torch.from_numpy(windows))
        library = model(input_ids=torch.from_numpy(windows), labels=torch.from_numpy(windows)).loss
    assert loss.item() == pytest.approx(rows(finished)[-1]["val_loss"], rel=1e-6)
    # the library's own loss on the same windows
    assert loss.item() == pytest.approx(library.item(), rel=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"
    assert model.generation_config.eos_token_id == data.end_of_text_id


def test_the_model_card_states_study_arm_seed_tokens_and_losses(finished: Path) -> None:
    card = (finished / "final" / "README.md").read_text()
    cells = dict(
        line.strip("| ").split(" | ")
        for line in card.splitlines()
        if line.startswith("| ") and line.count("|") == 3 and line[2] != "|"
    )
    first, last = rows(finished)[0], rows(finished)[-1]
    assert (cells["study"], cells["arm"], cells["seed"], cells["training tokens"]) == (
        "t",
        "scratch",
        "0",
        "768",
    )
    assert cells["validation loss at the start"] == f"{first['val_loss']:.4f} nats/token"
    assert (
        cells["validation loss at the end"]
        == f"{last['val_loss']:.4f} nats/token, {last['bits_per_byte']:.4f} bits/byte"
    )
    assert f"# {json.loads((finished / 'run.json').read_text())['name']}" in card


def test_the_final_folder_tells_an_evaluation_harness_what_it_asks_for(finished: Path) -> None:
    """`lm_eval --model hf --model_args pretrained=…` reads these, through the library's auto classes."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config, tokenizer = (
        AutoConfig.from_pretrained(finished / "final"),
        AutoTokenizer.from_pretrained(finished / "final"),
    )
    assert config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert config.max_position_embeddings == 32
    assert tokenizer.eos_token_id is not None
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    # a continuation is found behind its context
    assert tokenizer.encode("the cat sat", add_special_tokens=False)[: len(ids)] == ids


def test_the_harness_measures_the_likelihood_that_the_model_gives(finished: Path) -> None:
    models = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not part of this project")
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(finished / "final")
    asked = Instance(request_type="loglikelihood", doc={}, arguments=("the cat", " sat on"), idx=0)
    ((found, _),) = models.HFLM(pretrained=folder, device="cpu").loglikelihood([asked], disable_tqdm=True)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    context, whole = (
        tokenizer(text, return_tensors="pt").input_ids for text in ("the cat", "the cat sat on")
    )
    with torch.no_grad():
        chances = model(whole).logits.log_softmax(-1)
    ours = sum(chances[0, i - 1, whole[0, i]].item() for i in range(context.shape[1], whole.shape[1]))
    assert found == pytest.approx(ours, rel=1e-4)


def test_a_complete_run_returns_at_once_and_is_not_touched(
    finished: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    monkeypatch.setattr(loop, "session", None)  # nothing past the first banner may run
    assert loop.train(dataclasses.replace(at(settings, finished), progress="lines")) == finished
    assert capsys.readouterr().out.endswith(f"already complete: {finished}\n")
    for key in ("path", "validation_path"):
        data = dataclasses.replace(settings.data, **{key: "other"})
        other = dataclasses.replace(at(settings, finished), progress="lines", data=data)
        assert loop.train(other) == finished
        assert f"it read data.{key}={getattr(settings.data, key)}, not other:" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_silent_run_says_nothing_and_leaves_no_state_behind(
    settings: Settings, tmp_path: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    capfd.readouterr()
    loop.train(at(settings, tmp_path / "run"))
    assert capfd.readouterr() == ("", "")
    assert [
        dict(singleton._shared_state) for singleton in (PartialState, AcceleratorState, GradientState)
    ] == [{}, {}, {}]
    assert torch.equal(torch.rand(1), expected)
    assert_same_run(tmp_path / "run", finished)


def test_a_loud_run_tells_its_choices_and_losses(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(dataclasses.replace(at(settings, tmp_path / "run", budget_tokens=256), progress="lines"))
    said = capsys.readouterr().out
    assert "attention sdpa (no flash-attn: no CUDA GPU)" in said
    assert "100%, step 2: loss" in said
    assert "val loss" in said


def test_the_loop_computes_what_a_bare_loop_computes(finished: Path, settings: Settings) -> None:
    """Against plain PyTorch and the library's own loss, with the schedule worked out by hand."""
    data = prepare(settings.data, progress=False)
    model = build_model(json.loads((finished / "run.json").read_text())["target_config"], seed=0)
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    # up over 1/5 of the budget, down over the last 1/4, at each step's middle
    rates = [3e-3 * share for share in (5 / 12, 1, 1, 1, 1, 1 / 3)]
    for step, rate in enumerate(rates):
        windows = torch.from_numpy(batch(data.train, seed=0, step=step, batch_size=8, context=16))
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > 0.5  # so that clipping counts
    logged = rows(finished, "train")
    assert [row["loss"] for row in logged] == pytest.approx(
        [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)], rel=1e-5
    )
    assert [row["grad_norm"] for row in logged] == pytest.approx(norms[1::2], rel=1e-4)
    assert [row["learning_rate"] for row in logged] == pytest.approx(rates[1::2])
    final = weights(finished)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(final[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_evaluation_is_the_same_for_any_number_of_processes_and_leaves_the_model_training() -> None:
    """Each process's sums, added up by hand; dropout is off while evaluating."""
    config = preset("tiny_source") | {"vocab_size": 50, "resid_pdrop": 0.5, "num_hidden_layers": 1}
    model = build_model(config, seed=0).train()
    batches = [np.random.default_rng(i).integers(0, 50, (rows, 9)) for i, rows in enumerate((4, 4, 4, 4, 1))]

    class Process:
        device = torch.device("cpu")

        def __init__(self, index: int, of: int) -> None:
            self.process_index, self.num_processes, self.sums = index, of, torch.zeros(2)

        def unwrap_model(self, model: Any) -> Any:
            return model

        def reduce(self, sums: torch.Tensor, reduction: str) -> torch.Tensor:
            self.sums = sums
            return sums

    one, two = Process(0, 1), [Process(0, 2), Process(1, 2)]
    whole = evaluate(NextTokenLoss(model, fused=False), batches, cast(Any, one), 3.0)
    for process in two:
        evaluate(NextTokenLoss(model, fused=False), batches, cast(Any, process), 3.0)
    assert model.training
    assert torch.allclose(two[0].sums + two[1].sums, one.sums)
    assert one.sums[1] == 17 * 8
    joined = torch.from_numpy(np.concatenate(batches))
    assert whole.val_loss == pytest.approx(
        model.eval()(input_ids=joined, labels=joined).loss.item(), rel=1e-6
    )


# ---- resuming ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that ends without warning."""


def train_and_kill(settings: Settings, step: int) -> None:
    """Train, and end without warning after `step` steps."""
    count = loop.Meter.count

    def counted(self: loop.Meter, *arguments: Any) -> None:
        if self.position.step == step:
            raise Killed
        count(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Meter, "count", counted)
        with pytest.raises(Killed):
            loop.train(settings)


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [256, 640])  # at and across the checkpoint of step 3
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_killed_run_resumes_bit_identically(
    settings: Settings, tmp_path: Path, log_every: int, dropout: float
) -> None:
    settings = dataclasses.replace(settings, target={**settings.target, "resid_pdrop": dropout})  # type: ignore[dict-item]
    whole, broken = (
        at(settings, tmp_path / name, log_every_tokens=log_every) for name in ("whole", "broken")
    )
    loop.train(whole)
    train_and_kill(broken, 5)
    folder = tmp_path / "broken"
    assert [path.name for path in state.complete(folder / "checkpoints")] == ["step-00000003"]
    assert not (folder / "summary.json").exists()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a line the kill cut off
    seconds = json.loads((folder / "checkpoints/step-00000003/state.json").read_text())["seconds"]
    loop.train(broken)
    assert_same_run(folder, tmp_path / "whole")
    assert rows(folder)[-1]["seconds"] > seconds > 0


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    settings: Settings, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_kill(at(settings, tmp_path / "run"), 2)
    loop.train(dataclasses.replace(at(settings, tmp_path / "run"), progress="lines"))
    assert "no checkpoint of this run is left, so it begins again" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", finished)


def test_other_settings_are_refused_naming_both_values(settings: Settings, finished: Path) -> None:
    with pytest.raises(UserError) as caught:
        loop.train(dataclasses.replace(at(settings, finished, context=8), seed=3))
    assert "train.context: the run has 16, asked is 8" in str(caught.value)
    assert "seed: the run has 0, asked is 3" in str(caught.value)
    assert "eval_tokens" not in str(caught.value)


def test_a_changed_text_is_refused(settings: Settings, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    run = json.loads((tmp_path / "run/run.json").read_text())
    del run["sha256"]
    changed = signed(run | {"data": {"fingerprint": "another", "bytes_per_token": 1.0}})
    (tmp_path / "run/run.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="the data has changed since this run began"):
        loop.train(at(settings, tmp_path / "run"))


# ---- the same losses however the work is split -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 3, 4])  # 3 + 3 + 2 windows: uneven pieces weigh what they hold
def test_accumulation_gives_the_losses_of_the_whole_batch(
    settings: Settings, tmp_path: Path, finished: Path, micro_batch: int
) -> None:
    loop.train(at(settings, tmp_path / "run", micro_batch=micro_batch))
    assert_close_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_in_two_runs_of_a_sweep(
    overrides: list[str], tmp_path: Path, finished: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "outgrow.train",
        "-m",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    name = "name='s${seed}'"
    sweep = [*command, *overrides, "seed=0,1", name, f"out='{tmp_path}/${{name}}'"]
    done = subprocess.run(sweep, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_close_run(tmp_path / "s0", finished)
    assert json.loads((tmp_path / "s0/run.json").read_text())["processes"] == 2
    assert (tmp_path / "s1/summary.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s0", "s1"]


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("processes", range(1, 6))
@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3])
def test_shares_cover_each_row_once_in_as_many_pieces_on_every_process(
    rows: int, processes: int, micro_batch: int | None
) -> None:
    shares = [Share.of(rows, micro_batch, process, processes) for process in range(processes)]
    assert [row for share in shares for row in share.rows] == list(range(rows))
    assert all([row for piece in share.pieces for row in piece] == list(share.rows) for share in shares)
    assert max(len(share.rows) for share in shares) - min(len(share.rows) for share in shares) <= 1
    assert len({len(share.pieces) for share in shares}) == 1
    assert max(len(piece) for share in shares for piece in share.pieces) <= (micro_batch or rows)


# ---- the ways to start -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def arms(overrides: list[str], finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that start from `finished`: grown without loss, the source itself, and scratch of the grown
    size."""
    folder = tmp_path_factory.mktemp("arms")
    given = [*without_target(overrides), f"source={finished}/final", LARGER, "train.budget_tokens=256"]
    return {
        name: loop.train(compose([*given, f"growth={name}", f"out={folder}/{name}"]))
        for name in ("lossless", "source", "scratch")
    }


def start_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())["start"]


@pytest.mark.slow
def test_a_lossless_arm_starts_at_the_loss_of_its_source(arms: dict[str, Path], finished: Path) -> None:
    assert rows(arms["lossless"])[0]["val_loss"] == pytest.approx(rows(finished)[-1]["val_loss"], abs=1e-5)
    start = start_of(arms["lossless"])
    assert (start["operator"], start["depth"], start["lossless"], start["reasons"]) == (
        "lossless",
        "identity",
        True,
        [],
    )
    assert start["receipt"]["max_delta"] < 1e-4
    assert (arms["lossless"] / "start" / "growth.json").exists()


def test_the_source_arm_trains_the_source_itself(arms: dict[str, Path], finished: Path) -> None:
    assert rows(arms["source"])[0]["val_loss"] == pytest.approx(rows(finished)[-1]["val_loss"], rel=1e-6)
    assert (
        json.loads((arms["source"] / "run.json").read_text())["parameters"]
        < json.loads((arms["scratch"] / "run.json").read_text())["parameters"]
    )
    assert not (arms["source"] / "start").exists()


def test_scratch_trains_the_network_of_the_grown_arms_and_owes_its_source_nothing(
    arms: dict[str, Path],
) -> None:
    runs = {name: json.loads((folder / "run.json").read_text()) for name, folder in arms.items()}
    sizes = {
        key: value
        for key, value in runs["lossless"]["target_config"].items()
        if key != "transformers_version"
    }
    assert {
        key: value for key, value in runs["scratch"]["target_config"].items() if key != "transformers_version"
    } == sizes
    assert runs["scratch"]["start"]["source"] is None
    assert runs["scratch"]["start"]["lossless"] is None
    assert not (arms["scratch"] / "start").exists()


def test_the_ledger_adds_up_what_a_checkpoint_cost(arms: dict[str, Path], finished: Path) -> None:
    source, grown = (
        json.loads((folder / "final/ledger.json").read_text()) for folder in (finished, arms["lossless"])
    )
    own = rows(arms["lossless"])[-1]
    assert (source["tokens"], source["source"], source["own"]["tokens"]) == (768, None, 768)
    assert (grown["tokens"], grown["own"]["tokens"]) == (768 + 256, 256)
    assert grown["flops"] == pytest.approx(source["flops"] + own["flops"])
    assert grown["source"] == {
        "path": f"{finished}/final",
        "tokens": 768,
        "flops": source["flops"],
        "val_loss": source["val_loss"],
    }
    assert (grown["study"], grown["arm"], grown["seed"], grown["val_loss"]) == (
        "t",
        "lossless",
        0,
        own["val_loss"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["growth=lossless", "source=nowhere/at/all"], "no such folder"),
        (["train.context=64", "train.batch_tokens=128"], "max_position_embeddings=32"),
        (
            ["target={model_type:phi,vocab_size:270,hidden_size:16,max_position_embeddings:32}"],
            "vocab_size is 270",
        ),
        (["train.eval_tokens=8"], "train.eval_tokens"),
        (["target=tiny_targt"], "did you mean 'tiny_target'"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_run(
    overrides: list[str], tmp_path: Path, change: list[str], words: str
) -> None:
    own = without_target(overrides) if change[0].startswith("target=") else overrides
    with pytest.raises(UserError, match=words):
        loop.train(compose([*own, *change, f"out={tmp_path}/run"]))
    assert not list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True


# ---- trouble -----------------------------------------------------------------------------------------------


def losing(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss of these steps (counted from 1) not a number."""
    forward, accumulate, lost = NextTokenLoss.forward, Step.accumulate, [False]

    def accumulated(self: Step, i: int) -> torch.Tensor:
        lost[0] = i + 1 in steps
        found = accumulate(self, i)
        lost[0] = False
        return found

    monkeypatch.setattr(Step, "accumulate", accumulated)
    monkeypatch.setattr(
        NextTokenLoss, "forward", lambda *a, **o: forward(*a, **o) * (math.nan if lost[0] else 1.0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, step: int
) -> None:
    with monkeypatch.context() as patch:
        losing(patch, step)
        for _ in range(2):  # the same when it is started again
            with pytest.raises(
                UserError,
                match=(
                    rf"step {step}: the loss is nan .* gradient of lm_head.bias, .* saved the state after "
                    rf"step {step - 1}"
                ),
            ):
                loop.train(at(settings, tmp_path / "run"))
    assert [path.name for path in state.complete(tmp_path / "run" / "checkpoints")] == [
        f"step-{step - 1:08d}"
    ]
    assert max(row["step"] for row in rows(tmp_path / "run")) < step
    loop.train(at(settings, tmp_path / "run"))
    assert_same_run(tmp_path / "run", finished)


def test_so_many_steps_that_are_not_finite_are_passed_over(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run trains on the other batches, at their rates; one such step more stops it."""
    losing(monkeypatch, 2, 3, 4)
    with pytest.raises(UserError, match=r"step 4: .* saved the state after step 3"):
        loop.train(at(settings, tmp_path / "run", skip_nonfinite=2))
    loop.train(at(settings, tmp_path / "run", skip_nonfinite=3))
    assert [row["step"] for row in rows(tmp_path / "run", "skip")] == [2, 3, 4]
    assert "not finite: gradient of lm_head.bias" in rows(tmp_path / "run", "skip")[0]["reason"]
    # of steps 3 and 4, there is no loss
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [2, 6]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["skipped_steps"]) == (6, 3)
    assert summary["final_val_loss"] < summary["start_val_loss"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gradient", "gradient of model.embed_tokens.weight, and of 0 more"),
        ("weight", "weight lm_head.weight"),
    ],
)
def test_the_tensor_that_is_not_finite_is_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    accumulate = Step.accumulate

    def spoilt(self: Step, i: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss, router = accumulate(self, i)
        if i == 1 and kind == "gradient":
            self.parameters["model.embed_tokens.weight"].grad[7, 3] = math.inf
        if i == 1 and kind == "weight":
            self.parameters["lm_head.weight"].data[0, 0] = math.nan
            loss = loss * math.nan
        return loss, router

    monkeypatch.setattr(Step, "accumulate", spoilt)
    with pytest.raises(UserError, match=f"step 2: .*not finite: {words}"):
        loop.train(at(settings, tmp_path / "run"))


# a checkpoint is due after step 3; step 6 is the last
@pytest.mark.parametrize(("step", "kept"), [(1, None), (3, None), (4, 3), (6, 3)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_published(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    kept: int | None,
    value: float,
) -> None:
    """After an update that broke one: whether a step, a checkpoint or the end meets it first, and however
    many steps may be skipped."""
    call = Step.__call__

    def breaking(self: Step, i: int) -> tuple[float, float]:
        found = call(self, i)
        if i + 1 == step:
            self.parameters["lm_head.weight"].data[0, 0] = value
        return found

    monkeypatch.setattr(Step, "__call__", breaking)
    state_kept = "no state before it" if kept is None else f"the state after step {kept}"
    for _ in range(2):  # the same when it is started again
        with pytest.raises(
            UserError,
            match=rf"not finite: weight lm_head.weight. The run stops here and has saved {state_kept}",
        ):
            loop.train(at(settings, tmp_path / "run", skip_nonfinite=9))
        names = [path.name for path in state.complete(tmp_path / "run/checkpoints")]
        assert names == ([] if kept is None else [f"step-{kept:08d}"])
        assert not (tmp_path / "run/summary.json").exists()
        assert not (tmp_path / "run/final").exists()
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.slow
def test_the_gradient_norm_of_an_interval_outlives_a_skip_and_a_kill(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4 to 6 are passed over, and the kill comes between them: the interval's last norm is that of step
    3 all the same."""
    losing(monkeypatch, 4, 5, 6)
    whole, broken = (
        at(settings, tmp_path / name, skip_nonfinite=3, log_every_tokens=768) for name in ("whole", "broken")
    )
    loop.train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Meter, "skip", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            loop.train(broken)
    loop.train(broken)
    assert rows(tmp_path / "broken", "train")[0]["grad_norm"] > 0
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_broken_samples_are_told_and_written_anew(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    train_and_kill(at(settings, tmp_path / "run"), 5)
    (tmp_path / "run/samples.json").write_text(text)
    loop.train(dataclasses.replace(at(settings, tmp_path / "run"), progress="lines"))
    assert "samples.json: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run/samples.json").read_text()).keys() == {"end"}


def test_samples_that_cannot_be_written_stop_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples.json").mkdir()
    log = Log(tmp_path, [], Console("lines", "run", 1))
    log.samples("start", {"step": 0}, lambda: [Sample("once", " upon")])
    log.close(0)
    told = capsys.readouterr().out
    assert "samples.json: could not be written (Is a directory)" in told
    assert "continues 'once' with ' upon'" in told


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_earlier_checkpoint(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    write, calls = HuggingFaceStorageWriter.write_data, itertools.count()

    def full(*arguments: Any) -> Any:
        if next(calls) > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(
            UserError, match=r"step-00000004: could not be written \(No space left on device\).* free space"
        ):
            loop.train(at(settings, tmp_path / "run", save_every_tokens=256))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    loop.train(at(settings, tmp_path / "run", save_every_tokens=256))
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_trackers_mirror_the_metrics_and_a_broken_one_does_not_stop_the_run(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: Path,
) -> None:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    mirrored: list[dict[str, Any]] = []
    log = WandBTracker.log

    def mirror(self: WandBTracker, values: dict[str, Any], **more: Any) -> None:
        mirrored.append(values)
        log(self, values, **more)

    monkeypatch.setattr(WandBTracker, "log", mirror)
    monkeypatch.setattr(TensorBoardTracker, "log", lambda *_, **__: 1 / 0)
    logger = dataclasses.replace(settings.logger, trackers=("tensorboard", "wandb"), mode="offline")
    loop.train(dataclasses.replace(at(settings, tmp_path / "run"), logger=logger, progress="lines"))
    assert "tracker tensorboard stopped (ZeroDivisionError" in capsys.readouterr().out
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert_same_run(tmp_path / "run", finished)
    evaluated = [row for row in mirrored if "eval/val_loss" in row]
    assert [(row["tokens"], row["eval/val_loss"]) for row in evaluated] == [
        (row["tokens"], row["val_loss"]) for row in rows(finished, "eval")
    ]
    assert all(row["eval_by_flops/val_loss"] == row["eval/val_loss"] and "flops" in row for row in evaluated)


def test_a_tracker_that_does_not_start_does_not_stop_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    from accelerate.tracking import WandBTracker

    monkeypatch.setattr(WandBTracker, "start", lambda _: 1 / 0)
    loop.train(
        dataclasses.replace(
            at(settings, tmp_path / "run"), logger=dataclasses.replace(settings.logger, trackers=("wandb",))
        )
    )
    assert_same_run(tmp_path / "run", finished)
