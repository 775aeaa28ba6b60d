"""What the survey measures of the library's classes, against what is known of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from outgrow.model import survey as surveys
from outgrow.model.survey import Survey, causal_switch, survey, works


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return CONFIG_MAPPING[name](**changes).to_dict()


def seen(name: str, **changes: Any) -> Survey:
    attention = "sdpa" if works(config_of(name), "sdpa").value else "eager"
    return survey(config_of(name, **changes), attention=attention)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "same"),
    [
        ("llama", {}, True),
        ("gpt2", {}, True),
        # a dense layer and a norm stand before its decoder's matrix
        ("roberta", {"is_decoder": True}, False),
        ("modernbert-decoder", {}, False),
        ("gemma2", {}, False),
        ("falcon_h1", {}, True),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, False),
        ("granite", {}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {"logit_scale": 1.0}, True),
        ("cohere", {}, False),
    ],
)
def test_whether_the_head_over_the_base_model_gives_the_logits(
    name: str, changes: dict[str, Any], same: bool
) -> None:
    found = seen(name, **changes)
    assert found.same(found.head) is same
    assert found.head.value is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "llama4_text",
            "its class has no base model and output head under the names that the library gives them",
        ),
        ("rembert", "its head reads 40 entries, and its base model gives 64"),
    ],
)
def test_a_head_that_does_not_read_what_a_base_model_gives_is_not_measured(name: str, reason: str) -> None:
    found = seen(name)
    assert (found.head.value, found.head.reason) == (None, reason)
    assert not found.same(found.head)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "causal"),
    [("llama", {}, True), ("mamba", {}, True), ("bert", {}, False), ("bert", {"is_decoder": True}, True)],
)
def test_whether_logits_move_with_later_tokens(name: str, changes: dict[str, Any], causal: bool) -> None:
    found = seen(name, **changes)
    assert found.same(found.future) is causal


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("bert", {"is_decoder": True}),
        ("xlm", {"causal": True}),
        ("xlnet", {"attn_type": "uni"}),
        ("cpmant", {}),
    ],
)
def test_the_switch_that_makes_a_class_causal(name: str, switch: dict[str, Any]) -> None:
    assert not (found := seen(name)).same(found.future)
    assert causal_switch(config_of(name), attention="eager") == switch
    # as a config.json has it, without the class's defaults
    assert causal_switch({"model_type": name}, attention="eager") == switch


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("llama", True),
        ("qwen3_moe", True),
        ("gemma2", True),
        ("gpt_oss", False),
        ("falcon", False),
        ("mamba", False),
    ],
)
def test_whether_documents_are_kept_apart(name: str, apart: bool) -> None:
    """By positions that restart; where these do not, by masks that are handed over, unless a state carries
    on."""
    found = seen(name)
    assert found.same(found.leak) is apart
    assert found.leak.value is not None
    assert apart or found.leak.value > 0.1
    assert found.same(found.masked_leak) is (name in ("gpt_oss", "falcon"))
    assert bool(found.masked_leak.reason) is (found.masked_leak.value is None)


@pytest.mark.parametrize(
    ("name", "restart"), [("opt", True), ("falcon", True), ("bart", False), ("marian", False)]
)
def test_whether_positions_restart_under_masks_that_are_handed_over(name: str, restart: bool) -> None:
    """BART's decoder takes no positions: it counts its own, over the whole row."""
    found = seen(name)
    assert found.same(found.masked_leak)
    assert found.same(found.shift) is restart
    assert restart or (found.shift.value or 0.0) > 0.01
    assert seen("llama").shift.reason == "positions that restart are enough"


def test_masks_that_forget_a_sliding_window_are_no_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twin's text is shorter than the windows of real configs, so it is asked with a small one too."""
    whole = surveys.documents_apart

    def without_window(tokens: Any, end_of_text: int, attention: str, masked: Any = None) -> dict[str, Any]:
        found = whole(tokens, end_of_text, attention, masked)
        masks = found.get("attention_mask")
        return found | (
            {"attention_mask": dict.fromkeys(masks, masks["full_attention"])}
            if isinstance(masks, dict)
            else {}
        )

    monkeypatch.setattr(surveys, "documents_apart", without_window)
    surveys._survey.cache_clear()
    try:
        assert not (found := seen("gpt_oss")).same(found.masked_leak)
    finally:
        surveys._survey.cache_clear()


def test_a_mask_that_is_not_sent_is_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is asked under what the trainer sends, and would notice if it sent nothing."""
    monkeypatch.setattr(
        surveys, "documents_apart", lambda tokens, end_of_text, attention, masked=None: {"input_ids": tokens}
    )
    surveys._survey.cache_clear()
    try:
        found = seen("llama")
        assert found.leak.value is not None
        assert found.leak.value > 0.1
    finally:
        surveys._survey.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"),
    [("llama", None), ("bart", "encoder_attn"), ("gemma3", "vision_tower"), ("afmoe", "expert_bias")],
)
def test_the_parameters_that_text_does_not_reach(name: str, part: str | None) -> None:
    unreached = seen(name).unreached.value
    assert unreached is not None
    assert any(part in parameter for parameter in unreached) if part else unreached == ()


@pytest.mark.parametrize(
    ("name", "attention", "runs"),
    [("llama", "sdpa", True), ("gemma2", "sdpa", False), ("gemma2", "eager", True)],
)
def test_which_attention_implementations_train(name: str, attention: str, runs: bool) -> None:
    answer = works(config_of(name), attention)
    assert answer.value is runs
    assert runs or "does not support" in answer.reason


def test_a_survey_says_under_what_it_was_made_is_remembered_and_draws_no_random_numbers_of_the_run() -> None:
    before = torch.random.get_rng_state()
    surveys._survey.cache_clear()
    found = survey(config_of("phi"), attention="sdpa", precision="bf16")
    assert (found.device, found.precision, found.attention, found.versions[0]) == (
        "cpu",
        "bf16",
        "sdpa",
        torch.__version__,
    )
    assert found.same(found.future)
    assert found.same(found.leak)
    assert survey(config_of("phi", hidden_size=1024), attention="sdpa", precision="bf16") is found
    assert torch.equal(torch.random.get_rng_state(), before)
