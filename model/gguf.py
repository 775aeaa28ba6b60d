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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outgrow.model.base.atomic import whole
from outgrow.model.base.errors import UserError, in_one_line, loading_faults, reading
from outgrow.model.base.files import one_at_a_time

ENDING, MAGIC = ".gguf", b"GGUF"
WAY = "give the checkpoint that it was made from, as safetensors, or convert it where it can be read"


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no other weights; None where it holds none, or safetensors.

    Raises:
        UserError: there are several.
    """
    files = sorted(folder.glob(f"*{ENDING}"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
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
        UserError: the file is no GGUF, of an architecture that the library does not know, or lacks weights;
            `gguf` is not installed.
    """
    _check(file)
    stem = file.stem[:100]
    name = f"{stem}-{_identity(file)}"
    folder = _cache() / name
    try:
        with one_at_a_time(folder):
            if not folder.exists():
                print(f"unpacking {file} into {folder}", file=sys.stderr)
                with whole(folder) as partial:
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


def _passed_over(file: Path, model: Any) -> list[str]:
    """Faults of what a file holds and the library passes over without a word: a scaling of the rotary
    frequencies (Llama 3, YaRN, LongRoPE), and tensors beyond those of the model that it made."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    scaling = [key for key in reader.fields if key.endswith(".rope.scaling.type")]
    kinds = [str(reader.fields[key].contents()) for key in scaling]
    scaled = [*factors, *(kind for kind in kinds if kind != "none")]
    rotary = json.dumps(getattr(model.config, "rope_parameters", None) or {}, default=str)
    learnt = re.findall(r'"rope_type": "(\w+)"', rotary)
    faults = []
    if scaled and set(learnt) <= {"default"}:
        named = ", ".join(scaled)
        faults.append(f"its rotary frequencies are scaled ({named}), which transformers passes over")
    # a head that is tied all the same is there twice
    apart = () if model.config.tie_word_embeddings is False else ("output.weight",)
    inside = [tensor for tensor in reader.tensors if tensor.name not in (*factors, *apart)]
    held = sum(int(tensor.n_elements) for tensor in inside)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if held > taken:
        faults.append(f"transformers passes over {held - taken:,} of its {held:,} numbers")
    return faults


def _unpack(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into `folder` as plain safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from outgrow.model.base.quiet import quietly

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
    faults = [*loading_faults(report), *_passed_over(file, model)]
    UserError.collect(f"{file}: {fault}; {WAY}" for fault in faults)
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
