"""Benchmarks of runs and checkpoints, beside published ones.

outgrow evaluate runs/phi_1b-* suite=phi_2                                the table of Phi-2, as far as the
                                                                          hub's data sets can be reached
outgrow evaluate CHECKPOINT suite=phi_2 tasks=DIR only=[piqa,boolq]       offline, from task files in
                                                                          lm-evaluation-harness's YAML format
outgrow evaluate CHECKPOINT only=[humaneval,mbpp] run_code=true           runs the programs that the model
                                                                          writes

Scores are kept task by task in out/scores, so that a command that was stopped goes on. Keys and defaults:

"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from outgrow.model.base.errors import UserError
from outgrow.model.base.settings import CONF


def main(arguments: Sequence[str] | None = None) -> int:
    """The door."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print(str(__doc__) + (CONF / "evaluate.yaml").read_text(encoding="utf-8"))
        return 0
    try:
        return _evaluate([text for text in given if "=" not in text], [text for text in given if "=" in text])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _evaluate(runs: Sequence[str], overrides: Sequence[str]) -> int:
    from outgrow.experiments.suite.evaluate import evaluate, settings_from
    from outgrow.experiments.suite.figure import draw
    from outgrow.experiments.suite.table import as_json, markdown
    from outgrow.model.base.files import write_json, write_text

    settings = settings_from(overrides)
    if not runs:
        raise UserError(
            "evaluate: give runs or checkpoints, such as outgrow evaluate runs/phi_1b-lossless-s0 suite=phi_2"
        )
    found = evaluate(runs, settings)
    out = Path(settings.out)
    text = markdown(settings.suite, found)
    write_text(out / f"{settings.suite.name}.md", text)
    write_json(out / f"{settings.suite.name}.json", as_json(settings.suite, found))
    draw(settings.suite, found, out / f"{settings.suite.name}.png")
    print(text)
    print(f"{out / settings.suite.name}.md, .json, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
