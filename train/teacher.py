"""Distillation: a frozen model whose next-token distribution is learnt beside the text (Hinton et al., 1503.02531)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.build import attention_backend, load_model
from model.checkpoint import locate
from model.errors import UserError
from train.loss import CHUNK_TOKENS, NextTokenLoss, balanced, reshaping
from train.router import balanced_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from train.settings import Settings, TeacherSettings


def scheduled(settings: TeacherSettings, progress: float) -> tuple[float, float]:
    """(weight, temperature) at `progress`: on straight lines from their first values to their last at `until`, then no weight."""
    if progress >= settings.until:
        return 0.0, settings.temperature[1]
    way = progress / settings.until
    return tuple(first + way * (last - first) for first, last in (settings.weight, settings.temperature))  # type: ignore[return-value]


class TaughtLoss(NextTokenLoss):
    """A `NextTokenLoss` that can also be taught. The teacher is no part of the module: it is neither trained, sharded nor saved."""

    def __init__(self, student: NextTokenLoss, teacher: PreTrainedModel) -> None:
        super().__init__(student.network, fused=student.fused, end_of_text=student.end_of_text)
        self._teacher = (NextTokenLoss(teacher.eval().requires_grad_(False), fused=student.fused, end_of_text=student.end_of_text),)

    def forward(self, windows: Tensor, reduction: str = "mean", weight: float = 0.0, temperature: float = 1.0) -> Any:
        """The text's loss; with a `weight` the pair (objective, text's loss), where objective = (1 - weight) · text + weight · teaching.

        While a mixture of experts trains, its routers' load-balancing term is added, and stands beside them (`Losses`).

        Teaching is T² · KL(teacher ‖ student) at temperature T over the teacher's vocabulary, the sum or mean over the predicted tokens.
        """
        if weight == 0.0:
            return super().forward(windows, reduction)
        if self.training and self.routed:
            student, balance = balanced_forward(self.network, self.inputs(windows), logits=False)
        else:
            student, balance = self.hidden(windows), None
        student, targets = student.flatten(0, 1), windows[:, 1:].flatten()
        with torch.no_grad():
            teacher = self._teacher[0].hidden(windows).flatten(0, 1)
        text = self.from_hidden(student, targets, reduction)
        heads = [network.get_output_embeddings() for network in (self.network, self._teacher[0].network)]
        teaching = divergence(student, heads[0], teacher, heads[1], temperature) / (len(student) if reduction == "mean" else 1)
        return balanced(text, balance, targets, reduction, taught=(1.0 - weight) * text + weight * teaching)


def divergence(student: Tensor, head: nn.Module, teacher: Tensor, teaching_head: nn.Module, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T, the sum over tokens, `CHUNK_TOKENS` of whose logits are held at a time.

    Args:
        student, teacher: what the heads read, (tokens, hidden) each.
    """

    def part(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            expected = (teaching_head(teacher).float() / temperature).log_softmax(-1)
        given = (head(student)[..., : expected.shape[-1]].float() / temperature).log_softmax(-1)
        return functional.kl_div(given, expected, reduction="sum", log_target=True)

    total = torch.zeros((), device=student.device)
    for mine, theirs in zip(student.split(CHUNK_TOKENS), teacher.split(CHUNK_TOKENS), strict=True):
        total = total + checkpoint(part, mine, theirs, use_reentrant=False)
    return temperature**2 * total


def find_teacher(settings: Settings, source: Path | None) -> PreTrainedModel | None:
    """The network that teaches, in float32 on the CPU; None where none does.

    Raises:
        UserError: it is neither a folder nor a reachable repository.
    """
    if settings.transfer.teacher is None:
        return None
    named = settings.transfer.teacher.model
    folder = source if named == "source" else locate(named)
    assert folder is not None
    return load_model(folder, attention=attention_backend(settings.train.attention)[0])


def taught(objective: NextTokenLoss, teacher: PreTrainedModel | None, device: torch.device) -> NextTokenLoss:
    """`objective`, taught by `teacher` where there is one.

    Raises:
        UserError: this teacher cannot teach this network.
    """
    if teacher is None:
        return objective
    check_teacher(objective.network.config.to_dict(), teacher.config.to_dict())
    return TaughtLoss(objective, teacher.to(device))  # type: ignore[arg-type]


def check_teacher(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Refuse a teacher that cannot teach this student; both are given by their configs.

    Raises:
        UserError: its vocabulary is larger, or the logits are not the heads' output alone.
    """
    faults = []
    if teacher["vocab_size"] > student["vocab_size"]:
        faults.append(
            f"transfer.teacher: has {teacher['vocab_size']} tokens, the model {student['vocab_size']}; a teacher must speak the same tokens"
        )
    if changed := sorted({*reshaping(student), *reshaping(teacher)}):
        faults.append(f"transfer.teacher: logits are changed after the head ({', '.join(changed)}), which teaching does not follow")
    UserError.collect(faults)
