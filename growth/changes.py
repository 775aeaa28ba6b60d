"""The operators that make a mixture of experts (MoE): what each of them is asked for. `growth.mixture` makes
a plan of it.

`upcycle` and `drop_upcycle` turn a dense MLP into experts, `expert_copy` makes more experts of few. Width,
depth, heads and noise grow in the same plan: it is first made within the source's own family, by the operator
`width`, and its tensors are then handed out to experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outgrow.model.base.errors import UserError, unknown
from outgrow.model.keys import is_number

SPARSE = ("all", "every_other", "last_half")
SCALES = ("down", "split")


@dataclass(frozen=True)
class Upcycling:
    """A dense MLP cut into G blocks of units, of which expert e holds the one of number e mod G; see
    `upcycle` for the rest.
    """

    width: str
    granularity: int | None
    sparse: str | tuple[int, ...]
    router_std: float
    scale: str = "down"
    copy_noise: float = 0.0
    drop: float = 0.0

    def layers(self, count: int) -> tuple[int, ...]:
        """Choose the layers among `count` that get experts.

        Raises:
            UserError: the list names a layer that is none.
        """
        match self.sparse:
            case "all":
                return tuple(range(count))
            case "every_other":
                return tuple(range(1, count, 2))
            case "last_half":
                return tuple(range(count // 2, count))
        layers = range(count)
        wrong = [layer for layer in self.sparse if type(layer) is not int or layer not in layers]
        if wrong:
            raise UserError(
                f"sparse: {wrong[0]!r} is no target layer; the target has layers 0 to {count - 1}"
            )
        numbers = {int(layer) for layer in self.sparse}
        return tuple(sorted(numbers))


@dataclass(frozen=True)
class ExpertCopy:
    """Every expert copied as often as the target has more of them; see `expert_copy`."""

    width: str
    delta: float


def upcycle(
    *,
    width: str = "lossless",
    granularity: int | None = None,
    sparse: str | Sequence[int] = "all",
    router_std: float = 0.02,
    scale: str = "down",
    copy_noise: float = 0.0,
) -> Upcycling:
    """Sparse upcycling (2212.05055): every expert a copy of the MLP, a fresh router; granular with virtual
    groups (2410.07524).

    With granularity G the MLP's units are cut into G blocks, expert e holds block e mod G, and the G experts
    of a group have the same router row, so that they are chosen together and make up the whole MLP.

    Args:
        width: the operator by which width grows before the MLP is cut.
        granularity: G; None takes what the target's sizes say, 1 where they say nothing.
        sparse: which layers get experts: `all`, `every_other`, `last_half`, or a list.
        router_std: of the router's fresh rows.
        scale: where what undoes the combine weights stands: on `down_proj` alone (`down`), or its third root
            on gate, up and down (`split`, Megatron's).
        copy_noise: on all experts but those of the first group, relative to each tensor's root mean square.

    Lossless where the combine weights are divided by their sum, whole groups are chosen and the scale stands
    on `down_proj` alone.
    """
    if scale not in SCALES:
        unknown("upcycle scale", scale, SCALES)
    _check_numbers(router_std=router_std, copy_noise=copy_noise)
    return Upcycling(
        width, _checked_granularity(granularity), _checked_layers(sparse), router_std, scale, copy_noise
    )


def drop_upcycle(
    *,
    width: str = "lossless",
    granularity: int | None = None,
    sparse: str | Sequence[int] = "all",
    router_std: float = 0.02,
    drop: float = 0.5,
) -> Upcycling:
    """Drop-Upcycling (2502.19261): as `upcycle`, and of each expert a share `drop` of the units is drawn
    anew.

    One permutation for each layer and expert says which: the same units in gate, up and down (the paper's
    code draws them separately). What replaces them is normal with the mean and the deviation of what they
    were. Not lossless; breaks the symmetry of the copies.
    """
    _check_numbers(router_std=router_std)
    if not 0 < drop <= 1:
        raise UserError(f"drop {drop}: expected a share of each expert's units, above 0 and at most 1")
    parts = _checked_granularity(granularity)
    layers = _checked_layers(sparse)
    return Upcycling(width, parts, layers, router_std, drop=drop)


def expert_copy(*, width: str = "lossless", delta: float = 1e-3) -> ExpertCopy:
    """Copies of experts (2604.19835): n → m·n experts, their router rows copied, each entry of further copies
    moved by U(-delta, delta).

    Copies of one expert have nearly equal logits and are chosen together. So it is lossless with delta = 0
    where a token is sent to m times as many experts as before, or to one expert whose weight is divided by
    itself; at the same number of experts for each token it is not: copies of the first expert take the place
    of the others.
    """
    _check_numbers(delta=delta)
    return ExpertCopy(width, delta)


CHANGES: dict[str, Callable[..., Upcycling | ExpertCopy]] = {
    "upcycle": upcycle,
    "drop_upcycle": drop_upcycle,
    "expert_copy": expert_copy,
}


def _check_numbers(**numbers: float) -> None:
    UserError.collect(
        f"{name} {value!r}: expected a number of at least 0 and below 10"
        for name, value in numbers.items()
        if not is_number(value) or not 0 <= value < 10
    )


def _checked_granularity(granularity: int | None) -> int | None:
    if granularity is None:
        return None
    if type(granularity) is not int or granularity < 1:
        raise UserError(
            f"granularity {granularity!r}: expected a positive whole number, into how many experts an MLP "
            "is cut"
        )
    return granularity


def _checked_layers(sparse: str | Sequence[int]) -> str | tuple[int, ...]:
    if isinstance(sparse, str):
        if sparse not in SPARSE:
            unknown("sparse", sparse, SPARSE)
        return sparse
    is_list = isinstance(sparse, list | tuple)
    if not is_list or not sparse:
        raise UserError(f"sparse {sparse!r}: expected {', '.join(SPARSE)} or a list of target layers")
    return tuple(sparse)
