"""Verification: the written folder reopened and held against the plan, and a receipt measured on logits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model.checkpoint import Checkpoint, tensor_table
from model.errors import UserError
from model.family import Config

if TYPE_CHECKING:
    import torch

    from .plan import Plan

# How far logits may move, relative to the largest, before a lossless certificate is contradicted: what rounding the weights may do.
TOLERANCE = {"F64": 1e-10, "F32": 1e-3, "F16": 5e-2, "BF16": 2e-1}
RMS_FLOOR = 1e-4  # the library's RMSNorms compute in float32 whatever the weights are
MEMORY_SHARE = 0.6  # of what is free, for the larger model in float64; the rest is for its activations and for loading it


@dataclass(frozen=True)
class Receipt:
    """Measured difference between source and target on fixed tokens, both computed in `dtype`.

    Attributes:
        max_delta: largest absolute difference of two logits.
        max_logit: largest absolute source logit.
        kl: mean KL(source ‖ target) per position, in nats.
        loss_source, loss_target: mean next-token loss on the tokens, in nats.
        tokens: how many positions were compared.
        note: what sets the floor of the measurement.
    """

    max_delta: float
    max_logit: float
    kl: float
    loss_source: float
    loss_target: float
    tokens: int
    dtype: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify_structure(folder: Path, plan: Plan) -> None:
    """Reopen a written folder and hold every header entry against the plan.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape or dtype.
    """
    found = {name: (stored.dtype, stored.shape) for name, stored in tensor_table(folder).items()}
    expected = {step.name: (plan.dtype(step), step.shape) for step in plan.steps}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UserError(f"{folder}: {wrong[0]} is {found.get(wrong[0])} on disk, planned {expected.get(wrong[0])} ({len(wrong)} differ)")


def measure(
    source: Path | str,
    target: Path | str,
    *,
    target_config: Config | None = None,
    norm: Literal["layer", "rms"] = "layer",
    dtype: str | None = None,
    rows: int = 2,
    length: int = 32,
    seed: int = 0,
) -> Receipt:
    """Run both checkpoints, one after the other, on the same random tokens (`rows` × `length`) and measure how far their logits are apart.

    Args:
        target_config: of the target, where its folder has none yet.
        norm: of the family; the library computes RMSNorms in float32 whatever the weights are, which sets the least difference.
        dtype: to compute in; None is float64 where the larger model fits into memory so, else float32.

    Raises:
        UserError: a model does not load or run.
    """
    import torch

    from model.build import computing_in, load_model, quietly, to_hf_config

    def logits(folder: Path | str, tokens: torch.Tensor, config: Config | None = None) -> torch.Tensor:
        try:
            with quietly(), torch.no_grad(), computing_in(computed):
                model = load_model(folder, dtype=computed, attention="eager", config=config).eval()
                return model(input_ids=tokens).logits.double()
        except UserError:
            raise
        except Exception as fault:  # the library's classes raise every kind
            reason = " ".join(str(fault).split())[:200]
            which, way = ("source", "receipt=false grows without running it") if folder == source else ("grown model", "choose other sizes")
            raise UserError(f"receipt: the {which} does not load or run in {computed} ({type(fault).__name__}: {reason}); {way}") from None

    with Checkpoint(source) as checkpoint:
        known = to_hf_config(checkpoint.config).get_text_config()  # a file leaves out what its class has by default
    computed = dtype or fitting_dtype(sum(prod(stored.shape) for stored in tensor_table(Path(target)).values()))
    length = min(length, getattr(known, "max_position_embeddings", None) or length)
    tokens = torch.randint(known.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    before, after = logits(source, tokens), logits(target, tokens, target_config)[..., : known.vocab_size]
    return compare_logits(before, after, tokens, computed, _floor(norm, computed))


def fitting_dtype(parameters: int) -> str:
    """float64 where a model of so many parameters fits into free memory in it, else float32."""
    import psutil

    return "float64" if 8 * parameters <= MEMORY_SHARE * psutil.virtual_memory().available else "float32"


def _floor(norm: str, dtype: str) -> str:
    """What sets the least difference that a measurement in `dtype` can show, in words; empty in plain float64."""
    if dtype != "float64":
        return f"computed in {dtype}, since float64 does not fit into memory: differences of about 1e-6 of the largest logit are rounding"
    if norm == "rms":
        return "the library computes RMSNorm in float32: differences of about 1e-6 of the largest logit are its rounding"
    return ""


def compare_logits(source: torch.Tensor, target: torch.Tensor, tokens: torch.Tensor, dtype: str, note: str = "") -> Receipt:
    """The receipt of two sets of logits (row, position, vocabulary) on `tokens` (row, position)."""
    import torch.nn.functional as F

    def loss(logits: torch.Tensor) -> float:
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    before, after = source.log_softmax(-1), target.log_softmax(-1)
    return Receipt(
        max_delta=float((source - target).abs().max()),
        max_logit=float(source.abs().max()),
        kl=float((before.exp() * (before - after)).sum(-1).mean()),
        loss_source=loss(source),
        loss_target=loss(target),
        tokens=tokens.numel(),
        dtype=dtype,
        note=note,
    )


def check_receipt(receipt: Receipt, plan: Plan) -> None:
    """A receipt must not contradict a lossless certificate.

    Raises:
        UserError: the logits moved further than the stored format rounds.
    """
    formats = [plan.dtype(step) for step in plan.steps]
    single = bool(receipt.note or plan.notes)  # a family without a schema here may compute any norm in float32
    allowed = max(TOLERANCE[name] for name in TOLERANCE.keys() & set(formats)) + (RMS_FLOOR if single else 0)
    if not isfinite(receipt.max_logit):
        return  # the source's own logits are no numbers, which was allowed
    if plan.certificate.lossless and not receipt.max_delta <= allowed * max(receipt.max_logit, 1.0):
        raise UserError(
            f"the plan is certified lossless, yet logits moved by {receipt.max_delta:.3g} (largest logit {receipt.max_logit:.3g}, allowed "
            f"{allowed:g} of it): this is a fault of the {plan.family.name} schema or of operator {plan.operator!r}; please report it"
        )
