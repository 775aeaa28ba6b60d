"""The numbers of `bench_growth.py`: medians and ratios of its rounds, and their table in Markdown."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PARTS = GROWTH, EXPERTS = ("growth", "experts")
EXPERT_COUNT = 8


@dataclass(frozen=True)
class Timed:
    """One finished process: wall and processor seconds, peak resident bytes."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


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
        "runs": [{name: asdict(timed) for name, timed in run.items()} for run in rounds],
    }


def growth_ratios(rounds: Sequence[dict[str, Timed]], sizes: Mapping[str, int]) -> dict[str, float | None]:
    """Of growth in width and depth to what stands beside it, medians within rounds."""
    start = statistics.median(run["start-up"].seconds for run in rounds)

    def per_byte(run: dict[str, Timed], name: str) -> float:
        seconds = run[name].seconds - start
        return seconds / sizes[name]

    return {
        "growth / cp": ratio(rounds, "growth", "cp of its result"),
        "growth / cp, both then sync": ratio(rounds, "growth, then sync", "cp of its result, then sync"),
        "growth / dd": ratio(rounds, "growth", "dd of as many bytes"),
        "mergekit / growth in depth alone": ratio(rounds, "mergekit", "growth in depth alone"),
        "seconds per byte without start-up, whole / quarter": statistics.median(
            per_byte(run, "growth") / per_byte(run, "growth of a quarter") for run in rounds
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
    busy = others if result["load_before"] > 0.5 else ""
    lines = [f"{result['machine']}{busy}; whole processes, 2 computing threads;"]
    lines += [f"medians over the interleaved rounds ({result['rounds']}):", ""]
    lines += [
        "| | writes | seconds | fastest to slowest | processor seconds | peak memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    sizes = result["bytes"]
    for name, seconds in result["seconds"].items():
        written = f"{sizes[name] / 1e9:.2f} GB" if name in sizes else ""
        every = [run[name]["seconds"] for run in result["runs"]]
        span = f"{min(every):.1f} to {max(every):.1f}"
        processor = result["processor_seconds"][name]
        megabytes = result["peak_bytes"][name] / 1e6
        lines.append(
            f"| {name} | {written} | {seconds:.1f} | {span} | {processor:.1f} | {megabytes:,.0f} MB |"
        )
    known = {name: value for name, value in result["ratios"].items() if value is not None}
    ratios = "; ".join(f"{name} {value:.2f}" for name, value in known.items())
    return "\n".join([*lines, "", f"Medians of the rounds' ratios: {ratios}.", ""])
