"""What `check` found, as frozen values. Renderers only read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lora_export.verify.divergence_results import Divergence, LayerErrors
from lora_export.verify.results import Environment, Subject, Verdict, scope_of


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
        layers: The error by layer of each adapter and the base, whether or not a case failed.
        divergence: Where the first failing case differs from PyTorch, or why that was not found; None if none failed.
    """

    subject: Subject
    environment: Environment
    data: tuple[str, ...]
    cases: tuple[ParityCase, ...]
    skipped: tuple[str, ...]
    seconds: float
    layers: tuple[LayerErrors, ...] = ()
    divergence: Divergence | None = None
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
