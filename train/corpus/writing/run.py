"""`write`: every prompt answered once, several at a time, however often the command is stopped and started
again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from outgrow.model.base.errors import UserError
from outgrow.train.corpus.writing.answer import Answer
from outgrow.train.corpus.writing.ledger import Ledger, in_order, open_ledger, rejected_path
from outgrow.train.corpus.writing.prompts import Prompt, Prompts
from outgrow.train.corpus.writing.settings import WriteSettings

HOPELESS = 20  # answers in a row without one document, after which something is wrong with the settings
Answered = Iterator[tuple[Prompt, Answer]]


@dataclass
class Stop:
    """The reason why no more prompts are asked, and which were put aside: nothing of it is on disk, and the
    same command asks them again.
    """

    fault: str | None = None
    money: bool = False
    aside: Counter[str] = field(default_factory=Counter)

    @property
    def now(self) -> bool:
        return self.money or self.fault is not None


def write(settings: WriteSettings) -> str:
    """Write what is missing of `settings.number` documents; return the report.

    Raises:
        UserError: the settings, the server, the model or the files are at fault; what was answered by then is
        on disk.
    """
    with open_ledger(settings) as ledger:
        prompts = Prompts(settings.prompts, settings.seed)
        numbers = range(settings.number)
        missing = (prompts[number] for number in numbers if number not in ledger.done)
        stop = _fill(settings, ledger, missing)
        complete = all(number in ledger.done for number in numbers)
        summary = report(settings, ledger, stop)
    if stop.fault is not None:
        raise UserError(f"{stop.fault}\n{summary}")
    if complete:
        in_order(Path(settings.out).expanduser())
    return summary


def _fill(settings: WriteSettings, ledger: Ledger, missing: Iterator[Prompt]) -> Stop:
    """Note answers as they come, until there are no more, the money is spent, or nothing but faults comes."""
    stop = Stop()
    answered = vain = 0
    most = settings.most_dollars

    def prompts() -> Iterator[Prompt]:
        for prompt in missing:
            stop.money = most is not None and ledger.dollars >= most
            if stop.now:
                return
            yield prompt

    with _bar(settings, ledger) as advance:
        answers = _from_server if settings.server else _from_model
        for prompt, answer in answers(settings, prompts()):
            is_good = answer.aside is None and answer.fault is None
            vain = 0 if is_good else vain + 1
            if answer.aside is not None:
                stop.aside[answer.aside[:100]] += 1
            else:
                ledger.add(prompt, answer)
                answered += 1
                advance()
            stop.fault = stop.fault or _hopeless(settings, answer, vain)
    if stop.aside and not answered:
        stop.fault = (
            stop.fault
            or f"server={settings.server}: no prompt was answered, after {settings.attempts} attempts at each"
        )
    return stop


def _hopeless(settings: WriteSettings, answer: Answer, vain: int) -> str | None:
    """The reason why going on is of no use; None where there is none."""
    if settings.most_dollars is not None and answer.uncounted:
        return (
            f"most_dollars={settings.most_dollars:g}: server={settings.server} does not tell how many "
            "tokens it used, so that nobody knows what is spent; ask it to count them, or set "
            "most_dollars=null"
        )
    if vain >= HOPELESS:
        last = answer.aside or answer.fault
        return (
            f"{HOPELESS} prompts in a row gave no document, the last: {last}; see "
            f"{rejected_path(Path(settings.out))}"
        )
    return None


def _from_server(settings: WriteSettings, prompts: Iterable[Prompt]) -> Answered:
    """Answers as they come, `at_once` in flight; after a fault those in flight are still taken."""
    try:
        from outgrow.train.corpus.writing.server import Server
    except ImportError as absent:
        raise UserError("server: asking one needs the package openai: pip install -e '.[write]'") from absent
    server = Server(settings)
    left = iter(prompts)
    running: dict[Future[Answer], Prompt] = {}
    fault: UserError | None = None
    with ThreadPoolExecutor(settings.at_once) as pool:
        try:
            while True:
                if fault is None:
                    running |= {
                        pool.submit(server.answer, prompt): prompt
                        for prompt in islice(left, settings.at_once - len(running))
                    }
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    prompt = running.pop(future)
                    error = future.exception()
                    if error is None:
                        yield prompt, future.result()
                    elif not isinstance(error, UserError):
                        raise error
                    else:
                        fault = fault or error
        finally:
            server.close()
    if fault is not None:
        raise fault


def _from_model(settings: WriteSettings, prompts: Iterable[Prompt]) -> Answered:
    """Answers of a model on this machine, in batches of `at_once`; loaded only where something is left to
    write."""
    from outgrow.train.corpus.writing.local import Local

    left = iter(prompts)
    model = None
    while batch := list(islice(left, settings.at_once)):
        model = model or Local(settings)
        yield from zip(batch, model.answers(batch), strict=True)


def report(settings: WriteSettings, ledger: Ledger, stop: Stop) -> str:
    """A report on what there is now, with its counts and its price."""
    numbers = range(settings.number)
    missing = sum(number not in ledger.done for number in numbers)
    lines = [
        f"{settings.out}: {ledger.documents:,} documents of {settings.number:,}",
        *(f"  rejected, {fault}: {count:,}" for fault, count in sorted(ledger.faults.items())),
        (
            f"  tokens: {ledger.tokens['prompt_tokens']:,} of prompts, "
            f"{ledger.tokens['completion_tokens']:,} written"
        ),
        f"  cost: ${ledger.dollars:.4f}",
    ]
    if ledger.uncounted:
        lines.append(f"  {ledger.uncounted:,} answers came without counts: the true numbers are higher")
    lines += [
        f"  put aside, {reason}: {count:,}; the same command asks again"
        for reason, count in sorted(stop.aside.items())
    ]
    if stop.money and missing:
        lines.append(
            f"  stopped at most_dollars={settings.most_dollars:g}; {missing:,} prompts are left: raise it "
            "to go on"
        )
    return "\n".join(lines)


@contextmanager
def _bar(settings: WriteSettings, ledger: Ledger) -> Iterator[Callable[[], None]]:
    """A bar over prompts on stderr; nothing where it is not wanted."""
    if not settings.progress:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("writing, ${task.fields[dollars]:.2f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as shown:
        total = settings.number
        count_done = sum(number < total for number in ledger.done)
        task = shown.add_task("", total=total, completed=count_done, dollars=ledger.dollars)
        yield lambda: shown.update(task, advance=1, dollars=ledger.dollars)
