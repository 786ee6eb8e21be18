"""What the results of `check` and `bench` have in common: the verdict, the machine, the export."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# The version of the reports of check and bench as JSON.
REPORT_SCHEMA = 2


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    AMBIGUOUS = "ambiguous"
    NOT_GATED = "not gated"


@dataclass(frozen=True)
class Environment:
    """Where a result was obtained. `versions` maps distribution to version; `settings` names session settings."""

    provider: str
    provider_reason: str
    device: str
    cpu: str
    n_cores: int
    python: str
    platform: str
    versions: dict[str, str]
    settings: dict[str, str]
    started_at: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Subject:
    """The export that was examined."""

    folder: str
    kind: str  # "merged" or "dynamic"
    task: str
    dtype: str
    base: str
    fused_for: str
    adapters: tuple[str, ...]
    graph_sha256: str
    n_bytes: dict[str, int]  # by file name, adapters included


def scope_of(what: str, subject: Subject, environment: Environment) -> str | None:
    """What a result taken on the CPU does not say, as a label; None for a GPU's. `what` is "parity" or "latency"."""
    if environment.provider != "cpu":
        return None
    fused = "" if subject.fused_for == "cpu" else f"; the graph is fused for {subject.fused_for.upper()}"
    return f"{what} only on CPU: says nothing about the GPU{fused}"
