"""What `check` found, as frozen values. Renderers only read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lora_export.check.divergence_results import Divergence, LayerErrors
from lora_export.check.judge.tolerances import Gate
from lora_export.verdict import Environment, Subject, Verdict, scope_of


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
        effect_ratio: `effect / error`; must be at least `effect_ratio_minimum`, where that gates.
        effect_share: How much of the effect the export has, 1 if all of it; see `effect.py`.
        effect_share_tolerance: How far that may be from 1.
        rounding: The same against PyTorch at a wider dtype; None where that was not run.
        rounding_ratio: The export's root mean square over PyTorch's, there; may be at most `rounding_ratio_maximum`.
        perplexity_reference, perplexity_exported: Of a language model, on the data.
        perplexity_difference: `|exported / reference − 1|`; may be at most `perplexity_tolerance`.
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
    effect_share: float | None = None
    effect_share_tolerance: float | None = None
    rounding: Rounding | None = None
    rounding_ratio: float | None = None
    rounding_ratio_maximum: float | None = None
    perplexity_reference: float | None = None
    perplexity_exported: float | None = None
    perplexity_difference: float | None = None
    perplexity_tolerance: float | None = None
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
        gates: The limits that the cases were judged by, each with its reason.
        skipped: What was not compared, and why, one sentence each.
        layers: The error by layer of each adapter and the base, whether or not a case failed.
        divergence: Where the first failing case differs from PyTorch, or why that was not found; None if none failed.
    """

    subject: Subject
    environment: Environment
    data: tuple[str, ...]
    cases: tuple[ParityCase, ...]
    gates: tuple[Gate, ...]
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
