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
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import merges  # nothing large is imported here: a child's peak memory starts from its parent's
from growth_table import (
    EXPERT_COUNT,
    EXPERTS,
    GROWTH,
    PARTS,
    Timed,
    expert_ratios,
    growth_ratios,
    part_table,
    summary,
    table,
)

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "evidence.md"
MARKS = ("<!-- bench-growth -->\n", "<!-- /bench-growth -->\n")
CHILDREN = HERE / "growth_children.py"
DOOR = (sys.executable, "-m", "outgrow.growth")
WIDER = "hidden_size:2560,intermediate_size:10240"
MIXTURE = f"{{model_type:mixtral,num_local_experts:{EXPERT_COUNT},num_experts_per_tok:2}}"


def measured(command: Sequence[str | Path], output: str = os.devnull) -> Timed:
    """Run a command in a child of its own, so that its peak memory is its own."""
    arguments = [str(part) for part in command]
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    opened = [(os.POSIX_SPAWN_OPEN, number, output, appending, 0o644) for number in (1, 2)]
    program = shutil.which(arguments[0]) or arguments[0]
    started = time.perf_counter()
    pid = os.posix_spawn(program, arguments, os.environ, file_actions=opened)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    if code:
        see = "" if output == os.devnull else f"; see {output}"
        raise SystemExit(f"{' '.join(arguments)} ended with status {code}{see}")
    processor = usage.ru_utime + usage.ru_stime
    return Timed(seconds, processor, usage.ru_maxrss * 1024)


def then_sync(command: Timed) -> Timed:
    """A finished process and the wait until the disk has what it wrote."""
    waited = measured(["sync"])
    return Timed(
        command.seconds + waited.seconds,
        command.processor_seconds + waited.processor_seconds,
        command.peak_bytes,
    )


def child(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(CHILDREN), name, *map(str, arguments)]


# ---- the rounds --------------------------------------------------------------------------------------------


def growth_command(source: Path, out: Path, target: str, *more: str) -> list[str]:
    return [*DOOR, f"source={source}", f"target={target}", f"out={out}", "threads=2", *more]


def target_of(layers: int, width: str = "") -> str:
    """The target's sizes as a command takes them."""
    sizes = [width] if width else []
    sizes.append(f"num_hidden_layers:{layers}")
    return f"{{{','.join(sizes)}}}"


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
    globs = [folder.glob("*.safetensors") for folder in inputs]
    for file in chain.from_iterable(globs):
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

    def timed(self, command: Sequence[str | Path], output: Path, *inputs: Path) -> Timed:
        """A command that writes `output` from `inputs`."""
        ready(output, *inputs)
        return measured(command, self.log)

    def growth(self) -> dict[str, Timed]:
        """Growth in width and depth beside a copy, the disk and mergekit."""
        grown, copy, direct = (self.work / name for name in ("grown", "copy", "direct"))
        sizes = self.bytes[GROWTH]
        times = self._growth_of_both(grown)
        sizes |= {"source": size_of(self.source), "growth": size_of(grown)}
        measured(child("check-grown", self.source, grown), self.log)
        copying = ["cp", "-r", grown, copy]
        times["cp of its result"] = self.timed(copying, copy, grown)
        times["cp of its result, then sync"] = then_sync(times["cp of its result"])
        ready(copy)
        times["dd of as many bytes"] = self._written_directly(direct, sizes["growth"])
        in_numpy = self._growth_command(grown)
        in_numpy[1:3] = ["-c", IN_NUMPY]
        times["growth in numpy alone"] = self.timed(in_numpy, grown, self.source)
        quarter = target_of(self.deeper // 4, WIDER)
        command = growth_command(self.quarter, grown, quarter)
        times["growth of a quarter"] = self.timed(command, grown, self.quarter)
        sizes["growth of a quarter"] = size_of(grown)
        ready(grown)
        times |= self._in_depth_alone()
        planning = [
            sys.executable,
            "-m",
            "outgrow.growth",
            "source=phi_1_5",
            "target=phi_2",
            "plan_only=true",
        ]
        times["start-up"] = measured(planning)
        return times

    def _growth_command(self, grown: Path) -> list[str]:
        target = target_of(self.deeper, WIDER)
        return growth_command(self.source, grown, target)

    def _growth_of_both(self, grown: Path) -> dict[str, Timed]:
        """Growth in width and depth, and until the disk has it."""
        growth = self.timed(self._growth_command(grown), grown, self.source)
        return {"growth": growth, "growth, then sync": then_sync(growth)}

    def _written_directly(self, direct: Path, size: int) -> Timed:
        """So many bytes written by `dd`, past the page cache; the file is removed again."""
        count = f"count={size >> 20}"
        ready(direct)
        seconds = measured(
            ["dd", "if=/dev/zero", f"of={direct}", "bs=1M", count, "oflag=direct", "status=none"]
        )
        ready(direct)
        return seconds

    def _in_depth_alone(self) -> dict[str, Timed]:
        """Growth in depth alone beside mergekit, which must write the same."""
        deep, merged = self.work / "deep", self.work / "merged"
        sizes = self.bytes[GROWTH]
        depth = f"growth.depth={self.map}".replace(" ", "")
        command = growth_command(self.source, deep, target_of(self.deeper), depth)
        times = {"growth in depth alone": self.timed(command, deep, self.source)}
        sizes["growth in depth alone"] = size_of(deep)
        for name, small in (("mergekit", False), ("mergekit, small shards", True)):
            if self.mergekit is None:
                continue
            recipe = merges.passthrough(self.work, self.source, self.map)
            merging = merges.passthrough_command(self.mergekit, recipe, merged, small=small)
            times[name] = self.timed(merging, merged, self.source)
            sizes[name] = size_of(merged)
            measured(child("check-equal", deep, merged), self.log)
        ready(merged)
        ready(deep)
        return times

    def experts(self) -> dict[str, Timed]:
        """A dense model into a mixture of experts beside the disk, mergekit and a copy by hand."""
        grown, direct, merged, copied = (self.work / name for name in ("grown", "direct", "merged", "copied"))
        sizes = self.bytes[EXPERTS]
        sizes["source"] = size_of(self.dense)
        times = {}

        def mix(name: str, command: Sequence[str | Path], source: Path, out: Path) -> None:
            times[name] = self.timed(command, out, source)
            sizes[name] = size_of(out)
            measured(child("check-experts", source, out), self.log)
            ready(out)

        def upcycle(name: str, source: Path) -> None:
            command = growth_command(source, grown, MIXTURE, "growth=upcycle", "receipt=false")
            mix(name, command, source, grown)

        upcycle("upcycling", self.dense)
        times["dd of as many bytes"] = self._written_directly(direct, sizes["upcycling"])
        sizes["dd of as many bytes"] = sizes["upcycling"]
        if self.mergekit is not None:
            recipe = merges.mixture(self.work, self.dense, EXPERT_COUNT)
            command = merges.mixture_command(self.mergekit, recipe, merged)
            mix("mergekit-moe", command, self.dense, merged)
        upcycle("upcycling a quarter", self.dense_quarter)
        by_hand = child("copy-by-hand", self.dense_quarter, copied)
        mix("a quarter by hand: load, copy, save", by_hand, self.dense_quarter, copied)
        return times


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
    options = parser.parse_args()
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
                times = bench.round(part)
                rounds[part].append(times)
                seconds = ", ".join(f"{name} {timed.seconds:.1f} s" for name, timed in times.items())
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
