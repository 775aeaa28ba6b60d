"""Growth against `cp`, the disk and mergekit, at the size of Phi-1.5 → Phi-2, in interleaved rounds.

make bench-growth                                   about 10 minutes and 25 GB of disk: a table, and
                                                    benchmarks/bench_growth.json
python benchmarks/bench_growth.py --rounds 1 --layers 6 --without-mergekit      a quick look
python benchmarks/bench_growth.py --page            the same, and its table into docs/evidence.md; with
                                                    --rounds 0 that of bench_growth.json

The source has random weights in float16. A round runs every command once, each a whole process on `--cores`
cores whose wall time and peak resident memory are those that the operating system counts. Before a command
runs, what it writes is removed and what it reads is in the page cache, for `cp` as for growth, and nothing is
left to be written back. `cp` leaves its copy in the page cache, growth ends when the disk has all of it;
"then sync" is that for both. Fresh cache pages can cost far more than the disk does, above all in a virtual
machine, so `cp` varies from run to run; `dd` does not depend on them. Growth verifies what it wrote by
reading every header entry back and holding it against the plan; that is in its time. The weights themselves
are compared after the timing, with the source and with mergekit's.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import passthrough  # nothing large is imported here: a child's peak memory starts from its parent's

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "evidence.md"
MARKS = ("<!-- bench-growth -->\n", "<!-- /bench-growth -->\n")


@dataclass(frozen=True)
class Timed:
    """One finished process: wall and processor seconds, peak resident bytes."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


def measured(command: Sequence[str | Path], output: str = os.devnull) -> Timed:
    """Run a command in a child of its own, so that its peak memory is its own."""
    arguments = [str(part) for part in command]
    opened = [
        (os.POSIX_SPAWN_OPEN, number, output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in (1, 2)
    ]
    started = time.perf_counter()
    pid = os.posix_spawn(
        shutil.which(arguments[0]) or arguments[0], arguments, os.environ, file_actions=opened
    )
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(
            f"{' '.join(arguments)} ended with status "
            f"{code}{'' if output == os.devnull else f'; see {output}'}"
        )
    return Timed(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def then_sync(command: Timed) -> Timed:
    """A finished process and the wait until the disk has what it wrote."""
    waited = measured(["sync"])
    return Timed(
        command.seconds + waited.seconds,
        command.processor_seconds + waited.processor_seconds,
        command.peak_bytes,
    )


# ---- what runs in children ---------------------------------------------------------------------------------


def make_source(folder: Path, layers: int, vocabulary: int) -> None:
    """A checkpoint with Phi-1.5's shapes and random float16 weights."""
    from outgrow.model.presets import preset

    write_random(folder, preset("phi_1_5") | {"num_hidden_layers": layers, "vocab_size": vocabulary})


def make_dense(folder: Path, layers: int, vocabulary: int) -> None:
    """A Llama with Phi-1.5's sizes and random float16 weights, to be made a mixture of experts of."""
    from outgrow.model.presets import preset

    sizes = {
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    write_random(
        folder, preset("phi_1_5") | sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    )


def write_random(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of `config` with random float16 weights."""
    import numpy as np

    from outgrow.growth.engine.shards import Entry, ShardWriter, layout
    from outgrow.model.family import family_of

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(family_of(config).tensors(config))
    writer = ShardWriter(folder, layout([Entry(tensor.name, "F16", tensor.shape) for tensor in tensors]))
    numbers = np.random.default_rng(0)
    for tensor in tensors:
        values = numbers.standard_normal(int(np.prod(tensor.shape)), np.float32) * 0.02 + (
            "norm" in tensor.name
        )
        writer.write(tensor.name, 0, values.astype(np.float16))
    writer.finish()
    writer.close()


def check_grown(source: Path, grown: Path) -> None:
    """Check that what growth copies without a factor is the source's bits: fc1's first rows and columns, in
    every layer that is a first copy.
    """
    import numpy as np

    from outgrow.model.checkpoint import Checkpoint

    layers = json.loads((grown / "growth.json").read_text())["plan"]["layers"]
    with Checkpoint(source) as small, Checkpoint(grown) as large:
        for number, layer in enumerate(layers):
            expected = small.read(f"model.layers.{layer}.mlp.fc1.weight")
            found = large.read(f"model.layers.{number}.mlp.fc1.weight")[
                : expected.shape[0], : expected.shape[1]
            ]
            if not np.array_equal(found, expected):
                raise SystemExit(f"{grown}: fc1 of layer {number} is not that of source layer {layer}")


def check_experts(source: Path, grown: Path) -> None:
    """Every expert of an upcycled model must be the source's MLP, bit for bit."""
    import numpy as np

    from outgrow.model.checkpoint import Checkpoint

    parts = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    with Checkpoint(source) as small, Checkpoint(grown) as large:
        for own, dense in parts.items():
            expected = small.read(f"model.layers.0.mlp.{dense}.weight")
            for expert in range(8):
                found = large.read(f"model.layers.0.block_sparse_moe.experts.{expert}.{own}.weight")
                if not np.array_equal(found, expected):
                    raise SystemExit(f"{grown}: {own} of expert {expert} is not the source's {dense}")


def check_equal(first: Path, second: Path) -> None:
    """Both checkpoints must hold the same tensors, bit for bit."""
    import numpy as np

    from outgrow.model.checkpoint import Checkpoint

    with Checkpoint(first) as a, Checkpoint(second) as b:
        if a.tensors.keys() != b.tensors.keys():
            raise SystemExit(
                f"{first} and {second} hold different tensors: "
                f"{sorted(a.tensors.keys() ^ b.tensors.keys())[:3]}"
            )
        for name in a.tensors:
            if not np.array_equal(a.read(name), b.read(name)):
                raise SystemExit(f"{name} differs between {first} and {second}")


CHILDREN = {
    "make-source": make_source,
    "make-dense": make_dense,
    "check-grown": check_grown,
    "check-experts": check_experts,
    "check-equal": check_equal,
}


def child(name: str, *arguments: object) -> list[str]:
    return [sys.executable, __file__, "--child", name, *map(str, arguments)]


# ---- the rounds --------------------------------------------------------------------------------------------


def growth_command(source: Path, out: Path, target: str, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "outgrow.growth",
        f"source={source}",
        f"target={target}",
        f"out={out}",
        "threads=2",
        *more,
    ]


# The door of an installation without a C compiler.
IN_NUMPY = "; ".join(
    (
        "import runpy, sys",
        "sys.modules['outgrow.growth.engine._bits'] = None",
        "sys.argv[0] = 'growth'",
        "runpy.run_module('outgrow.growth', None, '__main__', True)",
    )
)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def ready(output: Path, *inputs: Path) -> None:
    """Remove what a command will write, write back what others wrote, and read what it will read into the
    page cache."""
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    os.sync()
    buffer = bytearray(1 << 20)
    for file in (file for folder in inputs for file in folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


class Bench:
    """The commands of a round, in a working folder."""

    def __init__(self, work: Path, layers: int, mergekit: Path | None) -> None:
        self.work, self.mergekit = work, mergekit
        self.source, self.quarter, self.dense = work / "source", work / "quarter", work / "dense"
        self.layers, self.deeper = layers, layers * 4 // 3
        # the last layers again, as they are
        self.map = [*range(layers), *range(2 * layers - self.deeper, layers)]
        self.bytes: dict[str, int] = {}
        self.log = str(work / "log.txt")
        for folder, part in ((self.source, 1), (self.quarter, 4)):
            measured(child("make-source", folder, layers // part, 51200 // part), self.log)
        measured(child("make-dense", self.dense, layers // 4, 51200 // 4), self.log)

    def round(self) -> dict[str, Timed]:
        work, found = self.work, {}
        grown, copy, direct, deep, merged = (
            work / name for name in ("grown", "copy", "direct", "deep", "merged")
        )
        width = "hidden_size:2560,intermediate_size:10240"
        target = f"{{{width},num_hidden_layers:{self.deeper}}}"

        ready(grown, self.source)
        command = growth_command(self.source, grown, target)
        found["growth"] = measured(command, self.log)
        found["growth, then sync"] = then_sync(found["growth"])
        self.bytes |= {"source": size_of(self.source), "growth": size_of(grown)}
        measured(child("check-grown", self.source, grown), self.log)
        ready(copy, grown)
        found["cp of its result"] = measured(["cp", "-r", grown, copy])
        found["cp of its result, then sync"] = then_sync(found["cp of its result"])
        ready(copy)
        ready(direct)
        count = f"count={self.bytes['growth'] >> 20}"
        found["dd of as many bytes"] = measured(
            ["dd", "if=/dev/zero", f"of={direct}", "bs=1M", count, "oflag=direct", "status=none"]
        )
        ready(direct)
        ready(grown, self.source)
        found["growth in numpy alone"] = measured([command[0], "-c", IN_NUMPY, *command[3:]], self.log)
        ready(grown, self.quarter)
        part = f"{{{width},num_hidden_layers:{self.deeper // 4}}}"
        found["growth of a quarter"] = measured(growth_command(self.quarter, grown, part), self.log)
        self.bytes["growth of a quarter"] = size_of(grown)
        ready(grown)
        ready(deep, self.source)
        depth = f"growth.depth={self.map}".replace(" ", "")
        found["growth in depth alone"] = measured(
            growth_command(self.source, deep, f"{{num_hidden_layers:{self.deeper}}}", depth), self.log
        )
        self.bytes["growth in depth alone"] = size_of(deep)
        for name, small in (("mergekit", False), ("mergekit, small shards", True)):
            if self.mergekit is not None:
                ready(merged, self.source)
                recipe = passthrough.recipe(work, self.source, self.map)
                found[name] = measured(
                    passthrough.command(self.mergekit, recipe, merged, small=small), self.log
                )
                self.bytes[name] = size_of(merged)
                measured(child("check-equal", deep, merged), self.log)
        ready(merged)
        ready(deep)
        ready(grown, self.dense)
        mixture = "{model_type:mixtral,num_local_experts:8,num_experts_per_tok:2}"
        command = growth_command(self.dense, grown, mixture, "growth=upcycle", "receipt=false")
        found["upcycling a quarter into 8 experts"] = measured(command, self.log)
        self.bytes["upcycling a quarter into 8 experts"] = size_of(grown)
        measured(child("check-experts", self.dense, grown), self.log)
        ready(grown)
        found["start-up"] = measured(
            [sys.executable, "-m", "outgrow.growth", "source=phi_1_5", "target=phi_2", "plan_only=true"]
        )
        return found


def machine(cores: int) -> str:
    """The processor's name, how much of it was used, and the system."""
    from outgrow.model.base.machine import processor

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{processor()}, {cores} of {os.cpu_count()} cores, {memory:.0f} GB, Linux {platform.release()}"


def summary(rounds: list[dict[str, Timed]], sizes: dict[str, int], layers: int, cores: int) -> dict[str, Any]:
    """The content of bench_growth.json: medians, ratios within rounds, and every measurement."""

    def ratio(above: str, below: str) -> float | None:
        return (
            statistics.median(run[above].seconds / run[below].seconds for run in rounds)
            if {above, below} <= rounds[0].keys()
            else None
        )

    names = list(rounds[0])
    start = statistics.median(run["start-up"].seconds for run in rounds)
    return {
        "machine": machine(cores),
        "python": platform.python_version(),
        "rounds": len(rounds),
        "layers": layers,
        "bytes": sizes,
        "seconds": {name: statistics.median(run[name].seconds for run in rounds) for name in names},
        "processor_seconds": {
            name: statistics.median(run[name].processor_seconds for run in rounds) for name in names
        },
        "peak_bytes": {name: max(run[name].peak_bytes for run in rounds) for name in names},
        "ratios": {
            "growth / cp": ratio("growth", "cp of its result"),
            "growth / cp, both then sync": ratio("growth, then sync", "cp of its result, then sync"),
            "growth / dd": ratio("growth", "dd of as many bytes"),
            "mergekit / growth in depth alone": ratio("mergekit", "growth in depth alone"),
            "seconds per byte without start-up, whole / quarter": statistics.median(
                (run["growth"].seconds - start)
                / sizes["growth"]
                / ((run["growth of a quarter"].seconds - start) / sizes["growth of a quarter"])
                for run in rounds
            ),
        },
        "runs": [{name: asdict(run) for name, run in found.items()} for found in rounds],
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    others = f"; load average of other work before: {result['load_before']:.0f}"
    lines = [
        (
            f"{result['machine']}{others if result['load_before'] > 0.5 else ''}; whole processes, 2 "
            "computing threads;"
        )
    ]
    lines += [f"medians over the interleaved rounds ({result['rounds']}):", ""]
    lines += [
        "| | writes | seconds | fastest to slowest | processor seconds | peak memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    whole = (
        "growth, then sync",
        "growth in numpy alone",
        "cp of its result",
        "cp of its result, then sync",
        "dd of as many bytes",
    )
    sizes = result["bytes"] | dict.fromkeys(whole, result["bytes"]["growth"])
    for name, seconds in result["seconds"].items():
        written = f"{sizes[name] / 1e9:.2f} GB" if name in sizes else ""
        every = [run[name]["seconds"] for run in result["runs"]]
        cost = f"{result['processor_seconds'][name]:.1f} | {result['peak_bytes'][name] / 1e6:,.0f} MB"
        lines.append(
            f"| {name} | {written} | {seconds:.1f} | {min(every):.1f} to {max(every):.1f} | {cost} |"
        )
    ratios = "; ".join(f"{name} {value:.2f}" for name, value in result["ratios"].items() if value is not None)
    return "\n".join([*lines, "", f"Medians of the rounds' ratios: {ratios}.", ""])


def write_page(result: dict[str, Any]) -> None:
    """Put the table between its marks in docs/evidence.md."""
    before, rest = PAGE.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(before + MARKS[0] + table(result) + MARKS[1] + after)


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--layers", type=int, default=24, help="of the source, a multiple of 12; 24 is Phi-1.5"
    )
    parser.add_argument("--cores", type=int, default=2, help="that every command may use")
    parser.add_argument(
        "--work", type=Path, default=Path("build/bench-growth"), help="a folder for 20 GB, removed at the end"
    )
    parser.add_argument("--out", type=Path, default=HERE / "bench_growth.json")
    parser.add_argument("--without-mergekit", action="store_true")
    parser.add_argument("--page", action="store_true", help="write the table into docs/evidence.md")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = options.child
        CHILDREN[name](*(int(value) if value.isdecimal() else Path(value) for value in arguments))  # type: ignore[operator]
        return
    if options.layers % 12:
        parser.error(
            "--layers must be a multiple of 12: depth grows by a third, and a quarter of it is grown too"
        )
    if options.rounds:
        result = run(options)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{table(result)}")
    if options.page:
        write_page(json.loads(options.out.read_text()))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The rounds, in a working folder that is removed at the end."""
    mergekit = (
        None
        if options.without_mergekit
        else passthrough.environment(options.work.absolute().parent / "mergekit")
    )
    load = os.getloadavg()[1]
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, cores)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as in any installation
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    try:
        bench = Bench(options.work, options.layers, mergekit)
        rounds = []
        for number in range(options.rounds + 1):  # the first round warms up and does not count
            rounds.append(bench.round())
            print(
                f"round {number}: "
                + ", ".join(f"{name} {run.seconds:.1f} s" for name, run in rounds[-1].items()),
                flush=True,
            )
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    return {"load_before": load} | summary(rounds[1:], bench.bytes, options.layers, len(cores))


if __name__ == "__main__":
    main()
