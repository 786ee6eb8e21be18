"""One fleet at a time works at an address."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.errors import EnvironmentUnusable
from lora_export.fleet.store import Store
from lora_export.reading import json_of

LOCK = ".fleet.lock"
# Between two looks at whether it is still this run's.
_LOOK_SECONDS = 10.0
# Of this process, at work.
_runs: set[str] = set()


@dataclass
class AddressLock:
    """The lock of one run."""

    store: Store
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    looked_at: float = 0.0

    @property
    def content(self) -> dict[str, object]:
        """What it says."""
        return {"host": host(), "process": os.getpid(), "run": self.run}

    def take(self) -> None:
        """Take the address for this run, or take it over from one of this machine that was killed.

        Raises:
            EnvironmentUnusable: Another run has it.
        """
        content = json.dumps(self.content).encode()
        try:
            self.store.create(LOCK, content)
        except FileExistsError:
            holder = self._holder()
            if holder.get("host") != host() or _is_at_work(holder):
                self._refuse(holder)
            self.store.write(LOCK, content)
        self.require()
        _runs.add(self.run)

    def require(self) -> None:
        """
        Raises:
            EnvironmentUnusable: Another run has taken it since.
        """
        if (holder := self._holder()) != self.content:
            self._refuse(holder)
        self.looked_at = time.monotonic()

    def is_held(self) -> bool:
        """Whether the address is this run's."""
        return self._holder() == self.content

    def look(self) -> None:
        """`require`, unless that was a moment ago."""
        if time.monotonic() - self.looked_at > _LOOK_SECONDS:
            self.require()

    def release(self) -> None:
        """Give it back if it is still this run's, and the store can be reached."""
        _runs.discard(self.run)
        with contextlib.suppress(Exception):
            if self.is_held():
                self.store.remove([LOCK])

    def _holder(self) -> dict[str, object]:
        """What the lock at the address says; nothing where that cannot be read, or there is none."""
        try:
            found = json_of(self.store.read(LOCK))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _refuse(self, holder: Mapping) -> None:
        raise EnvironmentUnusable(
            "Another fleet is being made at this address",
            where=self.store.address,
            found=f"{LOCK} of process {holder.get('process')} on {holder.get('host')}",
            next_step=f"wait for it; if it was killed on a machine that is gone, remove {LOCK}",
        )


def host() -> str:
    """This machine, since it started, and the space that process numbers are of: containers may share a name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


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
