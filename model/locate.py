"""Where a source lies: in a folder, in a GGUF file that is unpacked, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from outgrow.model.base.errors import UserError, kind_and_line, reading, seen_from
from outgrow.model.companions import to_download
from outgrow.model.config import WEIGHTS, read_json
from outgrow.model.gguf import ENDING, gguf_in, unpacked
from outgrow.model.headers import INDEX, SINGLE, shards_listed

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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
        check_kind(folder)
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


def is_hub_name(source: str | Path) -> bool:
    """Check whether a source that is no folder here may be a repository of the Hugging Face hub:
    `owner/name`.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_absolute() or folder.exists():
        return False
    return _HUB_NAME.fullmatch(str(source)) is not None


def check_kind(folder: Path) -> None:
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
