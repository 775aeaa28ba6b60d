"""The training loop: one function that tells the whole story of a run, in order.

from train.loop import train
train(compose(["experiment=tiny", "growth=lossless"]))   # → runs/tiny-lossless-s0
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from model.build import attention_backend
from model.geometry import flops_per_token, parameter_count
from train import folder as run_folder
from train import state
from train.data import TokenData, check_vocabulary, prepare
from train.data.batches import validation_batches, window_count
from train.data.mixture import mixed
from train.device import device_name, peak_flops, session
from train.distribute import prepare as prepare_processes
from train.distribute import whole_weights
from train.evaluate import evaluate
from train.files import write_json
from train.log import Console, open_log
from train.loss import build_loss, check_loss
from train.meter import Meter
from train.optimizer import build_optimizer
from train.publish import publish
from train.saving import saving
from train.settings import Budget, Settings
from train.signals import Stopped, any_process, watched
from train.speed import speed_up
from train.start import begin, find_source, source_ledger, starting_model, target_config
from train.step import NotFinite, Step


def train(settings: Settings) -> Path:
    """Train the run that `settings` describe, from its start or from its newest checkpoint, and return its folder.

    A complete run returns at once. Every process of a distributed run calls this with the same settings; process 0 writes.

    Raises:
        UserError: the settings, the text, the source and the folder do not go together, the disk is full, or a loss is not finite.
        Stopped: SIGTERM or SIGUSR1 came; a checkpoint of the last step is saved.
    """
    folder, loop, budget = Path(settings.out), settings.train, Budget.of(settings.train)
    console = Console(settings.progress and "lines", settings.name, loop.budget_tokens)

    # ---- 1. Is there anything to do? --------------------------------------------------------------------------------------------------
    run = run_folder.read_run(folder)
    if run is not None:
        run_folder.check_same(folder, run, settings)
        if run_folder.is_complete(folder):
            console.say(f"already complete: {folder}")
            return folder

    with session(loop.precision, settings.sharding) as accelerator, run_folder.locked(folder, accelerator.is_main_process):
        # ---- 2. Who trains: every process, and the main one writes --------------------------------------------------------------------
        main = accelerator.is_main_process

        # ---- 3. The network, and the text that it reads -------------------------------------------------------------------------------
        source = find_source(settings, needed=run is None)
        config = target_config(settings, source) if run is None else run["target_config"]
        told = main and settings.progress is not False
        data = prepare(settings.data, progress=told)
        data = mixed(settings.mixture, settings.data, data, context=loop.context, rows=budget.steps * budget.rows, progress=told)
        check_vocabulary(data, config["vocab_size"])
        check_loss(config, loop, accelerator.device)
        windows = list(validation_batches(data.validation, context=loop.context, tokens=loop.eval_tokens))
        window_count(data.train, loop.context)  # refuses a text that is too short before anything is grown

        # ---- 4. The start: scratch, the source, or the source grown -------------------------------------------------------------------
        if run is None:
            if main:
                start = begin(settings, source, folder)
                write_json(folder / run_folder.RUN, run_folder.new_run(settings, start=start, **facts(settings, config, data, accelerator)))
            accelerator.wait_for_everyone()
            run = run_folder.read_run(folder)
            assert run is not None
        run_folder.check_same_inputs(folder, run, data.fingerprint, source_ledger(settings, source))
        attention, why = attention_backend(loop.attention)
        network = starting_model(settings, source, folder, config, attention)
        assert sum(p.numel() for p in network.parameters()) == run["parameters"], "geometry and the built model count different parameters"

        # ---- 5. The optimizer, and everything back in place when resuming -------------------------------------------------------------
        optimizer: Any = build_optimizer(network, settings.optimizer)
        speed_up(network, loop)
        objective = build_loss(network, config, loop, data.end_of_text_id)
        model, optimizer = prepare_processes(objective, optimizer, accelerator)
        checkpoints = folder / run_folder.CHECKPOINTS
        saved = state.complete(checkpoints, tidy=main)
        position = state.read(saved[-1], objective, optimizer.optimizer) if saved else state.Position()
        if main:
            state.cut_metrics(folder / run_folder.METRICS, position.step if saved else -1)
        step = Step(model, optimizer, accelerator, data.train, settings)
        console.say(f"{run['parameters']:,} parameters, steps {position.step} to {budget.steps} of {budget.tokens_per_step:,} tokens")
        console.say(f"{run['device']}, {accelerator.num_processes} process(es), {run['precision']}, attention {attention} ({why})")

        with (
            open_log(folder, settings, run, writes=main) as log,
            saving(checkpoints, objective, optimizer.optimizer, accelerator, loop, position.step if saved else None) as saver,
            watched() as asked,
        ):
            peak = peak_flops(device_name(accelerator.device), run["precision"])
            meter = Meter(position, accelerator.num_processes, budget.tokens_per_step, run["flops_per_token"], peak)

            def validate() -> None:
                with meter.paused():
                    found = evaluate(objective, windows, accelerator, data.validation.bytes_per_token)
                    position.start_val_loss = found.val_loss if position.step == 0 else position.start_val_loss
                    position.val_loss, position.bits_per_byte = found.val_loss, found.bits_per_byte
                    if position.step > 0 and (position.best_val_loss is None or found.val_loss < position.best_val_loss):
                        position.best_val_loss, position.best_step = found.val_loss, position.step
                if log:
                    log.write("eval", meter.clocks(), **asdict(found))

            if position.start_val_loss is None:
                validate()
            model.train()
            while position.step < budget.steps:
                # ---- 6. One step (train/step.py) --------------------------------------------------------------------------------------
                rate = step.rate(position.step)
                try:
                    meter.count(*step(position.step))
                except NotFinite as fault:
                    if position.skipped == loop.skip_nonfinite:
                        saver.save(position)
                        saver.wait()
                        raise fault.with_way_out(position.step) from None
                    meter.skip()
                    if log:
                        log.write("skip", meter.clocks(), reason=str(fault))

                # ---- 7. Tell, evaluate, save ------------------------------------------------------------------------------------------
                if budget.due(budget.log_every, position.step):
                    row = meter.close_interval()
                    if log and row["loss"] is not None:
                        log.write("train", meter.clocks(), learning_rate=rate, **row)
                if budget.due(budget.eval_every, position.step):
                    validate()
                stopped = any_process(accelerator, asked() is not None) and position.step < budget.steps
                if budget.saves(position.step, best=position.best_step) or stopped:
                    with meter.paused():
                        saver.save(position)
                if stopped:
                    saver.wait()
                    raise Stopped(f"stopped by {asked() or 'a signal to another process'} after step {position.step}, which is saved")

        # ---- 8. The end: a Hugging Face folder, and last the summary, which makes the run complete ------------------------------------
        accelerator.wait_for_everyone()
        weights = whole_weights(objective, accelerator)
        if main:
            summary = summarise(position)
            publish(folder, network, weights, data, run, summary)
            write_json(folder / run_folder.SUMMARY, summary)
            console.say(f"val loss {summary['start_val_loss']:.4f} → {summary['final_val_loss']:.4f}: {folder}")
        accelerator.wait_for_everyone()
    return folder


def facts(settings: Settings, config: dict[str, Any], data: TokenData, accelerator: Accelerator) -> dict[str, Any]:
    """What run.json records beside the settings: the counted network, the text, the machine."""
    budget = Budget.of(settings.train)
    return {
        "parameters": parameter_count(config),
        "flops_per_token": flops_per_token(config, settings.train.context),
        "tokens_per_step": budget.tokens_per_step,
        "budget_tokens": budget.steps * budget.tokens_per_step,
        "data": {"fingerprint": data.fingerprint, "bytes_per_token": data.validation.bytes_per_token},
        "target_config": config,
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "attention": attention_backend(settings.train.attention)[0],
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
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
