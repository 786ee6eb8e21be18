"""A mapped file that cannot be read where it is touched: a message and an exit code in place of SIGBUS alone.

Weights are mapped, so that they cost no memory. Where a file is cut short meanwhile, or its disk fails, the system
sends SIGBUS to the thread that touches the page, and there is nothing to go on with. While `told_if_unreadable` is
open, the process tells which file it was, removes what it was building, and ends. Linux on 64 bits alone; elsewhere it
ends without a word.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError
from lora_export.folders import remove_own

_SA_SIGINFO = 4  # <signal.h>: the handler is told the address
_ADDRESS = 16  # of si_addr in siginfo_t


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl on 64 bits."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@contextlib.contextmanager
def told_if_unreadable(tell: Callable[[LoraExportError], None]) -> Iterator[None]:
    """End with exit code 3 where a mapped file was cut short meanwhile, 4 where its disk failed, after `tell`."""
    is_main = threading.current_thread() is threading.main_thread()
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8 or not is_main:
        yield
        return

    def failed(number: int, info: int, _context: int) -> None:
        with contextlib.suppress(BaseException):
            error = _told(ctypes.c_void_p.from_address(info + _ADDRESS).value or 0)
            tell(error)
            remove_own()
            os._exit(error.exit_code)
        signal.signal(number, signal.SIG_DFL)  # no file's: it ends the process, as it would have
        signal.raise_signal(number)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(failed)
    action = _Action(handler=ctypes.cast(handler, ctypes.c_void_p).value, flags=_SA_SIGINFO)
    libc, before = ctypes.CDLL(None), _Action()
    libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaction(signal.SIGBUS, ctypes.byref(before), None)


def _told(address: int) -> LoraExportError:
    """What is wrong with the file that is mapped at `address`.

    Raises:
        LookupError: There is none.
    """
    path, at = _mapped_at(address)
    n_bytes = path.stat().st_size if path.exists() else None
    if n_bytes is not None and n_bytes > at:
        return EnvironmentUnusable(
            "The system could not read a file",
            where=f"{path}, at byte {at}",
            next_step="look at the disk, or copy the file to another",
        )
    return InputRefused(
        "A file was cut short while it was read",
        where=str(path),
        expected=f"more than {at} bytes, as when it was opened",
        found="no such file" if n_bytes is None else f"{n_bytes} bytes",
        next_step="let nothing write to it meanwhile, and run again when it is whole",
    )


def _mapped_at(address: int) -> tuple[Path, int]:
    """The file that is mapped at `address`, and where the page begins in it."""
    page = address - address % mmap.PAGESIZE
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines():
        bounds, _rights, offset, _device, _inode, *path = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= page < end and path and path[0].startswith("/"):
            return Path(path[0].removesuffix(" (deleted)")), int(offset, 16) + page - start
    raise LookupError(address)
