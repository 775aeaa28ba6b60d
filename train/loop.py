"""The training loop: one function that tells a run from its start to its end, under eight banners.

from outgrow.train.loop import train
train(compose(["experiment=tiny", "growth=lossless"]))   # → runs/tiny-lossless-s0
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
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
from outgrow.train.keeping import (
    check_range,
    check_weights,
    grow_into,
    metrics_so_far,
    publish_average,
    save,
    stopped,
    stopping,
    summarise,
)
from outgrow.train.machine.agreement import shared
from outgrow.train.machine.device import device_name, peak_flops, session, signs
from outgrow.train.machine.distribute import whole_weights
from outgrow.train.machine.watch import watching
from outgrow.train.noise_scale import first_micro_batches
from outgrow.train.objects import RunContext, TrainingObjects, build_objects, fill_state
from outgrow.train.observing import benchmark_every, introduction, measure_benchmarks, validate, write_samples
from outgrow.train.run import folder as run_folder
from outgrow.train.run import state
from outgrow.train.run.checkpoints import newest_intact, saving
from outgrow.train.run.clock import Meter
from outgrow.train.run.export import publish, recast
from outgrow.train.run.horizons import branch_step, find_trunk, keep_stable, take_over_trunk, trunk_record
from outgrow.train.run.log import Console, open_log
from outgrow.train.run.profile import profiling
from outgrow.train.run.reading import cut_record, rate_warnings, reading, tokenizer_warnings
from outgrow.train.run.record import RunRecord, TextRecord, signed
from outgrow.train.run.signals import any_process, watched
from outgrow.train.settings import Settings, horizon_runs, needs_source
from outgrow.train.start.lesson import check_text
from outgrow.train.start.rehearsal import rehearse_end
from outgrow.train.start.source import (
    begin,
    check_optimizer,
    find_source,
    source_cost,
    source_dtype,
    start_read,
    target_config,
    weights_read,
)
from outgrow.train.start.stages import check_growths, spans_of, stages_of
from outgrow.train.start.teacher import find_teacher, teacher_folder
from outgrow.train.start.transfer import frozen_tensors
from outgrow.train.start.way import Way, find_ways, precision_of
from outgrow.train.step import NotFinite


def train(settings: Settings, trunks: Sequence[Path] = ()) -> Path:
    """Train the run that `settings` describe, from its start or from its newest checkpoint, and return its
    folder.

    A complete run returns at once. Every process of a distributed run calls this with the same settings;
    process 0 writes.

    Args:
        trunks: folders of the same run with shorter budgets, whose trunk it goes on from
            (train/run/horizons.py).

    Raises:
        UserError: the settings, the text, the source and the folder do not go together, the disk is full, no
            checkpoint is intact, or a loss or a weight is not finite.
        Stopped: SIGTERM or SIGUSR1 came; a checkpoint of the last step is saved, or the run is complete.
    """
    folder = Path(settings.out)
    checkpoints = folder / run_folder.CHECKPOINTS
    loop = settings.train
    budget = settings.budget
    progress = settings.progress and "lines"
    console = Console(progress, settings.name, loop.budget_tokens)

    # ---- 1. Is there anything to do? -----------------------------------------------------------------------
    run = run_folder.read_run(folder)
    new_dtype = None
    if run is not None:
        run_folder.check_same(folder, run, settings)
        if run_folder.is_complete(folder):
            run_folder.check_end(folder)
            missing = run_folder.unkept(folder, run, settings)
            if not missing:
                elsewhere = run_folder.texts_elsewhere(run, settings)
                gone = run_folder.end_gone(folder)
                console.say(f"already complete: {folder}{elsewhere}{gone}")
                return folder
            new_dtype = run_folder.recast_to(folder, run, settings)
            if new_dtype is None:
                check_end_left(folder, run, missing)
                remedy = "it trains again from its newest checkpoint to its end, to keep it"
            else:
                remedy = f"rounded from its {run_folder.FINAL}/"
            console.say(f"{folder} is complete without {missing}: {remedy}")
    elif further := run_folder.shorter_run(settings):
        console.say(further)

    group = session(loop.precision, settings.sharding, loop.hang_seconds, shared(settings))
    with group as accelerator, run_folder.locked(folder, accelerator.is_main_process):
        # ---- 2. Who trains: every process, and the main one writes -----------------------------------------
        main = accelerator.is_main_process
        process = accelerator.process_index
        processes = accelerator.num_processes
        if loop.noise_scale:
            first_micro_batches(settings, processes)  # refuses one at which there is nothing to compare
        if run is not None and new_dtype is not None:
            if main:
                recast(folder, run, new_dtype)
            accelerator.wait_for_everyone()
            return folder

        # ---- 3. The network's config, and the text that it reads -------------------------------------------
        source_needed = run is None or needs_source(settings)
        source = find_source(settings, needed=source_needed)
        config = target_config(settings, source) if run is None else run.target_config
        stages = stages_of(settings, config)
        teaching = teacher_folder(settings, source)
        weights_dtype = source_dtype(source, run)
        dtype = run_folder.final_dtype(folder, settings, weights_dtype)
        digests = weights_read(settings, source, teaching) if main else {}
        text = reading(settings, source, run)
        bars = main and settings.progress is not False
        rows = budget.steps * budget.rows
        tokens_of = partial(prepare, progress=bars)
        tokens = tokens_of(text)
        data = mixed(settings.mixture, text, tokens, tokens_of, context=loop.context, rows=rows)
        check_vocabulary(data, config["vocab_size"])
        way, teacher_way = find_ways(
            config,
            None if teaching is None else read_config(teaching),
            loop,
            accelerator,
        )
        for attention_way in filter(None, (way, teacher_way)):
            for line in attention_way.lines:
                console.say(line)
        teacher = find_teacher(teaching, config, teacher_way)
        batches = validation_batches(data.validation, context=loop.context, tokens=loop.eval_tokens)
        windows = list(batches)
        window_count(data.train, loop.context)  # refuses a text that is too short before anything is grown

        benchmarks = None
        if main and settings.evaluate.suite is not None:
            from outgrow.train.suite.during import Benchmarks

            benchmarks = Benchmarks(settings.evaluate, data)
        if main:
            sharded = accelerator.is_fsdp2
            for note in rehearse_end(config, source, data, sharded=sharded, dtype=dtype):
                console.say(note)

        # ---- 4. A new run: its start on disk, then its record ----------------------------------------------
        if run is None:
            if main:
                trunk = find_trunk(trunks, settings, console.say)
                check_text(settings, stages[0], source, data)
                check_growths(stages, settings)
                check_optimizer(settings, source)
                if trunk is None:
                    start = begin(settings, stages[0], source, folder)
                else:
                    start = trunk_record(trunk).start
                teacher_config = None if teacher is None else teacher.config
                frozen = frozen_tensors(stages, settings, source)
                spans = spans_of(stages, settings, teacher_config, frozen)
                cut = cut_record(text)
                measurements = measured(settings, config, data, accelerator, way, cut)
                run = RunRecord.of(
                    settings,
                    start=start,
                    spans=tuple(spans),
                    weights=digests | start_read(stages[0], folder),
                    trunk=trunk,
                    **measurements,
                )
                warnings = list(tokenizer_warnings(settings, source, data, teaching))
                warnings += rate_warnings(settings, run.parameters)
                for line in warnings:
                    console.say(line)
                write_json(folder / run_folder.RUN, signed(run.to_json()))
            accelerator.wait_for_everyone()
            run = run_folder.read_run(folder)
            assert run is not None
        elif main and not state.complete(checkpoints):
            digests |= start_read(stages[0], folder)
        cost = source_cost(settings, source)
        run_folder.check_same_inputs(folder, run, data.fingerprint, cost, digests)

        # ---- 5. Where weights, optimizer state and clocks come from ----------------------------------------
        # The order matters:
        # 1. a checkpoint of this run, the newest intact one: the run goes on to the bit as if never stopped;
        # 2. a shorter horizon's trunk, which is first copied in and then such a checkpoint;
        # 3. the stage before, grown, with the optimizer's state by the stage's `moments` (growth on the way);
        # 4. the source, grown or as it is, with the optimizer's state where transfer.optimizer asks for it;
        # 5. scratch: the library's own initialisation, from the seed.
        if run.trunk is not None and main:
            begun = state.complete(checkpoints, tidy=True)
            if not begun:
                take_over_trunk(folder, run.trunk, run.settings_hash)
        accelerator.wait_for_everyone()
        saved = newest_intact(checkpoints, accelerator, console.say, run.settings_hash)
        position = state.Position() if saved is None else state.peek(saved)
        metrics = folder / run_folder.METRICS
        if main and saved is None and metrics.is_file() and metrics.stat().st_size:
            console.say(f"no checkpoint of this run is left, so it begins again, and {metrics.name} with it")
        if main and state.restore_metrics(metrics, saved):
            console.say(
                f"{run_folder.METRICS} was cut, deleted or changed; its rows are those that the checkpoint "
                "keeps",
            )
        if main:
            run_folder.reopen(folder)
        peak = peak_flops(device_name(accelerator.device), run.precision)
        clock = Meter(position, processes, budget.tokens_per_step, run.spans, peak)
        benchmark_steps = benchmark_every(settings)

        with watched() as asked, open_log(folder, settings, run, writes=main) as log:
            context = RunContext(
                settings,
                folder,
                source,
                teacher,
                accelerator,
                data,
                windows,
                way,
                dtype,
                console,
                log,
                clock,
                benchmarks,
            )
            tracing = profiling(folder, loop.profiled, process, clock, console.say)
            with tracing as trace:
                for stage in stages[position.stage :]:  # one, unless the run grows on its way
                    resumed = saved if stage.number == position.stage else None
                    with clock.paused():
                        objects = build_objects(context, stage)
                        fill_state(context, objects, stage, resumed)
                        position.stage = stage.number
                        for line in introduction(context, objects, stage):
                            console.say(line)
                    newest = None if resumed is None else position.step
                    tensors = objects.objective, objects.optimizer.optimizer
                    heartbeat = watching(signs(), process, processes, loop.hang_seconds)
                    averaged = objects.averaged
                    more = newest, averaged, run.settings_hash
                    checkpointing = saving(checkpoints, *tensors, accelerator, loop, *more)
                    with heartbeat as alive, checkpointing as saver:
                        run_begins = resumed is None and stage.number == 0
                        if resumed is None:
                            alive()
                            validate(context, objects, "eval" if run_begins else "growth")
                        # a sharded network samples at its end
                        if run_begins and not accelerator.is_fsdp2:
                            write_samples(context, objects, "start")
                        if resumed is not None and main:
                            # a kill may have come before the copy
                            keep_stable(folder, settings, position.step)
                        check_range(context, objects, saver)
                        objects.step.model.train()
                        while position.step < stage.last:
                            # ---- 6. One optimizer step (train/step.py) -------------------------------------
                            rate = objects.step.rate(position.step)
                            objects.load.clear()
                            alive()
                            try:
                                number = position.step + 1
                                with trace.step(number), diagnosing(objects, number):
                                    clock.count(*objects.step(position.step))
                                    if objects.average is not None:
                                        objects.average.update()
                            except NotFinite as fault:
                                if fault.weights or position.skipped == loop.skip_nonfinite:
                                    raise stopping(context, saver, fault) from None
                                clock.skip()
                                if log:
                                    log.write("skip", clock.clocks(), reason=str(fault))

                            # ---- 7. Log, evaluate, save ----------------------------------------------------
                            if budget.due(budget.log_every, position.step):
                                row = clock.close_interval()
                                row |= objects.load.row(accelerator)
                                if objects.step.noise is not None:
                                    row |= objects.step.noise.close_interval()
                                if log and row["loss"] is not None:
                                    log.write("train", clock.clocks(), learning_rate=rate, **row)
                            if log and objects.diagnostics and objects.diagnostics.row:
                                log.write("diagnostics", clock.clocks(), **objects.diagnostics.row)
                            if budget.due(budget.eval_every, position.step):
                                alive()
                                validate(context, objects)
                                check_range(context, objects, saver)
                            benchmarks_due = budget.due(benchmark_steps, position.step)
                            if benchmarks is not None and benchmarks_due:
                                alive()
                                measure_benchmarks(context, objects)
                            signalled = any_process(accelerator, asked() is not None)
                            stop = signalled and position.step < budget.steps
                            grows = position.step == stage.last < budget.steps
                            branches = position.step == branch_step(settings)
                            saves = budget.saves(position.step, best=position.best_step)
                            if stop or grows or branches or saves:
                                with clock.paused():
                                    save(context, objects, saver)
                                    if branches:
                                        saver.wait()
                                        if main:
                                            keep_stable(folder, settings, position.step)
                            if stop:
                                saver.wait()
                                # the first process to end may take the others with it
                                accelerator.wait_for_everyone()
                                raise stopped(asked(), f"after step {position.step}, which is saved")
                        check_weights(context, objects, saver)
                    if stage is not stages[-1]:
                        following = stages[stage.number + 1]
                        validate(context, objects, "before_growth")
                        grow_into(context, objects, following)

            # ---- 8. The end: a Hugging Face folder, and last the summary, which makes the run complete -----
            accelerator.wait_for_everyone()
            publish_average(context, objects, run)
            weights = whole_weights(objects.objective, accelerator)
            if main:
                summary = summarise(position)
                keeps_state = loop.keep_optimizer or run_folder.keeps_optimizer(folder)
                kept = objects.optimizer_state() if keeps_state else None
                final = publish(folder, objects.network, weights, data, run, summary, kept, dtype)
                write_samples(context, objects, "end", None if weights is None else final)
                # the metrics are on the disk before the summary says that they are complete
                logged = metrics_so_far(context).encode()
                ended = replace(summary, metrics=hashlib.sha256(logged).hexdigest())
                write_json(folder / run_folder.SUMMARY, signed(ended.to_json()))
                losses = f"{summary.start_val_loss:.4f} → {summary.final_val_loss:.4f}"
                console.say(f"val loss {losses}: {folder}")
            accelerator.wait_for_everyone()
            if any_process(accelerator, asked() is not None):  # nor does anything begin after it
                raise stopped(asked(), "at its end, which is complete")
    return folder


def train_horizons(settings: Settings) -> list[Path]:
    """Train the run of every horizon in turn, each from the longest trunk before it, and return their
    folders.

    Raises:
        UserError, Stopped: as `train` does.
    """
    folders: list[Path] = []
    for run in horizon_runs(settings):
        folders.append(train(run, trunks=folders))
    return folders


# ---- what the banners call ---------------------------------------------------------------------------------


def check_end_left(folder: Path, run: RunRecord, missing: str) -> None:
    """Refuse to train a complete run again from its very start for what its end was not asked to keep.

    Raises:
        UserError: no checkpoint of it is left.
    """
    checkpoints = folder / run_folder.CHECKPOINTS
    if run.trunk is None and not state.complete(checkpoints):
        raise UserError(
            f"{folder} is complete without {missing}, and no checkpoint of it is left to train its end "
            "again from (train.save_every_tokens says when one is written); delete the folder to train "
            "the whole run again, or choose another name="
        )


def diagnosing(objects: TrainingObjects, number: int) -> AbstractContextManager[None]:
    """The context of the optimizer step of that number, which its diagnostics look at where it is due."""
    return nullcontext() if objects.diagnostics is None else objects.diagnostics.step(number)


def measured(
    settings: Settings,
    config: dict[str, Any],
    data: TokenData,
    accelerator: Accelerator,
    way: Way,
    cut: dict[str, str] | None,
) -> dict[str, Any]:
    """The entries of the run's record that settings do not tell: the counted network, the text, the
    machine."""
    budget = settings.budget
    context = settings.train.context
    rows = budget.steps * budget.rows
    read = tokens_read(data.train, settings.data.name, rows, context)
    return {
        "parameters": parameter_count(config),
        "active_parameters": active_parameter_count(config),
        "flops_per_token": flops_per_token(config, context),
        "flops_from": flops_source(config, context),
        "tokens_per_step": budget.tokens_per_step,
        "budget_tokens": budget.steps * budget.tokens_per_step,
        "data": TextRecord(data.fingerprint, data.validation.bytes_per_token, read, cut),
        "target_config": config,
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "attention": way.attention,
        "precision": precision_of(accelerator.mixed_precision),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }
