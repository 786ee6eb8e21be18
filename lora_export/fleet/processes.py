"""Workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

from lora_export.environment import n_cores
from lora_export.fleet.answering import Answer, answer_to, resident_bytes, work_of
from lora_export.fleet.pool import Worker


class Processes:
    """Starts a process for each worker.

    Args:
        work: What a worker runs, see `work_of`.
    """

    def __init__(self, work: str) -> None:
        self._work = work

    @property
    def n_cpus(self) -> int:
        return n_cores()

    def start(self) -> Worker:
        return _ProcessWorker(self._work)

    def answered(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        by_connection = {worker.connection: worker for worker in workers}
        return [by_connection[connection] for connection in wait(by_connection, timeout=seconds)]

    def close(self) -> None:
        pass


class _ProcessWorker(Worker):
    def __init__(self, work: str) -> None:
        super().__init__()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, work), daemon=True)
        with _interrupts_held():
            self._process.start()
        theirs.close()

    def send(self, assignment: object) -> None:
        self.connection.send(assignment)

    def answer(self) -> Answer | None:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def resident(self) -> int:
        return resident_bytes(self._process.pid)

    def ending(self) -> str:
        self._process.join(timeout=5)
        code = self._process.exitcode
        if code is None:
            return "its worker closed its connection"
        return f"its worker died ({f'killed by signal {-code}' if code < 0 else f'exit code {code}'})"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _run(connection: Connection, named: str) -> None:
    """A worker's process: answers each assignment that comes, until the connection ends."""
    # A terminal sends Ctrl-C to all of its processes; the leader ends its workers, and says so once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with(multiprocessing.parent_process().pid)
    work = work_of(named)
    while True:
        try:
            assignment = connection.recv()
        except EOFError:
            return
        connection.send(answer_to(assignment, work))


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits here until the end of the block, and for good in a process that is begun in it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def _end_with(leader: int) -> None:
    """End this process as soon as the one that started it does, however that ends: another run may write where this
    one would. Linux alone can; elsewhere a worker ends when it answers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != leader:
            os._exit(1)
