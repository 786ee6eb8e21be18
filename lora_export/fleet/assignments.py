"""What a worker is given to do; it answers each with an outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_export.export.plan import Request
from lora_export.fleet.outcomes import AdapterOutcome, Outcome


@dataclass(frozen=True)
class Trial:
    """An adapter to be read on the base, as an export reads it.

    Attributes:
        name: Of the kind that it stands for.
    """

    request: Request
    name: str
    given: str
    key: str = ""


@dataclass(frozen=True)
class Job:
    """What all adapters of a fleet have in common.

    Attributes:
        graph: An exported folder without adapters.
        n_rows: Most rows to compare an adapter on.
        n_threads: Of PyTorch and of ONNX Runtime.
        limits: In place of the table's, by measure.
        embeds_as: The sentence-transformers folder of an adapter, where the graph's embedding is made as it says.
    """

    graph: Path
    base: str
    provider: str
    n_rows: int
    n_threads: int
    limits: Mapping[str, float]
    embeds_as: Path | None = None


@dataclass(frozen=True)
class Packing:
    """One adapter to pack and compare.

    Attributes:
        path: Its folder on this machine.
        given: As it is recorded.
        hashes: sha256 of its files by name.
        data: A file of texts that it is compared on; None for the usual ones.
        into: The folder that gets `adapters/<name>.onnx_adapter`.
    """

    job: Job
    name: str
    path: str
    given: str
    key: str
    hashes: Mapping[str, str]
    data: str | None
    into: Path


Assignment = Trial | Packing


def broken(assignment: Assignment, reason: str) -> AdapterOutcome:
    """The outcome of an adapter that broke its workers."""
    return AdapterOutcome(assignment.name, assignment.given, Outcome.BROKEN, assignment.key, reason)
