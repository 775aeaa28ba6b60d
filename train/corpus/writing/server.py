"""Answers from a server that speaks OpenAI's chat completions (vLLM, llama.cpp, TGI, Ollama, or a paid one),
by OpenAI's own client.

The client waits and asks again where a fault may pass: rate limits, broken connections, a server that starts
again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import httpx2
from openai import APIConnectionError, APIStatusError, DefaultHttpxClient, OpenAI, OpenAIError

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.train.corpus.writing.answer import Answer
from outgrow.train.corpus.writing.prompts import Prompt
from outgrow.train.corpus.writing.settings import WriteSettings

LARGEST = 2**24  # bytes of one response
PASSING = (408, 409, 425, 429)  # statuses of faults that may pass, beside those of 500 and more
FATAL = {401: "the key was refused; put it into the variable {key}",
         403: "the key may not use this model; put another into {key}",
         404: (
             "there is no such model or address; check model={model} and server={server} (it often ends in "
             "/v1)"
         )}  # fmt: skip


class Bounded(httpx2.SyncByteStream):
    """The body of a response, given up after `seconds` or LARGEST bytes: the client's own timeout is of each
    read."""

    def __init__(self, body: Any, seconds: float) -> None:
        self.body = body
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.body:
            size += len(part)
            if time.monotonic() > self.end:
                raise httpx2.ReadTimeout(f"no whole answer after {self.seconds:g} s")
            if size > LARGEST:
                raise httpx2.ReadTimeout(f"the response has more than {LARGEST:,} bytes")
            yield part

    def close(self) -> None:
        self.body.close()


class Server:
    """A client for many threads."""

    def __init__(self, settings: WriteSettings) -> None:
        self.settings = settings
        self.client = OpenAI(
            base_url=settings.server,
            api_key=os.environ.get(settings.key_variable) or "none",  # servers of one's own ask for none
            timeout=settings.timeout_seconds,
            max_retries=settings.attempts - 1,
            http_client=DefaultHttpxClient(
                event_hooks={"response": [self._bound]}, timeout=settings.timeout_seconds
            ),
        )

    def close(self) -> None:
        self.client.close()

    def _bound(self, response: httpx2.Response) -> None:
        response.stream = Bounded(response.stream, self.settings.timeout_seconds)

    def answer(self, prompt: Prompt) -> Answer:
        """The model's answer; one that is put aside where every attempt failed.

        Raises:
            UserError: the key, model or address is wrong.
        """
        try:
            question = self._question(prompt)
            return _read(self.client.chat.completions.create(**question))
        except APIStatusError as error:
            status = error.status_code
            said = _said(error.response.text)
            if status in FATAL:
                way_out = FATAL[status].format(
                    key=self.settings.key_variable, model=self.settings.model, server=self.settings.server
                )
                server = self.settings.server
                raise UserError(f"server={server}: {status}, {way_out}: {said}") from error
            if status in PASSING or status >= 500:
                return Answer.put_aside(f"{status}: {said}")
            return Answer("", None, None, refused=f"{status}: {said}")
        except APIConnectionError as error:
            return Answer.put_aside(str(error.__cause__ or error))
        except (OpenAIError, httpx2.HTTPError, ValueError) as error:  # a whole response that is no answer
            reason = in_one_line(error)
            return Answer.put_aside(f"no chat completion ({reason})")

    def _question(self, prompt: Prompt) -> dict[str, Any]:
        settings = self.settings
        system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
        return {
            "model": settings.model,
            "messages": [*system, {"role": "user", "content": prompt.text}],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": settings.seed + prompt.number,
        }


def _read(completion: Any) -> Answer:
    """An answer from what the client read, which does not check it against its own types."""
    try:
        choice = completion.choices[0]
        usage = getattr(completion, "usage", None)
        text = choice.message.content or ""
        counts = (_count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))
        return Answer(text.strip(), *counts, cut=choice.finish_reason == "length")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        return Answer.put_aside(f"no chat completion ({in_one_line(error)}): {_said(str(completion))}")


def _count(usage: Any, key: str) -> int | None:
    value = getattr(usage, key, None)
    return value if isinstance(value, int) and value >= 0 else None


def _said(text: str) -> str:
    """The beginning of a response, in one line."""
    return " ".join(text[:200].split()) or "nothing"
