"""What became of the adapters of a fleet, as frozen values. Renderers only read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from lora_export.check.results import Measured
from lora_export.verdict import Environment

FLEET_SCHEMA = 1


class Outcome(StrEnum):
    """Of one adapter."""

    SERVED = "served"  # packed, and equal to PEFT
    REFUSED = "refused"  # it cannot be exported; the reason is its own
    FAILED = "failed"  # packed, and not equal to PEFT: it is not served
    BROKEN = "broken"  # its worker died, hung or swelled, each time that it was tried


@dataclass(frozen=True)
class AdapterOutcome:
    """What became of one adapter.

    Attributes:
        key: A hash of all that decides the rest: the adapter's files, the graph, the base, versions and options.
        reason: Why it is not served, in one sentence; None if it is.
        detail: The whole message of a refusal, by field (`LoraExportError.to_dict`).
        attempts: How many workers tried it.
        seconds: What the last took; `seconds_packing` until the file was written, before it was compared, and
            `processor_seconds_packing` of all its threads until then.
        n_bytes: Of its packed file.
        n_rows: Rows that it was compared on.
        measures: What was measured, each with its limit.
        largest_error, largest_effect: As in `ParityCase`.
        reused: Whether an earlier run found it.
        remarks: What `dynamic` would say of it: another base than it records, its own tokenizer, and the like.
        record: Its entry of the manifest, as JSON; empty unless it was packed.
        files: sha256 of its files by path in the export.
    """

    name: str
    given: str
    outcome: Outcome
    key: str = ""
    reason: str | None = None
    detail: Mapping[str, object] = field(default_factory=dict)
    attempts: int = 1
    seconds: float = 0.0
    seconds_packing: float = 0.0
    processor_seconds_packing: float = 0.0
    n_bytes: int = 0
    n_rows: int = 0
    measures: tuple[Measured, ...] = ()
    largest_error: float | None = None
    largest_effect: float | None = None
    reused: bool = False
    remarks: tuple[str, ...] = ()
    record: Mapping[str, object] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def again(self, given: str) -> AdapterOutcome:
        """The same of an adapter that an earlier run found, which lies at `given` now."""
        record = self.record and {**self.record, "source": {**self.record["source"], "given": given}}
        return replace(self, given=given, record=record, reused=True)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping) -> AdapterOutcome:
        measures = tuple(Measured(**each) for each in fields["measures"])
        remarks = tuple(fields.get("remarks", ()))  # none in what earlier versions kept
        return replace(cls(**fields), outcome=Outcome(fields["outcome"]), measures=measures, remarks=remarks)


@dataclass(frozen=True)
class FleetReport:
    """Everything a fleet's run found.

    Attributes:
        adapters: Of the list, in its order; of a run with `only_changed`, those that it did.
        n_unchanged: How many more are as an earlier run found them, and are left out of `adapters`.
        n_kinds: How many kinds of adapter the list has, by options, shapes and names of tensors.
        seconds: Of the whole run; `seconds_packing` from the first adapter to the last.
    """

    folder: str
    source: str
    base: str
    task: str
    environment: Environment
    n_workers: int
    n_kinds: int
    adapters: tuple[AdapterOutcome, ...]
    seconds: float
    seconds_packing: float
    n_unchanged: int = 0
    schema: int = FLEET_SCHEMA

    def counted(self) -> dict[Outcome, int]:
        """The number of adapters by outcome, none left out."""
        found = Counter(adapter.outcome for adapter in self.adapters)
        return {outcome: found[outcome] for outcome in Outcome}

    @property
    def exit_code(self) -> int:
        """1 if an adapter differs from PEFT or broke its workers, 3 if all were refused, else 0."""
        counts = self.counted()
        if counts[Outcome.FAILED] or counts[Outcome.BROKEN]:
            return 1
        return 3 if self.adapters and counts[Outcome.REFUSED] == len(self.adapters) else 0

    def to_dict(self) -> dict:
        derived = {"report": "fleet", "counts": self.counted(), "exit_code": self.exit_code}
        return asdict(self) | derived
