"""The shim (`shim.c`): compiled when it is first needed, loaded into this process and armed in a fork of it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

_SOURCE = Path(__file__).with_name("shim.c")
# One thread each: a fork of a process whose libraries have started threads waits for them for ever.
_ALONE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Calls(IntFlag):
    """Kinds of system calls, as `shim.c` numbers them."""

    CHANGES = 1
    REMOVES = 2
    OPENS = 4
    READS = 8
    CREATES = 16


ALL_CHANGES = Calls.CHANGES | Calls.REMOVES | Calls.CREATES


@dataclass(frozen=True)
class Strike:
    """What happens at which call.

    Attributes:
        nth: The call that is struck, counted from 1; 0 for none, which only counts.
        number: Of the signal or of the error.
        is_sticky: Every later call of the same kinds fails too.
    """

    calls: Calls
    nth: int
    number: int = 0
    is_signal: bool = True
    is_sticky: bool = False


def loaded_with_shim(work: Path) -> None:
    """Start this script anew with the shim loaded, unless it is."""
    if _is_loaded():
        return
    work.mkdir(parents=True, exist_ok=True)
    library = work / "shim.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, _SOURCE, "-ldl"], check=True)
    environment = os.environ | _ALONE | {"LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def arm(folders: Sequence[Path], strike: Strike, log: Path | None = None) -> None:
    """From now on, count this process's calls under `folders`, and strike."""
    paths = ":".join(map(str, folders)).encode()
    name = None if log is None else str(log).encode()
    how = (int(strike.calls), strike.nth, strike.number, int(strike.is_signal), int(strike.is_sticky))
    function = ctypes.CDLL(None).fault_arm
    function.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, *[ctypes.c_int] * 3, ctypes.c_char_p]
    function(paths, *how, name)


def n_calls() -> int:
    """How many calls were counted since `arm`."""
    function = ctypes.CDLL(None).fault_count
    function.restype = ctypes.c_long
    return function()


def _is_loaded() -> bool:
    try:
        return bool(ctypes.CDLL(None).fault_arm)
    except AttributeError:
        return False
