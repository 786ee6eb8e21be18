"""Workers in processes of their own, which may die, hang or swell: none takes another's adapter with it.

A worker gets one assignment at a time. Where it dies, or its memory passes the limit, the assignment is tried once more
in a fresh one, as another process may have been the cause; where it takes too long, it is not.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from lora_export.compat import leave_quantized_layers_out
from lora_export.errors import EnvironmentUnusable, told
from lora_export.fleet.outcomes import AdapterOutcome

_MOST_ATTEMPTS = 2
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """What a worker may take.

    Attributes:
        seconds: For one adapter; a worker's first has its start on top, `seconds` again.
        n_bytes: Of its memory; None for no limit.
    """

    seconds: float
    n_bytes: int | None = None


class _Worker:
    """One process, and what it is at.

    Attributes:
        attempt: Which try of its assignment this is, from 1.
    """

    def __init__(self, work: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.assignment: object = None
        self.attempt = 0
        self.deadline = 0.0
        self._is_fresh = True

    def give(self, assignment: object, attempt: int, seconds: float) -> None:
        self.assignment, self.attempt = assignment, attempt
        self.deadline = time.monotonic() + (2 * seconds if self._is_fresh else seconds)
        self._is_fresh = False
        self.connection.send(assignment)

    def answer(self) -> object | None:
        """What it sent; None if it has died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def resident(self) -> int:
        """Bytes of memory that it has; 0 where the kernel does not say."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, ValueError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def ending(self) -> str:
        """How it died, in words."""
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is None:
            return "its worker closed its connection"
        return f"its worker died ({f'killed by signal {-code}' if code < 0 else f'exit code {code}'})"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _run(connection: Connection, work: str) -> None:
    """A worker's process: `work` names what it runs, which brings PEFT and PyTorch."""
    leave_quantized_layers_out()
    module, _, function = work.partition(":")
    getattr(importlib.import_module(module), function)(connection)


def answers(connection: Connection, outcome: Callable[[object], AdapterOutcome]) -> None:
    """A worker's work: the outcome of each assignment that comes, until the connection ends."""
    while True:
        try:
            assignment = connection.recv()
        except EOFError:
            return
        try:
            answer: object = outcome(assignment)
        except EnvironmentUnusable as error:
            answer = error
        except Exception as error:
            answer = Broken(f"a defect: {told(error)}")
        connection.send(answer)


@dataclass(frozen=True)
class Broken:
    """What a worker answers where it raised what no input should make it raise."""

    reason: str


class Pool:
    """A number of workers, each of which is replaced when it is of no more use; all end with the `with` block.

    Args:
        work: `module:function` that a worker runs on its connection, by `answers`. An `EnvironmentUnusable` that it
            answers ends everything.
        broken: Makes the outcome of an assignment that broke its workers, from the reason.
    """

    def __init__(
        self, work: str, *, n_workers: int, limits: Limits, broken: Callable[[object, str], AdapterOutcome]
    ) -> None:
        self._work, self._limits, self._broken, self._n_workers = work, limits, broken, n_workers
        self._workers: list[_Worker] = []
        self._waiting: deque[tuple[object, int]] = deque()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *raised: object) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def outcomes(self, assignments: Iterable[object]) -> Iterator[AdapterOutcome]:
        """The outcome of each of `assignments`, as they come."""
        self._waiting.extend((assignment, 1) for assignment in assignments)
        while self._waiting or self._busy():
            self._assign()
            by_connection = {worker.connection: worker for worker in self._busy()}
            for connection in wait(by_connection, timeout=_LOOK_SECONDS):
                yield from self._answered(by_connection[connection])
            for worker in self._busy():
                yield from self._within_limits(worker)

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.assignment is not None]

    def _assign(self) -> None:
        n_idle = len(self._workers) - len(self._busy())
        for _ in range(min(self._n_workers - len(self._workers), len(self._waiting) - n_idle)):
            self._workers.append(_Worker(self._work))
        for worker in tuple(self._workers):
            if worker.assignment is None and self._waiting:
                self._give(worker)

    def _give(self, worker: _Worker) -> None:
        assignment, attempt = self._waiting.popleft()
        try:
            worker.give(assignment, attempt, self._limits.seconds)
        except OSError:  # it died while it had nothing to do
            worker.kill()
            self._workers.remove(worker)
            self._waiting.appendleft((assignment, attempt))

    def _answered(self, worker: _Worker) -> Iterator[AdapterOutcome]:
        answer = worker.answer()
        if isinstance(answer, EnvironmentUnusable):
            raise answer
        if answer is None:
            yield from self._replaced(worker, worker.ending(), may_retry=True)
            return
        assignment, worker.assignment = worker.assignment, None
        outcome = self._broken(assignment, answer.reason) if isinstance(answer, Broken) else answer
        yield replace(outcome, attempts=worker.attempt)

    def _within_limits(self, worker: _Worker) -> Iterator[AdapterOutcome]:
        limits = self._limits
        if time.monotonic() > worker.deadline:
            yield from self._replaced(worker, f"it took more than {limits.seconds:g} s", may_retry=False)
        elif limits.n_bytes is not None and worker.resident() > limits.n_bytes:
            reason = f"its worker took more than {limits.n_bytes / 1e9:.1f} GB of memory"
            yield from self._replaced(worker, reason, may_retry=True)

    def _replaced(self, worker: _Worker, reason: str, *, may_retry: bool) -> Iterator[AdapterOutcome]:
        """End a worker that is of no more use; its assignment waits for another, or is broken."""
        worker.kill()
        self._workers.remove(worker)
        if may_retry and worker.attempt < _MOST_ATTEMPTS:
            self._waiting.append((worker.assignment, worker.attempt + 1))
        else:
            yield replace(self._broken(worker.assignment, reason), attempts=worker.attempt)
