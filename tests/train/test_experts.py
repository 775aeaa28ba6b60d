"""Training a mixture of experts grown from a dense source: its start, its experts' load, and the parameters
that a token meets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.toy import rows
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.machine.forecast import forecast, tell
from outgrow.train.start.source import target_config

SOURCE = (
    "target={model_type:qwen3,vocab_size:300,max_position_embeddings:32,hidden_size:16,intermediate_size:32,num_hidden_layers:2,"
    "num_attention_heads:2,num_key_value_heads:2,head_dim:8,tie_word_embeddings:false}"
)
MIXTURE = "target={model_type:qwen3_moe,num_experts:4,num_experts_per_tok:2,router_aux_loss_coef:0.1}"


@pytest.fixture(scope="module")
def source(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final folder of a dense run. Read only."""
    own = [one for one in overrides if not one.startswith("target=")]
    return loop.train(compose([*own, SOURCE, f"out={tmp_path_factory.mktemp('runs') / 'source'}"])) / "final"


def arm(overrides: list[str], source: Path, *more: str) -> list[str]:
    own = [one for one in overrides if not one.startswith(("target=", "growth="))]
    return [*own, MIXTURE, f"source={source}", *more]


@pytest.mark.slow
def test_a_dense_source_trains_on_as_a_mixture(overrides: list[str], source: Path, tmp_path: Path) -> None:
    asked = arm(overrides, source, "growth=upcycle", "growth.sparse=last_half", "transfer.optimizer=null")
    folder = loop.train(compose([*asked, f"out={tmp_path / 'run'}"]))
    run = json.loads((folder / "run.json").read_text())
    assert run["start"]["lossless"]
    before = json.loads((source.parent / "summary.json").read_text())["final_val_loss"]
    assert rows(folder, "eval")[0]["val_loss"] == pytest.approx(before, rel=1e-5)
    assert run["target_config"]["mlp_only_layers"] == [0]
    assert run["active_parameters"] == run["parameters"] - 3 * 32 * 16 * 2  # two of four experts
    trained = rows(folder, "train")
    assert all(row["expert_load_max"] >= 1 >= row["expert_load_min"] >= 0 for row in trained)
    assert all(row["experts_idle"] == 0 or row["expert_load_min"] == 0 for row in trained)
    assert all(row["router_loss"] > 0 for row in trained)
    ledger = json.loads((folder / "final" / "ledger.json").read_text())
    assert (ledger["parameters"], ledger["active_parameters"]) == (
        run["parameters"],
        run["active_parameters"],
    )
    assert "active for each token" in (folder / "final" / "README.md").read_text()


@pytest.mark.slow
def test_scratch_of_the_same_target_is_the_same_network(overrides: list[str], source: Path) -> None:
    of = {
        name: target_config(compose(arm(overrides, source, f"growth={name}")), source)
        for name in ("upcycle", "scratch")
    }
    assert of["scratch"] == of["upcycle"]
    assert of["scratch"]["model_type"] == "qwen3_moe"


@pytest.mark.slow
def test_the_forecast_tells_active_parameters(overrides: list[str], source: Path) -> None:
    settings = compose(arm(overrides, source, "growth=upcycle"))
    found = forecast(settings)
    assert found.active == found.parameters - 2 * 3 * 32 * 16 * 2
    assert f"{found.active:,} active for each token" in tell(settings)
