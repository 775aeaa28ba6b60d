"""Demonstration labels for Python modules: rules that anyone can read and dispute.

They are no judgement of educational value by a person or a language model, and neither is a filter learnt
from them; they show the filter's working where there is no annotator. A module is labelled 1 where every rule
holds, and each label comes with what was measured.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

Measures = dict[str, Any]
RULES: Mapping[str, Callable[[Measures], bool]] = {
    "Python can parse it": lambda facts: facts["parses"],
    "between 1,000 and 60,000 characters": lambda facts: 1_000 <= facts["characters"] <= 60_000,
    "at least 3 functions and classes": lambda facts: facts["definitions"] >= 3,
    "half of its functions and classes, the module counted in, have a docstring of 20 characters": lambda facts: (  # noqa: E501
        facts["docstring_share"] >= 0.5
    ),
    "the names that it gives have 4 letters on average": lambda facts: facts["name_length"] >= 4,
    "less than a quarter of its lines are tables: numbers, quoted text and punctuation alone": lambda facts: (
        facts["table_share"] < 0.25
    ),
}
_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|0[xX][0-9a-fA-F]+""")
_LETTERS = re.compile(r"[A-Za-z]{2}")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def measure(source: str) -> Measures:
    """The measures that the rules look at."""
    lines = [line for line in source.splitlines() if line.strip()]
    tables = [line for line in lines if _is_table(line)]
    measures: Measures = {
        "parses": False,
        "characters": len(source),
        "definitions": 0,
        "docstring_share": 0.0,
        "name_length": 0.0,
    }
    share = len(tables) / max(1, len(lines))
    measures["table_share"] = round(share, 3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that a string should not have
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return measures
    defined = [node for node in ast.walk(tree) if isinstance(node, _DEFINITIONS)]
    documented_by = [tree, *defined]
    docstrings = [ast.get_docstring(node) or "" for node in documented_by]
    documented = [text for text in docstrings if len(text) >= 20]
    names = [node.name for node in defined] + [
        node.arg for node in ast.walk(tree) if isinstance(node, ast.arg) and node.arg != "self"
    ]
    return measures | {
        "parses": True,
        "definitions": len(defined),
        "docstring_share": round(len(documented) / (1 + len(defined)), 3),
        "name_length": round(sum(len(name.strip("_")) for name in names) / max(1, len(names)), 3),
    }


def _is_table(line: str) -> bool:
    if '"""' in line or "'''" in line:  # a docstring
        return False
    bare = _QUOTED.sub("", line)
    if _LETTERS.search(bare):
        return False
    return bare != line or any(map(str.isdigit, line))


def label(source: str) -> tuple[int, Measures, list[str]]:
    """1 or 0, what was measured, and the rules that do not hold."""
    measures = measure(source)
    broken = [rule for rule, holds in RULES.items() if not holds(measures)]
    return int(not broken), measures, broken
