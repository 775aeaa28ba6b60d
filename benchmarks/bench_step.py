"""A training step of a small Phi, with this project's optimizer step and activation and the libraries' own.

python benchmarks/bench_step.py             a minute of CPU time: a table, and a record beside this file
python benchmarks/bench_step.py --steps 3    a quick look

Hidden size 32, 8 layers, context 128, vocabulary 320, batches of 4,096 tokens of no meaning, one thread. All
contenders start from the same weights and take one step in turn on the same tokens, so that a machine that
others use slows them all. Times are CPU seconds of this process; of the steps the first does not count, and
rates are medians of the others. The machine's own rate of matrix products stands beside them.

Then the forward and backward passes of two seeds of that network, and of one twice as wide: one network after
the other, and both as one batched network by torch.func. Last, causal attention of as many tokens in float32
and in bfloat16 by PyTorch's kernel, and in bfloat16 by products of matrices.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from outgrow.model.base.machine import machine
from outgrow.model.build import build_model
from outgrow.train.loss import NextTokenLoss
from outgrow.train.machine.attention import fast_mixed_attention, in_blocks
from outgrow.train.machine.compile import TanhGELU, fuse_activations, layers_of
from outgrow.train.optimizer import Joined, adamw, build_optimizer, parameter_groups
from outgrow.train.settings import OptimizerSettings

HERE = Path(__file__).resolve().parent
WINDOWS, CONTEXT, VOCABULARY = 32, 128, 320
HEADS = 4  # of the attention that is timed alone


def phi(width: int) -> dict[str, Any]:
    """The config of eight layers of `width`, in heads of 16."""
    heads = width // 16
    return {
        "model_type": "phi",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 8,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }


def settings_of(name: str) -> OptimizerSettings:
    """Muon's or AdamW's settings, as the studies have them."""
    momentum = 0.95 if name == "muon" else None
    return OptimizerSettings(name, 2.4e-2, (0.9, 0.95), 1e-8, 0.1, momentum)  # type: ignore[arg-type]


def own_optimizer(network: nn.Module, name: str) -> torch.optim.Optimizer:
    """The optimizer that a run has."""
    return build_optimizer(network, settings_of(name))


def library_optimizer(network: nn.Module, name: str) -> torch.optim.Optimizer:
    """PyTorch's Muon, one matrix at a time, beside the same AdamW."""
    if name != "muon":
        return own_optimizer(network, name)
    settings = settings_of(name)
    hidden, *rest = parameter_groups(network, settings.weight_decay)
    muon = torch.optim.Muon(
        [hidden], lr=settings.learning_rate, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return Joined([muon, adamw(rest, settings)])


@contextmanager
def mixed_precision() -> Iterator[None]:
    """A forward pass as in a run with train.precision=bf16 on a CPU."""
    with fast_mixed_attention(), torch.autocast("cpu", torch.bfloat16):
        yield


class Contender:
    """A network with its optimizer, and the CPU seconds of its steps.

    Args:
        activation: "own", "kernel" (PyTorch's fused one) or "chain" (the library's elementwise kernels).
        micro_batch: windows of a forward pass.
        width: hidden size, in heads of 16.
        compiled: layer by layer, as train.compile=true does.
        mixed: multiply in bfloat16, as train.precision=bf16 does.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[nn.Module, str], torch.optim.Optimizer] = own_optimizer,
        *,
        activation: str = "own",
        micro_batch: int = WINDOWS,
        width: int = 32,
        compiled: bool = False,
        mixed: bool = False,
    ) -> None:
        network = build_model(phi(width), seed=0).train()
        if activation != "chain":
            fuse_activations(network)
        if activation == "kernel":
            for layer in network.model.layers:
                assert isinstance(layer.mlp.activation_fn, TanhGELU)
                layer.mlp.activation_fn = nn.GELU(approximate="tanh")
        if compiled:
            for layer in layers_of(network):
                layer.compile()
        self.parameters = list(network.parameters())
        self.objective = NextTokenLoss(network, fused=True)
        self.optimizer = build(network, name)
        self.micro_batch = micro_batch
        self.mixed = mixed
        self.seconds: list[float] = []
        self.update_seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, windows: torch.Tensor) -> None:
        """Train on `windows`, (rows, context + 1), a micro-batch at a time."""
        begin = time.process_time()
        total = 0.0
        for piece in windows.split(self.micro_batch):
            with mixed_precision() if self.mixed else nullcontext():
                loss = self.objective(piece, reduction="sum") / (WINDOWS * CONTEXT)
            loss.backward()
            total += loss.item()
        middle = time.process_time()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.process_time()
        self.seconds.append(end - begin)
        self.update_seconds.append(end - middle)
        self.losses.append(total)

    def result(self) -> dict[str, Any]:
        """Its rate, the milliseconds of clipping and the optimizer, and its losses."""
        step = statistics.median(self.seconds[1:])
        update = statistics.median(self.update_seconds[1:])
        tokens = WINDOWS * CONTEXT
        return {"tokens_per_second": tokens / step, "update_ms": update * 1e3, "losses": self.losses}


def contenders() -> dict[str, Contender]:
    """Name → contender: the first of each optimizer is what the others are held against."""
    every: dict[str, Contender] = {}
    for name in ("muon", "adamw"):
        every[f"{name}, library's activation"] = Contender(name, library_optimizer, activation="chain")
        every[f"{name}, PyTorch's GELU"] = Contender(name, library_optimizer, activation="kernel")
        every[f"{name}, ours"] = Contender(name)
    for windows in (16, 8, 4):
        every[f"muon, ours, {windows * CONTEXT} tokens at a time"] = Contender("muon", micro_batch=windows)
    return every


class TwoSeeds:
    """Two networks that differ in their seed, one after the other or as one batched network, with PyTorch's
    GELU, since torch.func knows no rule for ours; they do not learn.
    """

    def __init__(self, width: int) -> None:
        networks = [build_model(phi(width), seed=seed).train() for seed in (0, 1)]
        for network in networks:
            for layer in network.model.layers:
                layer.mlp.activation_fn = nn.GELU(approximate="tanh")
        self.networks = networks
        self.stacked = stack_module_state(networks)
        self.frame = copy.deepcopy(networks[0]).to("meta")
        self.seconds: dict[str, list[float]] = {"in turn": [], "as one": []}

    def in_turn(self, windows: Tensor) -> list[dict[str, Tensor]]:
        """The gradients of each network on its own windows, (network, row, context + 1)."""
        found = []
        for network, own in zip(self.networks, windows, strict=True):
            logits = network(own[:, :-1], use_cache=False).logits
            mean_loss(logits, own).backward()
            found.append({name: part.grad for name, part in network.named_parameters()})
            network.zero_grad()
        return found

    def as_one(self, windows: Tensor) -> dict[str, Tensor]:
        """The same gradients, stacked."""
        return vmap(grad(self.loss))(*self.stacked, windows)

    def loss(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], windows: Tensor) -> Tensor:
        """The mean loss of the network with these parameters."""
        inputs, keywords = (windows[:, :-1],), {"use_cache": False}
        logits = functional_call(self.frame, (parameters, buffers), inputs, keywords).logits
        return mean_loss(logits, windows)

    def step(self, windows: Tensor) -> None:
        """Time both ways on the same windows."""
        for name, way in (("in turn", self.in_turn), ("as one", self.as_one)):
            begin = time.process_time()
            way(windows)
            self.seconds[name].append(time.process_time() - begin)

    def result(self) -> dict[str, float]:
        """The median milliseconds of each way."""
        return {name: statistics.median(taken[1:]) * 1e3 for name, taken in self.seconds.items()}


def mean_loss(logits: Tensor, windows: Tensor) -> Tensor:
    """The mean loss of a next token, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def two_seeds(steps: int) -> dict[str, dict[str, float]]:
    """Hidden size → the milliseconds of both ways."""
    found = {}
    draw = torch.Generator().manual_seed(0)
    for width in (32, 64):
        pair = TwoSeeds(width)
        for _ in range(steps):
            pair.step(torch.randint(VOCABULARY, (2, WINDOWS, CONTEXT + 1), generator=draw))
        found[str(width)] = pair.result()
    return found


def attention_times(steps: int) -> dict[str, dict[str, float]]:
    """Way → the milliseconds of causal attention forward and backward, of WINDOWS of CONTEXT tokens in HEADS
    of 16.
    """

    def kernel(*operands: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*operands, is_causal=True)

    ways = {
        "PyTorch's kernel, float32": (kernel, torch.float32),
        "PyTorch's kernel, bfloat16": (kernel, torch.bfloat16),
        "products, compiled, bfloat16": (torch.compile(in_blocks), torch.bfloat16),
    }
    found = {}
    for name, (attend, dtype) in ways.items():
        # as projections hand them over: the heads of a token side by side
        shape = (WINDOWS, CONTEXT, HEADS, 16)
        leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
        forward, backward = [], []
        for _ in range(steps):
            begin = time.process_time()
            result = attend(*(leaf.transpose(1, 2) for leaf in leaves))
            middle = time.process_time()
            torch.autograd.grad(result, leaves, result.detach())
            forward.append(middle - begin)
            backward.append(time.process_time() - middle)
        times = {"forward": forward, "backward": backward}
        found[name] = {part: statistics.median(taken[1:]) * 1e3 for part, taken in times.items()}
    return found


def matrix_products() -> float:
    """FLOP/s of a product of two matrices of 1,024 × 1,024."""
    side = 1024
    one, other = torch.randn(side, side), torch.randn(side, side)
    taken = []
    for _ in range(4):
        begin = time.process_time()
        one @ other
        taken.append(time.process_time() - begin)
    return 2 * side**3 / min(taken)


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rates = {name: row["tokens_per_second"] for name, row in result["contenders"].items()}
    lines = [
        f"{result['machine']}, 1 thread, medians of {result['steps']} steps; a product of matrices runs at "
        f"{result['matrix_flops'] / 1e9:.0f} GFLOP/s",
        "",
        "| | tokens per CPU second | | clipping and optimizer, ms |",
        "|---|---:|---:|---:|",
    ]
    for name, row in result["contenders"].items():
        optimizer = name.split(",")[0]
        first = next(rate for other, rate in rates.items() if other.startswith(optimizer))
        ratio = rates[name] / first
        lines.append(f"| {name} | {rates[name]:,.0f} | {ratio:.2f} × | {row['update_ms']:.1f} |")
    lines += [
        "",
        "| two seeds, hidden size | in turn, ms | as one network, ms | in turn takes |",
        "|---:|---:|---:|---:|",
    ]
    for width, taken in result["two_seeds"].items():
        apart, together = taken["in turn"], taken["as one"]
        lines.append(f"| {width} | {apart:.0f} | {together:.0f} | {apart / together:.2f} × |")
    lines += ["", f"| causal attention, {HEADS} heads | forward, ms | backward, ms |", "|---|---:|---:|"]
    for name, taken in result["attention"].items():
        lines.append(f"| {name} | {taken['forward']:.1f} | {taken['backward']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10, help="of each contender, the first uncounted")
    parser.add_argument("--out", type=Path, default=HERE / "bench_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = contenders()
    draw = torch.Generator().manual_seed(0)
    for number in range(options.steps):
        windows = torch.randint(VOCABULARY, (WINDOWS, CONTEXT + 1), generator=draw)
        for contender in every.values():
            contender.step(windows)
        print(f"step {number + 1} of {options.steps}", flush=True)
    result = {
        "machine": machine(),
        "torch": torch.__version__,
        "steps": options.steps - 1,
        "matrix_flops": matrix_products(),
        "two_seeds": two_seeds(options.steps),
        "attention": attention_times(options.steps),
        "contenders": {name: contender.result() for name, contender in every.items()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))


if __name__ == "__main__":
    main()
