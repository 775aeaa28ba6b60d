"""Task files in lm-evaluation-harness's own format, a few items each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS = [
    {"question": "The list has", "choices": [" three items", " a value"], "answer": 0},
    {"question": "A function returns", "choices": [" three items", " a value"], "answer": 1},
    {"question": "The sum of", "choices": [" numbers", " three"], "answer": 1},
    {"question": "A list of numbers has", "choices": [" a sum", " the items of"], "answer": 0},
]
CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path, name: str, template: str = CHOICE, items: Any = QUESTIONS) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(template.format(name=name))
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
