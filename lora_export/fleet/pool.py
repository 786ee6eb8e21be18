"""Workers that may die, hang or swell: none takes another's adapter with it.

A worker gets one assignment at a time. Where it dies, or its memory passes the limit, the assignment is tried again in
a fresh one, as another cause is likely; where it takes too long, it is not.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lora_export.errors import EnvironmentUnusable
from lora_export.fleet.answering import Answer, Broken
from lora_export.fleet.outcomes import AdapterOutcome

_LOOK_SECONDS = 0.5
_PLACE_SECONDS = 0.05
# A cluster may have to start a machine.
MOST_SECONDS_WITHOUT_A_PLACE = 900.0


@dataclass(frozen=True)
class Limits:
    """What a worker may take.

    Attributes:
        seconds: For one adapter; a worker's first has its start on top, `seconds` again.
        n_bytes: Of its memory; None for no limit.
        attempts: How many workers may die or swell of one adapter.
    """

    seconds: float
    n_bytes: int | None = None
    attempts: int = 2


class Worker(ABC):
    """One worker, and what it is at.

    Attributes:
        assignment: None if it has nothing to do.
        attempt: Which try of its assignment this is, from 1.
        deadline: When it must have answered, on the monotonic clock.
    """

    def __init__(self) -> None:
        self.assignment: object = None
        self.attempt = 0
        self.deadline = 0.0
        self._is_fresh = True

    def give(self, assignment: object, attempt: int, seconds: float) -> None:
        """Let it work on `assignment`.

        Raises:
            OSError: It died while it had nothing to do.
        """
        self.assignment, self.attempt = assignment, attempt
        self.deadline = time.monotonic() + (2 * seconds if self._is_fresh else seconds)
        self._is_fresh = False
        self.send(assignment)

    def has_place(self) -> bool:
        """Whether there is a processor for it, which a cluster may still have to find; until then it gets nothing."""
        return True

    @abstractmethod
    def send(self, assignment: object) -> None:
        """Begin to work on `assignment`, elsewhere."""

    @abstractmethod
    def answer(self) -> Answer | None:
        """What it answered; None if it has died."""

    @abstractmethod
    def resident(self) -> int:
        """Bytes of memory that it has; 0 where that is not known."""

    @abstractmethod
    def ending(self) -> str:
        """How it died, in words."""

    @abstractmethod
    def kill(self) -> None:
        """End it, whatever it does."""


class Engine(Protocol):
    """Where workers run."""

    @property
    def n_cpus(self) -> int:
        """Processors of all machines that it has."""

    def start(self) -> Worker:
        """A new worker."""

    def answered(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        """Those of `workers` that have answered or died, as soon as there is one; none after so many seconds."""

    def close(self) -> None:
        """Give back what the engine itself holds."""


class Pool:
    """A number of workers, each of which is replaced when it is of no more use; all end with the `with` block.

    An `EnvironmentUnusable` that a worker answers ends everything.

    Args:
        broken: Makes the outcome of an assignment that broke its workers, from the reason.
    """

    def __init__(
        self, engine: Engine, *, n_workers: int, limits: Limits, broken: Callable[[object, str], AdapterOutcome]
    ) -> None:
        self._engine, self._limits, self._broken, self._n_workers = engine, limits, broken, n_workers
        self._workers: list[Worker] = []
        self._waiting: deque[tuple[object, int]] = deque()
        self._busy_at = time.monotonic()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *raised: object) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def outcomes(self, assignments: Iterable[object]) -> Iterator[AdapterOutcome]:
        """The outcome of each of `assignments`, as they come."""
        self._waiting.extend((assignment, 1) for assignment in assignments)
        self._busy_at = time.monotonic()
        while self._waiting or self._busy():
            self._assign()
            for worker in self._engine.answered(self._busy(), _LOOK_SECONDS):
                yield from self._answered(worker)
            for worker in self._busy():
                yield from self._within_limits(worker)

    def _busy(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.assignment is not None]

    def _assign(self) -> None:
        n_idle = len(self._workers) - len(self._busy())
        for _ in range(min(self._n_workers - len(self._workers), len(self._waiting) - n_idle)):
            self._workers.append(self._engine.start())
        for worker in tuple(self._workers):
            if worker.assignment is None and self._waiting and worker.has_place():
                self._give(worker)
        self._wait_for_a_place()

    def _wait_for_a_place(self) -> None:
        """Refuse to wait for ever where no worker has one.

        Raises:
            EnvironmentUnusable: None has had one for so long that none will come.
        """
        if self._busy() or not self._waiting:
            self._busy_at = time.monotonic()
        elif time.monotonic() - self._busy_at > MOST_SECONDS_WITHOUT_A_PLACE:
            raise EnvironmentUnusable(
                "No worker has found a processor",
                found=f"none in {MOST_SECONDS_WITHOUT_A_PLACE:g} s",
                next_step="see `ray status`: other work may have all of the cluster",
            )
        else:
            time.sleep(_PLACE_SECONDS)

    def _give(self, worker: Worker) -> None:
        assignment, attempt = self._waiting.popleft()
        try:
            worker.give(assignment, attempt, self._limits.seconds)
        except OSError:  # it died while it had nothing to do
            worker.kill()
            self._workers.remove(worker)
            self._waiting.appendleft((assignment, attempt))

    def _answered(self, worker: Worker) -> Iterator[AdapterOutcome]:
        answer = worker.answer()
        if isinstance(answer, EnvironmentUnusable):
            raise answer
        if answer is None:
            yield from self._replaced(worker, worker.ending(), may_retry=True)
            return
        assignment, worker.assignment = worker.assignment, None
        outcome = self._broken(assignment, answer.reason) if isinstance(answer, Broken) else answer
        yield replace(outcome, attempts=worker.attempt)

    def _within_limits(self, worker: Worker) -> Iterator[AdapterOutcome]:
        limits = self._limits
        if time.monotonic() > worker.deadline:
            yield from self._replaced(worker, f"it took more than {limits.seconds:g} s", may_retry=False)
        elif limits.n_bytes is not None and worker.resident() > limits.n_bytes:
            reason = f"its worker took more than {limits.n_bytes / 1e9:.1f} GB of memory"
            yield from self._replaced(worker, reason, may_retry=True)

    def _replaced(self, worker: Worker, reason: str, *, may_retry: bool) -> Iterator[AdapterOutcome]:
        """End a worker that is of no more use; its assignment waits for another, or is broken."""
        worker.kill()
        self._workers.remove(worker)
        if may_retry and worker.attempt < self._limits.attempts:
            self._waiting.append((worker.assignment, worker.attempt + 1))
        else:
            yield replace(self._broken(worker.assignment, reason), attempts=worker.attempt)
