"""The record of a growth: `growth.json` and the model card, written last and read again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from outgrow.growth.card import Stated, licence, model_card
from outgrow.growth.folder import RECIPE, files_in
from outgrow.growth.plan import Plan
from outgrow.growth.planning import plan
from outgrow.growth.verify import Receipt
from outgrow.model.base.errors import UserError
from outgrow.model.companions import is_terms
from outgrow.model.composite import nested
from outgrow.model.config import read_json
from outgrow.model.keys import is_number

LEDGER_KEYS = ("tokens", "flops", "val_loss")


@dataclass(frozen=True)
class Provenance:
    """The origin of what was grown, as the record names it.

    Attributes:
        name: of the source, as it was given: a folder, or a name on the hub.
        revision: the commit that was asked for.
        notes: what of the source was passed over, in words.
        ledger: what the source cost (`read_ledger`).
        terms: what its model card says of the licence.
    """

    name: str
    revision: str | None
    notes: tuple[str, ...]
    ledger: dict[str, Any] | None
    terms: Stated

    @classmethod
    def of(cls, name: str, revision: str | None, notes: tuple[str, ...], folder: Path) -> Provenance:
        """Read what lies beside the weights in the source's folder.

        Raises:
            UserError: its ledger cannot be read.
        """
        ledger = read_ledger(folder)
        terms = licence(folder / "README.md")
        return cls(name, revision, notes, ledger, terms)


def read_ledger(folder: Path) -> dict[str, Any] | None:
    """Read the source's cost and loss, where training has written them beside the weights.

    Raises:
        UserError: ledger.json is no JSON object, or holds something else than numbers there.
    """
    file = folder / "ledger.json"
    if not file.exists():
        return None
    ledger = read_json(file)
    counts = {key: ledger.get(key) for key in LEDGER_KEYS}
    UserError.collect(
        f"{file}: {key} must be a finite number of at least 0, or null; found {value!r:.80}"
        for key, value in counts.items()
        if not _is_count(value)
    )
    return ledger


def _is_count(value: Any) -> bool:
    if value is None:
        return True
    return is_number(value) and 0 <= value < inf


def write_record(
    folder: Path,
    plan: Plan,
    provenance: Provenance,
    receipt: Receipt | None,
    learned: dict[str, Any] | None,
) -> None:
    """Write `growth.json`, and a model card that says the same in words, under the terms of the source's
    licence.
    """
    names = [path.name for path in folder.iterdir()]
    licences = sorted(filter(is_terms, names))
    card = model_card(plan, provenance.name, receipt, provenance.terms, licences)
    card_file = folder / "README.md"
    card_file.write_text(card, encoding="utf-8", errors="backslashreplace")
    record = _record(plan, provenance, receipt, learned)
    record["files"] = files_in(folder)  # the card is one of them
    text = json.dumps(record, indent=1)
    (folder / RECIPE).write_text(f"{text}\n")


def _record(
    plan: Plan, provenance: Provenance, receipt: Receipt | None, learned: dict[str, Any] | None
) -> dict[str, Any]:
    """Compose `growth.json`, but for the list of files."""
    source = {
        "name": provenance.name,
        "revision": provenance.revision,
        "config": nested(plan.source_config),
        "notes": list(provenance.notes),
        "ledger": provenance.ledger,
    }
    target = {"config": nested(plan.target_config)}
    reasons = list(plan.certificate.reasons)
    certificate = {"lossless": plan.certificate.lossless, "reasons": reasons}
    measured = None if receipt is None else receipt.to_dict()
    lesson = {} if learned is None else {"learned": learned}
    return {
        "source": source,
        "target": target,
        "plan_hash": plan.hash,
        "certificate": certificate,
        "remarks": list(plan.remarks),
        "receipt": measured,
        **lesson,
        "plan": plan.to_dict(),
    }


def recorded_plan(folder: Path | str) -> Plan:
    """The plan that a grown folder followed, made again from its `growth.json`; no weights are read.

    Raises:
        UserError: the folder was not grown by this library, or what it records does not give the plan that it
            names.
    """
    file = Path(folder) / RECIPE
    record = read_json(file)
    try:
        planned = record["plan"]
        source = record["source"]["config"]
        target = record["target"]["config"]
        named = record["plan_hash"]
        operator = planned["operator"]
        is_list = planned["depth"] == "list"
        depth = planned["layers" if is_list else "depth"]
        how = {
            "depth": depth,
            "noise": planned["noise"],
            "fresh": planned.get("fresh", "init"),
            "seed": planned["seed"],
            "dtype": planned.get("dtype"),
            **planned["options"],
        }
    except (KeyError, TypeError) as fault:
        raise UserError(f"{file}: no record of a growth that can be followed again ({fault})") from None
    again = plan(source, target, operator, **how)
    if again.hash != named:
        raise UserError(
            f"{file}: gives plan {again.hash}, but records plan {named}; was it edited, "
            "or grown by another version?"
        )
    return again
