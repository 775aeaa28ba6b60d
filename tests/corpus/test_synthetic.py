"""Generated textbooks and exercises: two ways to compute agree, programs are really run, and a seed says
everything."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from itertools import combinations, islice
from pathlib import Path
from random import Random
from typing import Any

import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare
from outgrow.train.corpus.read.corpora import documents, open_corpus
from outgrow.train.corpus.read.document import Tally
from outgrow.train.corpus.synthetic import corpus
from outgrow.train.corpus.synthetic.checker import failures
from outgrow.train.corpus.synthetic.corpus import KINDS, draw_items
from outgrow.train.corpus.synthetic.item import Item
from outgrow.train.corpus.synthetic.operation import KINDS as VALUES
from outgrow.train.corpus.synthetic.problem import OPERATIONS, _locals, draw_problem
from outgrow.train.corpus.synthetic.themes import AUDIENCES, THEMES
from outgrow.train.data.settings import DataSettings, disagreements

BY_NAME = {operation.name: operation for operation in OPERATIONS}
TYPES: dict[str, Any] = {
    "numbers": list,
    "number": int,
    "text": str,
    "words": list,
    "table": dict,
    "grid": list,
}


def drawn(kind: str, random: Random) -> Any:
    """A value that is nastier than a theme's: empty, negative, repeated, in any case."""
    length = random.choice((0, 1, 2, 5, 8))
    if kind == "numbers":
        return [random.randint(-5, 25) for _ in range(length)]
    if kind == "number":
        return random.randint(-30, 200)
    if kind == "text":
        return " ".join("".join(random.choices("aabbelzzZEO", k=random.randint(1, 7))) for _ in range(length))
    if kind == "words":
        return ["".join(random.choices("abelnrst", k=random.randint(1, 8))) for _ in range(length)]
    if kind == "table":
        return {"".join(random.choices("abR", k=3)): random.randint(0, 15) for _ in range(length)}
    return [[random.randint(-5, 15) for _ in range(random.randint(1, 4))] for _ in range(length)]


# ---- operations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_loop_and_expression_are_the_same_function(name: str) -> None:
    operation, random, slipped = BY_NAME[name], Random(name), 0
    for _ in range(150):
        given = {key: random.choice(values) for key, values in operation.values.items()}
        value = drawn(operation.takes, random)
        before = repr(value)
        by_loop, by_expression = operation.run("loop", value, given), operation.run("short", value, given)
        assert by_loop == by_expression, (value, given)
        assert repr(value) == before  # what is given is left as it was
        assert type(by_loop) is type(by_expression) is TYPES[operation.gives]
        assert operation.gives != "table" or list(by_loop) == list(by_expression)  # shown in this order
        if operation.slip:
            assert operation.slip.right in operation.loop
            try:
                slipped += operation.run("slipped", value, given) != by_loop
            except (LookupError, TypeError):
                slipped += 1
    assert slipped or not operation.slip, "the slip never shows"


@pytest.mark.parametrize(
    ("name", "value", "given", "result"),
    [
        ("keep_large", [3, 8, 5, 9], {"k": 5}, [8, 9]),
        ("accumulate", [3, -1, 4], {}, [3, 2, 6]),
        ("slide_maximum", [1, 3, 2, 0], {"k": 2}, [3, 3, 2]),
        ("slide_sum", [1, 3, 2], {"k": 3}, [6]),
        ("rotate", [1, 2, 3], {"k": 2}, [3, 1, 2]),
        ("find_longest_rise", [5, 1, 2, 3, 3], {}, 3),
        ("find_second", [7, 7, 2], {}, 2),
        ("count_peaks", [0, 4, 0, 5, 6, 5], {}, 2),
        ("find_most_common", [2, 9, 9, 2, 1], {}, 2),
        ("reduce_common", 45, {"k": 30}, 15),
        ("write_binary", 10, {}, "1010"),
        ("shift_letters", "xyz A", {"k": 3}, "abc A"),
        ("encode_runs", "aab", {}, "a2b1"),
        ("cut_pieces", "abc", {"k": 2}, ["ab", "bc"]),
        ("tally_words", ["a", "b", "a"], {}, {"a": 2, "b": 1}),
        ("take_best", {"x": 1, "b": 5, "a": 5}, {"k": 2}, {"a": 5, "b": 5}),
        ("turn", [[1, 2, 3], [4, 5, 6]], {}, [[1, 4], [2, 5], [3, 6]]),
        ("add_diagonal", [[1, 2], [3, 4], [5, 6]], {}, 5),
    ],
)
def test_operations_do_what_they_say(name: str, value: Any, given: dict[str, Any], result: Any) -> None:
    assert BY_NAME[name].run("loop", value, given) == BY_NAME[name].run("short", value, given) == result


def test_names_of_themes_and_operations_do_not_meet() -> None:
    used = frozenset[str]().union(*map(_locals, OPERATIONS))
    for theme in THEMES:
        parameters = [theme.parameter(kind)[0] for kind in VALUES]
        assert len(set(parameters)) == len(parameters)
        assert not used & set(parameters), theme.name
        assert all(word.isalpha() for word in theme.vocabulary)
    assert len(BY_NAME) == len(OPERATIONS) > 100
    assert len(THEMES) * len(AUDIENCES) * sum(map(len, KINDS.values())) > 3000


def test_problems_are_of_all_grades_and_every_step_does_something() -> None:
    problems = [draw_problem(Random(f"grades {i}")) for i in range(400)]
    assert {problem.level for problem in problems} == {1, 2, 3, 4, 5}
    for problem in problems:
        ways = [[argument, *results] for argument, results in problem.cases]
        assert all(any(way[i] != way[i + 1] for way in ways) for i in range(len(problem.steps)))
        assert len({repr(way[-1]) for way in ways}) > 1


# ---- items -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, templates in KINDS.items() for name in templates]
)
def test_the_programs_of_every_template_run_and_prove_what_the_text_says(kind: str, name: str) -> None:
    random, items = Random(name), list[Item]()
    while len(items) < 40:
        problem = draw_problem(random)
        item = KINDS[kind][name](problem, random)
        if item is None:
            continue
        items.append(item)
        # these show the loops
        assert problem.code() in item.text.replace("\n    ", "\n") or name in ("bug", "pitfall")
        assert "$" not in item.text
        assert problem.name in item.program
    assert failures(items) == [None] * len(items)
    spoilt = [dataclasses.replace(item, program=spoil(item)) for item in items]
    assert all(failures(spoilt))


def spoil(item: Item) -> str:
    """The program with its last claim turned round."""
    if item.prints:
        return item.program + "\nprint('more')"
    head, _, claim = item.program.rpartition("\nassert ")
    return f"{head}\nassert not ({claim})"


@pytest.mark.slow
def test_items_are_a_function_of_kind_and_seed() -> None:
    first = list(islice(draw_items("exercises", 0), 60))
    assert list(islice(draw_items("exercises", 0), 30)) == first[:30]
    assert not {item.text for _, item in first} & {
        item.text for _, item in islice(draw_items("exercises", 1), 60)
    }
    code = (
        "from itertools import islice; from outgrow.train.corpus.synthetic.corpus import draw_items; "
        "import hashlib; "
    )
    code += "print(hashlib.sha256(repr(list(islice(draw_items('exercises', 0), 60))).encode()).hexdigest())"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == hashlib.sha256(repr(first).encode()).hexdigest(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_items_are_distinct_and_seldom_near(kind: str) -> None:
    """`train.data prepare` with data.clean.near_duplicates counts them at full size."""
    texts = [item.text for _, item in islice(draw_items(kind, 0), 500)]
    assert len(set(texts)) == len(texts)
    pieces = [
        {tuple(words[i : i + 5]) for i in range(len(words) - 4)} for text in texts if (words := text.split())
    ]
    near = sum(len(a & b) >= 0.8 * len(a | b) for a, b in combinations(pieces, 2))
    assert near <= 2


def test_a_generator_that_has_no_more_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes twice with the same template, operations and theme."""
    problems = [draw_problem(Random(str(i))) for i in range(2)]
    problems.append(
        dataclasses.replace(problems[0], theme=next(theme for theme in THEMES if theme != problems[0].theme))
    )
    monkeypatch.setattr(corpus, "PATIENCE", 200)
    monkeypatch.setattr(corpus, "draw_problem", lambda random: random.choice(problems))
    monkeypatch.setitem(
        KINDS, "exercises", {name: KINDS["exercises"][name] for name in ("statement", "predict")}
    )
    drawn = draw_items("exercises", 0)
    assert len({item.text for _, item in islice(drawn, 6)}) == 6
    with pytest.raises(
        UserError, match="the generator of exercises has no more than 6 distinct items; lower"
    ):
        next(drawn)


# ---- the process that runs programs ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("import math, re, itertools\nassert math.gcd(4, 6) == 2", None),
        ("assert 1 == 2", "AssertionError"),
        ("while True: pass", "longer than 0.3 s"),
        ("try:\n    while True: x = sum([1, 2])\nexcept Exception:\n    pass", "longer than 0.3 s"),
        ("print('a')", "it printed 'a\\n', not ''"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("x =", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("open('/etc/hostname')", "PermissionError: a program may not use open"),
        ("import posix\nposix.fork()", "PermissionError: a program may not use os.fork"),
        ("import posix\nposix.system('true')", "PermissionError: a program may not use os.system"),
        ("import posix\nposix._exit(3)", "it ended its process (3)"),
        # the kernel's limit: C code does not hear the alarm
        ("sum(range(10**13))", "it ended its process (-24)"),
    ],
)
def test_a_program_can_do_nothing_but_compute(program: str, fault: str | None) -> None:
    before, found, after = failures(
        [Item("", "x = 1"), Item("", program), Item("", "print(2)", "2\n")], seconds=0.3
    )
    assert (before, after) == (None, None)
    assert found is None if fault is None else fault in (found or "")


@pytest.mark.slow
def test_a_busy_machine_fails_no_program() -> None:
    """Seconds are of computing; those in which it waits are not counted."""
    waiting = "import time\ntime.sleep(0.5)"
    assert failures([Item("", waiting), Item("", "x = 1")], seconds=0.3) == [None, None]


def test_no_socket_can_be_made_even_where_the_module_is_there() -> None:
    """The kernel refuses, so nothing in Python can get round it."""
    worker = Path(corpus.__file__).with_name("worker.py")
    code = f"import runpy, socket; limit = runpy.run_path({str(worker)!r})['limit']; limit(1.0, 2**30)\n"
    code += (
        "for make in (socket.socket, lambda: socket.create_connection(('127.0.0.1', 9)), lambda: "
        "__import__('os').dup(1)):\n"
    )
    code += "    try: make(); print('made')\n    except OSError as error: print(error.errno)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["24", "24", "24"], done.stderr  # EMFILE


# ---- as a corpus -------------------------------------------------------------------------------------------


def settings(tmp_path: Path, **more: Any) -> DataSettings:
    given = {
        "name": "made",
        "corpus": "exercises",
        "folder": str(tmp_path / "tokens"),
        "limit_documents": 60,
        "vocab_size": 400,
    }
    return DataSettings(**given | {"validation_fraction": 0.2} | more)


@pytest.mark.slow
def test_the_generator_is_a_source_like_any_other(tmp_path: Path) -> None:
    data = prepare(settings(tmp_path), progress=False)
    assert data.train.documents + data.validation.documents == 60
    assert prepare(settings(tmp_path), progress=False).fingerprint == data.fingerprint
    assert prepare(settings(tmp_path, seed=1), progress=False).fingerprint != data.fingerprint
    assert "data.limit_documents: missing" in disagreements(settings(tmp_path, limit_documents=None))[0]


def test_an_item_whose_program_fails_is_left_out_and_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        corpus, "failures", lambda items: ["wrong" if i in (0, 7) else None for i in range(len(items))]
    )
    monkeypatch.setattr(corpus, "BATCH", 10)
    tally, given = Tally(), settings(tmp_path, limit_documents=25)
    names = [document.name for document in documents(given, open_corpus(given), tally)]
    assert len(names) == len(set(names)) == 25
    assert tally.programs_failed == 7
    monkeypatch.undo()
    assert [document.name for document in documents(given, open_corpus(given))][1:7] == names[:6]


@pytest.mark.slow
def test_reading_goes_on_from_any_place(tmp_path: Path) -> None:
    given, tally = settings(tmp_path, limit_documents=30), Tally()
    whole = list(documents(given, open_corpus(given)))
    first = list(islice(documents(given, open_corpus(given), tally), 11))
    assert first + list(documents(given, open_corpus(given), tally)) == whole
    assert len(whole) == 30
