"""A family of products pays each trunk once, and is held against scratch runs of the same losses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from outgrow.experiments.__main__ import main
from outgrow.experiments.ends import End, write_ends
from outgrow.experiments.products import answer, families, markdown
from outgrow.model.base.errors import UserError


def end(arm: str, size: int, tokens: int, flops: float, loss: float, *, inherited: float = 0.0) -> End:
    return End(
        name=f"{arm}-{size}-{tokens}",
        arm=arm,
        optimizer="muon",
        learning_rate=0.02,
        batch_tokens=4096,
        seed=0,
        parameters=size,
        tokens=tokens,
        flops=flops,
        source_flops=inherited,
        val_loss=loss,
        eval_tokens=1000,
        device="cpu",
        data="text",
    )


# scratch pays tokens × size; the small product ends after 10 of which 8 are its trunk
SCRATCH = [
    *(end("scratch", 1, 5, 5.0, 4.0), end("scratch", 1, 10, 10.0, 3.0)),
    *(end("scratch", 2, 10, 20.0, 3.0), end("scratch", 2, 20, 40.0, 2.0)),
    *(end("scratch", 4, 20, 80.0, 2.0), end("scratch", 4, 40, 160.0, 1.0)),
]
MIDDLE = end("middle", 2, 15, 30.0, 2.0, inherited=8.0)  # its own trunk is 26 of the 30
LARGE = end("large", 4, 20, 80.0, 1.0, inherited=34.0)


def test_each_trunk_is_paid_once_and_scratch_is_read_at_each_products_loss() -> None:
    (family,) = families([*SCRATCH, MIDDLE, LARGE])
    # the large one with all that it inherited: 114; the middle one's decay: 38 − 34; the small one's: 10 − 8
    assert family.flops == 114.0 + 4.0 + 2.0
    assert [product.scratch_flops for product in family.products] == pytest.approx([10.0, 40.0, 160.0])
    assert family.saving == pytest.approx(1 - 120 / 210)
    assert answer([family]) == (
        "3 products, each grown from the trunk of the one before, take 43 % fewer FLOPs than 3 scratch runs "
        "that end at the same losses (one seed: not decided; seed 0)."
    )


def test_a_loss_that_scratch_never_reached_gives_no_saving() -> None:
    (family,) = families([*SCRATCH, MIDDLE, dataclasses.replace(LARGE, val_loss=0.5)])
    assert family.saving is None
    assert "outside of the range" in answer([family])
    assert "| out of range |" in markdown([family])


@pytest.mark.parametrize(
    ("ends", "fault"),
    [
        (SCRATCH[:2], "two sizes or more; found 1"),
        (
            [*SCRATCH[2:], end("small", 1, 5, 5.0, 4.0), MIDDLE, LARGE],
            "1 parameters: no scratch arm.*found small",
        ),
        ([*SCRATCH, MIDDLE], "4 parameters: expected one grown arm, the product of this size; found none"),
        ([*SCRATCH, MIDDLE, dataclasses.replace(LARGE, source_flops=50.0)], "not grown from that product"),
        ([*SCRATCH, MIDDLE, dataclasses.replace(LARGE, seed=1)], "no seed has a product of every size"),
        ([*SCRATCH, dataclasses.replace(MIDDLE, data="other"), LARGE], "data: 2 different ones"),
    ],
)
def test_what_is_no_family_is_refused(ends: list[End], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        families(ends)


def test_the_door_writes_the_table_and_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ends(tmp_path / "ends.json", [*SCRATCH, MIDDLE, LARGE])
    assert main(["family", str(tmp_path / "ends.json"), "--out", str(tmp_path / "out")]) == 0
    assert "43 % fewer FLOPs" in capsys.readouterr().out
    names = ["ends.json", "family.csv", "table.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
