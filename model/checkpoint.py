"""A checkpoint on disk: a config and named tensors in safetensors files, read lazily with positioned reads.

Nothing that comes from the files is trusted: headers and index are bounded and checked before a byte of
weights is read, paths stay inside the folder, and pickle files are never opened.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from outgrow.model.base.errors import UserError, kind_and_line, reading, seen_from
from outgrow.model.companions import left_behind, to_download
from outgrow.model.config import WEIGHTS, check_values, read_config, read_json
from outgrow.model.dtypes import PACKED, PLAIN_NUMBERS, RAW, bytes_of, is_float
from outgrow.model.gguf import ENDING, gguf_in, unpacked

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


class Checkpoint:
    """A Hugging Face folder whose weights are safetensors, opened without reading them.

    Attributes:
        folder: the folder.
        config: its config.json, as its flat view (`model.composite`).
        tensors: name → `Stored`, over all shards.
        quantised: how its weights are quantised ("gptq"); None where they are plain numbers, whatever
            config.json says (what it says of a quantisation is then left out of `config`).
        weights: the file or index that config.json names for them (`transformers_weights`), which `config`
            does not say any more; None where they have the usual names.

    Raises (on opening):
        UserError: no config, no safetensors weights, only pickle files, or a malformed header or index; the
            message names the file.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(os.path.expanduser(folder))
        with reading(f"source {str(folder)!r}"):
            is_folder = self.folder.is_dir()
        if not is_folder:
            raise UserError(f"source {str(folder)!r}: no such folder")
        _check_kind(self.folder)
        self.config = read_config(self.folder)
        self.weights = _named_weights(self.folder, self.config.pop(WEIGHTS, None))
        self.tensors = tensor_table(self.folder, self.weights)
        quantised = quantisation(self.config)
        is_packed = any(map(_packed, self.tensors.values()))
        self.quantised = quantised if is_packed else None
        self._plain_now = self.quantised is None and quantised is not None
        entries = (value for key, value in self.config.items() if _quantises(key))
        if self.quantised is None and any(value is not None for value in entries):
            self.config = without_quantisation(self.config)
        files = {stored.file for stored in self.tensors.values()}
        self._stamps = {file: _stamp(file) for file in files}
        self._files: dict[Path, int] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what of the folder is passed over, in words."""
        notes = []
        present = [name for name in (SINGLE, INDEX) if (self.folder / name).exists()]
        others = [name for name in present if name != self.weights]
        if self.weights is not None and others:
            notes.append(
                f"{', '.join(others)} passed over: config.json names {self.weights} ({WEIGHTS}), which "
                "transformers takes"
            )
        if self.weights is None and len(others) == 2:
            notes.append(
                f"{INDEX} is passed over: {SINGLE} lies beside it, which transformers takes too; one of "
                "them is stale"
            )
        if (self.folder / "adapter_config.json").exists():
            notes.append(
                "adapter_config.json is passed over: the weights beside it are read, without an adapter"
            )
        if self._plain_now:
            notes.append("quantization_config is dropped from config.json: the tensors are plain")
        if left := left_behind(self.folder):
            notes.append(f"left behind: {names_of(left)}; code of a checkpoint is never run or copied")
        if "auto_map" in self.config:
            notes.append("auto_map is dropped from config.json: it names classes in code that is not copied")
        return tuple(notes)

    @property
    def files(self) -> list[Path]:
        """The folder and the files that hold its weights, which may lie elsewhere (links into a cache)."""
        files = [stored.file for stored in self.tensors.values()]
        distinct = dict.fromkeys(files)
        return [self.folder, *distinct]

    def check_unchanged(self) -> None:
        """Hold every file of weights against what it was when it was opened.

        Raises:
            UserError: one has another size or time of change, so that what was read may be a mixture of two
                checkpoints.
        """
        for file, stamp in self._stamps.items():
            with reading(file):
                if _stamp(file) != stamp:
                    raise UserError(
                        f"{file}: changed while it was read, so the result would mix two checkpoints; grow "
                        "again"
                    )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of a tensor as raw bits, in a new array.

        Returns:
            (rows, columns), where all axes but the last count rows together; of a vector its entries.

        Raises:
            UserError: the file ends early or cannot be read.
        """
        stored = self.tensors[name]
        return self._read_rows(name, stored, start, stop)

    def _read_rows(self, name: str, stored: Stored, start: int, stop: int | None) -> np.ndarray:
        shape = stored.shape
        if len(shape) > 2:
            rows = prod(shape[:-1])
            shape = (rows, shape[-1])
        rows = shape[0] if shape else 1
        stop = rows if stop is None else stop
        row_bytes = stored.nbytes // max(rows, 1)
        block = (stop - start, *shape[1:]) if shape else ()
        buffer = np.empty(block, RAW[stored.dtype])
        flat = buffer.reshape(-1)
        view = flat.data.cast("B")
        offset = stored.offset + start * row_bytes
        self._read_into(view, stored.file, offset, name)
        return buffer

    def _read_into(self, view: memoryview, file: Path, offset: int, name: str) -> None:
        with reading(file):
            if file not in self._files:
                descriptor = os.open(file, os.O_RDONLY)
                self._files[file] = descriptor
            done = 0
            while done < len(view):
                rest = view[done:]
                descriptor = self._files[file]
                position = offset + done
                count = os.preadv(descriptor, [rest], position)
                if count == 0:  # the end of the file
                    break
                done += count
        if done < len(view):
            raise UserError(
                f"{file}: ends early inside tensor {name!r}; the file changed while it was read, or is "
                "truncated"
            )

    def close(self) -> None:
        """Close the files; reading again reopens them."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _quantises(key: str) -> bool:
    first, _, _ = key.lstrip(".").partition(".")
    return first == "quantization_config"


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of a quantisation."""
    return {key: value for key, value in config.items() if not _quantises(key)}


def _packed(stored: Stored) -> bool:
    return not is_plain(stored.dtype)


def is_plain(dtype: str) -> bool:
    """Check that tensors of a format are numbers as a model has them, and no packed or quantised weights."""
    return is_float(dtype) or dtype in PLAIN_NUMBERS


def quantisation_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the entries of a config, or of its flat view, on a quantisation."""
    entries: dict[str, Any] = {}
    for key, value in config.items():
        if not _quantises(key):
            continue
        if isinstance(value, Mapping):
            entries |= value
        else:
            name = key.rpartition(".")[2]
            entries[name] = value
    return {} if entries == {"quantization_config": None} else entries


def quantisation(config: Mapping[str, Any]) -> str | None:
    """Name the quantisation of a config's weights as the library does; None where it says nothing of it."""
    said = quantisation_entries(config)
    if not said:
        return None
    if "quant_method" in said:
        return str(said["quant_method"])
    keys = map(str, said)
    of_bitsandbytes = [key for key in keys if key.startswith(("load_in", "bnb"))]
    return "bitsandbytes" if of_bitsandbytes else "an unnamed method"


def _stamp(file: Path) -> tuple[int, int, int, int]:
    """Size, time of change (ns), and which file it is."""
    state = file.stat()
    return state.st_size, state.st_mtime_ns, state.st_dev, state.st_ino


def _check_kind(folder: Path) -> None:
    """Tell what a folder is that is no checkpoint, and what was meant.

    Raises:
        UserError: it holds an adapter, or a checkpoint lies in a folder of it.
    """
    has_config = (folder / "config.json").exists()
    has_weights = (folder / SINGLE).exists() or (folder / INDEX).exists()
    adapter = folder / "adapter_config.json"
    has_adapter = adapter.exists()
    if has_config and (has_weights or not has_adapter):
        return
    if has_adapter:
        base = read_json(adapter).get("base_model_name_or_path")
        raise UserError(
            f"source {str(folder)!r}: an adapter of {base!r}, which has no weights of its own to grow; "
            "merge it into its base first (peft: merge_and_unload, then save_pretrained) and give that "
            "folder"
        )
    configs = folder.glob("*/config.json")
    inside = sorted(path.parent for path in configs)
    ends = [path for path in inside if path.name == "final"]
    meant = ends or inside[-1:]
    source = f"source {str(folder)!r}"
    if meant:
        near = str(meant[0])
        raise UserError(f"{source}: holds no config.json; did you mean {near!r}?")
    if (folder / "run.json").exists():
        raise UserError(f"{source}: a run that has no {folder.name}/final yet; finish it first")


def _named_weights(folder: Path, name: Any) -> str | None:
    """The file of weights that a config names for the library to load instead of the usual ones.

    Raises:
        UserError: it is none in the folder, or no safetensors.
    """
    if name is None:
        return None
    is_plain_name = isinstance(name, str) and name == Path(name).name  # no path out of the folder
    is_safe = is_plain_name and name.endswith((".safetensors", ".safetensors.index.json"))
    if is_safe and (folder / name).is_file():
        return str(name)
    raise UserError(
        f"{folder / 'config.json'}: {WEIGHTS} must name a safetensors file, or the index of several, in the "
        f"same folder; found {name!r:.80}"
    )


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


_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_name(source: str | Path) -> bool:
    """Check whether a source that is no folder here may be a repository of the Hugging Face hub:
    `owner/name`.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_absolute() or folder.exists():
        return False
    return _HUB_NAME.fullmatch(str(source)) is not None


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a source: itself when it is one, else a snapshot of the Hugging Face repository of that
    name.

    Of a GGUF file, or a folder that holds one and no other weights, it is the folder that it was unpacked
    into (`model.gguf`).

    Raises:
        UserError: neither a folder nor a reachable repository.
    """
    if not isinstance(source, str | Path):
        raise UserError(
            f"source {source!r:.80}: expected a folder or a Hugging Face name; found {type(source).__name__}"
        )
    folder = Path(os.path.expanduser(source))
    with reading(f"source {str(source)!r}"):
        is_folder = folder.is_dir()
    file = gguf_in(folder) if is_folder else folder
    if file is not None and file.suffix == ENDING and file.is_file():
        return unpacked(file)
    if is_folder:
        _check_kind(folder)
        return folder
    if folder.is_file():
        raise UserError(
            f"source {str(source)!r}: a file; give the folder that holds it with its config.json: "
            f"{str(folder.parent)!r}"
        )
    if not is_hub_name(source):
        raise UserError(
            f"source {str(source)!r}: no such folder{seen_from(folder)}, and not a Hugging Face name of the "
            f"form owner/name{_near(folder)}"
        )
    try:
        return _downloaded(str(source), revision)
    except UserError:
        raise
    except Exception as fault:  # the library raises many kinds; the user needs one answer
        reason = kind_and_line(fault)
        raise UserError(
            f"source {str(source)!r}: no such folder, and the Hugging Face hub did not give it ({reason}); "
            f"check name and network, or download it elsewhere (`hf download {source}`) and give the folder"
        ) from None


def _near(folder: Path) -> str:
    """The end of the error about a folder that is not there: a run whose result it would be, or its
    neighbours of nearly that name.
    """
    if folder.name == "final":
        return f"; it would be the result of the run {str(folder.parent)!r}: let that run end first"
    above = folder.parent
    if not above.is_dir():
        return ""
    beside = [path.name for path in above.iterdir() if path.is_dir()]
    near = difflib.get_close_matches(folder.name, beside, n=3, cutoff=0.7)
    if not near:
        return ""
    paths = [str(folder.with_name(name)) for name in near]
    return f"; did you mean {' or '.join(map(repr, paths))}?"


def _downloaded(name: str, revision: str | None) -> Path:
    """A snapshot of a repository, with its weights in one format; offline, what an earlier download has
    left."""
    # takes long to import, and most sources are folders
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except (OfflineModeIsEnabled, OSError):
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    weights: Iterable[str] = [SINGLE]
    named = None
    if "config.json" in files:
        config = hf_hub_download(name, "config.json", revision=revision)
        named = read_json(Path(config)).get(WEIGHTS)
    index = str(named or INDEX)
    takes_index = named or SINGLE not in files
    if named in files and not index.endswith(".json"):
        weights = [index]
    elif index in files and takes_index:
        listing = hf_hub_download(name, index, revision=revision)
        shards = shards_listed(Path(listing))
        weights = [index, *shards]
    patterns = to_download(files, weights)
    snapshot = snapshot_download(name, revision=revision, allow_patterns=patterns)
    return Path(snapshot)


def names_of(checkpoints: Iterable[str]) -> str:
    """The first few of many names, for an error message."""
    names = sorted(checkpoints)
    first = ", ".join(names[:3])
    if len(names) <= 3:
        return first
    return f"{first}, … ({len(names)} in all)"
