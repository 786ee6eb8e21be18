"""What `bench` found, as frozen values with raw samples. Renderers only read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lora_export.verify.results import Environment, Subject, Verdict, scope_of


@dataclass(frozen=True)
class Variant:
    """One graph under test in one workload.

    Attributes:
        name: "base", "merged", "dynamic", "mixed rows", …
        description: What runs, in words.
        samples_ms: Milliseconds of every timed run, in the order taken.
    """

    name: str
    description: str
    samples_ms: tuple[float, ...]
    median_ms: float
    rows_per_second: float


@dataclass(frozen=True)
class Ratio:
    """The median ratio of a variant's latency to another's over paired blocks, with its exact confidence interval.

    Attributes:
        block_ratios: One ratio for each ABBA block.
        low, high: Bounds of the interval for the median ratio (order statistics).
        confidence: Coverage of the interval, 0 to 1.
        allowance: Largest ratio allowed; None if the ratio is only reported.
    """

    variant: str
    against: str
    median: float
    low: float
    high: float
    confidence: float
    block_ratios: tuple[float, ...]
    allowance: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Workload:
    """One shape: `batch` rows of `sequence` tokens (or of one image, sequence 0) on `past` cached tokens."""

    batch: int
    sequence: int
    past: int
    variants: tuple[Variant, ...]
    ratios: tuple[Ratio, ...]

    @property
    def name(self) -> str:
        past = f" on {self.past}" if self.past else ""
        if self.sequence:
            return f"{self.batch} × {self.sequence}{past} tokens"
        return f"{self.batch} image{'s' if self.batch > 1 else ''}"


@dataclass(frozen=True)
class Swap:
    """Changing the adapter between runs, in microseconds: medians over `n` swaps.

    Attributes:
        bound_us: To an adapter already held by the session.
        loaded_us: To one read from its file first.
    """

    bound_us: float
    loaded_us: float
    n: int


@dataclass(frozen=True)
class BenchReport:
    """Everything `bench` found."""

    subject: Subject
    environment: Environment
    workloads: tuple[Workload, ...]
    swap: Swap | None
    memory_mb: dict[str, float]  # resident anonymous memory of one session by variant, megabytes
    notes: tuple[str, ...]
    seconds: float
    schema: int = 1

    @property
    def verdict(self) -> Verdict:
        found = [ratio.verdict for workload in self.workloads for ratio in workload.ratios]
        for verdict in (Verdict.FAIL, Verdict.AMBIGUOUS, Verdict.PASS):
            if verdict in found:
                return verdict
        return Verdict.NOT_GATED

    @property
    def scope(self) -> str | None:
        return scope_of("latency", self.subject, self.environment)

    def to_dict(self) -> dict:
        workloads = [asdict(workload) | {"name": workload.name} for workload in self.workloads]
        derived = {"report": "bench", "verdict": self.verdict, "scope": self.scope}
        return asdict(self) | derived | {"workloads": workloads}
