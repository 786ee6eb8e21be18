"""The command line in a fork of this process, which has the libraries loaded: a run costs what the command does."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from injection.shim import n_calls

_PERIOD_SECONDS = 0.005
_MOST_SECONDS = 300.0


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: Its exit code, or minus the signal that ended it.
        output: What it printed, standard error included.
        n_calls: Calls that the shim counted, where the run came to its end.
        hung: It was ended here, after five minutes.
    """

    code: int
    output: str
    seconds: float
    n_calls: int | None
    hung: bool = False


@dataclass(frozen=True)
class Started:
    """A run under way, since `began` on the monotonic clock."""

    child: int
    printed: Path
    counted: Path
    began: float

    def ended(self, signal_after: tuple[int, float] | None = None) -> Ended:
        """Wait for it, and meanwhile send it a signal after so many seconds."""
        hung = False
        while True:
            found, status = os.waitpid(self.child, os.WNOHANG)
            seconds = time.monotonic() - self.began
            if found:
                break
            if signal_after is not None and seconds >= signal_after[1]:
                os.kill(self.child, signal_after[0])
                signal_after = None
            if seconds > _MOST_SECONDS and not hung:
                os.kill(self.child, signal.SIGKILL)
                hung = True
            time.sleep(_PERIOD_SECONDS)
        count = int(self.counted.read_text()) if self.counted.exists() else None
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return Ended(code, self.printed.read_text(errors="replace"), seconds, count, hung)


def start(
    arguments: Sequence[object], work: Path, prepare: Callable[[], None] = lambda: None, name: str = "run"
) -> Started:
    """Begin `lora-export` with `arguments` in a fork, which is at the command's first line when this returns.

    Args:
        work: Where what it prints is kept, under `name`.
        prepare: Called in the fork before the command.
    """
    printed, counted = work / f"{name}.printed", work / f"{name}.counted"
    counted.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    is_there, there = os.pipe()
    child = os.fork()
    if child == 0:
        _be_command(arguments, printed, counted, prepare, there)
    os.close(there)
    os.read(is_there, 1)  # a signal before that would reach Python while it sets the fork up
    os.close(is_there)
    return Started(child, printed, counted, time.monotonic())


def run(
    arguments: Sequence[object],
    work: Path,
    prepare: Callable[[], None] = lambda: None,
    *,
    signal_after: tuple[int, float] | None = None,
) -> Ended:
    """Run `lora-export` with `arguments` in a fork to its end, and send it a signal after so many seconds."""
    return start(arguments, work, prepare).ended(signal_after)


def workers_by_fork() -> None:
    """From now on, workers of this process are forks of it: they have the libraries, and the shim as it is armed."""
    real, real_fork = multiprocessing.get_context, os.fork
    multiprocessing.get_context = lambda method=None: real("fork")

    def fork() -> int:
        """Python drops what is raised in its own callbacks around a fork, and spawned workers have none."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            return real_fork()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    os.fork = fork


def _be_command(
    arguments: Sequence[object], printed: Path, counted: Path, prepare: Callable[[], None], there: int
) -> None:
    """Never returns. What the parent registered for its own end is not done here; what the command registers is."""
    code = 1
    try:
        from lora_export.cli.main import main
        from lora_export.folders import workplace

        workplace.cache_clear()
        atexit._clear()
        weakref.finalize._registry.clear()
        weakref.finalize._registered_with_atexit = False
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without
        faulthandler.dump_traceback_later(_MOST_SECONDS / 2, file=2)
        prepare()
        os.write(there, b".")
        try:
            main([str(argument) for argument in arguments], prog_name="lora-export")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        atexit._run_exitfuncs()
        n = n_calls()
        counted.write_text(str(n))
    finally:
        os._exit(code)
