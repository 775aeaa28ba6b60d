"""Time files of text to tokens on disk, end to end: `prepare` beside plain datatrove and `datasets.map`, with
one process and with two.

make bench-data                                        some minutes: a table, and benchmarks/bench_data.json
python benchmarks/bench_data.py --megabytes 8 --rounds 1      a quick look

The text is the Python source of this interpreter and its packages, as JSON lines in 16 files; the tokenizer a
byte-level BPE trained on it. Each contestant is a fresh process that reads the files, cuts the text with that
tokenizer and writes tokens; the clock starts before its imports. The second task removes near duplicates
first: datatrove's four MinHash steps, given the same splitter into words, and ours. Memory is the most that a
process and its workers hold together (proportional set size where the system tells it), sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILES = 16
SIMILARITY = 0.8


def texts(megabytes: int) -> Iterator[str]:
    """Python sources, the standard library's first, until there are so many megabytes."""
    size = 0
    for folder in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(folder).rglob("*.py")):
            text = path.read_bytes().decode(errors="replace")
            if text.strip():
                yield text
                size += len(text.encode())
            if size >= megabytes * 10**6:
                return


def put_down(folder: Path, megabytes: int, vocab_size: int) -> int:
    """Write the files, and the tokenizer; return the bytes of text."""
    from outgrow.train.data.tokenizer import save_tokenizer, train_tokenizer

    documents = list(texts(megabytes))
    (folder / "texts").mkdir(parents=True)
    for number in range(FILES):
        lines = [json.dumps({"text": text}) for text in documents[number::FILES]]
        (folder / "texts" / f"{number:02d}.jsonl").write_text("\n".join(lines))
    save_tokenizer(
        train_tokenizer(documents, vocab_size=vocab_size, model_max_length=2048), folder / "tokenizer"
    )
    return sum(len(text.encode()) for text in documents)


# ---- contestants -------------------------------------------------------------------------------------------


def ours(folder: Path, processes: int, near: float | None) -> None:
    from outgrow.train.corpus import prepare
    from outgrow.train.data.settings import CleaningSettings, DataSettings

    clean, tokenizer = CleaningSettings(near_duplicates=near), str(folder / "tokenizer")
    out = {
        "folder": str(folder / "out"),
        "path": str(folder / "texts"),
        "tokenizer": tokenizer,
        "workers": processes,
    }
    prepare(DataSettings("bench", "files", clean=clean, **out), progress=False)  # type: ignore[arg-type]


def datatrove(folder: Path, processes: int, near: float | None) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.hashing import HashConfig

    work, reader = folder / "out", lambda: JsonlReader(str(folder / "texts"))

    def run(name: str, steps: list[Any], tasks: int) -> None:
        LocalPipelineExecutor(steps, tasks=tasks, workers=processes, logging_dir=str(work / name)).run()

    keep: list[Any] = []
    if near is not None:
        # its xxhash is one below 4
        config = MinhashConfig(num_buckets=14, hashes_per_bucket=9, hash_config=HashConfig(hash_fc="sha1"))
        run("sign", [reader(), signature(str(work / "sig"), config)], FILES)
        run(
            "buckets",
            [MinhashDedupBuckets(str(work / "sig"), str(work / "buckets"), config=config)],
            config.num_buckets,
        )
        run("cluster", [MinhashDedupCluster(str(work / "buckets"), str(work / "remove"), config=config)], 1)
        keep = [MinhashDedupFilter(str(work / "remove"))]
    options = {"eos_token": "<|endoftext|>", "shuffle_documents": False, "batch_size": 1000}
    tokens = DocumentTokenizer(
        str(work / "tokens"), tokenizer_name_or_path=str(folder / "tokenizer" / "tokenizer.json"), **options
    )
    run("tokenise", [reader(), *keep, tokens], FILES)


def signature(folder: str, config: Any) -> Any:
    """datatrove's first step, with our splitter in the place of spaCy's: 50 times the packages otherwise."""
    from datatrove.pipeline.dedup import minhash

    minhash.load_word_tokenizer = lambda language: Splitter()
    return minhash.MinhashDedupSignature(folder, config=config)


class Splitter:
    """Words as `near_duplicates` has them."""

    def word_tokenize(self, text: str) -> list[str]:
        from outgrow.train.corpus.words import words

        return words(text)


def datasets(folder: Path, processes: int, near: float | None) -> None:
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    files, cache = sorted(map(str, (folder / "texts").glob("*"))), str(folder / "out" / "cache")
    rows = load_dataset(
        "json",
        data_files=files,
        split="train",
        cache_dir=cache,
        num_proc=processes if processes > 1 else None,
    )
    cut = rows.map(
        lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        remove_columns=rows.column_names,
        num_proc=processes if processes > 1 else None,
    )
    cut.save_to_disk(folder / "out" / "saved")


CONTESTANTS: dict[str, Callable[[Path, int, float | None], None]] = {
    "prepare": ours,
    "datatrove": datatrove,
    "datasets.map": datasets,
}
TASKS = {
    "tokenise": (None, ("prepare", "datatrove", "datasets.map")),
    "near duplicates, tokenise": (SIMILARITY, ("prepare", "datatrove")),
}


# ---- measuring ---------------------------------------------------------------------------------------------


def timed(name: str, processes: int, near: float | None, folder: Path) -> tuple[float, float, float]:
    """Seconds of wall time and of CPU time (which tells more on a busy machine), and megabytes at most, of
    one contestant's processes."""
    import resource

    import psutil

    shutil.rmtree(folder / "out", ignore_errors=True)
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        "--processes",
        str(processes),
        "--near",
        str(near or 0),
        "--work",
        str(folder),
    ]
    started, before, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN), 0.0
    log = folder / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    while process.poll() is None:
        peak = max(
            peak, sum(map(memory, [(root := psutil.Process(process.pid)), *root.children(recursive=True)]))
        )
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{log.read_text()[-2000:]}")
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak / 2**20


def memory(process: Any) -> int:
    """Bytes that a process holds, shared ones by its part."""
    import psutil

    try:
        return int(process.memory_full_info().pss)
    except (psutil.Error, AttributeError):
        return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    folder = options.work.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    size = put_down(folder, options.megabytes, options.vocab_size)
    rows = []
    for task, (near, names) in TASKS.items():
        for processes in (1, 2):
            taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
            for number in range(options.rounds):
                for name in names:
                    taken[name].append(timed(name, processes, near, folder))
                    print(
                        f"{task}, {processes}: round {number}, {name} {taken[name][-1][0]:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
            for name, values in taken.items():
                seconds, cpu = (statistics.median(value[i] for value in values) for i in (0, 1))
                rows.append(
                    {
                        "task": task,
                        "processes": processes,
                        "who": name,
                        "seconds": round(seconds, 2),
                        "cpu_seconds": round(cpu, 2),
                        "megabytes_per_second": round(size / 1e6 / seconds, 2),
                        "peak_megabytes": round(max(value[2] for value in values)),
                    }
                )
    from outgrow.model.base.machine import machine

    facts = {"machine": machine(), "load_average": os.getloadavg(), "rounds": options.rounds}
    return {**facts, "bytes": size, "vocab_size": options.vocab_size, "rows": rows}


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/bench-data"),
        help="a folder for some hundred MB, removed at the end",
    )
    parser.add_argument("--out", type=Path, default=HERE / "bench_data.json")
    for hidden in ("--one", "--processes", "--near"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        CONTESTANTS[options.one](options.work, int(options.processes), float(options.near) or None)
        return
    try:
        result = measure(options)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['machine']}, load {result['load_average'][0]:.1f}, medians of {result['rounds']} rounds, "
        f"{result['bytes']:,} bytes\n"
    )
    print(
        "| task | processes | | MB of text a second | MB a second of CPU | peak MB "
        "|\n|---|---:|---|---:|---:|---:|"
    )
    for row in result["rows"]:
        rates = f"{row['megabytes_per_second']:.2f} | {result['bytes'] / 1e6 / row['cpu_seconds']:.2f}"
        print(f"| {row['task']} | {row['processes']} | {row['who']} | {rates} | {row['peak_megabytes']:,} |")


if __name__ == "__main__":
    main()
