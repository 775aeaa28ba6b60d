"""The end of a run: a Hugging Face folder that anyone can load, with what it cost and what it reached."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import whole_folder, write_json, write_text
from outgrow.model.base.quiet import quietly
from outgrow.model.build import load_model
from outgrow.model.spelling import spell_folder
from outgrow.train.run.folder import FINAL, FINAL_EMA, SUMMARY
from outgrow.train.run.record import RunRecord, SourceCost, Summary
from outgrow.train.start.source import LEDGER, OPTIMIZER

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from outgrow.train.data import TokenData

WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")
TRAINED = "trained"  # float32 weights on the way into another dtype


def publish(
    folder: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor] | None,
    data: TokenData,
    run: RunRecord,
    summary: Summary,
    optimizer_state: Mapping[str, Any] | None,
    dtype: str,
    *,
    averaged: bool = False,
) -> Path:
    """Write `<folder>/final/`, or `<folder>/final_ema/` of the averaged weights, whole or not at all:
    weights, config, tokenizer, generation config, ledger and model card.

    Args:
        weights: of the model, where it does not hold them whole itself.
        optimizer_state: the optimizer's state, where it is to be kept too.
        dtype: of the weights.
        averaged: the weights are the averaged ones (EMA).

    Raises:
        UserError: the disk is full or not writable.
    """
    final = folder / (FINAL_EMA if averaged else FINAL)
    with whole_folder(final) as partial:
        write_model(partial, model, weights, data, dtype)
        if optimizer_state is not None:
            torch.save(optimizer_state, partial / OPTIMIZER)
        of_weights = summary.of_average if averaged else summary
        write_json(partial / LEDGER, ledger(run, of_weights))
        card = model_card(run, summary, dtype, averaged=averaged)
        write_text(partial / "README.md", card)
    return final


def write_model(
    folder: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor] | None,
    data: TokenData,
    dtype: str = "float32",
) -> None:
    """Weights (whole, where they are not the model's own), config, generation config and the data's tokenizer
    into an empty `folder`.
    """
    model.generation_config.eos_token_id = data.end_of_text_id
    model.generation_config.pad_token_id = data.end_of_text_id
    trained = folder if dtype == "float32" else folder / TRAINED
    model.save_pretrained(trained, state_dict=weights)
    if trained != folder:
        _round(trained, folder, dtype)
        shutil.rmtree(trained)
    for file in sorted(Path(data.tokenizer_folder).iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    spell_folder(folder)


def recast(folder: Path, run: RunRecord, dtype: str) -> None:
    """Write a complete run's `final/` anew, and `final_ema/` where it has one, the float32 weights rounded
    to `dtype`: the bits that training its end again would give.

    Raises:
        UserError: a weight is beyond the range of `dtype`, or the disk is full or not writable; the folder is
            as it was then.
    """
    summary = Summary.read(folder / SUMMARY, "not a run's summary")
    average = folder / FINAL_EMA
    if average.is_dir():
        card = model_card(run, summary, dtype, averaged=True)
        _recast(average, card, dtype)
    card = model_card(run, summary, dtype)
    _recast(folder / FINAL, card, dtype)


def _recast(final: Path, card: str, dtype: str) -> None:
    with whole_folder(final) as partial:
        _round(final, partial, dtype)
        files = [file for file in final.iterdir() if file.is_file()]
        for file in files:
            copy = partial / file.name
            if not WEIGHTS.fullmatch(file.name) and not copy.exists():
                shutil.copyfile(file, copy)
        write_text(partial / "README.md", card)
        spell_folder(partial)


def _round(trained: Path, folder: Path, dtype: str) -> None:
    """Store float32 weights in `folder` as a user has them who loads them in `dtype`: some classes keep a few
    tensors in float32.

    Raises:
        UserError: a weight is beyond the range of `dtype`.
    """
    with quietly():
        model = load_model(trained, dtype=dtype)
    parameters = model.named_parameters()
    beyond = [name for name, parameter in parameters if not parameter.isfinite().all()]
    if beyond:
        raise UserError(
            f"train.save_dtype: {', '.join(beyond[:3])} hold values beyond the range of {dtype}; use "
            "bfloat16 or float32",
        )
    model.save_pretrained(folder)


def ledger(run: RunRecord, summary: Summary) -> dict[str, Any]:
    """The cost of making this checkpoint: `tokens` and `flops` add up the parts beside them.

    Null where one is unknown.
    """
    source = run.start.source
    operator_flops = run.start.operator_flops
    before = SourceCost(None, tokens=0, flops=0.0) if source is None else source
    return {
        "tokens": None if before.tokens is None else summary.tokens + before.tokens,
        "flops": None if before.flops is None else summary.flops + operator_flops + before.flops,
        "val_loss": summary.final_val_loss,
        "parameters": run.parameters,
        "active_parameters": run.active,
        "study": run.study,
        "arm": run.arm,
        "seed": run.seed,
        "own": {"tokens": summary.tokens, "flops": summary.flops},
        "operator_flops": operator_flops,
        "source": None if source is None else asdict(source),
    }


def model_card(run: RunRecord, summary: Summary, dtype: str, *, averaged: bool = False) -> str:
    """README.md of the final folder: study, arm, seed, tokens, losses; `averaged` of that of the average."""
    start = run.start
    summary = summary.of_average if averaged else summary
    source = None if start.operator == "scratch" else start.source
    origin = "scratch" if source is None else f"`{source.path}`"
    proof = {True: "lossless", False: "not lossless", None: "not applicable"}[start.lossless]
    average = {}
    if averaged:
        average["average"] = f"the weights averaged over the steps, {_half_life(run)}"
    stored = {}
    if dtype != "float32":
        stored["weights"] = f"{dtype}; the losses are those of the float32 weights that were trained"
    rows = {
        "study": run.study,
        "arm": run.arm,
        "seed": run.seed,
        "started from": origin,
        "growth": f"{start.operator}, certificate: {proof}",
        **_on_the_way(run.settings),
        "parameters": f"{run.parameters:,}{_active(run)}",
        "training tokens": f"{summary.tokens:,}",
        "training FLOPs": f"{summary.flops:.3e}",
        "context": run.setting("train.context"),
        "validation loss at the start": f"{summary.start_val_loss:.4f} nats/token",
        "validation loss at the end": f"{summary.final_val_loss:.4f} nats/token, "
        f"{summary.bits_per_byte:.4f} bits/byte",
        **average,
        "device": f"{run.device}, {run.precision}",
        **stored,
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    table = "\n".join(lines)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [scaled-knowledge-transfer, {run.arm}]
---

# {run.name}

One arm of the study `{run.study}`: a language model whose start was `{run.arm}`.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

`ledger.json` says what it cost to make, the source included.
"""


def _half_life(run: RunRecord) -> str:
    """The strength of the average (EMA), in words."""
    ema = float(run.setting("train.ema"))
    if ema < 1:
        return f"decay {ema:g} at each step"
    return f"half-life {ema:,.0f} tokens"


def _active(run: RunRecord) -> str:
    """The number of parameters that a token meets, where those are fewer than all."""
    return f", {run.active:,} active for each token" if run.active < run.parameters else ""


def _growth(stage: Mapping[str, Any]) -> str:
    """The growth that a stage begins with, and what became of the optimizer's state, unless that began
    anew."""
    words: dict[Any, str] = {"copied": ", moments copied", "kept": ", moments kept", True: ", moments grown"}
    moments = words.get(stage.get("moments"), "")
    return f"{stage['operator']}{moments}"


def _end(stage: Mapping[str, Any]) -> str:
    """The end of a stage, in words."""
    tokens = stage.get("until_tokens")
    if tokens is None:
        return f"at {stage['until']:.0%} of the budget"
    return f"after {tokens:,} tokens"


def _on_the_way(settings: Mapping[str, Any]) -> dict[str, str]:
    """Rows on what was done to the start in training, if anything was."""
    transfer = settings["transfer"]
    stages = settings["growth"]["stages"]
    rows = {}
    if len(stages) > 1:
        growths = [f"{_end(before)}: {_growth(stage)}" for before, stage in pairwise(stages)]
        rows["grown on the way"] = "; ".join(growths)
    if transfer["optimizer"] is not None:
        rows["optimizer's state"] = "the source's, grown with its weights"
    rate = transfer["inherited_rate"]
    if rate != 1.0:
        rows["learning rate of inherited entries"] = f"{rate:g} × that of new ones"
    teacher = transfer["teacher"]
    if teacher is not None:
        named = teacher["model"]
        until = teacher["until"]
        model = settings["source"] if named == "source" else named
        rows["taught by"] = f"`{model}`, for {until:.0%} of the budget"
    return rows
