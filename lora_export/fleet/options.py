"""How to make a fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.environment import available_memory, n_cores
from lora_export.fleet.pool import Limits

# Of the free memory, what all workers together may take.
_SHARE = 0.9


@dataclass(frozen=True)
class FleetOptions:
    """How to make a fleet.

    Attributes:
        task, dtype: As in `Request`.
        provider: "cpu" or "cuda", what the graph is fused for and adapters are compared on; None for CUDA if usable.
        targets: Modules to give LoRA inputs besides those that the adapters touch.
        n_workers: Processes; None for one on each core.
        n_rows: Most rows to compare an adapter on.
        seconds: Most for one adapter.
        n_bytes: Most memory of a worker; None for an equal part of what is free.
        limit: Only so many adapters of the list; None for all.
        tolerances: Limits in place of the table's, by measure.
    """

    out: Path
    task: str | None = None
    dtype: str | None = None
    provider: str | None = None
    targets: tuple[str, ...] = ()
    n_workers: int | None = None
    n_rows: int = 8
    seconds: float = 600
    n_bytes: int | None = None
    limit: int | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)

    def workers(self, n_assignments: int) -> int:
        """The number of processes for so many adapters."""
        return max(1, min(self.n_workers or n_cores(), n_assignments))

    def limits(self, n_workers: int) -> Limits:
        """What each of `n_workers` may take."""
        free = available_memory()
        share = None if free is None else int(_SHARE * free / n_workers)
        return Limits(self.seconds, self.n_bytes or share)
