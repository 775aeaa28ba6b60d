"""Quote another library's error in one of ours, whatever it says."""

from __future__ import annotations

from typing import Any

import pytest

from outgrow.model.base.errors import UserError, did_you_mean, first_line, in_one_line, kind_and_line
from outgrow.model.derive import derive


@pytest.mark.parametrize(
    ("fault", "line", "words"),
    [
        (ValueError("a head is too long\nsee the documentation"), "a head is too long", "a head is too long see the documentation"),
        (ValueError("\n\n  too long \n"), "too long", "too long"),
        (KeyError("size"), "'size'", "'size'"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device", "[Errno 28] No space left on device"),
    ],
)  # fmt: skip
def test_an_error_is_quoted_by_its_first_line_or_in_one(fault: Exception, line: str, words: str) -> None:
    assert first_line(fault) == line
    assert kind_and_line(fault) == f"{type(fault).__name__}: {line}"
    assert in_one_line(fault) == f"{type(fault).__name__}: {words}"


@pytest.mark.parametrize("silent", [ValueError(), ValueError(""), RuntimeError(" \n\t"), AssertionError()])
def test_an_error_that_says_nothing_is_quoted_by_its_class(silent: Exception) -> None:
    """An assertion in a library, or `raise TimeoutError`: an empty text has no first line."""
    kind = type(silent).__name__
    assert first_line(silent) == in_one_line(silent) == kind_and_line(silent) == kind


def test_a_library_that_says_nothing_is_told_by_every_room(monkeypatch: Any, tmp_path: Any) -> None:
    import torch
    from transformers import AutoTokenizer

    from outgrow.growth.optimizer import read_optimizer
    from outgrow.train.data.tokenizer import load_tokenizer

    unread: Any = None

    def silent(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "load", silent)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", silent)
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"PyTorch file of tensors \(AssertionError\)"):
        read_optimizer(tmp_path, unread)
    with pytest.raises(UserError, match=r"cannot be loaded \(AssertionError\)"):
        load_tokenizer("owner/name")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("LLAMA", "did you mean 'llama'?"),
        ("Gpt2", "did you mean 'gpt2'?"),
        ("lama", "did you mean 'llama'?"),
        ("zzzz", "known: MixedCase, gpt2, llama"),
        ("mixedcase", "did you mean 'MixedCase'?"),
        (["llama"], "did you mean 'llama'?"),
    ],
)
def test_near_matches_are_those_in_any_case(name: object, near: str) -> None:
    assert did_you_mean(name, ["llama", "gpt2", "MixedCase"]) == near


@pytest.mark.parametrize(
    ("name", "near"), [("LLAMA", "'llama'"), ("qwen_3", "'qwen3'"), ("BLOOM", "'bloom'")]
)
def test_a_model_type_that_the_library_does_not_know_has_its_near_matches(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"no causal language model of that type; did you mean .*{near}"):
        derive({"model_type": name})
