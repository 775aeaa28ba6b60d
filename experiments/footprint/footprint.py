"""The costs of runs and checkpoints, a row for each model and device: measured where something was measured,
else forecast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from outgrow.experiments.suite.evaluate import checkpoint_of, titles
from outgrow.model.base.compose import CONF, compose_config
from outgrow.model.base.errors import UserError, reading
from outgrow.model.base.files import read_object
from outgrow.model.base.settings import settings_of
from outgrow.train.run.folder import RUN, SUMMARY
from outgrow.train.run.record import RunRecord, Summary
from outgrow.train.start.source import LEDGER

WAY_OUT = "the folder was edited or damaged: run it again in a new one"


@dataclass(frozen=True)
class CostSettings:
    """conf/cost.yaml."""

    devices: tuple[str, ...]
    context: int
    mfu: float
    measure: bool
    out: str | None


@dataclass(frozen=True)
class Training:
    """A training as its ledger has it; None: nobody knows.

    Attributes:
        flops: of its own training.
        flops_in_all: with its growth's and its source's.
        data_tokens: of the text it read, each once.
        device, device_seconds: where it ran, and for how long on all devices together.
    """

    tokens: int | None = None
    flops: float | None = None
    flops_in_all: float | None = None
    data_tokens: int | None = None
    device: str | None = None
    device_seconds: float | None = None


@dataclass(frozen=True)
class Footprint:
    """One model on one device; None: neither measured nor forecast.

    Attributes:
        kind: measured here or in the run, or forecast from config and data sheet.
        context: tokens of the windows and of the cache; less than asked where the model has no more.
        gpu_hours, gpu_hours_in_all: of the device, for its own training, and with its growth and source.
        micro_batch: the most windows at a time in training.
        ms_per_token: of one sequence; measured, or a lower bound.
        memory_gb: 1e9 bytes at a full context in float16.
    """

    name: str
    device: str
    kind: Literal["measured", "forecast"]
    parameters: int
    context: int
    gpu_hours: float | None = None
    gpu_hours_in_all: float | None = None
    micro_batch: int | None = None
    ms_per_token: float | None = None
    memory_gb: float | None = None
    data_tokens: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Device:
    """A device by its data sheet: FLOP/s in bfloat16, bytes/s, GiB."""

    name: str
    peak: float
    bandwidth: float
    memory: float | None


def settings_from(overrides: Sequence[str], own: Path | None = None) -> CostSettings:
    """The settings under overrides such as `devices=[H100]`.

    Raises:
        UserError: with every fault of them.
    """
    cfg, faults = compose_config(CONF, "cost", list(overrides), own)
    return settings_of(CostSettings, cfg, faults, _disagreements)


def _disagreements(settings: CostSettings) -> Iterator[str]:
    """Yield the faults between well-typed values."""
    if settings.context < 2:
        yield f"context: must be at least 2; found {settings.context}"
    if not 0 < settings.mfu <= 1:
        yield f"mfu: a share of the device's peak, above 0 and at most 1; found {settings.mfu}"


def footprints(folders: Sequence[str], settings: CostSettings) -> list[Footprint]:
    """Every row of every model, in the order given.

    Raises:
        UserError: with every folder that is neither run nor checkpoint, every run without a ledger and every
            unknown device, before anything is measured.
    """
    faults: list[str] = []
    devices, models = [], []
    for name in settings.devices:
        try:
            devices.append(known_device(name))
        except UserError as fault:
            faults.append(str(fault))
    for folder in folders:
        path = Path(folder)
        try:
            with reading(path):
                models.append((checkpoint_of(path), training_of(path)))
        except UserError as fault:
            faults.append(str(fault))
    UserError.collect(faults)
    rows: list[Footprint] = []
    for name, (checkpoint, training) in zip(titles(folders), models, strict=True):
        rows += _rows(name, checkpoint, training, devices, settings)
    return rows


def known_device(name: str) -> Device:
    """A device by name.

    Raises:
        UserError: its bandwidth is not known.
    """
    from outgrow.train.machine.device import BANDWIDTH, MEMORY_GIB, PEAK_BF16_FLOPS, named

    peak = named(PEAK_BF16_FLOPS, name)
    bandwidth = named(BANDWIDTH, name)
    if peak is None or bandwidth is None:
        raise UserError(f"devices: unknown device {name!r}; known: {', '.join(BANDWIDTH)}")
    return Device(name, peak, bandwidth, named(MEMORY_GIB, name))


# ---- training ----------------------------------------------------------------------------------------------


def training_of(folder: Path) -> Training:
    """The training of a run, or of a checkpoint as far as a ledger beside it tells.

    Raises:
        UserError: a run has no ledger, or a ledger cannot be read.
    """
    if not (folder / RUN).is_file():
        ledger = folder / LEDGER
        return _ledger(ledger) if ledger.is_file() else Training()
    checkpoint = checkpoint_of(folder)
    ledger = checkpoint / LEDGER
    summary = folder / SUMMARY
    if not ledger.is_file() or not summary.is_file():
        raise UserError(
            f"{folder}: the run has no ledger ({checkpoint.name}/{LEDGER} and {SUMMARY}), so the cost of its "
            f"training is not known; {WAY_OUT}, or give {checkpoint} alone for the cost of running it"
        )
    record = RunRecord.read(folder / RUN, WAY_OUT)
    seconds = Summary.read(summary, WAY_OUT).seconds
    return replace(
        _ledger(ledger),
        data_tokens=_data_tokens(record),
        device=record.device,
        device_seconds=seconds * record.processes,
    )


def _ledger(path: Path) -> Training:
    ledger = read_object(path, WAY_OUT)
    own = ledger.get("own")
    if not isinstance(own, dict):
        raise UserError(f"{path}: it has no entry 'own', so it is no ledger of a run; {WAY_OUT}")
    numbers = own.get("tokens"), own.get("flops"), ledger.get("flops")
    kinds = {type(number) for number in numbers if number is not None}
    if not kinds <= {int, float}:
        raise UserError(f"{path}: tokens and FLOPs should be numbers; found {numbers}; {WAY_OUT}")
    return Training(*numbers)


def _data_tokens(record: RunRecord) -> int | None:
    """The tokens of the training text, where its manifests are still there."""
    from outgrow.train.compose import settings_from
    from outgrow.train.start.passes import stock

    try:
        settings = settings_from(record.settings)
        texts = [settings.data]
        if settings.mixture is not None:
            sources = settings.mixture.sources.values()
            texts = [source.data for source in sources]
        stocks = list(map(stock, texts))
    except UserError:  # settings of an older version, or a folder that is another by now
        return None
    total = 0
    for text in stocks:
        if text is None or not text.exact:
            return None
        total += text.tokens
    return total


# ---- rows --------------------------------------------------------------------------------------------------


def _rows(
    name: str, checkpoint: Path, training: Training, devices: Sequence[Device], settings: CostSettings
) -> Iterator[Footprint]:
    """The measured rows, of the run's device and of this one, then a forecast for each device."""
    from outgrow.model.build import known_size
    from outgrow.model.config import read_config
    from outgrow.model.geometry import parameter_count
    from outgrow.train.machine.inference import inference_memory

    config = read_config(checkpoint)
    longest = known_size(config, "max_position_embeddings") or settings.context
    context = min(settings.context, longest)
    memory = inference_memory(config, context)
    start = Footprint(
        name,
        "",
        "measured",
        parameter_count(config),
        context,
        memory_gb=memory.total / 1e9,
        data_tokens=training.data_tokens,
        tokens=training.tokens,
    )
    seconds = training.device_seconds
    hours = None if seconds is None else seconds / 3600
    device_name = training.device or "not recorded"
    trained = replace(start, device=device_name, gpu_hours=hours)
    timed = _timed(checkpoint, start) if settings.measure else None
    same_device = timed is not None and timed.device == trained.device
    if hours is not None and not same_device:
        yield trained
    if timed is not None:
        yield replace(timed, gpu_hours=hours) if same_device else timed
    unmeasured = replace(start, kind="forecast")
    for device in devices:
        yield _forecast(config, training, device, unmeasured, memory.cache, settings.mfu)


def _timed(checkpoint: Path, start: Footprint) -> Footprint:
    """The row of the device at hand: a token's time."""
    import torch

    from outgrow.experiments.footprint.speed import milliseconds_per_token
    from outgrow.model.base.quiet import quietly
    from outgrow.model.build import load_model
    from outgrow.train.machine.device import device_name

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = "float16" if cuda else "float32"
    with quietly():
        network: Any = load_model(checkpoint, dtype=dtype).eval().to(device)
    milliseconds = milliseconds_per_token(network, start.context)
    return replace(start, device=device_name(device), ms_per_token=milliseconds)


def _forecast(
    config: dict[str, Any],
    training: Training,
    device: Device,
    start: Footprint,
    cache: float,
    mfu: float,
) -> Footprint:
    """The row of a device that is not at hand."""
    from outgrow.train.machine.forecast import largest_micro_batch
    from outgrow.train.machine.inference import least_seconds_per_token

    def hours(flops: float | None) -> float | None:
        return None if flops is None else flops / (device.peak * mfu) / 3600

    room = device.memory
    return replace(
        start,
        device=device.name,
        gpu_hours=hours(training.flops),
        gpu_hours_in_all=hours(training.flops_in_all),
        micro_batch=None if room is None else largest_micro_batch(config, start.context, room),
        ms_per_token=1e3 * least_seconds_per_token(config, cache, device.bandwidth),
    )
