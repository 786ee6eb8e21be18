"""Folders that one process at a time changes, and that are exchanged at once."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import glob
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

from lora_export.errors import EnvironmentUnusable

# How the name of a temporary folder of this tool begins.
OWN_FOLDER = ".lora-export-"
# Folders that a process builds in, with its number, for `remove_own`.
_own: set[tuple[Path, int]] = set()
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_NOT_KNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def put_in_place(made: Path, place: Path, before: Path) -> None:
    """Make `made` the folder at `place`, on the same disk, and remove what was there.

    1. Where the system can exchange two names, `place` is the old folder or the new one at every moment.
    2. Where it cannot, the old one lies at `before` for a moment: `put_back` mends what was killed then.
    """
    if not place.exists():
        made.rename(place)
        return
    with held(place):
        swap(made, place, before)


def swap(made: Path, place: Path, before: Path) -> None:
    """`put_in_place` for whoever holds `place`."""
    if _exchanged(made, place):
        remove(made)
    else:
        place.rename(before)
        made.rename(place)
        put_back(place, before)


def put_back(place: Path, before: Path) -> None:
    """What `put_in_place` left at `before` goes to `place` again if there is none, and away otherwise.

    It is removed by another name, so that none is ever put back of which a part is gone.
    """
    if not before.is_dir() or before.is_symlink():
        return
    if not place.exists():
        before.rename(place)
        return
    gone = before.with_name(f"{before.name}.gone")
    remove(gone)
    before.rename(gone)
    remove(gone)


@contextlib.contextmanager
def held(folder: Path, *, to_read: bool = False) -> Iterator[None]:
    """Change what is in `folder` alone; wait while another process of this tool does, or puts another folder there.

    Args:
        to_read: Several processes may hold it so at a time, and whoever changes it waits for them.
    """
    folder = Path(os.path.realpath(folder))
    if not folder.is_dir():  # whoever reads it says what is wrong
        yield
        return
    while True:
        handle = _open(folder)
        if handle is None or (lock(handle, wait=True, shared=to_read) and _is_at(handle, folder)):
            break
        _close(handle)
    try:
        yield
    finally:
        _close(handle)


@contextlib.contextmanager
def alone_in(folder: Path, out: Path) -> Iterator[Path]:
    """`folder`, empty, to build `out` in. What a process that was killed left there is removed.

    Raises:
        EnvironmentUnusable: Another process is building there, or the folder is somebody else's.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if (
            folder.is_symlink()
            or not folder.is_dir()
            or (hasattr(os, "geteuid") and folder.stat().st_uid != os.geteuid())
        ):
            raise EnvironmentUnusable(
                "The place to build in is taken",
                where=str(folder),
                next_step="remove it, or name another folder with -o",
            )
        try:
            handle = _open(folder)
        except OSError:
            with contextlib.suppress(OSError):  # it is empty, or of a process that was killed
                folder.rmdir()
            raise
        if handle is None:
            break
        if not lock(handle, wait=False):
            _close(handle)
            raise EnvironmentUnusable(
                "Another process is writing this folder",
                where=str(out),
                found=f"{folder} is locked",
                next_step="wait for it, or name another folder with -o",
            )
        if _is_at(handle, folder):
            break
        _close(handle)
    _own.add((folder, os.getpid()))
    try:
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield folder
    finally:
        _own.discard((folder, os.getpid()))
        if handle is None or _is_at(handle, folder):  # and not another's, begun since this one was put in its place
            remove(folder)
        _close(handle)


@contextlib.contextmanager
def own_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, removed at the end; those with this prefix that a killed process left go first."""
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        _remove_if_left(left)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            handle = _open(folder)
        except FileNotFoundError:  # another process took it for one that was left
            continue
        except OSError:
            remove(folder)
            raise
        if handle is None or (lock(handle, wait=False) and _is_at(handle, folder)):
            break
        _close(handle)
    _own.add((folder, os.getpid()))
    try:
        yield folder
    finally:
        _own.discard((folder, os.getpid()))
        remove(folder)
        _close(handle)


def own_temporary_folder() -> contextlib.AbstractContextManager[Path]:
    """The same where the system keeps temporary files."""
    return own_folder(Path(tempfile.gettempdir()), OWN_FOLDER)


@functools.cache
def workplace() -> Path:
    """A folder that is removed when the process ends, or by a later one if this one is killed."""
    until_the_end = contextlib.ExitStack()
    atexit.register(_closed_in_peace, until_the_end)
    return until_the_end.enter_context(own_temporary_folder())


def _closed_in_peace(until_the_end: contextlib.ExitStack) -> None:
    """The command has ended: Ctrl-C would only keep its folder there, with a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    until_the_end.close()
    signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def remove_own() -> None:
    """Remove what this process is building, where it can only end."""
    for folder, process in tuple(_own):
        if process == os.getpid():  # and not of the process that this one was forked from
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder as far as that can be done; where too many files were open, the second try may do it."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return


def state_of(file: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content, or with another file in its place; None where there is no file."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def link(file: Path, place: Path) -> None:
    """`place` as another name of `file`, or as a copy where the file system has no such names."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, place, follow_symlinks=False)


def can_lock() -> bool:
    """Whether this system tells a folder in use from one that was left."""
    return fcntl is not None


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of this user's that no process has locked."""
    with contextlib.suppress(OSError):
        handle = _open(folder)
        if handle is None:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # also fails where there are no locks
            if os.fstat(handle).st_uid == os.geteuid():
                remove(folder)
        finally:
            _close(handle)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where this system or disk cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_KNOWN:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _open(folder: Path) -> int | None:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) if fcntl else None


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def lock(handle: int, *, wait: bool, shared: bool = False) -> bool:
    """Whether the open file or folder is this process's now, until it closes `handle`.

    A disk without locks, such as some of a network, and a system without them give it to all.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(handle: int, folder: Path) -> bool:
    """Whether what is open still has its name: another process may have put something else there."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(folder))
    except FileNotFoundError:
        return False
