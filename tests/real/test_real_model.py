"""A real model grown: SmolLM2-135M-Instruct, whose weights hide nothing that random ones do. `make test-real`
runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.scripts import script
from outgrow.growth import grow, grow_optimizer, load_optimizer, plan
from outgrow.growth.engine.execute import Expander
from outgrow.growth.memory import follow
from outgrow.growth.moments import inexact
from outgrow.growth.resolve import derived_family
from outgrow.growth.verify import Meter
from outgrow.model.build import load_model
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.headers import SINGLE
from outgrow.model.locate import locate

real = script("real_model")
Unreachable = script("fetching").Unreachable
pytestmark = pytest.mark.slow
SMALL = {"hidden_size": 648, "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 31}
KILLS = 6


@pytest.fixture(scope="session")
def source() -> Path:
    """The model as plain float32 safetensors."""
    if not os.environ.get("OUTGROW_REAL"):
        pytest.skip("make test-real fetches a model of 93 MB and runs this")
    try:
        return locate(real.fetched())
    except Unreachable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def held(source: Path) -> Meter:
    """The source's answers on real text."""
    return real.meter(source)


@pytest.fixture(scope="session")
def short(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source in bfloat16."""
    return real.in_bfloat16(source, tmp_path_factory.mktemp("short") / "source")


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: each growth takes a gigabyte or two."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def bits(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, over all its shards."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


# ---- what is kept ------------------------------------------------------------------------------------------


def test_the_model_that_was_unpacked_speaks(source: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**tokens, max_new_tokens=2, do_sample=False)[0])
    assert said.startswith("The capital of France is Paris")
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize("case", real.LOSSLESS, ids=lambda case: case.name)
def test_a_lossless_growth_in_float32_says_the_same(case: Any, source: Path, held: Meter, work: Path) -> None:
    row = real.measured(case, source, held, work)
    assert row["lossless"]
    assert row["parameters"] == 361_821_120 or case.target is not real.SHAPE_360M
    assert row["max_delta"] < 1e-4 * row["max_logit"]
    assert row["kl"] < 1e-8
    assert exp(row["loss"]) == pytest.approx(exp(row["loss_source"]), rel=1e-5)
    assert row["said"] == "10 of 10"


@pytest.mark.parametrize(
    "case", [case for case in real.LOSSLESS if case.name in real.STORED_SHORT], ids=lambda case: case.name
)
def test_in_bfloat16_it_costs_what_casting_costs(case: Any, short: Path, work: Path) -> None:
    held = real.meter(short)
    row, cast = real.measured(case, short, held, work), held.cast("bfloat16")
    assert row["kl"] < cast.kl
    assert abs(row["loss"] - row["loss_source"]) < 3 * abs(cast.loss_target - cast.loss_source)


@pytest.mark.parametrize("case", real.LOSSY, ids=lambda case: case.name)
def test_every_other_growth_loads_and_is_measured(case: Any, source: Path, held: Meter, work: Path) -> None:
    row = real.measured(case, source, held, work)
    assert not row["lossless"]
    assert row["parameters"] == 361_821_120 or case.target is not real.SHAPE_360M
    assert row["loss_source"] < row["loss"] < 50
    assert row["kl"] > 1e-3


def test_growing_twice_is_growing_once(source: Path, held: Meter, work: Path) -> None:
    grow(source, work / "half", target=SMALL, receipt=False)
    grow(work / "half", work / "twice", target=real.SHAPE_360M, receipt=False)
    receipt = held.receipt(work / "twice", norm="rms")
    assert receipt.max_delta < 1e-4 * receipt.max_logit
    assert receipt.same == len(receipt.continuations) == 10


def test_the_derived_schema_gives_the_bits_of_the_written_one(source: Path) -> None:
    with Checkpoint(source) as reader:
        written, derived = plan(reader, real.ODD), plan(reader, real.ODD, family=derived_family(reader))
        assert derived.certificate.lossless
        steps = {step.name: step for step in derived.steps}
        assert {step.name for step in written.steps} == steps.keys()
        some = [
            step
            for step in written.steps
            if ".layers." not in step.name or ".layers.3." in step.name or ".layers.30." in step.name
        ]
        for step in some:
            expected = Expander(written, step, reader).complete()
            assert (expected == Expander(derived, steps[step.name], reader).complete()).all(), step.name


def test_shards_in_and_out_hold_the_same_bits(source: Path, work: Path) -> None:
    grow(source, work / "whole", target=SMALL, receipt=False)
    load_model(source).save_pretrained(work / "shards", max_shard_size="150MB")
    assert len(list((work / "shards").glob("*.safetensors"))) > 2
    grow(work / "shards", work / "out", target=SMALL, receipt=False, max_shard_bytes=200_000_000, threads=1)
    assert len(list((work / "out").glob("*.safetensors"))) > 2
    assert_equal(bits(work / "whole"), bits(work / "out"))
    assert load_model(work / "out").num_parameters() == plan(source, SMALL).target_parameters


# ---- tokens ------------------------------------------------------------------------------------------------


def test_tokens_that_were_added_to_the_tokenizer_have_room(source: Path, held: Meter, work: Path) -> None:
    from transformers import AutoTokenizer

    copy = work / "source"
    shutil.copytree(source, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    added = [f"<|step{number}|>" for number in range(5)]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.save_pretrained(copy)
    assert len(tokenizer) == 49152 + 5
    grow(copy, work / "out", target={"vocab_size": 49160}, receipt=False)
    receipt = held.receipt(work / "out", norm="rms")
    assert receipt.max_delta < 1e-4 * receipt.max_logit
    again = AutoTokenizer.from_pretrained(work / "out")
    assert tokenizer.convert_tokens_to_ids(added[3]) in again(f"so {added[3]} it")["input_ids"]
    rows = load_file(work / "out" / SINGLE)["model.embed_tokens.weight"]
    mean = rows[:49152].mean(0)
    assert torch.allclose(rows[49152:], mean.expand(8, -1), atol=0.02)
    assert not torch.equal(rows[49152], rows[49153])


# ---- training ----------------------------------------------------------------------------------------------


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def test_adams_state_grows_with_the_weights(source: Path, held: Meter, work: Path) -> None:
    """The grown moments are those that the grown model's own gradients give."""
    tokens = held.tokens[:1, :48]
    made = plan(source, SMALL, noise=0.0)
    assert not list(inexact(made))
    model = load_model(source)
    adam = torch.optim.AdamW(model.parameters(), lr=0.0)
    larger = follow(made, model)
    step(model, adam, tokens)
    grown, own = (
        torch.optim.AdamW(larger.parameters(), lr=0.0),
        torch.optim.AdamW(larger.parameters(), lr=0.0),
    )
    grow_optimizer(adam, model, grown, larger, made)
    torch.save(adam.state_dict(), work / "optimizer.bin")
    del adam, model
    step(larger, own, tokens)
    for name, parameter in larger.named_parameters():
        ours, theirs = (optimizer.state[parameter]["exp_avg"] for optimizer in (grown, own))
        inherited = ours != 0
        assert torch.allclose(
            ours[inherited], theirs[inherited], rtol=1e-2, atol=1e-3 * float(theirs.abs().max())
        ), name
    del own
    grow(source, work / "out", target=SMALL, noise=0.0, receipt=False, optimizer=work / "optimizer.bin")
    loaded = torch.optim.AdamW(larger.parameters(), lr=0.0)
    load_optimizer(work / "out", loaded, larger)
    for parameter in larger.parameters():
        assert torch.equal(loaded.state[parameter]["exp_avg"], grown.state[parameter]["exp_avg"])


def test_a_grown_model_trains_on_a_mix_of_documents(source: Path, work: Path) -> None:
    pytest.importorskip("lm_eval")
    from outgrow.train.compose import compose
    from outgrow.train.data.settings import MixtureSettings, PhaseSettings, SourceSettings
    from outgrow.train.loop import train

    root = Path(real.__file__).parents[1]
    for name, pattern in (("prose", "docs/*.md"), ("code", "growth/*.py")):
        (work / name).mkdir()
        for file in sorted(root.glob(pattern)):
            for start in range(0, 6000, 1000):
                (work / name / f"{file.stem}{start}.txt").write_text(file.read_text()[start : start + 1000])
    sizes = ",".join(f"{key}:{size}" for key, size in SMALL.items())
    small = [
        "context=96",
        "batch_tokens=192",
        "budget_tokens=768",
        "eval_tokens=192",
        "eval_every_tokens=384",
        "log_every_tokens=192",
    ]
    given = [
        "data=files",
        f"data.path={work / 'prose'}",
        f"data.folder={work / 'tokens'}",
        "data.validation_fraction=0.3",
    ]
    given += [
        f"source={source}",
        "growth=lossless",
        f"target={{{sizes}}}",
        "optimizer.learning_rate=1e-4",
        "logger=none",
        "progress=false",
    ]
    small += ["document_mask=true", "save_every_tokens=null"]
    watched = ["suite=commonsense", f"tasks={real.TASKS}", "only=[arc_easy]", "every_tokens=384"]
    settings = compose(
        [*given, *(f"train.{entry}" for entry in small), *(f"evaluate.{entry}" for entry in watched)]
    )
    code = dataclasses.replace(
        settings.data, name="code", path=str(work / "code"), folder=str(work / "code-tokens")
    )
    sources = {
        "prose": SourceSettings(settings.data, max_passes=9),
        "code": SourceSettings(code, max_passes=9),
    }
    mixture = MixtureSettings("mix", sources, (PhaseSettings(weights={"prose": 0.5, "code": 0.5}),))
    run = train(dataclasses.replace(settings, mixture=mixture, out=str(work / "run")))
    read = json.loads((run / "run.json").read_text())["data"]["tokens_read"]
    assert read == {"prose": 384, "code": 384}
    metrics = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in metrics if row["kind"] == "eval"]
    assert 1 < losses[0] < 6, "it begins as the source, not as noise (ln 49152 is 10.8)"
    assert losses[-1] < losses[0] + 0.3, "four steps at a low rate spoil nothing"
    scores = [row["arc_easy"] for row in metrics if row["kind"] == "benchmark"]
    assert len(scores) == 2, "every 384 of 768 tokens"
    assert min(scores) > 0.5, "chance is a quarter"
    assert load_model(run / "final").config.hidden_size == SMALL["hidden_size"]


# ---- benchmarks --------------------------------------------------------------------------------------------


def test_a_lossless_growth_keeps_the_score_of_every_benchmark(source: Path, work: Path) -> None:
    """The source as its GGUF file, the target as a folder, on the page's own task files."""
    pytest.importorskip("lm_eval")
    from outgrow.experiments.suite.__main__ import main

    grow(source, work / "larger", target=SMALL, receipt=False)
    runs = [str(real.fetched()), str(work / "larger")]
    assert main([*runs, "suite=commonsense", f"tasks={real.TASKS}", f"out={work / 'scores'}"]) == 0
    small, large = json.loads((work / "scores" / "commonsense.json").read_text())["runs"]
    assert small["scores"] == large["scores"]
    assert set(small["scores"]) == {"piqa", "winogrande", "arc_easy"}
    assert min(small["scores"].values()) > 0.6, "it is no random model"


# ---- killed ------------------------------------------------------------------------------------------------


def test_kill_9_at_random_moments_leaves_nothing_that_loads(source: Path, work: Path) -> None:
    out, draw = work / "out", random.Random(0)
    sizes = ",".join(f"{key}:{size}" for key, size in SMALL.items())
    command = [
        sys.executable,
        "-m",
        "outgrow.growth",
        f"source={source}",
        f"out={out}",
        f"target={{{sizes}}}",
        "overwrite=true",
    ]
    began = time.monotonic()
    subprocess.run(command, check=True, timeout=600)
    whole = time.monotonic() - began
    expected = bits(out)
    killed = 0
    for number in range(KILLS):
        if number % 2:
            shutil.rmtree(out, ignore_errors=True)  # the next is made anew, not replaced
        there = out.exists()
        growing = subprocess.Popen(command)
        time.sleep(draw.uniform(0.2, 1.0) * whole)
        growing.send_signal(signal.SIGKILL)
        killed += growing.wait() == -signal.SIGKILL
        assert out.exists() >= there
        if out.exists():
            assert_equal(bits(out), expected)
    assert killed
    subprocess.run(command, check=True, timeout=600)
    assert_equal(bits(out), expected)
    assert sorted(path.name for path in work.iterdir()) == ["out"]
