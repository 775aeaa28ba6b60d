"""Tell what models cost to train and to run, beside published costs.

outgrow cost runs/phi_1b-lossless-s0 CHECKPOINT          measured on this machine, and forecast for an A100
outgrow cost CHECKPOINT devices=[H100,'RTX 4090']        forecast for other devices
outgrow cost CHECKPOINT measure=false                    forecasts alone: from the config, in seconds

A run's ledger gives its training; of a checkpoint without a ledger, training is left open. Keys and defaults:
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from outgrow.experiments.door import go_through
from outgrow.model.base.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The door."""
    return go_through(arguments, __doc__, "cost.yaml", _cost, "stopped")


def _cost(folders: Sequence[str], overrides: Sequence[str], own: Path | None) -> None:
    """Count and measure the folders, and write and print their table."""
    from outgrow.experiments.footprint.footprint import footprints, settings_from
    from outgrow.experiments.footprint.table import as_csv, as_json, markdown
    from outgrow.experiments.placing import placed
    from outgrow.experiments.publish import Writer, write_together
    from outgrow.model.base.files import write_json, write_text
    from outgrow.train.run.beside import check_beside

    settings = settings_from(overrides, own)
    if not folders:
        raise UserError(
            "cost: give runs or checkpoints, such as outgrow cost runs/phi_1b-lossless-s0 devices=[H100]"
        )
    named = None if settings.out is None else Path(settings.out)
    if named is not None:  # before what takes minutes
        check_beside(named, "out=DIR")
    rows = footprints(folders, settings)
    text = markdown(rows, settings)
    writers: dict[str, Writer] = {
        "cost.md": lambda path: write_text(path, text),
        "cost.csv": lambda path: write_text(path, as_csv(rows)),
        "cost.json": lambda path: write_json(path, as_json(rows, settings)),
    }
    with placed(named, Path("runs/cost"), folders, "out=DIR") as out:
        write_together(out, writers)
    print(text)
    print(f"{out / 'cost'}.md, .csv, .json")


if __name__ == "__main__":
    sys.exit(main())
