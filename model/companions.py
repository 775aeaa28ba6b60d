"""The files of a checkpoint folder beside its weights, told by rule: by the index, and by the ends of their
names.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

# Tokenizers, processors, chat templates, generation configs: text, or a tokenizer's own format.
ENDINGS = (".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken", ".vocab", ".bpe")
# Of such endings what describes these very weights, another format of them, or how they were made.
OTHERS = (
    "config.json", "*.index.json", "growth.json", "growth.partial.json", "ledger.json", "params.json",
    "adapter_*", "trainer_state.json",
    "*_results.json", "quant*_config.json", "requirements*.txt",
)  # fmt: skip
# The terms that a model is passed on under, which go with it.
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
TEMPLATES = "additional_chat_templates"  # the one folder that tokenizers are saved with
# Weights in this and other formats, and what is for people to read.
KNOWN = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".md",
    ".png",
    ".jpg",
    ".svg",
    ".pdf",
    "",
)


def is_companion(name: str) -> bool:
    """Check whether a file of that path in a checkpoint folder goes with the model, whatever its sizes."""
    path = PurePosixPath(name)
    if len(path.parts) == 2:
        folder, _ = path.parts
        return folder == TEMPLATES and path.suffix == ".jinja"
    if len(path.parts) != 1:
        return False
    if is_terms(name):
        return True
    if path.suffix not in ENDINGS:
        return False
    return not any(fnmatchcase(name, pattern) for pattern in OTHERS)


def is_terms(name: str) -> bool:
    """Check whether a file of that name holds the terms of a model."""
    upper = name.upper()
    return not name.endswith(".py") and any(fnmatchcase(upper, pattern) for pattern in TERMS)


def companions(folder: Path) -> list[str]:
    """List the paths in `folder` of what goes with the model, sorted."""
    templates = folder.glob(f"{TEMPLATES}/*")
    paths = [path for path in (*folder.iterdir(), *templates) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return sorted(filter(is_companion, names))


def left_behind(folder: Path) -> list[str]:
    """List the files of `folder` that somebody may miss in a copy: code, and endings that nothing is known
    of.
    """
    names = (*KNOWN, *ENDINGS)
    paths = [path for path in folder.iterdir() if path.suffix not in names]
    files = [path.name for path in paths if path.is_file()]
    return sorted(name for name in files if not name.startswith("."))


def to_download(files: Iterable[str], weights: Iterable[str]) -> list[str]:
    """Choose a repository's files: config, companions, card, and the `weights`, in one format alone."""
    names = {"config.json", "README.md", *weights}

    def belongs(name: str) -> bool:
        return name in names or is_companion(name)

    return sorted(filter(belongs, files))
