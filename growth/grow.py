"""Growing: plan → streamed shards → verified → renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from outgrow.growth.arguments import check_arguments
from outgrow.growth.beside import Beside
from outgrow.growth.engine.finite import FiniteReader
from outgrow.growth.engine.rows import Reader
from outgrow.growth.engine.shards import MAX_SHARD_BYTES, write_index
from outgrow.growth.engine.stream import Shards, shards_of, write_config, write_weights
from outgrow.growth.engine.workers import Worker, agreement, publish_shared, shared_partial, write_share
from outgrow.growth.folder import Place, complete_or_absent
from outgrow.growth.learned.kept import remove_pieces
from outgrow.growth.learned.lessons import KEPT, LEARNED
from outgrow.growth.moments import OPTIMIZER, STATE, Rule, describe_moments, inexact, moments_plan
from outgrow.growth.operators import options_of
from outgrow.growth.plan import Plan
from outgrow.growth.planning import plan
from outgrow.growth.receipt import measure_growth
from outgrow.growth.record import Provenance, write_record
from outgrow.growth.resolve import plain_source
from outgrow.growth.source_checks import check_head, check_tokenizer
from outgrow.growth.verify import Receipt, check_receipt, passage_for, verify_structure
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.config import Target
from outgrow.model.locate import locate

if TYPE_CHECKING:
    from outgrow.growth.certificate import Certificate
    from outgrow.growth.learned.text import Calibration
    from outgrow.growth.optimizer import OptimizerState
    from outgrow.growth.passage import Passage

# above this a receipt is measured only when it is asked for: both models are loaded for it
RECEIPT_PARAMETERS = 100_000_000


@dataclass(frozen=True, repr=False)
class Grown:
    """A finished growth: the folder, the plan it followed, and the receipt where one was measured.

    Attributes:
        complete: False where other workers are still to write their shards; the last one makes the folder.
        notes: what of the source was passed over, in words.
        learned: what was learned on text, and what that took (`growth.learned.learn`); None where nothing is.
    """

    folder: Path
    plan: Plan
    receipt: Receipt | None
    complete: bool = True
    notes: tuple[str, ...] = ()
    learned: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """Five lines: the folder, what its plan says in short, and the receipt."""
        lines = repr(self.plan).splitlines()
        headline, *details = lines
        state = f"Grown {self.folder}"
        if not self.complete:
            state = f"Grown {self.folder} (in part: other workers are still to write)"
        receipt = "not measured"
        if self.receipt:
            change = f"max |Δlogit| {self.receipt.max_delta:.3g}"
            receipt = f"{change}, KL {self.receipt.kl:.3g}"
        first = f"{state}, {headline.lower()}"
        last = f"  receipt: {receipt}"
        lines = [first, *details[:1], *details[2:], last]
        return "\n".join(lines)

    def describe(self) -> str:
        """The plan in words (`Plan.describe`)."""
        return self.plan.describe()

    @property
    def certificate(self) -> Certificate:
        return self.plan.certificate


def grow(
    source: str | Path,
    out: str | Path,
    *,
    target: Target,
    operator: str = "lossless",
    depth: str | Sequence[int] = "identity",
    noise: float | None = None,
    seed: int = 0,
    dtype: Literal["float32"] | None = None,
    overwrite: bool = False,
    receipt: bool | None = None,
    text: str | Path | None = None,
    receipt_text: str | Path | None = None,
    threads: int = 2,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    revision: str | None = None,
    optimizer: str | Path | None = None,
    moments: Rule = "own",
    nonfinite: Literal["refuse", "allow"] = "refuse",
    worker: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    learning: Callable[[float, float], None] | None = None,
    **options: Any,
) -> Grown:
    """Grow a checkpoint on disk into a larger one, streaming; `out` is complete or absent.

    Args:
        source: a folder, or a Hugging Face name (then `revision` may pin a commit).
        out: the folder to make: config, safetensors shards, tokenizer, generation config, `growth.json` (the
            recipe) and a model card.
        target, operator, depth, noise, seed, dtype, options (`fresh` too): see `growth.plan`.
        overwrite: replace an `out` that growth made, once the new one is complete. One that holds anything
            else, or that is or contains the source, is refused.
        receipt: measure logits of both models, which needs torch; None measures models of up to 100 M
            parameters where torch is installed.
        text: a file of real text to measure the receipt on, perplexity and greedy continuations of both
            models with it; for that the source needs its tokenizer, and a receipt is measured at any size.
            Of an operator that learns on text (`least_squares`, `ligo`) it is what it learns on.
        receipt_text: the receipt's text, beside an operator's own.
        threads: that compute, over tensors; the bits do not depend on it.
        max_shard_bytes: size of a shard.
        optimizer: Adam's or Muon's saved state of the source, a file or a folder with `optimizer.bin` or
            `optimizer.pt`; grown with the weights into `out/optimizer`, from where `growth.load_optimizer`
            puts it into an optimizer.
        moments: how that grows (`growth.moments`).
        nonfinite: what to do with NaN and infinite weights; allow copies them like any other.
        worker: `i/n`: write the i-th of n shares of the shards, while other processes write theirs
            (`growth.workers`).
        progress: called with (bytes done, bytes in all) after every tensor.
        learning: called with (FLOPs done, FLOPs in all, an estimate) where an operator learns, before and
            after each part.

    Raises:
        UserError: for everything that is wrong with what was given; nothing is left behind.
    """
    check_arguments(
        receipt_text=receipt_text,
        out=out, overwrite=overwrite, receipt=receipt, text=text, threads=threads,
        max_shard_bytes=max_shard_bytes, revision=revision,
        optimizer=optimizer, moments=moments, nonfinite=nonfinite, worker=worker,
        progress=progress, learning=learning,
    )  # fmt: skip
    learns_on_text = operator in LEARNED and "text" in options_of(operator)
    if learns_on_text:
        options["text"] = None if text is None else str(text)
        text = None
    text = text if receipt_text is None else receipt_text
    if text is not None and receipt is False:
        raise UserError(
            f"receipt_text {str(text)!r}: is for a receipt, and receipt=False measures none; leave one of "
            "them out"
        )
    out = Path(os.path.expanduser(out))
    optimizer_path = None if optimizer is None else Path(os.path.expanduser(optimizer))
    with Checkpoint(locate(source, revision)) as opened:
        checkpoint = plain_source(opened, target, depth)
        beside = Beside.of(checkpoint.folder, checkpoint.config)
        notes = (*checkpoint.notes, *beside.notes)
        provenance = Provenance.of(str(source), revision, notes, checkpoint.folder)
        decided = plan(
            checkpoint, target, operator, depth=depth, noise=noise, seed=seed, dtype=dtype, **options
        )
        check_tokenizer(checkpoint.folder, decided)
        check_head(checkpoint, decided)
        passage = None if text is None else passage_for(checkpoint.folder, text)
        allows_nonfinite = nonfinite == "allow"
        reader: Reader = checkpoint if allows_nonfinite else FiniteReader(checkpoint, decided.dtypes)
        state = None if optimizer_path is None else _read_optimizer(optimizer_path, decided)
        lesson = read_lesson(decided, checkpoint, text)
        shards = shards_of(decided, max_shard_bytes)
        pieces = out.parent / f"{out.name}{KEPT}"
        work = _Work(
            plan=decided,
            source=checkpoint,
            reader=reader,
            beside=beside,
            provenance=provenance,
            state=state,
            rule=moments,
            lesson=lesson,
            passage=passage,
            is_measured=_is_measured(receipt, text, decided, checkpoint),
            shards=shards,
            max_shard_bytes=max_shard_bytes,
            pieces=pieces,
            threads=threads,
            progress=progress,
            learning=learning,
        )
        read = [*checkpoint.files]
        if optimizer_path is not None:
            read.append(optimizer_path)
        folders = Place(out, overwrite, tuple(read))
        grown = work.alone(folders) if worker is None else work.shared(folders, Worker.parse(worker))
    if grown.learned is not None:
        remove_pieces(pieces)
    return grown


@dataclass(frozen=True)
class _Work:
    """A growth that is planned and checked, with all that was read for it: what is left is to write it.

    Attributes:
        passage: the text that a receipt is measured on; None measures on random tokens.
        pieces: the folder that holds what is learned until the growth is complete.
    """

    plan: Plan
    source: Checkpoint
    reader: Reader
    beside: Beside
    provenance: Provenance
    state: OptimizerState | None
    rule: Rule
    lesson: Calibration | None
    passage: Passage | None
    is_measured: bool
    shards: Shards
    max_shard_bytes: int
    pieces: Path
    threads: int
    progress: Callable[[int, int], None] | None
    learning: Callable[[float, float], None] | None

    def alone(self, folders: Place) -> Grown:
        """Write the folder, in this process."""
        with complete_or_absent(folders.out, overwrite=folders.overwrite, reads=folders.reads) as folder:
            self._write(self.plan, self.reader, folder, self.shards)
            receipt, learned = self._complete(folder)
        return self._grown(folders, receipt, learned=learned)

    def shared(self, folders: Place, worker: Worker) -> Grown:
        """Write one worker's part; the folder too when it is the last."""
        shards = self.shards
        worker.share(shards)  # tells too many workers before anything is made
        agreed = agreement(self.plan, self.source, shards, worker) | self._agreed_state()
        with shared_partial(folders, worker, agreed) as shared:
            write_share(
                self.plan,
                self.reader,
                self.source,
                shared,
                shards,
                worker,
                threads=self.threads,
                progress=self.progress,
            )
            if not shared.is_complete(shards):
                return self._grown(folders, None, complete=False)
            try:
                receipt, learned = self._complete(shared.folder)
                publish_shared(shared, worker)
            except UserError:
                folders.discard()
                raise
        return self._grown(folders, receipt, learned=learned)

    def _agreed_state(self) -> dict[str, Any]:
        """What the last worker writes beside the shards: the optimizer's state and how it grows."""
        if self.state is None:
            return {}
        return {"moments": self.rule, "step": self.state.step, "state": self.state.moments.dtypes}

    def _grown(self, folders: Place, receipt: Receipt | None, **state: Any) -> Grown:
        notes = self.provenance.notes
        return Grown(folders.out, self.plan, receipt, notes=notes, **state)

    def _complete(self, folder: Path) -> tuple[Receipt | None, dict[str, Any] | None]:
        """Write and verify what a folder holds besides its shards."""
        plan = self.plan
        self.source.check_unchanged()
        write_index(folder, self.shards)
        if self.state is not None:
            self._write_moments(folder / OPTIMIZER, self.state)
        self.beside.copy(folder)
        learned = self._learn(folder)
        verify_structure(folder, plan)
        receipt = self._measure(folder) if self.is_measured else None
        write_record(folder, plan, self.provenance, receipt, learned)
        # last: without it nothing loads the folder, were it to stay as it is
        write_config(folder, plan)
        return receipt, learned

    def _write(self, plan: Plan, reader: Reader, folder: Path, shards: Shards) -> None:
        write_weights(plan, reader, folder, shards, threads=self.threads, progress=self.progress)

    def _write_moments(self, folder: Path, optimizer: OptimizerState) -> None:
        """Grow the moments into a folder, as safetensors beside a state.json that says how."""
        shutil.rmtree(folder, ignore_errors=True)  # a killed worker's
        folder.mkdir()
        moments = moments_plan(self.plan, optimizer.moments.dtypes, self.rule)
        shards = shards_of(moments, self.max_shard_bytes)
        self._write(moments, optimizer.moments, folder, shards)
        write_index(folder, shards)
        rule = describe_moments(self.plan, self.rule)
        reasons = list(inexact(self.plan, self.rule))
        state = {"step": optimizer.step, "rule": rule, "inexact": reasons}
        text = json.dumps(state, indent=1)
        (folder / STATE).write_text(f"{text}\n")

    def _learn(self, folder: Path) -> dict[str, Any] | None:
        """Learn what the plan learns, in the folder; the record of it."""
        if self.plan.lesson is None:
            return None
        from outgrow.growth.learned.learn import learn  # imports torch

        return learn(self.plan, self.reader, self.source, folder, self.lesson, self.pieces, self.learning)

    def _measure(self, folder: Path) -> Receipt:
        """Measure the receipt, and hold it against the certificate."""
        source = self.source.folder
        receipt = measure_growth(
            self.plan, self.reader, source, folder, threads=self.threads, passage=self.passage
        )
        check_receipt(receipt, self.plan, source)
        return receipt


def _is_measured(receipt: bool | None, text: str | Path | None, plan: Plan, checkpoint: Checkpoint) -> bool:
    if receipt is not None:
        return receipt
    if text is not None:
        return True
    parameters = plan.source_parameters + plan.target_parameters
    is_small = parameters <= RECEIPT_PARAMETERS
    is_plain = checkpoint.quantised is None
    return is_small and is_plain and find_spec("torch") is not None


def read_lesson(plan: Plan, source: Checkpoint, text: str | Path | None) -> Calibration | None:
    """The text that a plan learns on; None where it learns on none.

    Raises:
        UserError: it cannot be read, or holds the `text` that the receipt is measured on.
    """
    learned_text = None if plan.lesson is None else plan.lesson.text
    if learned_text is None:
        return None
    from outgrow.growth.learned.learn import calibration  # imports torch
    from outgrow.growth.learned.text import holds

    if text is not None and holds(learned_text, text):
        raise UserError(
            f"receipt.text {str(text)!r}: is growth.text, which is learned on, or a part of it; measure on "
            "another text"
        )
    return calibration(plan, source.folder)


def _read_optimizer(path: Path, plan: Plan) -> OptimizerState:
    from outgrow.growth.optimizer import read_optimizer  # imports torch, which growing weights does without

    return read_optimizer(path, plan)
