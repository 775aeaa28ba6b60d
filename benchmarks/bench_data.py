"""Time files of text to tokens on disk, end to end: `prepare` beside plain datatrove and `datasets.map`, with
one process and with two.

make bench-data           half an hour: benchmarks/bench_data.json, and the tables of docs/evidence.md and
                          docs/data.md that are made of it
python benchmarks/bench_data.py --megabytes 2 --rounds 1 --out /tmp/quick.json      a quick look, no page

The text is the Python source of this interpreter and its packages, as JSON lines in 16 files, each twentieth
document twice; the tokenizer a byte-level BPE trained on it. Each contestant is a fresh process; the clock
starts before its imports. It reads the files and counts the documents; or reads them, cuts the text with that
tokenizer and writes tokens; or removes exact copies before, or near duplicates: by datatrove's steps, given
the same splitter into words, or by ours. Memory is the most that a process and its workers hold together
(proportional set size where the system tells it), sampled.
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
sys.path.insert(0, str(HERE))
PAGE, STEPS_PAGE = HERE.parent / "docs" / "evidence.md", HERE.parent / "docs" / "data.md"
MARKS = ("<!-- bench-data -->\n", "<!-- /bench-data -->\n")
FILES = 16
COPIED = 20  # each document of so many is there twice
SIMILARITY = 0.8
RECORD = HERE / "bench_data.json"
COUNT = "documents.txt"  # of what a contestant has at its end


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
    documents += documents[::COPIED]
    (folder / "texts").mkdir(parents=True)
    for number in range(FILES):
        lines = [json.dumps({"text": text}) for text in documents[number::FILES]]
        (folder / "texts" / f"{number:02d}.jsonl").write_text("\n".join(lines))
    save_tokenizer(
        train_tokenizer(documents, vocab_size=vocab_size, model_max_length=2048), folder / "tokenizer"
    )
    return sum(len(text.encode()) for text in documents)


# ---- contestants -------------------------------------------------------------------------------------------


def ours(folder: Path, processes: int, task: str) -> int:
    from outgrow.train.corpus import prepare
    from outgrow.train.corpus.read.corpora import documents, open_corpus
    from outgrow.train.data.settings import CleaningSettings, DataSettings

    clean = CleaningSettings(
        exact_duplicates=task == EXACT, near_duplicates=SIMILARITY if task == NEAR else None
    )
    out = {
        "folder": str(folder / "out"),
        "path": str(folder / "texts"),
        "tokenizer": str(folder / "tokenizer"),
        "workers": processes,
    }
    settings = DataSettings("bench", "files", clean=clean, **out)  # type: ignore[arg-type]
    if task == READ:
        return sum(1 for _ in documents(settings, open_corpus(settings)))
    data = prepare(settings, progress=False)
    return data.train.documents + data.validation.documents


def datatrove(folder: Path, processes: int, task: str) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    work, reader = folder / "out", lambda: JsonlReader(str(folder / "texts"))
    if task == READ:
        return sum(1 for _ in reader().run())

    def run(name: str, steps: list[Any], tasks: int) -> None:
        LocalPipelineExecutor(steps, tasks=tasks, workers=processes, logging_dir=str(work / name)).run()

    keep = {NEAR: without_near, EXACT: without_copies}.get(task, lambda *given: [])(work, reader, run)
    options = {"eos_token": "<|endoftext|>", "shuffle_documents": False, "batch_size": 1000}
    tokens = DocumentTokenizer(
        str(work / "tokens"), tokenizer_name_or_path=str(folder / "tokenizer" / "tokenizer.json"), **options
    )
    run("tokenise", [reader(), *keep, tokens], FILES)
    return sum(path.stat().st_size for path in (work / "tokens").glob("*.index")) // 8  # bytes a document


def without_near(work: Path, reader: Callable[[], Any], run: Callable[..., None]) -> list[Any]:
    """datatrove's filter of near duplicates, after the steps that find them."""
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.utils.hashing import HashConfig

    # its xxhash is one below 4
    config = MinhashConfig(num_buckets=14, hashes_per_bucket=9, hash_config=HashConfig(hash_fc="sha1"))
    run("sign", [reader(), signature(str(work / "sig"), config)], FILES)
    buckets = MinhashDedupBuckets(str(work / "sig"), str(work / "buckets"), config=config)
    run("buckets", [buckets], config.num_buckets)
    run("cluster", [MinhashDedupCluster(str(work / "buckets"), str(work / "remove"), config=config)], 1)
    return [MinhashDedupFilter(str(work / "remove"))]


def without_copies(work: Path, reader: Callable[[], Any], run: Callable[..., None]) -> list[Any]:
    """datatrove's filter of exact copies, after the steps that find them."""
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )
    from datatrove.utils.hashing import HashConfig

    config = ExactDedupConfig(content_getter=text_of, hash_config=HashConfig(hash_fc="sha1"))
    run("sign", [reader(), ExactDedupSignature(str(work / "sig"), config)], FILES)
    run("find", [ExactFindDedups(str(work / "sig"), str(work / "remove"), config)], 1)
    return [ExactDedupFilter(str(work / "remove"), config)]


def text_of(document: Any) -> str:
    return str(document.text)


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


def datasets(folder: Path, processes: int, task: str) -> int:
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
    return len(cut)


CONTESTANTS: dict[str, Callable[[Path, int, str], int]] = {
    "prepare": ours,
    "datatrove": datatrove,
    "datasets.map": datasets,
}
READ, TOKENISE = "read", "tokenise"
EXACT, NEAR = "exact duplicates, tokenise", "near duplicates, tokenise"
TASKS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {  # → numbers of processes, who
    READ: ((1,), ("prepare", "datatrove")),
    TOKENISE: ((1, 2), ("prepare", "datatrove", "datasets.map")),
    EXACT: ((1, 2), ("prepare", "datatrove")),
    NEAR: ((1, 2), ("prepare", "datatrove")),
}


# ---- measuring ---------------------------------------------------------------------------------------------


def timed(name: str, processes: int, task: str, folder: Path) -> tuple[float, float, float]:
    """Seconds of wall time and of CPU time (which tells more on a busy machine), and megabytes at most, of
    one contestant's processes."""
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
        "--task",
        task,
        "--work",
        str(folder),
    ]
    started, peak = time.perf_counter(), 0.0
    cpu: dict[
        int, float
    ] = {}  # of each process, as last seen: a pool's workers are nobody's waited-for children
    log = folder / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    while process.poll() is None:
        root = psutil.Process(process.pid)
        everyone = [root, *root.children(recursive=True)]
        peak = max(peak, sum(map(memory, everyone)))
        cpu |= {each.pid: seconds for each in everyone if (seconds := cpu_seconds(each))}
        time.sleep(0.2)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{log.read_text()[-2000:]}")
    return seconds, sum(cpu.values()), peak / 2**20


def cpu_seconds(process: Any) -> float:
    """Seconds of a processor that a process has taken; 0 where it has ended."""
    import psutil

    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


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
    for task, (counts, names) in TASKS.items():
        for processes in counts:
            taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
            documents: dict[str, int] = {}
            for number in range(options.rounds):
                for name in names:
                    taken[name].append(timed(name, processes, task, folder))
                    documents[name] = int((folder / COUNT).read_text())
                    seconds = taken[name][-1][0]
                    progress = f"{task}, {processes}: round {number}, {name} {seconds:.1f} s"
                    print(progress, file=sys.stderr, flush=True)
            for name, values in taken.items():
                seconds, cpu = (statistics.median(value[i] for value in values) for i in (0, 1))
                row = {
                    "task": task,
                    "processes": processes,
                    "who": name,
                    "documents": documents[name],
                    "seconds": round(seconds, 2),
                    "cpu_seconds": round(cpu, 2),
                    "megabytes_per_second": round(size / 1e6 / seconds, 2),
                    "peak_megabytes": round(max(value[2] for value in values)),
                }
                rows.append(row)
    from outgrow.model.base.machine import machine

    facts = {"machine": machine(), "load_average": os.getloadavg(), "rounds": options.rounds}
    return {**facts, "bytes": size, "vocab_size": options.vocab_size, "rows": rows}


# ---- the pages ---------------------------------------------------------------------------------------------

STEPS = (  # of the pipeline, whose, why; and the task that tells rates
    (
        "order of steps, tasks, restart, statistics, Slurm, Ray",
        "datatrove's",
        "maintained by the field; same bytes here, through `sbatch` and on Ray",
        None,
    ),
    ("the local pool", "ours, one file", "a worker that is killed is told; datatrove's waits for ever", None),
    (
        "reading",
        "ours",
        "a broken line, a binary file or a link above is counted or told; its readers skip them with a line "
        "in a log",
        READ,
    ),
    (
        "normalise, educational filter",
        "ours, as its formatter and filter",
        "our rules; any `transformers` encoder",
        None,
    ),
    ("exact duplicates", "ours", "the first copy stays, and is named; 128 bits", EXACT),
    (
        "near duplicates",
        "ours",
        "candidates are checked, and chains do not vanish: as much is found, and less that is not near is "
        "removed (below)",
        NEAR,
    ),
    (
        "benchmarks",
        "ours",
        "its n-gram step needs `lighteval`; spellings, short items and boilerplate as above",
        None,
    ),
    (
        "tokenise, shards",
        "ours",
        "`</s>` in a text stays text; shards are cut alike for any number of tasks",
        TOKENISE,
    ),
)


def table(result: dict[str, Any]) -> str:
    """All that was measured, as Markdown."""
    size = result["bytes"] / 1e6
    lines = [
        "| task | processes | | documents that stay | MB of text a second | MB a second of CPU | peak MB |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        rates = f"{row['megabytes_per_second']:.2f} | {size / row['cpu_seconds']:.2f}"
        lines.append(
            f"| {row['task']} | {row['processes']} | {row['who']} | {row['documents']:,} | {rates} | "
            f"{row['peak_megabytes']:,} |"
        )
    facts = (
        f"{size:.1f} MB of text, a vocabulary of {result['vocab_size']:,}, medians of {result['rounds']} "
        f"rounds; {result['machine']}, load {result['load_average'][0]:.1f}."
    )
    return "\n".join([*lines, "", facts, ""])


def steps_table(result: dict[str, Any] | None, killed: dict[str, Any]) -> str:
    """Step, whose, why, figures, as Markdown.

    Args:
        result: of this benchmark; None where it was not run yet.
        killed: seconds until a killed worker is told, of bench_duplicates.py.
    """
    lines = ["| step | whose | why | figures (ours; datatrove's) |", "|---|---|---|---|"]
    for step, whose, why, task in STEPS:
        figures = ""
        if step == "the local pool":
            figures = f"told {killed['ours']} s later; not ended after {killed['patience']} s"
        elif task is not None:
            figures = _rates(result, task)
        lines.append(f"| {step} | {whose} | {why} | {figures} |")
    return "\n".join([*lines, ""])


def _rates(result: dict[str, Any] | None, task: str) -> str:
    """MB of text a second of CPU of one process, and the documents that stay, of both."""
    if result is None:
        return "not measured yet"
    rows = {row["who"]: row for row in result["rows"] if row["task"] == task and row["processes"] == 1}
    parts = []
    for who in ("prepare", "datatrove"):
        rate = result["bytes"] / 1e6 / rows[who]["cpu_seconds"]
        parts.append(f"{rate:.1f} MB a second of CPU, {rows[who]['documents']:,} documents stay")
    return "; ".join(parts)


def write_pages(result: dict[str, Any]) -> None:
    """Put the tables between their marks."""
    put(PAGE, table(result))
    put(STEPS_PAGE, steps_table(result, killed_worker()))


def killed_worker() -> dict[str, Any]:
    """Read what bench_duplicates.py measured of a killed worker."""
    from bench_duplicates import PATIENCE_SECONDS

    record = json.loads((HERE / "bench_duplicates.json").read_text())
    return record["seconds_until_a_killed_worker_is_told"] | {"patience": PATIENCE_SECONDS}


def put(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page."""
    before, rest = page.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    page.write_text(before + MARKS[0] + text + MARKS[1] + after)


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
    parser.add_argument("--out", type=Path, default=RECORD)
    for hidden in ("--one", "--processes", "--task"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        count = CONTESTANTS[options.one](options.work, int(options.processes), options.task)
        (options.work / COUNT).write_text(str(count))
        return
    try:
        result = measure(options)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.out == RECORD:
        write_pages(result)
    print(table(result))


if __name__ == "__main__":
    main()
