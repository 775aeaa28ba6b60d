"""GGUF files as folders of plain weights. `transformers` reads them with the package `gguf`; the result is
kept in a cache.

A GGUF file holds weights in blocks of a few bits, a config and a tokenizer. They are unpacked into float32,
which holds every value of every such block exactly, and written as any other checkpoint, without a
`quantization_config`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.model.base.atomic import make_whole
from outgrow.model.base.errors import UserError, in_one_line, loading_faults, reading
from outgrow.model.base.files import one_at_a_time
from outgrow.model.keys import is_number

if TYPE_CHECKING:
    from gguf import GGUFReader

ENDING, MAGIC = ".gguf", b"GGUF"
# Gemma's scale of attention, which files do not hold: llama.cpp takes the head dim, and for the largest model
# of an architecture, which it knows by these layers, hidden size / heads
SCALE, WINDOW = "query_pre_attn_scalar", "sliding_window"
LARGEST = {"gemma2": 46, "gemma3": 62}
PART = re.compile(r"-\d{5}-of-\d{5}$")  # the end of the stem of a model's part
WAY = "give the checkpoint that it was made from, as safetensors, or convert it where it can be read"


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no other weights, of a model in parts the first; None where it
    holds none, or safetensors.

    Raises:
        UserError: there are several models.
    """
    files = sorted(folder.glob(f"*{ENDING}"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    models = {PART.sub("", file.stem) for file in files}
    if len(models) > 1:
        first = files[:5]
        names = ", ".join(file.name for file in first)
        raise UserError(
            f"source {str(folder)!r}: holds {len(files)} GGUF files ({names}); give one of them: "
            f"source={files[0]}"
        )
    return files[0]


def unpacked(file: Path) -> Path:
    """The folder of plain weights that a GGUF file holds, from the cache where the same file was unpacked
    before.

    The whole model is in memory meanwhile, at four bytes a weight.

    Raises:
        UserError: the file is no GGUF, a part of one, of an architecture that the library does not know, or
            lacks weights; `gguf` is not installed.
    """
    _check(file)
    stem = file.stem[:100]
    name = f"{stem}-{_identity(file)}"
    folder = _cache() / name
    try:
        with one_at_a_time(folder):
            if not folder.exists():
                print(f"unpacking {file} into {folder}", file=sys.stderr)
                with make_whole(folder) as partial:
                    _unpack(file, partial)
    except OSError as fault:
        raise UserError(
            f"{folder}: cannot be written ({fault.strerror}); set XDG_CACHE_HOME to a folder with room"
        ) from None
    return folder


def _cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "outgrow" / "gguf"


def _identity(file: Path) -> str:
    """Tell a file from others by its place, size and time of change."""
    state = file.stat()
    path = file.resolve()
    text = f"{path} {state.st_size} {state.st_mtime_ns}"
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _check(file: Path) -> None:
    with reading(file), file.open("rb") as opened:
        begin = opened.read(len(MAGIC))
    if begin != MAGIC:
        raise UserError(
            f"{file}: is no GGUF file (it begins with {begin!r}, not {MAGIC!r}); was it downloaded whole?"
        )
    if find_spec("gguf") is None:
        raise UserError(
            f"{file}: reading GGUF needs the package gguf; install the extra: pip install -e '.[gguf]'"
        )


def _reader(file: Path) -> GGUFReader:
    """Read the header of a GGUF file, which places each tensor in it.

    Raises:
        UserError: the file ends before its header or its last tensor does, or the header is damaged.
    """
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        """Stops where the file ends: the package's reads nothing there, as often as a damaged count says."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            end = offset + np.dtype(dtype).itemsize * int(count)
            if end > self.data.size:
                raise ValueError(f"it tells of byte {end:,}")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Bounded(file)
    except Exception as fault:  # the package raises every kind
        size = file.stat().st_size
        raise UserError(
            f"{file}: its header does not describe the {size:,} bytes that are there "
            f"({in_one_line(fault)}): it is cut off, damaged, or newer than the package gguf; download it "
            "again, or update the package"
        ) from None


def _check_whole(reader: GGUFReader, file: Path) -> None:
    """Reject a part of a model: the library reads one file, as if nothing else were there."""
    entry = reader.fields.get("split.count")
    parts = 1 if entry is None else int(entry.contents())
    if parts <= 1:
        return
    stem = PART.sub("", file.stem)
    first = file.with_name(f"{stem}-00001-of-{parts:05d}{ENDING}")
    merged = file.with_name(f"{stem}-merged{ENDING}")
    raise UserError(
        f"{file}: is one of {parts} parts of a model, and only a whole one can be read; merge them with "
        f"llama.cpp (llama-gguf-split --merge {first} {merged}), then give source={merged}"
    )


def _passed_over(reader: GGUFReader, model: Any) -> list[str]:
    """Faults of what a file holds and the library passes over without a word: a scaling of the rotary
    frequencies (Llama 3, YaRN, LongRoPE), how many dimensions rotate, and tensors beyond those of the model
    that it made."""
    faults = _scaling_faults(reader, model), _rotary_faults(reader, model), _surplus_faults(reader, model)
    return list(chain.from_iterable(faults))


def _rotary_factors(reader: GGUFReader) -> list[str]:
    """The tensors of a file that scale rotary frequencies."""
    names = [tensor.name for tensor in reader.tensors]
    return [name for name in names if name.startswith("rope_")]


def _scaling_faults(reader: GGUFReader, model: Any) -> Iterator[str]:
    keys = [key for key in reader.fields if key.endswith(".rope.scaling.type")]
    kinds = [str(reader.fields[key].contents()) for key in keys]
    scaled = [*_rotary_factors(reader), *kinds]
    scaled = [name for name in scaled if name != "none"]
    rotary = getattr(model.config, "rope_parameters", None) or {}
    text = json.dumps(rotary, default=str)
    learnt = re.findall(r'"rope_type": "(\w+)"', text)
    if scaled and set(learnt) <= {"default"}:
        named = ", ".join(scaled)
        yield f"its rotary frequencies are scaled ({named}), which transformers passes over"


def _rotary_faults(reader: GGUFReader, model: Any) -> Iterator[str]:
    frequencies = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    dimensions = {2 * buffer.shape[-1] for buffer in frequencies}  # two dimensions turn by one frequency
    rotating = _entries(reader).get("rope.dimension_count")
    if len(dimensions) == 1 and rotating is not None and rotating not in dimensions:
        yield f"{rotating} dimensions of a head rotate, of which transformers makes {dimensions.pop()}"


def _surplus_faults(reader: GGUFReader, model: Any) -> Iterator[str]:
    apart = set(_rotary_factors(reader))
    if model.config.tie_word_embeddings is not False:
        apart.add("output.weight")  # a head that is tied all the same is there twice
    inside = [tensor for tensor in reader.tensors if tensor.name not in apart]
    stored_count = sum(int(tensor.n_elements) for tensor in inside)
    parameter_count = sum(parameter.numel() for parameter in model.parameters())
    if stored_count > parameter_count:
        yield f"transformers passes over {stored_count - parameter_count:,} of its {stored_count:,} numbers"


def _entries(reader: GGUFReader) -> dict[str, Any]:
    """What a file says of its model: key without the architecture → value."""
    prefix = f"{_architecture(reader)}."
    keys = [key for key in reader.fields if key.startswith(prefix)]
    return {key.removeprefix(prefix): reader.fields[key].contents() for key in keys}


def _architecture(reader: GGUFReader) -> str:
    return str(reader.fields["general.architecture"].contents())


def _amend(reader: GGUFReader, config: Any) -> list[str]:
    """Put into a config the numbers for which the library takes its class's default: those that the file has
    under the same name (softcaps, a sliding window), and the scale of attention, which no file has and
    llama.cpp knows by the model's size.

    Returns:
        What was taken, in words.
    """
    said = {key.rpartition(".")[2]: value for key, value in _entries(reader).items()}
    notes = []
    for name, value in said.items():
        if is_number(value) and hasattr(config, name) and _set(config, name, value):
            notes.append(f"{name}={value:g} is the file's own")
    if hasattr(config, SCALE):
        is_largest = config.num_hidden_layers == LARGEST.get(_architecture(reader))
        share = config.hidden_size // config.num_attention_heads
        if _set(config, SCALE, share if is_largest else config.head_dim):
            notes.append(
                f"{SCALE}={getattr(config, SCALE)}, which no such file holds, is as llama.cpp has it"
            )
    window = getattr(config, WINDOW, None)
    if window is not None and WINDOW not in said:
        notes.append(f"{WINDOW}={window} is of transformers' class: the file says nothing of it")
    return notes


def _set(config: Any, name: str, value: float) -> bool:
    """Give an entry of a config a number; tell whether that changed it."""
    current = getattr(config, name)
    if is_number(current) and isclose(current, value, rel_tol=1e-6):
        return False
    setattr(config, name, value)
    return True


def _unpack(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into `folder` as plain safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from outgrow.model.base.quiet import quietly

    reader = _reader(file)
    _check_whole(reader, file)
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    where["trust_remote_code"] = False
    plain = {
        "quantization_config": GgufConfig(dequantize=True),
        "dtype": torch.float32,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are in the report then, which is checked below
    }
    try:
        with quietly():
            loaded: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), **where, **plain)
    except Exception as fault:  # the library raises every kind
        raise UserError(
            f"{file}: transformers cannot read this GGUF file ({in_one_line(fault)}); {WAY}"
        ) from None
    model, report = loaded
    faults = [*loading_faults(report), *_passed_over(reader, model)]
    UserError.collect(f"{file}: {fault}; {WAY}" for fault in faults)
    for note in _amend(reader, model.config):
        print(f"note: {file}: {note}", file=sys.stderr)
    model.hf_quantizer = None  # with which the library refuses to save, though the weights are plain now
    # what the weights were, and the file's own title, which is no path
    for entry in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(entry, None)
    with quietly():
        model.save_pretrained(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
            tokenizer.save_pretrained(folder)
        except Exception as fault:
            print(
                f"note: {file}: its tokenizer could not be read ({in_one_line(fault)}); the weights are "
                "whole",
                file=sys.stderr,
            )
    if (card := file.with_name("README.md")).is_file():  # it names the licence
        shutil.copyfile(card, folder / card.name)
