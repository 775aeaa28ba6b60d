"""Near duplicates by our step and by datatrove's, against brute force; and what each does when a worker is
killed.

python benchmarks/bench_duplicates.py        a minute: a table, and benchmarks/bench_duplicates.json

Texts of 200 words, each with some words of an earlier one exchanged, so that similarities (Jaccard, 5-word
shingles) of 0.3 to 1 occur. A document *is* near where an earlier one has a similarity of 0.8 or more.
Recall: of those, how many are removed. Precision: of those removed, how many have a document that stays and
has a similarity of 0.75 or more (an estimate from 128 values is some 0.04 off).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
NEAR, ALMOST, WORDS, PATIENCE_SECONDS = 0.8, 0.75, 200, 120
NOTE = "NOTE_OF_KILLED_WORKER"  # of the environment: the file whose time is that of the first kill


def edited(count: int, letters: Callable[[int], str], seed: int = 0) -> list[list[str]]:
    """Lists of words, a quarter new, the rest earlier ones with up to 20 words exchanged."""
    numbers = np.random.default_rng(seed)
    texts = [[letters(n) for n in numbers.integers(0, 5000, WORDS)] for _ in range(count // 4)]
    while len(texts) < count:
        text = list(texts[numbers.integers(len(texts))])
        for place in numbers.integers(0, WORDS, numbers.integers(0, 21)):
            text[place] = letters(int(numbers.integers(0, 5000)))
        texts.append(text)
    return texts


def spelt(number: int) -> str:
    """A word of letters alone: datatrove takes all numbers for one."""
    return "".join(chr(97 + number // 26**place % 26) for place in range(4))


def similarities(texts: list[list[str]]) -> np.ndarray:
    """Jaccard similarity of every pair, (n, n)."""
    shingles = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in texts]
    numbers = {
        shingle: number for number, shingle in enumerate(dict.fromkeys(s for each in shingles for s in each))
    }
    from scipy.sparse import csr_matrix

    rows = [row for row, each in enumerate(shingles) for _ in each]
    columns = [numbers[shingle] for each in shingles for shingle in each]
    matrix = csr_matrix((np.ones(len(rows), np.int32), (rows, columns)))
    common, sizes = (matrix @ matrix.T).toarray(), np.array([len(each) for each in shingles])
    return common / (sizes[:, None] + sizes[None, :] - common)


def judged(removed: set[int], alike: np.ndarray) -> dict[str, Any]:
    """Recall and precision of the documents removed."""
    count = len(alike)
    near = {i for i in range(count) if (alike[i, :i] >= NEAR).any()}
    stays = np.array([i not in removed for i in range(count)])
    right = {i for i in removed if (alike[i, stays] >= ALMOST).any()}
    return {
        "near": len(near),
        "removed": len(removed),
        "recall": share(removed & near, near),
        "precision": share(right, removed),
    }


def share(part: set[int], whole: set[int]) -> float:
    return round(len(part) / max(1, len(whole)), 3)


# ---- whose -------------------------------------------------------------------------------------------------


def ours(lines: list[str], folder: Path) -> set[int]:
    """Numbers of the lines that `prepare` removes."""
    import pyarrow.parquet

    from outgrow.train.corpus import prepare
    from outgrow.train.data.settings import CleaningSettings, DataSettings

    clean, place = (
        CleaningSettings(near_duplicates=NEAR),
        {"path": str(folder / "a.jsonl"), "folder": str(folder / "ours")},
    )
    prepare(DataSettings("t", "files", clean=clean, workers=1, vocab_size=300, **place), progress=False)  # type: ignore[arg-type]
    names = pyarrow.parquet.read_table(folder / "ours" / "removed.parquet")["document"].to_pylist()
    return {int(name.split(":")[1]) - 1 for name in names}


def datatrove(lines: list[str], folder: Path, rows: int) -> set[int]:
    """Numbers of the lines that datatrove's four steps remove, with 14 buckets of so many hashes."""
    from bench_data import signature
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(num_buckets=14, hashes_per_bucket=rows, hash_config=HashConfig(hash_fc="sha1"))
    work = folder / f"theirs{rows}"
    reader = JsonlReader(str(folder), glob_pattern="a.jsonl")
    kept = [MinhashDedupFilter(str(work / "remove")), JsonlWriter(str(work / "kept"), compression=None)]
    steps: list[tuple[list[Any], int]] = [
        ([reader, signature(str(work / "sig"), config)], 1),
        ([MinhashDedupBuckets(str(work / "sig"), str(work / "buckets"), config=config)], 14),
        ([MinhashDedupCluster(str(work / "buckets"), str(work / "remove"), config=config)], 1),
        ([reader, *kept], 1),
    ]
    for number, (pipeline, tasks) in enumerate(steps):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(work / str(number))).run()
    stays = [
        json.loads(line)["id"]
        for path in (work / "kept").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return set(range(len(lines))) - {int(name.rsplit("/", 1)[1]) for name in stays}


# ---- a worker that is killed -------------------------------------------------------------------------------


def killed(data: Any, rank: int, world_size: int) -> Any:
    """A step that notes the time, and ends its process as the system does for want of memory."""
    note = Path(os.environ[NOTE])
    if not note.exists():
        note.touch()
    os.kill(os.getpid(), 9)


def theirs_killed(folder: str) -> None:
    from datatrove.executor import LocalPipelineExecutor

    LocalPipelineExecutor([killed], tasks=2, workers=2, logging_dir=folder).run()


def ours_killed(folder: str) -> None:
    from outgrow.model.base.errors import UserError
    from outgrow.train.corpus.executors import stages
    from outgrow.train.corpus.settings import ExecutorSettings

    try:
        with stages(ExecutorSettings(), 2, Path(folder), progress=False) as stage:
            stage("killed", [killed], 2)  # type: ignore[list-item]
    except UserError:
        return
    raise AssertionError("not told")


def seconds_until_told(work: Callable[[str], None]) -> float | None:
    """The seconds that a run goes on after its first worker is killed; None where that is over
    PATIENCE_SECONDS.
    """
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "killed")
        os.environ[NOTE] = str(note)  # the workers inherit it
        process = multiprocessing.get_context("spawn").Process(target=work, args=(folder,))
        process.start()
        while not note.exists() and process.is_alive():
            time.sleep(0.05)
        process.join(PATIENCE_SECONDS)
        if process.is_alive():
            process.kill()
            return None
        return round(time.time() - note.stat().st_mtime, 1)


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=HERE / "bench_duplicates.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"documents": options.documents, "near": NEAR, "almost": ALMOST, "scripts": {}}
    for script, letters, between in (("Latin", spelt, " "), ("Han", lambda n: chr(0x4E00 + n), "")):
        texts = edited(options.documents, letters)
        lines, alike = [between.join(text) for text in texts], similarities(texts)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
            result["scripts"][script] = {
                "ours": judged(ours(lines, folder), alike),
                "datatrove, 14 × 8 (its default)": judged(datatrove(lines, folder, 8), alike),
                "datatrove, 14 × 9": judged(datatrove(lines, folder, 9), alike),
            }
    told = {"ours": seconds_until_told(ours_killed), "datatrove": seconds_until_told(theirs_killed)}
    result["seconds_until_a_killed_worker_is_told"] = told
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"a killed worker is told after so many seconds (None: not within {PATIENCE_SECONDS}): {told}")


def table(result: dict[str, Any]) -> str:
    """The rows of every script, as Markdown."""
    lines = ["| script | whose | near | removed | recall | precision |", "|---|---|---:|---:|---:|---:|"]
    for script, rows in result["scripts"].items():
        for name, row in rows.items():
            counts, shares = (
                f"{row['near']} | {row['removed']}",
                f"{row['recall']:.3f} | {row['precision']:.3f}",
            )
            lines.append(f"| {script} | {name} | {counts} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
