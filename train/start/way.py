"""The way in which a run trains its class, asked of the class's survey before step 1: which attention and
loss, what text does not reach.

The survey (model/survey.py) measures on the process's own device; what a class cannot do is refused here with
the number and the key that helps, all faults together, and what it does in another way than usual is said in
a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from outgrow.model.base.errors import UserError
from outgrow.model.build import attention_backend
from outgrow.model.family import Config
from outgrow.model.survey import Survey, causal_switch, survey, works
from outgrow.model.twin import tiny_twin

if TYPE_CHECKING:
    from accelerate import Accelerator

    from outgrow.train.settings import LoopSettings

PLAIN_SDPA, EAGER = "sdpa", "eager"


@dataclass(frozen=True)
class Way:
    """The attention and loss that a class is trained with.

    Attributes:
        attention: a `transformers` attn_implementation; "auto" leaves it to the library.
        why: that one, in words.
        fused: take the head and the loss together.
        partly: some parameters get no gradient, or not always; DDP has to look for them
            (`find_unused_parameters`).
        lines: what the reader should know.
        masked: documents are kept apart by masks that are handed over, since the class does not look at
        positions.
    """

    attention: str
    why: str
    fused: bool
    partly: bool = False
    lines: tuple[str, ...] = ()
    masked: bool = False


def find_way(
    config: Config,
    settings: LoopSettings,
    device: torch.device,
    precision: str,
    *,
    name: str = "",
) -> Way:
    """The way to train (or to be taught by) a network of `config`.

    Args:
        precision: "fp32" or "bf16".
        name: the setting that brings the network, for messages; "" for the one that trains.

    Raises:
        UserError: no attention runs that was asked for, the class is not causal, or the fused loss or the
            document mask cannot be had.
    """
    title = f"{name or 'the network'} ({config.get('model_type')})"
    try:
        tiny_twin(config)
    except UserError as fault:
        return _unmeasured(settings, title, str(fault))
    attention, why = find_attention(config, settings.attention, device, precision)
    answers = survey(config, attention=attention, device=device, precision=precision)
    faults: list[str] = []
    lines: list[str] = []
    masked = False
    causal = answers.same(answers.future)
    if answers.future.value is None:
        lines.append(f"{title}: not measured whether it is causal ({answers.future.reason})")
    elif not causal:
        faults.append(_not_causal(config, title, answers, device, precision))
    elif settings.document_mask and answers.same(answers.masked_leak):
        masked = True
        leak = f"positions that restart do not keep documents apart ({_difference(answers, 'leak')})"
        lines.append(f"{title}: {leak}: their masks are handed over")
        if not answers.same(answers.shift):
            difference = _difference(answers, "shift")
            lines.append(
                f"{title}: positions do not restart in a document, they count from the row's start "
                f"({difference})"
            )
    elif settings.document_mask and not answers.same(answers.leak):
        faults.append(_leaks(config, title, answers, device, precision))
    wants_fused = settings.loss != "plain"
    fused = wants_fused and answers.same(answers.head)
    if wants_fused and not fused:
        difference = _difference(answers, "head")
        story = f"{title}: the head over the base model's output is not its logits ({difference})"
        if settings.loss == "fused":
            faults.append(f"train.loss=fused: {story}; use train.loss=auto")
        lines.append(f"{story}: loss plain, the logits are whole in memory")
    UserError.collect(faults)
    unreached = () if name else answers.unreached.value or ()
    if unreached:
        lines.append(f"{title}: text gives no gradient to {_few(unreached)}: they stay as they start")
    partly = bool(unreached or answers.sometimes.value)
    return Way(attention, why, fused, partly, tuple(lines), masked)


def _few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    first = ", ".join(names[:3])
    more = len(names) - 3
    return f"{first} and {more} more" if more > 0 else first


def _unmeasured(settings: LoopSettings, title: str, reason: str) -> Way:
    """The way to train a class that has no tiny twin to measure: nothing is taken for granted.

    Raises:
        UserError: what was asked for needs to be measured.
    """
    wants_fused = settings.loss == "fused"
    needs = {"train.document_mask=true": settings.document_mask, "train.loss=fused": wants_fused}
    keys = [key for key, is_needed in needs.items() if is_needed]
    UserError.collect([f"{key}: not measured for {title}, so not granted ({reason})" for key in keys])
    attention, why = attention_backend(settings.attention)
    if settings.attention == "auto":
        attention, why = "auto", "the library's choice"
    line = f"{title}: its class was not surveyed ({reason}); loss plain"
    return Way(attention, why, fused=False, partly=True, lines=(line,))


def find_attention(config: Config, choice: str, device: torch.device, precision: str) -> tuple[str, str]:
    """The attention implementation that a class is trained with, and why: what is asked for, else the first
    that runs forward and backward.

    Raises:
        UserError: it cannot run here, or the class does not run with it; the message says what works.
    """
    first, why = attention_backend(choice)
    tried: dict[str, str] = {}
    for attention in dict.fromkeys((first, PLAIN_SDPA, EAGER)):
        answer = works(config, attention, device=device, precision=precision)
        if not answer.value:
            tried[attention] = answer.reason
            continue
        is_taken = attention == first or choice == "auto"
        if is_taken and not tried:
            return attention, why
        if is_taken:
            names = ", no ".join(tried)
            reasons = "; ".join(tried.values())
            return attention, f"no {names}: {reasons}"
    running = [attention for attention in (PLAIN_SDPA, EAGER) if attention not in tried]
    kind = config.get("model_type")
    reason = tried[first]
    in_bf16 = precision == "bf16"
    if in_bf16 and not running and works(config, EAGER, device=device).value:
        raise UserError(
            f"train.precision=bf16: {kind} does not train in it here ({reason}); use train.precision=fp32"
        )
    way_out = f"use train.attention={' or '.join(running)}" if running else "no other one runs either"
    raise UserError(f"train.attention={choice}: {kind} does not train with it here ({reason}); {way_out}")


def fuses(config: Config, choice: str) -> bool:
    """Check whether the fused loss would be taken for a network of `config`, as measured on this machine's
    CPU.

    Args:
        choice: train.loss.
    """
    if choice == "plain":
        return False
    try:
        attention, _ = find_attention(config, "auto", torch.device("cpu"), "fp32")
        answers = survey(config, attention=attention)
    except UserError:
        return False
    return answers.same(answers.head)


def find_ways(
    config: Config,
    teacher: Config | None,
    settings: LoopSettings,
    accelerator: Accelerator,
) -> tuple[Way, Way | None]:
    """The ways of a run's network and of its teacher, as every process has measured them on its own device,
    all of them the same.

    Raises:
        UserError: the faults of any process, on all of them; or they differ.
    """
    device = accelerator.device
    precision = precision_of(accelerator.mixed_precision)
    networks = {"": config} if teacher is None else {"": config, "transfer.teacher": teacher}
    ways: dict[str, Way] = {}
    faults: list[str] = []
    for name, network in networks.items():
        try:
            ways[name] = find_way(network, settings, device, precision, name=name)
        except UserError as fault:
            faults.append(str(fault))
    several = accelerator.num_processes > 1
    all_faults = gather_object(faults) if several else faults
    UserError.collect(dict.fromkeys(all_faults))
    everyone = gather_object([ways]) if several else [ways]
    differ = any(theirs != ways for theirs in everyone)
    if differ:
        parts = [f"process {number}: {theirs}" for number, theirs in enumerate(everyone)]
        each = "; ".join(parts)
        raise UserError(
            "the processes measured different things of this class; give train.attention and train.loss "
            f"({each})",
        )
    return ways[""], ways.get("transfer.teacher")


def precision_of(mixed_precision: str) -> str:
    """The precision of matrix products, "bf16" (mixed precision) or "fp32", from Accelerate's word for it."""
    return "bf16" if mixed_precision == "bf16" else "fp32"


# ---- refusals ----------------------------------------------------------------------------------------------


def _difference(answers: Survey, question: str) -> str:
    """A difference in words."""
    answer = getattr(answers, question)
    if answer.value is None:
        return f"not measured: {answer.reason}"
    return f"{answer.value:.2g} of the largest logit apart, on a tiny twin"


def _not_causal(config: Config, title: str, answers: Survey, device: torch.device, precision: str) -> str:
    """Say that tokens are predicted from later ones, and name the key that helps."""
    story = (
        f"{title} is not causal: logits move by {answers.future.value:.2g} of the largest when later tokens "
        "change"
    )
    switch = causal_switch(config, attention=answers.attention, device=device, precision=precision)
    if not switch:
        return f"{story}, so it cannot be trained on the next token; choose a causal class"
    [(key, value)] = switch.items()
    setting = f"{key}:{str(value).lower()}"
    return f"{story}; use target={{{setting}}}, or {key} in the source's config.json"


def _leaks(config: Config, title: str, answers: Survey, device: torch.device, precision: str) -> str:
    """Say that documents are not kept apart, and name an attention that would."""
    if answers.leak.value is None:
        return (
            f"train.document_mask=true: not measured for {title} ({answers.leak.reason}); use "
            "train.document_mask=false"
        )
    story = (
        f"logits after an end-of-text move by {answers.leak.value:.2g} of the largest when what lies before "
        "it changes"
    )
    others = ""
    for attention in (PLAIN_SDPA, EAGER):
        if attention == answers.attention:
            continue
        answer = works(config, attention, device=device, precision=precision)
        if answer.value:
            other = survey(config, attention=attention, device=device, precision=precision)
            if other.same(other.leak):
                others += f" or train.attention={attention}"
    return (
        f"train.document_mask=true: {title}, attention {answers.attention}: {story}; use "
        f"train.document_mask=false{others}"
    )
