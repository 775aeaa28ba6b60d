"""The learned operators: what each of them is asked for; nothing is learned here, and no torch imported.

A learned growth is the plan of a fixed operator (`width`) and a layer map, whose written weights are then
fitted on text, or on the source's own layers (`growth.learned.learn`). Its certificate is not exact, and says
which part is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outgrow.model.base.errors import UserError, unknown
from outgrow.model.keys import is_number

STARTS = ("exact", "random")
PREDICTIONS = ("mean", "random")
KEPT = ".learning"  # ends the name of the folder of what is kept beside an unfinished one
LEAST_LAYERS = 3  # of a source whose layers are predicted from their neighbours
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
    _check_rate(learning_rate)
    if start not in STARTS:
        unknown("start", start, STARTS)
    text = _checked_text("ligo", text)
    rate = float(learning_rate)
    return Ligo(text, width, steps, batch_tokens, window, rate, start)


@dataclass(frozen=True)
class Lesa:
    """New layers predicted from their neighbours; see `lesa`."""

    width: str
    epochs: int
    rows: int
    hidden: int
    learning_rate: float
    norm_weight: float
    start: str
    text: None = None  # it learns on the source's own layers

    @property
    def reason(self) -> str:
        """The part that is learned, as a reason of the certificate."""
        return (
            "operator 'lesa': new layers are predicted from their neighbours, so what is kept is measured "
            "and not proved"
        )


def lesa(
    *,
    width: str = "lossless",
    epochs: int = 5,
    rows: int = 256,
    hidden: int = 256,
    learning_rate: float = 0.001,
    norm_weight: float = 0.00005,
    start: str = "mean",
) -> Lesa:
    """LESA (2502.13794): between two layers stands what a small network predicts from both, in the
    coordinates of the singular vectors that all layers share; it learns on the source's own layers.

    Args:
        width: the operator by which a predicted layer grows, as all others do.
        epochs: over the source's inner layers.
        rows: of a matrix in a batch.
        hidden: units of the network's two hidden layers.
        learning_rate: of AdamW, constant.
        norm_weight: λ of the Frobenius norms in the loss; the rest is the mean square.
        start: `mean` (the network adds to the mean of both, nothing at first) or `random` (as in the paper).
    """
    _check_whole(rows=rows, hidden=hidden)
    if type(epochs) is not int or not 1 <= epochs <= MOST_TOKENS:
        raise UserError(f"epochs {epochs!r}: expected a whole number from 1 to {MOST_TOKENS:,}")
    _check_rate(learning_rate)
    if not is_number(norm_weight) or not 0 <= norm_weight < 1:
        raise UserError(f"norm_weight {norm_weight!r}: expected a number from 0 to below 1, such as 0.00005")
    if start not in PREDICTIONS:
        unknown("start", start, PREDICTIONS)
    rate = float(learning_rate)
    weight = float(norm_weight)
    return Lesa(width, epochs, rows, hidden, rate, weight, start)


LEARNED: dict[str, Callable[..., LeastSquares | Ligo | Lesa]] = {
    "least_squares": least_squares,
    "ligo": ligo,
    "lesa": lesa,
}


def _check_rate(learning_rate: float) -> None:
    if not is_number(learning_rate) or not 0 < learning_rate < 10:
        raise UserError(f"learning_rate {learning_rate!r}: expected a number above 0, such as 0.001")


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
