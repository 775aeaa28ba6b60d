"""What a machine trains in a second: one-thread runs of a small Phi side by side, one a core, with the
library's step and with this project's.

python benchmarks/bench_pairs.py              six minutes on two cores: a table, a record beside this file
python benchmarks/bench_pairs.py --rounds 1   a quick look

The network is that of bench_step.py, and the same one of hidden size 64. `library` is its chain of
elementwise kernels and PyTorch's Muon; `ours` is what a run does on a CPU, its allocator told to keep freed
memory; `ours, compiled` is the same with train.compile=true, and `ours, compiled, bf16` with
train.precision=bf16 too; `products alone` are the library's matrix products and attention kernels of a step
in float32 with nothing between them, which no arrangement of the rest can beat in float32.
Every form runs in processes of its own, as many at a time as there are cores, each of one thread on its own
core; they begin together once all have warmed up, which takes the compiler's time out. The forms take turns
in every round. Rates are wall-clock, summed over the processes; ratios are taken round by round, and told by
their medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_step import CONTEXT, VOCABULARY, WINDOWS, Contender, library_optimizer, matrix_products, phi
from torch import Tensor

from outgrow.model.base.machine import machine
from outgrow.train.machine.allocator import keep_freed_memory

HERE = Path(__file__).resolve().parent
PRODUCTS = "products alone"
COMPILED, MIXED = "ours, compiled", "ours, compiled, bf16"
FORMS = ("library", "ours", COMPILED, MIXED, PRODUCTS)
WIDTHS = (32, 64)
WARM = 4  # steps before the clock starts
PATIENCE_SECONDS = 600


class Product:
    """A linear layer's three products of matrices, on buffers of its own.

    Shapes: inputs (token, in), outputs (token, out), weight (out, in).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        tokens = WINDOWS * CONTEXT
        self.inputs, self.outputs = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
        self.weight = torch.randn(outputs, inputs)
        self.inputs_gradient, self.weight_gradient = map(torch.empty_like, (self.inputs, self.weight))

    def forward(self) -> None:
        torch.mm(self.inputs, self.weight.t(), out=self.outputs)

    def backward(self) -> None:
        """The outputs stand for their gradient."""
        torch.mm(self.outputs, self.weight, out=self.inputs_gradient)
        torch.mm(self.outputs.t(), self.inputs, out=self.weight_gradient)


class Attention:
    """The kernel that the library's attention ends in on a CPU, forward and backward.

    Shapes: queries, keys and values (window, head, token, entry).
    """

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def __init__(self, width: int, heads: int) -> None:
        shape = (WINDOWS, heads, CONTEXT, width // heads)
        self.queries, self.keys, self.values = (torch.randn(shape) for _ in range(3))
        self.saved: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def forward(self) -> None:
        self.saved = self.kernel(self.queries, self.keys, self.values, 0.0, True)

    def backward(self) -> None:
        """The result stands for its gradient."""
        result, log_sums = self.saved
        inputs = (self.queries, self.keys, self.values)
        self.kernel_backward(result, *inputs, result, log_sums, 0.0, True)


class ProductsAlone:
    """What of a step is matrix products and attention, with nothing between them; it trains nothing."""

    def __init__(self, width: int) -> None:
        config = phi(width)
        hidden = config["intermediate_size"]
        self.losses: list[float] = []
        self.parts: list[Product | Attention] = []
        for _ in range(config["num_hidden_layers"]):
            self.parts += [Product(width, width) for _ in range(4)]  # queries, keys, values, output
            self.parts += [Attention(width, config["num_attention_heads"])]
            self.parts += [Product(width, hidden), Product(hidden, width)]
        self.parts.append(Product(width, VOCABULARY))

    @torch.no_grad()
    def step(self, windows: Tensor) -> None:
        """One step's products, for as many tokens as `windows`, (rows, context + 1), has."""
        assert windows.shape == (WINDOWS, CONTEXT + 1)
        for part in self.parts:
            part.forward()
        for part in reversed(self.parts):
            part.backward()


def contender(form: str, width: int) -> Contender | ProductsAlone:
    """Muon in one of FORMS, or the products; the allocator's setting is the whole process's."""
    if form == "library":
        return Contender("muon", library_optimizer, activation="chain", width=width)
    keep_freed_memory()
    if form == PRODUCTS:
        return ProductsAlone(width)
    return Contender("muon", width=width, compiled=form in (COMPILED, MIXED), mixed=form == MIXED)


def alone(form: str, width: int, steps: int) -> None:
    """One process: warm up, say so, wait for a line, take the steps, and write their rate and losses."""
    torch.set_num_threads(1)
    own = contender(form, width)
    draw = torch.Generator().manual_seed(0)

    def step() -> None:
        own.step(torch.randint(VOCABULARY, (WINDOWS, CONTEXT + 1), generator=draw))

    for _ in range(WARM):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    taken = time.perf_counter() - begin
    rate = steps * WINDOWS * CONTEXT / taken
    print(json.dumps({"tokens_per_second": rate, "losses": own.losses}), flush=True)


def together(form: str, width: int, steps: int, cores: list[int]) -> dict[str, Any]:
    """A process on each of `cores`, at the same time: the sum of their rates, and the losses of one."""
    command = [sys.executable, __file__, "--alone", form, "--width", str(width), "--steps", str(steps)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(["taskset", "-c", str(core), *command], **pipes) for core in cores]
    try:
        for process in processes:
            assert process.stdout.readline().strip() == "ready"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [json.loads(process.stdout.readline()) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(PATIENCE_SECONDS)
    total = sum(result["tokens_per_second"] for result in results)
    return {"tokens_per_second": total, "losses": results[0]["losses"]}


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    runs = f"{result['processes']} processes of 1 thread"
    medians = f"medians of {result['rounds']} rounds of {result['steps']} steps"
    product = f"a product of matrices runs at {result['matrix_flops'] / 1e9:.0f} GFLOP/s"
    lines = [
        f"{result['machine']}, {runs}, {medians}; {product}",
        "",
        "| hidden size | | tokens/s of the machine | |",
        "|---:|---|---:|---:|",
    ]
    for width, forms in result["widths"].items():
        first = forms[FORMS[0]]["tokens_per_second"]
        for form in FORMS:
            rates = forms[form]["tokens_per_second"]
            ratio = statistics.median(own / base for own, base in zip(rates, first, strict=True))
            lines.append(f"| {width} | {form} | {statistics.median(rates):,.0f} | {ratio:.2f} × |")
    return "\n".join(lines)


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Every form of every width in every round."""
    cores = sorted(os.sched_getaffinity(0))
    widths: dict[str, Any] = {
        str(width): {form: {"tokens_per_second": [], "losses": []} for form in FORMS} for width in WIDTHS
    }
    for number in range(rounds):
        for width in WIDTHS:
            for form in FORMS:
                found = together(form, width, steps, cores)
                row = widths[str(width)][form]
                row["tokens_per_second"].append(found["tokens_per_second"])
                row["losses"] = found["losses"]
                print(f"round {number + 1} of {rounds}: {width}, {form}", flush=True)
    torch.set_num_threads(1)
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "processes": len(cores),
        "rounds": rounds,
        "steps": steps,
        "matrix_flops": matrix_products(),
        "widths": widths,
    }


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="of each process, after the warm-up")
    parser.add_argument("--out", type=Path, default=HERE / "bench_pairs.json")
    parser.add_argument("--alone", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=WIDTHS[0], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        alone(options.alone, options.width, options.steps)
        return
    result = measure(options.rounds, options.steps)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))


if __name__ == "__main__":
    main()
