"""What `check` found, as frozen values. Renderers only read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lora_export.check.divergence_results import Divergence, LayerErrors
from lora_export.check.judge.tolerances import MEASURES, Limit, holds, used
from lora_export.verdict import REPORT_SCHEMA, Environment, Subject, Verdict, scope_of


@dataclass(frozen=True)
class Rounding:
    """How far PyTorch at the export's dtype, and the export, are from PyTorch at a wider one, over the same positions.

    The wider dtype is float32 for half precision and float64 for float32.

    Attributes:
        rms_reference, rms_exported: Root mean square of the differences.
        error_reference, error_exported: The largest absolute difference.
        kl_reference, kl_exported: Mean Kullback-Leibler divergence from the wider, nats; None without logits.
        top1_reference, top1_exported: Share of positions with the wider's largest logit, no margin; 0 to 1.
        perplexity: The wider's own, on the data; None if the model is no language model.
    """

    rms_reference: float
    rms_exported: float
    error_reference: float
    error_exported: float
    kl_reference: float | None = None
    kl_exported: float | None = None
    top1_reference: float | None = None
    top1_exported: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Measured:
    """One measure of a case.

    Attributes:
        name: A key of `judge.tolerances.MEASURES`, which says what it means and on which side of its limit it must be.
        limit: None where the measure was taken and nothing limits it at this dtype.
        failed: Whether the value is beyond the limit.
    """

    name: str
    value: float
    limit: float | None
    failed: bool

    @classmethod
    def of(cls, name: str, value: float, limit: float | None) -> Measured:
        """With `failed` as `limit` has it."""
        return cls(name, value, limit, limit is not None and not holds(name, value, limit))

    @property
    def used(self) -> float | None:
        """How much of its limit it takes, above 1 beyond it; None where nothing limits it."""
        return None if self.limit is None else used(self.name, self.value, self.limit)

    @property
    def failure(self) -> str:
        """That it is beyond its limit, in a sentence."""
        return MEASURES[self.name].failure.format(value=self.value, limit=self.limit)


@dataclass(frozen=True)
class BothSides:
    """The same figure of PyTorch and of the export."""

    reference: float
    exported: float


# The group of what quantization costs against the base's floats.
COST = "cost"


@dataclass(frozen=True)
class ParityCase:
    """One comparison of ONNX Runtime with its reference.

    Attributes:
        name: What was compared, e.g. "topic", "base", "8 mixed rows", "topic → kind → topic → none".
        group: "base", "adapter", "rows", "sequence", "decoding", "merged-dynamic"; of a quantized export also
            "weights", "deployed" and "cost".
        reference: What it was compared with, in words.
        n_rows: Rows (examples) compared.
        measures: What was measured, each with its limit.
        failures: Why the case failed, one sentence each; empty if it passed.
        largest_error: Largest absolute difference over real (unpadded) positions; None where tokens were compared.
        largest_effect: Largest absolute difference that the adapter makes in the reference; None without an adapter.
        rounding: How far both are from PyTorch at a wider dtype; None where that was not run.
        perplexity: Of a language model, on the data.
        accuracy: On labelled data, 0 to 1.
    """

    name: str
    group: str
    reference: str
    n_rows: int
    measures: tuple[Measured, ...] = ()
    failures: tuple[str, ...] = ()
    largest_error: float | None = None
    largest_effect: float | None = None
    rounding: Rounding | None = None
    perplexity: BothSides | None = None
    accuracy: BothSides | None = None

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def nearest(self) -> Measured | None:
        """The measure that takes the most of its limit; None where nothing limits any."""
        limited = [measured for measured in self.measures if measured.used is not None]
        return max(limited, key=lambda measured: measured.used, default=None)

    def measured(self, *names: str) -> Measured | None:
        """The first of these measures that was taken; None if none was."""
        return next((measured for name in names for measured in self.measures if measured.name == name), None)

    def value(self, *names: str) -> float | None:
        """Its value."""
        found = self.measured(*names)
        return None if found is None else found.value


@dataclass(frozen=True)
class CheckReport:
    """Everything `check` found.

    Attributes:
        data: What inputs were used, in words (file and number of rows, or the seed).
        limits: The limits that the cases were judged by, each with its reason.
        skipped: What was not compared, and why, one sentence each.
        layers: The error by layer of each adapter and the base, whether or not a case failed.
        divergence: Where the first failing case differs from PyTorch, or why that was not found; None if none failed.
        stopped: What ended the check before its last case, in words; None if nothing did.
    """

    subject: Subject
    environment: Environment
    data: tuple[str, ...]
    cases: tuple[ParityCase, ...]
    limits: tuple[Limit, ...]
    skipped: tuple[str, ...]
    seconds: float
    layers: tuple[LayerErrors, ...] = ()
    divergence: Divergence | None = None
    stopped: str | None = None
    schema: int = REPORT_SCHEMA

    @property
    def verdict(self) -> Verdict:
        """Fail if any case failed, or if nothing was compared; ambiguous if none did before the check was stopped."""
        if not self.cases or not all(case.passed for case in self.cases):
            return Verdict.FAIL
        return Verdict.PASS if self.stopped is None else Verdict.AMBIGUOUS

    @property
    def partial(self) -> bool:
        return self.stopped is not None

    @property
    def scope(self) -> str | None:
        return scope_of("parity", self.subject, self.environment)

    def to_dict(self) -> dict:
        cases = [asdict(case) | {"passed": case.passed} for case in self.cases]
        derived = {"report": "check", "verdict": self.verdict, "scope": self.scope, "partial": self.partial}
        return asdict(self) | derived | {"cases": cases}
