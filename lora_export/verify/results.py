"""What `check` and `bench` found, as frozen values with raw samples and environment. Renderers only read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


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


@dataclass(frozen=True)
class ParityCase:
    """One comparison of ONNX Runtime with its reference.

    Attributes:
        name: What was compared, e.g. "topic", "base", "mixed rows", "topic → kind → topic → none".
        group: "base", "adapter", "rows", "sequence", "decoding" or "merged-dynamic".
        reference: What it was compared with, in words.
        error: Largest absolute difference over real (unpadded) positions.
        error_relative: `error` over max(1, largest absolute reference value).
        tolerance: What `error_relative` may be; None where this measure does not gate.
        kl: Mean Kullback-Leibler divergence of the softmax of the logits, in nats; None without logits.
        kl_tolerance: Likewise.
        top1: Share of positions where both have the same largest logit, counting only margins above the noise; 0 to 1.
        top1_tolerance: Likewise (a lower bound).
        effect: Largest absolute difference that the adapter makes in the reference; None where there is no adapter.
        effect_ratio: `effect / error`; must be at least `effect_ratio_minimum`.
        accuracy_reference, accuracy_exported: On labelled data, 0 to 1.
        n_rows: Rows (examples) compared.
        failures: Why the case failed, one sentence each; empty if it passed.
    """

    name: str
    group: str
    reference: str
    error: float
    error_relative: float
    tolerance: float | None
    n_rows: int
    kl: float | None = None
    kl_tolerance: float | None = None
    top1: float | None = None
    top1_tolerance: float | None = None
    effect: float | None = None
    effect_ratio: float | None = None
    effect_ratio_minimum: float | None = None
    accuracy_reference: float | None = None
    accuracy_exported: float | None = None
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class CheckReport:
    """Everything `check` found.

    Attributes:
        data: What inputs were used, in words (file and number of rows, or the seed).
        skipped: What was not compared, and why, one sentence each.
    """

    subject: Subject
    environment: Environment
    data: tuple[str, ...]
    cases: tuple[ParityCase, ...]
    skipped: tuple[str, ...]
    seconds: float
    schema: int = 1

    @property
    def verdict(self) -> Verdict:
        """Fail if any case failed, or if nothing was compared."""
        return Verdict.PASS if self.cases and all(case.passed for case in self.cases) else Verdict.FAIL

    @property
    def scope(self) -> str | None:
        return scope_of("parity", self.subject, self.environment)

    def to_dict(self) -> dict:
        cases = [asdict(case) | {"passed": case.passed} for case in self.cases]
        derived = {"report": "check", "verdict": self.verdict, "scope": self.scope}
        return asdict(self) | derived | {"cases": cases}


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
