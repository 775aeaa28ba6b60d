"""Over how many of transformers' causal language models is lossless growth confirmed, without a schema
written for them?

python benchmarks/count_architectures.py                     10 minutes on 2 cores: a table, and
                                                             count_architectures.json here
python benchmarks/count_architectures.py --types mpt falcon  some of them; with --out FILE they replace theirs
                                                             in a file that is there

Every model type of the library gets its default config shrunken (a few with what their class insists on:
`SAID`), a schema derived from the library's own class (also where the project has one: it is not used), and a
tiny random model in float64 grown by it, axis by axis. An axis counts when the logits stay; a type counts
when its hidden width does, and when the schema covers every tensor of the default config at its own size
(built on the meta device, where the library builds it at all). What is refused is listed with the reason.
Each type runs in a process of its own, under a time limit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from outgrow.growth.rehearse import Bench, bench
from outgrow.model.base.errors import UserError
from outgrow.model.derive import Draft, derive, drafted_family, shapes, whole_config
from outgrow.model.family import Config

HERE = Path(__file__).resolve().parent
INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
# What a default config leaves open although its class does not build or run without it; every checkpoint says
# it.
SAID: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000.0}},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "lfm2_moe": {
        "layer_types": ["full_attention" if layer % 4 == 2 else "conv" for layer in range(32)]},
    "granitemoehybrid": {
        "layer_types": ["full_attention" if layer % 10 == 5 else "linear_attention" for layer in range(32)]
    },
    "qwen4_exp": {"text_config": {"model_type": "qwen4_exp_text", **INDEXED}},
    "qwen4_exp_text": INDEXED,
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "num_buckets": 4,
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4
    },
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
Attempt = tuple[str, dict[str, int], str]  # in words, the tiny config's new sizes, the layer map


def attempts(draft: Draft) -> dict[str, list[Attempt]]:
    """Axis → growths that would confirm it, the strongest statement first."""
    axes, keys = draft.axes, draft.axes.keys
    by_heads, by_head_dims = axes.width_keys, axes.stream_keys
    width = [
        ("any ratio", axes.times(1.5, *by_heads)),
        ("any ratio, heads fixed", axes.times(1.5, *by_head_dims)),
    ]
    width += [
        ("whole factors", axes.times(2, *by_heads)),
        ("whole factors, heads fixed", axes.times(2, *by_head_dims)),
    ]
    with_heads = ("whole factors, heads with it", axes.times(2, *by_head_dims, *axes.head_keys))
    asked = {
        "hidden width": width if axes.coupled else [width[0], width[2], with_heads],
        "heads": [
            ("any ratio", axes.times(1.5, *axes.head_keys)),
            ("whole factors", axes.times(2, *axes.head_keys)),
        ],
    }
    if axes.coupled:  # heads grow with the width or not at all
        asked["heads"] = [
            ("with the width", changes) for word, changes in width if "fixed" not in word and axes.keys.heads
        ]
    for key in filter(None, (keys.ffn, *keys.more)):
        asked[key] = [("any ratio", axes.times(1.5, key)), ("whole factors", axes.times(2, key))]
    deeper = {keys.layers: int(axes.config[keys.layers]) + 1}
    found = {
        axis: [(word, changes, "identity") for word, changes in tried if changes]
        for axis, tried in asked.items()
    }
    return found | {"depth": [("anywhere", deeper, "identity"), ("on top", deeper, "identity_top")]}


def confirm(tiny: Bench, draft: Draft, tried: list[Attempt]) -> dict[str, Any]:
    """The first attempt that keeps the logits, else the reason why the first one does not, of those that run
    at all if any does."""
    reasons = []
    for word, changes, depth in tried:
        try:
            rehearsal = tiny.rehearse(draft, changes, depth)
        except UserError as fault:
            reasons.append(str(fault))
            continue
        sizes = {key: [draft.axes.config[key], size] for key, size in changes.items()}
        return {"confirmed": word, "error": rehearsal.error, "sizes": sizes}
    reason = next((reason for reason in reasons if "logits" in reason), reasons[0])
    return {"refused": reason.replace(str(tiny.folder), "…")[:300]}


def covers(draft: Draft, config: Config) -> bool:
    """Check whether the schema was held against the default config's own tensors; False where the library
    does not build it.

    Raises:
        UserError: a tensor has no counterpart in the tiny model, or another shape than the schema says.
    """
    try:
        built = shapes(whole := whole_config(config))
    except UserError:
        return False
    family = drafted_family(draft, whole, built)
    if {tensor.name: tensor.shape for tensor in family.tensors(whole)} != built:
        raise UserError(
            "at the default config's own size the schema gives other shapes than the library's class"
        )
    return True


def examine(name: str) -> dict[str, Any]:
    """Confirm what can be confirmed of one model type."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[name](**SAID.get(name, {})).to_dict()
        draft = derive(config)
        covered = covers(draft, config)
        with bench(draft) as tiny:
            found = {axis: confirm(tiny, draft, tried) for axis, tried in attempts(draft).items() if tried}
    except UserError as fault:
        return {"refused": str(fault)[:300]}
    except Exception as fault:  # the library's default config does not build
        return {"refused": f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"}
    kept = {
        axis: story
        for axis, story in found.items()
        if not story.get("refused", "").startswith("nothing grows")
    }
    said = {"said": SAID[name]} if name in SAID else {}
    story: dict[str, Any] = {**said, "axes": kept, "held against the default config": covered}
    return (
        story
        if "confirmed" in kept["hidden width"]
        else {**story, "refused": kept["hidden width"]["refused"]}
    )


def _child(name: str, pipe: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library's own warnings
    started = time.perf_counter()
    story = examine(name)
    pipe.send({**story, "seconds": round(time.perf_counter() - started, 1)})


def in_processes(
    child: Callable[[str, Connection], None], names: list[str], jobs: int, limit: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every name with what `child` sends of it, as they finish; `jobs` at a time, each for `limit` seconds at
    most."""
    context = multiprocessing.get_context("fork")  # the library is imported once
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(name := waiting.pop(), theirs))
            process.start()
            theirs.close()
            running[mine] = (name, process, time.monotonic() + limit)
        ready = wait(
            list(running), timeout=max(0.0, min(end for _, _, end in running.values()) - time.monotonic())
        )
        for pipe in [
            pipe for pipe, (_, _, end) in running.items() if pipe in ready or time.monotonic() >= end
        ]:
            name, process, _ = running.pop(pipe)
            try:
                yield name, pipe.recv() if pipe in ready else {"refused": f"took longer than {limit:g} s"}
            except EOFError:
                yield name, {"refused": "its process ended early"}
            process.kill()
            process.join()
            pipe.close()


def table(stories: dict[str, dict[str, Any]]) -> str:
    """One line per confirmed type, then one per refused type."""

    def said(story: dict[str, Any], axis: str) -> str:
        return story["axes"].get(axis, {}).get("confirmed", "–")

    def more(story: dict[str, Any]) -> str:
        sizes = [
            axis
            for axis, found in story["axes"].items()
            if axis not in ("hidden width", "heads", "depth") and "confirmed" in found
        ]
        return ", ".join(f"`{size}`" for size in sizes) or "–"

    lines = [
        "| model type | hidden width | max Δlogit / largest | heads | feed-forward | depth |",
        "|---|---|---:|---|---|---|",
    ]
    for name, story in stories.items():
        if "refused" not in story:
            width, heads, depth = (said(story, axis) for axis in ("hidden width", "heads", "depth"))
            lines.append(
                f"| {name} | {width} | {story['axes']['hidden width']['error']:.0e} | {heads} | "
                f"{more(story)} | {depth} |"
            )
    lines += ["", "| refused | reason |", "|---|---|"]
    lines += [
        f"| {name} | {story['refused'].replace('|', '/')[:160]} |"
        for name, story in stories.items()
        if "refused" in story
    ]
    return "\n".join(lines)


def summary(stories: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Count the types, and those that are confirmed on each axis."""
    confirmed = [story["axes"] for story in stories.values() if "refused" not in story]

    def count(fits: Any) -> int:
        return sum(1 for axes in confirmed if fits(axes))

    return {
        "types": len(stories),
        "hidden width": len(confirmed),
        "hidden width at any ratio": count(
            lambda axes: axes["hidden width"]["confirmed"].startswith("any ratio")
        ),
        "heads too": count(lambda axes: "confirmed" in axes.get("heads", {})),
        "feed-forward too": count(
            lambda axes: any(
                "confirmed" in axes[axis] for axis in axes.keys() - {"hidden width", "heads", "depth"}
            )
        ),
        "depth too": count(lambda axes: "confirmed" in axes["depth"]),
        "held against the default config": sum(
            1
            for story in stories.values()
            if "refused" not in story and story["held against the default config"]
        ),
    }


def main() -> None:
    """The door."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=180, help="limit for one type")
    parser.add_argument(
        "--out", type=Path, help="default: count_architectures.json beside this file, when all types are run"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    found = {}
    for name, story in in_processes(_child, options.types, options.jobs, options.seconds):
        found[name] = story
        print(
            f"{len(found)}/{len(options.types)} {name}: {story.get('refused', 'confirmed')[:100]}",
            file=sys.stderr,
            flush=True,
        )
    earlier = json.loads(options.out.read_text())["types"] if options.out and options.out.exists() else {}
    stories = earlier | {name: found[name] for name in options.types}
    counts = summary(stories)
    versions = {package: importlib.metadata.version(package) for package in ("transformers", "torch")}
    print(table(stories), "\n", json.dumps(counts), sep="\n")
    out = options.out or (
        HERE / "count_architectures.json"
        if set(options.types) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        else None
    )
    if out:
        result = {
            "versions": versions,
            "python": platform.python_version(),
            "summary": counts,
            "types": stories,
        }
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
