"""Growth against `cp`, the disk and mergekit, at the size of Phi-1.5 → Phi-2 and into a mixture of experts,
in interleaved rounds.

make bench-growth                                   about 10 minutes and 25 GB of disk: a table of each, and
                                                    benchmarks/bench_growth.json
python benchmarks/bench_growth.py --part experts    the mixture alone; the file keeps what it has of the other
                                                    part
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

By hand, a mixture is made by loading every tensor, copying the MLPs, and saving all: at the whole size that
takes as much memory as source and result together, so it is timed at a quarter of the size, beside growth at
that size.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import merges  # nothing large is imported here: a child's peak memory starts from its parent's

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "evidence.md"
MARKS = ("<!-- bench-growth -->\n", "<!-- /bench-growth -->\n")
PARTS = GROWTH, EXPERTS = ("growth", "experts")
EXPERT_COUNT = 8
GATED_UNITS = 5504  # two thirds of Phi-1.5's, as its MLP has two matrices and a gated one three: 1.4 B in all
# a mixture's matrix → the dense model's
OF_EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


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
    """A Llama with Phi-1.5's sizes and random float16 weights, to be made a mixture of experts of.

    Its tokenizer knows a word: mergekit asks for one, and uses none where routers are random.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from outgrow.model.presets import preset

    sizes = {
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "intermediate_size": GATED_UNITS,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    write_random(
        folder, preset("phi_1_5") | sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    )
    words = Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>").save_pretrained(folder)


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


def check_experts(source: Path, mixture: Path) -> None:
    """Every expert of the first and the last layer of a mixture must be the source's MLP, bit for bit."""
    import numpy as np

    from outgrow.model.checkpoint import Checkpoint

    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    with Checkpoint(source) as small, Checkpoint(mixture) as large:
        for layer in (0, layers - 1):
            expected = {
                dense: small.read(f"model.layers.{layer}.mlp.{dense}.weight") for dense in OF_EXPERT.values()
            }
            for number in range(EXPERT_COUNT):
                for dense, found in expert_of(large, layer, number).items():
                    if not np.array_equal(found, expected[dense]):
                        raise SystemExit(
                            f"{mixture}: expert {number} of layer {layer} is not the source's {dense}"
                        )


def expert_of(mixture: Any, layer: int, number: int) -> dict[str, Any]:
    """An expert's matrices by the dense model's names; mergekit stacks a layer's, gate and up as one."""
    stacks = f"model.layers.{layer}.mlp.experts"
    if f"{stacks}.down_proj" not in mixture.tensors:
        expert = f"model.layers.{layer}.block_sparse_moe.experts.{number}"
        return {dense: mixture.read(f"{expert}.{own}.weight") for own, dense in OF_EXPERT.items()}

    def of_stack(name: str) -> Any:
        rows = mixture.tensors[f"{stacks}.{name}"].shape[1]
        return mixture.read(f"{stacks}.{name}", number * rows, (number + 1) * rows)

    both = of_stack("gate_up_proj")
    half = len(both) // 2
    return {"gate_proj": both[:half], "up_proj": both[half:], "down_proj": of_stack("down_proj")}


def copy_by_hand(source: Path, out: Path) -> None:
    """A mixture as one makes it by hand: load all, copy, save all. Only what PyTorch and safetensors do."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in source.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            dense = next((key for key in OF_EXPERT.values() if f".mlp.{key}." in name), None)
            if dense is None:
                tensors[name] = weight
                continue
            own = next(key for key, value in OF_EXPERT.items() if value == dense)
            for expert in range(EXPERT_COUNT):
                place = f"block_sparse_moe.experts.{expert}.{own}"
                tensors[name.replace(f"mlp.{dense}", place)] = weight.clone()
    config = json.loads((source / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        router = torch.randn(EXPERT_COUNT, config["hidden_size"]) * 0.02
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.half()
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    sizes = {"num_local_experts": EXPERT_COUNT, "num_experts_per_tok": 2}
    kind = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    (out / "config.json").write_text(json.dumps(config | sizes | kind))


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
    "copy-by-hand": copy_by_hand,
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
    """The commands of a round, in a working folder.

    Args:
        parts: of PARTS, those whose sources are made.
    """

    def __init__(self, work: Path, layers: int, mergekit: Path | None, parts: Iterable[str]) -> None:
        self.work, self.mergekit = work, mergekit
        self.source, self.quarter = work / "source", work / "quarter"
        self.dense, self.dense_quarter = work / "dense", work / "dense-quarter"
        self.layers, self.deeper = layers, layers * 4 // 3
        # the last layers again, as they are
        self.map = [*range(layers), *range(2 * layers - self.deeper, layers)]
        self.bytes: dict[str, dict[str, int]] = {part: {} for part in parts}
        self.log = str(work / "log.txt")
        sources = {
            GROWTH: ("make-source", self.source, self.quarter),
            EXPERTS: ("make-dense", self.dense, self.dense_quarter),
        }
        for part in parts:
            maker, *folders = sources[part]
            for folder, share in zip(folders, (1, 4), strict=True):
                measured(child(maker, folder, layers // share, 51200 // share), self.log)

    def round(self, part: str) -> dict[str, Timed]:
        """Every command of a part, once."""
        return self.growth() if part == GROWTH else self.experts()

    def growth(self) -> dict[str, Timed]:
        """Growth in width and depth beside a copy, the disk and mergekit."""
        work, found, sizes = self.work, {}, self.bytes[GROWTH]
        grown, copy, direct, deep, merged = (
            work / name for name in ("grown", "copy", "direct", "deep", "merged")
        )
        width = "hidden_size:2560,intermediate_size:10240"
        target = f"{{{width},num_hidden_layers:{self.deeper}}}"

        ready(grown, self.source)
        command = growth_command(self.source, grown, target)
        found["growth"] = measured(command, self.log)
        found["growth, then sync"] = then_sync(found["growth"])
        sizes |= {"source": size_of(self.source), "growth": size_of(grown)}
        measured(child("check-grown", self.source, grown), self.log)
        ready(copy, grown)
        found["cp of its result"] = measured(["cp", "-r", grown, copy])
        found["cp of its result, then sync"] = then_sync(found["cp of its result"])
        ready(copy)
        ready(direct)
        count = f"count={sizes['growth'] >> 20}"
        found["dd of as many bytes"] = measured(
            ["dd", "if=/dev/zero", f"of={direct}", "bs=1M", count, "oflag=direct", "status=none"]
        )
        ready(direct)
        ready(grown, self.source)
        found["growth in numpy alone"] = measured([command[0], "-c", IN_NUMPY, *command[3:]], self.log)
        ready(grown, self.quarter)
        part = f"{{{width},num_hidden_layers:{self.deeper // 4}}}"
        found["growth of a quarter"] = measured(growth_command(self.quarter, grown, part), self.log)
        sizes["growth of a quarter"] = size_of(grown)
        ready(grown)
        ready(deep, self.source)
        depth = f"growth.depth={self.map}".replace(" ", "")
        found["growth in depth alone"] = measured(
            growth_command(self.source, deep, f"{{num_hidden_layers:{self.deeper}}}", depth), self.log
        )
        sizes["growth in depth alone"] = size_of(deep)
        for name, small in (("mergekit", False), ("mergekit, small shards", True)):
            if self.mergekit is not None:
                ready(merged, self.source)
                recipe = merges.passthrough(work, self.source, self.map)
                found[name] = measured(
                    merges.passthrough_command(self.mergekit, recipe, merged, small=small), self.log
                )
                sizes[name] = size_of(merged)
                measured(child("check-equal", deep, merged), self.log)
        ready(merged)
        ready(deep)
        found["start-up"] = measured(
            [sys.executable, "-m", "outgrow.growth", "source=phi_1_5", "target=phi_2", "plan_only=true"]
        )
        return found

    def experts(self) -> dict[str, Timed]:
        """A dense model into a mixture of experts beside the disk, mergekit and a copy by hand."""
        work, found, sizes = self.work, {}, self.bytes[EXPERTS]
        grown, direct, merged, copied = (work / name for name in ("grown", "direct", "merged", "copied"))
        kind = f"{{model_type:mixtral,num_local_experts:{EXPERT_COUNT},num_experts_per_tok:2}}"
        sizes["source"] = size_of(self.dense)

        def upcycle(name: str, source: Path) -> None:
            ready(grown, source)
            command = growth_command(source, grown, kind, "growth=upcycle", "receipt=false")
            found[name] = measured(command, self.log)
            sizes[name] = size_of(grown)
            measured(child("check-experts", source, grown), self.log)
            ready(grown)

        upcycle("upcycling", self.dense)
        count = f"count={sizes['upcycling'] >> 20}"
        found["dd of as many bytes"] = measured(
            ["dd", "if=/dev/zero", f"of={direct}", "bs=1M", count, "oflag=direct", "status=none"]
        )
        sizes["dd of as many bytes"] = sizes["upcycling"]
        ready(direct)
        if self.mergekit is not None:
            ready(merged, self.dense)
            recipe = merges.mixture(work, self.dense, EXPERT_COUNT)
            command = merges.mixture_command(self.mergekit, recipe, merged)
            found["mergekit-moe"] = measured(command, self.log)
            sizes["mergekit-moe"] = size_of(merged)
            measured(child("check-experts", self.dense, merged), self.log)
            ready(merged)
        upcycle("upcycling a quarter", self.dense_quarter)
        ready(copied, self.dense_quarter)
        by_hand = child("copy-by-hand", self.dense_quarter, copied)
        found["a quarter by hand: load, copy, save"] = measured(by_hand, self.log)
        sizes["a quarter by hand: load, copy, save"] = size_of(copied)
        measured(child("check-experts", self.dense_quarter, copied), self.log)
        ready(copied)
        return found


def ratio(rounds: Sequence[Mapping[str, Timed]], above: str, below: str) -> float | None:
    """The median over the rounds of two commands' seconds; None where one was not run."""
    if not {above, below} <= rounds[0].keys():
        return None
    return statistics.median(run[above].seconds / run[below].seconds for run in rounds)


def summary(rounds: Sequence[dict[str, Timed]], sizes: dict[str, int], layers: int) -> dict[str, Any]:
    """The content of bench_growth.json for one part: medians, and every measurement."""
    from outgrow.model.base.machine import machine

    names = list(rounds[0])
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "rounds": len(rounds),
        "layers": layers,
        "bytes": sizes,
        "seconds": {name: statistics.median(run[name].seconds for run in rounds) for name in names},
        "processor_seconds": {
            name: statistics.median(run[name].processor_seconds for run in rounds) for name in names
        },
        "peak_bytes": {name: max(run[name].peak_bytes for run in rounds) for name in names},
        "runs": [{name: asdict(run) for name, run in found.items()} for found in rounds],
    }


def growth_ratios(rounds: Sequence[dict[str, Timed]], sizes: Mapping[str, int]) -> dict[str, float | None]:
    """Of growth in width and depth to what stands beside it, medians within rounds."""
    start = statistics.median(run["start-up"].seconds for run in rounds)
    return {
        "growth / cp": ratio(rounds, "growth", "cp of its result"),
        "growth / cp, both then sync": ratio(rounds, "growth, then sync", "cp of its result, then sync"),
        "growth / dd": ratio(rounds, "growth", "dd of as many bytes"),
        "mergekit / growth in depth alone": ratio(rounds, "mergekit", "growth in depth alone"),
        "seconds per byte without start-up, whole / quarter": statistics.median(
            (run["growth"].seconds - start)
            / sizes["growth"]
            / ((run["growth of a quarter"].seconds - start) / sizes["growth of a quarter"])
            for run in rounds
        ),
    }


def expert_ratios(rounds: Sequence[dict[str, Timed]]) -> dict[str, float | None]:
    """Of upcycling to what stands beside it, medians within rounds."""
    return {
        "upcycling / dd": ratio(rounds, "upcycling", "dd of as many bytes"),
        "mergekit-moe / upcycling": ratio(rounds, "mergekit-moe", "upcycling"),
        "by hand / upcycling, of a quarter": ratio(
            rounds, "a quarter by hand: load, copy, save", "upcycling a quarter"
        ),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: a table for each part, under the machine that it was measured on."""
    whole = (
        "growth, then sync",
        "growth in numpy alone",
        "cp of its result",
        "cp of its result, then sync",
        "dd of as many bytes",
    )
    sizes = result["bytes"] | dict.fromkeys(whole, result["bytes"]["growth"])
    text = part_table(result | {"bytes": sizes})
    if (mixture := result.get(EXPERTS)) is None:
        return text
    size = mixture["bytes"]["source"] / 1e9
    return f"{text}\nA dense model of {size:.2f} GB into {EXPERT_COUNT} experts:\n\n{part_table(mixture)}"


def part_table(result: dict[str, Any]) -> str:
    """The table of one part, its machine above and its ratios below."""
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
    sizes = result["bytes"]
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
    parser.add_argument("--part", choices=PARTS, help="one part alone; what the file has of the other stays")
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
        measured_parts = run(options, PARTS if options.part is None else (options.part,))
        kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
        result = joined(kept, measured_parts)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{table(result) if 'bytes' in result else part_table(result[EXPERTS])}")
    if options.page:
        write_page(json.loads(options.out.read_text()))


def joined(kept: dict[str, Any], parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What an earlier call has written, the parts that were measured now in the place of the same."""
    mixture = parts.get(EXPERTS, kept.get(EXPERTS))
    growth = parts.get(GROWTH, {key: value for key, value in kept.items() if key != EXPERTS})
    return growth if mixture is None else growth | {EXPERTS: mixture}


def run(options: argparse.Namespace, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rounds of each part, in a working folder that is removed at the end."""
    mergekit = (
        None if options.without_mergekit else merges.environment(options.work.absolute().parent / "mergekit")
    )
    load = {"load_before": os.getloadavg()[1]}
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, cores)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as in any installation
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    rounds: dict[str, list[dict[str, Timed]]] = {part: [] for part in parts}
    try:
        bench = Bench(options.work, options.layers, mergekit, parts)
        for number in range(options.rounds + 1):  # the first round warms up and does not count
            for part in parts:
                found = bench.round(part)
                rounds[part].append(found)
                seconds = ", ".join(f"{name} {taken.seconds:.1f} s" for name, taken in found.items())
                print(f"round {number}: {seconds}", flush=True)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    results = {}
    for part in parts:
        counted, sizes = rounds[part][1:], bench.bytes[part]
        ratios = growth_ratios(counted, sizes) if part == GROWTH else expert_ratios(counted)
        results[part] = load | summary(counted, sizes, options.layers) | {"ratios": ratios}
    return results


if __name__ == "__main__":
    main()
