"""Learned growth: least squares against numpy, LiGO against its fixed start and finite differences."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.families import FAMILIES, config_of, growths, renamed
from helpers.models import make_checkpoint
from helpers.unwritten import STRANGERS
from outgrow.growth import grow, plan
from outgrow.growth.__main__ import main
from outgrow.growth.engine.seeding import generator
from outgrow.growth.engine.tensors import expand
from outgrow.growth.learned import maps_state, telling
from outgrow.growth.learned.lesa import Basis
from outgrow.growth.learned.lessons import LEARNED, Lesa
from outgrow.growth.learned.ligo import Learner
from outgrow.growth.learned.on_disk import OnDisk, values_of
from outgrow.growth.learned.sums import Inputs
from outgrow.growth.learned.text import read_calibration
from outgrow.growth.memory import grow_model
from outgrow.growth.operators import options_of
from outgrow.growth.record import recorded_plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model, empty_model, load_model, to_hf_config
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.geometry import flops_per_token
from outgrow.model.headers import SINGLE
from outgrow.train.data.tokenizer import save_tokenizer, train_tokenizer

TEXT = " ".join(
    f"the {a} cat saw {b} dogs on a mat, and then it sat."
    for a in ["red", "blue", "old", "young", "big"]
    for b in range(60)
)
VOCABULARY = 300


def spoken(folder: Path, config: dict[str, Any]) -> Path:
    """A tiny random float64 model with a tokenizer."""
    make_checkpoint(folder, config | {"vocab_size": VOCABULARY})
    save_tokenizer(train_tokenizer([TEXT], vocab_size=290, model_max_length=32), folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer. Read only."""
    return spoken(tmp_path_factory.mktemp("llama") / "source", config_of("llama"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A tiny Llama that has learnt something of the text. Read only."""
    folder = spoken(tmp_path_factory.mktemp("trained") / "source", config_of("llama"))
    tokens = read_calibration(str(text), folder, VOCABULARY, 32, tokens=3200, window=32).fit
    model = build_model(config_of("llama", vocab_size=VOCABULARY), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(80):
        rows = torch.from_numpy(tokens[np.arange(16 * step, 16 * step + 16) % len(tokens)])
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def ridged(read: np.ndarray, wanted: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """The same minimum by numpy: rows of √λ beside the inputs, the distance from `start` as the unknown."""
    pull = np.sqrt(ridge * (read**2).sum() / read.shape[1])
    rows = np.concatenate([read, pull * np.eye(read.shape[1])])
    missing = np.concatenate([wanted - read @ start.T, np.zeros((read.shape[1], len(start)))])
    return start + np.linalg.lstsq(rows, missing, rcond=None)[0].T


@pytest.mark.parametrize("tokens", [3, 40])  # fewer and more than inputs
def test_a_fit_is_the_least_squares_solution(tokens: int) -> None:
    draw = np.random.default_rng(0)
    read, seen, start, wanted = (
        draw.normal(size=size) for size in ((tokens, 7), (tokens, 5), (4, 7), (4, 5))
    )
    fitted = Inputs(torch.tensor(read), torch.tensor(seen), 0.1).fit(
        torch.tensor(start), torch.tensor(wanted)
    )
    assert np.allclose(fitted, ridged(read, seen @ wanted.T, start, 0.1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("tokens", "fit", "held"), [(32, 1, 1), (320, 10, 1), (1280, 40, 5), (3200, 100, 8)])
def test_windows_are_held_out(llama: Path, text: Path, tokens: int, fit: int, held: int) -> None:
    windows = read_calibration(str(text), llama, VOCABULARY, 32, tokens=tokens, window=256)
    assert windows.fit.shape == (fit, 32)
    assert windows.held.shape == (held, 32)


@pytest.mark.slow
def test_a_repeated_layer_gives_its_share_of_the_source(llama: Path, text: Path, tmp_path: Path) -> None:
    """After `stack`, layer 0 reads what the source's does: its readers stay, its writers give half."""
    how: dict[str, Any] = {"depth": "stack", "text": text, "tokens": 640, "ridge": 0.1}
    grow(llama, tmp_path / "out", target={"num_hidden_layers": 4}, operator="least_squares", **how)
    windows = read_calibration(str(text), llama, VOCABULARY, 32, tokens=640, window=256).fit
    model, read = load_model(llama, dtype="float64").eval(), []
    writer: Any = model.get_submodule("model.layers.0.self_attn.o_proj")
    writer.register_forward_hook(lambda _, arguments, out: read.append(arguments[0]))
    with torch.no_grad():
        model(torch.from_numpy(windows))
    inputs, own = read[0].flatten(0, 1).numpy(), writer.weight.detach().numpy()
    with Checkpoint(llama) as source, Checkpoint(tmp_path / "out") as grown:
        before, after = (values_of(each, each.tensors) for each in (source, grown))
        reader = "model.layers.0.self_attn.q_proj.weight"
        assert np.allclose(after(reader), before(reader), rtol=1e-10, atol=1e-12)
        expected = ridged(inputs, 0.5 * inputs @ own.T, own, 0.1)
        assert np.allclose(after("model.layers.0.self_attn.o_proj.weight"), expected, rtol=1e-5, atol=1e-7)
        assert np.abs(expected - own).max() > 0.01


UNTIED = {"tie_word_embeddings": False}
CASES = {name: config_of(name, **UNTIED) for name in FAMILIES} | {
    "starcoder2": to_hf_config({"model_type": "starcoder2", **STRANGERS["starcoder2"], **UNTIED}).to_dict(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_tiling_is_repaired(name: str, text: Path, tmp_path: Path) -> None:
    source = spoken(tmp_path / "source", CASES[name])
    ffn = "intermediate_size" if name == "starcoder2" else next(iter(renamed(name, {"intermediate_size": 0})))
    target = {ffn: CASES[name][ffn] * 2}
    grow(source, tmp_path / "tiled", target=target, operator="tile", receipt=False)
    how: dict[str, Any] = {
        "width": "tile",
        "depth": "identity",
        "text": text,
        "ridge": 1e-4,
        "receipt": False,
    }
    learned = grow(source, tmp_path / "out", target=target, operator="least_squares", **how).learned
    assert learned is not None
    assert learned["matrices"] == sum(step.tensor.line.kind == "linear" for step in matrices(source))
    windows = torch.from_numpy(
        read_calibration(str(text), source, VOCABULARY, 32, tokens=16384, window=32).held
    )
    with torch.no_grad():
        own, tiled, fitted = (
            load_model(folder, dtype="float64").eval()(windows).logits
            for folder in (source, tmp_path / "tiled", tmp_path / "out")
        )
    lost, left = (float((logits - own).abs().mean()) for logits in (tiled, fitted))
    if name in ("gemma2", "olmo2"):  # a norm behind the layer undoes the doubling: nothing is to be repaired
        assert lost < 1e-3 * float(own.abs().mean())
        assert left < 0.1 * float(own.abs().mean())
    else:
        assert left < 0.05 * lost


def matrices(source: Path) -> list[Any]:
    """The steps of everything that is a matrix."""
    return [step for step in plan(source, {}).steps if len(step.shape) == 2]


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["stack", "proportional"])
def test_a_layer_map_is_repaired_and_recorded(trained: Path, text: Path, tmp_path: Path, depth: str) -> None:
    told: list[tuple[float, float]] = []
    grown = grow(
        trained, tmp_path / "out", target={"num_hidden_layers": 4}, operator="least_squares", depth=depth, text=text,
        learning=lambda *done: told.append(done),
    )  # fmt: skip
    assert grown.learned is not None
    assert grown.receipt is not None
    losses = [grown.learned[f"loss_{when}"] for when in ("source", "before", "after")]
    assert losses[2] < 0.5 * (losses[0] + losses[1])
    assert told[-1][0] == told[-1][1]
    record = json.loads((tmp_path / "out" / "growth.json").read_text())
    assert record["learned"] == grown.learned
    assert record["learned"]["flops"] > 0
    assert len(record["learned"]["sha256"]) == 64
    assert not record["certificate"]["lossless"]
    assert recorded_plan(tmp_path / "out").hash == grown.plan.hash
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(record["files"])
    assert "learned on" in grown.describe()


# ---- ligo ------------------------------------------------------------------------------------------------


def learner_of(source: Path, target: dict[str, int], **how: Any) -> tuple[Learner, dict[str, np.ndarray]]:
    """The maps before their first step, and what the fixed operator makes."""
    opened = Checkpoint(source)
    learned = plan(opened, target, "ligo", text=__file__, **how)
    fixed = plan(opened, target, noise=0.0, **how)
    whole = {name: values.numpy() for name, values in expand(fixed, opened)}
    return Learner(learned, values_of(opened, opened.tensors), "exact", torch.float64), whole


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi with a tokenizer. Read only."""
    return spoken(tmp_path_factory.mktemp("phi") / "source", config_of("phi"))


@pytest.mark.parametrize("depth", ["stack", "identity"])
@pytest.mark.parametrize(
    ("family", "target", "ulps"),
    [
        ("llama", {"intermediate_size": 80, "num_hidden_layers": 5}, 0),
        ("llama", {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 6, "hidden_size": 96}, 0),
        ("phi", {"intermediate_size": 120, "num_hidden_layers": 3}, 0),
        ("phi", {"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 12}, 2),
    ],
)
def test_ligo_starts_at_its_fixed_operator(
    request: pytest.FixtureRequest, family: str, target: dict[str, int], ulps: int, depth: str
) -> None:
    learner, fixed = learner_of(request.getfixturevalue(family), target, depth=depth)
    with torch.no_grad():
        grown = {name: values.numpy() for name, values in learner.grown()}
    assert grown.keys() == fixed.keys()
    for name, values in fixed.items():
        assert np.abs(grown[name] - values).max() <= ulps * np.spacing(np.abs(values).max()), name


def test_the_gradients_of_maps_and_of_layers_are_finite_differences(phi: Path) -> None:
    learner, _ = learner_of(phi, {"intermediate_size": 60, "num_hidden_layers": 3}, depth="stack")
    model = empty_model(learner.plan.target_config, dtype=torch.float64).eval()
    tokens = torch.arange(24).reshape(2, 12)

    def loss() -> torch.Tensor:
        made = dict(learner.grown())
        logits = torch.func.functional_call(model, made, kwargs={"input_ids": tokens}).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    loss().backward()  # type: ignore[no-untyped-call]
    for parameter in (*learner.maps[:3], *learner.layers[:4]):
        place, step = tuple(size - 1 for size in parameter.shape), 1e-5
        around = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * step
                around.append(float(loss()))
                parameter[place] -= sign * step
        assert parameter.grad is not None
        assert float(parameter.grad[place]) == pytest.approx(
            (around[0] - around[1]) / (2 * step), rel=1e-5, abs=1e-9
        )


@pytest.mark.slow
def test_ligo_learns_and_keeps_the_sources_own_rows(trained: Path, text: Path, tmp_path: Path) -> None:
    target = {"intermediate_size": 60, "num_hidden_layers": 4}
    how: dict[str, Any] = {"depth": "stack", "steps": 30, "batch_tokens": 256, "learning_rate": 0.003}
    grown = grow(trained, tmp_path / "out", target=target, operator="ligo", text=text, **how)
    learned = grown.learned
    assert learned is not None
    assert learned["loss_after"] < 0.5 * (learned["loss_source"] + learned["loss_before"])
    assert learned["steps"] == len(learned["losses"]) == 30
    assert learned["flops"] > 30 * 256 * flops_per_token(grown.plan.target_config, 32)
    load_model(tmp_path / "out")
    with Checkpoint(tmp_path / "out") as out, Checkpoint(trained) as source:
        name = "model.embed_tokens.weight"
        assert (out.read(name) == source.read(name)).all()


def test_the_random_start_draws_new_rows_alone(phi: Path) -> None:
    opened = Checkpoint(phi)
    values = values_of(opened, opened.tensors)

    def learner(start: str, seed: int) -> Learner:
        target = {"intermediate_size": 200, "num_hidden_layers": 3}
        learned = plan(opened, target, "ligo", text=__file__, depth="stack", start=start, seed=seed)
        return Learner(learned, values, start, torch.float64)

    exact, drawn, again, other = (
        learner(start, seed) for start, seed in (("exact", 0), ("random", 0), ("random", 0), ("random", 1))
    )
    assert len(drawn.maps) == len(exact.maps) > 0
    for number, (before, after) in enumerate(zip(exact.maps, drawn.maps, strict=True)):
        new = drawn._frozen[number][:, 0].bool()
        assert torch.equal(after[~new], before[~new])
        fresh, inputs = after[new].detach(), after.shape[1]
        assert float(fresh.std()) * inputs**0.5 == pytest.approx(1, abs=4 / (2 * fresh.numel()) ** 0.5)
        assert torch.equal(after, again.maps[number])
        assert not torch.equal(fresh, other.maps[number][new])
    assert all(map(torch.equal, drawn.layers, exact.layers))


@pytest.mark.slow
def test_the_random_start_learns(trained: Path, text: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"depth": "stack", "steps": 30, "batch_tokens": 256, "learning_rate": 0.01}
    target = {"intermediate_size": 60, "num_hidden_layers": 3}
    grown = grow(trained, tmp_path / "out", target=target, operator="ligo", text=text, start="random", **how)
    assert grown.learned is not None
    losses = grown.learned["losses"]
    assert losses[0] > grown.learned["loss_before"]  # what the fixed operator wrote is not where it starts
    assert grown.learned["loss_after"] < losses[0]


@pytest.mark.slow
def test_a_stopped_ligo_goes_on_to_the_same_bits(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps_state, "SECONDS", 0.0)
    state, told = tmp_path / "out.learning" / "maps.safetensors", {"whole": 0, "stopped": 0, "resumed": 0}

    def grown(out: str, told_as: str, stop: int | None = None, **more: Any) -> Any:
        def learning(*_: float) -> None:
            told[told_as] += state.exists() or told_as == "whole"
            if stop is not None and told[told_as] == stop:
                raise KeyboardInterrupt

        how: dict[str, Any] = {"depth": "stack", "steps": 6, "batch_tokens": 64, "receipt": False, **more}
        target = {"intermediate_size": 60, "num_hidden_layers": 3}
        return grow(
            trained, tmp_path / out, target=target, operator="ligo", text=text, learning=learning, **how
        )

    whole = grown("whole", "whole")
    with pytest.raises(KeyboardInterrupt):
        grown("out", "stopped", stop=2)
    assert state.is_file()
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    forward = torch.func.functional_call
    monkeypatch.setattr(torch.func, "functional_call", lambda *a, **k: steps.append(1) or forward(*a, **k))
    resumed = grown("out", "resumed")
    assert len(steps) == 6 - 2
    assert resumed.learned == whole.learned
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "whole" / SINGLE).read_bytes()
    assert not list(tmp_path.glob("*.learning*"))

    told["stopped"] = 0
    with pytest.raises(KeyboardInterrupt):
        grown("out", "stopped", stop=2, overwrite=True)
    steps.clear()
    grown("out", "resumed", overwrite=True, learning_rate=0.002)  # another growth: the state is not its own
    assert len(steps) == 6
    state.parent.mkdir()
    state.write_text("mine")
    with pytest.raises(UserError, match="in the way and holds no state of a growth"):
        grown("out", "resumed", overwrite=True)
    assert state.read_text() == "mine"


LEARNING = {
    "least_squares": {"depth": "stack", "tokens": 640},
    "lesa": {"depth": "neighbours", "epochs": 2, "rows": 16},
    "ligo": {"depth": "stack", "steps": 4, "batch_tokens": 64},
}
# After how many words of `learning` a growth is stopped, and then the one that goes on from it.
STOPS = {"least_squares": (2, 3), "lesa": (6, 8), "ligo": (1, 2)}


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of five random layers with a tokenizer. Read only."""
    return spoken(tmp_path_factory.mktemp("speaking") / "source", config_of("llama", **DEEP))


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it, and what is on disk stays as it is."""


def learns(
    source: Path, out: Path, text: Path, operator: str, kill: int | None = None, told: Any = None
) -> Any:
    """Grow in width and depth by a learned operator; killed before a part of the learning, if asked. `told`
    takes the shares of it that are told as done."""
    told = [] if told is None else told

    def learning(done: float, flops: float) -> None:
        if len(told) == kill:
            raise Killed
        told.append(done / flops)

    how = LEARNING[operator] | ({} if operator == "lesa" else {"text": text})
    target = {"intermediate_size": 60, "num_hidden_layers": 7}
    return grow(source, out, target=target, operator=operator, learning=learning, receipt=False, **how)


@pytest.mark.slow
@pytest.mark.parametrize("operator", LEARNING)
def test_a_growth_stopped_at_any_part_goes_on_to_the_same_bytes(
    speaking: Path, text: Path, tmp_path: Path, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps_state, "SECONDS", 0.0)
    whole, out = tmp_path / "whole", tmp_path / "out"
    learns(speaking, whole, text, operator)
    for kill in STOPS[operator]:
        with pytest.raises(Killed):
            learns(speaking, out, text, operator, kill)
        assert not out.exists()
        assert list(tmp_path.glob("out.learning/*"))
    told: list[float] = []
    learns(speaking, out, text, operator, told=told)
    assert 0 < told[0] < told[-1]  # from which the time that is left is told
    for name in (SINGLE, "growth.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


GROWING = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + "/growth"]
from test_learned import learns
source, out, text, operator = sys.argv[1:]
print("imported", flush=True)
learns(Path(source), Path(out), Path(text), operator)
"""


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["least_squares", "lesa"])
def test_a_growth_killed_at_random_moments_ends_with_the_same_bytes(
    speaking: Path, text: Path, tmp_path: Path, operator: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    began = time.monotonic()
    learns(speaking, whole, text, operator)
    took = time.monotonic() - began
    tests = str(Path(__file__).parents[1])
    program = [sys.executable, "-c", GROWING.format(tests=tests), *map(str, (speaking, out, text, operator))]
    draw = random.Random(0)
    killed = 0
    for attempt in range(4):
        growing = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert growing.stdout is not None
        assert growing.stdout.readline() == "imported\n"
        if attempt < 3:
            time.sleep(draw.uniform(0.1, 1.0) * took)
            growing.send_signal(signal.SIGKILL)
            killed += growing.wait() == -signal.SIGKILL
        elif not out.exists():
            assert growing.wait() == 0
        else:
            growing.kill()
        growing.communicate()
    assert killed
    for name in (SINGLE, "growth.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("operator", LEARNING)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_flops_told_before_are_those_recorded(
    speaking: Path, phi: Path, text: Path, tmp_path: Path, operator: str, family: str
) -> None:
    told: list[tuple[float, float]] = []
    how = LEARNING[operator] | ({} if operator == "lesa" else {"text": text})
    source = speaking if family == "llama" or operator == "lesa" else phi
    grown = grow(
        source, tmp_path / "out", target={"num_hidden_layers": 7}, operator=operator, receipt=False,
        learning=lambda *of: told.append(of), **how,
    )  # fmt: skip
    assert grown.learned is not None
    assert told[0][0] == 0
    assert told[-1][0] == pytest.approx(told[-1][1])
    assert told[0][1] == pytest.approx(grown.learned["flops"], rel=0.2)


def test_what_takes_minutes_is_told_before_and_meanwhile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(telling.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(telling, "matrix_speed", lambda: 1e10)
    short, long = telling.Telling(), telling.Telling()
    short(0.0, 1e9)
    assert capsys.readouterr().err == ""
    long(0.0, 6e12)
    assert "about 6e+12 FLOPs, 10 min or more at this machine's 10 GFLOP/s" in capsys.readouterr().err
    clock[0] += 30
    long(3e11, 6e12)
    assert capsys.readouterr().err == ""
    clock[0] += 30
    long(1.5e12, 6e12)
    assert capsys.readouterr().err == "learning: 25%, 3 min left\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, "starcoder2"])
def test_every_family_learns_its_maps(name: str, text: Path, tmp_path: Path) -> None:
    """From a lossless start: the first loss is the source's, so that names, ties and maps are the class's."""
    if name == "starcoder2":
        source = spoken(tmp_path / "source", CASES[name])
        target = {"intermediate_size": 81, "num_hidden_layers": 3}
    else:
        source = spoken(tmp_path / "source", config_of(name))
        sizes = {key: size for key, size in growths(name)["all"].items() if key != "vocab_size"}
        target = renamed(name, sizes)
    how: dict[str, Any] = {"steps": 2, "batch_tokens": 64, "window": 16, "noise": 0.0, "receipt": False}
    learned = grow(source, tmp_path / "out", target=target, operator="ligo", text=text, **how).learned
    assert learned is not None
    fit = read_calibration(str(text), source, VOCABULARY, 32, tokens=128, window=16).fit[:4]
    rows = torch.from_numpy(fit)
    with torch.no_grad():
        logits = load_model(source, dtype="float64").eval()(rows).logits[:, :-1]
        own = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    assert learned["losses"][0] == pytest.approx(own, rel=1e-4)
    assert np.isfinite(learned["loss_after"])
    load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"learning_rate": 0}, "learning_rate 0: expected a number above 0"),
        ({"start": "exakt"}, "did you mean 'exact'"),
        ({"steps": 1}, "steps 1: expected a whole number from 2"),
        ({"width": "bert2bert_aki"}, "a map of one axis at a time starts it"),
    ],
    ids=str,
)
def test_what_ligo_cannot_do_is_told(
    llama: Path, text: Path, tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    target = {"intermediate_size": 60, "num_hidden_layers": 4}
    with pytest.raises(UserError, match=words):
        grow(llama, tmp_path / "out", target=target, operator="ligo", text=text, **how)
    assert not (tmp_path / "out").exists()


# ---- lesa ------------------------------------------------------------------------------------------------


DEEP = {"num_hidden_layers": 5, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of five random layers. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("deep") / "source", config_of("llama", **DEEP))


def predicted_by_hand(
    matrices: list[np.ndarray], before: int, lesson: Lesa, seeds: tuple[int, Any]
) -> np.ndarray:
    """LESA in plain numpy and PyTorch: the singular vectors of the matrices side by side, the network, U S V."""
    layers, outputs = len(matrices), len(matrices[0])
    left, sizes, right = np.linalg.svd(np.concatenate(matrices, 1), full_matrices=False)
    signs = np.sign(left[np.abs(left).argmax(0), np.arange(outputs)])
    left, right = left * signs, right * signs[:, None]
    parts = np.split(right, layers, 1)
    unit = np.sqrt(np.mean(np.square(parts)))
    rows = [torch.tensor(part / unit) for part in parts]
    torch.manual_seed(seeds[0])
    inputs = rows[0].shape[1]
    network = torch.nn.Sequential(
        torch.nn.Linear(2 * inputs, lesson.hidden), torch.nn.ReLU(), torch.nn.Linear(lesson.hidden, lesson.hidden),
        torch.nn.ReLU(), torch.nn.Linear(lesson.hidden, inputs),
    )  # fmt: skip
    if lesson.start == "mean":
        torch.nn.init.zeros_(network[4].weight)
        torch.nn.init.zeros_(network[4].bias)
    network.double()

    def told(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        mean = (one + other) / 2 if lesson.start == "mean" else 0.0
        return network(torch.cat([one, other], 1)) + mean

    optimizer = torch.optim.AdamW(network.parameters(), lr=lesson.learning_rate)
    for _ in range(lesson.epochs):
        for layer in seeds[1].permutation(np.arange(1, layers - 1)):
            order = torch.from_numpy(seeds[1].permutation(outputs))
            for some in order.split(lesson.rows):
                given, wanted = told(rows[layer - 1][some], rows[layer + 1][some]), rows[layer][some]
                square = ((given - wanted) ** 2).mean()
                norms = (given.square().sum().sqrt() - wanted.square().sum().sqrt()) ** 2
                optimizer.zero_grad()
                ((1 - lesson.norm_weight) * square + lesson.norm_weight * norms).backward()
                optimizer.step()
    with torch.no_grad():
        new = told(rows[before], rows[before + 1]).numpy() * unit
    return left @ np.diag(sizes) @ new


@pytest.mark.parametrize("start", ["mean", "random"])
@pytest.mark.parametrize("kind", ["self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"])
def test_lesa_is_what_numpy_and_pytorch_make(deep: Path, tmp_path: Path, kind: str, start: str) -> None:
    how: dict[str, Any] = {"depth": "neighbours", "rows": 16, "hidden": 12, "epochs": 3, "start": start}
    grown = grow(
        deep, tmp_path / "out", target={"num_hidden_layers": 7}, operator="lesa", receipt=False, **how
    )
    assert grown.plan.layers.shown == ["0", "1", "1+2", "2", "3", "3+4", "4"]
    name = f"model.layers.{{}}.{kind}.weight"
    lesson = grown.plan.lesson
    assert isinstance(lesson, Lesa)
    with Checkpoint(deep) as source, Checkpoint(tmp_path / "out") as out:
        before, after = (values_of(each, each.tensors) for each in (source, out))
        matrices = [before(name.format(layer)) for layer in range(5)]
        for number, layer in ((2, 1), (5, 3)):
            seed = int(generator(0, "lesa", name.format(0)).integers(1 << 62))
            order = generator(0, "lesa", name.format(0), "order")
            expected = predicted_by_hand(matrices, layer, lesson, (seed, order))
            assert np.allclose(after(name.format(number)), expected, rtol=1e-6, atol=1e-8)
            mean = (matrices[layer] + matrices[layer + 1]) / 2
            assert np.abs(expected - mean).max() > 1e-4
        norm = "model.layers.{}.input_layernorm.weight"
        assert (after(norm.format(2)) == (before(norm.format(1)) + before(norm.format(2))) / 2).all()
        assert (after(name.format(3)) == before(name.format(2))).all()


@pytest.mark.parametrize("rank", [3, 6])
def test_the_basis_is_the_singular_value_decomposition(rank: int) -> None:
    """Of matrices that have less than full rank too."""
    draw = np.random.default_rng(0)
    shared = draw.normal(size=(6, rank))
    matrices = [shared @ draw.normal(size=(rank, 4)) for _ in range(3)]
    basis = Basis.of(iter(matrices))
    sizes = np.linalg.svd(np.concatenate(matrices, 1), compute_uv=False)
    assert np.allclose(basis.sizes[:rank], sizes[:rank])
    assert np.allclose(basis.vectors.T @ basis.vectors, np.eye(6))
    for matrix in matrices:
        assert np.allclose(basis.matrix(basis.coordinates(matrix)), matrix, atol=1e-7)


@pytest.mark.slow
def test_lesa_records_what_it_learned_and_grows_in_width_too(
    deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a gain of two on copied heads, the new layer is the predicted one, grown as the others are."""
    told: list[tuple[float, float]] = []
    how: dict[str, Any] = {"operator": "lesa", "depth": "neighbours", "rows": 16, "epochs": 20, "noise": 0.0}
    deeper = {"num_hidden_layers": 6}
    plain = grow(deep, tmp_path / "plain", target=deeper, learning=lambda *done: told.append(done), **how)
    wide = grow(deep, tmp_path / "wide", target=deeper | {"intermediate_size": 80}, **how)
    again = grow(deep, tmp_path / "again", target=deeper, **how)
    assert told[-1][0] == told[-1][1]
    learned = plain.learned
    assert learned is not None
    assert learned["matrices"] == len(learned["losses"]) == 7
    assert learned["means"] == 2
    assert learned["steps"] > 20 * 7 * 3
    assert learned["flops"] > 0
    for losses in learned["losses"].values():
        assert len(losses["epochs"]) == 20
        assert losses["learned"] < losses["neighbours"]
    record = json.loads((tmp_path / "plain" / "growth.json").read_text())
    assert record["learned"] == learned == again.learned
    assert recorded_plan(tmp_path / "plain").hash == plain.plan.hash
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == sorted(record["files"])
    load_model(tmp_path / "plain")
    with Checkpoint(tmp_path / "plain") as narrow, Checkpoint(tmp_path / "wide") as out:
        one, other = (values_of(each, each.tensors) for each in (narrow, out))
        number = next(iter(plain.plan.layers.between))
        gate, down = (f"model.layers.{number}.mlp.{part}_proj.weight" for part in ("gate", "down"))
        units = one(gate).shape[0]
        assert wide.plan.layers == plain.plan.layers
        assert (other(gate)[:units] == one(gate)).all()
        assert np.allclose(other(down)[:, :units] + other(down)[:, units:], one(down))
    asked = [f"source={deep}", "target={num_hidden_layers:6}", "growth=lesa", "receipt=false"]
    main([*asked, f"out={tmp_path / 'door'}"])
    assert "learned on the source's layers" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("target", "how", "words"),
    [
        (5, {}, "predicts new layers, and the target has the source's 5"),
        (7, {"depth": "stack"}, "which depth 'stack' has none of; use growth.depth=neighbours"),
        (10, {}, "at most 9 layers come of 5"),
        (7, {"epochs": 0}, "epochs 0: expected a whole number from 1"),
        (7, {"rows": 1.5}, "rows 1.5: expected a whole number"),
        (7, {"norm_weight": 1}, "norm_weight 1: expected a number from 0 to below 1"),
        (7, {"learning_rate": True}, "learning_rate True: expected a number above 0"),
        (7, {"start": "meen"}, "did you mean 'mean'"),
        (7, {"epoch": 3}, "did you mean 'epochs'"),
        (7, {"width": "scratch"}, "width=scratch inherits nothing"),
    ],
    ids=str,
)
def test_what_lesa_cannot_do_is_told(
    deep: Path, tmp_path: Path, target: int, how: dict[str, Any], words: str
) -> None:
    asked = {"depth": "neighbours", **how}
    with pytest.raises(UserError, match=words):
        plan(deep, {"num_hidden_layers": target}, "lesa", **asked)
    with pytest.raises(UserError, match=words):
        grow(deep, tmp_path / "out", target={"num_hidden_layers": target}, operator="lesa", **asked)
    assert not list(tmp_path.glob("out*"))


def test_two_layers_are_too_few_to_learn_from(llama: Path) -> None:
    with pytest.raises(
        UserError, match="learns from layers that stand between two others, and the source has 2"
    ):
        plan(llama, {"num_hidden_layers": 3}, "lesa", depth="neighbours")


def test_a_model_on_disk_holds_one_layer_at_a_time(llama: Path) -> None:
    with Checkpoint(llama) as source:
        model = OnDisk(source.config, values_of(source, source.tensors), source.tensors, 2)
        held: list[list[bool]] = []

        def look(*_: Any) -> None:
            held.append([all(not p.is_meta for p in layer.parameters()) for layer in model.layers])

        for layer in model.layers:
            layer.get_submodule("mlp").register_forward_pre_hook(look)
        tokens = torch.arange(12)[None]
        with torch.no_grad():
            logits = model.model(tokens, use_cache=False).logits
            whole = load_model(llama, dtype="float64").eval()(tokens).logits
    assert held == [[True, False], [False, True]]
    assert all(parameter.is_meta for parameter in model.model.parameters())
    assert torch.equal(logits, whole)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "growth.text is missing"),
        ({"text": "nowhere"}, "growth.text 'nowhere': no such file or folder"),
        ({"text": "EMPTY"}, "is empty"),
        ({"text": "SHORT"}, "tokens; give a text of at least"),
        ({"text": "BYTES"}, "is no text in UTF-8"),
        ({"text": "FOLDER"}, "holds no text file"),
        ({"text": "TEXT", "receipt_text": "TEXT"}, "is growth.text, which is learned on"),
        ({"text": "TEXT", "ridge": 0}, "ridge 0: expected a number above 0"),
        ({"text": "TEXT", "tokens": 1.5}, "tokens 1.5: expected a whole number"),
        ({"text": "TEXT", "width": "scratch"}, "width=scratch inherits nothing"),
        ({"text": "TEXT", "width": "tiel"}, "did you mean 'tile'"),
        ({"text": "TEXT", "rigde": 1}, "did you mean 'ridge'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_learned_on_is_told_before_anything_is_written(
    llama: Path, text: Path, tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    places = {"TEXT": text, **{name: tmp_path / name for name in ("EMPTY", "SHORT", "BYTES", "FOLDER")}}
    places["EMPTY"].write_text(" \n")
    places["SHORT"].write_text("the cat sat")
    places["BYTES"].write_bytes(b"\xff\xfe\xff")
    places["FOLDER"].mkdir()
    how = {key: places.get(value, value) if isinstance(value, str) else value for key, value in how.items()}
    with pytest.raises(UserError, match=words):
        grow(llama, tmp_path / "out", target={"num_hidden_layers": 4}, operator="least_squares", **how)
    assert not list(tmp_path.glob("out*"))


ON_TEXT = [name for name in LEARNED if "text" in options_of(name)]


@pytest.mark.parametrize("name", ON_TEXT)
@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([], "growth.text is missing"),
        (["growth.text=nowhere"], "growth.text 'nowhere': no such file or folder"),
        (["growth.text=EMPTY"], "is empty"),
        (["growth.text=SHORT"], "tokens; give a text of at least"),
        (["growth.text=TEXT", "receipt.text=TEXT"], "is growth.text, which is learned on"),
        (["growth.text=TEXT", "receipt.text=COPY"], "is growth.text, which is learned on"),
        (["growth.text=FOLDER", "receipt.text=TEXT"], "is growth.text, which is learned on, or a part of it"),
    ],
    ids=str,
)
def test_a_plan_tells_what_cannot_be_learned_on(
    llama: Path, text: Path, tmp_path: Path, capsys: Any, name: str, told: list[str], words: str
) -> None:
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "SHORT").write_text("the cat sat")
    shutil.copyfile(text, tmp_path / "COPY")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "one.txt").write_text("the cat sat on the mat " * 500)
    shutil.copyfile(text, tmp_path / "FOLDER" / "other.txt")
    for place in (text, *(tmp_path / name for name in ("EMPTY", "SHORT", "COPY", "FOLDER"))):
        called = "TEXT" if place == text else place.name
        told = [argument.replace(called, str(place)) for argument in told]
    with pytest.raises(SystemExit):
        main([f"source={llama}", "target={num_hidden_layers:4}", f"growth={name}", "plan_only=true", *told])
    printed = capsys.readouterr()
    assert words in printed.err
    assert not printed.out


def test_a_preset_and_python_tell_a_text_that_is_not_there(llama: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["source=phi_1_5", "target=phi_2", "growth=ligo", "growth.text=nowhere", "plan_only=true"])
    assert "growth.text 'nowhere': no such file or folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such file or folder"):
        plan(llama, {"num_hidden_layers": 4}, "least_squares", text="nowhere")


@pytest.mark.slow
def test_the_door_learns_and_tells_what_came_of_it(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"source={llama}", "target={num_hidden_layers:3}", "growth=least_squares", "receipt=false"]
    main([*asked, f"growth.text={text}", "growth.tokens=320", f"out={tmp_path / 'out'}"])
    assert "learned on 320 tokens" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / SINGLE).exists()
    with pytest.raises(SystemExit):
        main([f"source={llama}", "target={num_hidden_layers:3}", f"growth.text={text}", "plan_only=true"])
    assert "growth.text: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize("name", LEARNED)
def test_a_model_in_memory_is_refused(llama: Path, name: str) -> None:
    how: dict[str, Any] = {"depth": "stack", "text": __file__}
    source = config_of("llama")
    if name == "lesa":
        how, source = {"depth": "neighbours"}, config_of("llama", num_hidden_layers=3)
    target = {"num_hidden_layers": 4}
    with pytest.raises(UserError, match="learns in a folder"):
        grow_model(build_model(source, seed=0), target, name, **how)
    assert not plan(source, target, name, **how).certificate.lossless
