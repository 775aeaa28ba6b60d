"""A network in training: made for one stage of a run, trained through it, and grown into the next."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model
from outgrow.model.checkpoint import names_of
from outgrow.model.geometry import active_parameter_count, parameter_count
from outgrow.train.data import TokenData
from outgrow.train.evaluate import evaluate
from outgrow.train.experts import ExpertLoad
from outgrow.train.loss import build_loss
from outgrow.train.machine.compile import speed_up
from outgrow.train.machine.device import device_name, signs
from outgrow.train.machine.distribute import prepare as prepare_processes
from outgrow.train.machine.distribute import whole_weights
from outgrow.train.machine.watch import watching
from outgrow.train.optimizer import build_optimizer
from outgrow.train.router import unbalanced
from outgrow.train.run import folder as run_folder
from outgrow.train.run import state
from outgrow.train.run.checkpoints import Saver, saving
from outgrow.train.run.clock import Meter
from outgrow.train.run.horizons import branch_step, keep_stable
from outgrow.train.run.log import Console, Log
from outgrow.train.run.reading import loss_warnings
from outgrow.train.run.samples import samples
from outgrow.train.run.signals import Stopped, any_process
from outgrow.train.settings import Budget, Settings
from outgrow.train.start.source import grow_on, starting_model
from outgrow.train.start.stages import Stage
from outgrow.train.start.teacher import Teacher, taught
from outgrow.train.start.transfer import entry_rates, mup_rates, named_state, take_over
from outgrow.train.start.way import Way
from outgrow.train.step import NotFinite, Step, drawn

if TYPE_CHECKING:
    from outgrow.train.suite.during import Benchmarks


@dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    settings: Settings
    folder: Path
    accelerator: Accelerator
    data: TokenData
    windows: list[Any]  # that the validation loss is taken on
    console: Console
    log: Log | None  # on the process that writes
    asked: Callable[[], str | None]  # the signal that asked this process to stop
    meter: Meter
    way: Way
    dtype: str  # that the end stores the weights in
    benchmarks: Benchmarks | None = None  # on the process that writes


class Trainee:
    """A network with its optimizer, in place to train through one stage.

    Args:
        teacher: a network that teaches it beside the text.
        saved: the checkpoint that it goes on from; None where the stage begins.
    """

    def __init__(self, run: Run, stage: Stage, source: Path | None, teacher: Teacher | None, saved: Path | None) -> None:
        self.run, self.stage, self.saved = run, stage, saved
        settings, loop, accelerator = run.settings, run.settings.train, run.accelerator
        way = run.way
        self.network = starting_model(settings, stage, source, run.folder, way.attention)
        parameters = sum(p.numel() for p in self.network.parameters())
        assert parameters == parameter_count(stage.config), "geometry and the built model count different parameters"
        entries = entry_rates(self.network, settings, stage, run.folder)
        rates = mup_rates(self.network, settings, stage, source)
        optimizer: Any = build_optimizer(self.network, settings.optimizer, rates)
        speed_up(self.network, loop)
        own = build_loss(self.network, loop, run.data.end_of_text_id, fused=way.fused, masked=way.masked)
        self.objective = taught(own, teacher, accelerator.device)
        self.model, self.optimizer = prepare_processes(self.objective, optimizer, accelerator, unused=way.partly)
        if saved is None:
            take_over(self.optimizer.optimizer, self.network, settings, stage, source, run.folder)
        else:
            state.read(saved, self.objective, self.optimizer.optimizer)
        run.meter.position.stage = stage.number
        self.step = Step(self.model, self.optimizer, accelerator, run.data.train, settings, entries)
        self.load = ExpertLoad(self.network)
        tokens = Budget.of(loop).tokens_per_step
        active = active_parameter_count(stage.config)
        met = f" ({active:,} active for each token)" if active < parameters else ""
        run.console.say(f"{parameters:,} parameters{met}, steps {run.meter.position.step} to {stage.last} of {tokens:,} tokens")
        for line in filter(None, (unbalanced(self.network), drawn(self.network))):
            run.console.say(line)
        device, precision = device_name(accelerator.device), "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        run.console.say(f"{device}, {accelerator.num_processes} process(es), {precision}, attention {way.attention} ({way.why})")

    def train(self) -> None:
        """Train to the end of the stage; its last state is saved where another stage follows."""
        run, settings, stage = self.run, self.run.settings, self.stage
        loop, budget, meter, log = settings.train, Budget.of(settings.train), run.meter, run.log
        position, checkpoints = meter.position, run.folder / run_folder.CHECKPOINTS
        standing = None if self.saved is None else position.step
        processes = run.accelerator.process_index, run.accelerator.num_processes
        with (
            watching(signs(), *processes, loop.hang_seconds) as self.watch,
            saving(checkpoints, self.objective, self.optimizer.optimizer, run.accelerator, loop, standing) as saver,
        ):
            if self.saved is None:
                self.validate("eval" if stage.number == 0 else "growth")
            if self.saved is None and stage.number == 0 and not run.accelerator.is_fsdp2:  # a sharded network writes when it is whole again
                self.write_samples("start")
            if standing is not None and run.accelerator.is_main_process:
                keep_stable(run.folder, settings, position.step)  # a kill may have come between the checkpoint and its copy
            self.check_range(saver)
            self.model.train()
            while position.step < stage.last:
                # ---- 6. One step (train/step.py) --------------------------------------------------------------------------------------
                rate = self.step.rate(position.step)
                self.load.clear()
                self.sign()
                try:
                    meter.count(*self.step(position.step))
                except NotFinite as fault:
                    if fault.weights or position.skipped == loop.skip_nonfinite:
                        raise self.stopping(fault, saver) from None
                    meter.skip()
                    if log:
                        log.write("skip", meter.clocks(), reason=str(fault))

                # ---- 7. Tell, evaluate, save ------------------------------------------------------------------------------------------
                if budget.due(budget.log_every, position.step):
                    row = meter.close_interval() | self.load.row(run.accelerator)
                    if log and row["loss"] is not None:
                        log.write("train", meter.clocks(), learning_rate=rate, **row)
                if budget.due(budget.eval_every, position.step):
                    self.validate()
                    self.check_range(saver)
                if self.benchmarks_due():
                    self.benchmark()
                stopped = any_process(run.accelerator, run.asked() is not None) and position.step < budget.steps
                handed_on = position.step == stage.last < budget.steps
                branches = position.step == branch_step(settings)
                if budget.saves(position.step, best=position.best_step) or stopped or handed_on or branches:
                    with meter.paused():
                        self.save(saver)
                        if branches:
                            saver.wait()
                            if run.accelerator.is_main_process:
                                keep_stable(run.folder, settings, position.step)
                if stopped:
                    saver.wait()
                    run.accelerator.wait_for_everyone()  # the first process to end may take the others with it
                    by = run.asked()
                    said = f"stopped by {by or 'a signal to another process'} after step {position.step}, which is saved"
                    raise Stopped(said, by)
            self.check_weights(saver)

    def save(self, saver: Saver) -> None:
        """Save where the run stands, unless a weight is not finite: the checkpoint that is there stays the newest.

        Raises:
            UserError: a weight is not finite, or beyond what it is to be stored in at the end.
        """
        self.check_weights(saver)
        saver.save(self.run.meter.position, self.rows())
        self.check_range(saver)

    def rows(self) -> str:
        """The run's metrics so far, on the disk; "" on the processes that do not write."""
        return self.run.log.rows() if self.run.log else ""

    def check_weights(self, saver: Saver) -> None:
        """Stop the run where a weight is not finite: what it trains from here on, and its end, would be worth nothing."""
        try:
            self.step.check_weights(self.run.meter.position.step)
        except NotFinite as fault:
            raise self.stopping(fault, saver) from None

    def check_range(self, saver: Saver) -> None:
        """Stop the run where a weight is beyond the dtype that the end will store it in, with its state saved to go on from in another.

        Raises:
            UserError: a weight is.
        """
        step, dtype = self.run.meter.position.step, self.run.dtype
        if dtype == "float32" or not (names := self.step.beyond(getattr(torch, dtype))):
            return
        if step:
            saver.save(self.run.meter.position, self.rows())
        saver.wait()
        raise UserError(
            f"train.save_dtype: after step {step}, {names_of(names)} hold values beyond the range of {dtype}; the same command with "
            "train.save_dtype=bfloat16 or float32 goes on from there"
        )

    def stopping(self, fault: NotFinite, saver: Saver) -> UserError:
        """The error that a run stops with; its last state with finite weights is on the disk then."""
        if not fault.weights:
            saver.save(self.run.meter.position, self.rows())
        saver.wait()
        return fault.with_way_out(saver.newest)

    def sign(self) -> None:
        """Something has ended, and nothing hangs."""
        if self.watch is not None:
            self.watch.step()

    def validate(self, kind: str = "eval") -> None:
        """Take the validation loss, off the training clock, and tell it: of a network that has just grown as "growth"."""
        run, position = self.run, self.run.meter.position
        self.sign()
        with run.meter.paused():
            found = evaluate(self.objective, run.windows, run.accelerator, run.data.validation.bytes_per_token)
        if kind == "eval":
            if position.start_val_loss is None:
                position.start_val_loss = found.val_loss
                for line in loss_warnings(run.settings, found.val_loss, run.data.vocab_size):
                    run.console.say(line)
            position.val_loss, position.bits_per_byte = found.val_loss, found.bits_per_byte
            best = math.inf if position.best_val_loss is None else position.best_val_loss
            if position.step > 0 and found.val_loss < best:  # never of one that is not a number
                position.best_val_loss, position.best_step = found.val_loss, position.step
        if run.log:
            run.log.write(kind, run.meter.clocks(), **asdict(found))

    def benchmarks_due(self) -> bool:
        """Whether benchmarks are due after the step that was just done."""
        run, loop = self.run, self.run.settings.train
        every = run.settings.evaluate.every_tokens
        steps = None if every is None else max(1, round(every / loop.batch_tokens))
        return run.benchmarks is not None and Budget.of(loop).due(steps, run.meter.position.step)

    def benchmark(self) -> None:
        """Measure the suite, off the training clock, on the process that writes; the others wait for it in their next step."""
        run = self.run
        assert run.benchmarks is not None
        self.sign()
        with run.meter.paused():
            scores = run.benchmarks.measure(self.network, run.accelerator)
        if run.log:
            run.log.write("benchmark", run.meter.clocks(), **scores)

    def write_samples(self, when: str, final: Path | None = None) -> None:
        """Tell what the network writes, off the training clock; the one in the folder `final` where this one is not whole."""
        run = self.run
        if run.log is None:
            return
        with run.meter.paused():
            network = self.network if final is None else load_model(final).to(run.accelerator.device)
            run.log.samples(when, run.meter.clocks(), lambda: samples(network, run.data, run.windows, run.accelerator))

    def grow(self, following: Stage) -> None:
        """Make the start of the `following` stage from this one's end, on disk, and let go of this one."""
        run = self.run
        with run.meter.paused():
            weights = whole_weights(self.objective, run.accelerator)
            if run.accelerator.is_main_process:
                grow_on(self.network, weights, self.adam() if following.moments else None, following, run.settings, run.folder)
            run.accelerator.wait_for_everyone()
            run.accelerator.free_memory()

    def adam(self) -> dict[str, Any]:
        """The optimizer's state with the parameters' names."""
        return named_state(self.optimizer.optimizer, self.network)
