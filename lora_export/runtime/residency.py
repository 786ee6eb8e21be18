"""`Residency`: which adapters' tensors are in memory, where that is bounded.

An adapter that is read from a file is in memory when a run needs it. When the tensors of all adapters take more than
`max_bytes`, those of the adapter that was used the longest ago are dropped. The next run that needs them reads the file
again, and refuses it if it has changed. A pinned adapter stays. Runs that are under way keep what they have read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from lora_export.errors import UsageProblem

if TYPE_CHECKING:
    from lora_export.runtime.held_adapter import HeldAdapter


class Residency:
    """The adapters of a session that are in memory; any thread may call any method.

    Args:
        max_bytes: The most bytes of tensors; None for no bound.

    Raises:
        UsageProblem: The bound is no number of bytes.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise UsageProblem(
                "The bound of the adapters' memory is no number of bytes", where="max_bytes", found=str(max_bytes)
            )
        self.max_bytes = max_bytes
        self._held: OrderedDict[HeldAdapter, None] = OrderedDict()  # the one that was used last at the end
        self._n_bytes = 0
        self._pinned: set[str] = set()
        self._changing = threading.Lock()

    @property
    def or_none(self) -> Residency | None:
        """Itself if it bounds anything."""
        return None if self.max_bytes is None else self

    @property
    def n_bytes(self) -> int:
        """What is in memory."""
        with self._changing:
            return self._n_bytes

    def pin(self, name: str) -> None:
        """Keep the adapters of this name in memory, whichever are loaded."""
        with self._changing:
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let the adapters of this name be dropped again."""
        with self._changing:
            self._pinned.discard(name)
            self._make_room(None)

    def used(self, adapter: HeldAdapter) -> None:
        """Say that `adapter`, whose tensors are in memory, is used now; others may be dropped.

        Raises:
            UsageProblem: It does not fit beside those that must stay.
        """
        with self._changing:
            if adapter in self._held:
                self._held.move_to_end(adapter)
            elif adapter.is_loaded:
                self._held[adapter] = None
                self._n_bytes += adapter.n_bytes
                self._make_room(adapter)

    def forget(self, adapter: HeldAdapter) -> None:
        """Count `adapter` no longer: it is unloaded."""
        with self._changing:
            self._remove(adapter)

    def _remove(self, adapter: HeldAdapter) -> None:
        if adapter in self._held:
            del self._held[adapter]
            self._n_bytes -= adapter.n_bytes

    def _make_room(self, used: HeldAdapter | None) -> None:
        if self.max_bytes is None or self._n_bytes <= self.max_bytes:
            return
        for adapter in list(self._held):
            if adapter is not used and adapter.can_be_dropped and adapter.name not in self._pinned:
                self._remove(adapter)
                adapter.drop()
                if self._n_bytes <= self.max_bytes:
                    return
        if used is not None:
            n_bytes = self._n_bytes
            self._remove(used)
            if used.can_be_dropped:
                used.drop()
            raise UsageProblem(
                f"Adapter {used.name!r} does not fit into the adapters' memory",
                expected=f"at most {self.max_bytes:,} bytes",
                found=f"{n_bytes:,} bytes with those that are pinned or have no file",
                next_step="give the session more with max_bytes, or unpin or unload another",
            )


def residency_of(max_bytes: int | Residency | None, *, map_adapters: bool) -> Residency:
    """What bounds the adapters of a session.

    Raises:
        UsageProblem: Files that are mapped take no memory that could be bounded.
    """
    found = max_bytes if isinstance(max_bytes, Residency) else Residency(max_bytes)
    if map_adapters and found.or_none:
        raise UsageProblem(
            "Adapters whose files are mapped take no memory to be bounded",
            where="map_adapters, max_bytes",
            next_step="give one of them",
        )
    return found
