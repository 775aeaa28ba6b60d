"""Growth in memory against growth on disk, and a grown folder's plan made again from what the folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import config_of, renamed
from helpers.models import random_model
from outgrow.growth import grow, grow_model
from outgrow.growth.operators import OPERATORS
from outgrow.growth.record import recorded_plan
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model, stored_names

UNEVEN = {
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 57,
    "num_hidden_layers": 3,
}


def bits(model: Any) -> dict[str, torch.Tensor]:
    names = stored_names(model)
    return {names[name]: parameter.detach().view(torch.uint8) for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "operator"),
    [("llama", "lossless"), ("gpt_neox", "net2net"), ("gpt2", "tile"), ("phi", "scratch")],
)
def test_memory_and_disk_give_the_same_bits(
    tmp_path: Path, name: str, operator: str, dtype: torch.dtype
) -> None:
    source = random_model(config_of(name)).to(dtype)
    source.save_pretrained(tmp_path / "source")
    target = {
        key: value
        for key, value in renamed(name, UNEVEN).items()
        if key != "num_key_value_heads" or name == "llama"
    }
    how: dict[str, Any] = {"operator": operator, "depth": "stack", "noise": 0.3, "seed": 5}
    before = bits(source)
    inside = grow_model(source, target, **how)
    grow(tmp_path / "source", tmp_path / "out", target=target, **how)
    outside = load_model(tmp_path / "out", dtype=str(dtype).removeprefix("torch."), attention="eager")
    assert bits(inside).keys() == bits(outside).keys()
    assert all(torch.equal(values, bits(outside)[name]) for name, values in bits(inside).items())
    assert all(torch.equal(values, before[name]) for name, values in bits(source).items()), (
        "the source stays as it is"
    )
    tokens = torch.arange(20)[None]
    with torch.no_grad():  # buffers too: rotary angles are no parameters
        torch.testing.assert_close(inside(input_ids=tokens).logits, outside.eval()(input_ids=tokens).logits)
    assert (inside.training, inside.dtype) == (source.training, dtype)
    assert (inside.get_input_embeddings().weight is inside.get_output_embeddings().weight) == bool(
        source.config.tie_word_embeddings
    )


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_a_grown_folder_says_enough_to_make_its_plan_again(
    tmp_path: Path, phi_folder: Path, operator: str
) -> None:
    depth: Any = [0, 2, 1, 1] if operator == "tile" else "interleave"
    target = {"intermediate_size": 80, "num_hidden_layers": 4}
    grown = grow(
        phi_folder, tmp_path / "out", target=target, operator=operator, depth=depth, noise=0.1, seed=3
    )
    assert recorded_plan(tmp_path / "out").hash == grown.plan.hash
    record = json.loads((tmp_path / "out" / "growth.json").read_text())
    record["plan"]["seed"] = 4
    (tmp_path / "out" / "growth.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"gives plan .* but records plan"):
        recorded_plan(tmp_path / "out")
