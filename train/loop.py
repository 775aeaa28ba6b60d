"""The training loop: one function that tells the whole story of a run, in order.

from outgrow.train.loop import train
train(compose(["experiment=tiny", "growth=lossless"]))   # → runs/tiny-lossless-s0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import write_json
from outgrow.model.config import read_config
from outgrow.model.geometry import active_parameter_count, flops_per_token, flops_source, parameter_count
from outgrow.train.corpus import prepare
from outgrow.train.data import TokenData, check_vocabulary
from outgrow.train.data.batches import validation_batches, window_count
from outgrow.train.data.mixture import mixed, tokens_read
from outgrow.train.machine.device import device_name, peak_flops, session
from outgrow.train.machine.distribute import whole_weights
from outgrow.train.run import folder as run_folder
from outgrow.train.run import state
from outgrow.train.run.checkpoints import newest_intact
from outgrow.train.run.clock import Meter
from outgrow.train.run.export import publish, recast
from outgrow.train.run.horizons import find_trunk, take_over_trunk, trunk_record
from outgrow.train.run.log import Console, open_log
from outgrow.train.run.reading import rate_warnings, reading, record, tokenizer_warnings
from outgrow.train.run.signals import watched
from outgrow.train.settings import Budget, Settings, horizon_runs, needs_source
from outgrow.train.start.rehearsal import rehearse_end
from outgrow.train.start.source import begin, find_source, source_dtype, source_ledger, target_config, weights_read
from outgrow.train.start.stages import Span, spans_of, stages_of
from outgrow.train.start.teacher import find_teacher, teacher_folder
from outgrow.train.start.transfer import frozen_tensors
from outgrow.train.start.way import Way, find_ways, precision_of
from outgrow.train.trainee import Run, Trainee


def train(settings: Settings, trunks: Sequence[Path] = ()) -> Path:
    """Train the run that `settings` describe, from its start or from its newest checkpoint, and return its folder.

    A complete run returns at once. Every process of a distributed run calls this with the same settings; process 0 writes.

    Args:
        trunks: folders of the same run with shorter budgets, whose trunk it goes on from (train/horizons.py).

    Raises:
        UserError: the settings, the text, the source and the folder do not go together, the disk is full, no checkpoint is intact, or a
            loss or a weight is not finite.
        Stopped: SIGTERM or SIGUSR1 came; a checkpoint of the last step is saved.
    """
    folder, loop, budget = Path(settings.out), settings.train, Budget.of(settings.train)
    console = Console(settings.progress and "lines", settings.name, loop.budget_tokens)

    # ---- 1. Is there anything to do? --------------------------------------------------------------------------------------------------
    run, again = run_folder.read_run(folder), None
    if run is not None:
        run_folder.check_same(folder, run, settings)
        if run_folder.is_complete(folder):
            if not (missing := run_folder.unkept(folder, run, settings)):
                console.say(f"already complete: {folder}")
                return folder
            again = run_folder.recast_to(folder, run, settings)
            if again is None:
                check_end_left(folder, run, missing)
            way_there = (
                f"rounded from its {run_folder.FINAL}/" if again else "it trains again from its newest checkpoint to its end, to keep it"
            )
            console.say(f"{folder} is complete without {missing}: {way_there}")
    elif further := run_folder.shorter_run(settings):
        console.say(further)

    with (
        session(loop.precision, settings.sharding, loop.hang_seconds) as accelerator,
        run_folder.locked(folder, accelerator.is_main_process),
    ):
        # ---- 2. Who trains: every process, and the main one writes --------------------------------------------------------------------
        main = accelerator.is_main_process

        if run is not None and again is not None:
            if main:
                recast(folder, run, again)
            accelerator.wait_for_everyone()
            return folder

        # ---- 3. The network, and the text that it reads -------------------------------------------------------------------------------
        source = find_source(settings, needed=run is None or needs_source(settings))
        config = target_config(settings, source) if run is None else run["target_config"]
        stages, teaching = stages_of(settings, config), teacher_folder(settings, source)
        dtype = run_folder.final_dtype(folder, settings, source_dtype(source, run))
        digests = weights_read(settings, source, teaching) if main else {}
        told = main and settings.progress is not False
        text = reading(settings, source, run)
        data = prepare(text, progress=told)
        data = mixed(settings.mixture, text, data, context=loop.context, rows=budget.steps * budget.rows, progress=told)
        check_vocabulary(data, config["vocab_size"])
        way, teachers = find_ways(config, None if teaching is None else read_config(teaching), loop, accelerator)
        for line in (*way.lines, *(teachers.lines if teachers else ())):
            console.say(line)
        teacher = find_teacher(teaching, config, teachers)
        windows = list(validation_batches(data.validation, context=loop.context, tokens=loop.eval_tokens))
        window_count(data.train, loop.context)  # refuses a text that is too short before anything is grown

        benchmarks = None
        if main and settings.evaluate.suite is not None:
            from outgrow.train.suite.during import Benchmarks

            benchmarks = Benchmarks(settings.evaluate, data)
        if main:
            for note in rehearse_end(config, source, data, sharded=accelerator.is_fsdp2, dtype=dtype):
                console.say(note)

        # ---- 4. The start: scratch, the source, or the source grown -------------------------------------------------------------------
        if run is None:
            if main:
                trunk = find_trunk(trunks, settings)
                start = begin(settings, stages[0], source, folder) if trunk is None else trunk_record(trunk)["start"]
                taught_by = None if teacher is None else teacher.config
                spans = spans_of(stages, settings, taught_by, frozen_tensors(stages, settings, source))
                known = facts(settings, config, data, accelerator, way)
                known |= {"spans": [asdict(span) for span in spans], "weights": digests}
                known |= {} if trunk is None else {"trunk": trunk}
                known["data"]["cut"] = record(text)
                for line in (*tokenizer_warnings(settings, source, data), *rate_warnings(settings, known["parameters"])):
                    console.say(line)
                write_json(folder / run_folder.RUN, run_folder.new_run(settings, start=start, **known))
            accelerator.wait_for_everyone()
            run = run_folder.read_run(folder)
            assert run is not None
        run_folder.check_same_inputs(folder, run, data.fingerprint, source_ledger(settings, source), digests)

        # ---- 5. Where it stands, and on from there, stage by stage (one, unless it grows on its way) ----------------------------------
        if "trunk" in run and main and not state.complete(folder / run_folder.CHECKPOINTS, tidy=True):
            take_over_trunk(folder, run)
        accelerator.wait_for_everyone()
        saved = newest_intact(folder / run_folder.CHECKPOINTS, accelerator, console.say)
        position = state.Position() if saved is None else state.peek(saved)
        if main and state.restore_metrics(folder / run_folder.METRICS, saved):
            console.say(f"{run_folder.METRICS} was cut, deleted or changed; its rows are those that the checkpoint keeps")
        if main:
            (folder / run_folder.SUMMARY).unlink(missing_ok=True)  # there where a complete run trains its end again
        with open_log(folder, settings, run, writes=main) as log:
            peak = peak_flops(device_name(accelerator.device), run["precision"])
            spans = [Span(**span) for span in run["spans"]]
            meter = Meter(position, accelerator.num_processes, budget.tokens_per_step, spans, peak)
            with watched() as asked:
                made = Run(settings, folder, accelerator, data, windows, console, log, asked, meter, way, dtype, benchmarks)
                for stage in stages[position.stage :]:
                    with meter.paused():
                        trainee = Trainee(made, stage, source, teacher, saved if stage.number == position.stage else None)
                    trainee.train()
                    if stage is not stages[-1]:
                        trainee.grow(stages[stage.number + 1])

            # ---- 8. The end: a Hugging Face folder, and last the summary, which makes the run complete --------------------------------
            accelerator.wait_for_everyone()
            weights = whole_weights(trainee.objective, accelerator)
            if main:
                summary = summarise(position)
                adam = trainee.adam() if loop.keep_optimizer or run_folder.keeps_optimizer(folder) else None
                final = publish(folder, trainee.network, weights, data, run, summary, adam, dtype)
                trainee.write_samples("end", None if weights is None else final)
                trainee.rows()  # are on the disk before the summary says that they are whole
                write_json(folder / run_folder.SUMMARY, summary)
                console.say(f"val loss {summary['start_val_loss']:.4f} → {summary['final_val_loss']:.4f}: {folder}")
            accelerator.wait_for_everyone()
    return folder


def check_end_left(folder: Path, run: Mapping[str, Any], missing: str) -> None:
    """Refuse to train a complete run again from its very start for what its end was not asked to keep.

    Raises:
        UserError: no checkpoint of it is left.
    """
    if "trunk" not in run and not state.complete(folder / run_folder.CHECKPOINTS):
        raise UserError(
            f"{folder} is complete without {missing}, and no checkpoint of it is left to train its end again from (train.save_every_tokens "
            "says when one is written); delete the folder to train the whole run again, or choose another name="
        )


def facts(settings: Settings, config: dict[str, Any], data: TokenData, accelerator: Accelerator, way: Way) -> dict[str, Any]:
    """What run.json records beside the settings: the counted network, the text, the machine."""
    budget = Budget.of(settings.train)
    read = tokens_read(data.train, settings.data.name, budget.steps * budget.rows, settings.train.context)
    return {
        "parameters": parameter_count(config),
        "active_parameters": active_parameter_count(config),
        "flops_per_token": flops_per_token(config, settings.train.context),
        "flops_from": flops_source(config, settings.train.context),
        "tokens_per_step": budget.tokens_per_step,
        "budget_tokens": budget.steps * budget.tokens_per_step,
        "data": {"fingerprint": data.fingerprint, "bytes_per_token": data.validation.bytes_per_token, "tokens_read": read},
        "target_config": config,
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "attention": way.attention,
        "precision": precision_of(accelerator.mixed_precision),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


def summarise(position: state.Position) -> dict[str, Any]:
    """What summary.json says."""
    return {
        "start_val_loss": position.start_val_loss,
        "final_val_loss": position.val_loss,
        "bits_per_byte": position.bits_per_byte,
        "tokens": position.tokens,
        "flops": position.flops,
        "seconds": round(position.seconds, 3),
        "steps": position.step,
        "skipped_steps": position.skipped,
    }


def train_horizons(settings: Settings) -> list[Path]:
    """Train the run of every horizon in turn, each from the longest trunk before it, and return their folders.

    Raises:
        UserError, Stopped: as `train` does.
    """
    folders: list[Path] = []
    for run in horizon_runs(settings):
        folders.append(train(run, trunks=folders))
    return folders
