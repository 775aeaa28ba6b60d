"""A language model writes: against a stub of an OpenAI-compatible server on 127.0.0.1, and a tiny local
model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.corpus import prepare
from outgrow.train.corpus.writing.prompts import Prompts
from outgrow.train.corpus.writing.run import write
from outgrow.train.corpus.writing.settings import CONF, WriteSettings, settings_from
from outgrow.train.data import __main__ as door
from outgrow.train.data.settings import DataSettings

LEAVES = sorted(path.stem for path in (CONF / "prompts").glob("*.yaml"))
# (requests so far, question) → status, headers, body
Reply = Callable[[int, dict[str, Any]], tuple[int, dict[str, str], bytes]]


def completion(text: str = "A text.", finish: str = "stop", **usage: int) -> bytes:
    counts = usage or {"prompt_tokens": 10, "completion_tokens": 5}
    return json.dumps(
        {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": counts}
    ).encode()


def told(number: int, question: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """Always an answer, made from the question."""
    return 200, {}, completion(f"About: {question['messages'][-1]['content']}")


class Stub:
    """A server whose replies a test decides."""

    def __init__(self) -> None:
        self.reply: Reply = told
        self.pause = 0.0  # seconds after each byte of a body
        self.questions: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.questions.append(question)
                    stub.keys.append(self.headers.get("Authorization"))
                    number = len(stub.questions)
                status, headers, body = stub.reply(number, question)
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(body)),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                if not stub.pause:
                    self.wfile.write(body)
                    return
                with suppress(OSError):  # the client has gone
                    for i in range(len(body)):
                        self.wfile.write(body[i : i + 1])
                        time.sleep(stub.pause)

            def log_message(self, *arguments: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def stub() -> Iterator[Stub]:
    found = Stub()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join(5)


@pytest.fixture
def settings(stub: Stub, tmp_path: Path) -> WriteSettings:
    given = [f"out={tmp_path / 'made.jsonl'}", f"server={stub.url}", "model=stub", "number=12", "at_once=3"]
    return settings_from(
        [
            *given,
            "progress=false",
            "dollars_per_million_prompt_tokens=100",
            "dollars_per_million_completion_tokens=1000",
        ]
    )


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits half a second and more before it asks again."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def lines(settings: WriteSettings, kind: str = "") -> list[dict[str, Any]]:
    path = Path(settings.out).with_suffix(f"{kind}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_has_each_of_its_prompts_once(leaf: str) -> None:
    settings = settings_from([f"prompts={leaf}", "model=x"])
    prompts = Prompts(settings.prompts, 0)
    assert settings.prompts.name == leaf
    assert len({prompts[i].text for i in range(len(prompts))}) == len(prompts) > 1000
    assert not any("{" in prompts[i].text for i in range(50))
    assert [prompts[i] for i in range(20)] != [Prompts(settings.prompts, 1)[i] for i in range(20)]


def test_topics_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_text("owls\n\n  variables and assignment\nowls\n")
    settings = settings_from([f"prompts.topics_file={tmp_path / 'topics.txt'}", "model=x"])
    with_file, without = (
        Prompts(s, 0) for s in (settings.prompts, dataclasses.replace(settings.prompts, topics_file=None))
    )
    assert (*without.topics, "owls") == with_file.topics


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("prompts=textbook", "prompts=textbook: unknown prompts; did you mean 'textbooks'"),
        ("nummer=3", "nummer: unknown key; did you mean 'number'"),
        ("number=0", "number: must be positive"),
        (
            "number=100000",
            "there are 4900 prompts of topic × audience × template, 100000 are asked for; give more topics",
        ),
        ("server=127.0.0.1:8000", "server: expected a URL such as http://127.0.0.1:8000/v1"),
        ("out=made.txt", "out: expected a file name that ends in .jsonl"),
        ("top_p=0", "top_p: must be above 0"),
        ("most_dollars=5", "most_dollars: positive, and with prices"),
        ("dollars_per_million_prompt_tokens=-1", "must not be negative; found -1"),
        ("temperature=-1", "temperature: must not be negative"),
        ("prompts.templates=['about {topic}']", "no {audience} in 'about {topic}'"),
        ("prompts.topics=[]", "prompts.topics: none"),
        ("prompts.topics=[a,a]", "prompts.topics: twice 'a'"),
        ("prompts.topics_file=nowhere", "prompts.topics_file=nowhere: cannot be read"),
    ],
)
def test_faults_are_told_before_anything_is_asked(override: str, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        settings_from(["model=x", override])
    assert fault in str(caught.value)


# ---- a server ----------------------------------------------------------------------------------------------


def test_every_prompt_is_asked_once_and_counted(
    stub: Stub, settings: WriteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    said = write(dataclasses.replace(settings, system="Be exact."))
    prompts = Prompts(settings.prompts, 0)
    entries = lines(settings)
    assert [entry["number"] for entry in entries] == list(range(12))  # in order, whatever came first
    assert [entry["text"] for entry in entries] == [f"About: {prompts[i].text}" for i in range(12)]
    assert {entry["topic"] for entry in entries} == {prompts[i].topic for i in range(12)}
    assert entries[0]["dollars"] == pytest.approx((10 * 100 + 5 * 1000) / 1e6)
    assert "12 documents of 12" in said
    assert "120 of prompts, 60 written" in said
    assert "cost: $0.0720" in said
    question = stub.questions[0]
    assert (question["model"], question["max_tokens"], question["temperature"], question["messages"][0]) == (
        "stub",
        settings.max_tokens,
        1.0,
        {"role": "system", "content": "Be exact."},
    )
    assert len({question["seed"] for question in stub.questions}) == 12
    assert set(stub.keys) == {"Bearer a key"}
    assert not any("a key" in path.read_text() for path in Path(settings.out).parent.iterdir())


def test_what_may_pass_is_tried_again(stub: Stub, settings: WriteSettings) -> None:
    bad: list[tuple[int, dict[str, str], bytes]] = [
        (429, {"Retry-After": "0.05"}, b"slow down"),
        (503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, b""),
        (500, {}, b"<html>"),
        (200, {"Content-Length": "5000"}, completion()),  # the connection breaks before the end
        (200, {"Content-Encoding": "gzip"}, b"not compressed"),
    ]
    stub.reply = lambda number, question: bad[number - 1] if number <= len(bad) else told(number, question)
    write(settings)
    assert len(lines(settings)) == 12
    assert len(stub.questions) == 12 + len(bad)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((503, {}, b"overloaded"), "503: overloaded"),
        ((429, {}, b"slow down"), "429: slow down"),
        ((200, {}, completion()[:-30]), "no chat completion"),  # half of an answer
        ((200, {}, b'{"choices": []}'), "no chat completion"),
        ((200, {}, b"[1]"), "no chat completion"),
        ((200, {"Content-Type": "text/html"}, b"<html>"), "no chat completion"),
        ((200, {"Content-Length": "5000"}, b"{"), "closed"),
        ((200, {}, b"x" * (2**24 + 1)), "the response has more than 16,777,216 bytes"),
    ],
)
def test_a_prompt_that_always_fails_is_put_aside_and_the_rest_goes_on(
    stub: Stub, settings: WriteSettings, reply: Any, reason: str
) -> None:
    bad = Prompts(settings.prompts, 0)[4].text
    stub.reply = lambda number, question: (
        reply if question["messages"][-1]["content"] == bad else told(number, question)
    )
    said = write(dataclasses.replace(settings, attempts=2))
    assert "11 documents of 12" in said
    assert reason in said.split("put aside, ")[1]
    assert ": 1; the same command asks again" in said
    assert [entry["number"] for entry in lines(settings)] != list(range(12))
    assert not lines(settings, ".rejected")
    stub.reply, before = told, len(stub.questions)
    assert "12 documents of 12" in write(settings)
    assert len(stub.questions) == before + 1
    assert [entry["number"] for entry in lines(settings)] == list(range(12))


@pytest.mark.slow
def test_an_answer_that_drips_is_given_up(stub: Stub, settings: WriteSettings) -> None:
    """Each read is quick, the whole is not."""
    stub.pause = 0.02  # after each byte
    with pytest.raises(
        UserError,
        match=r"(?s)no prompt was answered, after 2 attempts.*put aside, no whole answer after 0\.3 s: 1;",
    ):
        write(dataclasses.replace(settings, number=1, attempts=2, timeout_seconds=0.3))


@pytest.mark.slow
def test_a_rate_limit_is_waited_for(stub: Stub, settings: WriteSettings) -> None:
    stub.reply = lambda number, question: (
        (429, {"Retry-After": "0.4"}, b"") if number == 1 else told(number, question)
    )
    start = time.monotonic()
    write(dataclasses.replace(settings, number=1))
    assert 0.4 <= time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "401, the key was refused; put it into the variable OPENAI_API_KEY"),
        (403, "403"),
        (404, "404, there is no such model or address"),
    ],
)
def test_what_cannot_pass_ends_at_once(stub: Stub, settings: WriteSettings, status: int, words: str) -> None:
    stub.reply = lambda number, question: (status, {}, b"no")
    with pytest.raises(UserError, match=words):
        write(settings)
    assert len(stub.questions) <= settings.at_once


@pytest.mark.slow
def test_a_server_that_stays_away_ends_it_and_what_is_written_is_kept(
    stub: Stub, settings: WriteSettings
) -> None:
    stub.reply = lambda number, question: told(number, question) if number <= 5 else (503, {}, b"overloaded")
    assert "put aside, 503: overloaded: 7; the same command asks again" in write(settings)
    first = lines(settings)
    assert len(first) == 5
    stub.reply, before = told, len(stub.questions)
    assert "12 documents of 12" in write(settings)
    assert len(stub.questions) - before == 7  # nothing is asked twice
    assert [entry for entry in lines(settings) if entry in first] == sorted(
        first, key=lambda entry: entry["number"]
    )
    again = len(stub.questions)
    assert "12 documents of 12" in write(settings)
    assert len(stub.questions) == again
    stub.server.server_close()  # and nobody at all
    with pytest.raises(UserError, match="no prompt was answered, after 6 attempts at each"):
        write(dataclasses.replace(settings, number=13))


def test_answers_that_are_no_documents_are_set_apart_and_not_asked_again(
    stub: Stub, settings: WriteSettings
) -> None:
    odd = {2: (200, {}, completion("Half a", "length")), 3: (200, {}, completion("  ")), 4: (400, {}, b"too long a prompt"),
           5: (200, {}, b'{"choices": [{"message": {"content": null}}]}')}  # fmt: skip
    stub.reply = lambda number, question: odd.get(number) or told(number, question)
    said = write(settings)
    assert len(lines(settings)) == 8
    faults = Counter(entry["fault"] for entry in lines(settings, ".rejected"))
    assert faults == {"cut off at max_tokens": 1, "empty": 2, "400: too long a prompt": 1}
    assert "8 documents of 12" in said
    assert "rejected, empty: 2" in said
    assert "2 answers came without counts" in said
    before = len(stub.questions)
    assert write(settings) == said
    assert len(stub.questions) == before


def test_settings_with_which_nothing_comes_end_early(stub: Stub, settings: WriteSettings) -> None:
    stub.reply = lambda number, question: (400, {}, b"unknown field")
    with pytest.raises(
        UserError,
        match=(
            r"20 prompts in a row gave no document, the last: 400: unknown field; see "
            r".*made\.rejected\.jsonl"
        ),
    ):
        write(dataclasses.replace(settings, number=200))
    assert len(stub.questions) < 30


def test_money_runs_out(stub: Stub, settings: WriteSettings) -> None:
    """An answer costs $0.006; those in flight are still taken."""
    said = write(dataclasses.replace(settings, most_dollars=0.03))
    assert 5 <= len(lines(settings)) <= 5 + settings.at_once
    assert "stopped at most_dollars=0.03" in said
    assert "12 documents of 12" in write(dataclasses.replace(settings, most_dollars=1.0))


def test_a_server_that_does_not_count_is_refused_where_money_is_bounded(
    stub: Stub, settings: WriteSettings
) -> None:
    body = json.loads(completion())
    del body["usage"]
    stub.reply = lambda number, question: (200, {}, json.dumps(body).encode())
    with pytest.raises(
        UserError,
        match=r"most_dollars=5: server=.* does not tell how many tokens it used.*\n.*documents of 12",
    ):
        write(dataclasses.replace(settings, most_dollars=5.0))
    assert 1 <= len(lines(settings)) <= settings.at_once + 1  # what was answered is kept
    assert "12 documents of 12" in write(settings)


# ---- the files ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_line_that_a_kill_cut_off_is_written_again(stub: Stub, settings: WriteSettings) -> None:
    write(dataclasses.replace(settings, number=6))
    path = Path(settings.out)
    whole = path.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1]) + 1):
        path.write_bytes(whole[:-cut])
        before = len(stub.questions)
        write(dataclasses.replace(settings, number=6))
        assert path.read_bytes() == whole
        assert len(stub.questions) == before + 1


@pytest.mark.slow
def test_killed_at_any_moment_every_prompt_is_written_once(stub: Stub, tmp_path: Path) -> None:
    """Kill −9 while answers come in, three times; in the end the file is the one of an undisturbed run."""

    def slowly(number: int, question: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        time.sleep(0.02)
        return told(number, question)

    given = [f"server={stub.url}", "model=stub", "number=60", "at_once=4", "progress=false"]
    write(settings_from([f"out={tmp_path / 'whole.jsonl'}", *given]))
    stub.reply, root = slowly, Path(__file__).resolve().parents[2]
    killed = 0
    for wanted in (5, 21, 40):
        before = len(stub.questions)
        process = subprocess.Popen(
            [sys.executable, "-m", "outgrow.train.data", "write", f"out={tmp_path / 'cut.jsonl'}", *given],
            cwd=root,
        )
        deadline = time.monotonic() + 600
        while (
            len(stub.questions) - before < wanted - killed
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        process.kill()
        process.wait()
        killed = len((tmp_path / "cut.jsonl").read_bytes().splitlines())
        assert 0 < killed < 60
    stub.reply = told
    write(settings_from([f"out={tmp_path / 'cut.jsonl'}", *given]))
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(stub.questions) <= 120 + 3 * 4  # what was in flight is asked again, and nothing else


def test_files_that_do_not_fit_are_refused(stub: Stub, settings: WriteSettings) -> None:
    write(dataclasses.replace(settings, number=3))
    path = Path(settings.out)
    others = dataclasses.replace(settings.prompts, audiences=("you",))
    for changed, named in (
        ({"temperature": 0.5}, "temperature"),
        ({"model": "other"}, "model"),
        ({"prompts": others}, "prompts.audiences"),
        ({"prompts": others, "model": "other"}, "model, prompts.audiences"),
    ):
        with pytest.raises(UserError, match=f"it was begun with another {named}; choose another out"):
            write(dataclasses.replace(settings, **changed))  # type: ignore[arg-type]
    # these change nothing
    assert "5 documents" in write(dataclasses.replace(settings, number=5, at_once=1, timeout_seconds=9.0))
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b'{"text": 1}\n' + b"".join(rest))
    with pytest.raises(
        UserError, match=r"made.jsonl:1: damaged \(an entry of a ledger has number, dollars and tokens\)"
    ):
        write(settings)
    path.write_bytes(first + b"".join(rest))
    for damaged in ("[]", "{", '{"prompts": 1}'):
        path.with_suffix(".settings.json").write_text(damaged)
        with pytest.raises(UserError, match=r"begun with another|move made.jsonl and this file away"):
            write(settings)
    path.with_suffix(".settings.json").unlink()
    with pytest.raises(UserError, match=r"no made.settings.json says what was asked for it"):
        write(settings)


def test_two_writers_of_one_file_are_one_too_many(stub: Stub, settings: WriteSettings) -> None:
    from outgrow.train.corpus.writing.ledger import open_ledger

    with open_ledger(settings), pytest.raises(UserError, match="another process is writing it right now"):
        write(settings)


@pytest.mark.slow
def test_what_is_written_is_a_source(
    stub: Stub, settings: WriteSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        f"out={settings.out}",
        f"server={stub.url}",
        "model=stub",
        "number=30",
        "progress=true",
        "system=null",
    ]
    door.main(["write", *more])
    assert "30 documents of 30" in capsys.readouterr().out
    data = DataSettings(
        "made", "files", str(tmp_path / "tokens"), path=settings.out, vocab_size=300, validation_fraction=0.3
    )
    assert prepare(data, progress=False).train.documents < 30


# ---- a model on this machine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, checkpoint_maker: Callable[..., Path]) -> Path:
    """A tiny Phi with large random weights, so that padding would show, and a tokenizer of its own."""
    from outgrow.model.presets import preset
    from outgrow.train.data.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(
        ["Write a section about owls for everybody. " * 20], vocab_size=300, model_max_length=512
    )
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = preset("tiny_source") | sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    checkpoint_maker(folder, config, "float32")
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.slow
def test_a_local_model_writes_the_same_again(model: Path, settings: WriteSettings, tmp_path: Path) -> None:
    given = dataclasses.replace(settings, server=None, model=str(model), number=5, max_tokens=8)
    write(given)
    entries = lines(given) + lines(given, ".rejected")
    assert len(entries) == 5
    assert all(entry["prompt_tokens"] > 10 and 1 <= entry["completion_tokens"] <= 8 for entry in entries)
    other = dataclasses.replace(given, out=str(tmp_path / "other.jsonl"))
    write(other)
    assert lines(other) + lines(other, ".rejected") == entries
    with pytest.raises(
        UserError, match=r"max_tokens: 500 after a prompt of \d+ tokens are more than the 512 positions"
    ):
        write(dataclasses.replace(given, out=str(tmp_path / "long.jsonl"), max_tokens=500))
    with pytest.raises(UserError, match="nowhere: cannot be loaded"):
        write(dataclasses.replace(given, out=str(tmp_path / "third.jsonl"), model=str(model / "nowhere")))


def test_a_pickle_is_not_loaded(model: Path, settings: WriteSettings, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(model, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        write(dataclasses.replace(settings, server=None, model=str(folder)))


def test_a_local_model_answers_as_transformers_does(model: Path, settings: WriteSettings) -> None:
    """Greedy, so that a batch with padding has to give what a prompt alone gives."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from outgrow.train.corpus.writing.local import Local

    given = dataclasses.replace(settings, server=None, model=str(model), max_tokens=6, temperature=0.0)
    prompts = [Prompts(settings.prompts, 0)[i] for i in range(4)]
    tokenizer, reference = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    for prompt, answer in zip(prompts, Local(given).answers(prompts), strict=True):
        ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
        found = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert answer.text == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert (answer.prompt_tokens, answer.cut) == (ids.shape[1], 0 not in found[0, ids.shape[1] :])
