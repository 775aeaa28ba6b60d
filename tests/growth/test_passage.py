"""Receipts on real text: windows and prompts of a file, perplexity, and greedy continuations side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import make_checkpoint
from outgrow.growth import grow
from outgrow.growth.__main__ import main
from outgrow.growth.passage import NEW, PROMPTS, ROWS, continued, read_passage
from outgrow.growth.verify import compare_logits, measure
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model
from outgrow.model.headers import SINGLE
from outgrow.train.data.tokenizer import save_tokenizer, train_tokenizer

TEXT = " ".join(
    f"the {a} cat saw {b} dogs on a mat, and then it sat."
    for a in ["red", "blue", "old", "young", "big"]
    for b in range(40)
)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory, phi_config: dict[str, Any]) -> Path:
    """A tiny Phi with a tokenizer."""
    folder = tmp_path_factory.mktemp("spoken") / "source"
    make_checkpoint(folder, phi_config | {"vocab_size": 300})
    save_tokenizer(train_tokenizer([TEXT], vocab_size=290, model_max_length=64), folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(TEXT)
    return path


def test_a_passage_is_spread_over_the_whole_text(spoken: Path, file: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(spoken)(TEXT)["input_ids"]
    passage = read_passage(file, spoken, 300, 64)
    assert [len(row) for row in passage.windows] == [64] * ROWS
    assert len(passage.prompts) == PROMPTS
    assert passage.windows[0] == tokens[:64]
    assert passage.windows[-1] == tokens[-64:]
    assert passage.windows[1] == tokens[(len(tokens) - 64) // 3 :][:64]
    assert passage.prompts[0] == tokens[:24]
    assert len({tuple(prompt) for prompt in passage.prompts}) == PROMPTS


@pytest.mark.slow
def test_a_receipt_on_a_text_has_its_perplexity_and_continuations(
    spoken: Path, file: Path, tmp_path: Path
) -> None:
    grown = grow(
        spoken,
        tmp_path / "out",
        target={"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4},
        text=file,
    )
    receipt = grown.receipt
    assert receipt is not None
    assert (receipt.text, receipt.tokens, receipt.dtype) == (str(file), ROWS * 64, "float32")
    passage, model = read_passage(file, spoken, 300, 64), load_model(spoken)
    with torch.no_grad():
        windows = torch.tensor(passage.windows)
        loss = model(input_ids=windows, labels=windows).loss
    assert receipt.perplexity_source == pytest.approx(float(loss.exp()), rel=1e-5)
    assert receipt.perplexity_target == pytest.approx(receipt.perplexity_source, rel=1e-5)
    assert receipt.same == len(receipt.continuations) == PROMPTS
    for prompt, said in zip(passage.prompts, receipt.continuations, strict=True):
        tokens = torch.tensor([prompt])
        for _ in range(NEW):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
        assert said.prompt == passage.decode(prompt)
        assert said.source == said.target == passage.decode(tokens[0, len(prompt) :].tolist())
    record = json.loads((grown.folder / "growth.json").read_text())["receipt"]
    assert record["continuations"][0]["source"] == receipt.continuations[0].source
    card = (grown.folder / "README.md").read_text()
    assert f"Perplexity on that text {receipt.perplexity_source:.4f} → " in card
    assert card.count("| the same |") == PROMPTS


def test_another_model_says_something_else(spoken: Path, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((spoken / "config.json").read_text())
    tensors = load_file(spoken / SINGLE)
    save_file(
        {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()},
        other / SINGLE,
        {"format": "pt"},
    )
    receipt = measure(spoken, other, text=file)
    assert receipt.same < PROMPTS
    assert abs(receipt.loss_target - receipt.loss_source) > 0.1


def test_continuations_pass_over_what_the_generation_config_asks_for() -> None:
    seen: list[Any] = []

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        seen.append(model.generation_config)
        return torch.cat([input_ids, input_ids[:, :1]], 1)

    model = SimpleNamespace(generation_config="penalties", generate=generate)
    assert continued(model, torch.arange(6).reshape(2, 3)).tolist() == [[0], [3]]
    assert (seen[0].do_sample, seen[0].max_new_tokens, seen[0].eos_token_id, seen[0].repetition_penalty) == (
        False,
        NEW,
        None,
        None,
    )


def test_losses_of_many_rows_are_their_mean() -> None:
    numbers = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 4, 6, 9, generator=numbers, dtype=torch.float64)
    tokens = torch.randint(9, (4, 6), generator=numbers)
    receipt = compare_logits(before, after, tokens, "float64")
    picked = before[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    assert receipt.loss_source == pytest.approx(-float(picked.mean()), rel=1e-12)
    assert receipt.perplexity_source == pytest.approx(math.exp(receipt.loss_source))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"too short", "has 8 tokens; give a text of at least 34"),
        (b"\xff\xfe\x00" * 99, "is no text in UTF-8"),
        (b"a\0b" * 99, "holds zero bytes"),
        (None, "no such file"),
    ],
)
def test_what_is_no_text_is_told_before_anything_is_grown(
    spoken: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match=words):
        grow(spoken, tmp_path / "out", target={"intermediate_size": 80}, text=tmp_path / "text")
    assert not (tmp_path / "out.partial").exists()


def test_a_source_without_a_tokenizer_or_with_another_models_is_told(
    phi_folder: Path, spoken: Path, file: Path
) -> None:
    with pytest.raises(
        UserError, match=r"receipt\.text: the folder .* has no tokenizer that knows this text; put"
    ):
        read_passage(file, phi_folder, 96, 64)
    with pytest.raises(UserError, match=r"gives token \d+, and the model has 96; is it another model's"):
        read_passage(file, spoken, 96, 64)


@pytest.mark.slow
def test_the_door_prints_them_side_by_side(
    spoken: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = "target={intermediate_size:80}"
    main([f"source={spoken}", f"out={tmp_path / 'out'}", target, f"receipt.text={file}"])
    printed = capsys.readouterr().out
    assert "random tokens" not in printed
    assert "10 of 10 greedy continuations are equal" in printed
    assert "the grown model goes on" in printed
    with pytest.raises(SystemExit):
        main(
            [f"source={spoken}", f"out={tmp_path / 'none'}", target, f"receipt.text={file}", "receipt=false"]
        )
    assert "receipt=false measures none" in capsys.readouterr().err
    main([f"source={spoken}", f"out={tmp_path / 'none'}", target, "receipt=false"])
    assert "receipt:" not in capsys.readouterr().out
