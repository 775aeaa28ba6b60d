"""The schema notation: a network is a few named vector spaces, and every tensor maps one space to another.

One line describes one module, in the spirit of einops:

    model.layers.*.self_attn.q_proj    (kv group qk) <- residual + bias
    model.layers.*.self_attn.k_proj    (kv qk*) <- residual + bias
    model.layers.*.mlp.fc2             residual <- ffn + bias
    model.layers.*.input_layernorm     norm residual + bias
    transformer.h.*.attn.c_attn        residual -> [(kv group qk) | (kv qk*) | (kv v)] + bias

`*` in a name stands for the layer's number. The arrow points from the space that is read to the space that is
written, and shows the storage order: `out <- in` is stored (out, in), `in -> out` is stored (in, out), as
embeddings and GPT-2's Conv1D are. An axis is a space, a product `(a b)` (row-major, as in einops) or parts
laid end to end `[a | b]`; both nest. `qk*` is the *reading* side of the space `qk`: queries write it, keys
read it, and the attention logit contracts the two. `norm X` is a normalisation's scale over axis X; `final
norm` is the one before the output head, `post norm` one whose output is added to the residual stream, and
`norm+1` stores the scale minus one (Gemma). `+ bias` adds `<name>.bias`, `+ bias[key]` where that config
value is true; `scaled` marks an embedding that the model multiplies by sqrt(hidden) (Gemma), `scaled^-1` a
matrix whose input or output it multiplies by that power of the hidden size (Gemma 3n). `if key` / `unless
key` make a line depend on a config value; `tied to NAME if key` names the tensor that a tied one repeats.

Three spellings serve models that no line above describes. A number is an axis that never grows. `tensor A,
B*` is a tensor under its own whole name, with its axes in storage order and a star on those that are read
(`tensor scalar` has none). `{0..7}` in a name repeats the line for each number, as for experts, and `in
layers 0,2` keeps it to those layers:

    model.layers.*.mlp.experts.{0..7}.w2   residual <- 1408
    model.layers.*.mamba.conv1d.weight     tensor 1536, 1, 4 in layers 0,2

A line prints itself: `str(parse_line(text))` is `text`, but for spaces. In a draft (`model.derive`) a `?`
stands for a number that follows from the checkpoint at hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod


@dataclass(frozen=True)
class Space:
    """One named space; `dual` marks its reading side on an axis that is stored as an output. A number names
    an axis that never grows.
    """

    name: str
    dual: bool = False

    @property
    def fixed(self) -> bool:
        """Check whether it is a number: an axis that never grows."""
        return self.name.isdigit()

    def __str__(self) -> str:
        return self.name + "*" * self.dual


@dataclass(frozen=True)
class Product:
    """Several axes flattened into one, row-major: `(kv group qk)`."""

    parts: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Parts:
    """Several axes laid end to end: `[ffn | ffn]`."""

    parts: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"[{' | '.join(map(str, self.parts))}]"


Axis = Space | Product | Parts
OPEN = Space("?")  # a number that a draft leaves open


def size(axis: Axis, sizes: Mapping[str, int]) -> int:
    """Compute the length of `axis` from the sizes of its spaces."""
    if isinstance(axis, Space):
        return int(axis.name) if axis.fixed else sizes[axis.name]
    lengths = [size(part, sizes) for part in axis.parts]
    return prod(lengths) if isinstance(axis, Product) else sum(lengths)


def spaces(axis: Axis) -> Iterator[Space]:
    """Yield every space named in `axis`, left to right; numbers are none."""
    if isinstance(axis, Space):
        if not axis.fixed:
            yield axis
    else:
        for part in axis.parts:
            yield from spaces(part)


def replaced(axis: Axis, new: Callable[[Space], Axis]) -> Axis:
    """Replace every space and number in `axis`."""
    if isinstance(axis, Space):
        return new(axis)
    parts = tuple(replaced(part, new) for part in axis.parts)
    return type(axis)(parts)


EMBEDDING_SCALE = 0.5  # `scaled` alone: the power of the hidden size by which embeddings are multiplied


@dataclass(frozen=True)
class Line:
    """One module of the schema: its name (`*` = layer number), what it writes and reads, and how it is
    stored.
    """

    name: str
    kind: str  # "linear", "embedding", "norm", "final norm", "post norm" or "tensor"
    out: Axis
    into: Axis | None  # None for norms and whole tensors
    stored: tuple[Axis, ...] = ()  # of a "tensor": every axis in storage order
    transposed: bool = False  # stored (in, out)
    bias: bool = False
    bias_if: str | None = None
    scaled: float = 0.0  # the power of the hidden size by which the model multiplies what comes of it
    offset: float = 0.0  # the stored norm scale is the true one minus this
    condition: str | None = None  # config key; a leading "!" negates
    tied_to: str | None = None
    tied_if: str | None = None
    only: tuple[int, ...] | None = None  # the layers that have it; None for all

    def __str__(self) -> str:
        """Print the line as a schema has it; `parse_line` reads it back."""
        return f"{self.name}  {self.text}"

    @cached_property
    def text(self) -> str:
        """The line without its name: axes, bias, scale, tie, condition, layers."""
        words = [self._axes_in_words]
        if self.bias:
            condition = "" if self.bias_if is None else f"[{self.bias_if}]"
            words.append(f"+ bias{condition}")
        if self.scaled:
            power = "" if self.scaled == EMBEDDING_SCALE else f"^{self.scaled:g}"
            words.append(f"scaled{power}")
        if self.tied_to is not None:
            words.append(f"tied to {self.tied_to} if {self.tied_if}")
        if self.condition is not None:
            key = self.condition.removeprefix("!")
            word = "if" if key == self.condition else "unless"
            words.append(f"{word} {key}")
        if self.only is not None:
            numbers = ",".join(map(str, self.only))
            words.append(f"in layers {numbers}")
        return " ".join(words)

    @property
    def _axes_in_words(self) -> str:
        if self.kind == "tensor":
            axes = ", ".join(map(str, self.stored))
            return f"tensor {axes or 'scalar'}"
        if self.into is None:
            offset = "+1" if self.offset else ""
            return f"{self.kind}{offset} {self.out}"
        if self.transposed:
            return f"{self.into} -> {self.out}"
        return f"{self.out} <- {self.into}"

    @property
    def spaces(self) -> list[Space]:
        """Every space on its axes, in their order."""
        return [space for axis in self.axes for space in spaces(axis)]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of its weight, in storage order."""
        if self.kind == "tensor":
            return self.stored
        if self.into is None:
            return (self.out,)
        if self.transposed:
            return self.into, self.out
        return self.out, self.into

    def layers_of(self, count: int) -> Sequence[int]:
        """Those of `count` layers that have it, in order."""
        return range(count) if self.only is None else sorted(self.only)

    @property
    def names(self) -> list[str]:
        """The line's name with every `{a..b}` written out."""
        names = [self.name]
        while "{" in names[0]:
            parts = [_braced(name) for name in names]
            names = [f"{head}{number}{tail}" for head, numbers, tail in parts for number in numbers]
        return names

    @property
    def layered(self) -> bool:
        """Check whether the module is repeated in every layer."""
        return "*" in self.name


def _braced(name: str) -> tuple[str, range, str]:
    head, _, rest = name.partition("{")
    numbers, _, tail = rest.partition("}")
    first, _, last = numbers.partition("..")
    stop = int(last) + 1
    between = range(int(first), stop)
    return head, between, tail


_TENSOR = re.compile(r"(?P<name>\S+)\s+tensor (?P<axes>.+?)(?:\s+in layers (?P<only>[\d,]+))?")
_LINE = re.compile(
    r"(?P<name>\S+)\s+"
    r"(?:(?P<norm>(?:final |post )?norm)(?P<offset>\+1)?\s+(?P<normed>[^+]+?)|"
    r"(?P<left>[^+]+?)\s*(?P<arrow><-|->)\s*(?P<right>[^+]+?))"
    r"(?P<bias>\s*\+ bias(?:\[(?P<bias_if>\w+)\])?)?(?P<scaled>\s+scaled(?:\^(?P<power>-?[\d.]+))?)?"
    r"(?:\s+tied to (?P<tied_to>\S+) if (?P<tied_if>\S+))?"
    r"(?:\s+(?P<when>if|unless) (?P<key>\S+))?"
    r"(?:\s+in layers (?P<only>[\d,]+))?"
)


def parse_line(text: str) -> Line:
    """Parse one line of a schema.

    Raises:
        ValueError: the line does not follow the notation; the message quotes it.
    """
    if tensor := _TENSOR.fullmatch(text.strip()):
        axes = tensor["axes"]
        words = [] if axes == "scalar" else axes.split(",")
        stored = tuple(map(parse_axis, words))
        only = _numbers(tensor["only"])
        product = Product(stored)
        return Line(tensor["name"], "tensor", product, None, stored, only=only)
    match = _LINE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"not a schema line: {text.strip()!r}; expected 'NAME out <- in', 'NAME in -> out' or 'NAME "
            "norm axis'"
        )
    words = match.groupdict()
    negation = "!" if words["when"] == "unless" else ""
    if words["norm"]:
        out = parse_axis(words["normed"])
        into = None
        kind = words["norm"]
    else:
        left = parse_axis(words["left"])
        right = parse_axis(words["right"])
        writes_left = words["arrow"] == "<-"
        out, into = (left, right) if writes_left else (right, left)
        looks_up = into in (Space("vocab"), Space("pos"))
        kind = "embedding" if looks_up else "linear"
    return Line(
        name=words["name"],
        kind=kind,
        out=out,
        into=into,
        transposed=words["arrow"] == "->",
        bias=bool(words["bias"]),
        bias_if=words["bias_if"],
        scaled=float(words["power"] or EMBEDDING_SCALE) if words["scaled"] else 0.0,
        offset=1.0 if words["offset"] else 0.0,
        condition=None if words["key"] is None else negation + words["key"],
        tied_to=words["tied_to"],
        tied_if=words["tied_if"],
        only=_numbers(words["only"]),
    )


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    return tuple(map(int, text.split(",")))


def parse_axis(text: str) -> Axis:
    """Parse `residual`, `(kv group qk)`, `[(kv qk) | (kv v)]` or any nesting of them."""
    tokens = re.findall(r"[\w.]+\*?|[?()\[\]|]", text)
    if "".join(tokens) != "".join(text.split()):
        raise ValueError(f"not an axis: {text!r}")
    axis, rest = _parse(tokens)
    if rest:
        raise ValueError(f"not an axis: {text!r}; {' '.join(rest)!r} is left over")
    return axis


def _parse(tokens: list[str]) -> tuple[Axis, list[str]]:
    if not tokens or tokens[0] in ")]|":
        raise ValueError(f"an axis is missing before {' '.join(tokens) or 'the end'!r}")
    head, *rest = tokens
    if head not in "([":
        is_dual = head.endswith("*")
        return Space(head.rstrip("*"), is_dual), rest
    close = ")" if head == "(" else "]"
    parts: list[Axis] = []
    while rest and rest[0] != close:
        if parts and head == "[":
            if rest[0] != "|":
                raise ValueError(f"expected '|' between parts, found {rest[0]!r}")
            rest = rest[1:]
        part, rest = _parse(rest)
        parts.append(part)
    if not rest:
        raise ValueError(f"{head!r} is never closed")
    kind = Product if head == "(" else Parts
    return kind(tuple(parts)), rest[1:]


def parse_schema(text: str) -> tuple[Line, ...]:
    """Parse a schema: one line per module, blank lines and `#` comments skipped."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return tuple(parse_line(line) for line in lines if line)
