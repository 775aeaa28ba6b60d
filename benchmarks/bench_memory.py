"""The memory that a dry run tells of, held against PyTorch's own trackers, for Phi-2 on 1, 8 and 96 devices.
No GPU is needed.

python benchmarks/bench_memory.py                   about 15 minutes: a table, and
                                                    benchmarks/bench_memory.json
python benchmarks/bench_memory.py --layers 4        two minutes: the same of a shallower network

Each way of training (activation checkpointing, sharding, fused loss) takes one step of a micro-batch on fake
tensors, in a group of as many processes as there are devices, of which this one is the first and the others
are not there (PyTorch's fake process group): what `FSDPMemTracker`, or without sharding its base
`MemTracker`, has counted at the peak is what one device would hold. Gradients and the optimizer's state exist
before it, as in every step after the first; of a step of one micro-batch, the gradients begin empty. The
trackers do not see into `linear_cross_entropy`, whose logits of one chunk the forecast counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from outgrow.model.build import empty_model
from outgrow.model.presets import preset
from outgrow.train.compose import compose
from outgrow.train.loss import build_loss
from outgrow.train.machine.compile import layers_of, speed_up
from outgrow.train.machine.distribute import sharding_plugin
from outgrow.train.machine.forecast import GIB, Memory, forecast, target
from outgrow.train.optimizer import build_optimizer
from outgrow.train.settings import Settings

HERE = Path(__file__).resolve().parent
PHI_2 = ("experiment=phi_1b", "growth=lossless", "train.batch_tokens=786432")
# The trackers' words for a category → ours; activations and the loss cannot be told apart by them.
CATEGORIES = {
    "weights": ("Parameter", "Sharded Param"),
    "gradients": ("Gradient", "Sharded Grad"),
    "optimizer": ("OptState", "Optstate"),
    "gathered": ("Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter"),
    "work": ("Activation", "Temp", "Inputs", "Buffer", "Other"),
}


def forecast_parts(memory: Memory) -> dict[str, float]:
    """A forecast in the categories that the trackers know."""
    parts = dict(vars(memory))
    work = parts.pop("activations") + parts.pop("logits")
    return parts | {"work": work}


def tracked_parts(settings: Settings) -> dict[str, float]:
    """The bytes of each category at the peak of one step, as PyTorch's tracker counts them on fake
    tensors."""
    loop, gpus = settings.train, settings.forecast.gpus
    rows, several, sharded = shares(settings)
    config, fused = target(settings), loop.loss != "plain"
    with group_of(gpus) as mesh, FakeTensorMode():
        network = empty_model(config, dtype=torch.float32)
        network.train()
        speed_up(network, loop)
        objective: Any = build_loss(network, loop, 0, fused=fused)
        if sharded:
            shard(objective, settings, mesh)
        optimizer = build_optimizer(network, settings.optimizer)
        settle(network, optimizer, gradients=several or (gpus > 1 and not sharded))
        tracker: Any = FSDPMemTracker(objective, optimizer) if sharded else MemTracker()
        if not sharded:
            tracker.track_external(objective, optimizer)
        windows = torch.zeros(rows, loop.context + 1, dtype=torch.int64)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=loop.precision != "fp32"):
                loss = objective(windows, reduction="sum")
            loss.backward()
            optimizer.step()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    counts = {getattr(kind, "value", kind): size for kind, size in peak.items()}
    return {ours: float(sum(counts.get(word, 0) for word in words)) for ours, words in CATEGORIES.items()}


def shares(settings: Settings) -> tuple[int, bool, bool]:
    """The windows of a micro-batch, whether a step has several of them, and whether the run is sharded."""
    loop, gpus = settings.train, settings.forecast.gpus
    share = loop.batch_tokens // loop.context // gpus
    rows = min(loop.micro_batch or share, share)
    return rows, rows < share, settings.sharding.name == "full" and gpus > 1


@contextmanager
def group_of(processes: int) -> Iterator[Any]:
    """A mesh of `processes`, of which this is the first and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()


def shard(objective: Any, settings: Settings, mesh: Any) -> None:
    """Shard as Accelerate does with a run's plugin: `fully_shard` of each layer and then of the whole."""
    plugin = sharding_plugin(settings.sharding, "no" if settings.train.precision == "fp32" else "bf16")
    policy = {} if plugin.mixed_precision_policy is None else {"mp_policy": plugin.mixed_precision_policy}
    for module in (*layers_of(objective), objective):
        fully_shard(module, mesh=mesh, reshard_after_forward=bool(plugin.reshard_after_forward), **policy)


def settle(network: Any, optimizer: Any, *, gradients: bool) -> None:
    """Take one step, so that the optimizer has its state (and DTensor its plans of operators); leave
    gradients where asked."""
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not gradients:
        optimizer.zero_grad()


# ---- all ways ----------------------------------------------------------------------------------------------


def ways(gpus: Sequence[int], layers: int | None) -> Iterator[Settings]:
    """Phi-2 trained in every way on every number of devices, with fewer layers where asked."""
    config = preset("phi_2") | ({} if layers is None else {"num_hidden_layers": layers})
    for count, sharding, checkpointing, loss in product(
        gpus, ("none", "full"), ("false", "true"), ("plain", "fused")
    ):
        if count > 1 or sharding == "none":
            keys = (
                f"forecast.gpus={count}",
                f"sharding={sharding}",
                f"train.checkpointing={checkpointing}",
                f"train.loss={loss}",
            )
            yield replace(compose([*PHI_2, *keys]), target=config)


def alike(settings: Settings) -> tuple[Any, ...]:
    """The facts that tell one device's step from another's: without sharding, each of several devices holds
    what a single one does.
    """
    loop, (rows, several, sharded) = settings.train, shares(settings)
    kept = several or (settings.forecast.gpus > 1 and not sharded)
    return loop.checkpointing, loop.loss, rows, kept, settings.forecast.gpus if sharded else 1


def compared(settings: Settings, tracked: dict[str, float]) -> dict[str, Any]:
    """One row of the result, in bytes."""
    loop, told = settings.train, forecast_parts(forecast(settings).memory)
    peak = sum(tracked.values())
    return {
        "gpus": settings.forecast.gpus,
        "sharding": settings.sharding.name,
        "checkpointing": loop.checkpointing,
        "loss": loop.loss,
        "forecast": told,
        "tracked": tracked,
        "off": sum(told.values()) / peak - 1,
        "most_off": max(tracked, key=lambda part: abs(told[part] - tracked[part])),
        "most_off_by": max(abs(told[part] - tracked[part]) for part in tracked) / peak,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The result in Markdown."""
    lines = [
        (
            "| GPUs | sharding | checkpointing | loss | forecast, GiB | tracked, GiB | off by | category "
            "most off, of the peak |"
        ),
        "|---:|---|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        way = (row["gpus"], row["sharding"], "yes" if row["checkpointing"] else "no", row["loss"])
        sizes = [f"{sum(row[of].values()) / GIB:.2f}" for of in ("forecast", "tracked")]
        worst = f"{row['most_off']}, {row['most_off_by']:.1%}"
        lines.append(f"| {' | '.join(map(str, (*way, *sizes)))} | {row['off']:+.1%} | {worst} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The door."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 96])
    options.add_argument("--layers", type=int, default=None, help="a shallower network; nothing is written")
    asked = options.parse_args(arguments)
    tracked: dict[Any, dict[str, float]] = {}
    rows = []
    for settings in ways(asked.gpus, asked.layers):
        key = alike(settings)
        if key not in tracked:
            tracked[key] = tracked_parts(settings)
        rows.append(compared(settings, tracked[key]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if asked.layers is None:
        result = {"torch": torch.__version__, "settings": [*PHI_2], "rows": rows}
        (HERE / "bench_memory.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
