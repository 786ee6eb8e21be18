"""A fleet at an address that fsspec writes: made in a folder of this machine, from which it appears there.

    fetch        the folder becomes what the address has, as far as it is not: by the manifest's hashes
    appear       an adapter that is done is brought there at once, by threads beside the work
    published    what replaces other files is moved to its place; reports; the manifest; then what went is removed

What `brought.py` keeps at the address is enough for a run on any machine to go on where one was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora_export.artifact import MANIFEST, REPORTS, read_manifest, sha256_of
from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError
from lora_export.export.lifecycle import files_without
from lora_export.fleet.address_lock import LOCK, AddressLock
from lora_export.fleet.brought import Brought
from lora_export.fleet.places import Here, Place
from lora_export.fleet.roster import is_address
from lora_export.fleet.state import RECORDS
from lora_export.fleet.store import PARTIAL, Store, errors_told
from lora_export.graph.cache import cache_folder
from lora_export.integrity.verify import verify
from lora_export.progress import Progress
from lora_export.reading import json_of
from lora_export.staging import write_whole

# What waits for a store waits at the same time.
_N_THREADS = 4


@dataclass
class Mirror:
    """An address, and the folder that stands for it.

    Attributes:
        brought: What is there.
        named: sha256 by name, of the manifest that was there when this run began.
        pending: What threads bring.
        is_publishing: Whether the folder has the new fleet.
    """

    store: Store
    folder: Path
    lock: AddressLock
    progress: Progress
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_N_THREADS))
    named: dict[str, str] = field(default_factory=dict)
    pending: deque[Future] = field(default_factory=deque)
    brought: Brought | None = None
    is_publishing: bool = False

    def fetch(self) -> None:
        """Make the folder what the address has, unless it is the work of the run that was stopped there.

        Raises:
            InputRefused: It has something that is no fleet.
        """
        sizes = {name: size for name, size in self.store.sizes().items() if name != LOCK}
        is_begun = any(name.startswith(f"{PARTIAL}/") for name in sizes)
        if sizes and not is_begun and not {MANIFEST, *RECORDS} <= sizes.keys():
            raise InputRefused(
                "The output's address holds something that is no fleet",
                where=self.store.address,
                expected="what `lora-export fleet` made there, or nothing",
                next_step="name another address with -o",
            )
        self.named = self._named() if MANIFEST in sizes else {}
        self.brought = Brought.read(self.store, sizes, self.named)
        if not self._is_ahead():
            if not (self.named and self._fetched()):
                shutil.rmtree(self.folder, ignore_errors=True)
            self._run.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._run, uuid.uuid4().hex)
        self.brought.begin(self._run.read_text(encoding="utf-8"))

    @property
    def _run(self) -> Path:
        """Has what `begun` has at the address, while the folder is what a run brings there."""
        return self.folder.parent / "begun"

    def _is_ahead(self) -> bool:
        """Whether the folder has the whole fleet of the run that was stopped at the address."""
        is_same = self._run.is_file() and self._run.read_text(encoding="utf-8") == self.brought.begun
        return is_same and (self.folder / MANIFEST).is_file() and verify(self.folder).passed

    def _fetched(self) -> bool:
        """Fetch what the manifest names; whether the folder has the graph then. Adapters may be missing."""
        names, brought = [*self.named, *RECORDS, MANIFEST], self.brought
        for name, done, total in _by_bytes(names, brought.sizes):
            self.progress("fetching", done, total)
            place, wanted = self.folder / name, self.named.get(name)
            if wanted and place.is_file() and sha256_of(place) == wanted:
                continue
            place.unlink(missing_ok=True)
            if name in brought.sizes:
                self.store.get(name, place)
            if wanted and place.is_file() and (found := sha256_of(place)) != wanted:  # it was being replaced
                brought.known[name] = found
                place.unlink()
        self._remove_but({*names})
        try:
            manifest = read_manifest(self.folder)
        except LoraExportError:
            return False
        return all((self.folder / name).is_file() for name in files_without(manifest, manifest.adapters))

    def _remove_but(self, names: set[str]) -> None:
        """Remove what the folder has and the address has not; reports are not fetched."""
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in names and not name.startswith(f"{REPORTS}/"):
                path.unlink()

    def _named(self) -> dict[str, str]:
        fields = json_of(self.store.read(MANIFEST))
        files = fields.get("files") if isinstance(fields, Mapping) else None
        names = [PurePosixPath(name) for name in files] if isinstance(files, Mapping) else [PurePosixPath("/")]
        if any(name.is_absolute() or ".." in name.parts for name in names):
            raise InputRefused(
                "The manifest names files outside its folder, or none", where=f"{self.store.address}/{MANIFEST}"
            )
        return {str(name): str(digest) for name, digest in files.items()}

    def appear(self, folder: Path, files: Mapping[str, str]) -> None:
        with self.store.errors_told():
            while self.pending and self.pending[0].done():
                self.pending.popleft().result()
            self.lock.look()
            for name, sha256 in files.items():
                self.pending.append(self.threads.submit(self.brought.bring, name, sha256, folder / name))

    def arrived(self) -> None:
        with self.store.errors_told():
            n_before = len(self.pending)
            while self.pending:
                self.progress("uploading", n_before - len(self.pending), n_before)
                self.pending.popleft().result()

    def published(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Make the address what the folder is; where `files` of it are then.

        Raises:
            EnvironmentUnusable: The store refuses, or another run has taken the address.
        """
        with self.store.errors_told():
            self.is_publishing = True
            self.lock.require()
            self._publish(dict(read_manifest(self.folder).files))
        address = self.store.address
        return {key: f"{address}/{path.relative_to(self.folder).as_posix()}" for key, path in files.items()}

    def _publish(self, files: Mapping[str, str]) -> None:
        reports = [path.relative_to(self.folder).as_posix() for path in sorted((self.folder / REPORTS).rglob("*"))
                   if path.is_file()]  # fmt: skip
        brought = self.brought
        self._put({name: self.threads.submit(brought.bring, name, files[name], self.folder / name) for name in files})
        gone = (self.named.keys() | brought.names) - files.keys() & brought.sizes.keys()
        if gone:
            brought.announce_gone(gone)
        self.lock.require()
        brought.replace(files, self.threads)
        self._put({name: self.threads.submit(self.store.put, self.folder / name, name) for name in reports})
        self.store.put(self.folder / MANIFEST, MANIFEST)
        self.store.remove(gone)
        brought.end()

    def _put(self, futures: Mapping[str, Future]) -> None:
        """Wait for files that are brought, and tell how many bytes of them are there."""
        for name, done, total in _by_bytes([*futures], {name: (self.folder / name).stat().st_size for name in futures}):
            self.progress("uploading", done, total)
            futures[name].result()

    def withdraw(self) -> None:
        """Remove what this run brought, where there will be no fleet of it."""
        self._end_threads()
        if not self.brought.was_resumed:
            with self.store.errors_told():
                self.store.remove(self.brought.marks.keys() - self.named.keys())
                self.brought.end()

    def close(self) -> None:
        """End what threads do, and give the address back. A run that brought nothing leaves nothing there."""
        self._end_threads()
        with contextlib.suppress(Exception):  # a store that is gone; the next run of this machine takes the lock over
            is_nothing = self.brought is not None and self.brought.is_nothing and not self.is_publishing
            if is_nothing and self.lock.is_held():
                self.brought.end()
        self.lock.release()

    def _end_threads(self) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)


def placed(out: Path | str, progress: Progress) -> contextlib.AbstractContextManager[Place]:
    """Where the fleet of `out` goes: the folder, or, of an address, `mirrored`."""
    return mirrored(out, cache_folder() / "fleets", progress) if is_address(out) else contextlib.nullcontext(Here(out))


@contextlib.contextmanager
def mirrored(address: str, cache: Path, progress: Progress) -> Iterator[Mirror]:
    """A folder in `cache` that is what `address` has; `published` brings it there. One fleet at a time.

    Raises:
        EnvironmentUnusable: The address cannot be read or written, or another fleet is being made there.
        InputRefused: It has something that is no fleet.
    """
    with errors_told(address):
        store = Store.of(address)
        lock = AddressLock(store)
        lock.take()
    folder = cache / hashlib.sha256(address.encode()).hexdigest()[:16] / "out"
    mirror = Mirror(store, folder, lock, progress)
    try:
        with errors_told(address):
            mirror.fetch()
        try:
            yield mirror
        except EnvironmentUnusable:
            raise
        except LoraExportError:
            mirror.withdraw()
            raise
    finally:
        mirror.close()


def _by_bytes(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Each name with the bytes of those before it, and of all."""
    found = [sizes.get(name, 0) for name in names]
    before = itertools.accumulate(found, initial=0)
    return ((name, done, sum(found)) for name, done in zip(names, before, strict=False))
