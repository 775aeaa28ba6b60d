"""The door of a command that takes names and `key=value` overrides, as `evaluate` and `cost` do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from outgrow.model.base.compose import CONF
from outgrow.model.base.errors import UserError
from outgrow.model.base.overrides import own_folder, paths_and_overrides

Work = Callable[[list[str], list[str], Path | None], None]


def go_through(
    arguments: Sequence[str] | None, usage: str | None, leaf: str, work: Work, stopped: str
) -> int:
    """Call `work` with the names and the overrides among `arguments`, and the folder of the user's own leaves
    (`--config-dir DIR`); return the command's exit status.

    Args:
        arguments: None for those of this process.
        usage: the text of --help, which ends with the keys and defaults of conf/`leaf`.
        stopped: the line after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        defaults = (CONF / leaf).read_text(encoding="utf-8")
        print(f"{usage}{defaults}")
        return 0
    try:
        own, others = own_folder(words)
        names, overrides = paths_and_overrides(others)
        work(names, overrides, own)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
