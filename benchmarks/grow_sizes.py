"""Tell what growing a checkpoint of 0.1, 1, 7 and 70 B parameters takes: sizes from geometry, memory
measured, minutes from bench_growth.json.

python benchmarks/grow_sizes.py            seconds: the table of docs/grow.md, from grow_sizes.json and
                                           bench_growth.json
python benchmarks/grow_sizes.py --measure  about a minute and 6 GB of disk at a time: measures the peak memory
                                           again

Every row grows a Llama-shaped checkpoint in bfloat16 by Phi-1.5 → Phi-2's ratios: 1.25 × the width by whole
heads, 4/3 × the depth. Nothing of that size is downloaded: the source is a sparse file of the full shape, and
where the result is larger than 6 GB one worker writes its share of the shards, at full width and depth. Peak
memory is the operating system's count for the whole process. Minutes are not measured at these sizes: they
are start-up plus bytes written at the rate that bench_growth.json has for a 5.6 GB result, and all bytes at 1
GB/s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from bench_growth import measured

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "grow.md"
MARKS = ("<!-- sizes: written by benchmarks/grow_sizes.py -->\n", "<!-- /sizes -->\n")
DISK_RATE = 1e9  # bytes a second, an assumption that the page states
SHARE_BYTES = 6e9  # a larger result is written in shares
HEADINGS = (
    "source",
    "grown",
    "reads",
    "writes",
    "files of 5 GB",
    "peak memory",
    "minutes, computing",
    "minutes, disk",
    "receipt runs in",
)

# name → hidden size, layers, heads, KV heads, feed-forward size
SOURCES: dict[str, tuple[int, int, int, int, int]] = {
    "0.1 B": (768, 12, 12, 12, 2048),
    "1 B": (2048, 22, 32, 4, 5632),
    "7 B": (4096, 32, 32, 32, 11008),
    "70 B": (8192, 80, 64, 8, 28672),
}


def sizes(hidden: int, layers: int, heads: int, kv: int, ffn: int) -> dict[str, int]:
    """A geometry under its Hugging Face names."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
    }


def growth_of(name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(the source's config, the target's sizes) of a row."""
    hidden, layers, heads, kv, ffn = SOURCES[name]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        **sizes(hidden, layers, heads, kv, ffn),
    }
    return config, sizes(hidden * 5 // 4, round(layers * 4 / 3), heads * 5 // 4, kv * 5 // 4, ffn * 5 // 4)


def figures(name: str) -> dict[str, Any]:
    """Parameters, bytes and shards of a row, counted from its plan: no weights are needed."""
    from outgrow.growth import plan
    from outgrow.growth.engine.shards import MAX_SHARD_BYTES
    from outgrow.growth.engine.stream import shards_of

    config, target = growth_of(name)
    made = plan(config, target, "lossless")
    return {
        "source_parameters": made.source_parameters,
        "target_parameters": made.target_parameters,
        "target_bytes": made.target_bytes,
        "shards": len(shards_of(made, MAX_SHARD_BYTES)),
        "lossless": made.certificate.lossless,
    }


# ---- measuring ---------------------------------------------------------------------------------------------


def make_source(folder: Path, name: str) -> None:
    """A checkpoint of the full shape whose weights are one hole in a sparse file: they read as zeros and take
    no disk."""
    from outgrow.model.family import family_of

    config, _ = growth_of(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    entries, end = {}, 0
    for tensor in family_of(config).tensors(config):
        start, end = end, end + 2 * prod(tensor.shape)
        entries[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (start, end)}
    header = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def grow_share(source: Path, out: Path, name: str, count: int) -> None:
    """Grow the whole, or the first of `count` shares of the shards."""
    from outgrow.growth import grow

    worker = None if count == 1 else f"0/{count}"
    grow(
        source,
        out,
        target=growth_of(name)[1],
        operator="lossless",
        noise=0.5,
        receipt=False,
        threads=2,
        worker=worker,
    )


CHILDREN = {"make-source": make_source, "grow-share": grow_share}


def measure(work: Path) -> dict[str, Any]:
    """The peak memory of every row's growth."""
    from outgrow.model.base.machine import machine

    rows = {}
    for name in SOURCES:
        shutil.rmtree(work, ignore_errors=True)
        row = figures(name)
        count = 1 if row["target_bytes"] < SHARE_BYTES else row["shards"]
        try:
            measured([sys.executable, __file__, "--child", "make-source", str(work / "source"), name])
            run = measured(
                [
                    sys.executable,
                    __file__,
                    "--child",
                    "grow-share",
                    str(work / "source"),
                    str(work / "out"),
                    name,
                    str(count),
                ]
            )
        finally:
            shutil.rmtree(work, ignore_errors=True)
        rows[name] = {"peak_bytes": run.peak_bytes, "workers": count}
        print(f"{name}: peak {run.peak_bytes / 1e6:.0f} MB, worker 0 of {count}", flush=True)
    return {"machine": machine(), "rows": rows}


# ---- the table ---------------------------------------------------------------------------------------------


def minutes(nbytes: int, bench: Mapping[str, Any]) -> float:
    """Start-up, and the bytes at the rate of the benchmark's growth."""
    start = bench["seconds"]["start-up"]
    rate = bench["bytes"]["growth"] / (bench["seconds"]["growth"] - start)
    return float(start + nbytes / rate) / 60


def shown(value: float) -> str:
    """Minutes to a tenth."""
    return "under 0.1" if value < 0.05 else f"{value:.1f}"


def table(peaks: Mapping[str, Any], bench: Mapping[str, Any]) -> str:
    """The rows as Markdown."""
    rate = bench["bytes"]["growth"] / (bench["seconds"]["growth"] - bench["seconds"]["start-up"]) / 1e9
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---:|" * len(HEADINGS)]
    for name in SOURCES:
        row, peak = figures(name), peaks["rows"][name]["peak_bytes"]
        source, target = row["source_parameters"], row["target_parameters"]
        cells = [
            f"{source / 1e9:.2f} B",
            f"{target / 1e9:.2f} B",
            f"{2 * source / 1e9:,.1f} GB",
            f"{row['target_bytes'] / 1e9:,.1f} GB",
            str(row["shards"]),
            f"{peak / 1e6:.0f} MB",
            shown(minutes(row["target_bytes"], bench)),
            shown((2 * source + row["target_bytes"]) / DISK_RATE / 60),
            f"{4 * target / 1e9:,.0f} GB in float32, {8 * target / 1e9:,.0f} GB in float64",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rates = (
        f"{rate:.2f} GB/s of result, measured at {bench['bytes']['growth'] / 1e9:.1f} GB in float16 with "
        "the source in the page cache"
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Rate: {rates}. Machine: {bench['machine']}; memory measured on: {peaks['machine']}.",
            "",
        ]
    )


def main() -> None:
    """Measure where asked to, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measure", action="store_true", help="measure the peak memory again, into grow_sizes.json"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/grow-sizes"), help="a folder for 6 GB, removed at the end"
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        command, *arguments = options.child
        paths = [
            Path(value) if "/" in value else int(value) if value.isdecimal() else value for value in arguments
        ]
        CHILDREN[command](*paths)  # type: ignore[operator]
        return
    stored = HERE / "grow_sizes.json"
    if options.measure:
        stored.write_text(json.dumps(measure(options.work.absolute()), indent=1) + "\n")
    before, rest = PAGE.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    text = table(json.loads(stored.read_text()), json.loads((HERE / "bench_growth.json").read_text()))
    PAGE.write_text(before + MARKS[0] + text + MARKS[1] + after)
    print(text)


if __name__ == "__main__":
    main()
