"""`Batcher`: rows of different requests and adapters share a run; a thread takes them from a bounded queue.

A run begins as soon as one is over, so rows gather while the session is busy. Before a run the batcher waits for as
many rows as were in the last run and behind it, `max_wait_ms` at most: a client alone never waits, and clients side by
side share their runs.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora_export.serve.logs import bare
from lora_export.serve.problems import Problem

if TYPE_CHECKING:
    from lora_export.serve.models import Target

# What a client that was turned away is told to wait, in seconds.
LEAST_RETRY, MOST_RETRY = 1, 60


@dataclass(frozen=True)
class Limits:
    """`max_batch` rows and `max_tokens` tokens, padding included, in a run; `max_queue` rows that wait."""

    max_batch: int
    max_tokens: int
    max_queue: int
    max_wait_s: float


@dataclass(frozen=True)
class Gaps:
    """What a row is asked of its gaps: of each of the tokens at `places`, the `most` likeliest in its place."""

    places: Sequence[int]
    most: int


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a request.

    Attributes:
        model: What it asked for.
        ids: Its tokens; none of an image, and a number for each 20 ms of a sound.
        target: What `model` meant when the tokens were made.
        types: Of a pair of texts, which of the two each token is of; None for one text.
        signal: What the graph takes of an image, `[3, height, width]`, or of a sound; None for a text.
        gaps: None but for masked language models.
        number: Its place among the rows of its request, from 0.
    """

    model: str
    ids: Sequence[int]
    ticket: Ticket
    target: Target | None = None
    types: Sequence[int] | None = None
    signal: np.ndarray | None = None
    gaps: Gaps | None = None
    number: int = 0


@dataclass(eq=False)
class Ticket:
    """A request in the queue; `future` has a result for each of its rows, or the problem of one.

    Its rows know it, and it does not know them: what they hold goes with the last run of them.

    Attributes:
        deadline: In `time.monotonic`'s seconds.
    """

    deadline: float
    future: Future = field(default_factory=Future)
    results: dict[int, object] = field(default_factory=dict)
    n_rows: int = 1

    @property
    def is_over(self) -> bool:
        return self.future.done()

    def settle(self, row: Row, result: object) -> None:
        """Take the result of a row; an exception ends the whole request."""
        with contextlib.suppress(InvalidStateError):  # it was cancelled, or another row of it has failed
            if isinstance(result, BaseException):
                self.future.set_exception(result)
                return
            self.results[row.number] = result
            if len(self.results) == self.n_rows:
                self.future.set_result([self.results[number] for number in range(self.n_rows)])


class Watcher(Protocol):
    """What is told of every run."""

    def ran(self, rows: Sequence[Row], seconds: float) -> None: ...


Run = Callable[[Sequence[Row]], Sequence[object]]


class Batcher:
    """Runs the rows of many requests together.

    Args:
        run: A result for each row; an exception in a row's place is that row's, and one that is raised is the run's.
    """

    def __init__(self, run: Run, limits: Limits, watcher: Watcher) -> None:
        self._run, self._limits, self._watcher = run, limits, watcher
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._arrived: deque[float] = deque()
        self._running: tuple[Row, ...] = ()
        self._due = 1  # rows of the last run, and those that waited behind it
        self._seconds_a_row = 0.0
        self._is_open = True
        self._thread = threading.Thread(target=self._work, name="lora-export-batcher", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def models(self) -> tuple[list[str], list[str]]:
        """The models of the rows that run and of those that wait, as often as they do."""
        with self._changed:
            return [row.model for row in self._running], [row.model for row in self._waiting]

    def submit(
        self,
        model: str,
        rows: Sequence[Sequence[int]],
        deadline: float,
        *,
        target: Target | None = None,
        types: Sequence[Sequence[int]] | None = None,
        signals: Sequence[np.ndarray] | None = None,
        gaps: Sequence[Gaps] | None = None,
    ) -> Ticket:
        """Queue the rows of a request.

        Args:
            types, signals, gaps: Of rows that are pairs of texts, no texts, or texts with gaps, see `Row`.

        Raises:
            Problem: 400 if there are more rows than ever fit, 429 if they do not fit now, 503 if the server ends.
        """
        if len(rows) > self._limits.max_queue:
            raise Problem(
                400, f"The request has {len(rows)} inputs; at most {self._limits.max_queue} are taken", param="input"
            )
        ticket = Ticket(deadline)
        of_each = zip(rows, *(given or itertools.repeat(None) for given in (types, signals, gaps)), strict=False)
        made = [Row(model, ids, ticket, target, *own, number) for number, (ids, *own) in enumerate(of_each)]
        ticket.n_rows = len(made)
        with self._changed:
            if not self._is_open:
                raise Problem(503, "The server is shutting down", code="draining", retry_after_s=LEAST_RETRY)
            if len(self._waiting) + len(rows) > self._limits.max_queue:
                raise Problem(
                    429, f"{len(self._waiting)} inputs are waiting; the queue is full", code="queue_full",
                    retry_after_s=self._retry_after(),
                )  # fmt: skip
            now = time.monotonic()
            self._waiting.extend(made)
            self._arrived.extend(itertools.repeat(now, len(rows)))
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Take what waits of a request out of the queue; what runs is not interrupted, and its result goes nowhere."""
        ticket.future.cancel()
        with self._changed:
            self._keep(lambda row: row.ticket is not ticket)

    def close(self) -> None:
        """Take nothing more, run what waits, and end the thread."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _retry_after(self) -> int:
        seconds = math.ceil(len(self._waiting) * self._seconds_a_row)
        return min(MOST_RETRY, max(LEAST_RETRY, seconds))

    def _work(self) -> None:
        while self._run_next():  # in a function of its own: rows that are answered are not kept until others come
            pass

    def _run_next(self) -> bool:
        """Whether there was a run; none when the server ends."""
        rows = self._next()
        if not rows:
            return False
        started = time.monotonic()
        results = self._results(rows)
        seconds = time.monotonic() - started
        with self._changed:  # before the answers: a client alone that asks again at once is not a second client
            self._due = len(rows) + len(self._waiting)
        for row, result in results:
            row.ticket.settle(row, result)
        self._watcher.ran(rows, seconds)
        with self._changed:
            self._running = ()
            self._seconds_a_row += 0.2 * (seconds / len(rows) - self._seconds_a_row)
        return True

    def _next(self) -> tuple[Row, ...]:
        """The rows of the next run; none when the server ends."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or not self._is_open)
                if self._waiting and self._is_open:
                    self._wait_for_more()
                self._drop_what_is_late()
                if self._waiting:
                    self._running = self._take()
                    return self._running
                if not self._is_open:
                    return ()

    def _wait_for_more(self) -> None:
        target = min(self._due, self._limits.max_batch)
        until = self._arrived[0] + self._limits.max_wait_s
        while self._is_open and 0 < len(self._waiting) < target:
            left = until - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _drop_what_is_late(self) -> None:
        now = time.monotonic()
        for row in self._waiting:
            if row.ticket.deadline <= now and not row.ticket.is_over:
                row.ticket.settle(row, Problem(504, "The deadline passed while the request waited", code="deadline"))
        self._keep(lambda row: not row.ticket.is_over)

    def _take(self) -> tuple[Row, ...]:
        """The oldest row, and those after it that fit beside it in the budget of tokens."""
        taken: list[Row] = []
        longest = 0
        for row in self._waiting:
            length = max(longest, len(row.ids))
            if taken and (len(taken) + 1) * length > self._limits.max_tokens:
                continue
            taken.append(row)
            longest = length
            if len(taken) == self._limits.max_batch:
                break
        chosen = set(map(id, taken))
        self._keep(lambda row: id(row) not in chosen)
        return tuple(taken)

    def _keep(self, wanted: Callable[[Row], bool]) -> None:
        kept = [(row, at) for row, at in zip(self._waiting, self._arrived, strict=True) if wanted(row)]
        self._waiting = deque(row for row, _ in kept)
        self._arrived = deque(at for _, at in kept)

    def _results(self, rows: Sequence[Row]) -> list[tuple[Row, object]]:
        """Each row with its result. Where a run of several fails, each runs alone: one's mistake is not the others'."""
        try:
            return list(zip(rows, self._run(rows), strict=True))
        except Exception as error:
            if len(rows) == 1:
                return [(rows[0], bare(error))]
        return [result for row in rows for result in self._results([row])]
