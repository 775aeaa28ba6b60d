"""`write`: every prompt answered once, several at a time, however often the command is stopped and started again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from outgrow.model.base.errors import UserError
from outgrow.train.data.writing.answer import Answer
from outgrow.train.data.writing.ledger import Ledger, in_order, open_ledger, rejected_path
from outgrow.train.data.writing.prompts import Prompt, Prompts
from outgrow.train.data.writing.settings import WriteSettings

HOPELESS = 20  # answers in a row without one document, after which something is wrong with the settings
Answered = Iterator[tuple[Prompt, Answer]]


def write(settings: WriteSettings) -> str:
    """Write what is missing of `settings.number` documents; return the report.

    Raises:
        UserError: the settings, the server, the model or the files are at fault; what was answered by then is on disk.
    """
    with open_ledger(settings) as ledger:
        prompts = Prompts(settings.prompts, settings.seed)
        missing = (prompts[number] for number in range(settings.number) if number not in ledger.done)
        stopped = _fill(settings, ledger, missing)
        complete = all(number in ledger.done for number in range(settings.number))
        found = report(settings, ledger, stopped)
    if complete:
        in_order(Path(settings.out).expanduser())
    return found


def _fill(settings: WriteSettings, ledger: Ledger, missing: Iterator[Prompt]) -> bool:
    """Note answers as they come; True where the money stopped it."""

    def affordable() -> Iterator[Prompt]:
        for prompt in missing:
            if settings.most_dollars is not None and ledger.dollars >= settings.most_dollars:
                return
            yield prompt

    answered = _from_server if settings.server else _from_model
    vain = 0
    with _bar(settings, ledger) as advance:
        for prompt, answer in answered(settings, affordable()):
            ledger.add(prompt, answer)
            advance()
            vain = 0 if answer.fault is None else vain + 1
            if vain >= HOPELESS:
                where = rejected_path(Path(settings.out))
                raise UserError(f"{HOPELESS} answers in a row were no documents, the last: {answer.fault}; see {where}")
    return settings.most_dollars is not None and ledger.dollars >= settings.most_dollars


def _from_server(settings: WriteSettings, prompts: Iterable[Prompt]) -> Answered:
    """Answers as they come, `at_once` in flight; after a fault those in flight are still taken."""
    from outgrow.train.data.writing.server import Server

    server, left = Server(settings), iter(prompts)
    running: dict[Future[Answer], Prompt] = {}
    fault: UserError | None = None
    with ThreadPoolExecutor(settings.at_once) as pool:
        try:
            while True:
                if fault is None:
                    running |= {pool.submit(server.answer, prompt): prompt for prompt in islice(left, settings.at_once - len(running))}
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    prompt, error = running.pop(future), future.exception()
                    if error is None:
                        yield prompt, future.result()
                    elif not isinstance(error, UserError):
                        raise error
                    else:
                        fault = fault or error
                        server.stopped.set()
        finally:
            server.close()
    if fault is not None:
        raise fault


def _from_model(settings: WriteSettings, prompts: Iterable[Prompt]) -> Answered:
    """Answers of a model on this machine, in batches of `at_once`; loaded only where something is left to write."""
    from outgrow.train.data.writing.local import Local

    left, model = iter(prompts), None
    while batch := list(islice(left, settings.at_once)):
        model = model or Local(settings)
        yield from zip(batch, model.answers(batch), strict=True)


def report(settings: WriteSettings, ledger: Ledger, stopped: bool) -> str:
    """What there is now, with its counts and its price."""
    missing = sum(number not in ledger.done for number in range(settings.number))
    lines = [
        f"{settings.out}: {ledger.documents:,} documents of {settings.number:,}",
        *(f"  rejected, {fault}: {count:,}" for fault, count in sorted(ledger.faults.items())),
        f"  tokens: {ledger.tokens['prompt_tokens']:,} of prompts, {ledger.tokens['completion_tokens']:,} written",
        f"  cost: ${ledger.dollars:.4f}",
    ]
    if ledger.uncounted:
        lines.append(f"  {ledger.uncounted:,} answers came without counts: the true numbers are higher")
    if stopped and missing:
        lines.append(f"  stopped at most_dollars={settings.most_dollars:g}; {missing:,} prompts are left: raise it to go on")
    return "\n".join(lines)


@contextmanager
def _bar(settings: WriteSettings, ledger: Ledger) -> Iterator[Callable[[], None]]:
    """A bar over prompts on stderr; nothing where it is not wanted."""
    if not settings.progress:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("writing, ${task.fields[dollars]:.2f}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        done = sum(number < settings.number for number in ledger.done)
        task = shown.add_task("", total=settings.number, completed=done, dollars=ledger.dollars)
        yield lambda: shown.update(task, advance=1, dollars=ledger.dollars)
