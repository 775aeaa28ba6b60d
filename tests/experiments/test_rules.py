"""A rule of a claim that a comparison does not keep is named, and one that it keeps is not."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from outgrow.experiments.horizon_report import write
from outgrow.experiments.horizons import End, write_ends
from outgrow.experiments.rules import unheld

BASE = End("x", "scratch", "muon", 1e-2, 4096, 0, 1000, 20_000, 1e12, 0.0, 3.0, 524_288, "cpu", "text")


def kept() -> list[End]:
    """Ends that keep every rule: three arms of three rates and seeds, scratch of two optimizers and batches."""
    ends = []
    arms = (("scratch", 0.0), ("grown", 1e11), ("null_control", 1e11))
    for (arm, source), rate, seed in itertools.product(arms, (1e-2, 2e-2, 4e-2), (0, 1, 2)):
        name = f"{arm}-{rate}-{seed}"
        ends.append(
            dataclasses.replace(BASE, name=name, arm=arm, learning_rate=rate, seed=seed, source_flops=source)
        )
    return [*ends, dataclasses.replace(BASE, optimizer="adamw"), dataclasses.replace(BASE, batch_tokens=1024)]


def changed(arm: str, **values: object) -> list[End]:
    return [dataclasses.replace(end, **values) if end.arm == arm else end for end in kept()]  # type: ignore[arg-type]


def test_nothing_is_named_where_every_rule_is_kept() -> None:
    assert unheld(kept()) == []


@pytest.mark.parametrize(
    ("ends", "remark"),
    [
        (changed("scratch", tokens=4_900), "Rule 1, regime: scratch's ends after 4,900 tokens are below 5 "),
        ([end for end in kept() if end.arm != "null_control"], "Rule 2, arms: no null_control beside grown"),
        (
            changed("scratch", optimizer="muon"),
            "Rule 3, baseline: scratch was given muon and batches of 1,024,",
        ),
        (changed("scratch", batch_tokens=512), "and batches of 512 tokens; a better one may be"),
        (changed("grown", learning_rate=1e-2), "Rule 3, tuning: fewer than 3 learning rates of grown."),
        (changed("grown", seed=1), "Rule 5, seeds: fewer than 3 of grown; no headline"),
        (changed("grown", eval_tokens=499_999), "Rule 9, validation: 499,999 tokens, fewer than the 500,000"),
    ],
)
def test_what_a_comparison_does_not_keep_is_named(ends: list[End], remark: str) -> None:
    (named,) = unheld(ends)
    assert remark in named


def test_the_report_and_the_terminal_name_them(tmp_path: Path) -> None:
    scratch = [
        dataclasses.replace(BASE, name=str(number), tokens=20_000 + number, flops=flops, val_loss=loss)
        for number, (flops, loss) in enumerate(((1e12, 3.0), (4e12, 2.5)))
    ]
    small = dataclasses.replace(BASE, name="small", arm="small", parameters=300, val_loss=3.4)
    write_ends(tmp_path / "ends.json", [*scratch, small])
    lines = write([str(tmp_path / "ends.json")], tmp_path / "out")
    assert "Rule 5, seeds: fewer than 3 of scratch, small; no headline is made of these." in lines
    assert "fewer than 3 of scratch, small" in (tmp_path / "out" / "report.html").read_text()
