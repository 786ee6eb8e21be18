"""What an input came to: read, refused, or a finding: another error, a hang, or too much memory."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import Defect, LoraExportError

MOST_SECONDS = 10.0
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"


class Hangs(BaseException):
    """An input took longer than it may. No `except Exception` holds it."""


@dataclass(frozen=True)
class Verdict:
    """Of one input.

    Attributes:
        outcome: What it came to, in a few words that are the same for inputs of one kind.
        finding: What is wrong with that; None where nothing is.
        n_bytes: By how much the process's memory peaked above what it was before.
    """

    outcome: str
    finding: str | None
    seconds: float
    n_bytes: int

    @property
    def is_refused(self) -> bool:
        return self.finding is None and self.outcome != "read"


def judged(read: Callable[[bytes], object], content: bytes, floor_bytes: int) -> Verdict:
    """Read `content`, and judge how that ended.

    Args:
        floor_bytes: Memory that it may take beyond twice its size.
    """
    finding, outcome = None, "read"
    before, began = _peak_from_here(), time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        read(content)
    except LoraExportError as error:
        outcome = f"{type(error).__name__}: {error.what}"[:120]
        if isinstance(error, Defect) or error.exit_code not in (2, 3, 4) or not error.what:
            finding = f"no refusal: {error}"
        elif len(str(error)) > 4000:
            finding = f"a message of {len(str(error))} characters: {str(error)[:200]}"
    except Hangs:
        outcome = finding = f"hangs for {MOST_SECONDS:g} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"raised {type(error).__name__} at {_place(error)}"
        finding = f"{outcome}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - began
    grown = max(0, _peak() - before)
    most = 2 * len(content) + floor_bytes
    if finding is None and grown > most:
        finding = f"{grown:,} bytes of memory for a file of {len(content):,}: {outcome}"
    if finding is None and seconds > MOST_SECONDS:
        finding = f"took {seconds:.1f} s: {outcome}"
    return Verdict(outcome, finding, seconds, grown)


def watch_hangs() -> None:
    """Call once in a process, before the first input is judged."""

    def too_long(*_: object) -> None:
        raise Hangs

    signal.signal(signal.SIGALRM, too_long)


def _place(error: BaseException) -> str:
    """Where in this package it was raised, or went through last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "lora_export/" in frame.filename]
    return f"{frames[-1].filename.rpartition('lora_export/')[2]}:{frames[-1].name}" if frames else "elsewhere"


def _peak_from_here() -> int:
    """What the process holds now; its peak begins there anew where the system can do that."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)
    return _peak()


def _peak() -> int:
    """The most that the process has held at once, in bytes."""
    try:
        status = _STATUS.read_text()
        return 1024 * int(status.split("VmHWM:", 1)[1].split(None, 1)[0])
    except (OSError, IndexError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
