"""A trace of some steps by torch.profiler (train.profile_steps=a-b): what ran when, on processor and GPU.

    <run>/profile/steps-3-5.json            Chrome's trace format, which https://ui.perfetto.dev opens
    <run>/profile/steps-3-5-process-1.json  of each further process

Steps are counted from 1, as in metrics.jsonl. The trace holds what lies between them too: logging,
evaluations, checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, record_function

from outgrow.model.base.files import whole_file
from outgrow.train.run.clock import Meter

FOLDER = "profile"


class Profile:
    """Traces the steps of a range on this process, and writes the trace after the last of them.

    Starting and writing are kept off the training clock.
    """

    def __init__(self, folder: Path, steps: range, process: int, clock: Meter) -> None:
        self.folder = folder / FOLDER
        self.steps = steps
        self.process = process
        self.clock = clock
        self.profiler: profile | None = None
        self.traced: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace the block, the optimizer step of that number, if it is to be traced."""
        if number not in self.steps:
            yield
            return
        if self.profiler is None:
            self._start()
        self.traced.append(number)
        try:
            with record_function(f"step {number}"):
                yield
        finally:
            if number == self.steps[-1]:
                self.finish()

    def _start(self) -> None:
        with self.clock.paused():
            self.profiler = profile()
            self.profiler.start()

    def finish(self) -> None:
        """Write what was traced, if anything was, whole or not at all.

        Raises:
            UserError: the disk is full or not writable.
        """
        if self.profiler is None:
            return
        profiler = self.profiler
        self.profiler = None
        with self.clock.paused(), whole_file(self.file) as partial:
            profiler.stop()
            profiler.export_chrome_trace(str(partial))

    @property
    def file(self) -> Path:
        """The trace, named after the steps that it holds: fewer than asked for where the run stopped."""
        own = f"-process-{self.process}" if self.process else ""
        first, last = self.traced[0], self.traced[-1]
        return self.folder / f"steps-{first}-{last}{own}.json"


@contextmanager
def profiling(
    folder: Path, steps: range, process: int, clock: Meter, say: Callable[[str], None]
) -> Iterator[Profile]:
    """A `Profile` of a run that goes on after `clock`'s step; it writes what it has traced also where the
    block ends early.
    """
    step = clock.position.step
    if steps and steps[-1] <= step:
        setting = f"train.profile_steps={steps[0]}-{steps[-1]}"
        say(f"{setting}: the run is after step {step}; nothing is traced")
    profile_of_run = Profile(folder, steps, process, clock)
    try:
        yield profile_of_run
    finally:
        profile_of_run.finish()
