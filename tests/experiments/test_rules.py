"""A rule of a claim that a comparison does not keep is named, and one that it keeps is not."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from outgrow.experiments.ends import End, write_ends
from outgrow.experiments.grown_run import Growth
from outgrow.experiments.horizon_report import write
from outgrow.experiments.rules import unheld, unrun
from outgrow.experiments.run_start import RunStart
from outgrow.experiments.study_file import load_study

BASE = End("x", "scratch", "muon", 1e-2, 4096, 0, 1000, 20_000, 1e12, 0.0, 3.0, 524_288, "cpu", "text")


def kept() -> list[End]:
    """Ends that keep every rule that an end can tell of: arms of three rates and seeds, the best in the middle,
    scratch and control of two optimizers and batches, five flat sizes at two budgets."""
    ends = []
    growth = Growth(10_000)
    arms: dict[str, dict[str, Any]] = {
        "scratch": {},
        "grown": {"source_flops": 1e11},
        "inside": {"growth": growth},
        "null_control": {"source_flops": 1e11, "parameters": 500},
        **{f"flat{size}": {"parameters": size} for size in (125, 250, 500, 750)},
    }
    rates = {1e-2: 3.1, 2e-2: 3.0, 4e-2: 3.1}
    budgets = (20_000, 40_000)
    for (arm, own), (rate, loss), seed, tokens in itertools.product(
        arms.items(), rates.items(), (0, 1, 2), budgets
    ):
        name = f"{arm}-{rate}-{seed}-{tokens}"
        run = {
            "name": name,
            "arm": arm,
            "seed": seed,
            "learning_rate": rate,
            "val_loss": loss,
            "tokens": tokens,
        }
        ends.append(dataclasses.replace(BASE, **run, **own))
    for arm, parameters in (("scratch", 1000), ("flat500", 500)):
        more = dataclasses.replace(BASE, arm=arm, parameters=parameters, val_loss=9.0)
        ends += [dataclasses.replace(more, optimizer="adamw"), dataclasses.replace(more, batch_tokens=1024)]
    return ends


def named(ends: list[End]) -> list[str]:
    """What is named, but for the rules of which these ends do not tell."""
    return [remark for remark in unheld(ends) if not remark.startswith(("Rule 8,", "Rule 10,"))]


def changed(arm: str, **values: object) -> list[End]:
    return [dataclasses.replace(end, **values) if end.arm == arm else end for end in kept()]  # type: ignore[arg-type]


def test_nothing_is_named_where_every_rule_is_kept() -> None:
    assert named(kept()) == []
    receipt, seen = unheld(kept())
    assert receipt.startswith(
        "Rule 8, receipt: the losses at step 0 and max |Δlogit| of grown, null_control "
    )
    assert seen.startswith("Rule 10, what was seen: grown, null_control may read text again")


WHOLE = RunStart("lossless", 4.0, True, 3e-7, 2e-14, 0.5, "text")


@pytest.mark.parametrize(
    ("start", "remarks"),
    [
        (WHOLE, []),
        (dataclasses.replace(WHOLE, source_data="other"), []),
        (RunStart("source", 4.0, True, passes=0.5, source_data="text"), []),  # nothing grew
        (dataclasses.replace(WHOLE, max_delta=None), ["Rule 8, receipt: none was measured of grown."]),
        (
            dataclasses.replace(WHOLE, passes=None),
            [
                "Rule 10, what was seen: the passes over the text of grown are told when a run starts, not here."
            ],
        ),
        (
            dataclasses.replace(WHOLE, source_data=None),
            ["Rule 10, what was seen: grown may read text again that their source has read."],
        ),
        (
            None,
            [
                "Rule 8, receipt: the losses at step 0 and max |Δlogit| of grown stand in their run.json, "
                "not here.",
                "Rule 10, what was seen: grown may read text again that their source has read; the passes "
                "over the text are told when a run starts, not here.",
            ],
        ),
    ],
)
def test_what_a_record_tells_of_starts_is_not_named_as_missing(
    start: RunStart | None, remarks: list[str]
) -> None:
    ends = []
    for end in kept():
        own = start if end.arm == "grown" else WHOLE if end.source_flops else None
        ends.append(dataclasses.replace(end, start=own))
    assert unheld(ends) == remarks


@pytest.mark.parametrize(
    ("ends", "remark"),
    [
        (changed("scratch", tokens=4_900), "Rule 1, regime: scratch's ends after 4,900 tokens are below 5 "),
        ([end for end in kept() if end.arm != "null_control"], "Rule 2, arms: no null_control beside grown"),
        (
            changed("scratch", optimizer="muon"),
            "Rule 3, baseline: scratch was given muon and batches of 1,024,",
        ),
        (
            [dataclasses.replace(end, batch_tokens=512) for end in kept()],
            "and batches of 512 tokens; a better one may be",
        ),
        (changed("grown", learning_rate=1e-2), "Rule 3, tuning: fewer than 3 learning rates of grown."),
        (
            [*kept(), dataclasses.replace(BASE, learning_rate=8e-2, val_loss=2.9)],
            "Rule 3, tuning: the best learning rate is at the edge of its grid at a horizon of scratch.",
        ),
        (
            [end for end in kept() if end.arm != "flat500" or end.optimizer == "muon"],
            "Rule 3, baseline: the control was not given adamw with batches of 4,096 tokens, which scratch was.",
        ),
        (
            [end for end in kept() if end.arm not in ("flat125", "flat250")],
            "Rule 1, regime: 3 sizes of flat models at 2 budgets",
        ),
        ([end for end in kept() if end.arm != "inside"], "Rule 2, arms: none grows inside its run."),
        (
            [end for end in kept() if end.source_flops == 0 or end.arm == "null_control"],  # a control
            "Rule 2, arms: none starts from a trained source.",
        ),
        (changed("grown", seed=1), "Rule 5, seeds: fewer than 3 of grown; no headline"),
        (changed("grown", eval_tokens=499_999), "Rule 9, validation: 499,999 tokens, fewer than the 500,000"),
    ],
)
def test_what_a_comparison_does_not_keep_is_named(ends: list[End], remark: str) -> None:
    (sentence,) = named(ends)
    assert remark in sentence


def test_arms_of_a_study_without_an_end_are_named() -> None:
    study = load_study("when_growth_pays")
    arms = sorted({study.counts_as(arm) for arm in study.full.arms})
    ends = [dataclasses.replace(BASE, arm=arm) for arm in arms]
    assert unrun("when_growth_pays", ends) is None
    remark = unrun("when_growth_pays", ends[1:])
    assert remark is not None
    assert remark.startswith(f"Rule 12, negative results: {arms[0]} of this study, not run or left out")
    assert unrun("no_study", []) is None


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
