"""One run's speed beside a bare PyTorch loop, nanoGPT's and transformers.Trainer, on the same network, in
interleaved rounds.

make bench-train                                     about 6 minutes: a table, and benchmarks/bench_train.json
python benchmarks/bench_train.py --rounds 1 --steps 6   a quick look

`ours` is `outgrow.train.loop.train` as a user calls it: reading batches from disk, logging every 5 steps, and
a validation half-way; `ours, compiled, bf16` is the same with train.compile=true and train.precision=bf16.
`bare` has its batches in memory and does nothing but forward, backward, clip and step, with the same loss and
the same validation, and prints nothing: the limit. `bare, library's loss` is the same with the loss that the
model itself computes. `nanoGPT's loop` draws its own windows from a memory-mapped file, holds the logits of a
whole batch, and validates half-way. `Trainer` logs every 5 steps and validates nothing. All but nanoGPT's
train on the same batches. Of every round the first steps warm up and do not count. Times are wall seconds and
CPU seconds of the process; a machine that others use disturbs the second less. Ratios are medians over the
rounds. The FLOP/s of a product of two large matrices stand beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import matrix_products
from torch.nn import functional

from outgrow.model.base.machine import machine
from outgrow.model.build import build_model
from outgrow.model.geometry import flops_per_token
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.corpus import prepare
from outgrow.train.data import TokenData
from outgrow.train.data.batches import batch, validation_batches
from outgrow.train.loss import NextTokenLoss
from outgrow.train.optimizer import build_optimizer, set_learning_rate
from outgrow.train.schedule import factor
from outgrow.train.settings import Settings
from outgrow.train.start.source import target_config
from outgrow.train.step import Step

HERE = Path(__file__).resolve().parent
WARM = 2  # steps that do not count
LOG_EVERY = 5


@dataclass(frozen=True)
class Timed:
    """Times of the counted steps of one round, and the loss of the last of them."""

    wall: float
    cpu: float
    loss: float


class Clock:
    """Marks the start of every step; the counted ones are those after the warm-up, to the end."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def timed(self, loss: float) -> Timed:
        """The span from the first counted step's start to the last mark."""
        (wall, cpu), (end, spent) = self.marks[WARM], self.marks[-1]
        return Timed(end - wall, spent - cpu, loss)


@dataclass(frozen=True)
class Work:
    """The work that every contender trains on."""

    settings: Settings
    data: TokenData
    steps: int
    windows: list[torch.Tensor]  # one (rows, context + 1) per step
    rates: list[float]

    @property
    def network(self) -> Any:
        return build_model(target_config(self.settings, None), seed=self.settings.seed)

    @property
    def validation(self) -> list[torch.Tensor]:
        settings = self.settings.train
        found = validation_batches(
            self.data.validation, context=settings.context, tokens=settings.eval_tokens
        )
        return [torch.from_numpy(windows) for windows in found]


def ours(work: Work, folder: Path) -> Timed:
    """`outgrow.train.loop.train`; the clock is told of each step's start, and of the end of the loop by what
    follows it."""
    clock, step, publish = Clock(), Step.__call__, loop.publish

    def marked(self: Step, i: int) -> Any:
        clock.mark()
        return step(self, i)

    def ended(*arguments: Any) -> Any:
        clock.mark()
        return publish(*arguments)

    Step.__call__, loop.publish = marked, ended  # type: ignore[method-assign]
    try:
        loop.train(dataclasses.replace(work.settings, out=str(folder)))
    finally:
        Step.__call__, loop.publish = step, publish  # type: ignore[method-assign]
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    return clock.timed(last["val_loss"])


def ours_in_bfloat16(work: Work, folder: Path) -> Timed:
    """The same with compiled layers, in mixed precision."""
    train = dataclasses.replace(work.settings.train, compile=True, precision="bf16")
    settings = dataclasses.replace(work.settings, train=train)
    return ours(dataclasses.replace(work, settings=settings), folder)


def bare(work: Work, _: Path, *, fused: bool = True) -> Timed:
    """Nothing but the steps."""
    network, clock = work.network.train(), Clock()
    model, optimizer = NextTokenLoss(network, fused=fused), build_optimizer(network, work.settings.optimizer)
    parameters, validation = list(network.parameters()), work.validation

    def loss_of(windows: torch.Tensor) -> torch.Tensor:
        return model(windows) if fused else network(input_ids=windows, labels=windows, use_cache=False).loss

    @torch.no_grad()
    def validated() -> float:
        network.eval()
        total = sum(model(windows, "sum").item() for windows in validation)
        network.train()
        return total / sum(windows[:, 1:].numel() for windows in validation)

    for i, windows in enumerate(work.windows):
        clock.mark()
        set_learning_rate(optimizer, work.rates[i])
        loss_of(windows).backward()
        torch.nn.utils.clip_grad_norm_(parameters, work.settings.train.gradient_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if i + 1 == work.steps // 2:
            validated()
    last = validated()
    clock.mark()
    return clock.timed(last)


def nanogpt(work: Work, folder: Path) -> Timed:
    """nanoGPT's loop (github.com/karpathy/nanoGPT, train.py), written by hand around the same network."""
    network, clock, settings = work.network.train(), Clock(), work.settings
    rows, context = len(work.windows[0]), settings.train.context
    folder.mkdir(parents=True)
    path = folder / "train.bin"
    torch.cat(work.windows).flatten().numpy().astype(np.uint16).tofile(path)
    draw = torch.Generator().manual_seed(settings.seed)

    def drawn() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - context, (rows,), generator=draw).tolist()
        pieces = [torch.from_numpy(tokens[at : at + context + 1].astype(np.int64)) for at in starts]
        windows = torch.stack(pieces)
        return windows[:, :-1], windows[:, 1:]

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = network(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def validated() -> float:
        network.eval()
        losses = [loss_of(windows[:, :-1], windows[:, 1:]).item() for windows in work.validation]
        network.train()
        return statistics.mean(losses)

    matrices = [weight for weight in network.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in network.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    batch_now = drawn()
    for i, rate in enumerate(work.rates):
        clock.mark()
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(*batch_now)
        batch_now = drawn()  # as it does, while a GPU would compute
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if i % LOG_EVERY == 0:
            loss.item()
        if i + 1 == work.steps // 2:
            validated()
    last = validated()
    clock.mark()
    return clock.timed(last)


def bare_plain(work: Work, folder: Path) -> Timed:
    """The same with the library's own loss."""
    return bare(work, folder, fused=False)


def trainer(work: Work, folder: Path) -> Timed:
    """transformers.Trainer with the same optimizer and rates; its loss is the library's."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock, network = Clock(), work.network
    optimizer = build_optimizer(network, work.settings.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: work.rates[min(i, work.steps - 1)] / work.settings.optimizer.learning_rate
    )

    class Marks(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.mark()

    rows = [{"input_ids": row, "labels": row} for windows in work.windows for row in windows]
    arguments = TrainingArguments(
        str(folder), max_steps=work.steps, per_device_train_batch_size=len(work.windows[0]),
        max_grad_norm=1.0, logging_steps=LOG_EVERY,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    run = Trainer(
        network, arguments, train_dataset=rows, optimizers=(optimizer, schedule), callbacks=[Marks()]
    )  # type: ignore[arg-type]
    result = run.train()
    clock.mark()
    return clock.timed(result.training_loss)


CONTENDERS: dict[str, Callable[[Work, Path], Timed]] = {
    "ours": ours, "ours, compiled, bf16": ours_in_bfloat16, "bare": bare, "bare, library's loss": bare_plain,
    "nanoGPT's loop": nanogpt, "Trainer": trainer,
}  # fmt: skip


def work_of(folder: Path, steps: int) -> Work:
    """The tiny target from scratch, on the standard library's text."""
    tokens = 4096
    settings = compose([
        "growth=scratch", "target=tiny_target", "logger=none", "progress=false", "data=stdlib",
        f"data.folder={folder / 'tokens'}",
        f"train.batch_tokens={tokens}", f"train.budget_tokens={tokens * steps}",
        f"train.log_every_tokens={tokens * LOG_EVERY}",
        f"train.eval_every_tokens={tokens * (steps // 2)}",
        "train.eval_tokens=8192", "train.save_every_tokens=null",
    ])  # fmt: skip
    data = prepare(settings.data, progress=False)
    rows, context = tokens // settings.train.context, settings.train.context
    windows = [
        torch.from_numpy(batch(data.train, seed=settings.seed, step=i, batch_size=rows, context=context))
        for i in range(steps)
    ]
    rates = [
        factor(settings.schedule, (i + 0.5) / steps, from_scratch=True) * settings.optimizer.learning_rate
        for i in range(steps)
    ]
    return Work(settings, data, steps, windows, rates)


def loading(work: Work) -> float:
    """Tokens a second of `batch` alone, the median of single steps that no step has read before."""
    settings, taken = work.settings.train, []
    rows = settings.batch_tokens // settings.context
    for i in range(1000, 1200):
        start = time.process_time()
        torch.from_numpy(
            batch(work.data.train, seed=work.settings.seed, step=i, batch_size=rows, context=settings.context)
        )
        taken.append(time.process_time() - start)
    return settings.batch_tokens / statistics.median(taken)


def rounds(work: Work, folder: Path, count: int) -> dict[str, list[Timed]]:
    """Every contender once a round, in an order that turns, so that a machine that slows down slows them
    all."""
    taken: dict[str, list[Timed]] = {name: [] for name in CONTENDERS}
    for number in range(count + 1):  # the first round warms up and does not count
        names = list(CONTENDERS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            out = folder / "run"
            shutil.rmtree(out, ignore_errors=True)
            found = CONTENDERS[name](work, out)
            if number:
                taken[name].append(found)
            print(
                f"round {number}: {name} {found.wall:.2f} s, {found.cpu:.2f} s of CPU, loss {found.loss:.5f}",
                flush=True,
            )
    return taken


def ratio(mine: Sequence[Timed], other: Sequence[Timed], kind: str) -> float:
    """The number of times as fast as `other`: the median of the rounds' ratios."""
    return statistics.median(getattr(o, kind) / getattr(m, kind) for m, o in zip(mine, other, strict=True))


def summary(work: Work, taken: dict[str, list[Timed]], threads: int) -> dict[str, Any]:
    tokens = (work.steps - WARM) * work.settings.train.batch_tokens
    speed = {
        name: {kind: tokens / statistics.median(getattr(t, kind) for t in found) for kind in ("wall", "cpu")}
        for name, found in taken.items()
    }
    alone = loading(work)
    per_token = flops_per_token(target_config(work.settings, None), work.settings.train.context)
    return {
        "machine": machine(),
        "threads": threads,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rounds": len(taken["ours"]),
        "counted_steps": work.steps - WARM,
        "tokens_per_second": speed,
        "ours_over": {
            name: {kind: ratio(taken["ours"], taken[name], kind) for kind in ("wall", "cpu")}
            for name in taken
            if name != "ours"
        },
        "flops_per_second": speed["ours"]["wall"] * per_token,
        "matrix_flops": matrix_products(),
        "loading_tokens_per_second": alone,
        "loading_over_training": alone / speed["ours"]["cpu"],
        "all": {name: [dataclasses.asdict(t) for t in found] for name, found in taken.items()},
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        (
            f"{result['machine']}, {result['threads']} thread(s), medians of {result['rounds']} rounds of "
            f"{result['counted_steps']} steps\n"
        ),
        (
            "| | tokens/s | tokens per CPU second | ours is, in wall time | ours is, in CPU time "
            "|\n|---|---:|---:|---:|---:|"
        ),
    ]
    for name, speed in result["tokens_per_second"].items():
        over = result["ours_over"].get(name)
        more = " | |" if over is None else f" {over['wall']:.2f} × | {over['cpu']:.2f} × |"
        lines.append(f"| {name} | {speed['wall']:,.0f} | {speed['cpu']:,.0f} |{more}")
    flops, product = result["flops_per_second"] / 1e9, result["matrix_flops"] / 1e9
    lines.append(f"\nours computes {flops:.0f} GFLOP/s; a product of matrices runs at {product:.0f}")
    loading = f"{result['loading_over_training']:,.0f} ×"
    return "\n".join([*lines, f"\nreading batches alone: {loading} what training consumes"])


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=22, help=f"of each round, {WARM} of them uncounted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, default=Path("build/bench-train"), help="a folder that is removed at the end"
    )
    parser.add_argument("--out", type=Path, default=HERE / "bench_train.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        work = work_of(options.work, options.steps)
        result = summary(work, rounds(work, options.work, options.rounds), options.threads)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))


if __name__ == "__main__":
    main()
