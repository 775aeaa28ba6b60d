"""The start of a run: from scratch, from the source as it is, or from the source grown."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import Tensor

from outgrow.growth import grow
from outgrow.growth.learned.lessons import LEARNED
from outgrow.growth.learned.telling import Telling
from outgrow.growth.moments import OPTIMIZER as MOMENTS
from outgrow.growth.operators import options_of
from outgrow.growth.optimizer import check_kinds, moments_in
from outgrow.growth.planning import laid_over, mixture_target
from outgrow.growth.record import read_ledger
from outgrow.model.base.errors import UserError, names_of
from outgrow.model.base.files import whole_folder
from outgrow.model.build import build_model, known_size, load_model
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.config import read_config, resolve_target
from outgrow.model.dtypes import TORCH_NAMES, is_short
from outgrow.model.family import Config, has_schema
from outgrow.model.geometry import flops_per_token, parameter_count
from outgrow.model.locate import locate
from outgrow.model.spelling import spell_folder
from outgrow.train.run.folder import PICTURE
from outgrow.train.run.record import RunRecord, SourceCost, Start
from outgrow.train.settings import KEPT, UNGROWN, Settings
from outgrow.train.start.null_control import norm_gain, scale_norms
from outgrow.train.start.stages import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from outgrow.growth.plan import Plan

LEDGER, OPTIMIZER = "ledger.json", "optimizer.pt"


def find_source(settings: Settings, *, needed: bool) -> Path | None:
    """The source's folder, downloaded if it is a hub name; None where there is none.

    A run that has begun needs its source no more (`needed` is false, and a source that is gone is no fault),
    unless it trains the source itself.

    Raises:
        UserError: it is neither a folder nor a reachable repository.
    """
    if settings.source is None:
        return None
    if needed or settings.growth.operator == "source":
        return locate(settings.source)
    folder = Path(settings.source)
    return folder if folder.is_dir() else None


def target_config(settings: Settings, source: Path | None) -> dict[str, Any]:
    """The config of the network that will be trained.

    Scratch lays its target over the source's config as every grown arm does, so that all of them train the
    same network; of the source's weights it reads nothing.

    Raises:
        UserError: the target is unknown, or shorter than the context.
    """
    own = None if source is None else read_config(source)
    trains_source = settings.growth.operator == "source"
    config = own if trains_source else _laid_over(settings, source, own)
    assert config is not None
    context = settings.train.context
    positions = known_size(config, "max_position_embeddings") or 0
    if 0 < positions < context:
        raise UserError(
            f"train.context: {context} is more than the model's max_position_embeddings={positions}; lower "
            "it",
        )
    if config.get("vocab_size"):
        return config
    return config | {"vocab_size": known_size(config, "vocab_size")}


def _laid_over(settings: Settings, source: Path | None, config: dict[str, Any] | None) -> dict[str, Any]:
    """The target over the source's config."""
    target = settings.target
    operator = settings.growth.operator
    choices = settings.growth.options
    changed = None if config is None else mixture_target(config, target, operator, choices)
    if changed is not None:
        return changed
    if source is None or config is None:
        return resolve_target(target, config)
    names = [name for name in options_of(operator) if name in choices]
    options = {name: choices[name] for name in names}
    if operator in LEARNED:
        operator = choices.get("width", "lossless")  # which writes what is fitted
        options = {}
    depth = choices.get("depth", "identity")
    grows = settings.growth.operator not in UNGROWN
    if has_schema(config):
        return laid_over(config, target, operator, depth, options, grows=grows)
    with Checkpoint(source) as checkpoint:
        return laid_over(checkpoint, target, operator, depth, options, grows=grows)


def source_cost(settings: Settings, source: Path | None) -> SourceCost | None:
    """Cost and loss of the source: from its ledger.json, else from `source_tokens`.

    None for a run that neither starts from its weights nor is taught by it.
    """
    teacher = settings.transfer.teacher
    tokens = settings.source_tokens
    is_taught = teacher is not None and teacher.model == "source"
    is_used = settings.growth.operator != "scratch" or is_taught
    if source is None or not is_used:
        return None
    cost = SourceCost(settings.source, tokens)
    if ledger := read_ledger(source):
        keys = [key for key in ("tokens", "flops", "val_loss") if key in ledger]
        return replace(cost, **{key: ledger[key] for key in keys})
    if tokens is None:
        return cost
    per_token = flops_per_token(read_config(source), settings.train.context)
    return replace(cost, flops=tokens * per_token)


def source_dtype(source: Path | None, run: RunRecord | None) -> str | None:
    """The float dtype of most of the source's bytes, by torch's name; None if there is none.

    Args:
        run: the record of a run that has begun, which says it.
    """
    if run is not None:
        return run.start.source_dtype
    if source is None:
        return None
    names = {stored: name for name, stored in TORCH_NAMES.items()}
    sizes: Counter[str] = Counter()
    with Checkpoint(source) as checkpoint:
        for stored in checkpoint.tensors.values():
            if stored.dtype in names and stored.nbytes:
                name = names[stored.dtype]
                sizes[name] += stored.nbytes
    if not sizes:
        return None
    return max(sizes, key=lambda name: (sizes[name], name))


def weights_read(settings: Settings, source: Path | None, teacher: Path | None) -> dict[str, str]:
    """Hashes of the weights that a run reads at every start, not at its first alone: a teacher's, and those
    of a source trained on.

    They are of the files' bytes, so that a copy elsewhere is the same, and weights replaced in place are not.
    """
    hashes = {}
    if teacher is not None:
        hashes["teacher"] = _fingerprint(teacher)
    if source is not None and settings.growth.operator == "source":
        hashes["source"] = _fingerprint(source)
    return hashes


def start_read(stage: Stage, folder: Path) -> dict[str, str]:
    """Hashes of the weights that a run's first stage was grown to, and of the moments beside them; nothing
    where it starts otherwise."""
    start = stage.start(folder)
    if stage.growth.operator in UNGROWN or not start.is_dir():
        return {}
    hashes = {"start": _fingerprint(start)}
    moments = start / MOMENTS
    if moments.is_dir():
        hashes[f"start's {MOMENTS}"] = _fingerprint(moments)
    return hashes


def _fingerprint(folder: Path) -> str:
    """A hash of the names and contents of a checkpoint's config and weights."""
    digest = hashlib.sha256()
    files = [*folder.glob("config.json"), *folder.glob("*.safetensors")]
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256")
        digest.update(path.name.encode() + content.digest())
    return digest.hexdigest()


def begin(settings: Settings, stage: Stage, source: Path | None, folder: Path) -> Start:
    """Make the start of a new run's first stage on disk, where it needs one (`<folder>/start/`), and return
    the record of it.

    Raises:
        UserError: the source cannot be grown into the target.
    """
    operator = settings.growth.operator
    options = settings.growth.options
    record = Start(
        operator=operator,
        depth=None if operator in UNGROWN else options.get("depth"),
        lossless=norm_gain(settings, stage.config) == 1.0 if operator == "source" else None,
        source=source_cost(settings, source),
        source_dtype=source_dtype(source, None),
    )
    if operator in UNGROWN:
        return record
    assert source is not None
    choices: dict[str, Any] = {
        "operator": operator,
        "seed": settings.seed,
        "dtype": _start_dtype(source),
        **options,
    }
    choices |= {"optimizer": saved_optimizer(settings, source), "overwrite": True}
    # of a run that was killed before it had a record; growth replaces its own files alone
    (folder / PICTURE).unlink(missing_ok=True)
    grown = grow(source, stage.start(folder), target=stage.config, learning=Telling(), **choices)
    _draw(grown.plan, source, folder)
    return replace(
        record,
        lossless=grown.certificate.lossless,
        reasons=tuple(map(str, grown.certificate.reasons)),
        receipt=None if grown.receipt is None else grown.receipt.to_dict(),
        operator_flops=0.0 if grown.learned is None else grown.learned["flops"],
    )


def _start_dtype(source: Path) -> Literal["float32"] | None:
    """The dtype of what is grown from `source`: float32, as it is loaded, where 16 bits would round it.

    None: its own.
    """
    with Checkpoint(source) as checkpoint:
        dtypes = {stored.dtype for stored in checkpoint.tensors.values()}
    rounds = any(map(is_short, dtypes))
    return "float32" if rounds and "F64" not in dtypes else None


def _draw(plan: Plan, source: Path, folder: Path) -> None:
    from outgrow.growth.figure import draw  # matplotlib takes longer to import than a small growth does

    with Checkpoint(source) as reader:
        draw(plan, folder / PICTURE, reader)


def saved_optimizer(settings: Settings, source: Path | None) -> Path | None:
    """The place of the source's optimizer state, if it is to be taken over."""
    choice = settings.transfer.optimizer
    if choice == "source":
        return source
    return None if choice is None else Path(choice)


def check_optimizer(settings: Settings, source: Path | None) -> None:
    """Refuse a state of the source's optimizer that the run's own cannot go on from, before anything is
    grown.

    Raises:
        UserError: another optimizer made it, or it cannot be read.
    """
    saved = saved_optimizer(settings, source)
    if saved is None:
        return
    moment_names = moments_in(saved)
    if not moment_names:  # what is wrong with it is told by who reads it
        return
    try:
        check_kinds(moment_names, KEPT[settings.optimizer.name])
    except UserError as fault:
        raise UserError(f"transfer.optimizer {saved}: {fault}") from None


def grow_on(
    network: PreTrainedModel,
    weights: dict[str, Tensor] | None,
    optimizer_state: Mapping[str, Any] | None,
    stage: Stage,
    settings: Settings,
    start: Path,
) -> None:
    """Make the start of a later `stage` on disk by growing the `network` that the one before it has trained.

    Args:
        weights: of the network, where it does not hold them whole itself.
        optimizer_state: its optimizer's state, to be grown too by the stage's rule.
        start: the folder to make.

    Raises:
        UserError: it cannot be grown so, or the disk is full.
    """
    before = start.with_name(f"{start.name}.before")
    with whole_folder(before) as partial:
        network.save_pretrained(partial, state_dict=weights)
        spell_folder(partial)  # the stage's config may have both spellings, if its source had
        if optimizer_state is not None:
            torch.save(optimizer_state, partial / OPTIMIZER)
    growth = stage.growth
    choices: dict[str, Any] = {"operator": growth.operator, "seed": settings.seed, **growth.options}
    choices |= {"optimizer": None if optimizer_state is None else before, "moments": stage.rule}
    grow(before, start, target=stage.config, overwrite=True, **choices)
    shutil.rmtree(before)


def starting_model(
    settings: Settings,
    stage: Stage,
    source: Path | None,
    folder: Path,
    attention: str,
) -> PreTrainedModel:
    """The network at the beginning of a stage, in float32, on the CPU; the same on every process.

    Raises:
        UserError: this machine's memory cannot hold it.
    """
    _check_memory(stage.config)
    start = start_folder(stage, source, folder)
    if start is None:
        return build_model(stage.config, seed=settings.seed, attention=attention)
    network = load_model(start, attention=attention)
    check_finite(network, f"start {start}")
    gain = norm_gain(settings, stage.config)
    if gain != 1.0:
        scale_norms(network, gain)
    return network


def check_finite(network: PreTrainedModel, what: str) -> None:
    """Refuse a network that nothing can be learnt with, whatever the learning rate.

    Raises:
        UserError: a weight, or a buffer that is saved, is not finite.
    """
    broken = []
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            broken.append(name)
    if broken:
        raise UserError(
            f"{what}: {names_of(broken)}: NaN or infinite, so that every loss would be; repair the "
            "checkpoint, or give another"
        )


def _check_memory(config: Config) -> None:
    """Refuse a network that no memory of this machine can hold, before any of it is allocated: most often it
    has the class's own sizes, where the target names none."""
    parameters = parameter_count(config)
    needed = parameters * torch.float32.itemsize
    memory = psutil.virtual_memory().total
    if needed > memory:
        raise UserError(
            f"target: its {parameters:,} parameters need {needed / 2**30:,.0f} GiB in float32, and this "
            f"machine has {memory / 2**30:,.0f} GiB of memory; give smaller sizes (what target= leaves out "
            "is the source's, and without a source the class's own), or a machine with more memory"
        )


def start_folder(stage: Stage, source: Path | None, folder: Path) -> Path | None:
    """The folder of the weights that a stage begins with; None where it begins from scratch."""
    if stage.growth.operator == "scratch":
        return None
    return source if stage.growth.operator == "source" else stage.start(folder)
