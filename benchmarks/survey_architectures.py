"""Survey what can be trained, and how: every causal language model class of transformers, as a table.

python benchmarks/survey_architectures.py                    10 minutes of one core:
                                                             survey_architectures.json, docs/families.md
python benchmarks/survey_architectures.py --device cuda      the same on a GPU, and under its kernels
python benchmarks/survey_architectures.py --types mpt falcon some of them
python benchmarks/survey_architectures.py --types            none: only writes the table anew

Each class is built as a tiny twin of its default config (`model.twin`) in a process of its own, under a time
limit; classes and columns that the file has already under the same versions and device are passed over, so
that a stopped call goes on. A class that is bidirectional by default is asked with the switch that makes it
causal where it has one. Each cell of the table is a measured value or the beginning of the reason why there
is none; how far a class grows is measured by count_architectures.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from count_architectures import SAID, in_processes

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.derive import place_tokens
from outgrow.model.survey import TOLERANCE, Answer, Survey, causal_switch, survey, works
from outgrow.model.twin import tiny_twin

if TYPE_CHECKING:
    from outgrow.train.settings import Settings

HERE = Path(__file__).resolve().parent
RESULTS, GROWN, PAGE = (
    HERE / "survey_architectures.json",
    HERE / "count_architectures.json",
    HERE.parent / "docs" / "families.md",
)
BEGIN, END = "<!-- survey_architectures.py -->", "<!-- end of survey_architectures.py -->"
ATTENTIONS = {"cpu": ("sdpa", "eager"), "cuda": ("flash_attention_2", "sdpa", "flex_attention", "eager")}
COLUMNS = ("flops", "dry run", "trained")
EXACT = 1e-9  # of FLOPs, which are whole numbers
VOCABULARY, CONTEXTS = 300, (16, 48)
Story = dict[str, Any]


# ---- one class ---------------------------------------------------------------------------------------------


def examine(name: str, columns: list[str], device: str, precision: str, text: Path) -> Story:
    """Examine one model type: its survey always, since the rest goes by it, and the columns."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[name](**SAID.get(name, {})).to_dict()
        twin = tiny_twin(config)
    except Exception as fault:  # the library's default config does not build
        return {"refused": str(fault)[:300] if isinstance(fault, UserError) else in_one_line(fault)}
    story: Story = {"attention": _attentions(twin.config, device, precision)}
    running = next((attention for attention, found in story["attention"].items() if found is True), None)
    if running is None:
        return {**story, "refused": "no attention implementation runs"}
    seen, story["said"] = _causal(twin.config, running, device, precision)
    story |= {
        question: _plain(getattr(seen, question))
        for question in ("head", "future", "leak", "masked_leak", "shift", "unreached", "sometimes")
    }
    whole = {**twin.config, **story["said"]}
    tried: dict[str, Callable[[], Any]] = {
        "flops": partial(_flops, whole),
        "dry run": partial(_dry_run, whole, text),
        "trained": partial(_trained, whole, text),
    }
    return story | {column: _tried(tried[column]) for column in columns}


def _attentions(config: dict[str, Any], device: str, precision: str) -> dict[str, Any]:
    found = {
        attention: works(config, attention, device=device, precision=precision)
        for attention in ATTENTIONS[device]
    }
    return {attention: answer.value or answer.reason for attention, answer in found.items()}


def _causal(
    config: dict[str, Any], attention: str, device: str, precision: str
) -> tuple[Survey, dict[str, Any]]:
    """The survey, under the switch that makes a bidirectional class causal where it has one, and that
    switch."""
    under: dict[str, Any] = {"attention": attention, "device": device, "precision": precision}
    seen = survey(config, **under)
    switch = {} if seen.future.value is None or seen.same(seen.future) else causal_switch(config, **under)
    return (survey({**config, **switch}, **under) if switch else seen), switch


def _plain(answer: Answer[Any]) -> Any:
    found = list(answer.value) if isinstance(answer.value, tuple) else answer.value
    return {"refused": answer.reason} if found is None else found


def _tried(ask: Callable[[], Any]) -> Any:
    try:
        with contextlib.redirect_stdout(None):
            return ask()
    except Exception as fault:  # the library's classes raise every kind
        return {
            "refused": " ".join(str(fault).split())[:300]
            if isinstance(fault, UserError)
            else in_one_line(fault)
        }


def _flops(config: dict[str, Any]) -> Story:
    """Compare the ledger's FLOPs with PyTorch's counter at two contexts, and tell where the ledger has them
    from.
    """
    from outgrow.model.flops import counted
    from outgrow.model.geometry import flops_per_token, flops_source

    counts = {context: counted(config, context) for context in CONTEXTS}
    apart = [
        flops_per_token(config, context) / (3 * count.total) - 1 for context, count in counts.items() if count
    ]
    return {"source": flops_source(config, CONTEXTS[0]), "apart": max(map(abs, apart)) if apart else None}


@lru_cache
def _run_of_two_steps(text: Path) -> Settings:
    """A run of two steps of 8 windows of 16 tokens on the text, of any network."""
    from outgrow.train.compose import compose

    sizes = (
        "context=16 batch_tokens=128 budget_tokens=256 eval_tokens=128 eval_every_tokens=null "
        "save_every_tokens=null"
    )
    asked = [f"train.{size}" for size in sizes.split()]
    data = [
        "data=files",
        f"data.path={text}",
        f"data.folder={text}-tokens",
        "data.vocab_size=280",
        "data.validation_fraction=0.3",
    ]
    return compose(
        [
            *asked,
            *data,
            "growth=scratch",
            "target=tiny_target",
            "logger=none",
            "progress=false",
            "study=survey",
        ]
    )


def _settings(config: dict[str, Any], text: Path, out: str) -> Settings:
    """The run of a config, its vocabulary as large as the tokenizer's."""
    larger = {key: VOCABULARY for key in config if re.match(r"(decoder_)?vocab_size", key)}
    marks = {key: VOCABULARY - 1 - number for number, key in enumerate(place_tokens(config))}
    return dataclasses.replace(_run_of_two_steps(text), out=out, target={**config, **larger, **marks})


def _dry_run(config: dict[str, Any], text: Path) -> int:
    """The bytes of one GPU that the forecast counts."""
    from outgrow.train.machine.forecast import forecast

    return round(forecast(_settings(config, text, "runs/survey")).memory.total)


def _trained(config: dict[str, Any], text: Path) -> list[float]:
    """The validation loss before the first and after the second step."""
    from outgrow.train.loop import train

    with tempfile.TemporaryDirectory() as folder:
        run = train(_settings(config, text, f"{folder}/run"))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["val_loss"] for row in rows if row["kind"] == "eval"]


def warm(text: Path) -> None:
    """Do once, for the processes of all types: imports, settings, the text's tokens, the library's tables of
    names.

    Nothing here runs backward, which PyTorch refuses after a fork.
    """
    from outgrow.train.corpus import prepare
    from outgrow.train.machine.forecast import forecast
    from outgrow.train.run.reading import reading
    from outgrow.train.start.rehearsal import rehearse_end

    config = tiny_twin({"model_type": "llama"}).config
    settings = _settings(config, text, "runs/survey")
    data = prepare(reading(settings, None, None), progress=False)
    rehearse_end(config, None, data, sharded=False)
    forecast(settings)


def write_text(folder: Path) -> Path:
    """Forty files of random words."""
    draw, text = random.Random(0), folder / "text"
    text.mkdir()
    for number in range(40):
        words = (
            draw.choice(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs"])
            for _ in range(120)
        )
        (text / f"{number}.txt").write_text(" ".join(words))
    return text


# ---- all of them -------------------------------------------------------------------------------------------


def _child(
    name: str, pipe: Connection, *, missing: dict[str, list[str]], device: str, precision: str, text: Path
) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library's own warnings
    started = time.perf_counter()
    story = examine(name, missing[name], device, precision, text)
    pipe.send({**story, "seconds": round(time.perf_counter() - started, 1)})


def conditions(device: str, precision: str) -> dict[str, Any]:
    """Under which answers are measured; others say nothing about these."""
    versions = {package: importlib.metadata.version(package) for package in ("transformers", "torch")}
    return {"versions": versions, "device": device, "precision": precision}


def saved(path: Path, under: dict[str, Any]) -> dict[str, Story]:
    """Findings of a former call under the same conditions."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return dict(found["types"]) if found["under"] == under else {}


def save(path: Path, under: dict[str, Any], types: dict[str, Story]) -> None:
    """All of it, whole or not at all."""
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(
        json.dumps({"under": under, "types": dict(sorted(types.items()))}, indent=1) + "\n"
    )
    partial_file.replace(path)


# ---- the table ---------------------------------------------------------------------------------------------


def cell(found: Any, words: Callable[[Any], str]) -> str:
    """A value in words, or the beginning of a refusal."""
    refused = found.get("refused") if isinstance(found, dict) else "not asked" if found is None else None
    return words(found) if refused is None else "no: " + re.sub(r"[|`<>\n]", " ", refused)[:100].strip()


def flops_from(flops: Story) -> str:
    """Tell where the ledger has its FLOPs from, and how far a formula is from PyTorch's counter."""
    if "PyTorch's counter" in flops["source"]:
        return "counter"
    return (
        "formula alone"
        if flops["apart"] is None
        else "formula, exact"
        if flops["apart"] < EXACT
        else f"formula, {flops['apart']:.0e} apart"
    )


def flops_are_exact(flops: Story) -> bool:
    """Check whether the ledger's FLOPs are the counter's."""
    return flops.get("apart") is not None and flops["apart"] < EXACT


def document_mask(story: Story, rounding: float) -> str:
    """Tell how `train.document_mask` keeps documents apart: by positions that restart, by masks, or not at
    all.
    """
    future, leak, masked = story["future"], story["leak"], story["masked_leak"]
    if isinstance(future, dict) or future > rounding:
        return cell(future, lambda moved: f"sees later tokens: {moved:.2g}")
    if isinstance(leak, float) and leak > rounding and isinstance(masked, float) and masked <= rounding:
        restarts = isinstance(story["shift"], float) and story["shift"] <= rounding
        return "holds by masks" if restarts else "holds by masks, positions go on"
    worst = leak if isinstance(masked, dict) else masked  # masks not handed over, or not enough
    return cell(worst, lambda moved: "holds" if moved <= rounding else f"leaks {moved:.2g}")


def row(name: str, story: Story, grown: Story, rounding: float) -> str:
    """One line of the table; differences up to `rounding` of the largest logit are none."""
    axes = grown.get("axes", {})
    growth = [axes.get(axis, {}).get("confirmed", "no") for axis in ("hidden width", "heads", "depth")]
    if "refused" in story:
        return f"| {name} | {' | '.join(growth)} | {cell(story, str)} |" + " |" * 6
    cells = [
        cell(story.get("trained"), lambda losses: " → ".join(f"{loss:.2f}" for loss in losses))
        + "".join(f" ({key})" for key in story["said"]),
        cell(story["head"], lambda apart: "fused" if apart <= rounding else f"plain ({apart:.1g} apart)"),
        document_mask(story, rounding),
        cell(story["unreached"], lambda names: str(len(names)) if names else "none"),
        ", ".join(attention for attention, runs in story["attention"].items() if runs is True),
        cell(story.get("flops"), flops_from),
        cell(story.get("dry run"), lambda size: f"{size / 2**20:.1f} MiB"),
    ]
    return f"| {name} | {' | '.join([*growth, *cells])} |"


def table(under: dict[str, Any], types: dict[str, Story]) -> str:
    """The generated section of docs/families.md."""
    grown = json.loads(GROWN.read_text())["types"]
    asked = [story for story in types.values() if "refused" not in story]
    rounding = TOLERANCE[under["precision"]]

    def number(fits: Callable[[Story], bool]) -> int:
        return sum(1 for story in asked if fits(story))

    def close(found: Any) -> bool:
        return isinstance(found, float | int) and found <= rounding

    counts = {
        "built as a tiny twin": len(asked),
        "trained for two steps": number(lambda story: isinstance(story.get("trained"), list)),
        "fused loss": number(lambda story: close(story["head"])),
        "document mask holds": number(lambda story: document_mask(story, rounding) == "holds"),
        "document mask holds by masks handed over": number(
            lambda story: document_mask(story, rounding).startswith("holds by masks")
        ),
        "text reaches all parameters": number(lambda story: story["unreached"] == []),
        "SDPA": number(lambda story: story["attention"].get("sdpa") is True),
        "FLOPs counted, or a formula that is exact": number(
            lambda story: flops_are_exact(story.get("flops") or {})
        ),
        "dry run": number(lambda story: isinstance(story.get("dry run"), int)),
    }
    where = f"{under['device']}, {under['precision']}"
    versions = ", ".join(f"{package} {version}" for package, version in under["versions"].items())
    told = "\n".join(f"* {what}: {count} of {len(types)}" for what, count in counts.items())
    head = (
        "model type | width | heads | depth | trained, 2 steps | loss | document mask | without gradient | "
        "attention | FLOPs | dry run"
    )
    return "\n".join([
        f"Of {len(types)} model types ({versions}; {where}):",
        "",
        told,
        "",
        f"| {head} |",
        "|---" * (head.count("|") + 1) + "|",
        *(row(name, story, grown.get(name, {}), rounding) for name, story in sorted(types.items())),
    ])  # fmt: skip


def write_page(page: Path, section: str) -> None:
    """Put the section between its markers.

    Raises:
        UserError: the page has none.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise UserError(f"{page}: has no {BEGIN} … {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}")


def main() -> None:
    """The door."""
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument(
        "--columns", nargs="*", choices=COLUMNS, default=list(COLUMNS), help="beside the survey's own"
    )
    parser.add_argument("--device", choices=list(ATTENTIONS), default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=180, help="limit for one type")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="ask types anew that the file has already")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # a child that is forked beside a pool of threads waits for ever
    os.environ |= {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "1"} if options.device == "cpu" else {})
    under = conditions(options.device, options.precision)
    found = saved(options.out, under)
    missing = {
        name: [column for column in options.columns if options.again or column not in found.get(name, {})]
        for name in options.types
    }
    waiting = [
        name
        for name in options.types
        if options.again or name not in found or (missing[name] and "refused" not in found[name])
    ]
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        if waiting:
            with contextlib.suppress(ImportError):  # an older PyTorch: the columns that need it say so
                warm(text)
        child = partial(
            _child, missing=missing, device=options.device, precision=options.precision, text=text
        )
        for name, story in in_processes(child, waiting, options.jobs, options.seconds):
            columns = {key: value for key, value in found.get(name, {}).items() if key in COLUMNS}
            found[name] = columns | story
            save(options.out, under, found)
            print(f"{len(found)} {name}: {story.get('refused', 'asked')[:100]}", file=sys.stderr, flush=True)
    if options.out == RESULTS:
        write_page(PAGE, table(under, found))


if __name__ == "__main__":
    main()
