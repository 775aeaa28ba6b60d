"""A survey of a model class: what it does, measured on its tiny twin on the device and under the attention
and precision of the run.

Nothing here goes by a model's name. Every answer is a measured value, or None with the reason why it was not
measured; an answer from one device or kernel says nothing about another. Logits are compared by their largest
difference relative to the largest logit, of a twin with random weights so large that whatever reaches a logit
moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.base.quiet import quietly
from outgrow.model.derive import scramble
from outgrow.model.documents import documents_apart
from outgrow.model.family import Config
from outgrow.model.twin import Twin, layerless, tiny_twin

# of the text that a twin reads; where the end-of-text token stands and the past ends
ROWS, LENGTH, CUT = 2, 24, 11
WINDOW = 5  # tokens of a sliding window that ends inside of such a text
# of the largest logit, under which two logits are the same up to rounding
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
# in which words classes are told to be causal
CAUSAL: Mapping[str, Any] = {"is_decoder": True, "causal": True, "attn_type": "uni"}
SHARP = 8.0  # the head's weights are so many times larger, so that a cap on the logits shows

T = TypeVar("T")


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A measured value, or None and why it was not measured."""

    value: T | None
    reason: str = ""


@dataclass(frozen=True)
class Survey:
    """The behaviour of one class, under one attention implementation and precision, on one device.

    Attributes:
        device, precision, attention, versions: under which it was measured.
        head: how far head(base(x)) is from the logits. Near 0, the fused loss computes the objective; else
            the class changes its logits after the head, or what the head reads.
        future: how far logits move when later tokens change. Near 0, the class is causal.
        leak: how far logits from an end-of-text token on move when what lies before it changes, with the
            documents of a row kept apart.
        masked_leak: the same where that is no rounding and masks are handed over, also under a small sliding
            window where the class has one, or how far they move a text that is one document, if that is more.
        shift: how far a document's logits move when it stands at the start of its row, masks handed over.
        unreached: parameters that text gives no gradient, without their layers' numbers.
        sometimes: those that one text gives a gradient and another does not, or that only some layers do.
    """

    device: str
    precision: str
    attention: str
    versions: tuple[str, str]  # of torch and transformers
    head: Answer[float]
    future: Answer[float]
    leak: Answer[float]
    masked_leak: Answer[float]
    shift: Answer[float]
    unreached: Answer[tuple[str, ...]]
    sometimes: Answer[tuple[str, ...]]

    def same(self, difference: Answer[float]) -> bool:
        """Check that a difference was measured and is rounding."""
        if difference.value is None:
            return False
        return difference.value <= TOLERANCE[self.precision]


def survey(
    config: Config, *, attention: str, device: torch.device | str = "cpu", precision: str = "fp32"
) -> Survey:
    """The survey of the class of `config`; asked again for a config with the same twin, it is remembered.

    Args:
        attention: a `transformers` attn_implementation that works (`works`).
        precision: "fp32", or "bf16" for float32 weights under autocast.

    Raises:
        UserError: the class does not build or run as a tiny twin.
    """
    return _survey(tiny_twin(config), attention, _device_name(device), precision)


def works(
    config: Config, attention: str, *, device: torch.device | str = "cpu", precision: str = "fp32"
) -> Answer[bool]:
    """Check whether the class of `config` runs forward and backward under an attention implementation; if
    not, why.

    Raises:
        UserError: the class does not build or run as a tiny twin.
    """
    return _works(tiny_twin(config), attention, _device_name(device), precision)


def causal_switch(
    config: Config, *, attention: str, device: torch.device | str = "cpu", precision: str = "fp32"
) -> dict[str, Any]:
    """The key and value under which the class of `config` is causal, as measured: {"is_decoder": True}; empty
    where none that it has helps.

    Raises:
        UserError: the class does not build or run as a tiny twin.
    """
    tiny_config = tiny_twin(config).config
    for key, value in CAUSAL.items():
        if key not in tiny_config or tiny_config[key] == value:
            continue
        switched = {**config, key: value}
        try:
            other = survey(switched, attention=attention, device=device, precision=precision)
        except UserError:  # it does not build so
            continue
        if other.same(other.future):
            return {key: value}
    return {}


def _device_name(device: torch.device | str) -> str:
    """A device's name, the same for every process of a CPU."""
    is_cpu = torch.device(device).type == "cpu"
    return "cpu" if is_cpu else str(device)


@lru_cache(maxsize=64)
def _works(twin: Twin, attention: str, device: str, precision: str) -> Answer[bool]:
    try:
        with _aside(device):
            _backward(_bench(twin, attention, device, precision), seed=0)
    except Exception as fault:  # the library's classes raise every kind
        return Answer(False, in_one_line(fault, 120))
    return Answer(True)


@lru_cache(maxsize=64)
def _survey(twin: Twin, attention: str, device: str, precision: str) -> Survey:
    with _aside(device):
        bench = _bench(twin, attention, device, precision)
        reached = _measured(lambda: _reached(bench))
        leak = _measured(lambda: _leak(bench))
        allowed = TOLERANCE[precision]
        holds = leak.value is not None and leak.value <= allowed
        unreached, sometimes = reached.value or (None, None)
        no_masks: Answer[float] = Answer(None, "positions that restart are enough")
        return Survey(
            device=device if device == "cpu" else torch.cuda.get_device_name(device),
            precision=precision,
            attention=attention,
            versions=(version("torch"), version("transformers")),
            head=_measured(lambda: _head(bench)),
            future=_measured(lambda: _future(bench)),
            leak=leak,
            masked_leak=no_masks if holds else _measured(lambda: _masked_leak(bench)),
            shift=no_masks if holds else _measured(lambda: _shift(bench)),
            unreached=Answer(unreached, reached.reason),
            sometimes=Answer(sometimes, reached.reason),
        )


@contextmanager
def _aside(device: str) -> Iterator[None]:
    """Silence the library, and leave the random numbers of the run as they are."""
    devices = [] if device == "cpu" else [torch.device(device)]
    with quietly(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def _measured(measure: Callable[[], T]) -> Answer[T]:
    try:
        return Answer(measure())
    except Exception as fault:  # the library's classes raise every kind
        is_told = isinstance(fault, UserError)
        message = str(fault) if is_told else in_one_line(fault, 120)
        return Answer(None, message)


class _Bench:
    """A twin on its device, with text to read.

    Attributes:
        end_of_text: a token that is in none of the texts.
    """

    def __init__(self, twin: Twin, attention: str, device: str, precision: str) -> None:
        self.twin, self.attention, self.device, self.precision = (
            twin,
            attention,
            torch.device(device),
            precision,
        )
        self.model: Any = twin.build(device=device, attention=attention)
        scramble(self.model)
        head = self.model.get_output_embeddings()
        self.end_of_text = twin.plain.start
        if head is not None:
            with torch.no_grad():
                head.weight.mul_(SHARP)

    def text(self, seed: int) -> Tensor:
        """(ROWS, LENGTH) tokens."""
        tokens = self.twin.tokens(ROWS, LENGTH, seed)
        return tokens.to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Multiply in the run's precision (mixed precision under autocast)."""
        is_bf16 = self.precision == "bf16"
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=is_bf16)

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """(row, position, vocab) in float32, of inputs of ROWS · LENGTH tokens.

        Raises:
            UserError: it gives no logits for each token, or they are not finite.
        """
        with self.autocast():
            logits = self.model(**inputs, use_cache=False).logits
        count = logits.shape[:-1].numel()
        if count != ROWS * LENGTH:
            raise UserError(
                f"its logits have the shape {tuple(logits.shape)} for {ROWS} rows of {LENGTH} tokens"
            )
        if not logits.isfinite().all():
            raise UserError("its logits are not finite under large random weights")
        return logits.float().reshape(ROWS, LENGTH, -1)

    def steady(self, inputs: Mapping[str, Any]) -> Tensor:
        """`logits`, twice the same.

        Raises:
            UserError: two equal forward passes differ.
        """
        first = self.logits(inputs)
        noise = relative(first, self.logits(inputs))
        if noise > TOLERANCE[self.precision]:
            raise UserError(f"two forward passes on the same text differ by {noise:.2g} of the largest logit")
        return first


@lru_cache(maxsize=4)
def _bench(twin: Twin, attention: str, device: str, precision: str) -> _Bench:
    return _Bench(twin, attention, device, precision)


def relative(value: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest expected value."""
    largest = expected.abs().max()
    difference = (value - expected).abs().max()
    return float(difference / largest)


# ---- the questions -----------------------------------------------------------------------------------------


@torch.no_grad()
def _head(bench: _Bench) -> float:
    """Measure how far the output head over the base model's hidden states is from the logits."""
    base = bench.model.base_model
    head = bench.model.get_output_embeddings()
    if base is bench.model or head is None:
        raise UserError(
            "its class has no base model and output head under the names that the library gives them"
        )
    inputs = {"input_ids": bench.text(0)}
    expected = bench.steady(inputs)
    with bench.autocast():
        hidden = base(**inputs, use_cache=False).last_hidden_state
        width = hidden.shape[-1]
        read = head.weight.shape[-1]
        if width != read:
            raise UserError(f"its head reads {read} entries, and its base model gives {width}")
        logits = head(hidden)
    return relative(logits.float(), expected)


def _spliced(first: Tensor, second: Tensor) -> Tensor:
    """(ROWS, LENGTH) tokens: of one text up to CUT, of another from there on."""
    past = first[:, :CUT]
    rest = second[:, CUT:]
    return torch.cat((past, rest), 1)


def _future(bench: _Bench) -> float:
    """Measure how far the logits before CUT move with the tokens from there on."""
    text = bench.text(0)
    changed = _spliced(text, bench.text(1))
    before = bench.steady({"input_ids": text})
    after = bench.logits({"input_ids": changed})
    expected = before[:, :CUT]
    return relative(after[:, :CUT], expected)


def _masked_leak(bench: _Bench) -> float:
    """`_leak` with masks handed over, or how far these move a text of one document, whichever is more.

    Raises:
        UserError: flash-attn takes no masks.
    """
    if bench.attention == "flash_attention_2":
        raise UserError("flash-attn takes no masks")
    benches = [bench]
    config = bench.twin.config
    if any(_is_window(key, value) for key, value in config.items()):
        windowed = tiny_twin(_small_window(config))
        device = str(bench.device)
        other = _Bench(windowed, bench.attention, device, bench.precision)
        benches.append(other)
    differences = []
    for one in benches:
        differences += [_leak(one, masked=True), _moved_by_masks(one)]
    return max(differences)


def _is_window(key: str, value: object) -> bool:
    """Check whether a config's value is the width of a sliding window, in tokens."""
    return key.endswith("sliding_window") and type(value) is int


def _small_window(config: Config) -> dict[str, Any]:
    """A config whose sliding windows end inside of a text."""
    return {key: WINDOW if _is_window(key, value) else value for key, value in config.items()}


def _moved_by_masks(bench: _Bench) -> float:
    text = bench.text(0)
    config = bench.model.config
    masked = documents_apart(text, bench.end_of_text, bench.attention, config)
    after = bench.logits(masked)
    return relative(after, bench.steady({"input_ids": text}))


def _shift(bench: _Bench) -> float:
    """Measure how far a document's logits move when it stands at its row's start, masks handed over."""
    text = bench.text(0)
    text[:, [0, CUT]] = bench.end_of_text
    first = text[:, :CUT]
    second = text[:, CUT:]
    turned = torch.cat((second, first), 1)
    rows = (
        documents_apart(one, bench.end_of_text, bench.attention, bench.model.config) for one in (text, turned)
    )
    late, early = map(bench.steady, rows)
    return relative(late[:, CUT:], early[:, : LENGTH - CUT])


def _leak(bench: _Bench, *, masked: bool = False) -> float:
    """Measure how far the logits after an end-of-text token move with the tokens before it, documents kept
    apart.
    """
    text = bench.text(0)
    text[:, CUT] = bench.end_of_text
    changed = _spliced(bench.text(1), text)
    masks = bench.model.config if masked else None
    inputs = documents_apart(text, bench.end_of_text, bench.attention, masks)
    changed_inputs = documents_apart(changed, bench.end_of_text, bench.attention, masks)
    after = bench.logits(changed_inputs)
    before = bench.steady(inputs)
    expected = before[:, CUT:]
    return relative(after[:, CUT:], expected)


def _reached(bench: _Bench) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parameters that get no gradient from any of two texts, in any layer; and those that get one only
    here or there.
    """
    first = set(_backward(bench, 0))
    second = set(_backward(bench, 1))
    always = first & second
    ever = first | second
    parameters = bench.model.named_parameters()
    names = [name for name, _ in parameters]
    reached = {layerless(name) for name in ever}
    missing = {layerless(name) for name in names} - reached
    not_always = {layerless(name) for name in names if name not in always}
    partly = not_always - missing
    return tuple(sorted(missing)), tuple(sorted(partly))


def _backward(bench: _Bench, seed: int) -> list[str]:
    """The parameters to which the loss on a text gives a gradient."""
    text = bench.text(seed)
    with bench.autocast():
        logits = bench.model(input_ids=text, use_cache=False).logits
    logits_before = logits[:, :-1]
    predicted = logits_before.float().flatten(0, 1)
    following = text[:, 1:].flatten()
    functional.cross_entropy(predicted, following).backward()
    parameters = bench.model.named_parameters()
    names = [name for name, parameter in parameters if parameter.grad is not None]
    bench.model.zero_grad(set_to_none=True)
    return names
