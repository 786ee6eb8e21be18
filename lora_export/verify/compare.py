"""Two sets of outputs become one `ParityCase`: error, divergence, agreement, and whether the gates hold. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lora_export.verify.check_results import ParityCase
from lora_export.verify.effect import effect_share
from lora_export.verify.tolerances import Tolerances


@dataclass(frozen=True)
class Outputs:
    """The main output over some batches.

    Attributes:
        name: "logits" or "last_hidden_state".
        values: Arrays `[batch, …, n]`, float32.
        real: Masks `[batch, sequence]` of unpadded positions, or None where the output has no sequence axis.
        labels: Classes of the rows where the data names them.
    """

    name: str
    values: tuple[np.ndarray, ...]
    real: tuple[np.ndarray | None, ...]
    labels: tuple[tuple[int | None, ...], ...] = ()

    @property
    def n_rows(self) -> int:
        return sum(len(value) for value in self.values)

    def positions(self) -> np.ndarray:
        """All real positions, `[positions, n]`."""
        found = []
        for value, mask in zip(self.values, self.real, strict=True):
            has_sequence = mask is not None and value.ndim == 3 and value.shape[1] == mask.shape[1]
            found.append(value[mask] if has_sequence else value.reshape(-1, value.shape[-1]))
        return np.concatenate(found).astype(np.float64)


def compare(
    name: str,
    group: str,
    described: str,
    reference: Outputs,
    found: Outputs,
    gates: Tolerances,
    *,
    without: Outputs | None = None,
) -> ParityCase:
    """Judge `found` against `reference`.

    Args:
        described: What the reference is, in words.
        without: The reference without the adapter on the first batches, to see what effect it has; None where there
            is no adapter.
    """
    expected, actual = reference.positions(), found.positions()
    if expected.shape != actual.shape:
        message = f"shapes differ: {list(expected.shape)} in the reference, {list(actual.shape)} exported"
        return _incomparable(name, group, described, reference, message)
    broken = int((~np.isfinite(actual)).sum())
    if broken:
        message = f"{broken} exported values are NaN or infinite"
        return _incomparable(name, group, described, reference, message)
    error = float(np.abs(expected - actual).max(initial=0))
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    has_logits = reference.name == "logits"
    limit = gates.relative if has_logits else gates.features
    kl = mean_kl(expected, actual) if has_logits else None
    noise = error if limit is None else limit * scale
    top1 = top1_agreement(expected, actual, margin=2 * noise) if has_logits else None
    effect = None if without is None else _effect(expected, without.positions())
    share = None if without is None else effect_share(expected, actual, without.positions(), gates.effect_share)
    effect_ratio = None if effect is None else effect / max(error, np.finfo(np.float64).tiny)
    case = ParityCase(
        name=name,
        group=group,
        reference=described,
        error=error,
        error_relative=error / scale,
        tolerance=limit,
        n_rows=reference.n_rows,
        kl=kl,
        kl_tolerance=gates.kl if has_logits else None,
        top1=top1,
        top1_tolerance=gates.top1 if has_logits else None,
        effect=effect,
        effect_ratio=effect_ratio,
        effect_ratio_minimum=None if effect is None else gates.effect_ratio,
        effect_share=share and share.value,
        effect_share_tolerance=share and share.tolerance,
        accuracy_reference=accuracy(reference),
        accuracy_exported=accuracy(found),
    )
    return replace(case, failures=tuple(_failures(case)))


def _incomparable(name: str, group: str, described: str, reference: Outputs, why: str) -> ParityCase:
    return ParityCase(name, group, described, math.inf, math.inf, None, reference.n_rows, failures=(why,))


def _effect(expected: np.ndarray, without: np.ndarray) -> float:
    return float(np.abs(expected[: len(without)] - without).max(initial=0))


def _failures(case: ParityCase) -> Iterator[str]:
    if case.tolerance is not None and case.error_relative > case.tolerance:
        yield f"the error is {case.error_relative:.2e} of the output's size; at most {case.tolerance:.0e} is rounding"
    if case.kl_tolerance is not None and case.kl > case.kl_tolerance:
        yield f"the distributions differ by {case.kl:.2e} nats; at most {case.kl_tolerance:.0e} is rounding"
    if case.top1_tolerance is not None and case.top1 < case.top1_tolerance:
        yield f"the best class agrees in {case.top1:.2%} of positions; {case.top1_tolerance:.1%} is expected"
    if case.effect_ratio_minimum is not None and case.effect_ratio < case.effect_ratio_minimum:
        yield (
            f"the adapter has no effect here: it changes the reference by {case.effect:.2e}, "
            f"less than {case.effect_ratio_minimum:g} × the error of {case.error:.2e}"
        )
    if case.effect_share is not None and abs(case.effect_share - 1) > case.effect_share_tolerance:
        yield (
            f"{case.effect_share:.2%} of the adapter's effect arrives; "
            f"100 % to within {case.effect_share_tolerance:.2%} is expected"
        )


def mean_kl(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean over positions of KL(softmax(expected) ‖ softmax(actual)), nats."""
    log_p, log_q = _log_softmax(expected), _log_softmax(actual)
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top1_agreement(expected: np.ndarray, actual: np.ndarray, margin: float) -> float:
    """Share of positions with the same largest logit; a flip within `margin` of a tie in the reference agrees."""
    best = expected.argmax(axis=-1)
    chosen = np.take_along_axis(expected, actual.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return float((expected[np.arange(len(best)), best] - chosen <= margin).mean())


def accuracy(outputs: Outputs) -> float | None:
    """Share of labelled rows whose largest logit is their class; None without labels or with token outputs."""
    hits = [
        int(value[row].argmax()) == label
        for value, labels in zip(outputs.values, outputs.labels, strict=False)
        for row, label in enumerate(labels)
        if label is not None and value.ndim == 2
    ]
    return sum(hits) / len(hits) if hits else None
