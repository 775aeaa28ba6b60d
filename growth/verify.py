"""Verification: the written folder reopened and held against the plan, and a receipt measured on logits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint, names_of, tensor_table
from outgrow.model.dtypes import is_float, to_float
from outgrow.model.family import Config

if TYPE_CHECKING:
    import torch

    from outgrow.growth.plan import Plan

# How far logits may move, relative to the largest, before a lossless certificate is contradicted: what rounding the weights may do.
TOLERANCE = {"F64": 1e-10, "F32": 1e-3}
EXACT = 1e-4  # the same, of a growth into 16 bits that is done in float32 once more
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
        exact_delta: the largest difference of two logits after the same growth in float32; None where the weights are not of 16 bits.
        cast_delta: the same where nothing is grown and every weight of the source is rounded once, as casting does.
    """

    max_delta: float
    max_logit: float
    kl: float
    loss_source: float
    loss_target: float
    tokens: int
    dtype: str
    note: str = ""
    exact_delta: float | None = None
    cast_delta: float | None = None

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
    return Meter.of(source, target, dtype=dtype, rows=rows, length=length, seed=seed).receipt(target, config=target_config, norm=norm)


@dataclass(frozen=True, eq=False)
class Meter:
    """A source's logits on random tokens, against which others are held.

    Attributes:
        dtype: that models are run in.
        tokens: (row, position).
        before: (row, position, vocabulary) the source's logits.
    """

    source: Path | str
    dtype: str
    tokens: torch.Tensor
    before: torch.Tensor

    @classmethod
    def of(
        cls, source: Path | str, target: Path | str, *, dtype: str | None = None, rows: int = 2, length: int = 32, seed: int = 0
    ) -> Meter:
        """A meter for `source` and the models that are as large as `target`; arguments as `measure` takes them."""
        import torch

        from outgrow.model.build import to_hf_config

        with Checkpoint(source) as checkpoint:
            known = to_hf_config(checkpoint.config).get_text_config()  # a file leaves out what its class has by default
        computed = dtype or fitting_dtype(sum(prod(stored.shape) for stored in tensor_table(Path(target)).values()))
        length = min(length, getattr(known, "max_position_embeddings", None) or length)
        tokens = torch.randint(known.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
        return cls(source, computed, tokens, _logits(source, tokens, computed, "source", "receipt=false grows without running it"))

    def receipt(self, target: Path | str, *, config: Config | None = None, norm: Literal["layer", "rms"] = "layer") -> Receipt:
        """How far the logits of the model in `target` are from the source's."""
        after = _logits(target, self.tokens, self.dtype, "grown model", "choose other sizes", config=config)
        found = compare_logits(self.before, after[..., : self.before.shape[-1]], self.tokens, self.dtype)
        return replace(found, note=_floor(norm, found))

    def cast(self, dtype: str) -> float:
        """How far the logits move, at most, where every weight of the source is rounded once to `dtype`, as casting rounds it.

        The weights may have that format already; each is scaled by √2, rounded and scaled back, so that none is on the grid any more.
        """
        after = _logits(self.source, self.tokens, self.dtype, "source", "receipt=false grows without running it", rounded_to=dtype)
        return float((self.before - after).abs().max())


def _logits(
    folder: Path | str,
    tokens: torch.Tensor,
    dtype: str,
    which: str,
    way: str,
    *,
    config: Config | None = None,
    rounded_to: str | None = None,
) -> torch.Tensor:
    """The logits of the model in `folder` on `tokens`, float64; `which` model it is and the `way` out are for the error."""
    import torch

    from outgrow.model.base.quiet import quietly
    from outgrow.model.build import computing_in, load_model

    try:
        with quietly(), torch.no_grad(), computing_in(dtype):
            model = load_model(folder, dtype=dtype, attention="eager", config=config).eval()
            if rounded_to is not None:
                for parameter in model.parameters():
                    parameter.copy_((parameter * sqrt(2)).to(getattr(torch, rounded_to)).to(parameter.dtype) / sqrt(2))
            return model(input_ids=tokens).logits.double()
    except UserError:
        raise
    except Exception as fault:  # the library's classes raise every kind
        reason = " ".join(str(fault).split())[:200]
        raise UserError(f"receipt: the {which} does not load or run in {dtype} ({type(fault).__name__}: {reason}); {way}") from None


def fitting_dtype(parameters: int) -> str:
    """float64 where a model of so many parameters fits into free memory in it, else float32."""
    import psutil

    return "float64" if 8 * parameters <= MEMORY_SHARE * psutil.virtual_memory().available else "float32"


def _floor(norm: str, receipt: Receipt) -> str:
    """What sets the least difference that a measurement can show, in words, where that may be what it shows; empty in plain float64."""
    if receipt.dtype != "float64":
        why = f"computed in {receipt.dtype}, since float64 does not fit into memory"
        return f"{why}: differences of about 1e-6 of the largest logit are rounding"
    if norm == "rms" and receipt.max_delta <= RMS_FLOOR * max(receipt.max_logit, 1.0):
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


def check_receipt(receipt: Receipt, plan: Plan, source: Path) -> None:
    """A receipt must not contradict a lossless certificate.

    Raises:
        UserError: the logits moved further than the stored format rounds; it is the fault of the `source` folder where the library makes
            other weights of it than it holds, else of the schema or the operator.
    """
    if not isfinite(receipt.max_logit) or not plan.certificate.lossless:
        return  # the source's own logits may be no numbers, where that was allowed
    delta, allowed = receipt.max_delta, EXACT
    if receipt.exact_delta is not None:
        delta = receipt.exact_delta
    else:
        formats = [plan.dtype(step) for step in plan.steps]
        single = bool(receipt.note or plan.notes)  # a family without a schema here may compute any norm in float32
        allowed = max(TOLERANCE[name] for name in TOLERANCE.keys() & set(formats)) + (RMS_FLOOR if single else 0)
    if not delta <= allowed * max(receipt.max_logit, 1.0):
        if names := loaded_otherwise(source, receipt.dtype):
            raise UserError(
                f"{source}: transformers loads {names_of(names)} otherwise than stored, and growth goes by what is stored, so the logits "
                f"moved by {delta:.3g}; load it with AutoModelForCausalLM, write it with save_pretrained, and grow that folder"
            )
        grown = "logits moved" if receipt.exact_delta is None else "logits of the same growth in float32 moved"
        raise UserError(
            f"the plan is certified lossless, yet {grown} by {delta:.3g} (largest logit {receipt.max_logit:.3g}, allowed "
            f"{allowed:g} of it): this is a fault of the {plan.family.name} schema or of operator {plan.operator!r}; please report it"
        )


def loaded_otherwise(folder: Path, dtype: str) -> list[str]:
    """The stored tensors of which the library, loading `folder` in `dtype`, makes other values.

    Tensors that are called otherwise in the library's own files are not compared.
    """
    from outgrow.model.base.quiet import quietly
    from outgrow.model.build import computing_in, load_model
    from outgrow.model.conversion import in_file

    with Checkpoint(folder) as checkpoint, quietly(), computing_in(dtype):
        loaded = in_file(checkpoint.config, load_model(folder, dtype=dtype, attention="eager").state_dict())
        known = [name for name in loaded if name in checkpoint.tensors and is_float(checkpoint.tensors[name].dtype)]
        return [name for name in known if not _as_stored(checkpoint, name, loaded[name])]


def _as_stored(checkpoint: Checkpoint, name: str, loaded: torch.Tensor) -> bool:
    import torch

    values = torch.from_numpy(to_float(checkpoint.read(name), checkpoint.tensors[name].dtype))
    return torch.equal(values.reshape(-1).to(loaded.dtype), loaded.reshape(-1))
