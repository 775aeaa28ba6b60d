"""From run folders to rows, answer, files and picture, on hand-made curves."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from pathlib import Path

import pytest

from helpers.runs import SOURCE, fabricate
from outgrow.experiments.__main__ import main
from outgrow.experiments.compare import UNLIKE, Comparison, answer, compare, percent
from outgrow.experiments.figure import build, colours_of, loss_range, spread
from outgrow.experiments.publish import write
from outgrow.experiments.table import (
    BEGIN,
    END,
    HEADER,
    amount,
    cells,
    check_table,
    flat_row,
    insert_table,
    markdown,
)
from outgrow.model.base.errors import UserError

SCRATCH_LOSSES = [8.0, 6.0, 5.0, 4.0]


@pytest.fixture
def study(tmp_path: Path) -> list[Path]:
    """Scratch ends at 4.0 after 3,000 FLOPs; lossless is there after 1,500, its source cost 1,500; random_pad
    never."""
    start = {"lossless": True, "receipt": {"max_delta": 3e-13}, "operator_flops": 0.0, "source": SOURCE}
    folders = []
    for seed, shift in enumerate((-0.1, 0.0, 0.1)):
        folders += [
            fabricate(tmp_path, "scratch", [x + shift for x in SCRATCH_LOSSES], seed=seed),
            fabricate(tmp_path, "scratch", [x + shift + 0.1 for x in SCRATCH_LOSSES], seed=seed, rate=2e-3),
            fabricate(
                tmp_path, "lossless", [x + shift for x in (7.0, 5.0, 3.0, 2.5)], seed=seed, start=start
            ),
            fabricate(
                tmp_path, "random_pad", [x + shift for x in (8.0, 6.5, 5.5, 4.25)], seed=seed, source=SOURCE
            ),
        ]
    return folders


def row_of(comparison: Comparison, arm: str):  # type: ignore[no-untyped-def]
    return next(row for row in comparison.best_rows if row.arm == arm)


def test_best_learning_rate_heads_the_table_and_the_grid_stays(study: list[Path]) -> None:
    comparison = compare(study)
    assert [(row.arm, row.learning_rate, row.best) for row in comparison.rows] == [
        ("lossless", 1e-3, True),
        ("scratch", 1e-3, True),
        ("random_pad", 1e-3, True),  # a negative result stays
        ("scratch", 2e-3, False),  # lower than random_pad, and not the best of its arm
    ]
    assert [row.n for row in comparison.rows] == [3, 3, 3, 3]


def test_the_best_learning_rate_is_chosen_on_the_seeds_that_all_rates_share(tmp_path: Path) -> None:
    """On seed 0 the rate 1e-3 is better; its other seed is worse, and must not hand the choice to a rate that
    never ran it."""
    folders = [
        fabricate(tmp_path, "scratch", [8.0, 4.0], seed=0),
        fabricate(tmp_path, "scratch", [8.0, 4.3], seed=1),
    ]
    folders += [fabricate(tmp_path, "scratch", [8.0, 4.1], seed=0, rate=2e-3)]
    best = row_of(compare(folders), "scratch")
    assert (best.learning_rate, best.n, best.final_loss) == (1e-3, 2, pytest.approx(4.15))


def test_rows_hold_the_hand_computed_numbers(study: list[Path]) -> None:
    lossless = row_of(compare(study), "lossless")
    assert (lossless.start_loss, lossless.final_loss) == (7.0, 2.5)
    assert lossless.final_loss_interval == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-4)
    assert lossless.cost.speedup_excluded == pytest.approx(2.0)
    assert lossless.cost.speedup_included == pytest.approx(1.0)
    assert lossless.receipt == 3e-13
    # Seed by seed both curves shift alike, so each seed's own crossing is the mean's and the saving has no
    # spread.
    assert lossless.seed_savings == pytest.approx((0.5, 0.5, 0.5))
    assert lossless.saving_interval == pytest.approx(0.0, abs=1e-9)


def test_a_seeds_saving_is_taken_against_the_same_seed(tmp_path: Path) -> None:
    """Seed 0 needs 1,500 of 3,000 FLOPs; seed 1, against its own slower scratch, 1,000."""
    folders = [
        fabricate(tmp_path, "scratch", SCRATCH_LOSSES, seed=0),
        fabricate(tmp_path, "scratch", [8.0, 7.0, 6.0, 5.0], seed=1),
    ]
    folders += [fabricate(tmp_path, "tile", [7.0, 5.0, 3.0, 2.5], seed=seed) for seed in (0, 1)]
    assert row_of(compare(folders), "tile").seed_savings == pytest.approx((1 - 1500 / 3000, 1 - 1000 / 3000))


def test_cells_say_what_happened(study: list[Path], tmp_path: Path) -> None:
    below = fabricate(tmp_path, "tile", [3.5, 3.4, 3.3, 3.0], source=SOURCE)
    unknown = fabricate(tmp_path, "net2net", [5.0, 4.5, 3.0, 2.9], source=SOURCE | {"flops": None})
    comparison = compare([*study, below, unknown])
    shown = {row.arm: dict(zip(HEADER, cells(row), strict=True)) for row in comparison.best_rows}
    excluded, included = "source excluded: S, saving", "source included: S, saving"
    assert shown["lossless"][excluded] == "2.00 ×, 50 ± 0 %"
    assert shown["lossless"][included] == "1.00 ×, 0 %"
    assert shown["lossless"]["max |Δlogit|"] == "3e-13"
    assert shown["lossless"]["final loss (95 %)"] == "2.500 ± 0.248"
    assert shown["random_pad"][excluded] == "not reached, ends +0.250"
    assert shown["tile"][excluded] == "starts below"
    assert shown["tile"][included] == "2.00 ×, 50 %"
    assert shown["tile"]["final loss (95 %)"] == "3.000 (one seed)"
    assert shown["tile"]["Δ loss at equal FLOPs (excl. / incl.)"] == "−1.000 / −0.650"
    assert shown["net2net"][included] == "source's cost unknown"
    assert [amount(x) for x in (0, 950, 1.6e6, 1e12, 3.456e14)] == ["0", "950", "1.60 M", "1.00 T", "346 T"]


def test_notes_name_what_a_reader_must_know(study: list[Path], tmp_path: Path) -> None:
    unfinished = fabricate(tmp_path, "tile_flat", [5.0, 4.0, 3.9, 3.0])
    (unfinished / "summary.json").unlink()
    tile = fabricate(
        tmp_path, "tile", [7.0, 6.0, 5.0, 3.0], source=SOURCE | {"flops": None}, device="another machine"
    )
    notes = "\n".join(compare([*study, unfinished, tile]).notes)
    for words in (
        "left out: st-tile_flat-lr0.001-s0, incomplete",
        "fewer than 3 seeds (tile)",
        "the arms have different seeds",
        "one learning rate only, not tuned here: lossless, random_pad, tile",
        "scratch: the best learning rate, 0.001, is at the edge of its grid (0.001, 0.002)",
        "no source arm",
        "2 different sources",
        "tile: its source's FLOPs are unknown",
        "different devices",
    ):
        assert words in notes


def test_the_answer_is_computed(study: list[Path], tmp_path: Path) -> None:
    assert answer(compare(study)) == (
        "lossless reaches scratch's final loss with 50 % fewer FLOPs (source excluded; 0 % fewer FLOPs "
        "with it included)"
    )
    without = [folder for folder in study if "lossless" not in folder.name]
    assert (
        answer(compare(without))
        == "no grown arm reaches scratch's final loss; the nearest, random_pad, ends 0.250 nats above it"
    )
    below = fabricate(tmp_path, "tile", [3.5, 3.4, 3.3, 3.0], source=SOURCE)
    expected = (
        "tile starts below scratch's final loss and ends 1.000 nats below it (source excluded; 50 % fewer "
        "FLOPs with it included); one seed: not decided"
    )
    assert answer(compare([*study, below])) == expected
    unknown = fabricate(tmp_path, "net2net", [3.5, 3.4, 3.3, 2.9], source=SOURCE | {"flops": None})
    assert answer(compare([*study, unknown])).endswith(
        "1.100 nats below it (source excluded; its cost is unknown); one seed: not decided"
    )
    assert (percent(0.41), percent(-0.12)) == ("41 % fewer", "12 % more")


def test_the_control_arm_is_a_row_but_never_the_answer(study: list[Path], tmp_path: Path) -> None:
    control = fabricate(
        tmp_path, "source", [5.0, 3.5, 3.0, 2.0], source=SOURCE, every=200, flops_per_token=5.0
    )
    comparison = compare([*study, control])
    said = (
        "the source arm, trained longer and not bigger, ends at 2.000 after the same FLOPs, lower than or "
        "equal to: lossless, random_pad"
    )
    assert said in comparison.notes
    assert row_of(comparison, "source").cost.speedup_excluded == pytest.approx(3000 / (1000 * 2 / 3))
    assert answer(comparison).startswith("lossless reaches")


@pytest.mark.slow
def test_csv_round_trip(study: list[Path], tmp_path: Path) -> None:
    comparison = compare(study)
    write(comparison, tmp_path / "out")
    with (tmp_path / "out/comparison.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(comparison.rows)
    for line, row in zip(found, comparison.rows, strict=True):
        for key, value in flat_row(row).items():
            written = (
                "" if value is None else str(value) if not isinstance(value, float) else float(line[key])
            )
            assert (float(line[key]) if isinstance(value, float) else line[key]) == (
                value if isinstance(value, float) else written
            )
    assert [line["seeds"] for line in found] == ["0 1 2"] * 4
    whole = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [row["final_loss"] for row in whole["rows"]] == [row.final_loss for row in comparison.rows]
    assert len(whole["runs"]) == 12


@pytest.mark.slow
def test_the_door_writes_every_file_and_a_page_that_needs_no_network(
    study: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", *map(str, study), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("comparison.csv", "comparison.json", "convergence.png", "report.html", "table.md"),
    ]
    assert "50 % fewer FLOPs" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import", page)
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "a &lt;test&gt; machine" in page
    assert "Method" in page
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_differs_beside_the_growth_stands_at_the_top_everywhere(
    study: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = {"settings.optimizer": {"learning_rate": 1e-3, "weight_decay": 0.3}}
    assert UNLIKE not in markdown(compare(study))
    folders = [*study, fabricate(tmp_path, "tile", [7.0, 5.0, 3.0, 2.6], **tuned)]
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    told = "optimizer.weight_decay: null (lossless, random_pad, scratch); 0.3 (tile)"
    texts = {"terminal": capsys.readouterr().out} | {
        name: (tmp_path / "out" / name).read_text() for name in ("table.md", "report.html")
    }
    for text in texts.values():
        assert 0 <= text.index(UNLIKE) < text.index(told) < text.index("step-0 loss")
    assert json.loads((tmp_path / "out/comparison.json").read_text())["differences"] == [told]


def test_a_folder_that_cannot_be_written_is_one_clear_error(
    study: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out in ("/proc/nowhere", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        assert main(["compare", *map(str, study), "--out", out]) == 2
        assert "could not be written" in capsys.readouterr().err


def test_the_door_tells_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_readmes_table_is_the_one_the_runs_gave(study: list[Path], tmp_path: Path) -> None:
    table, readme = markdown(compare(study)), tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    insert_table(readme, table)
    insert_table(readme, table)
    check_table(readme, table)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    readme.write_text(text.replace("2.00 ×, 50 ± 0 %", "2.00 ×, 60 ± 0 %"))
    with pytest.raises(UserError, match=r"the table is not what the runs gave.*60 ± 0"):
        check_table(readme, table)
    for wrong in ("no markers", END, f"{BEGIN}\n{BEGIN}\n{END}", f"{END}\n{BEGIN}"):
        readme.write_text(wrong)
        with pytest.raises(UserError, match="expected one line"):
            insert_table(readme, table)


def test_the_picture_shows_every_seed_every_mean_and_the_line(study: list[Path]) -> None:
    comparison = compare(study)
    figure = build(comparison)
    main_axes, tokens, included = figure.axes
    rows, runs = 3, 9  # the best learning rates only
    for axes in (tokens, included):
        thin = [line for line in axes.lines if line.get_linewidth() < 1 and line.get_alpha()]
        thick = [line for line in axes.lines if line.get_linewidth() > 1.5]
        dashed = [line for line in axes.lines if set(line.get_ydata()) == {comparison.scratch.final_loss}]
        assert (len(thin), len(thick), len(dashed)) == (runs, rows, 1)
    begins = sorted(float(line.get_xdata()[0]) for line in included.lines if line.get_linewidth() > 1.5)
    assert begins == [0.0, 1500.0, 1500.0]  # scratch at once, the others after their source
    words = " ".join(text.get_text() for text in main_axes.texts)
    assert all(
        word in words for word in ("lossless 2.500", "scratch's final loss, 4.000", "50 % fewer FLOPs")
    )
    assert "50 % fewer FLOPs" in figure.get_suptitle()
    low, high = loss_range(comparison)
    assert low < 2.4
    assert 4.0 < high < 8.0  # scratch's first fall is cut off


LONG = "lossless-depth_identity-noise0.5-target_hidden_size96+num_hidden_layers8"


@pytest.mark.slow
def test_long_names_leave_the_axes_their_room_and_no_labels_touch(tmp_path: Path) -> None:
    arms = {"scratch": 4.0, LONG: 3.62, f"{LONG}-optimizer_muon-schedule_cosine": 3.63, "a" * 120: 3.64}
    folders = [
        fabricate(tmp_path, arm, [8.0, 5.0, end], source=None if arm == "scratch" else SOURCE)
        for arm, end in arms.items()
    ]
    figure = build(compare(folders))
    figure.draw_without_rendering()
    main_axes = figure.axes[0]
    assert main_axes.get_position().width * figure.get_figwidth() > 5.5
    labels = [
        text
        for text in main_axes.texts
        if re.search(r" [34]\.\d{3}$", text.get_text()) and text.get_fontweight() == "bold"
    ]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: float(box.y0))
    assert len(boxes) == len(arms)
    assert all(below.y1 <= above.y0 + 2 for below, above in itertools.pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)
    assert labels[0].get_text().replace("\n", "").startswith("lossless-depth_")


def test_an_arm_whose_sources_cost_is_unknown_is_named_in_its_panel_and_not_drawn(tmp_path: Path) -> None:
    unknown = {**SOURCE, "flops": None, "tokens": None}
    folders = [fabricate(tmp_path, "scratch", SCRATCH_LOSSES)]
    folders += [
        fabricate(tmp_path, arm, [4.5, 4.0, 3.7, 3.5], source=source)
        for arm, source in (("tile", unknown), ("lossless", SOURCE))
    ]
    _, tokens, included = build(compare(folders)).axes
    thick = [sum(line.get_linewidth() > 1.5 for line in axes.lines) for axes in (tokens, included)]
    assert thick == [3, 2]
    assert included.get_title(loc="left").endswith("(unknown, so not drawn: tile)")


@pytest.mark.parametrize(("first", "cut"), [(8.0, True), (4.4, False)])
def test_a_frame_that_cuts_nothing_off_does_not_say_so(tmp_path: Path, first: float, cut: bool) -> None:
    folders = [
        fabricate(tmp_path, "scratch", [first, 4.3, 4.2, 4.0]),
        fabricate(tmp_path, "tile", [4.4, 4.2, 3.9, 3.8], source=SOURCE),
    ]
    assert ("cut off above the frame" in build(compare(folders)).get_supxlabel()) is cut


def test_labels_are_pushed_apart_and_colours_kept() -> None:
    placed = spread([1.0, 1.01, 1.02, 3.0], 0.5)
    assert placed == pytest.approx([0.51, 1.01, 1.51, 3.0])
    assert (
        colours_of(["scratch", "lossless"])["lossless"]
        == colours_of(["lossless", "tile", "mine"])["lossless"]
    )
    chosen = colours_of(
        [
            "scratch",
            "lossless",
            "tile",
            "random_pad",
            "source",
            "lossless_stack",
            "tile_flat",
            "mine",
            "yours",
        ]
    )
    assert len(set(chosen.values())) == len(chosen)


@pytest.mark.slow
def test_wandb_gets_table_and_picture_offline(
    study: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    seen: dict[str, object] = {}

    class FakeRun:
        disabled, offline, dir = False, True, "wandb/offline-run-1/files"

        def __init__(self) -> None:
            self.summary: dict[str, object] = {}

        def log(self, values: dict[str, object]) -> None:
            seen.update(values)

        def finish(self) -> None:
            seen["finished"] = True

    runs: list[FakeRun] = []

    def init(**options: object) -> FakeRun:
        seen.update(options)
        runs.append(FakeRun())
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine:own")
    assert main(["compare", *map(str, study), "--out", str(tmp_path / "out"), "--wandb"]) == 0
    assert (seen["group"], seen["mode"], seen["finished"]) == ("st", "offline", True)
    assert seen["project"] == "mine_own"
    assert "upload it: wandb sync wandb/offline-run-1" in capsys.readouterr().out
    assert len(seen["comparison"].data) == 4  # type: ignore[attr-defined]
    assert "convergence" in seen
    assert runs[0].summary["differences"] == []
    assert runs[0].summary["notes"]
