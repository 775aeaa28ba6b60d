"""The effective speed-up, by hand: scratch's curve is drawn here, and every arm's worth is read off it."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from helpers.runs import fabricate
from outgrow.experiments.__main__ import main
from outgrow.experiments.ends import OPTIONAL, RECORD, End, read_ends, write_ends
from outgrow.experiments.figure import INK
from outgrow.experiments.grown_run import Growth
from outgrow.experiments.horizon_answer import answer
from outgrow.experiments.horizon_picture import COLOURS, GREY, build
from outgrow.experiments.horizon_report import markdown, read_inputs, table, write
from outgrow.experiments.horizons import BaselineCurve, baseline, best_points, worths
from outgrow.experiments.run_start import RunStart
from outgrow.experiments.study_file import HERE
from outgrow.experiments.table import check_table
from outgrow.model.base.errors import UserError
from outgrow.train.data.shards import fingerprint, write_manifest

BASE = End("x", "scratch", "adamw", 1e-2, 4096, 0, 1000, 20_000, 1e12, 0.0, 3.0, 4096, "cpu", "text")


def end(arm: str, flops: float, loss: float, **more: object) -> End:
    fields: dict[str, object] = {
        "arm": arm,
        "flops": flops,
        "val_loss": loss,
        "tokens": round(flops / 5e7),
        **more,
    }
    if arm not in ("scratch", "small") and "source_flops" not in more:
        fields.setdefault("growth", Growth(10_000))  # on its way
    return dataclasses.replace(BASE, **fields)  # type: ignore[arg-type]


SCRATCH_ENDS = [end("scratch", 1e12, 3.0), end("scratch", 4e12, 2.5), end("scratch", 16e12, 2.2)]
CONTROL = end("small", 0.5e12, 3.4, parameters=300)  # the small network alone, without which nothing is said


def test_the_curve_is_linear_in_log_cost() -> None:
    curve = BaselineCurve((1e12, 4e12, 16e12), (3.0, 2.5, 2.2))
    assert curve.cost_of(2.75) == pytest.approx(2e12)  # half way between 1 and 4 in log
    assert curve.loss_at(8e12) == pytest.approx(2.35)
    assert (curve.cost_of(3.0), curve.cost_of(2.2)) == pytest.approx((1e12, 16e12))
    assert curve.cost_of(2.1) is curve.cost_of(3.1) is curve.loss_at(0.9e12) is curve.loss_at(17e12) is None


def test_an_arm_is_worth_what_scratch_would_have_paid_for_its_loss() -> None:
    grown = end("grown", 1.5e12, 2.5, source_flops=0.5e12)
    worth = next(w for w in worths([CONTROL, *SCRATCH_ENDS, grown]) if w.point.arm == "grown")
    assert worth.speedup_excluded == pytest.approx(4 / 1.5)
    assert worth.speedup_included == pytest.approx(2.0)
    assert worth.difference == pytest.approx(2.5 - 2.75)  # scratch has 2.75 for the same 2e12
    assert worth.interval_included is None  # one seed


def test_scratch_is_worth_itself_and_nothing_is_read_outside_of_its_range() -> None:
    rows = {
        (w.point.arm, w.point.flops): w for w in worths([CONTROL, *SCRATCH_ENDS, end("better", 30e12, 2.0)])
    }
    assert [rows["scratch", flops].speedup_included for flops in (1e12, 4e12, 16e12)] == pytest.approx(
        [1, 1, 1]
    )
    assert rows["better", 30e12].speedup_included is None
    assert rows["better", 30e12].difference is None


def of_seed(ends: list[End], seed: int, shift: float) -> list[End]:
    return [dataclasses.replace(e, seed=seed, val_loss=e.val_loss + shift) for e in ends]


def test_the_interval_pairs_each_seed_with_scratchs_own() -> None:
    """Seeds that shift scratch and the grown arm alike leave no spread at all."""
    shifts = {0: 0.0, 1: 0.05, 2: -0.02}
    scratch = [e for seed, shift in shifts.items() for e in of_seed(SCRATCH_ENDS, seed, shift)]
    alike = [end("grown", 2e12, 2.5 + shift, seed=seed) for seed, shift in shifts.items()]
    worth = next(w for w in worths([CONTROL, *scratch, *alike]) if w.point.arm == "grown")
    assert [seed.speedup for seed in worth.seeds] == pytest.approx([2, 2, 2])
    assert worth.interval_included == worth.interval_excluded == pytest.approx(0, abs=1e-12)
    assert worth.difference_interval == pytest.approx(0, abs=1e-12)
    spread = [end("grown", 2e12, loss, seed=seed) for seed, loss in enumerate((2.5, 2.65, 2.68))]
    worth = next(w for w in worths([CONTROL, *scratch, *spread]) if w.point.arm == "grown")
    speedups = [4 ** ((3.0 - loss) / 0.5) / 2 for loss in (2.5, 2.6, 2.7)]  # log4 C falls by one in 0.5 nats
    deviation = math.sqrt(sum((s - sum(speedups) / 3) ** 2 for s in speedups) / 2)
    # t of 2 degrees of freedom
    assert worth.interval_included == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-5)
    unpaired = next(w for w in worths([CONTROL, *SCRATCH_ENDS, *spread]) if w.point.arm == "grown")
    assert unpaired.interval_included is unpaired.difference_interval is None


def test_a_lucky_seed_that_one_rate_alone_was_run_with_decides_nothing() -> None:
    shared = [end("grown", 1e12, 2.7, learning_rate=1e-3), end("grown", 1e12, 2.8, learning_rate=2e-3)]
    (point,) = best_points([*shared, end("grown", 1e12, 2.0, learning_rate=2e-3, seed=1)])
    assert point.learning_rate == 1e-3


def test_the_best_rate_is_taken_and_an_edge_is_named() -> None:
    grid = [
        end("grown", 1e12, loss, learning_rate=rate) for rate, loss in ((1e-3, 2.9), (2e-3, 2.7), (4e-3, 2.8))
    ]
    (point,) = best_points(grid)
    assert (point.learning_rate, point.val_loss, point.at_edge) == (2e-3, 2.7, False)
    assert best_points(grid[:2])[0].at_edge


def test_the_baseline_is_the_best_that_scratch_can_have() -> None:
    muon = [end("scratch", 1e12, 2.8, optimizer="muon"), end("scratch", 4e12, 2.6, optimizer="muon")]
    curve = baseline(best_points([*SCRATCH_ENDS, *muon]))
    assert curve == BaselineCurve((1e12, 4e12, 16e12), (2.8, 2.5, 2.2))
    only = worths([*SCRATCH_ENDS, *muon], against=lambda point: point.optimizer == "muon")
    adamw = next(w for w in only if w.point.optimizer == "adamw" and w.point.flops == 1e12)
    assert adamw.speedup_included is None  # 3.0 is above all that Muon measured


@pytest.mark.parametrize(
    ("ends", "fault"),
    [
        ([end("grown", 1e12, 2.0)], "no scratch arm"),
        ([SCRATCH_ENDS[0]], "1 horizons with falling losses; a curve needs two or more"),
        (
            [*SCRATCH_ENDS, end("grown", 1e12, 2.0, data="other")],
            r"data: 2 different ones \(other of x, text of x\)",
        ),
        ([*SCRATCH_ENDS, end("grown", 1e12, 2.0, eval_tokens=1)], "eval_tokens: 2 different ones"),
        (
            [
                *SCRATCH_ENDS,
                CONTROL,
                end("a", 1e12, 2.0, precision="fp32"),
                end("b", 1e12, 2.0, precision="bf16"),
            ],
            r"precision: 2 different ones \(bf16 of x, fp32 of x\); compare runs on one precision only",
        ),
        (
            [*SCRATCH_ENDS, CONTROL, end("grown", 1e12, 2.5, batch_tokens=1024)],
            "grown: batches of 1024 tokens, scratch's are of 4096; run scratch with train.batch_tokens=1024",
        ),
        (
            [*SCRATCH_ENDS, dataclasses.replace(SCRATCH_ENDS[0], parameters=7)],
            r"scratch: networks of 7, \d+ parameters, .*count them together \(outgrow family\)",
        ),
        ([*SCRATCH_ENDS, end("grown", 1e12, 2.0)], "no control: every arm has as many parameters as scratch"),
    ],
)
def test_what_cannot_be_compared_is_refused(ends: list[End], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        worths(ends)


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_ends(tmp_path / "ends.json", SCRATCH_ENDS)
    assert read_ends(tmp_path / "ends.json") == SCRATCH_ENDS


@pytest.mark.parametrize("text", ["", "[{}]", "[7]", "{}", "7", "[" * 100_000])
def test_what_is_no_record_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "ends.json").write_text(text)
    with pytest.raises(UserError, match=r"ends\.json: not a record of runs \("):
        read_ends(tmp_path / "ends.json")


@pytest.mark.parametrize("value", [[], "x", None, 0, -1.5])
@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(End)])
def test_an_entry_of_the_record_that_cannot_be_is_told(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "ends.json"
    write_ends(path, SCRATCH_ENDS)
    rows = json.loads(path.read_text())
    rows[1][key] = value
    path.write_text(json.dumps(rows))
    allowed = dict.fromkeys(("name", "arm", "optimizer", "device", "data", "precision"), "x")
    allowed |= dict.fromkeys(("seed", "active", "source_flops"), 0)
    if (value is None and key in OPTIONAL) or (value is not None and value == allowed.get(key)):
        assert len(read_ends(path)) == len(rows)
        return
    with pytest.raises(UserError, match=rf"not a record of runs \((\[1\]\.|.*: ){key}\b"):
        read_ends(path)


@pytest.mark.parametrize("key", ["schedule", "schedule.name", "schedule.floor", "train.batch_tokens"])
def test_a_setting_that_a_record_lacks_is_told(tmp_path: Path, key: str) -> None:
    run = decayed(tmp_path, "run", [200], **{f"settings.{key}": None})
    with pytest.raises(UserError, match=r"run: (settings\.train\.batch_tokens is None|its learning rate)"):
        read_inputs([str(run)])


def test_tokens_count_per_parameter_that_a_token_meets(tmp_path: Path) -> None:
    mixture = end("mixture", 1e12, 2.5, active=500)  # of 1000
    write_ends(tmp_path / "ends.json", [mixture, CONTROL])
    assert read_ends(tmp_path / "ends.json") == [mixture, CONTROL]
    assert [point.tokens_per_parameter for point in best_points([mixture])] == [40]
    assert [point.tokens_per_parameter for point in best_points([CONTROL])] == [10_000 / 300]
    rows = worths([CONTROL, *SCRATCH_ENDS, mixture])
    assert "\n| mixture | adamw | 0.0 M | 40 |" in table(rows)


# ---- how each arm started and what it read -----------------------------------------------------------------

RECEIPT = {"max_delta": 3e-7, "kl": 2e-14}
LOSSLESS = RunStart("lossless", 4.0, True, 3e-7, 2e-14, 0.5, "text")


def text_of(folder: Path, tokens: int) -> str:
    """Write the manifest of a text of so many training tokens; return its fingerprint."""
    folder.mkdir(parents=True)
    splits = {"train": {"tokens": tokens}, "validation": {"tokens": 64}}
    manifest = {"tokenizer": {}, "dtype": "uint16", "splits": splits}
    mark = fingerprint(manifest)
    write_manifest(folder, manifest | {"fingerprint": mark})
    return mark


def test_an_end_tells_how_its_run_started_and_what_it_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text_of(Path("data/own"), 900)  # the same text, cut by its own tokenizer
    mark = text_of(Path("data/own-12345678"), 800)  # and by the source's
    read = {"settings.data": {"name": "own", "corpus": "stdlib"}, "data.fingerprint": mark}
    source = {"path": "runs/s/final", "tokens": 300, "flops": 1500.0, "val_loss": 4.0}
    fabricate(Path("runs"), "scratch", [6.0, 5.0, 4.0], folder="s", **read)
    grown = read | {"start.operator": "lossless", "start.lossless": True, "start.receipt": RECEIPT}
    run = str(decayed(tmp_path, "grown", [400], losses=[4.0, 3.5, 3.0, 2.5, 2.0], source=source, **grown))
    (end,) = read_inputs([run])[1]
    assert end.start == RunStart("lossless", 4.0, True, 3e-7, 2e-14, 0.5, mark)
    assert end.rereads

    fabricate(Path("again"), "scratch", [6.0, 5.0, 3.9], folder="s", **read)  # the source, trained anew
    Path("runs").rename("old")
    Path("again").rename("runs")
    Path("data/own-12345678").rename("data/away")
    (end,) = read_inputs([run])[1]
    assert end.start == RunStart("lossless", 4.0, True, 3e-7, 2e-14)  # passes and source are not known
    assert end.rereads is None


def test_passes_of_a_mixture_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its texts is read as often as it says."""
    monkeypatch.chdir(tmp_path)
    mark = text_of(Path("data/own"), 800)
    read = {"settings.data": {"name": "own", "corpus": "stdlib"}, "data.fingerprint": mark}
    run = str(decayed(tmp_path, "run", [200], **read, **{"settings.mixture": {"phases": []}}))
    (end,) = read_inputs([run])[1]
    assert end.start == RunStart("unknown", 5.0)


def test_a_record_keeps_the_start_and_an_older_one_takes_it_from_its_runs(tmp_path: Path) -> None:
    run = str(decayed(tmp_path, "run", [200], losses=[5.0, 4.0, 3.0]))
    (told,) = read_inputs([run])[1]
    assert told.start == RunStart("unknown", 5.0)
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    write_ends(new, [told])
    write_ends(old, [dataclasses.replace(told, start=None, precision=None)])
    assert read_ends(new) == [told]
    assert told.precision == "fp32"
    assert "start" not in old.read_text()
    assert "precision" not in old.read_text()
    for inputs in ([str(old), run], [run, str(old)], [str(old), str(new)]):
        assert read_inputs(inputs)[1] == [told]


def test_a_table_tells_how_each_arm_started_and_what_it_read() -> None:
    scratch = RunStart("scratch", 5.8, passes=0.5)
    ends = [dataclasses.replace(end, start=scratch) for end in SCRATCH_ENDS]
    other = dataclasses.replace(LOSSLESS, val_loss=4.1, max_delta=5e-7, kl=1e-14)
    for seed, start in enumerate((LOSSLESS, other)):
        ends.append(end("grown", 2e12, 2.5, source_flops=0.5e12, seed=seed, name=f"g{seed}", start=start))
    longer = dataclasses.replace(LOSSLESS, passes=1.25, source_data="cut otherwise")
    ends.append(end("longer", 2e12, 2.6, source_flops=0.5e12, start=longer))
    ends.append(end("longer", 1e12, 2.7, source_flops=0.5e12, start=LOSSLESS))
    silent = RunStart("tile", 6.0, False)
    ends.append(end("silent", 2e12, 2.7, source_flops=0.5e12, start=silent))
    block = markdown(worths([CONTROL, *ends]))
    assert block.endswith(
        """
| arm | optimizer | lossless | loss at step 0 | max \\|Δlogit\\| | KL, nats | passes over the text | text of its source |
|---|---|---:|---:|---:|---:|---:|---:|
| grown | adamw | yes | 4.0500 | 5e-07 | 2e-14 | 0.50 | read again |
| longer | adamw | yes | 4.0000 | 3e-07 | 2e-14 | 1.25 | other tokens |
| scratch | adamw | – | 5.8000 | – | – | 0.50 | – |
| silent | adamw | no | 6.0000 | – | – | – | not known |
"""
    )
    untold = [dataclasses.replace(end, start=None) for end in [CONTROL, *ends]]
    assert "How each arm started" not in markdown(worths(untold))


# ---- what a reader is shown --------------------------------------------------------------------------------


def test_the_table_and_the_sentence_say_what_was_measured(tmp_path: Path) -> None:
    grown = [end("grown", 1.5e12, 2.5, source_flops=0.5e12, seed=seed, name=f"g{seed}") for seed in (0, 1)]
    rows = worths([CONTROL, *SCRATCH_ENDS, *grown])
    line = next(line for line in table(rows).splitlines() if line.startswith("| grown"))
    assert line == "| grown | adamw | 0.0 M | 30 | 0.01* | 0, 1 | 2.00 | 2.5000 | 2.67 | 2.00 | -0.2500 |"
    assert answer(rows) == (
        "At 30 tokens a parameter growth pays (2 seeds: not decided): grown is worth S = 2.00 against scratch, everything "
        "paid, and S = 2.67 where the source is there already (seeds 0, 1). The control, small trained on for 0.50 TFLOP, ends 0.900 nats higher than grown for 2.00."
    )
    losing = worths([CONTROL, *SCRATCH_ENDS, end("grown", 4e12, 2.6)])
    assert "growth does not pay (one seed: not decided): grown is worth S = 0.76" in answer(losing)
    three = [end("grown", 4e12, 2.6, seed=seed, name=f"g{seed}") for seed in (0, 1, 2)]
    without_interval = answer(worths([CONTROL, *SCRATCH_ENDS, *three]))
    assert "the seeds do not tell whether growth pays: grown is worth S = 0.76" in without_interval
    assert "nothing can be said" in answer(worths(SCRATCH_ENDS))


def test_the_answer_takes_a_source_as_there_where_the_study_asks_so() -> None:
    """Growing pays then, though with everything paid it does not; the control is the one of the same own FLOPs."""
    grown = [end("grown", 3e12, 2.5, source_flops=3e12, seed=seed, name=f"g{seed}") for seed in (0, 1)]
    longer = [end("small", flops, 2.6, parameters=300) for flops in (3e12, 6e12)]
    rows = worths([*SCRATCH_ENDS, *grown, *longer])
    assert answer(rows, source_paid=False) == (
        "At 60 tokens a parameter the seeds do not tell whether growth pays: grown is worth S = 1.33 against "
        "scratch where the source is there already, and S = 0.67 with everything paid (seeds 0, 1). The "
        "control, small trained on for 3.00 TFLOP, ends 0.100 nats higher than grown for 3.00."
    )  # of two seeds that scratch lacks one of, no interval tells more
    alone = worths([*SCRATCH_ENDS, grown[0], *longer])
    assert "growth pays (one seed: not decided): grown is worth S = 1.33" in answer(alone, source_paid=False)
    assert "growth does not pay (one seed: not decided): grown is worth S = 0.67" in answer(alone)
    assert "small trained on for 6.00 TFLOP" in answer(alone)
    inside = worths([CONTROL, *SCRATCH_ENDS, end("grown", 3e12, 2.5)])
    assert answer(inside, source_paid=False) == answer(inside)  # without a source there is one way to count


@pytest.mark.parametrize(
    ("flops", "loss", "sentence"),
    [  # scratch: 3.0 for 1, 2.5 for 4, 2.2 for 16 TFLOP
        (20e12, 2.0, "scratch ends too early to tell whether growth pays: grown is worth S > 0.80 against"),
        (8e12, 2.0, "growth pays (one seed: not decided): grown is worth S > 2.00 against"),
        (2e12, 3.5, "growth does not pay (one seed: not decided): grown is worth S < 0.50 against"),
        (0.5e12, 3.5, "scratch begins too late to tell whether growth pays: grown is worth S < 2.00 against"),
    ],
)
def test_outside_of_scratch_s_curve_a_speed_up_has_a_bound(flops: float, loss: float, sentence: str) -> None:
    rows = worths([CONTROL, *SCRATCH_ENDS, end("grown", flops, loss)])
    assert sentence in answer(rows)
    cells = next(line for line in table(rows).splitlines() if line.startswith("| grown")).split(" | ")
    bound = sentence.split("S ")[1].removesuffix(" against")
    assert cells[8:10] == [bound, bound]


def test_seeds_without_a_speed_up_are_judged_by_their_difference_at_equal_flops() -> None:
    ends = [CONTROL]
    for seed, last in enumerate((2.1, 2.3, 2.3)):  # the grown end lies below two of them
        for flops, loss in ((1e12, 3.0), (4e12, 2.5), (16e12, last)):
            ends.append(end("scratch", flops, loss, seed=seed, name=f"s{seed}"))
        ends.append(end("grown", 12e12, 2.24, seed=seed, name=f"g{seed}"))
    rows = worths(ends)
    grown = next(row for row in rows if row.point.arm == "grown")
    assert grown.interval_included is None
    differences = [seed.difference for seed in grown.seeds]
    at_equal_flops = [2.5 + (last - 2.5) * math.log(3) / math.log(4) for last in (2.1, 2.3, 2.3)]
    assert differences == pytest.approx([2.24 - loss for loss in at_equal_flops])
    assert "the seeds do not tell whether growth pays: grown is worth S = 1.29 against" in answer(rows)


def test_a_bound_of_the_mean_is_no_verdict_where_its_seeds_lie_on_both_sides() -> None:
    ends = [CONTROL]
    for seed, loss in enumerate((2.4, 1.9, 2.0)):  # in the mean below scratch's last end
        for flops, own in ((1e12, 3.0), (4e12, 2.5), (16e12, 2.2)):
            ends.append(end("scratch", flops, own, seed=seed, name=f"s{seed}"))
        ends.append(end("grown", 15e12, loss, seed=seed, name=f"g{seed}"))
    rows = worths(ends)
    grown = next(row for row in rows if row.point.arm == "grown")
    assert grown.speedup(source_paid=True).value is None
    assert grown.difference == pytest.approx(2.1 - 2.22, abs=0.01)
    assert grown.difference_interval == pytest.approx(0.66, abs=0.01)
    assert "the seeds do not tell whether growth pays: grown is worth S > 1.07 against" in answer(rows)
    alike = [
        replaced
        if replaced.arm != "grown"
        else dataclasses.replace(replaced, val_loss=2.0 + 0.01 * replaced.seed)
        for replaced in ends
    ]
    assert "growth pays: grown is worth S > 1.07 against" in answer(worths(alike))


def test_an_arm_below_scratch_s_last_end_is_not_passed_over_for_a_worse_one_in_range() -> None:
    better, worse = end("better", 20e12, 2.0), end("worse", 20e12, 2.4)
    assert "better is worth S > 0.80" in answer(worths([CONTROL, *SCRATCH_ENDS, better, worse]))


@pytest.mark.parametrize(("loss", "word"), [(2.6, "0.100 nats higher"), (2.35, "0.150 nats lower")])
def test_the_control_stands_in_the_headline_and_is_no_grown_arm(loss: float, word: str) -> None:
    """The control is the network with fewer parameters, whatever its name: here it is worth more than growth."""
    grown = end("grown", 2e12, 2.5)
    controls = [end("longer", flops, loss, parameters=300) for flops in (0.5e12, 1.9e12, 8e12)]
    assert answer(worths([*SCRATCH_ENDS, grown, *controls])) == (
        "At 40 tokens a parameter growth pays (one seed: not decided): grown is worth S = 2.00 against scratch, everything paid "
        f"(seed 0). The control, longer trained on for 1.90 TFLOP, ends {word} than grown for 2.00."
    )


def test_the_picture_names_each_arm_at_its_end(tmp_path: Path) -> None:
    figure = build(worths([CONTROL, *SCRATCH_ENDS, end("grown", 2e12, 2.5)]))
    losses, speedups = figure.axes
    assert {text.get_text() for text in losses.texts} == {"grown", "scratch", "small, the control"}
    assert {text.get_text() for text in speedups.texts} == {"grown 2.00", "scratch"}
    beyond = build(worths([CONTROL, *SCRATCH_ENDS, end("grown", 20e12, 2.0)]))
    assert "grown > 0.80" in {text.get_text() for text in beyond.axes[1].texts}
    assert "^" in {line.get_marker() for line in beyond.axes[1].lines}  # at least so much
    near = [end(name, 2e12, loss) for name, loss in (("one", 2.5), ("other", 2.501))]
    drawn = build(worths([CONTROL, *SCRATCH_ENDS, *near]))
    drawn.draw_without_rendering()
    names = [text for text in drawn.axes[0].texts if text.get_text().startswith("o")]
    one, other = map(Text.get_window_extent, names)  # of the text, without the line to its point
    assert not one.overlaps(other)
    assert [name.arrow_patch is not None for name in names] == [True, True]
    for name in names:  # the end that lies under the other is told by its line
        begin, *_, last = name.arrow_patch.get_path().vertices
        assert (
            min(np.hypot(*(point - drawn.axes[0].transData.transform(name.xy))) for point in (begin, last))
            < 1
        )


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_few_lines_stand_out_and_the_others_are_grey() -> None:
    many = [end(f"arm{number}", 2e12, 2.5 + number / 100) for number in range(7)]
    figure = build(worths([CONTROL, *SCRATCH_ENDS, *many]))
    named = {text.get_text() for text in figure.axes[0].texts}
    assert named == {"arm0", "arm1", "arm2", "arm3", "scratch", "small, the control"}
    colours = [line.get_color() for line in figure.axes[0].get_lines()]
    assert colours.count(GREY) == 3
    assert len(set(colours)) == 7
    assert legend_of(figure) == ["open: no interval (one seed)", "3 other lines: see the table"]


def test_among_many_lines_those_stand_out_that_answer() -> None:
    """The arm of the headline, which alone goes on, and the best two at the horizon that the others share."""
    short = {"tokens": 20_000}  # a second horizon is of the headline's arm alone, and better than the rest
    many = [end(f"arm{number:02}", 2e12, 2.5 + number / 100, **short) for number in range(11)]
    ends = [*many, end("long", 2e12, 2.8, **short), end("long", 8e12, 2.3)]
    ends += [end("later", 2e12, 2.85, **short), end("later", 6e12, 2.6)]
    rows = worths([CONTROL, *SCRATCH_ENDS, *ends])
    figure = build(rows)
    named = {text.get_text() for text in figure.axes[0].texts}
    assert named == {"long", "arm00", "arm01", "scratch", "small, the control"}
    assert legend_of(figure)[-1] == "10 other lines: see the table"
    worth = {text.get_text() for text in figure.axes[1].texts}
    assert worth == {
        "0.87",
        "long 1.26",
        "arm00 2.00",
        "arm01 1.95",
        "scratch",
    }  # both ends of the headline's


def test_the_control_stands_where_scratch_has_its_flops() -> None:
    """Its own tokens a parameter are as many more as it is smaller; ends of one cost are compared."""
    controls = [end("small", flops, 2.9, parameters=300) for flops in (2.01e12, 3e12)]
    figure = build(worths([*SCRATCH_ENDS, end("grown", 2e12, 2.5), *controls]))
    (line,) = [
        line for line in figure.axes[1].get_lines() if len(line.get_xdata()) == 2 and line.get_color() != INK
    ]
    assert list(line.get_xdata()) == pytest.approx([40, 60])  # 2.01 is 2 in whole steps


def test_names_leave_the_texts_of_the_axes_free() -> None:
    figure = build(
        worths([CONTROL, *SCRATCH_ENDS, *(end("stack", *at) for at in ((2e12, 2.6), (8e12, 2.345)))])
    )
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[1].texts]
    assert all(not one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_numbers_of_ticks_do_not_touch() -> None:
    """At 5.51 and 6.43 TFLOP they would; that of the more expensive end stays."""
    scratch = [end("scratch", flops, loss) for flops, loss in ((1e12, 3.0), (5.51e12, 2.5), (6.43e12, 2.4))]
    figure = build(worths([CONTROL, *scratch, end("grown", 2e12, 2.6)]))
    ticks = figure.axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["1", "", "6.43"]


def test_a_tick_stands_where_its_ends_do() -> None:
    figure = build(worths([CONTROL, *SCRATCH_ENDS, end("grown", 2e12, 2.5, tokens=40_400)]))
    (place,) = figure.axes[1].get_xticks()
    assert place == pytest.approx(40.4)
    assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == ["40"]


def markers(axes: Axes, colour: str, shape: str) -> dict[float, Any]:
    """The faces of one arm's markers by the speed-ups that they stand at."""
    points = [line for line in axes.get_lines() if line.get_marker() == shape and line.get_color() == colour]
    return {round(float(line.get_ydata()[0]), 2): line.get_markerfacecolor() for line in points}  # type: ignore[index]


def test_an_end_without_an_interval_is_open_and_the_legend_says_why() -> None:
    ends = [CONTROL]
    for seed, last in enumerate((2.1, 2.3, 2.3)):
        for flops, loss in ((1e12, 3.0), (4e12, 2.5), (16e12, last)):
            ends.append(end("scratch", flops, loss, seed=seed, name=f"s{seed}"))
        for flops, loss in ((2e12, 2.6), (12e12, 2.24)):  # the second lies below two of scratch's ends
            ends.append(end("grown", flops, loss, seed=seed, name=f"g{seed}"))
    figure = build(worths(ends))
    assert legend_of(figure) == ["open: no interval (a seed's end lies outside of its scratch's curve)"]
    speedups = figure.axes[1]
    assert markers(speedups, COLOURS[0], "o") == {1.52: COLOURS[0], 1.29: "white"}
    assert len(speedups.collections) == 1  # one bar


@pytest.mark.parametrize(
    ("source_paid", "speedup", "teraflop", "way", "title"),
    [
        (True, 2.0, 2.0, "included", "is worth\nS = 2.00 against scratch, everything paid (seed 0)."),
        (
            False,
            2.67,
            1.5,
            "excluded",
            "is worth\nS = 2.67 against scratch where the source is there already (seed 0).",
        ),
    ],
)
def test_the_picture_counts_the_source_one_way(
    source_paid: bool, speedup: float, teraflop: float, way: str, title: str
) -> None:
    grown = end("grown", 1.5e12, 2.5, source_flops=0.5e12)
    figure = build(worths([CONTROL, *SCRATCH_ENDS, grown]), source_paid=source_paid)
    losses, speedups = figure.axes
    assert losses.get_xlabel() == f"TFLOP, the source {way}"
    drawn = [line for line in losses.get_lines() if line.get_color() == COLOURS[0]]
    assert [list(line.get_xdata()) for line in drawn] == [[teraflop]]
    assert markers(speedups, COLOURS[0], "o") == {speedup: "white"}
    assert f"grown {speedup:.2f}" in {text.get_text() for text in speedups.texts}
    assert figure.get_suptitle().endswith(title)


@pytest.mark.parametrize(
    ("study", "first"),
    [
        ("from_a_trained_source", "S = 2.67 against scratch where"),
        ("tiny", "S = 2.00 against scratch, everything"),
    ],
)
def test_a_study_s_question_decides_how_its_source_is_counted(study: str, first: str, tmp_path: Path) -> None:
    write_ends(
        tmp_path / "ends.json", [CONTROL, *SCRATCH_ENDS, end("grown", 1.5e12, 2.5, source_flops=0.5e12)]
    )
    write([str(tmp_path / "ends.json")], tmp_path / study)
    finding = (tmp_path / study / "table.md").read_text().split("\n")[0]
    assert f"grown is worth {first}" in finding
    assert finding in (tmp_path / study / "report.html").read_text()


def test_a_number_stays_beside_its_interval() -> None:
    ends = [CONTROL]
    for seed in (0, 1, 2):
        for flops, loss in ((1e12, 3.0), (4e12, 2.5), (16e12, 2.2)):
            ends.append(end("scratch", flops, loss, seed=seed, name=f"s{seed}"))
        ends.append(end("stack_22M", 6e12, 2.45 + seed / 1000, seed=seed, name=f"g{seed}"))
    assert "S = 0.84 ± 0.01" in build(worths(ends)).get_suptitle()


def test_names_near_the_bottom_of_the_picture_stay_inside_of_it() -> None:
    ends = [end(f"arm{number}", 8e12, 2.21 + number / 1000) for number in range(4)]
    figure = build(worths([CONTROL, *SCRATCH_ENDS, *ends]))
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = sorted(map(Text.get_window_extent, axes.texts), key=lambda box: box.y0)
        assert boxes[0].y0 >= axes.bbox.y0
        arms = [Text.get_window_extent(text) for text in axes.texts if "arm" in text.get_text()]
        assert all(not one.overlaps(other) for one, other in itertools.combinations(arms, 2))


@pytest.mark.slow
def test_a_record_gives_the_files_that_its_runs_gave(tmp_path: Path) -> None:
    write_ends(
        tmp_path / "first.json",
        [
            *(dataclasses.replace(e, name=str(i)) for i, e in enumerate(SCRATCH_ENDS)),
            CONTROL,
            end("grown", 2e12, 2.5, name="grown"),
        ],
    )
    write([str(tmp_path / "first.json")], tmp_path / "once")
    write([str(tmp_path / "once" / "ends.json")], tmp_path / "twice")
    for name in ("table.md", "ends.json", "horizons.png", "horizons.csv"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def decayed(
    tmp: Path, folder: str, horizons: list[int], schedule: dict[str, object] | None = None, **more: Any
) -> Path:
    """The folder of a scratch run whose rate decays to zero."""
    own = {"name": "wsd", "decay_fraction": 0.2, "floor": 0.0, "horizons": horizons, **(schedule or {})}
    changes: dict[str, Any] = {"settings.schedule": own, "settings.optimizer.name": "adamw"}
    changes |= {"settings.train.batch_tokens": 50, "folder": folder, "parameters": 5_000_000}
    losses = more.pop("losses", [5.0, 4.0, 3.0])
    return fabricate(tmp, "scratch", losses, **(changes | more))


def test_runs_without_horizons_that_the_same_wildcard_gathers_are_left_out(tmp_path: Path) -> None:
    """`runs/st-*-t*` gathers an arm from the source `tiny` too, and a run of one budget alone."""
    ends = [
        decayed(
            tmp_path,
            f"st-scratch-s0-t{100 * count}",
            [200, 400],
            losses=[5.0, 4.0, 3.0, 2.0, 1.0][: count + 1],
        )
        for count in (2, 4)
    ]
    others = [
        decayed(tmp_path, "st-lossless-tiny-s0", []),
        decayed(tmp_path, "st-lossless-transfer_x-s0", [], {"name": "constant"}),
    ]
    runs, found, left_out = read_inputs(sorted(map(str, [*ends, *others])))
    assert sorted(run.folder for run in runs) == ends
    assert sorted(one.name for one in found) == [folder.name for folder in ends]
    assert [left.note for left in left_out] == [
        f"left out: {folder.name}, no horizon: its schedule.horizons is empty" for folder in others
    ]
    _, alone, _ = read_inputs([str(others[0])])  # where none has horizons, each is the end of its budget
    assert [one.name for one in alone] == [others[0].name]


def test_runs_of_one_name_under_different_parents_stay_two(tmp_path: Path) -> None:
    one = decayed(tmp_path / "a", "run", [200], losses=[5.0, 4.0, 3.0])
    other = decayed(tmp_path / "b", "run", [200], losses=[5.0, 4.0, 2.0], seed=1)
    _, found, _ = read_inputs([str(one), str(other)])
    assert [(end.seed, end.val_loss) for end in found] == [(0, 3.0), (1, 2.0)]
    write_ends(tmp_path / "ends.json", found)  # a record of both, beside the runs that it was made of
    again = read_inputs([str(tmp_path / "ends.json"), str(one), str(other)])
    assert again[1] == found


@pytest.mark.parametrize(
    ("losses", "changes", "fault"),
    [
        ([5.0, 4.0, 3.0], {"folder": "copy"}, r"differ in name \(run and copy\): leave one out"),
        ([5.0, 4.0, 2.5], {}, r"differ in val_loss \(3.0 and 2.5\): leave one out"),
        ([5.0, 4.0, 2.5], {"seed": 1, "settings.train.context": 16}, r"their context \(train.context\) is"),
        (
            [5.0, 4.0, 2.5],
            {"seed": 1, "settings.optimizer.weight_decay": 0.1},
            r"no two seeds of one arm: .* optimizer.weight_decay \(absent and 0.1\)",
        ),
    ],
)
def test_ends_that_are_no_two_seeds_are_refused(
    losses: list[float], changes: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    """They would be averaged as seeds: a copy, a run trained anew, another measure, another setting."""
    one = decayed(tmp_path / "a", "run", [200])
    other = decayed(tmp_path / "b", **{"folder": "run", "horizons": [200], "losses": losses, **changes})
    with pytest.raises(UserError, match=fault):
        read_inputs([str(one), str(other)])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["{}/nothing"], "there is nothing; expected a folder that `outgrow train` wrote"),
        (["{}/no.json"], "not a record of runs"),
        (["{}/ends.json", "--out", "/proc/nowhere"], "/proc/nowhere: could not be written"),
    ],
)
def test_the_door_tells_each_fault_in_a_line(
    arguments: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ends(
        tmp_path / "ends.json", [dataclasses.replace(e, name=str(i)) for i, e in enumerate(SCRATCH_ENDS)]
    )
    assert main(["horizons", *(argument.format(tmp_path) for argument in arguments)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert fault in message


@pytest.mark.slow
def test_a_study_of_horizons_has_page_csv_and_wandb_like_any_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, object] = {}
    here = {"disabled": False, "offline": True, "dir": "wandb/offline-run-1/files"}
    run = types.SimpleNamespace(summary={}, log=seen.update, finish=lambda: None, **here)
    monkeypatch.setattr(wandb, "init", lambda **options: seen.update(options) or run)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    grown = [end("grown", 1.5e12, 2.5, seed=seed, name=f"g{seed}") for seed in (0, 1)]
    scratch = [dataclasses.replace(e, name=str(i)) for i, e in enumerate(SCRATCH_ENDS)]
    write_ends(tmp_path / "ends.json", [*scratch, CONTROL, *grown])
    out = tmp_path / "own"
    assert main(["horizons", str(tmp_path / "ends.json"), "--out", str(out), "--wandb"]) == 0
    names = ["ends.json", "horizons.csv", "horizons.png", "report.html", "table.md"]
    assert sorted(path.name for path in out.iterdir()) == names
    page = (out / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import", page)
    sentence = "growth pays (2 seeds: not decided): grown is worth S = 2.67 against scratch"
    assert sentence in page
    assert sentence in capsys.readouterr().out
    with (out / "horizons.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["seeds"] for line in lines] == ["0 1", "0", "0", "0", "0"]
    assert float(lines[0]["speedup_included"]) == pytest.approx(4 / 1.5)
    assert lines[-1]["speedup_included"] == ""  # the control is out of range
    assert (seen["group"], seen["mode"]) == ("own", "offline")
    assert sentence in run.summary["answer"]
    assert [row[0] for row in seen["comparison"].data] == [line["arm"] for line in lines]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["operators", "tiny", "when_growth_pays"])
def test_the_table_of_a_study_is_what_its_record_gives(name: str) -> None:
    rows = worths(read_ends(HERE / name / RECORD))
    check_table(HERE / name / "README.md", markdown(rows))
    assert (HERE / name / "table.md").read_text() == markdown(rows)


def test_scratch_under_another_name_and_a_larger_flat_model_are_no_growth() -> None:
    other_name = end("scratch_lower", 4e12, 2.3, growth=None)
    larger = end("flat_12_layers", 16e12, 2.1, parameters=1500, growth=None)
    grown = end("grown", 4e12, 2.55)
    told = answer(worths([CONTROL, *SCRATCH_ENDS, other_name, larger, grown]))
    assert "growth does not pay (one seed: not decided): grown is worth" in told
    assert "The control, small trained on" in told


def test_an_arm_of_one_seed_is_worth_what_it_is_on_the_curve_of_that_seed() -> None:
    """The mean of scratch's seeds would make a lucky seed of an arm a better growth."""
    lucky = [dataclasses.replace(one, seed=1, val_loss=one.val_loss + 0.5) for one in SCRATCH_ENDS]
    grown = end("grown", 4e12, 2.55)
    alone = worths([CONTROL, *SCRATCH_ENDS, grown])[0]
    beside = worths([CONTROL, *SCRATCH_ENDS, *lucky, grown])[0]
    assert alone.point.arm == beside.point.arm == "grown"
    assert beside.speedup_included == pytest.approx(alone.speedup_included)
    assert beside.difference == pytest.approx(alone.difference)


def test_a_headline_speaks_of_an_arm_with_seeds_enough_before_one_of_a_longer_horizon() -> None:
    seeds = (0, 1, 2)
    scratch = [dataclasses.replace(one, seed=seed) for one in SCRATCH_ENDS for seed in seeds]
    three = [dataclasses.replace(end("three", 4e12, 2.55), seed=seed) for seed in seeds]
    longer = dataclasses.replace(end("one", 4e12, 2.5), tokens=three[0].tokens * 2)
    assert "three is worth" in answer(worths([CONTROL, *scratch, *three, longer]))


def test_an_answer_says_at_which_shorter_horizon_the_arm_paid() -> None:
    seeds = (0, 1, 2)
    scratch = [dataclasses.replace(one, seed=seed) for one in SCRATCH_ENDS for seed in seeds]
    early = [dataclasses.replace(end("grown", 2e12, 2.5), seed=seed) for seed in seeds]
    late = [dataclasses.replace(end("grown", 8e12, 2.5), seed=seed, tokens=4_000_000) for seed in seeds]
    told = answer(worths([CONTROL, *scratch, *early, *late]))
    sooner, later = (end("", 2e12, 2.5).tokens_per_parameter, late[0].tokens_per_parameter)
    assert told.startswith(f"At {later:.0f} tokens a parameter growth does not pay: grown is worth")
    assert f" At {sooner:.0f} it paid: S = 2.00 ± 0.00. The control" in told
    assert "it paid" not in answer(worths([CONTROL, *scratch, *early]))  # it pays at its end
    assert "it paid" not in answer(worths([CONTROL, *scratch, *late]))  # it never did


def test_a_horizon_that_scratch_has_of_one_seed_alone_takes_nothing_from_the_others() -> None:
    seeds = (0, 1, 2)
    scratch = [dataclasses.replace(one, seed=seed) for one in SCRATCH_ENDS for seed in seeds]
    arm = [dataclasses.replace(end("grown", 4e12, 2.55), seed=seed) for seed in seeds]
    longer = end("scratch", 64e12, 2.0)
    without, beside = (worths([CONTROL, *scratch, *more, *arm])[0] for more in ((), (longer,)))
    assert beside.speedup_included == pytest.approx(without.speedup_included)
    assert beside.interval_included == pytest.approx(0.0)
    # a gap within the curve would be bridged by a straight line that lies above it
    gap = [one for one in scratch if one.seed == 0 or one.flops != 4e12]
    assert worths([CONTROL, *gap, *arm])[0].interval_included is None
