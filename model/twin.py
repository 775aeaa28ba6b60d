"""A tiny twin of a model class: the same `transformers` class and switches, every size small, built and run
in a moment.

Questions about a class (does its mask hold, which parameters are matrices, what are its FLOPs) are asked of
its twin, on the device and under the attention implementation that the answer is wanted for.

twin = tiny_twin(config)
twin.build(device="cuda", attention="sdpa")(**twin.inputs(tokens)).logits
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.base.quiet import quietly
from outgrow.model.build import library_class, to_hf_config
from outgrow.model.derive import (
    LENGTH,
    ROWS,
    Unfit,
    check_size,
    library_knows,
    place_tokens,
    tiny_configs,
    whole_config,
)
from outgrow.model.derive import build as build_on
from outgrow.model.family import Config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)  # one object for equal ones, so that answers are cached by it
class Twin:
    """The config of a tiny twin, flat and whole.

    Attributes:
        config: sizes of tens, the switches of the config that it is a twin of.
        vocabulary: the token ids below it are plain text.
        own: the config itself is so small that it is its own twin.
    """

    config: dict[str, Any]
    vocabulary: int
    own: bool = False

    @property
    def plain(self) -> range:
        """Token ids away from both ends of the vocabulary, where classes have padding and other tokens that
        they treat in another way.
        """
        margin = self.vocabulary // 8
        return range(margin, self.vocabulary - margin)

    def tokens(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Random text, (rows, length), without the first of the `plain` ids, which may stand for the end of a
        text.
        """
        import torch

        drawn = torch.Generator().manual_seed(seed)
        first = self.plain.start + 1
        stop = self.plain.stop
        return torch.randint(first, stop, (rows, length), generator=drawn)

    def build(self, *, device: torch.device | str = "cpu", attention: str | None = None) -> PreTrainedModel:
        """The twin in float32 under `attention` (None: the library's choice), random, in eval mode; the
        global RNG stays as it was.

        Raises:
            Exception: of any kind, as the library's classes raise them.
        """
        import torch

        hf_config = to_hf_config(self.config)
        with torch.random.fork_rng(devices=[]), quietly():
            torch.manual_seed(0)
            how: dict[str, Any] = {
                "dtype": torch.float32,
                "attn_implementation": attention,
                "trust_remote_code": False,
            }
            model = library_class(hf_config).from_config(hf_config, **how)
            return model.eval().to(device)


LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


_TWINS: dict[str, Twin] = {}


def tiny_twin(config: Config) -> Twin:
    """The twin of a config of any model type that the library itself defines; the same object for all configs
    that share it.

    Raises:
        UserError: its class does not build or run as a tiny twin; the message says why.
    """
    if (key := _key(config)) not in _TWINS:
        twin = _search(config)
        own_key = _key(twin.config)
        _TWINS[key] = _TWINS.setdefault(own_key, twin)
    return _TWINS[key]


def _key(config: Config) -> str:
    return json.dumps(config, sort_keys=True, default=repr)


def _search(config: Config) -> Twin:
    """The first config of a tiny twin that builds and runs; else the config itself, where that is small."""
    if not library_knows(config):
        raise UserError(f"transformers has no causal language model of type {config.get('model_type')!r}")
    faults = []
    try:
        for candidate in tiny_configs(config):
            try:
                return _checked(candidate, own=False)
            except Unfit as fault:
                faults.append(fault)
    except Unfit as fault:  # some size that a twin needs has an unknown name
        faults.append(fault)
    try:
        return _checked(whole_config(config), own=True)
    except Unfit:
        raise faults[0] from None


def _checked(config: Config, *, own: bool) -> Twin:
    """A twin whose class builds, is small (as its shapes on the meta device tell) and runs on text."""
    complete = whole_config(config)
    with quietly():
        blank = build_on(complete)
    check_size(blank)
    blank_config: Any = blank.config
    vocabulary = blank_config.get_text_config().vocab_size
    plain = vocabulary - len(place_tokens(complete))
    twin = Twin(complete, plain, own)
    try:
        with quietly():
            _run(twin)
    except Exception as fault:  # the library's classes raise every kind
        raise Unfit(f"a tiny twin of it does not run on token ids alone ({in_one_line(fault)})") from None
    return twin


def _run(twin: Twin) -> None:
    import torch

    model: Any = twin.build()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(input_ids=twin.tokens(ROWS, LENGTH), use_cache=False)


def layerless(name: str) -> str:
    """A parameter's name without its layer's number, under which the twin's few layers stand for all:
    `model.layers.*.mlp.fc1.weight`.
    """
    return LAYER.sub("*", name)
