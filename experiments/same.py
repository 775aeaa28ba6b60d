"""Show that a change alters no number: plans, grown weights and a toy run at two revisions, compared to the
bit.

outgrow same REV          one or two minutes: this working tree beside the commit REV

Every operator of conf/growth plans Phi-1.5 → Phi-2 and grows a tiny Phi with random weights; a toy run trains
a tiny source and goes on from it, grown. Plan hashes, checksums of weights and rows of metrics.jsonl are held
against each other. REV is in the history of this clone, and is as young as the package `outgrow`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

ROOMS = ("model", "growth", "train", "experiments", "conf")
# of a row of metrics.jsonl: what two equal runs may tell differently
CLOCKS = ("seconds", "tokens_per_second")
SOURCE = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
TARGET = "target={hidden_size:48,intermediate_size:80,num_hidden_layers:6,num_attention_heads:6}"
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs")
SIZES = (
    "vocab_size:300,max_position_embeddings:32,hidden_size:16,intermediate_size:32,"
    "num_attention_heads:2,num_key_value_heads:2"
)
RUN = (
    "context=16",
    "batch_tokens=128",
    "budget_tokens=1024",
    "eval_tokens=320",
    "eval_every_tokens=256",
    "log_every_tokens=128",
)


@dataclass(frozen=True)
class Difference:
    """One number that the two revisions do not share; None where a revision has no such number."""

    name: str
    there: str | None
    here: str | None


def compare(revision: str) -> tuple[int, list[Difference]]:
    """The number of numbers that were compared, and those that differ.

    Raises:
        UserError: this is no clone, REV is unknown, or one of the two trees does not run.
    """
    from outgrow.model.base.errors import UserError

    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        there = work / "there"
        git = subprocess.run(
            ["git", "-C", str(here), "worktree", "add", "--detach", str(there), revision],
            capture_output=True,
            text=True,
            check=False,
        )
        if git.returncode:
            raise UserError(f"same {revision}: git says: {git.stderr.strip()}; give a commit of this clone")
        try:
            if not (there / "experiments" / "command.py").is_file():
                raise UserError(
                    f"same {revision}: it is older than the package outgrow, whose names it does not know"
                )
            write_text(work / "text")
            old = _numbers_of(there, work)
            new = _numbers_of(here, work)
        finally:
            subprocess.run(
                ["git", "-C", str(here), "worktree", "remove", "--force", str(there)],
                capture_output=True,
                check=False,
            )
    names = sorted(old.keys() | new.keys())
    return len(names), [
        Difference(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)
    ]


def write_text(folder: Path) -> None:
    """A text of a few words, the same for both trees."""
    folder.mkdir()
    draw = random.Random(0)
    for number in range(40):
        words = draw.choices(WORDS, k=120)
        (folder / f"{number}.txt").write_text(" ".join(words))


def _numbers_of(tree: Path, work: Path) -> dict[str, str]:
    """The numbers of one tree, measured in a process that finds `outgrow` there."""
    from outgrow.model.base.errors import UserError

    site = work / f"site-{tree.name}"
    own = work / f"work-{tree.name}"
    (site / "outgrow").mkdir(parents=True)
    own.mkdir()
    for room in ROOMS:
        (site / "outgrow" / room).symlink_to(tree / room)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, __file__, str(work / "text")],
        cwd=own,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["no words"]
        raise UserError(f"same: {tree} does not run: {lines[-1]}")
    last = process.stdout.splitlines()[-1]
    return dict(json.loads(last))


# ---- what the process of a tree measures -------------------------------------------------------------------


def numbers(text: Path) -> Iterator[tuple[str, str]]:
    """Name and value of every number; made by whatever tree `outgrow` leads to."""
    leaves = []
    for path in sorted(_conf().glob("growth/*.yaml")):
        text_of_leaf = path.read_text()
        grows_in_a_run = "stages:" in text_of_leaf
        trains_the_source = "operator: source" in text_of_leaf
        if not grows_in_a_run and not trains_the_source:
            leaves.append(path.stem)
    _random_source(Path("source"))
    for leaf in leaves:
        yield f"plan of {leaf}", _plan_hash(leaf)
        yield f"weights of {leaf}", _grown(leaf)
    yield from _trained("source", ["growth=scratch"], text)
    yield from _trained("grown", ["growth=lossless", "source=run-source/final"], text)


def _conf() -> Path:
    """The configurations of the tree that is measured, by no name that an older one may not have."""
    rooms = Path(str(files("outgrow.model"))).parent
    return rooms / "conf"


def _random_source(folder: Path) -> None:
    import torch

    from outgrow.model.build import build_model
    from outgrow.model.presets import preset

    config = (
        preset("tiny_source")
        | SOURCE
        | {"num_key_value_heads": 3, "max_position_embeddings": 64, "dtype": "float32"}
    )
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * 0.2)
    model.save_pretrained(folder)


def _plan_hash(leaf: str) -> str:
    from outgrow.growth import plan
    from outgrow.growth.__main__ import settings_from
    from outgrow.model.base.errors import UserError

    settings = settings_from(["source=phi_1_5", "target=phi_2", f"growth={leaf}", "plan_only=true"])
    try:
        options = settings.growth.arguments()
        return plan(settings.source, settings.target, seed=settings.seed, **options).hash
    except UserError:  # an operator that this growth is not for; that it stays so is compared too
        return "refused"


def _grown(leaf: str) -> str:
    """SHA-256 over the weights of the tiny source, grown."""
    from outgrow.growth.__main__ import main

    out = Path(f"grown-{leaf}")
    try:
        main(["source=source", TARGET, f"growth={leaf}", f"out={out}", "receipt=false"])
    except SystemExit:  # as above
        return "refused"
    digest = hashlib.sha256()
    for path in sorted(out.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _trained(name: str, overrides: list[str], text: Path) -> Iterator[tuple[str, str]]:
    """The rows of a toy run's metrics, and its final weights."""
    from outgrow.train.compose import compose
    from outgrow.train.loop import train

    data = [
        "data=files",
        f"data.path={text}",
        "data.folder=tokens",
        "data.vocab_size=280",
        "data.validation_fraction=0.3",
    ]
    layers = 1 if name == "source" else 2
    target = f"target={{model_type:phi,tie_word_embeddings:false,num_hidden_layers:{layers},{SIZES}}}"
    rest = [
        target,
        "logger=none",
        "progress=false",
        "study=same",
        f"out=run-{name}",
        *(f"train.{setting}" for setting in RUN),
    ]
    train(compose([*data, *rest, *overrides]))
    folder = Path(f"run-{name}")
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in CLOCKS:
            row.pop(key, None)
        label = f"{row.get('kind')} of {name}, step {row.get('step')}"
        yield label, json.dumps(row, sort_keys=True)
    weights = (folder / "final" / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    yield f"final weights of {name}", digest[:16]


@contextmanager
def _silent() -> Iterator[Callable[[str], None]]:
    """The doors' own words go nowhere; what is told through the value yielded goes out."""
    out = sys.stdout
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield lambda line: print(line, file=out)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's own folder
    with _silent() as tell:
        measured = list(numbers(Path(sys.argv[1])))
        tell(json.dumps(measured))
