"""What a run keeps: checkpoints of finite weights, the next stage's start, averaged weights, its summary."""

from __future__ import annotations

import torch

from outgrow.model.base.errors import UserError, names_of
from outgrow.train.machine.distribute import whole_weights
from outgrow.train.objects import RunContext, TrainingObjects
from outgrow.train.run import state
from outgrow.train.run.checkpoints import Saver
from outgrow.train.run.export import publish
from outgrow.train.run.record import RunRecord, Summary
from outgrow.train.run.signals import Stopped
from outgrow.train.start.source import grow_on
from outgrow.train.start.stages import Stage
from outgrow.train.step import NotFinite


def save(context: RunContext, objects: TrainingObjects, saver: Saver) -> None:
    """Save a checkpoint, unless a weight is not finite: then the one before stays the newest.

    Raises:
        UserError: a weight is not finite, or out of range of the dtype that it will be stored in at the end.
    """
    check_weights(context, objects, saver)
    saver.save(context.clock.position, metrics_so_far(context))
    check_range(context, objects, saver)


def metrics_so_far(context: RunContext) -> str:
    """The rows of metrics.jsonl, which are on the disk when this returns; "" on processes that do not
    write."""
    return context.log.rows() if context.log else ""


def check_weights(context: RunContext, objects: TrainingObjects, saver: Saver) -> None:
    """Stop the run where a weight is not finite: nothing that it trains from here on is of any use.

    Raises:
        UserError: a weight is not finite.
    """
    try:
        objects.step.check_weights(context.clock.position.step)
    except NotFinite as fault:
        raise stopping(context, saver, fault) from None


def check_range(context: RunContext, objects: TrainingObjects, saver: Saver) -> None:
    """Stop the run where a weight is out of range of the dtype that it will be stored in (train.save_dtype).

    The state is saved, so that the run can go on under another dtype.

    Raises:
        UserError: naming such weights.
    """
    dtype = context.dtype
    if dtype == "float32":
        return
    names = objects.step.beyond(getattr(torch, dtype))
    if not names:
        return
    step = context.clock.position.step
    if step:
        saver.save(context.clock.position, metrics_so_far(context))
    saver.wait()
    raise UserError(
        f"train.save_dtype: after step {step}, {names_of(names)} hold values beyond the range of {dtype}; "
        "the same command with train.save_dtype=bfloat16 or float32 goes on from there"
    )


def stopping(context: RunContext, saver: Saver, fault: NotFinite) -> UserError:
    """The error to stop the run with, once its last state with finite weights is on the disk."""
    if not fault.weights:
        saver.save(context.clock.position, metrics_so_far(context))
    saver.wait()
    return fault.with_way_out(saver.newest)


def stopped(signal: str | None, when: str) -> Stopped:
    """The end of a run that a signal stopped; None: the signal came to another process."""
    cause = signal or "a signal to another process"
    return Stopped(f"stopped by {cause} {when}", signal)


def grow_into(context: RunContext, objects: TrainingObjects, following: Stage) -> None:
    """Grow the trained network into the start of the `following` stage, on disk, and free its memory.

    The averaged weights grow as the weights do: by the same maps, with the same random numbers.
    """
    accelerator = context.accelerator
    settings = context.settings
    folder = context.folder
    with context.clock.paused():
        weights = whole_weights(objects.objective, accelerator)
        if accelerator.is_main_process:
            optimizer_state = None if following.rule == "reset" else objects.optimizer_state()
            start = following.start(folder)
            grow_on(objects.network, weights, optimizer_state, following, settings, start)
        if objects.average is not None:
            with objects.average.applied():
                averaged = whole_weights(objects.objective, accelerator)
                if accelerator.is_main_process:
                    start = following.averaged_start(folder)
                    grow_on(objects.network, averaged, None, following, settings, start)
        accelerator.wait_for_everyone()
        accelerator.free_memory()


def publish_average(context: RunContext, objects: TrainingObjects, run: RunRecord) -> None:
    """Write the averaged weights of a run that has ended, where it keeps them, beside its `final/`."""
    if objects.average is None:
        return
    accelerator = context.accelerator
    data = context.data
    with objects.average.applied():
        weights = whole_weights(objects.objective, accelerator)
        if accelerator.is_main_process:
            summary = summarise(context.clock.position)
            arguments = run, summary, None, context.dtype
            publish(context.folder, objects.network, weights, data, *arguments, averaged=True)


def summarise(position: state.Position) -> Summary:
    """The summary of a run that stands at `position`, its end."""
    losses = position.start_val_loss, position.val_loss, position.bits_per_byte
    return Summary(
        *losses,  # type: ignore[arg-type]  # measured at step 0 and after the last step
        tokens=position.tokens,
        flops=position.flops,
        seconds=round(position.seconds, 3),
        steps=position.step,
        skipped_steps=position.skipped,
        ema_val_loss=position.ema_val_loss,
        ema_bits_per_byte=position.ema_bits_per_byte,
    )
