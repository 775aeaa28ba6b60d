"""What a safetensors file, or the index of several, says is in it: where each tensor lies.

Nothing that comes from the files is trusted: headers and index are bounded and checked before a byte of
weights is read, paths stay inside the folder, and pickle files are never opened.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

from outgrow.model.base.errors import UserError, reading
from outgrow.model.config import check_values, read_json
from outgrow.model.dtypes import PACKED, RAW, bytes_of

MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library itself
MAX_NAME_BYTES = 255  # of a file
MAX_TENSORS = 200_000  # no honest file holds more; an entry of a header has at most ten values
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Stored:
    """The place of one tensor: file, byte offset, safetensors dtype and shape."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return bytes_of(self.dtype, self.shape)


# ---- a folder ----------------------------------------------------------------------------------------------


def tensor_table(folder: Path, weights: str | None = None) -> dict[str, Stored]:
    """Locate every tensor of a folder, over all its safetensors shards.

    Args:
        weights: the file, or index, that holds them; None takes the one of the usual names.

    Raises:
        UserError: no safetensors weights, or a malformed header or index.
    """
    index = folder / INDEX
    if weights is not None and weights.endswith(".json"):
        index = folder / weights
        listed: Mapping[str, set[str] | None] = _read_index(index)
    elif weights is not None:
        listed = {weights: None}
    elif (folder / SINGLE).exists():  # in the library's order of choice
        listed = {SINGLE: None}
    elif index.exists():
        listed = _read_index(index)
    else:
        matches = chain.from_iterable(map(folder.glob, PICKLES))
        pickles = sorted(path.name for path in matches)
        if pickles:
            raise UserError(
                f"{folder}: only pickle weights ({', '.join(pickles[:3])}), which can run code and are "
                "never loaded; convert them where you trust them: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
            )
        raise UserError(f"{folder}: no weights; expected {SINGLE} or {INDEX}")
    tensors: dict[str, Stored] = {}
    for file, names in listed.items():
        header = read_header(folder / file)
        both = header.keys() & tensors.keys()
        if twice := sorted(both):
            raise UserError(
                f"{folder}: tensor {twice[0]!r} is in {file} and in {tensors[twice[0]].file.name}; each "
                "must be in one shard"
            )
        listed_here = names or set()
        missing = sorted(listed_here - header.keys())
        if missing:
            raise UserError(
                f"{index}: says {missing[0]!r} is in {file}, which does not hold it; is a shard from "
                "another checkpoint?"
            )
        tensors |= header
    return tensors


def _read_index(path: Path) -> dict[str, set[str]]:
    files = shards_listed(path)
    folder = path.parent
    missing = [file for file in files if not (folder / file).is_file()]
    if absent := sorted(missing):
        raise UserError(
            f"{path}: shard {absent[0]} is missing ({len(absent)} of {len(files)} are); download the "
            "checkpoint again"
        )
    return files


def _names_files(weight_map: object) -> TypeGuard[Mapping[str, str]]:
    """Check for an object that is not empty and has a text for every key."""
    if not isinstance(weight_map, Mapping) or not weight_map:
        return False
    files = weight_map.values()
    return all(isinstance(file, str) for file in files)


def shards_listed(path: Path) -> dict[str, set[str]]:
    """Read which tensors an index puts in which file, whether it is there or not.

    Raises:
        UserError: it is no index, or names anything but .safetensors files beside it.
    """
    weight_map = read_json(path).get("weight_map")
    if not _names_files(weight_map):
        raise UserError(f"{path}: weight_map must be an object that names a file for every tensor")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        is_shard = file.endswith(".safetensors")
        is_beside = file == Path(file).name
        if not is_shard or not is_beside:
            raise UserError(
                f"{path}: {name!r} points to {file!r}; shards are .safetensors files in the same folder, "
                "nothing else is opened"
            )
        files.setdefault(file, set()).add(name)
    lengths = {file: len(os.fsencode(file)) for file in files}
    if overlong := [file for file, length in lengths.items() if length > MAX_NAME_BYTES]:
        raise UserError(f"{path}: names the file {overlong[0]!r}, which is longer than a file's name can be")
    return files


# ---- a file ------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Stored]:
    """The tensor table of one safetensors file, every entry checked against the file's length.

    Raises:
        UserError: the header is malformed or does not describe this file; the message names file, tensor and
            fault.
    """
    if not path.is_file():  # a pipe would be waited on for ever
        raise UserError(f"{path}: not a regular file")
    size = path.stat().st_size
    with reading(path), path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise UserError(
                f"{path}: {size} bytes is no safetensors file (8 bytes of header length expected); truncated?"
            )
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(
                f"{path}: header of {length:,} bytes announced in a file of {size:,}; truncated, or not a "
                "safetensors file"
            )
        header = _parse_header(path, file.read(length))
    start = 8 + length
    tensors = {
        name: _stored(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"
    }
    _check_layout(path, tensors, start, size)
    return tensors


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            ((name, _),) = Counter(names).most_common(1)
            raise UserError(f"{path}: the header names {name!r} twice")
        return values

    check_values(path, text, 10 * MAX_TENSORS)
    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as fault:
        why = "nested too deep" if isinstance(fault, RecursionError) else fault
        raise UserError(
            f"{path}: the header is not valid JSON ({why}); truncated, or not a safetensors file"
        ) from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header must be a JSON object, found {type(header).__name__}")
    return header


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    where = f"{path}: tensor {name!r}"
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise UserError(f"{where}: expected dtype, shape and data_offsets, found {entry!r:.80}")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if dtype in PACKED:
        raise UserError(
            f"{where}: dtype {dtype} packs several numbers into a byte, and growth copies formats of whole "
            "bytes alone: dequantise it first, where the library can "
            "(AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(NEW))"
        )
    if not isinstance(dtype, str) or dtype not in RAW:
        supported = ", ".join(RAW)
        raise UserError(f"{where}: dtype {dtype!r} is not supported; supported: {supported}")
    if not _whole_numbers(shape):
        raise UserError(f"{where}: shape {shape!r:.80} is not a list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise UserError(f"{where}: data_offsets {offsets!r:.80} are not two whole numbers")
    begin, end = offsets
    sizes = tuple(shape)
    offset = start + begin
    stored = Stored(path, offset, dtype, sizes)
    if end - begin != stored.nbytes:
        raise UserError(
            f"{where}: {end - begin:,} bytes stored, but {dtype} {tuple(shape)} takes {stored.nbytes:,}"
        )
    return stored


def _check_layout(path: Path, tensors: Mapping[str, Stored], start: int, size: int) -> None:
    def extent(name: str) -> tuple[int, int]:
        stored = tensors[name]
        return stored.offset, stored.nbytes

    end = start
    for name in sorted(tensors, key=extent):
        stored = tensors[name]
        if stored.offset != end:
            kind = "overlaps the tensor before it" if stored.offset < end else "leaves a gap before it"
            raise UserError(
                f"{path}: tensor {name!r} starts at byte {stored.offset:,} where {end:,} was expected: it "
                f"{kind}"
            )
        end += stored.nbytes
    if end != size:
        raise UserError(
            f"{path}: the header describes {end:,} bytes, the file has {size:,}; "
            f"{'truncated' if size < end else 'trailing bytes'}"
        )
