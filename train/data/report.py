"""What a prepared folder says of itself, in a few lines."""

from __future__ import annotations

from pathlib import Path

from train.data.shards import read_manifest


def report(folder: Path) -> str:
    """What was read, what was left out and why, what is there."""
    manifest = read_manifest(folder)
    assert manifest is not None
    read = manifest["read"]
    lines = [f"{folder}: read {read['documents']:,} documents, {read['bytes']:,} bytes of text"]
    lines += [f"  {key.replace('_', ' ')}: {read[key]:,}" for key in ("empty_skipped", "too_long_skipped", "utf8_replaced") if read[key]]
    for reason, count in manifest["cleaning"]["removed"].items():
        lines.append(f"  removed, {reason.replace('_', ' ')}: {count['documents']:,} documents, {count['bytes']:,} bytes (removed.parquet)")
    for name, split in manifest["splits"].items():
        lines.append(f"  {name}: {split['documents']:,} documents, {split['tokens']:,} tokens in {len(split['shards'])} shards")
    return "\n".join([*lines, f"  fingerprint {manifest['fingerprint']}"])
