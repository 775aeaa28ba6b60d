"""What models cost to train and to run, beside published costs.

outgrow cost runs/phi_1b-lossless-s0 CHECKPOINT          measured on this machine, and forecast for an A100
outgrow cost CHECKPOINT devices=[H100,'RTX 4090']        forecast for other devices
outgrow cost CHECKPOINT measure=false                    forecasts alone: from the config, in seconds

A run's ledger gives its training; of a checkpoint without a ledger, training is left open. Keys and defaults:

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
        print(str(__doc__) + (CONF / "cost.yaml").read_text(encoding="utf-8"))
        return 0
    try:
        return _cost([text for text in given if "=" not in text], [text for text in given if "=" in text])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _cost(folders: Sequence[str], overrides: Sequence[str]) -> int:
    from outgrow.experiments.footprint.footprint import footprints, settings_from
    from outgrow.experiments.footprint.table import as_csv, as_json, markdown
    from outgrow.model.base.files import write_json, write_text

    settings = settings_from(overrides)
    if not folders:
        raise UserError(
            "cost: give runs or checkpoints, such as outgrow cost runs/phi_1b-lossless-s0 devices=[H100]"
        )
    rows = footprints(folders, settings)
    out = Path(settings.out)
    text = markdown(rows, settings)
    write_text(out / "cost.md", text)
    write_text(out / "cost.csv", as_csv(rows))
    write_json(out / "cost.json", as_json(rows, settings))
    print(text)
    print(f"{out / 'cost'}.md, .csv, .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
