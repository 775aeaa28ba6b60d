"""Compare runs, or run a whole study and compare it.

outgrow compare runs/tiny-* [--out DIR] [--wandb]    seconds: a table, convergence.png, report.html
outgrow horizons runs/NAME-t* [--out DIR]            seconds: S of every arm against scratch's decayed ends
outgrow frontier runs/NAME-t* [--out DIR]            the best size of each budget, of flat models
outgrow family runs/NAME-*-t* [--out DIR]            what products of several sizes cost together
outgrow predict runs/NAME-*-t* --horizons N --out DIR
                                                     when to grow and what it will be worth, in writing
outgrow study tiny [--jobs N]                          minutes: source, every arm, comparison; what is done is
                                                       skipped
outgrow study tiny --full                              hours: three seeds, a grid of learning rates for every
                                                       arm
outgrow study mine --config-dir DIR                    with leaves of your own: DIR/data/mine.yaml, …
outgrow select tiny_transfer lossless random_pad lag_tokens=N
                                                     successive halving: which start leads after a lag
outgrow same REV                                     minutes: does a change alter a number? two revisions,
                                                     compared to the bit

Exit status: 0 done, 1 a run failed or a number differs, 2 a fault in what was asked, 75 (EX_TEMPFAIL) a
study was stopped by SIGTERM, its runs have saved: start the same command again, 130 the same by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outgrow.experiments.study_file import read_study, studies
from outgrow.model.base.errors import UserError
from outgrow.model.base.files import write_text
from outgrow.model.base.interrupt import Terminated, started, terminable
from outgrow.model.base.overrides import FOLDER_FLAGS, leaves_folder
from outgrow.train.run.trackers import installed

if TYPE_CHECKING:
    from outgrow.experiments.compare import Comparison
    from outgrow.experiments.study import Done

Add = Callable[..., argparse.ArgumentParser]  # adds a command of that name


def main(arguments: Sequence[str] | None = None) -> int:
    """The door."""
    options = parser().parse_args(arguments)
    try:
        commands = {
            "compare": _compare,
            "horizons": _horizons,
            "frontier": _frontier,
            "family": _family,
            "predict": _predict,
            "study": _study,
            "run": _study,
            "select": _select,
            "same": _same,
        }
        if getattr(options, "wandb", False) and not installed("wandb"):
            raise UserError("--wandb: not installed; pip install -e '.[train]', or leave --wandb out")
        with terminable():
            return commands[options.command](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return os.EX_TEMPFAIL if isinstance(stop, Terminated) else 130


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    doors = argparse.ArgumentParser(
        prog="outgrow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = doors.add_subparsers(dest="command", required=True).add_parser
    _add_compare(add)
    _add_horizons(add)
    _add_frontier(add)
    _add_family(add)
    _add_predict(add)
    _add_study(add)
    _add_select(add)
    _add_same(add)
    return doors


def _add_compare(add: Add) -> None:
    compare = add("compare", help="compare finished runs")
    _read_runs(compare, "run folders, as `outgrow train` writes them")
    _out(compare, "runs/comparison-<study>")
    _mirror(compare)


def _add_horizons(add: Add) -> None:
    horizons = add(
        "horizons",
        help="hold decayed ends against scratch's curve: the effective speed-up S of every arm",
    )
    _read_runs(horizons, "run folders that decayed to their ends, or records of such (ends.json)")
    _out(horizons, "runs/horizons", "; a README.md there gets the table between its markers")
    _mirror(horizons)


def _add_frontier(add: Add) -> None:
    frontier = add(
        "frontier",
        help="the compute-optimal size from flat models: 4 sizes, 2 horizons each; a law from 3 horizons",
    )
    _read_runs(
        frontier,
        "run folders that decayed to their ends, records of such (ends.json), or a study that has one",
    )
    _out(frontier, "runs/frontier")


def _add_family(add: Add) -> None:
    family = add("family", help="sum the cost of products of several sizes, against scratch at equal losses")
    _read_runs(family, "runs that decayed, or a record of such")
    _out(family, "runs/family")


def _add_predict(add: Add) -> None:
    predict = add(
        "predict", help="write down when to grow and what it will be worth, before a horizon is measured"
    )
    _read_runs(predict, "runs that decayed, or a record of such")
    predict.add_argument(
        "--horizons",
        nargs="+",
        type=int,
        required=True,
        metavar="TOKENS",
        help="to predict, not yet measured",
    )
    predict.add_argument("--optimizer", default="muon", help="of the arms that are read")
    predict.add_argument(
        "--out", type=Path, required=True, help="where `outgrow horizons --out` will find it"
    )


def _add_study(add: Add) -> None:
    run = add("study", aliases=["run"], help="run a study: source, arms, comparison")
    run.add_argument("study", nargs="?", help="such as tiny; without it, all are listed")
    run.add_argument("--full", action="store_true", help="all seeds and the whole grid of learning rates")
    _run_at_once(run)
    _own_leaves(run)
    _mirror(run)


def _add_select(add: Add) -> None:
    select = add("select", help="choose a start by its loss after a lag, by successive halving")
    select.add_argument("study", help="whose source, text and target are used")
    select.add_argument(
        "words",
        nargs="+",
        metavar="CANDIDATE|KEY=VALUE",
        help="arms of the study or leaves of conf/growth, with changes in quotes ('lossless "
        "growth.depth=stack'); lag_tokens=N, keep=0.5, seeds=[0]; anything else with = is an override of all",
    )
    _run_at_once(select)
    _own_leaves(select)


def _add_same(add: Add) -> None:
    same = add(
        "same", help="compare plans, grown weights and a toy run of this tree with those of another revision"
    )
    same.add_argument("revision", metavar="REV", help="a commit, branch or tag of this clone")


def _read_runs(command: argparse.ArgumentParser, runs: str) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help=runs)


def _out(command: argparse.ArgumentParser, default: str, more: str = "") -> None:
    beside = "one beside it, where that holds a result of other runs"
    text = f"where the files go (default: {default}, or {beside}){more}"
    command.add_argument("--out", type=Path, help=text)


def _run_at_once(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one for each core)")


def _own_leaves(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        *FOLDER_FLAGS,
        metavar="DIR",
        help="a folder of leaves of your own (experiment/, data/, …), which the runs may name too",
    )


def _own(options: argparse.Namespace) -> Path | None:
    name: str | None = options.config_dir
    return None if name is None else leaves_folder(FOLDER_FLAGS[0], name)


def _mirror(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--wandb",
        action="store_true",
        help="mirror table and picture into W&B, offline unless WANDB_MODE says otherwise",
    )


def _compare(options: argparse.Namespace) -> int:
    from outgrow.experiments.compare import compare
    from outgrow.experiments.placing import by_hand, placed

    comparison = compare(options.runs)
    default = by_hand(comparison.study.replace(", ", "+"))
    with placed(options.out, default, options.runs) as out:
        publish(comparison, out, wandb=options.wandb)
    return 0


def _horizons(options: argparse.Namespace) -> int:
    from outgrow.experiments.horizon_report import TABLE, write
    from outgrow.experiments.placing import placed
    from outgrow.experiments.prediction import RECORD as PREDICTION
    from outgrow.experiments.prediction import read_prediction, write_measured
    from outgrow.experiments.study import page_of
    from outgrow.experiments.table import insert_table

    with placed(options.out, Path("runs/horizons"), options.runs) as out:
        readme = page_of(out)
        is_predicted = (out / PREDICTION).is_file()
        if is_predicted:
            read_prediction(out / PREDICTION)
        for line in write(options.runs, out, wandb=options.wandb):
            print(line)
        if is_predicted:
            print(write_measured(out))
        if readme is not None:
            table = (out / TABLE).read_text(encoding="utf-8")
            insert_table(readme, table)
    return 0


def _frontier(options: argparse.Namespace) -> int:
    from outgrow.experiments.ends import RECORD
    from outgrow.experiments.frontier_report import write
    from outgrow.experiments.placing import placed

    records = {name: str(folder / RECORD) for name, folder in studies().items()}
    inputs = [records.get(name, name) for name in options.runs]
    with placed(options.out, Path("runs/frontier"), inputs) as out:
        for line in write(inputs, out):
            print(line)
    return 0


def _family(options: argparse.Namespace) -> int:
    from outgrow.experiments.placing import placed
    from outgrow.experiments.products import write

    with placed(options.out, Path("runs/family"), options.runs) as out:
        for line in write(options.runs, out):
            print(line)
    return 0


def _predict(options: argparse.Namespace) -> int:
    from outgrow.experiments.placing import placed
    from outgrow.experiments.prediction import write

    with placed(options.out, options.out, options.runs) as out:
        for line in write(options.runs, options.horizons, options.optimizer, out):
            print(line)
    return 0


def _study(options: argparse.Namespace) -> int:
    if options.study is None:
        for name in studies():
            print(f"{name}: {read_study(name).question}")
        return 0
    from outgrow.experiments.placing import placed
    from outgrow.experiments.study import RunFailed, run_study
    from outgrow.experiments.table import insert_table

    try:
        at_once, own = options.jobs, _own(options)
        outcome = run_study(options.study, full=options.full, jobs_at_once=at_once, own=own)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with placed(outcome.out, outcome.out, []):
        table = compare_arms(outcome, wandb=options.wandb)
        if outcome.readme is not None:
            insert_table(outcome.readme, table)
    return 0


def compare_arms(outcome: Done, *, wandb: bool) -> str:
    """Compare a study's arms in every way that it asks for, and write `table.md`; return that table."""
    table = outcome.out / "table.md"
    parts = []
    if outcome.costs:
        compare_costs(outcome, wandb=wandb)
        parts.append(table.read_text(encoding="utf-8"))
    if outcome.texts:
        from outgrow.experiments.judgement import judge
        from outgrow.experiments.judgement_report import write

        judgement = judge(outcome.folders, outcome.texts)
        parts.append(write(judgement, outcome.out))
        print(parts[-1])
        write_text(table, "\n".join(parts))
    return "\n".join(parts)


def compare_costs(outcome: Done, *, wandb: bool) -> None:
    """Hold the arms' costs against scratch's: those of decayed ends where the study has horizons."""
    if not outcome.horizons:
        from outgrow.experiments.compare import compare

        publish(compare(outcome.folders), outcome.out, wandb=wandb)
        return
    folders = list(map(str, outcome.folders))
    if outcome.family:
        from outgrow.experiments import products

        lines = products.write(folders, outcome.out)
    else:
        from outgrow.experiments import horizon_report

        lines = horizon_report.write(folders, outcome.out, wandb=wandb)
    for line in lines:
        print(line)


def _select(options: argparse.Namespace) -> int:
    from outgrow.experiments.halving import question
    from outgrow.experiments.selection import select
    from outgrow.experiments.selection_report import RECORD, table, write
    from outgrow.experiments.study import RunFailed

    subject = question(options.study, options.words, _own(options))
    try:
        selection = select(subject, jobs_at_once=options.jobs)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(selection, subject.out)
    print(table(selection))
    print(f"take {selection.winner.label}; {subject.out / RECORD} holds all of it")
    return 0


def _same(options: argparse.Namespace) -> int:
    from outgrow.experiments.same import compare

    count, differences = compare(options.revision)
    for difference in differences:
        print(
            f"{difference.name}: {difference.there or 'none'} at {options.revision}, "
            f"{difference.here or 'none'} here"
        )
    same = count - len(differences)
    print(f"{same} of {count} numbers are the same to the bit as at {options.revision}")
    return 1 if differences else 0


def publish(comparison: Comparison, out: Path, *, wandb: bool) -> None:
    """Print and write one comparison."""
    from outgrow.experiments import publish as to

    console = to.console()
    to.show(comparison, console)
    for path in to.write(comparison, out):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    if wandb:
        to.to_wandb(comparison, out, project="knowledge-transfer")


if __name__ == "__main__":
    started()
    sys.exit(main())
