"""A prediction is made of known curves, once, before its horizon is measured, and compared with it after."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from outgrow.experiments.__main__ import main
from outgrow.experiments.ends import End, write_ends
from outgrow.experiments.grown_run import Growth
from outgrow.experiments.prediction import PAGE, RECORD, predict, read_prediction
from outgrow.model.base.errors import UserError

M = 1_000_000
BASE = End("x", "scratch", "muon", 1e-2, 4096, 0, 1000, M, 1e12, 0.0, 3.0, 524_288, "cpu", "text")


def loss_of_scratch(tokens: int) -> float:
    return 4.0 - 0.2 * math.log(tokens / M)


def scratch(tokens: int) -> End:
    """A large token costs one FLOP."""
    loss = loss_of_scratch(tokens)
    return dataclasses.replace(BASE, name=f"s{tokens}", tokens=tokens, flops=float(tokens), val_loss=loss)


def grown(at: int, tokens: int, mixing: int) -> End:
    """Its gap falls linearly in the log of the tokens since the growth, to 0.005 nats after `mixing`."""
    gap = 0.005 - 0.05 * math.log((tokens - at) / mixing)
    return dataclasses.replace(
        scratch(tokens),
        name=f"g{at}-{tokens}",
        arm=f"stack_{at // M}M",
        flops=tokens - 0.75 * at,
        val_loss=loss_of_scratch(tokens) + gap,
        growth=Growth(at, 3.0, 3.1, 1000),
    )


SMALL = dataclasses.replace(
    BASE, name="small", arm="small", parameters=300, tokens=M, flops=0.25 * M, val_loss=5
)
SCRATCH = [scratch(tokens * M) for tokens in (5, 10, 20, 40)]
MEASURED = [
    *(grown(2 * M, tokens * M, 8 * M) for tokens in (5, 10, 20)),
    *(grown(4 * M, tokens * M, 8 * M) for tokens in (5, 10, 20)),
]


def test_tau_and_s_follow_from_the_time_that_catching_up_takes() -> None:
    prediction = predict([*SCRATCH, SMALL, *MEASURED], [40 * M, 6 * M], "muon")
    assert prediction.mixing_tokens == pytest.approx(8 * M)
    assert (prediction.bound, prediction.relative_cost) == ("", 0.25)
    assert prediction.arms == ("stack_2M", "stack_4M")
    short, long = prediction.rows
    assert (short.tokens, short.grow_tokens, short.share, short.speedup) == (6 * M, 0, 0.0, 1.0)
    assert (long.tokens, long.grow_tokens) == (40 * M, pytest.approx(32 * M, abs=2))
    assert long.share == pytest.approx(0.8)
    assert long.speedup == pytest.approx(1 / (0.8 * 0.25 + 0.2))


def test_what_has_not_caught_up_bounds_the_prediction() -> None:
    slow = [grown(at * M, tokens * M, 30 * M) for at in (2, 4) for tokens in (5, 10, 20)]
    prediction = predict([*SCRATCH, SMALL, *slow], [40 * M], "muon")
    assert (prediction.bound, prediction.mixing_tokens) == ("≤", 18 * M)  # the last end of the earlier growth
    at_once = [grown(at * M, tokens * M, M // 10) for at in (2, 4) for tokens in (5, 10, 20)]
    assert predict([*SCRATCH, SMALL, *at_once], [40 * M], "muon").bound == "≥"


@pytest.mark.parametrize(
    ("ends", "horizon", "fault"),
    [
        (
            [*SCRATCH, SMALL, *MEASURED[:3]],
            40,
            "t_mix of 1 moments of growth is known, and a prediction needs two",
        ),
        ([*SCRATCH, SMALL, *MEASURED], 20, "ends at 20000000 tokens already: a prediction is written before"),
        ([*SCRATCH, *MEASURED], 40, "no control"),
        ([*SCRATCH, SMALL, *MEASURED], 0, "--horizons 0: expected tokens, more than 0"),
    ],
)
def test_what_gives_no_prediction_is_refused(ends: list[End], horizon: int, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        predict(ends, [horizon * M], "muon")


def test_it_is_written_once_and_the_horizons_report_sets_the_measurement_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    early, late = str(tmp_path / "early.json"), str(tmp_path / "late.json")
    write_ends(Path(early), [*SCRATCH, SMALL, *MEASURED])
    asked = ["predict", early, "--horizons", str(40 * M), "--out", out]
    assert main(asked) == 0
    assert "| 40.0 M |  | 32.0 M | 0.80 | 2.50 |" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["date"]
    assert read_prediction(tmp_path / "out" / RECORD).rows[0].tokens == 40 * M

    assert main(asked) == 2
    assert "a prediction is written once" in capsys.readouterr().err

    kept = (tmp_path / "out" / RECORD).read_text()
    for key in json.loads(kept):
        (tmp_path / "out" / RECORD).write_text(json.dumps(json.loads(kept) | {key: {}}))
        assert main(["horizons", early, "--out", out]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path}/out/{RECORD}: no prediction ({key}")
        assert said.count("\n") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {RECORD, PAGE}
    (tmp_path / "out" / RECORD).write_text(kept)

    early_but_worth_more = dataclasses.replace(grown(4 * M, 40 * M, 36 * M), flops=12 * M)
    write_ends(Path(late), [*SCRATCH, SMALL, *MEASURED, early_but_worth_more, grown(32 * M, 40 * M, 8 * M)])
    assert main(["horizons", late, "--out", out]) == 0
    # within 0.005 nats of scratch at 40 M tokens, for 16 M FLOPs
    worth = 40 * math.exp(-0.005 / 0.2) / 16
    beside = f"| 40.0 M | stack_32M | 0.80 | 0.80 | 2.50 | {worth:.2f} |"
    assert beside in capsys.readouterr().out
    assert beside in (tmp_path / "out" / "prediction.md").read_text()
