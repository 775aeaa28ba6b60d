"""Growing: plan → streamed shards → verified → renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from outgrow.growth.arguments import check_arguments
from outgrow.growth.beside import Beside
from outgrow.growth.card import Stated, licence, model_card
from outgrow.growth.engine.execute import Reader
from outgrow.growth.engine.finite import FiniteReader
from outgrow.growth.engine.shards import MAX_SHARD_BYTES, write_index
from outgrow.growth.engine.stream import Shards, shards_of, write_config, write_weights
from outgrow.growth.engine.workers import Worker, agreement, publish_shared, shared_partial, write_share
from outgrow.growth.folder import RECIPE, Place, complete_or_absent, files_in
from outgrow.growth.learned.kept import remove_pieces
from outgrow.growth.learned.lessons import KEPT, LEARNED
from outgrow.growth.moments import OPTIMIZER, RULES, STATE, inexact, moments_plan
from outgrow.growth.operators import options_of
from outgrow.growth.plan import Plan
from outgrow.growth.planning import plan
from outgrow.growth.receipt import measure_growth
from outgrow.growth.resolve import plain_source
from outgrow.growth.verify import Receipt, check_receipt, passage_for, verify_structure
from outgrow.model.base.errors import UserError
from outgrow.model.checkpoint import Checkpoint, locate
from outgrow.model.companions import is_terms
from outgrow.model.composite import nested
from outgrow.model.config import Target, read_json, tokenizer_size
from outgrow.model.keys import is_number
from outgrow.model.notation import Space

if TYPE_CHECKING:
    from outgrow.growth.adam import AdamState
    from outgrow.growth.certificate import Certificate
    from outgrow.growth.learned.text import Calibration

ROWS = 1024  # of two tensors that are compared, at a time
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
        optimizer: Adam's saved state of the source, a file or a folder with `optimizer.bin` or
            `optimizer.pt`; grown with the weights into `out/optimizer`, from where `growth.load_adam` puts it
            into an optimizer.
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
        optimizer=optimizer, nonfinite=nonfinite, worker=worker, progress=progress, learning=learning,
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
    with Checkpoint(locate(source, revision)) as opened:
        checkpoint = plain_source(opened, target, depth)
        ledger = read_ledger(checkpoint.folder)
        beside = Beside.of(checkpoint.folder, checkpoint.config)
        notes = (*checkpoint.notes, *beside.notes)
        decided = plan(
            checkpoint, target, operator, depth=depth, noise=noise, seed=seed, dtype=dtype, **options
        )
        check_tokenizer(checkpoint.folder, decided)
        check_head(checkpoint, decided)
        passage = None
        if text is not None and receipt is not False:
            passage = passage_for(checkpoint.folder, text)
        reader: Reader = checkpoint
        if nonfinite == "refuse":
            reader = FiniteReader(checkpoint, decided.dtypes)
        adam = None
        reads = [*checkpoint.files]
        if optimizer is not None:
            optimizer = Path(os.path.expanduser(optimizer))
            reads.append(optimizer)
            adam = _read_adam(optimizer, decided)
        lesson = read_lesson(decided, checkpoint, text)
        shards = shards_of(decided, max_shard_bytes)
        state = out.parent / f"{out.name}{KEPT}"
        how: dict[str, Any] = {"threads": threads, "progress": progress}

        def complete(folder: Path) -> tuple[Receipt | None, dict[str, Any] | None]:
            """Write and verify what a folder holds besides its shards."""
            checkpoint.check_unchanged()
            write_index(folder, shards)
            if adam is not None:
                _write_adam(folder, decided, adam, max_shard_bytes, **how)
            beside.copy(folder)
            learned = _learn(decided, reader, checkpoint, folder, lesson, state, learning)
            verify_structure(folder, decided)
            measured = None
            if _is_measured(receipt, text, decided, checkpoint):
                measured = measure_growth(
                    decided, reader, checkpoint.folder, folder, threads=threads, passage=passage
                )
                check_receipt(measured, decided, checkpoint.folder)
            terms = licence(checkpoint.folder / "README.md")
            name = str(source)
            _write_recipe(folder, decided, name, revision, notes, ledger, measured, terms, learned)
            # last: without it nothing loads the folder, were it to stay as it is
            write_config(folder, decided)
            return measured, learned

        if worker is not None:
            place = Place(out, overwrite, tuple(reads))
            share = Worker.parse(worker)
            grown = _grow_share(place, decided, reader, checkpoint, shards, share, complete, **how)
            grown = replace(grown, notes=notes)
        else:
            with complete_or_absent(out, overwrite=overwrite, reads=tuple(reads)) as folder:
                write_weights(decided, reader, folder, shards, **how)
                measured, learned = complete(folder)
            grown = Grown(out, decided, measured, notes=notes, learned=learned)
    if grown.learned is not None:
        remove_pieces(state)
    return grown


def _is_measured(receipt: bool | None, text: str | Path | None, plan: Plan, checkpoint: Checkpoint) -> bool:
    if receipt is not None:
        return receipt
    if text is not None:
        return True
    parameters = plan.source_parameters + plan.target_parameters
    is_small = parameters <= RECEIPT_PARAMETERS
    is_plain = checkpoint.quantised is None
    return is_small and is_plain and find_spec("torch") is not None


def _grow_share(
    place: Place,
    plan: Plan,
    reader: Reader,
    checkpoint: Checkpoint,
    shards: Shards,
    worker: Worker,
    complete: Callable[[Path], tuple[Receipt | None, dict[str, Any] | None]],
    **how: Any,
) -> Grown:
    """One worker's part; the folder too when it is the last."""
    worker.share(shards)  # tells too many workers before anything is made
    agreed = agreement(plan, checkpoint, shards, worker)
    with shared_partial(place, worker, agreed) as shared:
        write_share(plan, reader, checkpoint, shared, shards, worker, **how)
        if not shared.is_complete(shards):
            return Grown(place.out, plan, None, complete=False)
        try:
            measured, learned = complete(shared.folder)
            publish_shared(shared, worker)
        except UserError:
            place.discard()
            raise
    return Grown(place.out, plan, measured, learned=learned)


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


def _learn(plan: Plan, *of: Any) -> dict[str, Any] | None:
    """Learn what a plan learns; the record of it."""
    if plan.lesson is None:
        return None
    from outgrow.growth.learned.learn import learn  # imports torch

    return learn(plan, *of)


def _read_adam(path: Path, plan: Plan) -> AdamState:
    from outgrow.growth.adam import read_adam  # imports torch, which growing weights does without

    return read_adam(path, plan)


def _write_adam(folder: Path, plan: Plan, adam: AdamState, max_shard_bytes: int, **how: Any) -> None:
    """Grow the moments into `folder/optimizer`, as safetensors beside a state.json that says how."""
    folder = folder / OPTIMIZER
    shutil.rmtree(folder, ignore_errors=True)  # a killed worker's
    folder.mkdir()
    moments = moments_plan(plan, adam.moments.dtypes)
    shards = shards_of(moments, max_shard_bytes)
    write_weights(moments, adam.moments, folder, shards, **how)
    write_index(folder, shards)
    rule = RULES[plan.recipe.moments]
    reasons = list(inexact(plan))
    state = {"step": adam.step, "rule": rule, "inexact": reasons}
    text = json.dumps(state, indent=1)
    (folder / STATE).write_text(f"{text}\n")


def check_tokenizer(source: Path, plan: Plan) -> None:
    """New tokens must have room for all of the tokenizer's.

    Raises:
        UserError: the vocabulary grows, and the tokenizer that goes with the weights has more tokens than it
            then holds.
    """
    if not plan.growth.grows("vocab"):
        return
    tokens = tokenizer_size(source)
    size = plan.growth.target["vocab"]
    if tokens is not None and tokens > size:
        raise UserError(
            f"target: vocab_size {size} is less than the {tokens} tokens of {source / 'tokenizer.json'}; "
            f"give at least vocab_size:{tokens}"
        )


def check_head(source: Checkpoint, plan: Plan) -> None:
    """A head that is stored beside the embedding that it is tied to must be that: the library would use the
    one stored.

    Raises:
        UserError: it is another.
    """
    family = plan.growth.source_family
    tensors = list(family.tensors(plan.source_config))
    tables = [tensor for tensor in tensors if tensor.line.kind == "embedding"]
    embeddings = [tensor.name for tensor in tables if Space("vocab") in tensor.axes]
    heads = [tensor.name for tensor in tensors if tensor.tied]
    if not heads:
        heads = [name for name in plan.family.ignore if name.endswith("head.weight")]
    if not embeddings or embeddings[0] not in source.tensors:
        return
    embedding = embeddings[0]
    for name in heads:
        if name not in source.tensors:
            continue
        if not _equal(source, name, embedding):
            raise UserError(
                f"{source.folder}: config.json ties the head to {embedding}, but {name} is stored too and "
                "differs, and transformers uses what is stored; say tie_word_embeddings: false in "
                "config.json, or remove that tensor"
            )


def _equal(source: Checkpoint, one: str, other: str) -> bool:
    """Check whether two stored tensors hold the same bits, some rows at a time."""
    stored = source.tensors[one]
    beside = source.tensors[other]
    if (stored.dtype, stored.shape) != (beside.dtype, beside.shape):
        return False
    rows = stored.shape[0]
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        own = source.read(one, start, stop)
        equal = own == source.read(other, start, stop)
        if not equal.all():
            return False
    return True


def read_ledger(folder: Path) -> dict[str, Any] | None:
    """Read the source's cost and loss, where training has written them beside the weights.

    Raises:
        UserError: ledger.json is no JSON object, or holds something else than numbers there.
    """
    file = folder / "ledger.json"
    if not file.exists():
        return None
    ledger = read_json(file)
    counts = {key: ledger.get(key) for key in ("tokens", "flops", "val_loss")}
    UserError.collect(
        f"{file}: {key} must be a finite number of at least 0, or null; found {value!r:.80}"
        for key, value in counts.items()
        if value is not None and not (is_number(value) and 0 <= value < inf)
    )
    return ledger


def _write_recipe(
    folder: Path,
    plan: Plan,
    source: str,
    revision: str | None,
    notes: Sequence[str],
    ledger: dict[str, Any] | None,
    receipt: Receipt | None,
    terms: Stated,
    learned: dict[str, Any] | None,
) -> None:
    """`growth.json`, and a model card that says the same in words, under the `terms` of the source's
    licence."""
    recipe = {
        "source": {
            "name": source,
            "revision": revision,
            "config": nested(plan.source_config),
            "notes": list(notes),
            "ledger": ledger,
        },
        "target": {"config": nested(plan.target_config)},
        "plan_hash": plan.hash,
        "certificate": {"lossless": plan.certificate.lossless, "reasons": list(plan.certificate.reasons)},
        "remarks": list(plan.remarks),
        "receipt": None if receipt is None else receipt.to_dict(),
        **({} if learned is None else {"learned": learned}),
        "plan": plan.to_dict(),
    }
    names = [path.name for path in folder.iterdir()]
    files = sorted(filter(is_terms, names))
    card = model_card(plan, source, receipt, terms, files)
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    recipe["files"] = files_in(folder)
    text = json.dumps(recipe, indent=1)
    (folder / RECIPE).write_text(f"{text}\n")


def recorded_plan(folder: Path | str) -> Plan:
    """The plan that a grown folder followed, made again from its `growth.json`; no weights are read.

    Raises:
        UserError: the folder was not grown by this library, or what it records does not give the plan that it
            names.
    """
    folder = Path(folder)
    record = read_json(folder / "growth.json")
    try:
        planned = record["plan"]
        source = record["source"]["config"]
        target = record["target"]["config"]
        named = record["plan_hash"]
        is_list = planned["depth"] == "list"
        how = {
            "depth": planned["layers"] if is_list else planned["depth"],
            "noise": planned["noise"],
            "fresh": planned.get("fresh", "init"),
            "seed": planned["seed"],
            "dtype": planned.get("dtype"),
            **planned["options"],
        }
    except (KeyError, TypeError) as fault:
        raise UserError(
            f"{folder / 'growth.json'}: no record of a growth that can be followed again ({fault})"
        ) from None
    again = plan(source, target, planned["operator"], **how)
    if again.hash != named:
        raise UserError(
            f"{folder / 'growth.json'}: gives plan {again.hash}, but records plan {named}; was it edited, "
            "or grown by another version?"
        )
    return again
