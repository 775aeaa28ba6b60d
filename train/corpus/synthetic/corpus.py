"""Generated documents as a corpus: item i is a function of (kind, seed, i), and only items whose program ran
as the text says are taken.

Python's `random` draws, whose sequences are the same for every process and machine; another version of Python
may draw otherwise.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, dropwhile, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from outgrow.model.base.errors import UserError
from outgrow.train.corpus.synthetic import exercises, textbooks
from outgrow.train.corpus.synthetic.checker import failures
from outgrow.train.corpus.synthetic.item import Item
from outgrow.train.corpus.synthetic.problem import draw_problem

if TYPE_CHECKING:
    from outgrow.train.corpus.read.document import Document, Tally
    from outgrow.train.data.settings import DataSettings

KINDS = {"exercises": exercises.TEMPLATES, "textbooks": textbooks.TEMPLATES}
BATCH = 500  # items, run in one process
AT_ONCE = 2  # batches that are run while the next one is drawn
PATIENCE = 20_000  # draws without one new item, after which there are no more


def draw_items(kind: str, seed: int) -> Iterator[tuple[int, Item]]:
    """Items and their numbers, no two of them with the same template, operations and theme.

    Raises:
        UserError: there are no more.
    """
    templates = list(KINDS[kind].items())
    seen: set[bytes] = set()
    last = 0
    for i in count():
        random = Random(f"{kind} {seed} {i}")
        problem = draw_problem(random)
        name, template = random.choice(templates)
        kind_of_item = f"{name} {problem.name} {problem.theme.name}"
        key = hashlib.blake2b(kind_of_item.encode(), digest_size=8).digest()
        item = None if key in seen else template(problem, random)
        if item is not None:
            seen.add(key)
            last = i
            yield i, item
        elif i - last > PATIENCE:
            raise UserError(
                f"data: the generator of {kind} has no more than {len(seen):,} distinct items; lower "
                "data.limit_documents"
            )


@dataclass(frozen=True)
class Generated:
    """Items of the kind that `settings.corpus` names, as documents."""

    settings: DataSettings

    def documents(self, tally: Tally) -> Iterator[Document]:
        kind = self.settings.corpus
        seed = self.settings.seed
        limit = self.settings.max_document_bytes
        batch = min(BATCH, self.settings.limit_documents or BATCH)
        # drawn again, for the sake of what is distinct
        left = dropwhile(lambda drawn: drawn[0] < tally.item, draw_items(kind, seed))
        for number, item, failure in _checked(left, batch):
            tally.item = number + 1
            if failure is None:
                name = f"{kind}-{seed}-{number:08d}"
                yield from tally.document(name, item.text, limit)
            else:
                tally.programs_failed += 1

    def stamp(self) -> str:
        """A hash of the settings and of this package's source and tables: another template is another
        text."""
        kind = f"{self.settings.corpus} {self.settings.seed}"
        digest = hashlib.sha256(kind.encode())
        here = Path(__file__).parent
        own = [*here.glob("*.py"), *here.glob("tables/*.yaml")]
        for file in sorted(own):
            digest.update(file.read_bytes())
        return digest.hexdigest()


_Batch = list[tuple[int, Item]]  # (number, item)
_Failures = Future[list[str | None]]  # of each item, what went wrong


def _checked(drawn: Iterator[tuple[int, Item]], size: int) -> Iterator[tuple[int, Item, str | None]]:
    """Each item with what went wrong in its program, in order; batches are run in processes of their own
    meanwhile."""
    waiting: deque[tuple[_Batch, _Failures]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while True:
            batch = list(islice(drawn, size))
            if batch:
                items = [item for _, item in batch]
                checking = pool.submit(failures, items)
                waiting.append((batch, checking))
            is_full = len(waiting) > AT_ONCE
            if waiting and (is_full or not batch):
                checked, results = waiting.popleft()
                pairs = zip(checked, results.result(), strict=True)
                yield from ((number, item, failure) for (number, item), failure in pairs)
            elif not batch:
                return
