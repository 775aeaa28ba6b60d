"""A checkpoint on disk: a config and named tensors in safetensors files, read lazily by positioned reads."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.model.base.errors import UserError, names_of, reading
from outgrow.model.companions import left_behind
from outgrow.model.config import WEIGHTS, read_config
from outgrow.model.dtypes import RAW
from outgrow.model.headers import INDEX, SINGLE, Stored, tensor_table
from outgrow.model.locate import check_kind
from outgrow.model.quantisation import is_plain, quantisation, quantises, without_quantisation


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
        check_kind(self.folder)
        self.config = read_config(self.folder)
        self.weights = _named_weights(self.folder, self.config.pop(WEIGHTS, None))
        self.tensors = tensor_table(self.folder, self.weights)
        quantised = quantisation(self.config)
        is_packed = any(map(_packed, self.tensors.values()))
        self.quantised = quantised if is_packed else None
        self._plain_now = self.quantised is None and quantised is not None
        entries = (value for key, value in self.config.items() if quantises(key))
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
            bytes_read = 0
            while bytes_read < len(view):
                rest = view[bytes_read:]
                descriptor = self._files[file]
                position = offset + bytes_read
                count = os.preadv(descriptor, [rest], position)
                if count == 0:  # the end of the file
                    break
                bytes_read += count
        if bytes_read < len(view):
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


def _packed(stored: Stored) -> bool:
    return not is_plain(stored.dtype)


def _stamp(file: Path) -> tuple[int, int, int, int]:
    """Size, time of change (ns), and which file it is."""
    state = file.stat()
    return state.st_size, state.st_mtime_ns, state.st_dev, state.st_ino


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
