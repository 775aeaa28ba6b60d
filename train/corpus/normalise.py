"""The same text in one spelling, as a step of the pipeline."""

from __future__ import annotations

import re
import unicodedata

from datatrove.pipeline.formatters.base import BaseFormatter

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
_LINE_ENDS = re.compile("\r\n?")
_BLANK_LINES = re.compile("\n{4,}")


class Normalise(BaseFormatter):
    """Normalise each document."""

    name = "normalise"

    def format(self, text: str) -> str:
        return normalised(text)


def normalised(text: str) -> str:
    """The same text in one spelling: Unicode NFC, \\n line ends, no control characters or byte order marks,
    no spaces at line ends, at most two blank lines in a row (Python's own style) and none at both ends.
    Indentation stays as it is."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = _CONTROL.sub("", _LINE_ENDS.sub("\n", text))
    stripped = [line.rstrip() for line in text.split("\n")]
    lines = "\n".join(stripped)
    return _BLANK_LINES.sub("\n\n\n", lines).strip("\n")
