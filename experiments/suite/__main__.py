"""Benchmarks of runs and checkpoints, beside published ones.

outgrow evaluate runs/phi_1b-* suite=phi_2                                the table of Phi-2, as far as the
                                                                          hub's data sets can be reached
outgrow evaluate CHECKPOINT suite=phi_2 tasks=DIR only=[piqa,boolq]       offline, from task files in
                                                                          lm-evaluation-harness's YAML format
outgrow evaluate CHECKPOINT only=[humaneval,mbpp] run_code=true           runs the programs that the model
                                                                          writes
outgrow evaluate CHECKPOINT suite=mine --config-dir DIR                   a suite of your own:
                                                                          DIR/suite/mine.yaml

Scores are kept task by task in runs/evaluation/scores, or out/scores, so that a command that was stopped
goes on. Keys and defaults:

"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from outgrow.experiments.door import go_through
from outgrow.model.base.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The door."""
    stopped = "stopped; the same command goes on from here"
    return go_through(arguments, __doc__, "evaluate.yaml", _evaluate, stopped)


def _evaluate(runs: Sequence[str], overrides: Sequence[str], own: Path | None) -> None:
    """Measure the runs, and write and print their table."""
    from outgrow.experiments.placing import placed
    from outgrow.experiments.publish import Writer, check_free, write_together
    from outgrow.experiments.suite.evaluate import HOME, evaluate, settings_from
    from outgrow.experiments.suite.figure import draw
    from outgrow.experiments.suite.table import as_json, markdown
    from outgrow.model.base.files import write_json, write_text
    from outgrow.train.run.beside import check_beside

    settings = settings_from(overrides, own)
    if not runs:
        raise UserError(
            "evaluate: give runs or checkpoints, such as outgrow evaluate runs/phi_1b-lossless-s0 suite=phi_2"
        )
    suite = settings.suite
    named = None if settings.out is None else Path(settings.out)
    names = [f"{suite.name}{ending}" for ending in (".md", ".json", ".png")]
    if named is not None:  # before what takes hours
        check_beside(named, "out=DIR")
        check_free(named, names)
    evaluated = evaluate(runs, settings)
    text = markdown(suite, evaluated)
    writers: list[Writer] = [
        lambda path: write_text(path, text),
        lambda path: write_json(path, as_json(suite, evaluated)),
        lambda path: draw(suite, evaluated, path),
    ]
    with placed(named, HOME / suite.name, runs, "out=DIR") as out:
        write_together(out, dict(zip(names, writers, strict=True)))
    print(text)
    print(f"{out / suite.name}.md, .json, .png")


if __name__ == "__main__":
    sys.exit(main())
