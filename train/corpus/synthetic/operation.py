"""One small thing a program does to a value, written twice: as a loop and as a short expression. The one
checks the other.

The operations are data: tables/*.yaml, an entry of them one `Operation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

TABLES = Path(__file__).with_name("tables")
# The kinds of value that operations take and give, and how Python spells their types.
KINDS = {
    "numbers": "list[int]",
    "number": "int",
    "text": "str",
    "words": "list[str]",
    "table": "dict[str, int]",
    "grid": "list[list[int]]",
}


@dataclass(frozen=True)
class Slip:
    """A mistake that is often made: `right` in the loop becomes `wrong`, and `effect` says what comes of
    it."""

    right: str
    wrong: str
    effect: str


@dataclass(frozen=True, eq=False)
class Operation:
    """`$x` is the value taken, `$y` the name of the value given, `$items` what the values are, and `$k`, `$m`
    the parameters."""

    name: str  # a verb phrase, as in a function's name
    takes: str  # a key of KINDS
    gives: str
    topic: str  # the idea, in words that hold for both ways of writing it
    says: str  # an instruction, "keep only the $items greater than $k"
    out: str  # what the result is called in a program
    loop: str  # statements that end with $y set
    short: str  # an expression
    # "loop", "short" → a sentence that is true beside the program so written; it names what stands there
    why: Mapping[str, str]
    level: int = 1  # 1 to 3
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # parameter → what it may be
    slip: Slip | None = None
    module: str | None = None  # of the standard library, that the short form needs

    def loop_code(self, x: str, y: str, constants: Mapping[str, Any]) -> str:
        return fill(self.loop, x=x, y=y, **_spelt(constants))

    def short_code(self, x: str, y: str, constants: Mapping[str, Any]) -> str:
        value = fill(self.short, x=x, **_spelt(constants))
        return f"{y} = {value}"

    def slipped_code(self, x: str, y: str, constants: Mapping[str, Any]) -> str:
        assert self.slip is not None
        slipped = self.loop.replace(self.slip.right, self.slip.wrong)
        return fill(slipped, x=x, y=y, **_spelt(constants))

    def run(self, style: str, value: Any, constants: Mapping[str, Any]) -> Any:
        """The result on `value`, computed by the code in `style`: "loop", "short" or "slipped"."""
        code = {"loop": self.loop_code, "short": self.short_code, "slipped": self.slipped_code}[style](
            "x", "y", constants
        )
        return _function(code, self.module)(value)


def read_table(name: str) -> Any:
    """The contents of the file `name` of tables/."""
    text = (TABLES / name).read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # both load plain values alone


def read_operations(name: str) -> tuple[Operation, ...]:
    """The operations of a file of tables/."""
    return tuple(_operation(**entry) for entry in read_table(name))


def _operation(*, loop: str, why: Any, slip: Any = None, values: Any = None, **plain: Any) -> Operation:
    """An operation as a file spells it: a `why` that holds for both ways of writing it is one sentence
    there."""
    return Operation(
        loop=loop.rstrip("\n"),
        why=why if isinstance(why, dict) else {"loop": why, "short": why},
        slip=None if slip is None else Slip(**slip),
        values={key: tuple(choices) for key, choices in (values or {}).items()},
        **plain,
    )


def fill(template: str, **names: Any) -> str:
    """`template` with every `$name` replaced; the longest names first, so that none is the start of
    another."""
    for name in sorted(names, key=len, reverse=True):
        template = template.replace(f"${name}", str(names[name]))
    return template


def _spelt(constants: Mapping[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in constants.items()}


@cache
def _function(code: str, module: str | None) -> Callable[[Any], Any]:
    """Code of this package's own tables as a function of x. What a program in a document does is run by
    checker.py."""
    space: dict[str, Any] = {module: import_module(module)} if module else {}
    exec(f"def f(x):\n{indent(code, '    ')}\n    return y\n", space)
    return space["f"]
