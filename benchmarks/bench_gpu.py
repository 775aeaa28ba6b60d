"""Measure what a GPU reaches: tokens/s, model-FLOPs utilisation and peak memory of a training step, for every
way to make it.

make bench-gpu                                          about half an hour on one H100: a table, and
                                                        benchmarks/bench_gpu.json
python benchmarks/bench_gpu.py --attention sdpa --compile true --checkpointing false --loss fused     one way
python benchmarks/bench_gpu.py --toy                    the same on any machine, at toy size: proves the
                                                        script, measures nothing

The network is Phi-2, or as many of its layers as the device holds with AdamW in float32; it trains on random
tokens in bf16, so nothing is downloaded. Every way runs in a process of its own, with the most windows a step
that `train.forecast` finds room for (powers of two). MFU counts the model's FLOPs (train.forecast's), not
what checkpointing computes again, over the device's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outgrow.model.base.errors import UserError
from outgrow.model.build import attention_backend, build_model
from outgrow.model.geometry import flops_per_token, parameter_count
from outgrow.model.presets import preset
from outgrow.train.compose import compose
from outgrow.train.data.shards import Tokens, TokenSplit
from outgrow.train.loss import build_loss
from outgrow.train.machine.compile import speed_up
from outgrow.train.machine.device import device_name, peak_flops, session
from outgrow.train.machine.forecast import GIB, forecast
from outgrow.train.optimizer import build_optimizer
from outgrow.train.settings import Settings
from outgrow.train.start.way import fuses
from outgrow.train.step import Step

HERE = Path(__file__).resolve().parent
LAYERS = (32, 24, 16, 12, 8, 4, 2, 1)  # of Phi-2; the first that fits is taken
ROOM = 0.92  # of the device's memory that a forecast may fill
WARM, COUNTED = 4, 8  # steps
LIMIT_S = 900  # for one way


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to make a step."""

    attention: str
    compile: bool
    checkpointing: bool
    loss: str


def ways(options: argparse.Namespace) -> tuple[list[Way], list[str]]:
    """Every way that is asked for and runs here, and why the others do not."""
    runs, reasons = [], []
    for attention in options.attention:
        try:
            runs.append(attention_backend(attention)[0])
        except UserError as error:
            reasons.append(str(error))
    truth = {"true": True, "false": False}
    grid = itertools.product(runs, options.compile, options.checkpointing, options.loss)
    return [Way(attention, truth[c], truth[k], loss) for attention, c, k, loss in grid], reasons


def settings_of(config: dict[str, Any], way: Way, rows: int, context: int) -> Settings:
    """A run of this way, `rows` windows a step."""
    whole = compose(["growth=scratch", "target=phi_2", "logger=none", "forecast.gpus=1"])
    loop = dataclasses.replace(
        whole.train, context=context, batch_tokens=rows * context,
        budget_tokens=rows * context * (WARM + COUNTED), precision="bf16",
        **dataclasses.asdict(way),
    )  # fmt: skip
    return dataclasses.replace(whole, target=config, train=loop)


def fitting(config: dict[str, Any], way: Way, context: int, room: float) -> int:
    """The most windows a step, a power of two, whose forecast fits `room` bytes; 0 where not even one
    does."""
    rows = 0
    while (next_rows := max(1, 2 * rows)) <= 64 and forecast(
        settings_of(config, way, next_rows, context)
    ).memory.total < ROOM * room:
        rows = next_rows
    return rows


def shape(room: float, context: int, toy: bool) -> dict[str, Any]:
    """Phi-2, or its first layers: the most that trains in `room` bytes with checkpointing and the fused
    loss."""
    if toy:
        return preset("tiny_target")
    least = Way("sdpa", compile=False, checkpointing=True, loss="fused")
    for layers in LAYERS:
        config = preset("phi_2") | {"num_hidden_layers": layers}
        if fitting(config, least, context, room):
            return config
    raise SystemExit(f"not even one layer of Phi-2 trains in {room / GIB:.0f} GiB")


def measure(config: dict[str, Any], way: Way, rows: int, context: int) -> dict[str, Any]:
    """Train a few steps this way, in this process."""
    settings = settings_of(config, way, rows, context)
    tokens = np.random.default_rng(0).integers(
        0, config["vocab_size"], rows * context * (WARM + COUNTED) + 1, dtype=np.int64
    )
    split = TokenSplit("train", Tokens([tokens]), 1, len(tokens))
    with session("bf16") as accelerator:
        cuda = accelerator.device.type == "cuda"
        with accelerator.device:
            network = build_model(config, seed=0, attention=way.attention).train()
        speed_up(network, settings.train)
        optimizer = build_optimizer(network, settings.optimizer)
        model, optimizer = accelerator.prepare(
            build_loss(network, settings.train, 0, fused=fuses(config, settings.train.loss)), optimizer
        )
        step, taken, loss = Step(model, optimizer, accelerator, split, settings), [], 0.0
        for i in range(WARM + COUNTED):
            start = time.perf_counter()
            loss = step(i)[0]
            taken.append(time.perf_counter() - start)
        speed = rows * context / statistics.median(taken[WARM:])
        peak = peak_flops(device_name(accelerator.device), "bf16")
        return {
            "rows": rows,
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed * flops_per_token(config, context) / peak,
            "peak_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
            "last_loss": loss,
            "seconds": taken,
        }


def in_a_process(config: dict[str, Any], way: Way, rows: int, context: int) -> dict[str, Any]:
    """`measure` in a child, so that no way inherits another's memory or compiled code; what fails there is
    told in the result."""
    order = json.dumps({"config": config, "way": dataclasses.asdict(way), "rows": rows, "context": context})
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", order], capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return {"rows": rows, "failed": f"took longer than {LIMIT_S} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return {"rows": rows, "failed": "out of memory" if "out of memory" in done.stderr else last[:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    lines = [
        (
            f"{result['device']}, {result['parameters']:,} parameters ({result['layers']} layers), context "
            f"{result['context']}, bf16, AdamW\n"
        ),
        (
            "| attention | compile | checkpointing | loss | windows | tokens/s | MFU | peak GiB "
            "|\n|---|---|---|---|---:|---:|---:|---:|"
        ),
    ]
    for row in result["ways"]:
        names = (
            f"| {row['attention']} | {row['compile']} | {row['checkpointing']} | {row['loss']} | "
            f"{row['rows']} |"
        )
        if "failed" in row:
            lines.append(f"{names} {row['failed']} | | |")
        else:
            mfu, peak = (
                "–" if row[key] is None else text.format(row[key])
                for key, text in (("mfu", "{:.1%}"), ("peak_gib", "{:.1f}"))
            )
            lines.append(f"{names} {row['tokens_per_second']:,.0f} | {mfu} | {peak} |")
    return "\n".join([*lines, *(f"\nnot run: {reason}" for reason in result["not_run"])])


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Every way, one after the other."""
    gpu = torch.cuda.is_available()
    if not gpu and not options.toy:
        raise SystemExit("no CUDA GPU here; --toy runs the same at toy size on this machine")
    device = torch.device("cuda" if gpu else "cpu")
    room = torch.cuda.get_device_properties(device).total_memory if gpu else 4 * GIB
    context = 32 if options.toy else options.context
    config, (asked, reasons) = shape(room, context, options.toy), ways(options)
    rows = []
    for way in asked:
        count = 2 if options.toy else fitting(config, way, context, room)
        found = in_a_process(config, way, count, context) if count else {"rows": 0, "failed": "does not fit"}
        rows.append({**dataclasses.asdict(way), **found})
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "seconds"}), flush=True)
    return {
        "device": device_name(device),
        "versions": {"torch": torch.__version__},
        "parameters": parameter_count(config),
        "layers": config["num_hidden_layers"],
        "context": context,
        "ways": rows,
        "not_run": reasons,
    }


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ["sdpa", "flash_attention_2", "flex_attention", "eager"]
    parser.add_argument("--attention", nargs="+", choices=known, default=["sdpa", "flash_attention_2"])
    parser.add_argument("--compile", nargs="+", choices=["true", "false"], default=["false", "true"])
    parser.add_argument("--checkpointing", nargs="+", choices=["true", "false"], default=["false", "true"])
    parser.add_argument("--loss", nargs="+", choices=["plain", "fused"], default=["plain", "fused"])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--toy", action="store_true", help="a tiny network on whatever device there is")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: benchmarks/bench_gpu.json; with --toy nothing is written unless this is given",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        order = json.loads(options.one)
        print(json.dumps(measure(order["config"], Way(**order["way"]), order["rows"], order["context"])))
        return
    result = bench(options)
    if options.out or not options.toy:
        (options.out or HERE / "bench_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))


if __name__ == "__main__":
    main()
