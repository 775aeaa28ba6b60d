"""The rooms of the house: imports run one way between them, and in no circle within one. Imports in functions
and for types count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
ROOMS = ("model", "growth", "train", "experiments")  # each imports from those before it alone
NAME = "outgrow"  # of the installed package, whose folders the rooms are
NO_NOUNS = {"found", "made", "given", "told", "whole", "place"}  # they say nothing of what they name


def modules(house: Path, room: str) -> dict[str, Path]:
    """Dotted name → file; of an extension, its C source."""
    files = [path for ending in ("py", "c") for path in (house / room).rglob(f"*.{ending}")]
    return {
        ".".join((NAME, *path.relative_to(house).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in files
    }


def imported(name: str, path: Path) -> Iterator[str]:
    """Every dotted name that a module imports, of `from a import b` both a and a.b."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def graph(house: Path, room: str) -> dict[str, set[str]]:
    """Module of a room → the modules of the room that it imports."""
    known = modules(house, room)
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = imported(name, path) if path.suffix == ".py" else iter(())
        nearest = {target if target in known else target.rpartition(".")[0] for target in targets}
        edges[name] = (nearest & known.keys()) - {name}
    return edges


@pytest.mark.parametrize("room", ROOMS)
def test_no_module_of_a_room_imports_itself_by_a_detour(room: str) -> None:
    try:
        TopologicalSorter(graph(HOUSE, room)).prepare()
    except CycleError as fault:
        pytest.fail(f"circle of imports: {' → '.join(reversed(fault.args[1]))}")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_lower_rooms_alone(room: str) -> None:
    higher = [[other] for other in ROOMS[ROOMS.index(room) + 1 :]]
    paths = {name: path for name, path in modules(HOUSE, room).items() if path.suffix == ".py"}
    upward = [
        f"{name} → {target}"
        for name, path in paths.items()
        for target in imported(name, path)
        if target.split(".")[1:2] in higher
    ]
    assert not upward
    assert len(paths) > 10


def test_reading_tokens_imports_no_maker_of_tokens() -> None:
    makers = f"{NAME}.train.corpus"
    readers = {
        name: path for name, path in modules(HOUSE, "train").items() if name.startswith(f"{NAME}.train.data")
    }
    door = readers.pop(f"{NAME}.train.data.__main__")  # the makers' door under its former name
    assert any(target.startswith(makers) for target in imported("", door))
    assert not [
        f"{name} → {target}"
        for name, path in readers.items()
        for target in imported(name, path)
        if target.startswith(makers)
    ]
    assert len(readers) > 5


@pytest.mark.slow
@pytest.mark.parametrize("room", [*ROOMS, "tests", "benchmarks", "docs"])
def test_rooms_are_imported_by_their_one_name(room: str) -> None:
    """Under a second name a module would be loaded twice."""
    bare = [
        f"{path}: {target}"
        for path in (HOUSE / room).rglob("*.py")
        for target in imported("", path)
        if target.split(".")[0] in ROOMS
    ]
    assert not bare


def test_circles_through_functions_types_and_relative_imports_are_seen(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room/__init__.py").write_text("")
    (tmp_path / "room/a.py").write_text("def late():\n    from .b import thing\n")
    (tmp_path / "room/b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from outgrow.room import c\n"
    )
    (tmp_path / "room/c.py").write_text("import outgrow.room.a\n")
    assert graph(tmp_path, "room") == {
        "outgrow.room": set(),
        "outgrow.room.a": {"outgrow.room.b"},
        "outgrow.room.b": {"outgrow.room.c"},
        "outgrow.room.c": {"outgrow.room.a"},
    }
    with pytest.raises(CycleError):
        TopologicalSorter(graph(tmp_path, "room")).prepare()


def effects(tree: ast.AST) -> list[str]:
    """The asserts in which something may happen that `python -O` leaves out."""
    pure = {"isinstance", "len", "is_float"}
    odd = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            parts = list(ast.walk(node.test))
            calls = {ast.unparse(part.func) for part in parts if isinstance(part, ast.Call)}
            if calls - pure or any(isinstance(part, ast.NamedExpr) for part in parts):
                odd.append(ast.unparse(node))
    return odd


@pytest.mark.parametrize("room", ROOMS)
def test_code_does_the_same_without_its_asserts(room: str) -> None:
    paths = [path for path in modules(HOUSE, room).values() if path.suffix == ".py"]
    odd = {path.name: effects(ast.parse(path.read_text(encoding="utf-8"))) for path in paths}
    assert {name: lines for name, lines in odd.items() if lines} == {}
    assert effects(ast.parse("assert next(rows)\nassert (n := 1)\nassert isinstance(a, b)")) == [
        "assert next(rows)",
        "assert (n := 1)",
    ]


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the name of everything that a module names: variables, fields, arguments, functions."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name.strip("_")
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield node.lineno, name


@pytest.mark.parametrize("room", ROOMS)
def test_what_is_named_is_named_by_a_noun_that_tells_what_it_is(room: str) -> None:
    paths = (path for path in modules(HOUSE, room).values() if path.suffix == ".py")
    offenders = [
        f"{path.relative_to(HOUSE)}:{line}: {name}"
        for path in paths
        for line, name in names(ast.parse(path.read_text(encoding="utf-8")))
        if name in NO_NOUNS
    ]
    assert not offenders


def test_every_way_to_name_something_is_seen() -> None:
    code = (
        "def _told(given, *, place=0):\n    found: int = 1\n    return [whole for whole in (made := [found])]"
    )
    assert {name for _, name in names(ast.parse(code))} >= NO_NOUNS
