"""A change of some files of an export that is there: all of it at once, or nothing.

1. Beside the export a folder is made, of what is new and of links to what stays; then the two are exchanged. Whoever
   reads the export sees the old one or the new one, and a process that is killed leaves one of them.
2. Where that cannot be done (the export is a mount point, the folder around it may not be written, its disk has no
   links, or the system is Windows) its files are replaced one by one, the manifest last. Killed in between, it differs
   from its manifest until the same change is made again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.artifact import MANIFEST, SIGNATURE
from lora_export.folders import alone_in, can_lock, held, link, put_back, swap

_MADE = ".partial"
_NO_LINKS = (errno.EROFS, errno.EXDEV, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


@dataclass(frozen=True)
class Change:
    """What is to be changed in a folder that this process holds.

    Attributes:
        place: The folder, as it is.
        made: Where new files are made, each at its path in the folder.
        gone: Paths of files that go. A signature speaks of the folder as it was, so it always does.
    """

    place: Path
    made: Path
    is_beside: bool
    gone: set[str] = field(default_factory=set)

    def publish(self, finish: Callable[[Path], None] = lambda folder: None) -> None:
        """Make the change.

        Args:
            finish: Called with the folder in which all is as it will be; what it adds is part of the change.
        """
        if self.is_beside:
            self._link_what_stays()
            finish(self.made)
            swap(self.made, self.place, _before(self.place))
            return
        (self.place / SIGNATURE).unlink(missing_ok=True)
        for name in sorted(_files_in(self.made), key=lambda name: name == MANIFEST):
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.made / name).replace(self.place / name)
        shutil.rmtree(self.made)
        for name in self.gone:
            (self.place / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not there, or not empty
                (self.place / name).parent.rmdir()
        finish(self.place)

    def _link_what_stays(self) -> None:
        for name in _files_in(self.place):
            if name in self.gone or name == SIGNATURE or os.path.lexists(self.made / name):
                continue
            link(self.place / name, self.made / name)
        for folder in (path for path in (self.made, *self.made.rglob("*")) if path.is_dir() and not path.is_symlink()):
            if (before := self.place / folder.relative_to(self.made)).is_dir():
                _as_it_was(before, folder)


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[Change]:
    """Hold the export in `folder` while it is changed; what a process that was killed left of its own goes first.

    Raises:
        EnvironmentUnusable: Another process is making a new export in its place.
    """
    place = Path(os.path.realpath(folder))
    beside = place.with_name(f".{place.name}{_MADE}")
    if not place.is_dir() and _before(place).is_dir():
        with alone_in(beside, folder):
            put_back(place, _before(place))
    if not place.is_dir():  # whoever reads it says what is wrong
        yield Change(place, place, is_beside=False)
        return
    with held(place), contextlib.ExitStack() as stack:
        made = _made_beside(place, beside, folder, stack=stack) if can_lock() and not place.is_mount() else None
        if made is None:
            for left in place.glob(f".{SIGNATURE}.*"):
                left.unlink()
        inside = made or stack.enter_context(alone_in(place / _MADE, folder))
        yield Change(place, inside, is_beside=made is not None)


def _made_beside(place: Path, beside: Path, folder: Path, *, stack: contextlib.ExitStack) -> Path | None:
    """A folder beside `place` that can hold links to its files; None if there can be none."""
    with contextlib.ExitStack() as trial:
        try:
            made = trial.enter_context(alone_in(beside, folder))
            put_back(place, _before(place))
            probe = next(iter(_files_in(place)), None)
            if probe is not None:
                (made / "probe").hardlink_to(place / probe)
                (made / "probe").unlink()
        except PermissionError:
            return None
        except OSError as error:
            if error.errno in _NO_LINKS:
                return None
            raise
        stack.enter_context(trial.pop_all())
    return made


def _before(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def _files_in(folder: Path) -> list[str]:
    """Paths of all that is no folder, links included, but what lies in the folder where new files are made."""
    found = []
    for parent, folders, files in os.walk(folder):
        where = Path(parent)
        folders[:] = [name for name in folders if where != folder or name != _MADE]
        links = [name for name in folders if (where / name).is_symlink()]
        found += [(where / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _as_it_was(before: Path, folder: Path) -> None:
    """Give a folder the rights, the times and the owner of the one that it replaces, as far as this user may."""
    shutil.copystat(before, folder)
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(folder, before.stat().st_uid, before.stat().st_gid)
