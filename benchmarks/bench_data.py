"""Tokenising with `prepare` against `tokenizers.encode_batch` alone, on the same cores and text, in interleaved rounds.

make bench-data                                        some minutes: a table, and benchmarks/bench_data.json
python benchmarks/bench_data.py --megabytes 16 --rounds 1     a quick look

The text is the Python source of this interpreter and its packages, the tokenizer a byte-level BPE trained on it. `encode_batch` is given
texts that are in memory already, keeps nothing, and runs its own threads on all cores; `encode_batch_fast` is the same without offsets.
`prepare` reads its blocks from disk, tokenises them in as many processes as there are cores, and writes shards and their hashes; its
workers have been started before the clock does, as they have been when a preparation comes to tokenising.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from outgrow.model.base.files import write_json, write_text
from outgrow.train.data.blocks import Workshop, in_blocks, stage
from outgrow.train.data.document import Document, Tally
from outgrow.train.data.pack import ENCODER, pack
from outgrow.train.data.settings import CleaningSettings, DataSettings
from outgrow.train.data.shards import dtype_of
from outgrow.train.data.tokenizer import entries, read_encoder, train_tokenizer, write_encoder
from outgrow.train.data.workers import Run, cores, workers

HERE = Path(__file__).resolve().parent
CHUNK_BYTES = 2**24  # of text, for one call of encode_batch


def texts(megabytes: int) -> Iterator[Document]:
    """Python sources, the standard library's first, until there are so many megabytes."""
    size = 0
    for folder in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(folder).rglob("*.py")):
            text = path.read_bytes().decode(errors="replace")
            if text.strip():
                yield Document(str(path), text, len(text.encode()))
                size += len(text.encode())
            if size >= megabytes * 10**6:
                return


def chunks(documents: list[Document]) -> list[list[str]]:
    """Texts in lists of some CHUNK_BYTES."""
    found, size = [list[str]()], 0
    for document in documents:
        if size >= CHUNK_BYTES:
            found.append([])
            size = 0
        found[-1].append(document.text)
        size += document.bytes
    return found


def put_down(work: Workshop, documents: list[Document]) -> None:
    """The blocks of the text, as reading would leave them."""
    blocks, tally = [], Tally()
    for number, block in enumerate(in_blocks(iter(documents), tally)):
        blocks.append(stage(work, number, *block, CleaningSettings())[0])
    write_json(work.read, {"blocks": blocks, "tally": {}})


def packed(work: Workshop, folder: Path, vocab_size: int, run: Run) -> int:
    """Tokenise and pack everything, as `prepare` does; the tokens written."""
    for place in (folder, work.folder / "ids", work.folder / "lengths"):
        shutil.rmtree(place, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = DataSettings("bench", "stdlib")
    writers = pack(folder, work, lambda n: np.ones(work.blocks[n], bool), settings, dtype_of(vocab_size), 0, run, lambda *_: None)
    return sum(writer.tokens for writer in writers.values())


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time of this process and its workers: the second tells more on a machine that others use too."""
    started, spent = time.perf_counter(), cpu_seconds()
    action()
    return time.perf_counter() - started, cpu_seconds() - spent


def cpu_seconds() -> float:
    import psutil

    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (here, *here.children()))


def machine() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {cores()} cores, Linux {platform.release()}"


def measure(options: argparse.Namespace) -> dict[str, object]:
    documents = list(texts(options.megabytes))
    size = sum(document.bytes for document in documents)
    tokenizer = train_tokenizer((document.text for document in documents), vocab_size=options.vocab_size, model_max_length=2048)
    alone, parts = read_encoder(write_encoder(tokenizer)), chunks(documents)
    work = Workshop(options.work / "work")
    put_down(work, documents)
    write_text(work.folder / ENCODER, write_encoder(tokenizer))
    taken: dict[str, list[tuple[float, float]]] = {"encode_batch": [], "encode_batch_fast": [], "prepare": []}
    with workers(cores()) as run:
        tokens = packed(work, options.work / "shards", entries(tokenizer), run)  # the first round counts for nobody
        for number in range(options.rounds + 1):
            seconds = {
                "encode_batch": timed(lambda: [alone.encode_batch(part, add_special_tokens=False) for part in parts]),
                "prepare": timed(lambda: packed(work, options.work / "shards", entries(tokenizer), run)),
                "encode_batch_fast": timed(lambda: [alone.encode_batch_fast(part, add_special_tokens=False) for part in parts]),
            }
            for name in taken if number else ():
                taken[name].append(seconds[name])
            line = ", ".join(f"{name} {wall:.2f} s ({cpu:.2f} s of CPU)" for name, (wall, cpu) in seconds.items())
            print(f"round {number}: {line}", flush=True)
    ratios = {
        clock: {
            name: round(statistics.median(other[i] / mine[i] for other, mine in zip(taken[name], taken["prepare"], strict=True)), 3)
            for name in ("encode_batch", "encode_batch_fast")
        }
        for i, clock in enumerate(("wall", "cpu"))
    }
    medians = {name: statistics.median(wall for wall, _ in values) for name, values in taken.items()}
    return {
        "machine": machine(),
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
        "documents": len(documents),
        "bytes": size,
        "tokens": tokens,
        "vocab_size": entries(tokenizer),
        "seconds": medians,
        "all_seconds": taken,
        "megabytes_per_second": {name: round(size / 1e6 / value, 2) for name, value in medians.items()},
        "prepare_over": ratios,
    }


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--work", type=Path, default=Path("build/bench-data"), help="a folder for some hundred MB, removed at the end")
    parser.add_argument("--out", type=Path, default=HERE / "bench_data.json")
    options = parser.parse_args()
    os.environ.pop("RAYON_NUM_THREADS", None)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # encode_batch's own threads
    try:
        result = measure(options)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['machine']}, medians of {result['rounds']} rounds, {result['bytes']:,} bytes, {result['tokens']:,} tokens\n")
    print("| | MB of text a second | speed of prepare over it | the same by CPU time |\n|---|---:|---:|---:|")
    wall, cpu = result["prepare_over"].values()  # type: ignore[attr-defined]
    for name, speed in result["megabytes_per_second"].items():  # type: ignore[attr-defined]
        print(f"| {name} | {speed:.1f} | {wall.get(name, 1.0):.2f} | {cpu.get(name, 1.0):.2f} |")


if __name__ == "__main__":
    main()
