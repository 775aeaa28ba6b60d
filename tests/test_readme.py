"""What the README shows is run, and what it counts is what the counting script wrote."""

from __future__ import annotations

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
