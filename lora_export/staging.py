"""An output folder appears whole or not at all: built beside its place and put there at once."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lora_export.artifact import MANIFEST
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.folders import alone_in, own_folder, put_back, put_in_place


def refuse_existing(out: Path, *, overwrite: bool, marker: str = MANIFEST) -> None:
    """Refuse an output folder that exists, unless `overwrite` and it is an earlier export or empty.

    Args:
        marker: The file that tells an earlier output from anything else.

    Raises:
        InputRefused: It exists, and `overwrite` is off or replacing it would delete something that is no export.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if (out / marker).is_file():
        if overwrite:
            return
        raise InputRefused("The output folder exists", where=str(out), next_step="name another, or add --overwrite")
    what = "export" if marker == MANIFEST else "extracted adapter"
    raise InputRefused(
        f"The output folder holds something that is no {what}; it is not replaced, even with --overwrite",
        where=str(out),
        expected=f"a folder with {marker}, or none",
        next_step="name another folder, or remove this one yourself",
    )


@contextlib.contextmanager
def staging(out: Path, *, overwrite: bool, n_bytes: int, marker: str = MANIFEST) -> Iterator[Path]:
    """A folder beside `out` to build in, put in the place of `out` on success and removed on failure.

    Its name is fixed: what a killed process left there goes before the next begins. Of a link, its target is replaced.

    Args:
        n_bytes: What the export will need, checked against the free disk first.
        marker: As `refuse_existing` takes it.

    Raises:
        InputRefused: `out` is in the way (see `refuse_existing`).
        EnvironmentUnusable: Another process builds `out`, or the disk is too small, fills up, or cannot be written.
    """
    place = Path(os.path.realpath(out))
    stage, before = (place.parent / f".{place.name}.{kind}" for kind in ("partial", "old"))
    try:
        refuse_existing(place, overwrite=overwrite, marker=marker)
        with _folders_to(place.parent), alone_in(stage, out):
            require_disk(place.parent, n_bytes)
            put_back(place, before)
            refuse_existing(place, overwrite=overwrite, marker=marker)
            yield stage
            put_in_place(stage, place, before)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentUnusable(
                "The disk is full; nothing was published", where=str(out.parent), next_step="free some space, run again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise EnvironmentUnusable(
                "The output folder cannot be written", where=str(out), found=os.strerror(error.errno)
            ) from error
        raise


@contextlib.contextmanager
def _folders_to(folder: Path) -> Iterator[None]:
    """`folder` and those above it; on failure, those that were made go again, unless something lies in them."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file at once or not at all; its path."""
    with own_folder(path.parent, ".partial-") as own:
        made = own / path.name
        made.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return made.replace(path)


def require_disk(folder: Path, n_bytes: int) -> None:
    """Raise EnvironmentUnusable unless the file system of `folder`, which need not exist yet, has `n_bytes` free."""
    absolute = folder.absolute()
    existing = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise EnvironmentUnusable(
            "The disk is too small for this export",
            where=str(folder),
            expected=f"{n_bytes / 1e6:,.0f} MB free",
            found=f"{free / 1e6:,.0f} MB free",
            next_step="free some space, or name a folder on another disk with -o",
        )
