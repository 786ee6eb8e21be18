"""Two sets of outputs become one `ParityCase`: error, divergence, agreement, and whether the gates hold. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lora_export.check.judge.effect import effect_share
from lora_export.check.judge.measures import (
    mean_kl,
    output_scale,
    perplexity,
    rms,
    scale_of,
    scatter_of_ratio,
    top1_agreement,
    typical_size,
)
from lora_export.check.judge.tolerances import Tolerances
from lora_export.check.results import ParityCase, Rounding

# Two thirds of the limit are what sound exports have at the most where there are many positions; the rest is a margin
# for chance, beyond which few positions widen it.
_OF_THE_LIMIT = 0.65


@dataclass(frozen=True)
class Outputs:
    """The main output over some batches.

    Attributes:
        name: "logits" or "last_hidden_state".
        values: Arrays `[batch, …, n]`, float32.
        real: Masks `[batch, sequence]` of unpadded positions, or None where the output has no sequence axis.
        labels: Classes of the rows where the data names them.
        targets: Of a language model, the token that follows each position, `[batch, sequence]`, -1 for none.
        precise: The values on the first batches as PyTorch computes them at a wider dtype; empty if it did not.
        n_flattened: How many positions `values` had before they were made one; None where they were not.
    """

    name: str
    values: tuple[np.ndarray, ...]
    real: tuple[np.ndarray | None, ...]
    labels: tuple[tuple[int | None, ...], ...] = ()
    targets: tuple[np.ndarray | None, ...] = ()
    precise: tuple[np.ndarray, ...] = ()
    n_flattened: int | None = None

    @property
    def n_rows(self) -> int:
        return sum(len(value) for value in self.values)

    def positions(self) -> np.ndarray:
        """All real positions, `[positions, n]`, float64."""
        return self._positions(self.values)

    def precise_positions(self) -> np.ndarray:
        """Those of the first batches at the wider dtype, `[positions, n]`, float64."""
        return self._positions(self.precise)

    def target_positions(self) -> np.ndarray | None:
        """The token that follows each real position, `[positions]`; None if this is no language model."""
        if not self.targets or any(target is None for target in self.targets):
            return None
        return np.concatenate([target[mask] for target, mask in zip(self.targets, self.real, strict=True)])

    def _positions(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        found = []
        for value, mask in zip(values, self.real, strict=False):
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
    case = ParityCase(
        name=name,
        group=group,
        reference=described,
        error=error,
        error_relative=error / output_scale(expected),
        tolerance=gates.error if reference.name == "logits" else gates.features,
        n_rows=reference.n_rows,
        accuracy_reference=accuracy(reference),
        accuracy_exported=accuracy(found),
    )
    if reference.precise:
        case = _with_rounding(case, reference, expected, actual, gates)
    if reference.name == "logits":
        case = _with_distributions(case, reference.target_positions(), expected, actual, gates)
    if without is not None:
        case = _with_effect(case, expected, actual, without.positions(), gates)
    return replace(case, failures=tuple(_failures(case)))


def _incomparable(name: str, group: str, described: str, reference: Outputs, why: str) -> ParityCase:
    return ParityCase(name, group, described, math.inf, math.inf, None, reference.n_rows, failures=(why,))


def _with_rounding(
    case: ParityCase, reference: Outputs, expected: np.ndarray, actual: np.ndarray, gates: Tolerances
) -> ParityCase:
    """How far the export and PyTorch at the same dtype are from PyTorch at a wider one, over the same positions."""
    precise = reference.precise_positions()
    mine, theirs = actual[: len(precise)], expected[: len(precise)]
    has_logits = reference.name == "logits"
    found = Rounding(
        rms_reference=rms(theirs - precise),
        rms_exported=rms(mine - precise),
        error_reference=float(np.abs(theirs - precise).max(initial=0)),
        error_exported=float(np.abs(mine - precise).max(initial=0)),
        kl_reference=mean_kl(precise, theirs) if has_logits else None,
        kl_exported=mean_kl(precise, mine) if has_logits else None,
        top1_reference=top1_agreement(precise, theirs, margin=0) if has_logits else None,
        top1_exported=top1_agreement(precise, mine, margin=0) if has_logits else None,
        perplexity=_perplexity(reference, precise),
    )
    # Rounding the output alone, to the dtype, gives a quarter of a unit; PyTorch may have had more luck than that.
    least = gates.epsilon / 4 * typical_size(precise)
    ratio = found.rms_exported / max(found.rms_reference, least, np.finfo(np.float64).tiny)
    luck = max(1.0, _OF_THE_LIMIT * scatter_of_ratio(reference.n_flattened or len(precise)))
    maximum = None if gates.rounding is None else gates.rounding * luck
    return replace(case, rounding=found, rounding_ratio=ratio, rounding_ratio_maximum=maximum)


def _largest_rounding(case: ParityCase, expected: np.ndarray, gates: Tolerances) -> float | None:
    """Root mean square of the export less PyTorch at the same dtype that rounding explains, both sides' together; None
    if unknown."""
    if case.rounding is None:
        return None
    own = max(case.rounding.rms_reference, gates.epsilon / 4 * typical_size(expected))
    return math.hypot(1.0, _OF_THE_LIMIT * gates.noise) * own


def _perplexity(reference: Outputs, logits: np.ndarray) -> float | None:
    targets = reference.target_positions()
    is_known = targets is not None and (targets[: len(logits)] >= 0).any()
    return perplexity(logits, targets[: len(logits)]) if is_known else None


def _with_distributions(
    case: ParityCase, targets: np.ndarray | None, expected: np.ndarray, actual: np.ndarray, gates: Tolerances
) -> ParityCase:
    """Divergence, agreement and perplexity of logits."""
    noise = noise_of(case, expected, gates)
    if noise is not None:
        case = replace(case, top1=top1_agreement(expected, actual, margin=2 * noise), top1_tolerance=gates.top1)
    if targets is not None and (targets >= 0).any():
        theirs, mine = perplexity(expected, targets), perplexity(actual, targets)
        found = {"perplexity_reference": theirs, "perplexity_exported": mine}
        case = replace(case, **found, perplexity_difference=abs(mine / theirs - 1))
        case = replace(case, perplexity_tolerance=gates.perplexity)
    return replace(case, kl=mean_kl(expected, actual), kl_tolerance=gates.kl)


def _with_effect(
    case: ParityCase, expected: np.ndarray, actual: np.ndarray, without: np.ndarray, gates: Tolerances
) -> ParityCase:
    """What the adapter changes in the reference, and how much of it the export has."""
    effect = float(np.abs(expected[: len(without)] - without).max(initial=0))
    ratio = effect / max(case.error, np.finfo(np.float64).tiny)
    case = replace(case, effect=effect, effect_ratio=ratio, effect_ratio_minimum=gates.effect)
    share = effect_share(expected, actual, without, gates.effect_share or 0, _largest_rounding(case, expected, gates))
    tolerance = None if gates.effect_share is None else share.tolerance
    return replace(case, effect_share=share.value, effect_share_tolerance=tolerance)


def noise_of(case: ParityCase, expected: np.ndarray, gates: Tolerances) -> float | None:
    """How far a logit may be off by rounding alone; None where nothing tells.

    What PyTorch's own are off, times what is allowed of it; else the tolerance of float32. Never the error that was
    seen: no best class could then be wrong.
    """
    if case.rounding is not None:
        return gates.noise * max(case.rounding.error_reference, gates.epsilon * scale_of(expected))
    return None if gates.error is None else gates.error * output_scale(expected)


def _failures(case: ParityCase) -> Iterator[str]:
    if _above(case.error_relative, case.tolerance):
        yield f"the error is {case.error_relative:.2e} of the output's size; at most {case.tolerance:.0e} is rounding"
    if _above(case.rounding_ratio, case.rounding_ratio_maximum):
        yield (
            f"the error is {case.rounding_ratio:.3g} × what PyTorch itself loses by rounding at this dtype; "
            f"at most {case.rounding_ratio_maximum:.3g} × is rounding"
        )
    if _above(case.kl, case.kl_tolerance):
        yield f"the distributions differ by {case.kl:.2e} nats; at most {case.kl_tolerance:.0e} is rounding"
    if _above(case.perplexity_difference, case.perplexity_tolerance):
        yield (
            f"the perplexity is {case.perplexity_exported:.6g} instead of {case.perplexity_reference:.6g}; "
            f"at most {case.perplexity_tolerance:.0e} of it is rounding"
        )
    if case.top1_tolerance is not None and not case.top1 >= case.top1_tolerance:
        yield f"the best class agrees in {case.top1:.2%} of positions; {case.top1_tolerance:.1%} is expected"
    if case.effect_ratio_minimum is not None and not case.effect_ratio >= case.effect_ratio_minimum:
        yield (
            f"the adapter has no effect here: it changes the reference by {case.effect:.2e}, "
            f"less than {case.effect_ratio_minimum:g} × the error of {case.error:.2e}"
        )
    if case.effect_share_tolerance is not None and not abs(case.effect_share - 1) <= case.effect_share_tolerance:
        yield (
            f"{case.effect_share:.2%} of the adapter's effect arrives; "
            f"100 % to within {case.effect_share_tolerance:.2%} is expected"
        )


def _above(value: float | None, limit: float | None) -> bool:
    """Whether a measure that gates is above its limit, or no number."""
    return limit is not None and value is not None and not value <= limit


def accuracy(outputs: Outputs) -> float | None:
    """Share of labelled rows whose largest logit is their class; None without labels or with token outputs."""
    hits = [
        int(value[row].argmax()) == label
        for value, labels in zip(outputs.values, outputs.labels, strict=False)
        for row, label in enumerate(labels)
        if label is not None and value.ndim == 2
    ]
    return sum(hits) / len(hits) if hits else None
