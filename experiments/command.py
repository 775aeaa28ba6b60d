"""The command `outgrow`: every door of the project behind one name.

outgrow grow source=DIR target=phi_2 out=DIR        a checkpoint into a larger one, with a proof
outgrow schema source=DIR                           the schema that is derived for a checkpoint, as a file
outgrow train experiment=tiny growth=lossless       one run, or with -m a sweep
outgrow corpus prepare data=stdlib                  from text to token shards
outgrow study tiny                                  a whole study: source, every arm, comparison; without a
                                                    name, all there are
outgrow compare runs/tiny-*                         finished runs, held against each other
outgrow horizons runs/NAME-t*                       decayed ends against scratch's curve
outgrow select STUDY CANDIDATE… lag_tokens=N        which start to take: successive halving by the loss
                                                    after a lag
outgrow frontier runs/NAME-t*                       the best size of each budget, from flat models
outgrow family runs/NAME-*-t*                       what products of several sizes cost together
outgrow predict runs/NAME-*-t* --horizons N         when to grow and what it will be worth, in writing,
                                                    before it is measured
outgrow same REV                                    does a change alter a number? this clone beside a revision
                                                    of it
outgrow evaluate runs/NAME suite=phi_2              benchmarks, beside published rows
outgrow cost runs/NAME devices=[H100]               GPU-hours, memory and time of a token, beside
                                                    published rows

`outgrow COMMAND --help` tells the keys and defaults of each.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from outgrow.model.base.errors import did_you_mean, not_installed
from outgrow.model.base.interrupt import started, starting

# command → the module that is its door, and what comes before the user's own arguments
DOORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "grow": ("outgrow.growth.__main__", ()),
    "schema": ("outgrow.growth.__main__", ("schema",)),
    "train": ("outgrow.train.__main__", ()),
    "corpus": ("outgrow.train.corpus.__main__", ()),
    "study": ("outgrow.experiments.__main__", ("study",)),
    "compare": ("outgrow.experiments.__main__", ("compare",)),
    "horizons": ("outgrow.experiments.__main__", ("horizons",)),
    "select": ("outgrow.experiments.__main__", ("select",)),
    "frontier": ("outgrow.experiments.__main__", ("frontier",)),
    "family": ("outgrow.experiments.__main__", ("family",)),
    "predict": ("outgrow.experiments.__main__", ("predict",)),
    "same": ("outgrow.experiments.__main__", ("same",)),
    "evaluate": ("outgrow.experiments.suite.__main__", ()),
    "cost": ("outgrow.experiments.footprint.__main__", ()),
}
# commands of earlier versions → what does their work
GONE = {"mixtures": "a study of mixtures is a study.yaml with judged_on: outgrow study NAME --full"}


def main() -> int:
    """Go through the door that the first argument names; its exit status."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if arguments[0] not in DOORS:
        command = arguments[0]
        way_out = GONE.get(command) or did_you_mean(command, DOORS)
        print(f"error: unknown command {command!r}; {way_out}", file=sys.stderr)
        return 2
    module, before = DOORS[arguments[0]]
    sys.argv = [f"outgrow {arguments[0]}", *before, *arguments[1:]]  # Hydra reads it there
    try:
        return _imported(module).main() or 0
    except ModuleNotFoundError as fault:
        missing = not_installed(fault)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        return 2


def _imported(module: str) -> Any:
    """The module of a door; until it is there, Ctrl-C and a queue's signals end the process in silence."""
    starting(is_command=True)
    try:
        return import_module(module)
    finally:
        started()
