"""What an address has of a fleet, and what a run brings there while it works.

    .fleet.partial/begun                    which folder of which machine the run fills
    .fleet.partial/placed/<sha256>/<name>   empty: `name` has this content, or is about to get it
    .fleet.partial/next/<sha256>/<name>     content that is to replace what `name` has
    .fleet.partial/gone.json                names that the new manifest has not

A name that is free gets its file as soon as that is made. What another file has waits in `next`, and is moved at the
end. So what the manifest names stays what it says until then, and a listing tells a later run, of any machine, what
need not be brought again:

1. `placed`, and there, and not in `next`: it has this content.
2. `placed` and in `next`, or `placed` twice: it was being replaced; what it has is not known.
3. Not placed: what the manifest says.

All of it goes once the manifest is there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.fleet.store import PARTIAL, Store
from lora_export.reading import json_of

_PLACED, _NEXT = f"{PARTIAL}/placed", f"{PARTIAL}/next"
_BEGUN, _GONE = f"{PARTIAL}/begun", f"{PARTIAL}/gone.json"


@dataclass
class Brought:
    """What is there, as it was listed and as this run changed it. Its methods are called by several threads.

    Attributes:
        sizes: Bytes by name, without what lies in `.fleet.partial`.
        known: sha256 by name of what it surely has.
        waiting: Bytes of what waits, by sha256 and name.
        marks: The sha256 that `placed` has for a name.
        begun: What `begun` says; empty where no run was stopped.
        gone: Names that a run which was stopped wanted to remove.
        was_resumed: Whether a run was stopped before its manifest was there, or before it had removed all of its own.
    """

    store: Store
    sizes: dict[str, int]
    known: dict[str, str]
    waiting: dict[tuple[str, str], int] = field(default_factory=dict)
    marks: dict[str, set[str]] = field(default_factory=dict)
    begun: str = ""
    gone: frozenset[str] = frozenset()
    was_resumed: bool = False

    @classmethod
    def read(cls, store: Store, sizes: Mapping[str, int], named: Mapping[str, str]) -> Brought:
        """
        Args:
            sizes: Of all that is there.
            named: sha256 by name, of the manifest that is there.
        """
        own = {name for name in sizes if name.startswith(f"{PARTIAL}/")}
        placed, waiting = _split(own, _PLACED), _split(own, _NEXT)
        marks: dict[str, set[str]] = defaultdict(set)
        for sha256, name in placed:
            marks[name].add(sha256)
        there = {name: size for name, size in sizes.items() if name not in own}
        known = {}
        for name in there:
            found = marks.get(name) or {named.get(name)}
            sha256 = next(iter(found))
            if len(found) == 1 and sha256 is not None and (name not in marks or (sha256, name) not in waiting):
                known[name] = sha256
        begun = store.read(_BEGUN).decode("utf-8", "replace") if _BEGUN in own else ""
        gone = json_of(store.read(_GONE)) if _GONE in own else []
        sized = {each: sizes[f"{_NEXT}/{'/'.join(each)}"] for each in waiting}
        return cls(store, there, known, sized, marks, begun, frozenset(map(str, gone)), bool(own))

    @property
    def is_nothing(self) -> bool:
        """Whether neither this run nor one that was stopped brought anything."""
        return not (self.was_resumed or self.marks or self.waiting)

    @property
    def names(self) -> set[str]:
        """Of all that runs which were stopped, and this one, brought or wanted to remove."""
        return {*self.marks, *self.gone}

    def begin(self, run: str) -> None:
        """Say that a run works here, and forget what was announced and did not come."""
        self.begun = run
        self.store.write(_BEGUN, run.encode())
        for name in self.marks.keys() - self.sizes.keys():
            self.store.remove(_mark(sha256, name) for sha256 in self.marks.pop(name))

    def has(self, name: str, sha256: str, n_bytes: int) -> bool:
        """Whether `name` has this content, whole."""
        return self.known.get(name) == sha256 and self.sizes.get(name) == n_bytes

    def bring(self, name: str, sha256: str, file: Path) -> None:
        """Put a file in its place, or where it waits for that; nothing if it is there."""
        n_bytes = file.stat().st_size
        if self.has(name, sha256, n_bytes) or self.waiting.get((sha256, name)) == n_bytes:
            return
        if name in self.sizes:
            self.known.pop(name, None)
            self.store.put(file, f"{_NEXT}/{sha256}/{name}")
            self.waiting[sha256, name] = n_bytes
            return
        self._mark(name, sha256)
        self.store.put(file, name)
        self.known[name], self.sizes[name] = sha256, n_bytes

    def announce_gone(self, names: Iterable[str]) -> None:
        """Say what will be removed when the manifest is there, for a run that goes on from here."""
        self.store.write(_GONE, json.dumps(sorted(names)).encode())

    def replace(self, files: Mapping[str, str], threads: Executor) -> None:
        """Move what waits for one of `files` (sha256 by name) to its place."""
        moved = [(name, sha256) for name, sha256 in files.items()
                 if (sha256, name) in self.waiting and self.known.get(name) != sha256]  # fmt: skip
        list(threads.map(lambda each: self._mark(*each), moved))
        list(threads.map(lambda each: self._move(*each), moved))

    def _move(self, name: str, sha256: str) -> None:
        others = self.marks[name] - {sha256}
        self.store.remove(_mark(other, name) for other in others)
        self.store.move(f"{_NEXT}/{sha256}/{name}", name)
        self.sizes[name] = self.waiting.pop((sha256, name))
        self.known[name] = sha256
        self.marks[name] = {sha256}

    def _mark(self, name: str, sha256: str) -> None:
        self.store.write(_mark(sha256, name), b"")
        self.marks.setdefault(name, set()).add(sha256)

    def end(self) -> None:
        """Remove all that says that a run works here."""
        self.store.remove_below(PARTIAL)


def _mark(sha256: str, name: str) -> str:
    return f"{_PLACED}/{sha256}/{name}"


def _split(own: Iterable[str], folder: str) -> set[tuple[str, str]]:
    """sha256 and name of what lies in `folder`."""
    found = (name.removeprefix(f"{folder}/").partition("/") for name in own if name.startswith(f"{folder}/"))
    return {(sha256, name) for sha256, _, name in found if name}
