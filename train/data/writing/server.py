"""Answers from a server that speaks OpenAI's chat completions: vLLM, llama.cpp, TGI, Ollama, or a paid one."""

from __future__ import annotations

import json
import os
import random
import time
from threading import Event
from typing import Any

import httpx

from outgrow.model.base.errors import UserError
from outgrow.train.data.writing.answer import Answer
from outgrow.train.data.writing.prompts import Prompt
from outgrow.train.data.writing.settings import WriteSettings

LARGEST = 2**24  # bytes of one response
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
FATAL = {401: "the key was refused; put it into the variable {key}", 403: "the key may not use this model; put another into {key}",
         404: "there is no such model or address; check model={model} and server={server} (it often ends in /v1)"}  # fmt: skip


class Transient(Exception):
    """Worth another attempt; `wait` is how many seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Server:
    """A client for many threads; `close` makes those that wait give up."""

    def __init__(self, settings: WriteSettings) -> None:
        assert settings.server is not None
        key = os.environ.get(settings.key_variable)
        self.settings, self.stopped = settings, Event()
        self.client = httpx.Client(
            timeout=settings.timeout_seconds,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=settings.at_once),
        )

    def close(self) -> None:
        self.stopped.set()
        self.client.close()

    def answer(self, prompt: Prompt) -> Answer:
        """The model's answer; what may pass is tried again, each time after a longer wait.

        Raises:
            UserError: the key, model or address is wrong, or every attempt failed.
        """
        reason = ""
        for attempt in range(self.settings.attempts):
            try:
                return self._attempt(prompt)
            except (httpx.RequestError, Transient) as error:
                reason = str(error) or type(error).__name__
                asked = error.wait if isinstance(error, Transient) else None
            wait = self.settings.wait_seconds * 2**attempt * random.uniform(0.75, 1.25)  # so that threads come back one by one
            if attempt + 1 < self.settings.attempts and self.stopped.wait(min(max(wait, asked or 0), LONGEST_WAIT)):
                break
        raise UserError(
            f"server={self.settings.server}: {self.settings.attempts} attempts failed, the last with: {reason}; what is written is kept, "
            "and the same command goes on when the server answers again"
        )

    def _attempt(self, prompt: Prompt) -> Answer:
        url = f"{(self.settings.server or '').rstrip('/')}/chat/completions"
        end = time.monotonic() + self.settings.timeout_seconds  # of all of it: the client's own is of each read
        with self.client.stream("POST", url, json=self._question(prompt)) as response:
            body = b""
            for part in response.iter_bytes():
                body += part
                if time.monotonic() > end:
                    raise Transient(f"no whole answer after {self.settings.timeout_seconds:g} s")
                if len(body) > LARGEST:
                    return Answer("", None, None, refused="the response is too large")
        status = response.status_code
        if status in FATAL:
            way_out = FATAL[status].format(key=self.settings.key_variable, model=self.settings.model, server=self.settings.server)
            raise UserError(f"server={self.settings.server}: {status}, {way_out}: {_said(body)}")
        if status in (408, 409, 425, 429) or status >= 500:
            raise Transient(f"{status}: {_said(body)}", _seconds(response.headers.get("retry-after")))
        if status != 200:
            return Answer("", None, None, refused=f"{status}: {_said(body)}")
        return _read(body)

    def _question(self, prompt: Prompt) -> dict[str, Any]:
        wanted = self.settings
        system = [] if wanted.system is None else [{"role": "system", "content": wanted.system}]
        return {
            "model": wanted.model,
            "messages": [*system, {"role": "user", "content": prompt.text}],
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "max_tokens": wanted.max_tokens,
            "seed": wanted.seed + prompt.number,
        }


def _read(body: bytes) -> Answer:
    """Raises Transient for what is no answer: it may have been cut off on the way."""
    try:
        found = json.loads(body)
        choice, usage = found["choices"][0], found.get("usage") or {}
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError(f"content is a {type(text).__name__}")
        counts = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        return Answer(text.strip(), *counts, cut=choice.get("finish_reason") == "length")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Transient(f"no chat completion ({type(error).__name__}: {error}): {_said(body)}") from error


def _count(usage: dict[str, Any], key: str) -> int | None:
    value = usage.get(key)
    return value if isinstance(value, int) and value >= 0 else None


def _said(body: bytes) -> str:
    """The beginning of a response, in one line."""
    return " ".join(body[:200].decode(errors="replace").split()) or "nothing"


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else max(0.0, float(value))
    except ValueError:  # a date: the usual wait will do
        return None
