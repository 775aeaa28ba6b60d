"""Models in memory: what is around them is taken off or named, and what is in them is checked as a folder
is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from helpers.families import config_of
from helpers.models import random_model
from outgrow.growth import grow_model
from outgrow.model.base.errors import UserError
from outgrow.model.build import stored_names


@pytest.fixture
def model() -> Any:
    return random_model(config_of("llama"))


def target(model: Any) -> dict[str, int]:
    return {"intermediate_size": model.config.intermediate_size + 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    "around", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))]
)
def test_what_is_around_a_model_is_taken_off(model: Any, around: Callable[[Any], Any]) -> None:
    plain, wrapped = grow_model(model, target(model)), grow_model(around(model), target(model))
    assert type(wrapped) is type(model)
    assert all(
        torch.equal(one, other) for one, other in zip(plain.parameters(), wrapped.parameters(), strict=True)
    )


def layer_by_layer(model: Any) -> Any:
    layers = [torch.compile(layer) for layer in model.model.layers]
    model.model.layers = nn.ModuleList(layers)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_whose_layers_are_compiled_one_by_one_grows(tied: bool) -> None:
    config = config_of("llama", tie_word_embeddings=tied)
    plain = grow_model(random_model(config), target(random_model(config)))
    wrapped = grow_model(layer_by_layer(random_model(config)), target(random_model(config)))
    assert wrapped.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in wrapped.state_dict().items())


def test_an_argument_of_another_kind_is_told(model: Any) -> None:
    with pytest.raises(UserError, match="nonfinite: expected 'refuse' or 'allow'; found 'maybe'"):
        grow_model(model, target(model), nonfinite="maybe")  # type: ignore[arg-type]


def normed(model: Any) -> Any:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def old_normed(model: Any) -> Any:
    torch.nn.utils.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def spectral(model: Any) -> Any:
    torch.nn.utils.spectral_norm(model.model.layers[0].mlp.up_proj)
    return model


def pruned(model: Any) -> Any:
    prune.random_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.5)
    return model


def sharded(model: Any) -> Any:
    """As FSDP2 leaves it, on one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def resized(model: Any) -> Any:
    model.config.vocab_size -= 10
    return model


def untied(model: Any) -> Any:
    model.config.tie_word_embeddings = True
    return model


def broken(model: Any) -> Any:
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    return model


def widened(model: Any) -> Any:
    model.model.layers[0].mlp.extra = nn.Linear(3, 3)
    return model


BARRED: list[tuple[Callable[[Any], Any], str]] = [
    (normed, r"mlp\.up_proj\.weight is computed from other tensors \(weight_norm"),
    (old_normed, r"mlp\.up_proj\.weight is computed from other tensors \(weight_norm"),
    (spectral, r"mlp\.up_proj\.weight is computed from other tensors"),
    (pruned, r"mlp\.up_proj\.weight is computed from other tensors"),
    (lambda model: model.to("meta"), "some of its weights are not in memory"),
    (sharded, "its weights are sharded over processes; save it whole"),
    (
        lambda model: model.model,
        "a language model with its head is grown; give the LlamaForCausalLM that it is a part of",
    ),
    (lambda model: model.lm_head, "Linear: expected a model of transformers"),
    (resized, r"embed_tokens\.weight: .* config\.json give shape \(\d+, \d+\), the file has"),
    (untied, "its config ties lm_head.weight to model.embed_tokens.weight, and they differ"),
    (broken, r"lm_head\.weight: entry \[3, 4\] is NaN"),
    (widened, r"unknown model\.layers\.0\.mlp\.extra"),
]


@pytest.mark.parametrize(("spoil", "told"), BARRED, ids=[f"{n}" for n in range(len(BARRED))])
def test_what_cannot_be_read_is_told_in_one_error(model: Any, spoil: Callable[[Any], Any], told: str) -> None:
    try:
        with pytest.raises(UserError, match=told):
            grow_model(spoil(model), {"intermediate_size": 100})
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_weight_that_is_not_finite_is_copied_where_that_is_allowed(model: Any) -> None:
    assert grow_model(broken(model), target(model), nonfinite="allow").lm_head.weight[3, 4].isnan()


def test_a_model_of_mixed_dtypes_keeps_each(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else torch.bfloat16)
    grown = grow_model(model, target(model))
    assert {"norm" in name: parameter.dtype for name, parameter in grown.named_parameters()} == {
        True: torch.float32,
        False: torch.bfloat16,
    }
    kept = dict(model.named_parameters())
    assert torch.equal(grown.model.norm.weight, kept["model.norm.weight"])
    assert len(stored_names(grown)) == len(kept)
