"""Distillation: a frozen model whose next-token distribution is learnt beside the text (Hinton et al.,
1503.02531).

Shapes, as in train/loss.py: tokens is (rows context), the predicted tokens of all windows as one dimension.
Student and teacher may differ in hidden, what a head reads, and in vocab, of which the teacher's is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from outgrow.model.base.errors import UserError
from outgrow.model.build import known_size, load_model
from outgrow.model.config import read_config
from outgrow.model.family import Config
from outgrow.model.locate import locate
from outgrow.train.loss import CHUNK_TOKENS, NextTokenLoss, balanced
from outgrow.train.machine.compile import fuse_activations
from outgrow.train.start.source import check_finite
from outgrow.train.start.way import Way

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from outgrow.train.settings import Settings, TeacherSettings


Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Teacher:
    """A network that teaches, its config, and of its way (`train.start.way`) the loss and the document
    masks."""

    network: PreTrainedModel
    config: Config
    fused: bool
    masked: bool = False


def scheduled(settings: TeacherSettings, progress: float) -> tuple[float, float]:
    """(weight, temperature) at `progress`: linear from their first values to their last at `until`, then no
    weight.
    """
    if progress >= settings.until:
        return 0.0, settings.temperature[1]
    share = progress / settings.until
    weight, last_weight = settings.weight
    temperature, last_temperature = settings.temperature
    weight += share * (last_weight - weight)
    temperature += share * (last_temperature - temperature)
    return weight, temperature


class TaughtLoss(NextTokenLoss):
    """A `NextTokenLoss` that can also be taught.

    The teacher is no part of the module: it is neither trained, sharded nor saved.
    """

    def __init__(
        self, student: NextTokenLoss, teacher: PreTrainedModel, *, fused: bool = True, masked: bool = False
    ) -> None:
        super().__init__(
            student.network, fused=student.fused, end_of_text=student.end_of_text, masked=student.masked
        )
        teacher.requires_grad_(False)
        self._teacher = (
            NextTokenLoss(teacher, fused=fused, end_of_text=student.end_of_text, masked=masked).eval(),
        )

    def forward(
        self,
        windows: Tensor,
        reduction: str = "mean",
        weight: float = 0.0,
        temperature: float = 1.0,
    ) -> Any:
        """The text's loss; with a `weight` the pair (objective, text's loss), where objective = (1 - weight)
        · text + weight · teaching.

        While a mixture of experts trains, its routers' load-balancing term is added, and stands beside them
        (`Losses`).

        Teaching is T² · KL(teacher ‖ student) at temperature T over the teacher's vocabulary, the sum or mean
        over the predicted tokens.
        """
        if weight == 0.0:
            return super().forward(windows, reduction)
        student, balance = self.read(windows)
        student = student.flatten(0, 1)
        targets = windows[:, 1:].flatten()
        with torch.no_grad():
            read, _ = self._teacher[0].read(windows)
            teacher = read.flatten(0, 1)
        text = self.from_read(student, targets, reduction)
        teaching_head = self._teacher[0].logits
        teaching = divergence(student, self.logits, teacher, teaching_head, temperature)
        if reduction == "mean":
            teaching = teaching / len(student)
        taught = (1.0 - weight) * text + weight * teaching
        return balanced(text, balance, targets, reduction, taught=taught)


def divergence(
    student: Tensor,
    head: Head,
    teacher: Tensor,
    teaching_head: Head,
    temperature: float,
) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, the sum over tokens, `CHUNK_TOKENS` of whose
    log-probabilities are held at a time.

    Args:
        student, teacher: (tokens, hidden) or (tokens, vocab) each, of which the heads make (tokens, vocab).
    """

    def part(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teaching_head(teacher).float() / temperature
            expected = taught.log_softmax(-1)
        vocabulary = expected.shape[-1]
        logits = head(student)[..., :vocabulary].float()
        predicted = (logits / temperature).log_softmax(-1)
        return functional.kl_div(predicted, expected, reduction="sum", log_target=True)

    total = torch.zeros((), device=student.device)
    chunks = zip(student.split(CHUNK_TOKENS), teacher.split(CHUNK_TOKENS), strict=True)
    for mine, theirs in chunks:
        total = total + checkpoint(part, mine, theirs, use_reentrant=False)
    return temperature**2 * total


def teacher_folder(settings: Settings, source: Path | None) -> Path | None:
    """The folder of the network that teaches; None where none does.

    Raises:
        UserError: it is neither a folder nor a reachable repository.
    """
    if settings.transfer.teacher is None:
        return None
    named = settings.transfer.teacher.model
    return source if named == "source" else locate(named)


def find_teacher(folder: Path | None, student: Config, way: Way | None) -> Teacher | None:
    """The network that teaches `student`, in float32 on the CPU; None where none does.

    Args:
        way: of the teacher's class.

    Raises:
        UserError: it has more tokens than the student, or a weight of it is not finite.
    """
    if folder is None or way is None:
        return None
    config = read_config(folder)
    theirs = known_size(config, "vocab_size") or 0
    own = known_size(student, "vocab_size") or 0
    if theirs > own:
        raise UserError(
            f"transfer.teacher: has {theirs} tokens, the model {own}; a teacher must speak the same tokens",
        )
    network = load_model(folder, attention=way.attention)
    check_finite(network, f"transfer.teacher {folder}")
    fuse_activations(network)
    return Teacher(network, config, way.fused, way.masked)


def taught(objective: NextTokenLoss, teacher: Teacher | None, device: torch.device) -> NextTokenLoss:
    """`objective`, taught by `teacher` where there is one."""
    if teacher is None:
        return objective
    return TaughtLoss(objective, teacher.network.to(device), fused=teacher.fused, masked=teacher.masked)  # type: ignore[arg-type]
