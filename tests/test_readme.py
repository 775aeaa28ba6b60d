"""What the README shows is run, and what it counts is what the counting script wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import model.family
from growth import grow
from model.build import to_hf_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_schema_of_ones_own_is_registered_and_right(tmp_path: Path, checkpoint_maker: Any, monkeypatch: Any) -> None:
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "register(" in block)
    model.family.families()
    monkeypatch.setattr(model.family, "_REGISTERED", dict(model.family._REGISTERED))
    exec(example, {})
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    config = to_hf_config({"model_type": "starcoder2", "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, **sizes}).to_dict()
    source = checkpoint_maker(tmp_path / "source", config)
    target = {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5, "num_hidden_layers": 3, "intermediate_size": 31}
    grown = grow(source, tmp_path / "out", target=target, noise=0.3)
    assert grown.plan.notes == ()
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt is not None
    assert grown.receipt.max_delta <= 1e-12


def test_what_is_said_of_training_is_what_the_study_found() -> None:
    """The sentence about experiments/tiny_transfer against its comparison.json."""
    found = json.loads((ROOT / "experiments" / "tiny_transfer" / "comparison.json").read_text())["changes"]
    untold = "no change that the seeds can tell"
    assert {(change["plain"], change["arm"]): change["verdict"] for change in found} == {
        **{("lossless", arm): untold for arm in ("continued", "distilled", "slower")},
        ("lossless", "frozen"): "higher",
        **{("scratch", arm): untold for arm in ("g_stack", "gradual_stacking")},
    }
    assert all(change["flops"] < 1 for change in found if change["plain"] == "scratch")
    assert all(len(change["seeds"]) == 3 for change in found)
    said = " ".join(README.split())
    for sentence in (
        "three seeds tell neither `continued` nor `distilled` nor slower inherited entries from plain training, and `frozen` ends higher",
        "nor do they tell `g_stack` and `gradual_stacking` from scratch, which paid more FLOPs",
    ):
        assert sentence in said


def test_the_count_of_architectures_is_the_one_that_was_measured() -> None:
    """The numbers of `python benchmarks/count_architectures.py`, and that they count what the file lists."""
    result = json.loads((ROOT / "benchmarks" / "count_architectures.json").read_text())
    confirmed = [story["axes"] for story in result["types"].values() if "refused" not in story]
    counts = result["summary"]
    assert counts["types"] == len(result["types"])
    assert counts["hidden width"] == len(confirmed) == sum("confirmed" in axes["hidden width"] for axes in confirmed)
    assert all(axes["hidden width"]["error"] <= 2e-5 for axes in confirmed)
    version = result["versions"]["transformers"].rpartition(".")[0]
    said = " ".join(README.split())
    for sentence in (
        f"Of the {counts['types']} causal language model types of transformers {version}",
        f"confirmed for **{counts['hidden width']}**; for {counts['hidden width at any ratio']} of them",
        f"Heads grow too in {counts['heads too']}, feed-forward or expert sizes in {counts['feed-forward too']},",
        f"depth in {counts['depth too']}.",
        f"{counts['held against the default config']} of the schemas were also held against",
    ):
        assert sentence in said
