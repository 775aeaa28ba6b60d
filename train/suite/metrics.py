"""Metrics of HumanEval, MBPP and SQuAD 2.0, which lm-evaluation-harness would fetch from a hub.

pass@1 runs what the model wrote in the project's own checker (train/corpus/synthetic/checker.py), and only
where it is allowed.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from outgrow.model.base.errors import UserError
from outgrow.train.corpus.synthetic.checker import failures
from outgrow.train.corpus.synthetic.item import Item

SECONDS = 3.0  # of one program, as the benchmarks' own checkers give
# What the benchmarks' solutions import, loaded before the program is locked in.
MODULES = (
    "array",
    "calendar",
    "cmath",
    "copy",
    "datetime",
    "decimal",
    "fractions",
    "hashlib",
    "random",
    "statistics",
    "sys",
    "typing",
)
_allowed = False


@contextmanager
def running_code(allowed: bool) -> Iterator[None]:
    """Allow, inside, that programs which a model wrote are run."""
    global _allowed
    before, _allowed = _allowed, allowed
    try:
        yield
    finally:
        _allowed = before


def check_allowed(task: str) -> None:
    """Refuse a benchmark of programs where running them is not allowed.

    Raises:
        UserError: it is not.
    """
    if not _allowed:
        raise UserError(
            f"task {task}: it runs programs that the model wrote, with this user's rights; give "
            "run_code=true where that is acceptable (a container is better), or leave the task out with "
            "only=[…]"
        )


def passes(program: str) -> bool:
    """Check whether a program runs to its end: an assertion that fails ends it before."""
    check_allowed("pass@1")
    item = Item("", program, None)
    return failures([item], seconds=SECONDS, modules=MODULES) == [None]


# ---- code --------------------------------------------------------------------------------------------------


def humaneval(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """pass@1 of HumanEval (arXiv 2107.03374): the prompt goes on with what was written, and the tests of the
    item run."""
    function = f"{doc['prompt']}{first(results)}"
    check = f"check({doc['entry_point']})"
    program = f"{function}\n{doc['test']}\n{check}\n"
    return {"pass_at_1": float(passes(program))}


def mbpp(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """pass@1 of MBPP (arXiv 2108.07732): what was written, in a code block or without, and the assertions of
    the item."""
    tests = "\n".join(doc["test_list"])
    setup = doc.get("test_setup_code") or ""
    written = without_fence(first(results))
    program = f"{setup}\n{written}\n{tests}\n"
    return {"pass_at_1": float(passes(program))}


def without_fence(text: str) -> str:
    """The code of a Markdown block, or the text itself where there is none."""
    block = re.search(r"```(?:python|py)?\n(.*?)(?:```|$)", text, re.DOTALL)
    return block.group(1) if block else text


# ---- SQuAD 2.0 ---------------------------------------------------------------------------------------------

NO_ANSWER = "unanswerable"


def squad(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Exact match and F1 of SQuAD 2.0 (arXiv 1806.03822), the best over the answers of an item.

    The right answer to a question without one is `unanswerable`, as in the examples of the prompt, or
    nothing.
    """
    written = normalized(first(results))
    written = "" if written == NO_ANSWER else written
    answers = [normalized(answer) for answer in doc["answers"]["text"]]
    answers = [answer for answer in answers if answer] or [""]
    return {
        "exact": max(float(written == answer) for answer in answers),
        "f1": max(overlap(written, answer) for answer in answers),
    }


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks: as the official script compares."""
    letters = text.lower()
    plain = "".join(letter for letter in letters if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def overlap(written: str, answer: str) -> float:
    """The F1 of the words of two normalised texts; of an empty one, whether both are."""
    ours = written.split()
    theirs = answer.split()
    if not ours or not theirs:
        return float(ours == theirs)
    both = Counter(ours) & Counter(theirs)
    common = sum(both.values())
    words = len(ours) + len(theirs)
    return 2 * common / words


def first(results: Sequence[Any]) -> str:
    """The text that was written first, however deep the harness has put it."""
    value: Any = results
    while not isinstance(value, str):
        value = value[0]
    return value
