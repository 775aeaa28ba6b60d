"""Run folders made by hand, and what the reader makes of whole, unfinished and contradictory ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import SOURCE, fabricate
from outgrow.experiments.comparable import check_comparable, differences
from outgrow.experiments.runs import LeftOut, Run, read_run, read_runs
from outgrow.model.base.errors import UserError


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    start = {"lossless": True, "receipt": {"max_delta": 2e-13}, "operator_flops": 7.0, "source": SOURCE}
    run = read_run(fabricate(tmp_path, "lossless", [4.0, 3.0, 2.0], seed=3, rate=5e-4, start=start))
    assert isinstance(run, Run)
    assert (run.arm, run.seed, run.learning_rate, run.record.start.max_delta, run.record.start.lossless) == (
        "lossless",
        3,
        5e-4,
        2e-13,
        True,
    )
    assert (run.curve.tokens, run.curve.flops, run.curve.losses) == (
        (0, 100, 200),
        (0, 1000, 2000),
        (4.0, 3.0, 2.0),
    )
    assert (run.operator_flops, run.source_flops) == (7.0, 1500.0)


def test_unfinished_and_diverged_runs_are_left_out_by_name(tmp_path: Path) -> None:
    whole, unfinished = (
        fabricate(tmp_path, "scratch", [5.0, 3.0]),
        fabricate(tmp_path, "tile", [5.0, 4.0, 3.0]),
    )
    (unfinished / "summary.json").unlink()
    lines = (unfinished / "metrics.jsonl").read_text().splitlines()
    # killed while writing
    (unfinished / "metrics.jsonl").write_text("\n".join(lines[:-1]) + '\n{"kind": "ev')
    diverged = fabricate(tmp_path, "random_pad", [5.0, float("nan")])
    runs, left_out = read_runs([whole, unfinished, diverged, whole])  # naming one twice reads it once
    assert [run.arm for run in runs] == ["scratch"]
    assert left_out == [
        LeftOut(unfinished, "incomplete: no summary.json, last evaluated at 100 of 200 tokens"),
        LeftOut(diverged, "diverged: its validation loss is not finite"),
    ]
    with pytest.raises(UserError, match=r"no complete run to compare .*st-tile.*incomplete"):
        read_runs([unfinished])


@pytest.mark.parametrize(
    ("file", "key", "value", "complaint"),
    [
        ("summary.json", "final_val_loss", 2.9, r"final_val_loss is 2\.9, but the last evaluation says 3"),
        ("summary.json", "start_val_loss", 4.9, r"start_val_loss is 4\.9, but the first evaluation says 5"),
        ("summary.json", "tokens", 150, "tokens are 150, but the last evaluation was at 100"),
        ("summary.json", "flops", 1001.0, "FLOPs are 1001, but the last evaluation was at 1000"),
        (
            "run.json",
            "flops_per_token",
            11.0,
            r"FLOPs counted are 1000, but tokens × FLOPs per token give 1100",
        ),
    ],
)
def test_a_wrong_number_is_caught(tmp_path: Path, file: str, key: str, value: float, complaint: str) -> None:
    folder = fabricate(tmp_path, "scratch", [5.0, 3.0])
    entries = json.loads((folder / file).read_text())
    assert entries[key] != value
    (folder / file).write_text(json.dumps(entries | {key: value}))
    with pytest.raises(UserError, match=complaint):
        read_run(folder)


def test_metrics_that_were_edited_after_the_end_are_refused(tmp_path: Path) -> None:
    """A loss in the middle of the curve, which no other number contradicts, decides where an arm arrives."""
    folder = fabricate(tmp_path, "scratch", [5.0, 4.0, 3.0])
    metrics = folder / "metrics.jsonl"
    summary = json.loads((folder / "summary.json").read_text())
    digest = hashlib.sha256(metrics.read_bytes()).hexdigest()
    (folder / "summary.json").write_text(json.dumps(summary | {"metrics": digest}))
    assert isinstance(read_run(folder), Run)
    metrics.write_text(metrics.read_text().replace("4.0", "2.0"))
    with pytest.raises(UserError, match=r"metrics\.jsonl: it is not what it was when the run ended; .*again"):
        read_run(folder)


def test_the_flops_of_stages_and_teachers_are_held_against_the_curve(tmp_path: Path) -> None:
    """Two steps of 50 tokens at 3 FLOPs each, then 10: a run that grew on its way, or that was taught less
    and less."""
    spans = [{"last": 2, "flops_per_token": 3.0}, {"last": 6, "flops_per_token": 10.0}]
    folder = fabricate(tmp_path, "g_stack", [5.0, 4.0, 3.0, 2.0], spans=spans)
    run = read_run(folder)
    assert isinstance(run, Run)
    assert run.curve.flops == (0, 300, 1300, 2300)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"spans": [spans[0] | {"last": 1}, spans[1]]}))
    with pytest.raises(UserError, match=r"FLOPs counted are 2300, but tokens × FLOPs per token give 2650"):
        read_run(folder)


def test_damaged_folders_are_refused_all_at_once(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    torn, keyless, single, mixed = (fabricate(tmp_path, arm, [5.0, 4.0, 3.0]) for arm in ("a", "b", "c", "d"))
    lines = (torn / "metrics.jsonl").read_text().splitlines()
    (torn / "metrics.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]))
    record = json.loads((keyless / "run.json").read_text())
    del record["arm"]
    (keyless / "run.json").write_text(json.dumps(record))
    (single / "metrics.jsonl").write_text(lines[0] + "\n")
    (mixed / "metrics.jsonl").write_text("\n".join([*lines, *lines]))
    with pytest.raises(UserError) as caught:
        read_runs([nothing, torn, keyless, single, mixed])
    for words in (
        "nothing: there is nothing",
        "line 2: not a JSON object",
        "run.json: arm: missing",
        "1 evaluations",
        "do not increase",
    ):
        assert words in str(caught.value)


def test_what_lies_beside_runs_is_passed_over_with_one_line_each(tmp_path: Path) -> None:
    fabricate(tmp_path, "scratch", [5.0, 3.0])
    for name, file in (("comparison-st", "comparison.json"), ("logs-st", "a.log"), ("only-begun", "start")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    (tmp_path / "notes.txt").touch()
    runs, left_out = read_runs(sorted(tmp_path.iterdir()))
    assert [run.arm for run in runs] == ["scratch"]
    assert [(item.folder.name, item.reason) for item in left_out] == [
        ("comparison-st", "a comparison"),
        ("logs-st", "no run: it has no run.json"),
        ("notes.txt", "no run: it has no run.json"),
        ("only-begun", "no run: it has no run.json"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        "[]",
        "3",
        "null",
        '"eval"',
        '{"kind": "eval"}',
        '{"kind": "eval", "val_loss": "x", "tokens": 1}',
        f'{{"kind": "eval", "val_loss": 3, "tokens": {"9" * 400}, "flops": 1}}',
        "[" * 10_000,
    ],
)
def test_a_line_that_is_no_row_is_one_clear_error(tmp_path: Path, row: str) -> None:
    folder = fabricate(tmp_path, "scratch", [5.0, 4.0, 3.0])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], row, *lines[1:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: .*run it again"):
        read_runs([folder])
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read"):
        read_runs([folder])


@pytest.mark.parametrize("file", ["run.json", "summary.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_record_that_is_no_object_is_one_clear_error(tmp_path: Path, file: str, text: str) -> None:
    folder = fabricate(tmp_path, "scratch", [5.0, 3.0])
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=rf"{file}: .*run it again"):
        read_runs([folder])


@pytest.mark.parametrize("loss", ["null", "NaN", "Infinity"])  # as runs write it, and as older ones did
def test_a_loss_that_is_not_finite_is_read_however_it_is_written(tmp_path: Path, loss: str) -> None:
    folder = fabricate(tmp_path, "tile", [5.0, 4.0, 3.0])
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"val_loss": 3.0', f'"val_loss": {loss}'))
    assert read_run(folder) == LeftOut(folder, "diverged: its validation loss is not finite")


def test_one_fault_of_many_runs_is_one_line(tmp_path: Path) -> None:
    folders = [fabricate(tmp_path, "tile", [5.0, 3.0], seed=seed) for seed in range(16)]
    for folder in folders:
        (folder / "run.json").write_text("{")
    with pytest.raises(UserError) as caught:
        read_runs([*folders, tmp_path / "nothing"])
    first, *faults = str(caught.value).splitlines()
    assert first == "2 faults:"
    assert faults[1].startswith(
        "  - 16 runs (st-tile-lr0.001-s0, st-tile-lr0.001-s1, st-tile-lr0.001-s2, st-tile-lr0.001-s3 and "
        "12 more): "
    )


def comparable(*folders: Path) -> None:
    check_comparable(read_runs(folders)[0])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data.fingerprint": "beef"}, r"data fingerprint .* f00d and beef; .*: no setting, so the files"),
        (
            {"data.fingerprint": "beef", "settings.data": {"path": "elsewhere"}},
            r"data fingerprint .* f00d and beef; what differs: data\.path \(.* and elsewhere\)",
        ),
        ({"settings.train.eval_tokens": 32}, r"eval_tokens.* 64 and 32"),
        ({"settings.train.context": 16}, r"context.* 8 and 16"),
        ({"tokens_per_step": 25}, "tokens per step is 50 and 25"),
        ({"settings.train.document_mask": True}, "document mask .* is False and True"),
        (
            {"settings.mixture": {"phases": [{"weights": {"a": 0.2, "b": 0.8}}]}},
            r"mixture .* is None and .*'a': 0\.2",
        ),
        ({"precision": "bf16"}, "precision is fp32 and bf16"),
        ({"budget_tokens": 300}, r"budget.* 200 and 300"),
        ({"flops_per_token": 20.0}, r"FLOPs per token is 10\.0 and 20\.0"),
        ({"target_config.hidden_size": 96}, r"target configs differ in hidden_size \(80 and 96\)"),
    ],
)
def test_incomparable_runs_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    scratch, other = (
        fabricate(tmp_path, "scratch", [5.0, 4.0, 3.0]),
        fabricate(tmp_path, "tile", [5.0, 4.0, 3.0], **changes),
    )
    with pytest.raises(UserError, match=complaint) as caught:
        comparable(scratch, other)
    assert str(scratch) in str(caught.value)
    assert str(other) in str(caught.value)


def test_the_control_arm_may_train_another_network_on_other_tokens(tmp_path: Path) -> None:
    changes = {"target_config": {"model_type": "phi", "hidden_size": 64}, "flops_per_token": 5.0}
    scratch = fabricate(tmp_path, "scratch", [5.0, 4.0, 3.0])
    # the library's own mark
    tile = fabricate(tmp_path, "tile", [5.0, 4.0, 3.0], **{"target_config.transformers_version": "5.0"})
    comparable(scratch, tile, fabricate(tmp_path, "source", [4.0, 3.9, 3.8, 3.7, 3.6], **changes))
    with pytest.raises(
        UserError, match="target configs differ"
    ):  # what the control arm may, no other arm may
        comparable(
            scratch,
            fabricate(tmp_path, "random_pad", [4.0, 3.9, 3.8], target_config=changes["target_config"]),
        )


def test_a_config_in_both_spellings_is_the_network_that_one_spelling_says(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 80, "dtype": "float32"}
    turned = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
    scratch = fabricate(tmp_path, "scratch", [5.0, 4.0, 3.0], target_config=turned)
    comparable(
        scratch,
        fabricate(tmp_path, "lossless", [5.0, 4.0, 3.0], target_config=turned | {"rope_theta": 500_000.0}),
    )
    other = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    with pytest.raises(UserError, match=r"target configs differ in .*rope_theta"):
        comparable(scratch, fabricate(tmp_path, "tile", [5.0, 4.0, 3.0], target_config=other))


def test_what_a_config_leaves_to_its_class_is_no_difference(tmp_path: Path) -> None:
    """A preset says sizes alone, a checkpoint's config.json says everything."""
    sizes = {"model_type": "phi", "hidden_size": 80}
    whole = sizes | {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "initializer_range": 0.02}
    scratch = fabricate(tmp_path, "scratch", [5.0, 4.0, 3.0], target_config=sizes)
    comparable(scratch, fabricate(tmp_path, "lossless", [5.0, 4.0, 3.0], target_config=whole))
    other = whole | {"partial_rotary_factor": 0.4}
    with pytest.raises(
        UserError, match=r"target configs differ in .*partial_rotary_factor \(0\.5 and 0\.4\)"
    ):
        comparable(scratch, fabricate(tmp_path, "tile", [5.0, 4.0, 3.0], target_config=other))


def test_seeds_repeat_and_nothing_else_differs(tmp_path: Path) -> None:
    first, second = (fabricate(tmp_path, "scratch", [5.0, 3.0], seed=seed) for seed in (0, 1))
    comparable(first, second)
    other = fabricate(
        tmp_path,
        "scratch",
        [5.0, 3.0],
        seed=2,
        **{"settings.optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1}},
    )
    with pytest.raises(
        UserError, match=r"no two seeds of one arm.*optimizer\.weight_decay \(absent and 0\.1\)"
    ):
        comparable(first, second, other)
    twice = fabricate(tmp_path, "scratch", [5.0, 3.0], seed=0, folder="again")
    with pytest.raises(UserError, match=r"again are both arm scratch, learning rate 0\.001, seed 0"):
        comparable(first, twice)


def test_what_differs_beside_the_growth_is_told_with_its_values(tmp_path: Path) -> None:
    """Every setting that changes a result, in whatever group it is; not the rate, which is tuned, nor the
    growth, which is compared."""
    plain = {
        "settings.optimizer": {"name": "adamw", "weight_decay": 0.1, "learning_rate": 1e-3},
        "settings.schedule": {"name": "wsd"},
    }
    other = {
        "settings.optimizer": {"name": "muon", "weight_decay": 0.1, "learning_rate": 1e-3},
        "settings.train.gradient_clip": 1.0,
    }
    folders = [fabricate(tmp_path, "scratch", [5.0, 3.0], seed=seed, **plain) for seed in (0, 1)]
    folders += [
        fabricate(tmp_path, "tile", [5.0, 3.0], **plain),
        fabricate(tmp_path, "lossless", [5.0, 3.0], **other),
    ]
    folders += [fabricate(tmp_path, "source", [5.0, 4.0, 3.0], **plain)]  # its budget is its own
    runs = sorted(read_runs(folders)[0], key=lambda run: run.folder)
    assert differences(runs) == [
        "optimizer.name: muon (lossless); adamw (scratch, source, tile)",
        "schedule.name: null (lossless); wsd (scratch, source, tile)",
        "train.gradient_clip: 1.0 (lossless); null (scratch, source, tile)",
    ]
    assert (
        differences(
            runs,
            [("lossless", "optimizer"), ("lossless", "schedule.name"), ("lossless", "train.gradient_clip")],
        )
        == []
    )


def test_arms_from_different_sources_are_told(tmp_path: Path) -> None:
    """Of one seed; each seed may have its own, and where it lies says nothing."""
    other = SOURCE | {"path": "runs/o/final", "val_loss": 3.0}
    elsewhere = SOURCE | {"path": "copies/s"}
    folders = [fabricate(tmp_path, "scratch", [5.0, 3.0], seed=seed) for seed in (0, 1)]
    folders += [fabricate(tmp_path, "tile", [5.0, 3.0], source=SOURCE)]
    folders += [fabricate(tmp_path, "tile", [5.0, 3.0], source=other, seed=1)]
    folders += [fabricate(tmp_path, "lossless", [5.0, 3.0], source=elsewhere)]
    assert differences(read_runs(folders)[0]) == []
    folders += [fabricate(tmp_path, "stack", [5.0, 3.0], source=other)]
    assert differences(read_runs(folders)[0]) == [
        "source, seed 0: copies/s (lossless, tile); runs/o/final (stack)"
    ]
    for arm, path in (("net2net", "a"), ("solar", "b")):  # of which nothing is known but where they lie
        folders += [fabricate(tmp_path, arm, [5.0, 3.0], source={"path": path}, seed=1)]
    sentence = differences(read_runs(folders)[0])[1]
    assert sentence == "source, seed 1: a (net2net); b (solar); runs/o/final (tile)"


def test_without_scratch_there_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete scratch run among st-tile"):
        comparable(fabricate(tmp_path, "tile", [5.0, 3.0]))
