"""Benchmarks on tiny tasks in the harness's own format: scores against plain PyTorch, metrics against
arithmetic by hand, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from helpers.tasks import CHOICE, QUESTIONS, write_task
from outgrow.model.base.compose import CONF
from outgrow.model.base.errors import UserError
from outgrow.train.suite import metrics
from outgrow.train.suite.suite import BenchmarkTask, Suite, group_averages, load_suite

PROGRAMS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
unsafe_code: true
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: ""
process_results: !function outgrow.train.suite.metrics.humaneval
metric_list: [{{metric: pass_at_1, aggregation: mean, higher_is_better: true}}]
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network with its tokenizer, as a run's end has them."""
    from outgrow.model.build import build_model
    from outgrow.model.presets import preset
    from outgrow.train.data.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("network") / "tiny"
    text = " ".join(f"{item['question']}{''.join(item['choices'])}" for item in QUESTIONS) * 20  # type: ignore[arg-type]
    build_model(preset("tiny_source") | {"vocab_size": 512}, seed=0).save_pretrained(folder)
    save_tokenizer(train_tokenizer([text], vocab_size=300, model_max_length=128), folder)
    return folder


def by_hand(network: Path) -> float:
    """The share of questions whose right answer is the likeliest, in plain PyTorch."""
    import torch

    from outgrow.model.build import load_model
    from outgrow.train.data.tokenizer import load_tokenizer

    model: Any = load_model(network).eval()
    tokenizer: Any = load_tokenizer(str(network))
    right = 0
    for item in QUESTIONS:
        sums = []
        for choice in item["choices"]:  # type: ignore[attr-defined]
            prompt, whole = (
                tokenizer(item["question"])["input_ids"],
                tokenizer(item["question"] + choice)["input_ids"],
            )
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[place - 1, whole[place]]) for place in range(len(prompt), len(whole))))
        right += sums[item["answer"]] == max(sums)  # type: ignore[index]
    return right / len(QUESTIONS)


# ---- suites ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "suite").glob("*.yaml")))
def test_every_suite_is_read(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert len({task.task for task in suite.tasks}) == len(suite.tasks) > 0


def test_an_unknown_suite_or_task_is_told_its_neighbour() -> None:
    with pytest.raises(UserError, match="did you mean 'phi_2'"):
        load_suite("phi_3")
    with pytest.raises(UserError, match="did you mean 'piqa'"):
        load_suite("phi_2").of(["piqaa"])


def test_a_fault_of_a_suite_names_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "own.yaml").write_text("name: own\n")
    monkeypatch.setattr("outgrow.train.suite.suite.CONF", tmp_path)
    with pytest.raises(UserError, match=r"^suite own\.tasks: missing$"):
        load_suite("own")


def test_a_group_with_a_hole_has_no_average() -> None:
    tasks = [("a", "one"), ("b", "one"), ("c", "two")]
    suite = Suite("s", tuple(BenchmarkTask(task, group, 0, "acc") for task, group in tasks))
    assert group_averages(suite, {"a": 0.25, "b": 0.75}) == {"one": 0.5, "two": None}
    assert group_averages(suite, {"a": 0.25, "c": 1.0}) == {"one": None, "two": 1.0}


# ---- metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "answers", "exact", "f1"),
    [
        ("The Normans.", ["Normans", "the Norse"], 1.0, 1.0),
        ("in France", ["France"], 0.0, 2 / 3),
        ("unanswerable", [], 1.0, 1.0),
        ("", [], 1.0, 1.0),
        ("France", [], 0.0, 0.0),
        ("unanswerable", ["France"], 0.0, 0.0),
    ],
)
def test_squad_is_scored_as_its_script_does(
    written: str, answers: list[str], exact: float, f1: float
) -> None:
    assert metrics.squad({"answers": {"text": answers}}, [written]) == {
        "exact": exact,
        "f1": pytest.approx(f1),
    }


HUMANEVAL = {
    "prompt": "from typing import List\n\ndef last(items: List[int]) -> int:\n",
    "test": "def check(f):\n    assert f([1, 2]) == 2",
    "entry_point": "last",
}
MBPP = {"test_list": ["assert last([1, 2]) == 2", "assert last([3]) == 3"], "test_setup_code": ""}


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("    return items[-1]\n", 1.0),
        ("    print(items)\n    return items[-1]\n", 1.0),
        ("    return items[0]\n", 0.0),
        ("    return (\n", 0.0),
    ],
)
def test_a_program_passes_where_its_tests_do(written: str, right: float) -> None:
    with metrics.running_code(True):
        assert metrics.humaneval(HUMANEVAL, [written]) == {"pass_at_1": right}
        assert metrics.mbpp(MBPP, [f"def last(items):\n{written}"]) == {"pass_at_1": right}
        assert metrics.mbpp(MBPP, [f"```python\ndef last(items):\n{written}```\nSo it is."]) == {
            "pass_at_1": right
        }


@pytest.mark.parametrize(
    "written",
    [
        "    while True: pass\n",
        "    open('/tmp/x', 'w')\n    return 2\n",
        "    import os\n    os._exit(0)\n",
        "    raise SystemExit(0)\n",
    ],
)
def test_a_program_that_does_not_come_back_or_touches_the_machine_fails(
    written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SECONDS", 0.3)
    with metrics.running_code(True):
        assert metrics.humaneval(HUMANEVAL, [written]) == {"pass_at_1": 0.0}


def test_no_program_runs_unless_it_is_allowed() -> None:
    for call in (lambda: metrics.humaneval(HUMANEVAL, ["    return 2\n"]), lambda: metrics.mbpp(MBPP, ["x"])):
        with pytest.raises(UserError, match="give run_code=true"):
            call()


# ---- the harness -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_local_tasks_score_is_what_pytorch_gives(tmp_path: Path, network: Path) -> None:
    pytest.importorskip("lm_eval")
    from outgrow.model.build import load_model
    from outgrow.train.data.tokenizer import load_tokenizer
    from outgrow.train.suite.harness import Harness

    write_task(tmp_path / "tasks", "piqa")
    write_task(tmp_path / "tasks", "humaneval", PROGRAMS, [HUMANEVAL])
    harness = Harness(tmp_path / "tasks")
    choice, programs = BenchmarkTask("piqa", "g", 0, "acc"), BenchmarkTask("humaneval", "g", 0, "pass_at_1")
    with pytest.raises(UserError, match=r"task humaneval: it runs programs .* give run_code=true"):
        harness.load([choice, programs], run_code=False)
    loaded = harness.load([choice, programs], run_code=True)
    model = harness.model(load_model(network).eval(), load_tokenizer(str(network)), 2)
    score = harness.score(choice, loaded["piqa"], model, limit=None, run_code=False)
    assert (score.value, score.items, score.metric) == (by_hand(network), len(QUESTIONS), "acc,none")
    assert harness.score(choice, loaded["piqa"], model, limit=2, run_code=False).items == 2
    assert harness.score(programs, loaded["humaneval"], model, limit=None, run_code=True).value == 0.0
    with pytest.raises(UserError, match="no metric 'f1'; it has acc,none"):
        harness.score(BenchmarkTask("piqa", "g", 0, "f1"), loaded["piqa"], model, limit=None, run_code=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_leave_to_run_code_is_asked_for_before_any_data(name: str) -> None:
    """Their data are on the hub, which the tests cannot reach."""
    pytest.importorskip("lm_eval")
    from outgrow.train.suite.harness import Harness

    harness, asked = Harness(), [BenchmarkTask(name, "g", 0, "pass_at_1")]
    with pytest.raises(UserError, match=rf"^task {name}: it runs programs .* give run_code=true"):
        harness.load(asked, run_code=False)
    with pytest.raises(UserError, match=rf"^{name}: benchmarks whose data are on the Hugging Face hub"):
        harness.load(asked, run_code=True)


@pytest.mark.slow
def test_all_that_needs_the_hub_is_told_in_one_line_when_there_is_no_network(tmp_path: Path) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    pytest.importorskip("lm_eval")
    from outgrow.train.suite.harness import Harness

    write_task(tmp_path / "tasks", "boolq")
    names = ("piqa", "boolq", "winogrande", "arc_easy")
    for name in set(names) - {"boolq"}:
        write_task(tmp_path / "tasks", name, CHOICE.replace("path: json", "path: owner/{name}"))
    asked = [BenchmarkTask(task, "g", 0, "acc") for task in names]
    with pytest.raises(UserError) as caught:
        Harness(tmp_path / "tasks").load(asked, run_code=False)
    said = str(caught.value)
    assert said.startswith("piqa, winogrande, arc_easy: benchmarks whose data are on the Hugging Face hub")
    assert "give tasks=DIR" in said
    assert "\n" not in said


def test_only_the_first_request_waits_for_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from huggingface_hub import constants

    from outgrow.train.suite import harness

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    offline: list[bool] = []

    class Refused:
        """An index of tasks whose data lie behind a connection that is refused."""

        all_tasks: ClassVar = ["a", "b", "c"]
        task_index: ClassVar[dict[str, Any]] = {}

        def load(self, _: list[str]) -> None:
            offline.append(constants.HF_HUB_OFFLINE)
            try:
                raise ConnectionRefusedError(111, "Connection refused")
            except OSError as fault:
                raise RuntimeError("no data") from fault

    monkeypatch.setattr(harness.Harness, "_manager", lambda *_: Refused())
    with pytest.raises(
        UserError, match=r"^a, b, c: .* cannot be reached \(RuntimeError: no data\); .*tasks=DIR"
    ):
        harness.Harness().load([BenchmarkTask(task, "g", 0, "acc") for task in "abc"], run_code=False)
    assert offline == [False, True, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: [", "no task file"),
        ("- a\n- b\n", "no task file"),
        ("metric_list: []\n", "expected task: NAME"),
        ("task: piqa\noutput_type: multiple_choice\n", "says nothing of its data"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path: Path, text: str, said: str) -> None:
    pytest.importorskip("lm_eval")
    from outgrow.train.suite.harness import check_tasks

    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        check_tasks(tmp_path)


def test_a_folder_without_tasks_is_refused(tmp_path: Path) -> None:
    from outgrow.train.suite.harness import check_tasks

    with pytest.raises(UserError, match="no such folder"):
        check_tasks(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no \*.yaml"):
        check_tasks(tmp_path)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from outgrow.train.suite.harness import Harness

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[eval\]'"):
        Harness()
