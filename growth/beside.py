"""Companions of a model beside its weights (tokenizer, processors, generation config, licence): read, mended,
and copied into a grown folder.

It is read before anything is grown: a file that could not be spelt for the result is told at once, and a
generation config that the library would not save is mended.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from outgrow.model.base.errors import UserError, reading
from outgrow.model.companions import companions
from outgrow.model.config import read_json
from outgrow.model.family import Config
from outgrow.model.generation import FILE
from outgrow.model.spelling import spell_folder

if TYPE_CHECKING:
    from transformers import GenerationConfig

UNCHECKED = f"{FILE}: copied as it is; whether its entries agree is not known without transformers"
# Entries of a generation config that contradict nothing; for others the library is asked, which takes
# seconds to import.
PLAIN = {"_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


@dataclass(frozen=True)
class Beside:
    """The companions of a checkpoint's weights.

    Attributes:
        source: the checkpoint's folder.
        names: of the files, relative to it.
        generation: what replaces its generation_config.json; None where that is copied as it is.
        notes: what was changed, in words.
    """

    source: Path
    names: tuple[str, ...]
    generation: GenerationConfig | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, config: Config) -> Beside:
        """Read what lies beside the weights of a folder.

        Args:
            config: of the checkpoint, which may hold a part of the generation config.

        Raises:
            UserError: a config of tokenizer or processor is no JSON object; or a generation config is none,
                where transformers, which mends it, is not installed.
        """
        names = tuple(companions(folder))
        for name in names:
            if name.endswith("config.json") and name != FILE:
                read_json(folder / name)
        if FILE not in names or _is_plain(folder / FILE):
            return cls(folder, names)
        if find_spec("transformers") is None:  # which growing does without
            read_json(folder / FILE)
            return cls(folder, names, notes=(UNCHECKED,))
        from outgrow.model.generation import generation_config

        generation, changes = generation_config(folder, config)
        return cls(folder, names, generation, changes) if changes else cls(folder, names)

    def copy(self, folder: Path) -> None:
        """Copy all of it into `folder`, configs in the spellings of transformers 4 and 5."""
        for name in self.names:
            if name == FILE and self.generation is not None:
                self.generation.save_pretrained(folder)
                continue
            (folder / name).parent.mkdir(exist_ok=True)
            with reading(self.source / name):
                companion = (self.source / name).open("rb")
            with companion, (folder / name).open("wb") as copy:
                shutil.copyfileobj(companion, copy)
        spell_folder(folder)


def _is_plain(file: Path) -> bool:
    """Check whether a generation config holds nothing that may contradict."""
    try:
        return read_json(file).keys() <= PLAIN
    except UserError:
        return False
