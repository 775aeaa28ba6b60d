"""From text to token shards.

python -m train.data prepare data=stdlib
python -m train.data prepare data=files data.path='texts/**/*.jsonl.zst' data.clean.normalise=true data.clean.exact_duplicates=true
python -m train.data write model=Qwen/Qwen2.5-7B-Instruct server=http://127.0.0.1:8000/v1      texts by a language model: conf/write.yaml

A stopped or killed preparation goes on where it was. Exit status: 0 done, 2 a fault in what was asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError, unknown
from train.data.settings import DataSettings
from train.door import compose_config, plain, read

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass(frozen=True)
class PrepareSettings:
    """conf/prepare.yaml."""

    data: DataSettings
    progress: bool


def settings_from(overrides: Sequence[str]) -> PrepareSettings:
    """Typed settings from `key=value` arguments.

    Raises:
        UserError: every unknown, missing and mistyped key, at once.
    """
    cfg, faults = compose_config(CONF, "prepare", list(overrides))
    values = plain(cfg, faults)
    settings = read(PrepareSettings, values, "", faults) if values else None
    UserError.collect(faults)
    assert settings is not None
    return settings


def prepare(overrides: Sequence[str]) -> None:
    """Prepare one corpus, and say what became of its documents."""
    from train.data.build import prepare as build
    from train.data.report import report

    settings = settings_from(overrides)
    data = build(settings.data, progress=settings.progress)
    print(report(data.folder))


def write(overrides: Sequence[str]) -> None:
    """Have a language model write documents, and say what they cost."""
    from train.data.writing.run import write as run
    from train.data.writing.settings import settings_from as write_settings

    print(run(write_settings(overrides)))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"prepare": prepare, "write": write}


def main(arguments: Sequence[str] | None = None) -> None:
    """The door: a UserError is one message on stderr and exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or any(argument in ("-h", "--help") for argument in given):
        print(f"{__doc__}\nKeys and defaults ({CONF / 'prepare.yaml'}):\n\n{(CONF / 'prepare.yaml').read_text()}")
        return
    try:
        if given[0] not in COMMANDS:
            unknown("command", given[0], COMMANDS)
        COMMANDS[given[0]](given[1:])
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
