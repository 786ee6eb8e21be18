"""Two sets of outputs become one `ParityCase`: its measures, and whether their limits hold. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_export.check.judge.formulas import COST_FORMULAS, FORMULAS, Sides
from lora_export.check.judge.tolerances import Tolerances
from lora_export.check.results import COST, BothSides, Measured, ParityCase


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

    def with_precise(self, values: Sequence[np.ndarray]) -> Outputs:
        """The same, with others at the wider dtype."""
        return replace(self, precise=tuple(values))

    def first(self) -> Outputs:
        """Those of the first batch."""
        each = ("values", "real", "labels", "targets", "precise")
        return replace(self, **{name: getattr(self, name)[:1] for name in each})

    def positions(self) -> np.ndarray:
        """All real positions, `[positions, n]`."""
        return self._positions(self.values)

    def precise_positions(self) -> np.ndarray:
        """Those of the first batches at the wider dtype, `[positions, n]`."""
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
        return found[0] if len(found) == 1 else np.concatenate(found)


@dataclass(frozen=True)
class Comparison:
    """Two sets of outputs to be judged.

    Attributes:
        name, group, reference: As in `ParityCase`.
        without: The reference without the adapter on the first batches, to see what effect it has; None where there
            is no adapter.
        n_rows: Rows compared, where `expected` has several flattened into one; else None.
        found_without: The export without the adapter, of a comparison in the group "cost"; None where it has none.
    """

    name: str
    group: str
    reference: str
    expected: Outputs
    found: Outputs
    without: Outputs | None = None
    n_rows: int | None = None
    found_without: Outputs | None = None


def compare(comparison: Comparison, limits: Tolerances) -> ParityCase:
    """Judge what was found against what was expected."""
    expected, found = comparison.expected, comparison.found
    pytorch, exported = expected.positions(), found.positions()
    if pytorch.shape != exported.shape:
        message = f"shapes differ: {list(pytorch.shape)} in the reference, {list(exported.shape)} exported"
        return _incomparable(comparison, limits, message)
    broken = int((~np.isfinite(exported)).sum())
    if broken:
        return _incomparable(comparison, limits, f"{broken} exported values are NaN or infinite")
    sides = Sides(
        pytorch,
        exported,
        limits,
        is_logits=expected.name == "logits",
        precise=expected.precise_positions() if expected.precise else None,
        n_precise=expected.n_flattened or 0,
        without=None if comparison.without is None else comparison.without.positions(),
        targets=expected.target_positions(),
        found_without=None if comparison.found_without is None else comparison.found_without.positions(),
    )
    formulas = COST_FORMULAS if comparison.group == COST else FORMULAS
    figures = ((name, formula(sides)) for name, formula in formulas.items())
    measured = tuple(Measured.of(name, *figure) for name, figure in figures if figure is not None)
    return _case(
        comparison,
        measured,
        tuple(each.failure for each in measured if each.failed),
        largest_error=sides.error,
        largest_effect=sides.effect,
        rounding=sides.rounding,
        perplexity=sides.perplexities,
        accuracy=_accuracies(expected, found),
    )


def _case(
    comparison: Comparison, measured: tuple[Measured, ...], failures: tuple[str, ...], **figures: object
) -> ParityCase:
    n_rows = comparison.expected.n_rows if comparison.n_rows is None else comparison.n_rows
    return ParityCase(comparison.name, comparison.group, comparison.reference, n_rows, measured, failures, **figures)


def _incomparable(comparison: Comparison, limits: Tolerances, why: str) -> ParityCase:
    name = "error" if comparison.expected.name == "logits" else "features"
    limit = limits.error if name == "error" else limits.features
    return _case(comparison, (Measured.of(name, math.inf, limit),), (why,), largest_error=math.inf)


def _accuracies(expected: Outputs, found: Outputs) -> BothSides | None:
    reference, exported = accuracy(expected), accuracy(found)
    return None if reference is None or exported is None else BothSides(reference, exported)


def accuracy(outputs: Outputs) -> float | None:
    """Share of labelled rows whose largest logit is their class; None without labels or with token outputs."""
    hits = [
        int(value[row].argmax()) == label
        for value, labels in zip(outputs.values, outputs.labels, strict=False)
        for row, label in enumerate(labels)
        if label is not None and value.ndim == 2
    ]
    return sum(hits) / len(hits) if hits else None
