"""The learned operators: what each of them is asked for; nothing is learned here, and no torch imported.

A learned growth is the plan of a fixed operator (`width`) and a layer map, whose written weights are then
fitted on text (`growth.learned.learn`). Its certificate is not exact, and says which part is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outgrow.model.base.errors import UserError, unknown
from outgrow.model.keys import is_number

STARTS = ("exact", "random")
MOST_TOKENS = 1 << 24  # whose activations in one layer are held at once


@dataclass(frozen=True)
class LeastSquares:
    """Matrices fitted in closed form; see `least_squares`."""

    text: str
    width: str
    tokens: int
    window: int
    ridge: float

    @property
    def reason(self) -> str:
        """The part that is learned, as a reason of the certificate."""
        return (
            "operator 'least_squares': every matrix is fitted on text, so what is kept is measured and not "
            "proved"
        )


def least_squares(
    *,
    text: str | None = None,
    width: str = "lossless",
    tokens: int = 16384,
    window: int = 256,
    ridge: float = 0.01,
) -> LeastSquares:
    """Least squares on the source's own activations, in closed form (ours; no gradient steps).

    Every matrix W of the target is moved, as little as it takes, to where it gives on its own inputs x what
    the source's matrix gives on its inputs y: the minimum of ‖W x − E Wₛ y‖² + λ‖W − W₀‖², where W₀ is what
    the operator `width` and the layer map have written, E copies outputs as that operator does, and λ is
    `ridge` times the mean square of the inputs. Where a source layer works m times, what each of its copies
    adds to the residual stream is fitted to 1/m of it, so that the stream ends where the source's does.

    Args:
        text: a file of text, a folder of text files, or a folder of tokens that a run was trained on.
        width: the operator whose result is fitted.
        tokens: of text, in windows of `window` tokens; an eighth more is held out, to measure on.
        ridge: strength of the pull to W₀.
    """
    _check_whole(tokens=tokens, window=window)
    if not is_number(ridge) or not 0 < ridge < 1e6:
        raise UserError(f"ridge {ridge!r}: expected a number above 0, such as 0.01")
    text = _checked_text("least_squares", text)
    return LeastSquares(text, width, tokens, window, float(ridge))


@dataclass(frozen=True)
class Ligo:
    """Maps that are parameters; see `ligo`."""

    text: str
    width: str
    steps: int
    batch_tokens: int
    window: int
    learning_rate: float
    start: str

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    @property
    def reason(self) -> str:
        """The part that is learned, as a reason of the certificate."""
        return "operator 'ligo': its maps are learned on text, so what is kept is measured and not proved"


def ligo(
    *,
    text: str | None = None,
    width: str = "lossless",
    steps: int = 100,
    batch_tokens: int = 4096,
    window: int = 256,
    learning_rate: float = 0.001,
    start: str = "exact",
) -> Ligo:
    """LiGO (2303.00980): every axis map is a matrix, every tensor a weighted sum over the source's layers;
    both are learned by the training loss, the source frozen.

    Args:
        text: as of `least_squares`, never the validation text.
        width: the operator whose maps are the start.
        steps, batch_tokens, learning_rate: of AdamW, warmed up over 10 steps and lowered to zero.
        start: `exact` (the maps of `width` and the layer map) or `random` (new rows drawn, as in the paper).
    """
    _check_whole(steps=steps, batch_tokens=batch_tokens, window=window)
    if not is_number(learning_rate) or not 0 < learning_rate < 10:
        raise UserError(f"learning_rate {learning_rate!r}: expected a number above 0, such as 0.001")
    if start not in STARTS:
        unknown("start", start, STARTS)
    text = _checked_text("ligo", text)
    rate = float(learning_rate)
    return Ligo(text, width, steps, batch_tokens, window, rate, start)


LEARNED: dict[str, Callable[..., LeastSquares | Ligo]] = {"least_squares": least_squares, "ligo": ligo}


def _check_whole(**numbers: int) -> None:
    UserError.collect(
        f"{name} {value!r}: expected a whole number from 2 to {MOST_TOKENS:,}"
        for name, value in numbers.items()
        if type(value) is not int or not 2 <= value <= MOST_TOKENS
    )


def _checked_text(operator: str, text: str | None) -> str:
    if not isinstance(text, str) or not text:
        raise UserError(
            f"operator {operator!r}: learns on text, and growth.text is missing; give growth.text=FILE, a "
            "folder of text files, or a folder of tokens made by outgrow corpus prepare (never the text that "
            "you validate on)"
        )
    return text
