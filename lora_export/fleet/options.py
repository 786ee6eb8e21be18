"""How to make a fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.environment import available_memory
from lora_export.fleet.on_ray import Actors
from lora_export.fleet.pool import Engine, Limits
from lora_export.fleet.processes import Processes

# A node may be taken away, and again the one that comes in its place.
_ATTEMPTS_ON_RAY = 3
# Of the free memory, what all workers together may take.
_SHARE = 0.9


@dataclass(frozen=True)
class FleetOptions:
    """How to make a fleet.

    Attributes:
        out: The folder to make or to renew, or the address of one, which `pipeline.fleet` makes in a folder here.
        task, dtype: As in `Request`.
        provider: "cpu" or "cuda", what the graph is fused for and adapters are compared on; None for CUDA if usable.
        pooling: How the graph makes an embedding of a text: "auto" for what the sentence-transformers folders of most
            adapters say, else the base's, or a way to pool; None or "none" for hidden states alone.
        targets: Modules to give LoRA inputs besides those that the adapters touch.
        n_workers: Workers; None for one on each core.
        ray: Where workers are Ray actors: the address of a cluster, or "local"; None for processes of this machine.
        n_rows: Most rows to compare an adapter on.
        seconds: Most for one adapter.
        n_bytes: Most memory of a worker; None for an equal part of what is free, and on Ray for what Ray allows.
        limit: Only so many adapters of the list; None for all.
        only_changed: Report, and judge the exit code by, what this run does; what is as it was is counted only.
        tolerances: Limits in place of the table's, by measure.
    """

    out: Path | str
    task: str | None = None
    dtype: str | None = None
    provider: str | None = None
    pooling: str | None = None
    targets: tuple[str, ...] = ()
    n_workers: int | None = None
    ray: str | None = None
    n_rows: int = 8
    seconds: float = 600
    n_bytes: int | None = None
    limit: int | None = None
    only_changed: bool = False
    tolerances: Mapping[str, float] = field(default_factory=dict)

    def engine(self, work: str) -> Engine:
        """Where workers run.

        Raises:
            EnvironmentUnusable: Ray is asked for, and is not there.
        """
        return Processes(work) if self.ray is None else Actors(work, self.ray)

    def workers(self, n_assignments: int, n_cpus: int) -> int:
        """The number of workers for so many adapters on so many processors."""
        return max(1, min(self.n_workers or n_cpus, n_assignments))

    def limits(self, n_workers: int) -> Limits:
        """What each of `n_workers` may take."""
        if self.ray is not None:
            return Limits(self.seconds, self.n_bytes, attempts=_ATTEMPTS_ON_RAY)
        free = available_memory()
        share = None if free is None else int(_SHARE * free / n_workers)
        return Limits(self.seconds, self.n_bytes or share)
