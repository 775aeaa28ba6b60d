"""Answers from a model on this machine, through transformers."""

from __future__ import annotations

import hashlib
from typing import Any

from outgrow.model.base.errors import UserError, first_line
from outgrow.train.corpus.writing.answer import Answer
from outgrow.train.corpus.writing.prompts import Prompt
from outgrow.train.corpus.writing.settings import WriteSettings


class Local:
    """A causal language model and its tokenizer, loaded once. No code of theirs is run."""

    def __init__(self, settings: WriteSettings) -> None:
        """Raises UserError: it cannot be loaded."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.settings = settings
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
            # no code of theirs, and no pickle
            safely: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
            self.model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto", **safely)
        except Exception as error:  # transformers and the hub's client each raise their own
            raise UserError(
                f"model={settings.model}: cannot be loaded ({first_line(error)}); give a folder or a name "
                "on the Hugging Face hub that can be reached, or server=URL for a model that a server holds"
            ) from error
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"model={settings.model}: its tokenizer has no eos token, so that no text would end; set one"
            )
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def answers(self, prompts: list[Prompt]) -> list[Answer]:
        """One answer each, drawn together; the draw depends on the prompts and the seed alone."""
        import torch

        numbers = ",".join(str(prompt.number) for prompt in prompts)
        torch.manual_seed(
            int.from_bytes(hashlib.sha256(f"{self.settings.seed} {numbers}".encode()).digest()[:8], "little")
            >> 1
        )
        plain = self.tokenizer.chat_template is None
        encoded = [
            self.tokenizer(self._worded(prompt), add_special_tokens=plain)["input_ids"] for prompt in prompts
        ]
        width = max(map(len, encoded))
        end = self.tokenizer.eos_token_id
        self._check_length(width)
        gaps = [width - len(row) for row in encoded]
        padded = []
        masks = []
        for row, gap in zip(encoded, gaps, strict=True):
            padded.append([end] * gap + row)
            ones = [1] * len(row)
            masks.append([0] * gap + ones)
        ids = torch.tensor(padded, device=self.model.device)
        mask = torch.tensor(masks, device=self.model.device)
        drawing = {
            "do_sample": True,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "top_k": 0,
        }
        with torch.no_grad():
            outputs = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.settings.max_tokens,
                eos_token_id=end,
                pad_token_id=end,
                **(drawing if self.settings.temperature > 0 else {"do_sample": False}),
            )
        return [
            self._answer(row, written, end)
            for row, written in zip(encoded, outputs[:, width:].tolist(), strict=True)
        ]

    def _check_length(self, width: int) -> None:
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and width + self.settings.max_tokens > positions:
            raise UserError(
                f"max_tokens: {self.settings.max_tokens} after a prompt of {width} tokens are more than "
                f"the {positions} positions of model={self.settings.model}; lower it"
            )

    def _answer(self, prompt_ids: list[int], written: list[int], end: int) -> Answer:
        ended = end in written
        answer_ids = written[: written.index(end)] if ended else written
        text = self.tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
        count = len(answer_ids) + ended  # with the end of text
        return Answer(text, len(prompt_ids), count, cut=not ended)

    def _worded(self, prompt: Prompt) -> str:
        """Word a prompt in the model's own chat form, where it has one."""
        system = self.settings.system
        if self.tokenizer.chat_template is None:
            return prompt.text if system is None else f"{system}\n\n{prompt.text}"
        messages = [
            *([] if system is None else [{"role": "system", "content": system}]),
            {"role": "user", "content": prompt.text},
        ]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
