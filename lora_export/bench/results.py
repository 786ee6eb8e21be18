"""What `bench` found, as frozen values with raw samples. Renderers only read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lora_export.verdict import REPORT_SCHEMA, Environment, Subject, Verdict, scope_of


@dataclass(frozen=True)
class WarmUp:
    """The untimed runs before a round's blocks; `settled` is False if their time still changed when they ended."""

    n_runs: int
    seconds: float
    settled: bool


@dataclass(frozen=True)
class Variant:
    """One graph under test in one workload.

    Attributes:
        name: "base", "merged", "dynamic", "mixed rows", …
        description: What runs, in words.
        samples_ms: Milliseconds a run of every timed sample, in the order taken; short runs are timed several to a
            sample, of which this is the mean.
        fastest_ms: The fastest run of each sample; ratios are taken from these.
        warm_ups: One for each round of blocks.
    """

    name: str
    description: str
    samples_ms: tuple[float, ...]
    fastest_ms: tuple[float, ...]
    median_ms: float
    rows_per_second: float
    warm_ups: tuple[WarmUp, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """The median ratio of a variant's latency to another's over paired blocks, with its exact confidence interval.

    Attributes:
        block_ratios: One ratio for each ABBA block, of the fastest runs of its samples.
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


def workload_name(batch: int, sequence: int, past: int) -> str:
    """A shape in words."""
    if sequence:
        return f"{batch} × {sequence}{f' on {past}' if past else ''} tokens"
    return f"{batch} image{'s' if batch > 1 else ''}"


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
        return workload_name(self.batch, self.sequence, self.past)


@dataclass(frozen=True)
class Swap:
    """Changing the adapter between runs in one way, microseconds.

    Attributes:
        name: "bound" (to an adapter that the session holds) or "loaded" (to one read from its file first).
        low_us, high_us, confidence: The interval for the median, as of a `Ratio`.
        allowance_us: Largest median allowed; None if it is only reported.
    """

    name: str
    samples_us: tuple[float, ...]
    median_us: float
    low_us: float
    high_us: float
    confidence: float
    allowance_us: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Memory:
    """The most memory that one session of a variant took while it was opened and ran the workloads, 10⁶ bytes.

    Attributes:
        place: "process" (anonymous memory above what the process had before) or "device" (the GPU's, all of it).
        allowance_mb: The most allowed; None if it is only reported.
    """

    variant: str
    place: str
    peak_mb: float
    allowance_mb: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Difference:
    """How far a variant's outputs lie from those of the other export on the same inputs, in one workload.

    Attributes:
        outputs: The names of what was compared; empty where no output of the two has one shape.
        largest: The largest absolute difference; None where nothing was compared.
        share: The same over the variant's largest absolute value.
        allowance: The largest share allowed; None if it is only reported.
    """

    workload: str
    variant: str
    outputs: tuple[str, ...]
    largest: float | None
    share: float | None
    allowance: float | None
    verdict: Verdict


@dataclass(frozen=True)
class ProviderOperators:
    """Where ONNX Runtime runs one graph of a timed session: operators with their number, of one execution provider."""

    session: str
    graph: str
    provider: str
    operators: dict[str, int]

    @property
    def n_operators(self) -> int:
        return sum(self.operators.values())


@dataclass(frozen=True)
class BenchReport:
    """Everything `bench` found.

    Attributes:
        against: The other export, or another tool's graph, that was timed beside it; None if there was none.
        differences: Of its outputs; empty if there was none.
        memory: Empty where it cannot be measured.
        stopped: What ended the bench before its last measurement, in words; None if nothing did.
    """

    subject: Subject
    environment: Environment
    workloads: tuple[Workload, ...]
    swaps: tuple[Swap, ...]
    memory: tuple[Memory, ...]
    placements: tuple[ProviderOperators, ...]
    notes: tuple[str, ...]
    seconds: float
    against: Subject | None = None
    stopped: str | None = None
    differences: tuple[Difference, ...] = ()
    schema: int = REPORT_SCHEMA

    @property
    def verdict(self) -> Verdict:
        """The worst of all latencies, swaps, peaks of memory and differences; ambiguous if none is above its allowance
        and some are missing."""
        ratios = [ratio for workload in self.workloads for ratio in workload.ratios]
        found = {entry.verdict for entry in (*ratios, *self.swaps, *self.memory, *self.differences)}
        if self.partial:
            found.add(Verdict.AMBIGUOUS)
        for verdict in (Verdict.FAIL, Verdict.AMBIGUOUS, Verdict.PASS):
            if verdict in found:
                return verdict
        return Verdict.NOT_GATED

    @property
    def partial(self) -> bool:
        return self.stopped is not None

    @property
    def scope(self) -> str | None:
        return scope_of("latency", self.subject, self.environment)

    def to_dict(self) -> dict:
        workloads = [asdict(workload) | {"name": workload.name} for workload in self.workloads]
        derived = {"report": "bench", "verdict": self.verdict, "scope": self.scope, "partial": self.partial}
        return asdict(self) | derived | {"workloads": workloads}
