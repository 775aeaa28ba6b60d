"""Publish a comparison: on the terminal, as files, in W&B."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from outgrow.experiments.compare import METHOD, UNLIKE, Comparison, answer
from outgrow.experiments.figure import draw
from outgrow.experiments.report import html
from outgrow.experiments.study_file import DEFINITION
from outgrow.experiments.table import (
    CHANGE_HEADER,
    CHANGES,
    GRID_HEADER,
    HEADER,
    capital,
    cells,
    change_cells,
    flat_row,
    grid_cells,
    markdown,
    write_csv,
    write_json,
)
from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.base.files import telling_disk_faults
from outgrow.train.run import weights_and_biases
from outgrow.train.run.weights_and_biases import LONGEST_NAME

if TYPE_CHECKING:
    from rich.console import Console

Writer = Callable[[Path], object]  # writes one file


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Write the files of a comparison into `out`, together; return their paths.

    Raises:
        UserError: the disk is full, or `out` cannot be written.
    """

    def report(path: Path) -> None:
        page = html(comparison, path.with_name("convergence.png"))
        path.write_text(page, encoding="utf-8")

    writers: dict[str, Writer] = {
        "comparison.csv": lambda path: write_csv(list(map(flat_row, comparison.rows)), path),
        "comparison.json": lambda path: write_json(comparison, path),
        "table.md": lambda path: path.write_text(markdown(comparison), encoding="utf-8"),
        "convergence.png": lambda path: draw(comparison, path),
        "report.html": report,
    }
    return write_together(out, writers)


def write_together(out: Path, writers: Mapping[str, Writer]) -> list[Path]:
    """Write a file of each name into `out`; they appear together, after all of them could be written, in the
    order of `writers`. Returns their paths.

    Raises:
        UserError: the disk is full, or `out` cannot be written or holds another's file of such a name.
    """
    check_free(out, writers)
    partial = out / ".partial"
    with telling_disk_faults(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for name, writer in writers.items():
                writer(partial / name)
            paths = [out / name for name in writers]
            for path in paths:
                (partial / path.name).replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return paths


def check_free(out: Path, names: Iterable[str]) -> None:
    """Refuse a folder in which files of these names are another's: an earlier result has its record there,
    and a study its definition.

    Raises:
        UserError: naming each of them.
    """
    there = [name for name in names if os.path.lexists(out / name)]
    records = [name for name in there if name.endswith(".json")]
    is_ours = bool(records) or (out / DEFINITION).is_file()
    others = [name for name in there if not is_ours or not (out / name).is_file()]
    if others:
        raise UserError(
            f"{out}: {', '.join(others)} would be written over, and no earlier result of this kind is there; "
            "move it away, or choose another folder"
        )


def show(comparison: Comparison, console: Console) -> None:
    """Print the answer, the table, the grid if there is one, and what a reader should know."""
    console.print()
    for line in (f"{UNLIKE}:", *comparison.differences) if comparison.differences else ():
        console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(
        _table("best learning rate of each arm", HEADER, [cells(row) for row in comparison.best_rows])
    )
    if comparison.changes:
        changes = list(map(change_cells, comparison.changes))
        console.print(_table(CHANGES, CHANGE_HEADER, changes))
    if len(comparison.rows) > len(comparison.best_rows):
        console.print(
            _table(
                "the whole grid, ★ the best of its arm",
                GRID_HEADER,
                [grid_cells(row) for row in comparison.rows],
            )
        )
    for note in comparison.notes:
        console.print(f"note: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print(METHOD, style="dim", markup=False, highlight=False)
    console.print(
        f"\n{capital(answer(comparison))}.",
        style="bold",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def console() -> Console:
    """A console wide enough for the table where nobody watches: a log file has no width."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=170)


def _table(title: str, header: tuple[str, ...], rows: list[list[str]]) -> object:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        is_name = i == 0
        table.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "scratch" else None)
    return table


def to_wandb(comparison: Comparison, out: Path, project: str) -> None:
    """Mirror a comparison of costs into W&B, grouped with the study's runs."""
    summary = {
        "answer": answer(comparison),
        "differences": list(comparison.differences),
        "notes": list(comparison.notes),
    }
    lines = list(map(flat_row, comparison.rows))
    mirror(comparison.study, lines, {"convergence": out / "convergence.png"}, summary, project)


def mirror(
    study: str,
    lines: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path],
    summary: Mapping[str, Any],
    project: str,
) -> None:
    """Mirror table, pictures and findings of a study into W&B, grouped with its runs.

    Offline, beside the pictures, unless WANDB_MODE says otherwise. A fault of W&B is told: the files are
    complete without it.
    """
    try:
        _mirror(study, lines, pictures, summary, project)
    except Exception as error:  # of every kind
        reason = in_one_line(error)
        folder = next(iter(pictures.values())).parent
        print(f"W&B: not mirrored ({reason}); the files in {folder} are complete", file=sys.stderr)


def _mirror(
    study: str,
    lines: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path],
    summary: Mapping[str, Any],
    project: str,
) -> None:
    import wandb

    folder = next(iter(pictures.values())).parent
    run = wandb.init(
        project=weights_and_biases.project(project), group=study[:LONGEST_NAME], job_type="comparison",
        name=f"{study}-comparison"[-LONGEST_NAME:], dir=str(folder),
        mode=cast(Any, os.environ.get("WANDB_MODE", "offline")), settings=wandb.Settings(silent=True),
    )  # fmt: skip
    weights_and_biases.say_where(run, print)
    values = [list(map(_plain, line.values())) for line in lines]
    table = wandb.Table(columns=list(lines[0]), data=values)
    paths = {name: str(path) for name, path in pictures.items()}
    images = {name: wandb.Image(path) for name, path in paths.items()}
    run.log({"comparison": table, **images})
    for key, value in summary.items():
        run.summary[key] = value
    run.finish()


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
