"""Verification: the written folder reopened and held against the plan, and a receipt measured on logits.

Shapes: tokens are (row, position), logits (row, position, vocabulary), continuations (prompt, new).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import exp, inf, isfinite, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from outgrow.growth.passage import Continuation, Passage, continued, read_passage
from outgrow.model.base.errors import UserError, in_one_line, names_of
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.dtypes import is_float, to_float
from outgrow.model.family import Config
from outgrow.model.headers import tensor_table

if TYPE_CHECKING:
    import torch

    from outgrow.growth.plan import Plan

# How far logits may move, relative to the largest, before a lossless certificate is contradicted: what
# rounding the weights may do.
TOLERANCE = {"F64": 1e-10, "F32": 1e-4}
EXACT = TOLERANCE["F32"]  # the same, of a growth into 16 bits that is done in float32 once more
RMS_FLOOR = 1e-4  # the library's RMSNorms compute in float32 whatever the weights are
# of what is free, for the larger model in float64; the rest is for its activations and for loading it
MEMORY_SHARE = 0.6


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
        exact_delta: the largest difference of two logits after the same growth in float32; None where the
            weights are not of 16 bits.
        cast_delta: the same where nothing is grown and every weight of the source is rounded once, as casting
            does.
        cast_kl, cast_loss: mean KL and loss of that rounded source.
        text: the file that the tokens are of; None where they are random.
        continuations: of some places of the text, by both models.
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
    cast_kl: float | None = None
    cast_loss: float | None = None
    text: str | None = None
    continuations: tuple[Continuation, ...] = ()

    @property
    def perplexity_source(self) -> float:
        """exp(loss) of the source."""
        return _perplexity(self.loss_source)

    @property
    def perplexity_target(self) -> float:
        """exp(loss) of the grown model."""
        return _perplexity(self.loss_target)

    @property
    def same(self) -> int:
        """Number of continuations that are equal."""
        return sum(each.is_same for each in self.continuations)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _perplexity(loss: float) -> float:
    return exp(loss) if loss < 700 else inf


def verify_structure(folder: Path, plan: Plan) -> None:
    """Reopen a written folder and hold every header entry against the plan.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape or dtype.
    """
    stored = tensor_table(folder)
    headers = {name: (entry.dtype, entry.shape) for name, entry in stored.items()}
    expected = {step.name: (plan.dtype(step), step.shape) for step in plan.steps}
    if headers != expected:
        names = sorted(headers.keys() | expected.keys())
        wrong = [name for name in names if headers.get(name) != expected.get(name)]
        raise UserError(
            f"{folder}: {wrong[0]} is {headers.get(wrong[0])} on disk, planned {expected.get(wrong[0])} "
            f"({len(wrong)} differ)"
        )


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
    text: Path | str | None = None,
) -> Receipt:
    """Run both checkpoints, one after the other, on the same tokens and measure how far their logits are
    apart.

    Args:
        target_config: of the target, where its folder has none yet.
        norm: of the family; the library computes RMSNorms in float32 whatever the weights are, which sets the
            least difference.
        dtype: to compute in; None is float64 where the larger model fits into memory so, else float32; on a
            text it is float32.
        rows, length, seed: of random tokens.
        text: a file whose tokens are taken instead; both models continue some of its places too.

    Raises:
        UserError: a model does not load or run; the text cannot be read by the source's tokenizer.
    """
    passage = None
    if text is not None:
        passage = passage_for(source, text)
    meter = Meter.of(source, target, dtype=dtype, rows=rows, length=length, seed=seed, passage=passage)
    return meter.receipt(target, config=target_config, norm=norm)


def passage_for(source: Path | str, text: Path | str) -> Passage:
    """The text that a receipt of `source` is measured on (`growth.passage.read_passage`)."""
    with Checkpoint(source) as checkpoint:
        sizes = _text_sizes(checkpoint.config)
        return read_passage(text, checkpoint.folder, *sizes)


def _text_sizes(config: Config) -> tuple[int, int | None]:
    """Vocabulary and positions of a config's text model; a file leaves out what its class has by default."""
    from outgrow.model.build import to_hf_config

    text_config = to_hf_config(config).get_text_config()
    return text_config.vocab_size, getattr(text_config, "max_position_embeddings", None) or None


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers of a model: its logits on tokens (row, position, vocabulary), and its continuations of a
    passage (prompt, new).
    """

    logits: torch.Tensor
    continuations: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Meter:
    """A source's answers on fixed tokens, against which others are held.

    Attributes:
        dtype: that models are run in.
        tokens: (row, position).
        before: the source's answers.
        passage: the text that the tokens are of; None where they are random.
    """

    source: Path | str
    dtype: str
    tokens: torch.Tensor
    before: Answers
    passage: Passage | None = None

    @classmethod
    def of(
        cls,
        source: Path | str,
        target: Path | str,
        *,
        dtype: str | None = None,
        rows: int = 2,
        length: int = 32,
        seed: int = 0,
        passage: Passage | None = None,
    ) -> Meter:
        """A meter for `source` and the models that are as large as `target`; arguments as `measure` takes
        them.
        """
        import torch

        with Checkpoint(source) as checkpoint:
            vocabulary, context = _text_sizes(checkpoint.config)
        stored = tensor_table(Path(target)).values()
        parameters = sum(prod(entry.shape) for entry in stored)
        own_dtype = fitting_dtype(parameters) if passage is None else "float32"
        computed = dtype or own_dtype
        if passage is None:
            generator = torch.Generator().manual_seed(seed)
            window = min(length, context or length)
            shape = (rows, window)
            tokens = torch.randint(vocabulary, shape, generator=generator)
        else:
            tokens = torch.tensor(passage.windows)
        way = "receipt=false grows without running it"
        before = _answers(source, tokens, computed, "source", way, passage=passage)
        return cls(source, computed, tokens, before, passage)

    def receipt(
        self, target: Path | str, *, config: Config | None = None, norm: Literal["layer", "rms"] = "layer"
    ) -> Receipt:
        """Measure how far the answers of the model in `target` are from the source's."""
        way = "choose other sizes"
        after = _answers(
            target, self.tokens, self.dtype, "grown model", way, config=config, passage=self.passage
        )
        receipt = self._compared(after.logits)
        reason = "" if self.passage is None else "as it is on a text"
        note = _floor(norm, receipt, reason)
        receipt = replace(receipt, note=note)
        before_text = self.before.continuations
        after_text = after.continuations
        if self.passage is None or before_text is None or after_text is None:
            return receipt
        texts = self.passage.laid_side_by_side(before_text, after_text)
        return replace(receipt, text=self.passage.name, continuations=texts)

    def delta(self, target: Path | str, *, config: Config | None = None) -> float:
        """Measure how far the logits of the model in `target` are from the source's, at most; nothing is
        continued.
        """
        way = "choose other sizes"
        after = _answers(target, self.tokens, self.dtype, "grown model", way, config=config)
        return self._compared(after.logits).max_delta

    def cast(self, dtype: str) -> Receipt:
        """Measure how far the logits move where every weight of the source is rounded once to `dtype`, as
        casting rounds it.

        The weights may have that format already; each is scaled by √2, rounded and scaled back, so that none
        is on the grid any more.
        """
        after = _answers(
            self.source,
            self.tokens,
            self.dtype,
            "source",
            "receipt=false grows without running it",
            rounded_to=dtype,
        )
        return self._compared(after.logits)

    def _compared(self, after: torch.Tensor) -> Receipt:
        return compare_logits(
            self.before.logits, after[..., : self.before.logits.shape[-1]], self.tokens, self.dtype
        )


def _answers(
    folder: Path | str,
    tokens: torch.Tensor,
    dtype: str,
    which: str,
    way: str,
    *,
    config: Config | None = None,
    rounded_to: str | None = None,
    passage: Passage | None = None,
) -> Answers:
    """The answers of the model in `folder`, logits in the dtype computed in; `which` model it is and the
    `way` out are for the error.
    """
    import torch

    from outgrow.model.base.quiet import quietly
    from outgrow.model.build import computing_in, load_model

    try:
        with quietly(), torch.no_grad(), computing_in(dtype):
            model = load_model(folder, dtype=dtype, attention="eager", config=config)
            model.eval()
            if rounded_to is not None:
                _round_parameters(model, rounded_to)
            # a row's activations at a time
            logits = torch.cat([model(input_ids=row[None]).logits for row in tokens])
            if passage is None:
                return Answers(logits, None)
            prompts = torch.tensor(passage.prompts)
            return Answers(logits, continued(model, prompts))
    except UserError:
        raise
    except Exception as fault:  # the library's classes raise every kind
        raise UserError(
            f"receipt: the {which} does not load or run in {dtype} ({in_one_line(fault)}); {way}"
        ) from None


def _round_parameters(model: torch.nn.Module, dtype: str) -> None:
    """Round each parameter once, as a stored format would, at another place between its numbers."""
    import torch

    for parameter in model.parameters():
        rounded_type = getattr(torch, dtype)
        stored = (parameter * sqrt(2)).to(rounded_type)
        values = stored.to(parameter.dtype)
        parameter.copy_(values / sqrt(2))


def fitting_dtype(parameters: int) -> str:
    """float64 where a model of so many parameters fits into free memory in it, else float32."""
    import psutil

    free = psutil.virtual_memory().available
    return "float64" if 8 * parameters <= MEMORY_SHARE * free else "float32"


def _floor(norm: str, receipt: Receipt, reason: str = "") -> str:
    """Name the rounding that sets the least difference a measurement can show, where that may be what it
    shows; empty in plain float64.

    Args:
        reason: for computing in another dtype than float64; else it did not fit.
    """
    if receipt.dtype != "float64":
        why = f"computed in {receipt.dtype}, {reason or 'since float64 does not fit into memory'}"
        return f"{why}: differences of about 1e-6 of the largest logit are rounding"
    least = RMS_FLOOR * max(receipt.max_logit, 1.0)
    if norm == "rms" and receipt.max_delta <= least:
        return (
            "the library computes RMSNorm in float32: differences of about 1e-6 of the largest logit are "
            "its rounding"
        )
    return ""


def compare_logits(
    source: torch.Tensor, target: torch.Tensor, tokens: torch.Tensor, dtype: str, note: str = ""
) -> Receipt:
    """The receipt of two sets of logits (row, position, vocabulary) on `tokens` (row, position), reckoned in
    float64 row by row.
    """
    import torch

    rows = zip(source, target, tokens, strict=True)
    measures = torch.stack([_compared_row(*row) for row in rows])
    means = measures[:, 2:].mean(0)
    kl, loss_source, loss_target = means.tolist()
    return Receipt(
        max_delta=float(measures[:, 0].max()),
        max_logit=float(measures[:, 1].max()),
        kl=kl,
        loss_source=loss_source,
        loss_target=loss_target,
        tokens=tokens.numel(),
        dtype=dtype,
        note=note,
    )


def _compared_row(source: torch.Tensor, target: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(largest |Δlogit|, largest |logit|, mean KL, loss of both) of one row, float64."""
    import torch
    import torch.nn.functional as F

    source = source.double()
    target = target.double()
    before = source.log_softmax(-1)
    after = target.log_softmax(-1)
    by_token = before.exp() * (before - after)
    kl = by_token.sum(-1).mean()
    following = tokens[1:]
    loss_before = F.nll_loss(before[:-1], following)
    loss_after = F.nll_loss(after[:-1], following)
    max_delta = (source - target).abs().max()
    largest = source.abs().max()
    return torch.stack([max_delta, largest, kl, loss_before, loss_after])


def check_receipt(receipt: Receipt, plan: Plan, source: Path) -> None:
    """A receipt must not contradict a lossless certificate.

    Raises:
        UserError: the logits moved further than the stored format rounds; it is the fault of the `source`
            folder where the library makes other weights of it than it holds, else of the schema or the
            operator.
    """
    has_numbers = isfinite(receipt.max_logit)
    if not has_numbers or not plan.certificate.lossless:
        return  # the source's own logits may be no numbers, where that was allowed
    delta = receipt.max_delta
    allowed = EXACT
    if receipt.exact_delta is not None:
        delta = receipt.exact_delta
    else:
        formats = {plan.dtype(step) for step in plan.steps}
        dtypes = TOLERANCE.keys() & formats
        allowed = max(TOLERANCE[name] for name in dtypes)
        # a family without a schema here may compute any norm in float32
        if receipt.note or plan.notes:
            allowed += RMS_FLOOR
    largest = max(receipt.max_logit, 1.0)
    if not delta <= allowed * largest:
        if names := loaded_otherwise(source, receipt.dtype):
            raise UserError(
                f"{source}: transformers loads {names_of(names)} otherwise than stored, and growth goes by "
                f"what is stored, so the logits moved by {delta:.3g}; load it with AutoModelForCausalLM, "
                "write it with save_pretrained, and grow that folder"
            )
        grown = "logits moved"
        if receipt.exact_delta is not None:
            grown = "logits of the same growth in float32 moved"
        raise UserError(
            f"the plan is certified lossless, yet {grown} by {delta:.3g} (largest logit "
            f"{receipt.max_logit:.3g}, allowed {allowed:g} of it): this is a fault of the "
            f"{plan.family.name} schema or of operator {plan.operator!r}; please report it"
        )


def loaded_otherwise(folder: Path, dtype: str) -> list[str]:
    """The stored tensors of which the library, loading `folder` in `dtype`, makes other values.

    Tensors that are called otherwise in the library's own files are not compared.
    """
    from outgrow.model.base.quiet import quietly
    from outgrow.model.build import computing_in, load_model
    from outgrow.model.conversion import in_file

    with Checkpoint(folder) as checkpoint, quietly(), computing_in(dtype):
        model = load_model(folder, dtype=dtype, attention="eager")
        loaded = in_file(checkpoint.config, model.state_dict())
        stored = checkpoint.tensors
        shared = [name for name in loaded if name in stored]
        float_names = [name for name in shared if is_float(stored[name].dtype)]
        return [name for name in float_names if not _as_stored(checkpoint, name, loaded[name])]


def _as_stored(checkpoint: Checkpoint, name: str, loaded: torch.Tensor) -> bool:
    import torch

    raw = checkpoint.read(name)
    stored_type = checkpoint.tensors[name].dtype
    values = torch.from_numpy(to_float(raw, stored_type))
    flat = values.reshape(-1).to(loaded.dtype)
    return torch.equal(flat, loaded.reshape(-1))
