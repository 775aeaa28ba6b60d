"""The end of a run, rehearsed before its beginning: a tiny twin of the network is exported, loaded again and
evaluated.

Whatever would fail when everything is trained fails before the first step: a generation config that the
library does not save, a tokenizer that it does not load, weights that come back under other names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from outgrow.model.base.errors import UserError, in_one_line
from outgrow.model.base.quiet import quietly
from outgrow.model.build import load_model
from outgrow.model.generation import generation_config
from outgrow.model.twin import Twin, tiny_twin
from outgrow.train.machine.distribute import tied_again
from outgrow.train.run.export import write_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from outgrow.train.data import TokenData

ROWS, LENGTH = 2, 8  # of random tokens
SAME = 1e-4  # nats; a model that is saved and loaded gives the same loss up to rounding
ROUNDED = 0.1  # nats; one whose weights are stored in 16 bits


def rehearse_end(
    config: Mapping[str, Any],
    source: Path | None,
    data: TokenData,
    *,
    sharded: bool,
    dtype: str = "float32",
) -> list[str]:
    """Publish a tiny twin of the network of `config` with the run's own tokenizer and generation config, and
    load it as a user would.

    Args:
        source: the folder whose generation config the network will have.
        dtype: that the weights will be stored in.
        sharded: the weights will come as a dictionary of whole tensors, put together from shards.

    Returns:
        notes for the reader.

    Raises:
        UserError: something of it fails.
    """
    try:
        twin = tiny_twin(config)
    except UserError as fault:
        return [f"the end was not rehearsed: {fault}"]
    model = twin.build()
    notes: tuple[str, ...] = ()
    if source is not None:
        model.generation_config, notes = generation_config(source, config)
    weights = None
    if sharded:
        state = model.state_dict()
        tensors = {name: tensor.clone() for name, tensor in state.items()}
        weights = tied_again(tensors, model)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        try:
            with quietly():
                write_model(Path(folder), model, weights, data, dtype)
                AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                tolerance = SAME if dtype == "float32" else ROUNDED
                _hold(twin, model, load_model(folder), tolerance)
        except Exception as fault:  # the library's classes raise every kind
            reason = str(fault) if isinstance(fault, UserError) else in_one_line(fault, 400)
            raise UserError(
                f"the end of this run, rehearsed on a tiny model of family {config.get('model_type')!r} "
                f"before anything is trained, fails: {reason}"
            ) from fault
    return list(notes)


def _hold(twin: Twin, model: PreTrainedModel, loaded: PreTrainedModel, apart: float) -> None:
    """The loaded model must give the loss of the one that was saved, but for `apart` nats.

    Raises:
        UserError: it does not.
    """
    tokens = twin.tokens(ROWS, LENGTH)

    @torch.no_grad()
    def loss(network: PreTrainedModel) -> float:
        # Not the class's own loss, which may be that of a text with pictures (GIT).
        output = network.eval()(input_ids=tokens, use_cache=False)
        logits = output.logits[:, :-1]
        targets = tokens[:, 1:]
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        return float(loss)

    before = loss(model)
    after = loss(loaded)
    if not abs(before - after) <= apart:
        raise UserError(
            f"loaded again, its loss is {after:.4f} nats a token, and {before:.4f} before it was saved",
        )
