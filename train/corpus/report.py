"""Reports of the commands of `outgrow corpus` when they are done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from outgrow.train.data.shards import read_manifest


def short_lines(manifest: Any) -> list[str]:
    """Lines on what was asked for and not there."""
    short = manifest["short"].items()
    return [
        f"the text ended early: data.{key}={amount['asked']:,}, and there were {amount['found']:,}"
        for key, amount in short
    ]


def prepared(folder: Path) -> str:
    """Lines on what was read, what was left out and why, and what is there."""
    manifest = read_manifest(folder)
    assert manifest is not None
    read = manifest["read"]
    cleaning = manifest["cleaning"]
    documents = f"{read['documents']:,}"
    size = f"{read['bytes']:,}"
    lines = [f"{folder}: read {documents} documents, {size} bytes of text"]
    lines += [
        f"  {key.replace('_', ' ')}: {read[key]:,}"
        for key in read
        if key not in ("documents", "bytes") and read[key]
    ]
    lines += [f"  {line}" for line in short_lines(manifest)]
    for reason, count in cleaning["removed"].items():
        lines.append(
            f"  removed, {reason.replace('_', ' ')}: {count['documents']:,} documents, {count['bytes']:,} "
            "bytes (removed.parquet)"
        )
    if cut := cleaning.get("filter"):
        lines.append(
            f"  filter: kept {cut['kept']:,} of {cut['scored']:,} documents, those of score "
            f"{cut['threshold']:.3f} and more"
        )
    if across := cleaning.get("near_copies_across"):
        near = f"{across['near_training']:,} of {across['validation_documents']:,}"
        lines.append(f"  near copies in training: {near} validation documents looked at")
    for name, split in manifest["splits"].items():
        lines.append(
            f"  {name}: {split['documents']:,} documents, {split['tokens']:,} tokens in "
            f"{len(split['shards'])} shards"
        )
    return "\n".join([*lines, f"  fingerprint {manifest['fingerprint']}"])


def fitted(folder: str, card: dict[str, Any]) -> str:
    """Lines on how a filter does on the labels held out."""
    result = card["held_out"]
    labels = card["labels"]
    lines = [
        (
            f"{folder}: {card['forest']['trees']} trees on {card['embedding']['dimensions']} dimensions of "
            f"{card['embedding']['encoder']}; {labels['samples']} labels, {labels['positive']} of them 1"
        ),
        (
            f"  held out: {result['samples']} samples, {result['positive']} of them 1; at a score of 0.5 "
            f"precision {result['precision']}, recall {result['recall']}"
        ),
    ]
    lines += [
        f"  the best {row['kept']:.0%}: precision {row['precision']}, recall {row['recall']}"
        for row in result["best"]
    ]
    brier = result["brier"]
    error = result["calibration_error"]
    lines.append(f"  calibration: Brier score {brier}, mean |score − share of 1| {error}")
    lines += [
        (
            f"    mean score {row['mean_score']:.2f}: {row['share_positive']:.2f} are 1, of "
            f"{row['samples']} samples"
        )
        for row in result["calibration"]
    ]
    return "\n".join(lines)


def scored(file: str, histogram: np.ndarray) -> str:
    """The histogram of scores, 20 bins from 0 to 1, as text."""
    most = max(1, int(histogram.max()))
    total = int(histogram.sum())
    rows = [
        f"  {i / 20:.2f}–{(i + 1) / 20:.2f} {count:>9,} {'█' * round(40 * count / most)}"
        for i, count in enumerate(histogram.tolist())
    ]
    return "\n".join([f"{file}: {total:,} documents", *rows])
