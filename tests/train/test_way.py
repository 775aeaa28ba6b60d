"""A run asks what its class can do before step 1, and takes that way or refuses with the number and the key
that helps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.toy import at, ended, rows, toy_overrides
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model
from outgrow.model.config import read_json
from outgrow.train import loop
from outgrow.train.compose import compose
from outgrow.train.evaluate import evaluate
from outgrow.train.loss import NextTokenLoss
from outgrow.train.settings import Settings
from outgrow.train.start import way
from outgrow.train.start.teacher import TaughtLoss
from outgrow.train.start.way import find_way

CPU = torch.device("cpu")
BERT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
SMALL = {**BERT, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
TARGETS: dict[str, dict[str, Any]] = {
    "roberta": {**BERT, "is_decoder": True, "vocab_size": 300},
    "gemma2": {**SMALL, "vocab_size": 300, "layer_types": ["full_attention"]},
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 300},
    "gemma4_text": {**SMALL, "vocab_size": 300, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "num_hidden_layers": 2,
                    "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8, "num_kv_shared_layers": 0},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40},
    "bart": {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 300,
             "max_position_embeddings": 40, "is_decoder": True, "is_encoder_decoder": False, "dropout": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Two steps of the toy run."""
    folder = tmp_path_factory.mktemp("way") / "text"
    folder.mkdir()
    return compose([*toy_overrides(folder), "train.budget_tokens=256", "train.eval_every_tokens=null"])


def of(settings: Settings, name: str, out: Path, **changes: Any) -> Settings:
    target = {"model_type": name, **TARGETS[name]}
    return dataclasses.replace(at(settings, out, **changes), target=target)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta", "gemma2", "mamba", "gemma4_text", "gpt2"])
def test_a_class_trains_and_its_loss_is_the_librarys_own(
    name: str, settings: Settings, tmp_path: Path
) -> None:
    """What the run reports at its end is what the library's own loss says of its final/ on the same
    windows."""
    kept: dict[str, Any] = {}

    def keep(model: Any, batches: Any, *rest: Any) -> Any:
        kept["windows"] = torch.cat([torch.from_numpy(batch) for batch in batches])
        return evaluate(model, batches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("outgrow.train.observing.evaluate", keep)
        folder = loop.train(of(settings, name, tmp_path / "run"))
    network: Any = AutoModelForCausalLM.from_pretrained(folder / "final").eval()
    windows = kept["windows"]
    with torch.no_grad():
        logits = network(input_ids=windows[:, :-1], use_cache=False).logits.float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert rows(folder, "eval")[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_class_without_sdpa_takes_eager_and_says_so(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = loop.train(dataclasses.replace(of(settings, "gemma2", tmp_path / "run"), progress="lines"))
    assert read_json(folder / "run.json")["attention"] == "eager"
    told = capsys.readouterr().out
    assert "attention eager (no sdpa: ValueError: Gemma2ForCausalLM does not support" in told
    assert "the head over the base model's output is not its logits" in told
    with pytest.raises(
        UserError,
        match=r"train.attention=sdpa: gemma2 does not train with it here .*; use train.attention=eager",
    ):
        loop.train(of(settings, "gemma2", tmp_path / "other", attention="sdpa"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "asked", "message"),
    [
        (
            "bert",
            {},
            {},
            (
                r"\(bert\) is not causal: logits move by 0\.\d+ of the largest .*; use "
                r"target=\{is_decoder:true\}"
            ),
        ),
        (
            "xlnet",
            {},
            {},
            (
                r"\(xlnet\) is not causal: .*; use target=\{attn_type:uni\}, or attn_type in the source's "
                r"config.json"
            ),
        ),
        ("cpmant", {}, {}, r"\(cpmant\) is not causal: .*; choose a causal class"),
        (
            "bloom",
            {},
            {"document_mask": True},
            r"train.document_mask=true: .*\(bloom\), attention eager: logits after an end-of-text move",
        ),
        (
            "mamba",
            {},
            {"document_mask": True},
            r"train.document_mask=true: .* use train.document_mask=false$",
        ),
        ("roberta", {"is_decoder": True}, {"loss": "fused"}, "train.loss=fused: .* use train.loss=auto"),
        (
            "phi",
            {},
            {"attention": "flex_attention"},
            r"train.attention=flex_attention: .* use train.attention=sdpa or eager",
        ),
    ],
)
def test_what_a_class_cannot_do_is_refused_with_the_key_that_helps(
    name: str, changes: dict[str, Any], asked: dict[str, Any], message: str, settings: Settings
) -> None:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[name](**changes).to_dict()
    with pytest.raises(UserError, match=message):
        find_way(config, dataclasses.replace(settings.train, **asked), CPU, "fp32")


def test_all_faults_of_a_class_are_told_together(settings: Settings) -> None:
    asked = dataclasses.replace(settings.train, document_mask=True, loss="fused")
    config = {"model_type": "roberta", **TARGETS["roberta"]}
    with pytest.raises(UserError, match=r"2 faults:\n.*document_mask[^\n]*\n.*loss=fused"):
        find_way(config, asked, CPU, "fp32")


def test_what_was_not_measured_is_not_granted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> None:
        raise UserError("its sizes have unknown names")

    monkeypatch.setattr(way, "tiny_twin", refuse)
    found = find_way({"model_type": "phi"}, settings.train, CPU, "fp32")
    assert (found.attention, found.fused, found.partly) == ("auto", False, True)
    assert "was not surveyed (its sizes have unknown names); loss plain" in found.lines[0]
    with pytest.raises(
        UserError,
        match=r"document_mask=true: not measured for .*, so not granted \(its sizes have unknown names\)",
    ):
        find_way({"model_type": "phi"}, dataclasses.replace(settings.train, document_mask=True), CPU, "fp32")


@pytest.mark.slow
def test_parameters_without_gradient_are_told_and_do_not_stop_two_processes(
    settings: Settings, tmp_path: Path
) -> None:
    """Of a BART decoder alone, text does not reach the attention to an encoder."""
    alone = loop.train(of(settings, "bart", tmp_path / "one"))
    found = find_way({"model_type": "bart", **TARGETS["bart"]}, settings.train, CPU, "fp32")
    assert found.partly
    assert "text gives no gradient to model.decoder.layers.*.encoder_attn" in found.lines[-1]
    together = ended(of(settings, "bart", tmp_path / "two"), processes=2)
    losses = [rows(folder, "eval")[-1]["val_loss"] for folder in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_teacher_that_caps_its_logits_teaches_by_its_logits() -> None:
    student = build_model({"model_type": "gemma2", **TARGETS["gemma2"]}, seed=0, attention="eager").eval()
    teacher = build_model(
        {"model_type": "gemma2", **TARGETS["gemma2"], "final_logit_softcapping": 0.1},
        seed=1,
        attention="eager",
    ).eval()
    windows = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(0))
    objective, _ = TaughtLoss(NextTokenLoss(student, fused=False), teacher, fused=False)(
        windows, weight=1.0, temperature=2.0
    )
    mine, theirs = (model(input_ids=windows[:, :-1]).logits.flatten(0, 1) / 2 for model in (student, teacher))
    expected = 4 * torch.nn.functional.kl_div(
        mine.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(objective, expected)
