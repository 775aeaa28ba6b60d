"""Writes the table of ready combinations in docs/operators.md from the files of conf/growth.

python docs/write_leaves.py    at once: run it after a leaf has been added or changed
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
PAGE, LEAVES = HERE / "operators.md", HERE.parent / "conf" / "growth"
MARKS = ("<!-- leaves: written by docs/write_leaves.py -->\n", "<!-- /leaves -->\n")
COLUMNS = ("name", "operator", "depth", "noise", "stages")  # what is no option of the operator


def table() -> str:
    """One row for each leaf, by name."""
    rows = [row(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in sorted(LEAVES.glob("*.yaml"))]
    return (
        "\n".join(["| `growth=` | operator | depth | noise | options |", "|---|---|---|---|---|", *rows])
        + "\n"
    )


def row(leaf: dict[str, Any]) -> str:
    """The row of one leaf."""
    if "stages" in leaf:
        options = f"[{len(leaf['stages'])} stages](#growth-on-the-way)"
    else:
        options = ", ".join(f"`{key}={value}`" for key, value in leaf.items() if key not in COLUMNS)
    return (
        f"| `{leaf['name']}` | `{leaf['operator']}` | `{leaf['depth']}` | {leaf['noise']:.4g} | {options} |"
    )


def main() -> None:
    """Put the table between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(before + MARKS[0] + table() + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
