"""The JSON files of a run's folder as frozen values, shared by the run that writes them and by all that read
them.

run.json       RunRecord      which run it is, every setting, what was counted, how it started
metrics.jsonl  Evaluation     its rows of kind "eval", beside the clocks: one for each validation
summary.json   Summary        what the run reached; written last, so that a run which has one is complete

Entries that records got over time have defaults, and entries that are not known are ignored, so that older
and newer folders stay readable. run.json and summary.json carry the SHA-256 of their own entries, and
summary.json that of metrics.jsonl, so that what was edited or damaged is not believed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import plain_json, read_object
from outgrow.model.base.settings import read
from outgrow.model.keys import is_number, only, without
from outgrow.train.settings import Settings, settings_hash
from outgrow.train.start.naming import arm_changes

T = TypeVar("T")
SIGNATURE = "sha256"  # of the other entries of a record


# ---- run.json ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Steps that cost the same: up to step `last`, `flops_per_token` FLOPs for each token."""

    last: int
    flops_per_token: float


def flops_after(spans: Sequence[Span], step: int, tokens_per_step: int) -> float:
    """All FLOPs of the first `step` steps."""
    total, first = 0.0, 0
    for span in spans:
        steps = max(0, min(step, span.last) - first)
        total += steps * tokens_per_step * span.flops_per_token
        first = span.last
    return total


@dataclass(frozen=True)
class SourceCost:
    """Cost and loss of the checkpoint that a run starts from; None: nobody knows."""

    path: str | None = None
    tokens: int | None = None
    flops: float | None = None
    val_loss: float | None = None


@dataclass(frozen=True)
class Start:
    """The origin of a run's weights before its first step.

    Attributes:
        operator, depth: the growth, and its layer map.
        lossless, reasons: the certificate, and why it says no; None where nothing grew.
        receipt: differences of logits between source and target, measured (`growth.verify`).
        operator_flops: of the operator's own optimization steps.
        source: None for a run from scratch.
        source_dtype: of most of the source's bytes, by torch's name.
    """

    operator: str = "unknown"
    depth: str | None = None
    lossless: bool | None = None
    reasons: tuple[str, ...] = ()
    receipt: dict[str, Any] | None = None
    operator_flops: float = 0.0
    source: SourceCost | None = None
    source_dtype: str | None = None

    @property
    def max_delta(self) -> float | None:
        """max |Δlogit| of the receipt; None where nothing was measured."""
        return self.measured("max_delta")

    def measured(self, key: str) -> float | None:
        """A number of the receipt; None where it has none."""
        value = None if self.receipt is None else self.receipt.get(key)
        return float(value) if is_number(value) else None


@dataclass(frozen=True)
class TextRecord:
    """The tokens that a run reads.

    Attributes:
        tokens_read: of each source of a mixture.
        cut: tokenizer and folder of tokens, where the source's own tokenizer was chosen.
    """

    fingerprint: str
    bytes_per_token: float | None = None
    tokens_read: dict[str, int] = field(default_factory=dict)
    cut: dict[str, str] | None = None


@dataclass(frozen=True)
class Trunk:
    """The state of a shorter horizon that a run went on from, and what it had cost by then."""

    folder: str
    step: int
    tokens: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class RunRecord:
    """run.json: written before step 1, and never changed.

    Attributes:
        active_parameters: that each token meets; fewer than all in a mixture of experts.
        changes: settings other than the experiment's defaults, as labels of the arm.
        settings_hash: of the settings that change a result.
        flops_from: how FLOPs were counted.
        spans: what the steps cost, where that changes on the way.
        weights: hashes of the weights that are read at every start (a teacher's; the source's that is trained
            on).
    """

    study: str
    arm: str
    seed: int
    settings: dict[str, Any]
    settings_hash: str
    start: Start
    parameters: int
    flops_per_token: float
    tokens_per_step: int
    budget_tokens: int
    data: TextRecord
    target_config: dict[str, Any]
    precision: str
    active_parameters: int | None = None
    name: str = ""
    changes: tuple[str, ...] = ()
    flops_from: str | None = None
    device: str | None = None
    processes: int = 1
    threads: int | None = None
    attention: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    weights: dict[str, str] = field(default_factory=dict)
    trunk: Trunk | None = None

    @classmethod
    def of(cls, settings: Settings, **measured: Any) -> RunRecord:
        """The record of the run that `settings` describe.

        `measured` are the fields that settings do not tell.
        """
        return cls(
            study=settings.study,
            arm=settings.growth.name,
            seed=settings.seed,
            name=settings.name,
            changes=tuple(arm_changes(settings.changes)),
            settings=asdict(settings),
            settings_hash=settings_hash(settings),
            **measured,
        )

    @classmethod
    def read(cls, path: Path, way_out: str) -> RunRecord:
        """Read run.json.

        Raises:
            UserError: it cannot be read, or an entry is missing or mistyped; the message ends with `way_out`.
        """
        return _read(cls, path, way_out)

    @property
    def active(self) -> int:
        """The parameters that each token meets."""
        return self.parameters if self.active_parameters is None else self.active_parameters

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        values = asdict(self)
        if self.trunk is None:
            del values["trunk"]
        return values

    def setting(self, path: str) -> Any:
        """The value at a dotted `path` of the settings, or None."""
        value: Any = self.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def planned_flops(self, tokens: float) -> float:
        """FLOPs that `tokens` should have cost: the same for each, unless the network grew or was taught on
        the way.
        """
        if not self.spans:
            return tokens * self.flops_per_token
        steps = round(tokens / self.tokens_per_step)
        return flops_after(self.spans, steps, self.tokens_per_step)


# ---- summary.json ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """summary.json. Losses in nats/token; `seconds` of the training clock, without evaluations and saving."""

    start_val_loss: float
    final_val_loss: float
    bits_per_byte: float
    tokens: int
    flops: float
    seconds: float = 0.0
    steps: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite
    ema_val_loss: float | None = None  # of the averaged weights (EMA), where there are any
    ema_bits_per_byte: float | None = None
    metrics: str | None = None  # SHA-256 of metrics.jsonl

    @property
    def of_average(self) -> Summary:
        """The same run's, told of the averaged weights."""
        assert self.ema_val_loss is not None
        assert self.ema_bits_per_byte is not None
        return dataclasses.replace(
            self, final_val_loss=self.ema_val_loss, bits_per_byte=self.ema_bits_per_byte
        )

    @classmethod
    def read(cls, path: Path, way_out: str) -> Summary:
        """Read summary.json.

        Raises:
            UserError: as `RunRecord.read` does.
        """
        return _read(cls, path, way_out)

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        return asdict(self)


# ---- metrics.jsonl -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """A validation loss, and the same loss by bytes of text, so that tokenizers can be compared."""

    val_loss: float  # nats per token; its exponential is the perplexity
    bits_per_byte: float


@dataclass(frozen=True)
class LoggedEvaluation:
    """An evaluation in metrics.jsonl: where the run stood, and its loss."""

    tokens: float
    flops: float
    val_loss: float  # NaN where it was not finite


def read_evaluations(path: Path, way_out: str) -> list[LoggedEvaluation]:
    """Read the `eval` rows of a metrics.jsonl, in order.

    Raises:
        UserError: as `read_rows` does.
    """
    return read_rows(path, way_out, _evaluation)


def read_rows(path: Path, way_out: str, parse: Callable[[Any], T | None]) -> list[T]:
    """The rows of a metrics.jsonl as `parse` makes them, in order; those of which it makes None are left out.

    A last line that was cut off in the writing is skipped.

    Raises:
        UserError: a line is no JSON object, or has no number where one should be; the message ends with
            `way_out`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {way_out}") from error
    rows: list[T] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a JSON object ({error}); {way_out}") from error
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: no row of a run's metrics ({error}); {way_out}",
            ) from error
        if row is not None:
            rows.append(row)
    return rows


def _evaluation(row: Any) -> LoggedEvaluation | None:
    """A row as an evaluation, None for one of another kind.

    A loss that is not finite may stand there as null or NaN.
    """
    if not isinstance(row, dict):
        raise TypeError(f"expected an object, found {type(row).__name__}")
    if row.get("kind") != "eval":
        return None
    value = row["val_loss"]
    loss = math.nan if value is None else float(value)
    tokens = float(row["tokens"])
    flops = float(row["flops"])
    return LoggedEvaluation(tokens, flops, loss)


# ---- reading -----------------------------------------------------------------------------------------------


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a record as a JSON file holds them, with the hash by which `_read` knows them again."""
    text = json.dumps(plain_json(record))
    entries = json.loads(text)
    return entries | {SIGNATURE: digest_of(entries)}


def digest_of(entries: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, in whatever order they stand."""
    text = json.dumps(entries, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(cls: type[T], path: Path, way_out: str) -> T:
    faults: list[str] = []
    record = read_object(path, way_out)
    entries = without(record, (SIGNATURE,))
    if record.get(SIGNATURE, digest_of(entries)) != digest_of(entries):  # older records have none
        raise UserError(f"{path}: it was edited or damaged after it was written; {way_out}")
    value = read_known(cls, entries, "", faults)
    if value is None:
        raise UserError(f"{path}: {'; '.join(faults)}; {way_out}")
    return value


def read_known(cls: type[T], entries: Any, path: str, faults: list[str]) -> T | None:
    """`entries` as the dataclass `cls`, without those that it has no field for; None, and at least one more
    entry in `faults`, where they do not fit. `path` is the prefix for messages.
    """
    return read(cls, _known(cls, entries), path, faults)


def _known(hint: Any, value: Any) -> Any:
    """`value` without the entries that the dataclass `hint`, or a dataclass in it, has no field for."""
    choices = [hint, *typing.get_args(hint)]
    cls = next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)
    if cls is not None and isinstance(value, list):
        return [_known(cls, item) for item in value]
    if cls is None or not isinstance(value, Mapping):
        return value
    hints = typing.get_type_hints(cls)
    return {key: _known(hints[key], item) for key, item in only(value, hints).items()}
