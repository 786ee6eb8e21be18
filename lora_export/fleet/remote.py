"""A fleet at an address that fsspec writes: made in a folder of this machine, and brought there when it is whole.

    fetch        what the address has, as far as the folder has not: by the manifest's hashes
    published    files that are new, then those that changed, reports, the manifest; then what went is removed

A store of objects changes one at a time. While changed files come before their manifest, a reader that compares hashes
sees that; a run that is killed then leaves it so until the next one on this machine, which uploads all anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lora_export.artifact import MANIFEST, REPORTS, read_manifest, sha256_of
from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError, told
from lora_export.fleet.roster import is_address
from lora_export.fleet.state import RECORDS
from lora_export.graph.cache import cache_folder
from lora_export.integrity.verify import verify
from lora_export.progress import Progress
from lora_export.reading import json_of

_LOCK = ".fleet.lock"
# Of this process, at work.
_runs: set[str] = set()


@dataclass
class Mirror:
    """An address, and the folder that stands for it.

    Attributes:
        system, root: fsspec's file system and the path in it.
        known: sha256 by name of what the address surely has.
        earlier: Names of what a fleet had there before.
        is_whole: Whether the address has one fleet, and no part of another.
        run: What the lock has of this run.
    """

    address: str
    folder: Path
    system: Any
    root: str
    progress: Progress
    known: dict[str, str] = field(default_factory=dict)
    earlier: set[str] = field(default_factory=set)
    is_whole: bool = True
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def fetch(self, *, was_left: bool) -> None:
        """Make the folder what the address has.

        Args:
            was_left: Whether a run that was killed left its lock.

        Raises:
            InputRefused: It has something that is no fleet.
        """
        there = self._there() - {_LOCK}
        if there and not {MANIFEST, *RECORDS} <= there:
            self.is_whole = not was_left
            what, step = "something that is no fleet", "name another address with -o"
            if was_left:
                what, step = "part of a fleet, whose first upload was cut off", f"remove what is there, or {step}"
            raise InputRefused(
                f"The output's address holds {what}",
                where=self.address,
                expected="what `lora-export fleet` made there, or nothing",
                next_step=step,
            )
        files = self._files_there() if there else {}
        self.earlier |= files.keys()
        if not files:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        names = [*files, *RECORDS, MANIFEST]
        sizes = self._sizes_there()
        for name, done, total in _by_bytes(names, sizes):
            self.progress("fetching", done, total)
            place = self.folder / name
            if name in there and (name not in files or not place.is_file() or sha256_of(place) != files[name]):
                place.parent.mkdir(parents=True, exist_ok=True)
                self.system.get_file(self.at(name), str(place))
        self._remove_but({*names})
        self.known = {name: digest for name, digest in files.items() if name in there}
        if not verify(self.folder).passed:
            self.known = {}
            shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_but(self, names: set[str]) -> None:
        """Remove what the folder has and the address has not; reports are not fetched."""
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in names and not name.startswith(f"{REPORTS}/"):
                path.unlink()

    def _there(self) -> set[str]:
        return {path.removeprefix(f"{self.root}/") for path in map(str, self.system.find(self.root))}

    def _sizes_there(self) -> dict[str, int]:
        found = self.system.find(self.root, detail=True)
        return {path.removeprefix(f"{self.root}/"): info.get("size") or 0 for path, info in found.items()}

    def _files_there(self) -> dict[str, str]:
        fields = json_of(self.system.cat_file(self.at(MANIFEST)))
        files = fields.get("files") if isinstance(fields, Mapping) else None
        names = [PurePosixPath(name) for name in files] if isinstance(files, Mapping) else [PurePosixPath("/")]
        if any(name.is_absolute() or ".." in name.parts for name in names):
            raise InputRefused(
                "The manifest names files outside its folder, or none", where=f"{self.address}/{MANIFEST}"
            )
        return {str(name): str(digest) for name, digest in files.items()}

    def published(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Make the address what the folder is; where `files` of it are then.

        Raises:
            EnvironmentUnusable: The store refuses.
        """
        with _store_errors_told(self.address):
            if (holder := self.holder()) != self.lock:
                _refuse_second(self, holder)
            self._upload()
        return {key: f"{self.address}/{path.relative_to(self.folder).as_posix()}" for key, path in files.items()}

    def _upload(self) -> None:
        files = dict(read_manifest(self.folder).files)
        new = [name for name in files if name not in self.known]
        changed = [name for name in files if name in self.known and self.known[name] != files[name]]
        reports = [path.relative_to(self.folder).as_posix() for path in sorted((self.folder / REPORTS).rglob("*"))
                   if path.is_file()]  # fmt: skip
        names = [*new, *changed, *reports, MANIFEST]
        self.is_whole = False
        for name, done, total in _by_bytes(names, {name: (self.folder / name).stat().st_size for name in names}):
            self.progress("uploading", done, total)
            self.system.makedirs(self.at(name).rpartition("/")[0], exist_ok=True)
            self.system.put_file(str(self.folder / name), self.at(name))
        for name in (self.earlier - files.keys()) & self._there():
            self.system.rm_file(self.at(name))
        self.is_whole = True

    @property
    def lock(self) -> dict[str, object]:
        """What the lock of this run says."""
        return {"host": _host(), "process": os.getpid(), "run": self.run}

    def holder(self) -> dict[str, object]:
        """What the lock at the address says."""
        return json_of(self.system.cat_file(self.at(_LOCK)))


@dataclass(frozen=True)
class Here:
    """A fleet's own folder."""

    folder: Path

    def published(self, files: Mapping[str, Path]) -> Mapping[str, Path]:
        """Where `files` of it are: it is made in its place."""
        return files


def placed(out: Path | str, progress: Progress) -> contextlib.AbstractContextManager[Mirror | Here]:
    """Where the fleet of `out` is made: the folder, or, of an address, `mirrored`."""
    return mirrored(out, cache_folder() / "fleets", progress) if is_address(out) else contextlib.nullcontext(Here(out))


@contextlib.contextmanager
def mirrored(address: str, cache: Path, progress: Progress) -> Iterator[Mirror]:
    """A folder in `cache` that is what `address` has; `published` brings it there. One fleet at a time.

    Raises:
        EnvironmentUnusable: The address cannot be read or written, or another fleet is being made there.
        InputRefused: It has something that is no fleet.
    """
    import fsspec

    with _store_errors_told(address):
        system, root = fsspec.core.url_to_fs(address)
        folder = cache / hashlib.sha256(address.encode()).hexdigest()[:16] / "out"
        mirror = Mirror(address, folder, system, root.rstrip("/"), progress)
        was_left = _lock(mirror)
    try:
        with _store_errors_told(address):
            if was_left and (folder / MANIFEST).is_file() and verify(folder).passed:
                mirror.earlier |= read_manifest(folder).files.keys()
            else:
                mirror.fetch(was_left=was_left)
        yield mirror
    finally:
        _runs.discard(mirror.run)
        if mirror.is_whole:  # else the next run takes the lock over, and uploads all anew
            with contextlib.suppress(Exception):
                if mirror.holder() == mirror.lock:
                    system.rm_file(mirror.at(_LOCK))


def _lock(mirror: Mirror) -> bool:
    """Take the address for this process; whether one of this machine that was killed had it.

    Raises:
        EnvironmentUnusable: Another process has it.
    """
    place = mirror.at(_LOCK)
    was_left = mirror.system.exists(place)
    if was_left:
        holder = mirror.holder()
        if holder.get("host") != _host() or _is_at_work(holder):
            _refuse_second(mirror, holder)
    mirror.system.makedirs(mirror.root, exist_ok=True)
    mirror.system.pipe_file(place, json.dumps(mirror.lock).encode())
    if (holder := mirror.holder()) != mirror.lock:
        _refuse_second(mirror, holder)
    _runs.add(mirror.run)
    return was_left


def _by_bytes(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Each name with the bytes of those before it, and of all."""
    found = [sizes.get(name, 0) for name in names]
    before = itertools.accumulate(found, initial=0)
    return ((name, done, sum(found)) for name, done in zip(names, before, strict=False))


def _host() -> str:
    """This machine, since it started, and the space that process numbers are of: containers may share a name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def _refuse_second(mirror: Mirror, holder: Mapping) -> None:
    raise EnvironmentUnusable(
        "Another fleet is being made at this address",
        where=mirror.address,
        found=f"{_LOCK} of process {holder.get('process')} on {holder.get('host')}",
        next_step=f"wait for it; if it was killed on a machine that is gone, remove {_LOCK}",
    )


def _is_at_work(holder: Mapping) -> bool:
    """Whether the process of this machine that a lock names is there, and at that run if it is this one."""
    if holder["process"] == os.getpid():
        return holder["run"] in _runs
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _store_errors_told(address: str) -> Iterator[None]:
    try:
        yield
    except LoraExportError:
        raise
    except Exception as error:  # each store has errors of its own
        raise EnvironmentUnusable(
            "The output's address cannot be read or written",
            where=address,
            found=told(error),
            next_step="look at the address and its credentials; s3:// needs s3fs, gs:// gcsfs, az:// adlfs",
        ) from error
