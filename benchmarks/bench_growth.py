"""Growth against `cp` and the disk, at the size of Phi-1.5 → Phi-2, in interleaved rounds.

make bench-growth                                   about 5 minutes and 12 GB of disk: a table, and benchmarks/bench_growth.json
python benchmarks/bench_growth.py --rounds 1 --layers 4   a quick look

The source has random weights in float16. Every round grows it, copies the result with `cp`, writes as many bytes past the page cache with
`dd oflag=direct`, and repeats the growth in depth alone; each command is a whole process, its wall time and peak resident memory as the
operating system counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from growth.shards import Entry, ShardWriter
from model.family import family_of
from model.presets import preset

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Timed:
    """One finished process: wall seconds and peak resident bytes."""

    seconds: float
    peak_bytes: int


def measured(command: Sequence[str]) -> Timed:
    """Run a command in a child of its own, so that its peak memory is its own."""
    started = time.perf_counter()
    pid = os.posix_spawn(command[0], list(command), os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return Timed(seconds, usage.ru_maxrss * 1024)


def make_source(folder: Path, layers: int) -> Path:
    """A checkpoint with Phi-1.5's shapes and random float16 weights."""
    config = preset("phi_1_5") | {"num_hidden_layers": layers}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(family_of(config).tensors(config))
    writer = ShardWriter(folder, [Entry(tensor.name, "F16", tensor.shape) for tensor in tensors])
    numbers = np.random.default_rng(0)
    for tensor in tensors:
        values = numbers.standard_normal(int(np.prod(tensor.shape)), np.float32) * 0.02 + ("norm" in tensor.name)
        with writer.tensor(tensor.name) as place:
            place.space(2 * values.size)[:] = values.astype(np.float16).view(np.uint8)
    writer.finish()
    writer.close()
    return folder


def growth_command(source: Path, out: Path, target: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "growth", f"source={source}", f"target={target}", f"out={out}", "overwrite=true", "threads=2", *more]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def rounds(work: Path, count: int, layers: int) -> dict[str, list[Timed]]:
    """Every command once a round, in turn, so that a machine that slows down slows them all."""
    source, grown, deep, copy = (work / name for name in ("source", "grown", "deep", "copy"))
    measured(
        [sys.executable, __file__, "--layers", str(layers), "--make-source", str(source)]
    )  # apart: a child starts from its parent's peak
    deeper = layers * 4 // 3
    width = f"{{hidden_size:2560,intermediate_size:10240,num_hidden_layers:{deeper}}}"
    taken: dict[str, list[Timed]] = {
        name: [] for name in ("growth", "cp of its result", "dd of as many bytes", "growth in depth alone", "start-up")
    }
    for number in range(count + 1):  # the first round warms up and does not count
        os.sync()
        found = {"growth": measured(growth_command(source, grown, width))}
        shutil.rmtree(copy, ignore_errors=True)
        os.sync()
        found["cp of its result"] = measured([str(shutil.which("cp")), "-r", str(grown), str(copy)])
        shutil.rmtree(copy, ignore_errors=True)
        os.sync()
        megabytes = size_of(grown) >> 20
        found["dd of as many bytes"] = measured(
            [str(shutil.which("dd")), "if=/dev/zero", f"of={work / 'direct'}", "bs=1M", f"count={megabytes}", "oflag=direct", "status=none"]
        )
        (work / "direct").unlink()
        os.sync()
        found["growth in depth alone"] = measured(growth_command(source, deep, f"{{num_hidden_layers:{deeper}}}"))
        shutil.rmtree(deep, ignore_errors=True)
        found["start-up"] = measured([sys.executable, "-m", "growth", "source=phi_1_5", "target=phi_2", "plan_only=true"])
        for name, run in found.items():
            if number:
                taken[name].append(run)
        print(f"round {number}: " + ", ".join(f"{name} {run.seconds:.1f} s" for name, run in found.items()), flush=True)
    print(f"{size_of(source):,} bytes → {size_of(grown):,} bytes")
    return taken


def machine() -> str:
    """The processor's name and how many threads of it there are."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}"


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24, help="of the source; 24 is Phi-1.5")
    parser.add_argument("--work", type=Path, default=Path("build/bench-growth"), help="a folder for 12 GB, removed at the end")
    parser.add_argument("--out", type=Path, default=HERE / "bench_growth.json")
    parser.add_argument("--make-source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_source:
        make_source(options.make_source, options.layers)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        taken = rounds(options.work, options.rounds, options.layers)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    ratio = [mine.seconds / copy.seconds for mine, copy in zip(taken["growth"], taken["cp of its result"], strict=True)]
    result = {
        "machine": machine(),
        "rounds": options.rounds,
        "layers": options.layers,
        "seconds": {name: statistics.median(run.seconds for run in runs) for name, runs in taken.items()},
        "all_seconds": {name: [run.seconds for run in runs] for name, runs in taken.items()},
        "peak_bytes": {name: max(run.peak_bytes for run in runs) for name, runs in taken.items()},
        "growth_over_cp": statistics.median(ratio),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['machine']}, medians of {options.rounds} rounds\n")
    print("| whole process | seconds | peak memory |\n|---|---:|---:|")
    for name, seconds in result["seconds"].items():
        print(f"| {name} | {seconds:.1f} | {result['peak_bytes'][name] / 1e6:,.0f} MB |")
    print(f"\ngrowth / cp, median of the rounds' ratios: {result['growth_over_cp']:.2f}")


if __name__ == "__main__":
    main()
