"""mergekit's merges beside growth, in a virtual environment of its own: passthrough beside growth in depth
alone, the same layers; a mixture of experts beside upcycling.

mergekit pins neither torch nor what it needs at run time, and must not change the environment that is being
measured.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REQUIREMENTS = ("torch==2.13.0", "mergekit==0.1.5")
# mergekit keeps a whole shard in memory; the smallest that it writes a checkpoint of this size with in one go
SMALL_SHARDS = "100M"


def environment(folder: Path) -> Path | None:
    """`mergekit-yaml` in a virtual environment under `folder`, made when it is not there; None, with a
    message, where that fails."""
    command = folder / "bin" / "mergekit-yaml"
    if command.exists():
        return command
    print(f"installing {' '.join(REQUIREMENTS)} into {folder}", flush=True)
    python = str(folder / "bin" / "python")
    for step in (
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS],
    ):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(
                f"mergekit is left out: {' '.join(step[1:4])} … ended with status {done.returncode}: {last}",
                flush=True,
            )
            return None
    return command


def passthrough(folder: Path, source: Path, layers: list[int]) -> Path:
    """mergekit's description of the same growth in depth: source layers by target layer, as slices of
    consecutive ones."""
    starts = [number for number, layer in enumerate(layers) if number == 0 or layer != layers[number - 1] + 1]
    lines = ["merge_method: passthrough", "dtype: float16", "slices:"]
    for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
        lines += [
            "- sources:",
            f"  - model: {source.resolve()}",
            f"    layer_range: [{layers[start]}, {layers[stop - 1] + 1}]",
        ]
    path = folder / "passthrough.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def mixture(folder: Path, source: Path, experts: int) -> Path:
    """mergekit's description of a mixture of which every expert is the source's MLP, its routers random."""
    lines = [
        f"base_model: {source.resolve()}",
        "gate_mode: random",
        "dtype: float16",
        "experts_per_token: 2",
        "experts:",
        *[f"- source_model: {source.resolve()}"] * experts,
    ]
    path = folder / "mixture.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def mixture_command(mergekit: Path, recipe: Path, out: Path) -> list[str]:
    """The merge of a mixture's `recipe` into `out`."""
    return [str(mergekit.with_name("mergekit-moe")), str(recipe), str(out), "--no-copy-tokenizer"]


def passthrough_command(mergekit: Path, recipe: Path, out: Path, *, small: bool = False) -> list[str]:
    """The merge of `recipe` into `out`; `small` keeps its memory lowest."""
    return [
        str(mergekit),
        str(recipe),
        str(out),
        "--no-copy-tokenizer",
        *(["--out-shard-size", SMALL_SHARDS] if small else []),
    ]
