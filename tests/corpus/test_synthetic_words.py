"""What generated texts say of their programs: a remark names what stands in the program beside it, and each
step matters to the result."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

import pytest

from outgrow.train.corpus.synthetic.corpus import KINDS, draw_items
from outgrow.train.corpus.synthetic.item import Item
from outgrow.train.corpus.synthetic.operation import KINDS as VALUES
from outgrow.train.corpus.synthetic.operation import Operation
from outgrow.train.corpus.synthetic.problem import OPERATIONS, OTHER, Problem, Step, draw_problem, idle

Holds = Callable[[ast.AST], bool]


def node(*kinds: type[ast.AST]) -> Holds:
    return lambda tree: any(isinstance(part, kinds) for part in ast.walk(tree))


def name(*names: str) -> Holds:
    """A function, a method or a module of that name, or a key word argument."""

    def holds(tree: ast.AST) -> bool:
        parts = list(ast.walk(tree))
        plain = {part.id for part in parts if isinstance(part, ast.Name)} | {
            part.arg for part in parts if isinstance(part, ast.keyword)
        }
        return bool({*plain, *(part.attr for part in parts if isinstance(part, ast.Attribute))} & set(names))

    return holds


def either(*ways: Holds) -> Holds:
    return lambda tree: any(way(tree) for way in ways)


def operator(kind: type[ast.AST]) -> Holds:
    return lambda tree: any(isinstance(getattr(part, "op", None), kind) for part in ast.walk(tree))


def annotated(kind: str) -> Holds:
    return lambda tree: f"{kind}[" in ast.unparse(tree)


COMPREHENSION = (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
NAMED = (
    *(
        "zip",
        "enumerate",
        "min",
        "sorted",
        "bin",
        "ord",
        "chr",
        "translate",
        "groupby",
        "Counter",
        "insert",
        "append",
        "pop",
    ),
    *("bit_length", "gcd", "str", "int", "len", "dict"),
)
# The words of a remark that name a construct → what then stands in the program.
CONSTRUCTS: dict[str, Holds] = {
    r"\bslices?\b|\bsliced\b": node(ast.Slice),
    r"\bloops?\b": node(ast.For, ast.While),
    r"\bwhile loops?\b": node(ast.While),
    r"\b(accumulator|counters?|variable)\b": node(ast.AugAssign, ast.Assign),
    r"\bcomprehension\b": node(*COMPREHENSION),
    r"\bgenerator expression\b": node(ast.GeneratorExp),
    r"\bfor clauses?\b": node(ast.comprehension),
    r"\bconditional expression\b": node(ast.IfExp),
    r"\bif statement\b|\bif, elif\b": node(ast.If),
    r"\bbreak\b": node(ast.Break),
    r"\ba % b\b|\boperator %|\bi % n\b|\bremainder (by|of the index)\b|\bquotient\b": operator(ast.Mod),
    r"\b[Aa] set\b": either(name("set"), node(ast.Set)),
    r"\bdictionar(y|ies)\b|\bkeys? of a dictionary\b": either(
        node(ast.Dict, ast.DictComp), name("dict"), annotated("dict")
    ),
    r"\b[Tt]uples?\b": node(ast.Tuple),
    r"\bminus sign\b": operator(ast.USub),
    r"\boperator in\b": node(ast.In, ast.NotIn),
    r"\bNone\b": lambda tree: any(
        isinstance(part, ast.Constant) and part.value is None for part in ast.walk(tree)
    ),
    r"\bTrue counts\b|\btrue counts as 1\b": name("sum"),
    r"\bindex (0|1|k|-1)\b": either(node(ast.Subscript), name("insert")),
    r"\bkey: what to compare\b|\bas its key\b|\b[Aa] key (can|with|is computed)\b": name("key"),
    r"\bselection sort\b|\binsertion sort\b": node(ast.For),
    r"\bcount (counts|says|looks)\b": name("count"),
    r"\bformat code\b": name("format"),
    r"\bvalue & 1\b": operator(ast.BitAnd),
    **{rf"\b{word}\b": name(word) for word in NAMED},
    r"\blower makes\b": name("lower"),
    r"\bupper gives\b": name("upper"),
    r"\bvalues gives\b": name("values"),
    r"\bitems gives\b": name("items"),
    r"\brange (can|counts|leaves|with)\b|\brange counts\b": name("range"),
    r"\bmap applies\b|\bhanded to map\b": name("map"),
    r"\bsplit without\b": name("split"),
    r"\bget with\b": name("get"),
    r"\bsum (gives|adds)\b": name("sum"),
    r"\bmax (lifts|and|of|over|takes|is)\b": name("max"),
}


def missing(remark: str, code: str) -> list[str]:
    """The constructs that a remark names and that code does not have."""
    tree = ast.parse(code)
    return [words for words, holds in CONSTRUCTS.items() if re.search(words, remark) and not holds(tree)]


def named(remark: str) -> bool:
    return any(re.search(words, remark) for words in CONSTRUCTS)


@pytest.mark.parametrize("style", OTHER)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_remark_and_a_topic_name_what_stands_in_the_program(operation: Operation, style: str) -> None:
    given = {key: choices[0] for key, choices in operation.values.items()}
    code = {"loop": operation.loop_code, "short": operation.short_code}[style]("x", "y", given)
    body = "\n    ".join(code.splitlines())
    function = f"def f(x: {VALUES[operation.takes]}) -> {VALUES[operation.gives]}:\n    {body}\n"
    assert missing(operation.why[style], function) == []
    assert missing(operation.topic, function) == []


def test_a_wrong_remark_is_found() -> None:
    assert missing("zip pairs a list with its own tail.", "y = x[1:]") != []
    assert missing("A slice with a step of -1.", "for value in x:\n    y.insert(0, value)") != []
    assert missing("A set holds each value once.", "seen = []") != []
    assert missing("A while loop is right here.", "y = abs(x).bit_length()") != []
    assert missing("The operator % gives the remainder.", "y = not x & 1") != []
    assert missing("zip pairs a list with its own tail.", "y = list(zip(x, x[1:]))") == []


REMARKS = {remark for operation in OPERATIONS for remark in operation.why.values()}


def shown(item: Item) -> str:
    """All code of a text."""
    return "\n".join(re.findall(r"```python\n(.*?)\n```", item.text, re.DOTALL)).replace(">>> ", "")


def counted(items: Iterator[Item]) -> tuple[int, int]:
    """Remarks that name a construct; and those of them that stand in a text whose code has it not."""
    all_of_them = wrong = 0
    for item in items:
        code = "\n".join(
            line for line in shown(item).splitlines() if line.startswith(("def ", "import ", " "))
        )
        for remark in REMARKS:
            if remark in item.text and named(remark):
                all_of_them += 1
                wrong += bool(missing(remark, code))
    return all_of_them, wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_text_has_a_remark_about_another_program(kind: str) -> None:
    """Once four in ten and more such remarks stood beside a program without what they name."""
    found, wrong = counted(item for _, item in islice(draw_items(kind, 3), 500))
    assert found > 50
    assert wrong == 0


# ---- steps -------------------------------------------------------------------------------------------------


def without(problem: Problem, left_out: tuple[int, int], case: int) -> object:
    """The result of a case, computed by the steps that are left."""
    value = problem.cases[case][0]
    for number, step in enumerate(problem.steps):
        if number not in range(*left_out):
            value = step.operation.run(problem.style, value, step.constants)
    return value


def test_no_chain_has_a_step_that_changes_nothing_in_the_result() -> None:
    """Once one chain in eight had one; each run of steps that could be left out changes the result of a
    case."""
    chains = 0
    for number in range(600):
        problem = draw_problem(Random(f"idle {number}"))
        kinds = [step.operation.takes for step in problem.steps] + [problem.gives]
        for i in range(len(problem.steps)):
            for j in range(i + 1, len(kinds)):
                if kinds[i] == kinds[j]:
                    chains += 1
                    results = [without(problem, (i, j), case) for case in range(len(problem.cases))]
                    assert results != [problem.result(case) for case in range(len(problem.cases))], (
                        problem.name
                    )
    assert chains > 500


BY_NAME = {operation.name: operation for operation in OPERATIONS}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("sort_up", "add_up"), [(0, 1)]),
        (("reverse", "find_largest"), [(0, 1)]),
        (("reverse", "sort_down"), [(0, 1)]),
        (("square", "add_up"), []),
        (("double_letters", "take_every_letter"), [(0, 2)]),
    ],
)
def test_steps_that_change_nothing_are_found(names: tuple[str, ...], found: list[tuple[int, int]]) -> None:
    steps = tuple(
        Step(BY_NAME[name], {key: choices[0] for key, choices in BY_NAME[name].values.items()}, "x", "y")
        for name in names
    )
    cases = []
    for value in ([3, 1, 2], [5, 9, 4]) if steps[0].operation.takes == "numbers" else ("abc", "de"):
        results, now = [], value
        for step in steps:
            now = step.operation.run("loop", now, step.constants)
            results.append(now)
        cases.append((value, tuple(results)))
    assert idle(steps, cases, "short") == found
