"""A check in progress: how a comparison is judged and looked into, and what was found so far.

Every case goes through `Examination.judge`: reference and export over the same batches become a `Comparison`, that a
case, and where it fails the probes tell where. What was found is kept as it comes, so that a crash loses none of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lora_export.artifact import AdapterRecord
from lora_export.check.context import AnySession, CheckContext, run_reference
from lora_export.check.inputs.examples import Batch
from lora_export.check.judge.compare import Comparison, Outputs, compare
from lora_export.check.judge.tolerances import Tolerances
from lora_export.check.locate.probe import Probe
from lora_export.check.locate.probes import worst_probes
from lora_export.check.locate.where import Where
from lora_export.check.reference.unmerged import Reference
from lora_export.check.results import ParityCase
from lora_export.runtime.adapter_session import RowAdapter

ON_IT = ", on the dequantized base"
# An effect that is not seen in so many batches is none.
_EFFECT_BATCHES = 8


@dataclass(frozen=True)
class Examined:
    """An adapter, a sum of them or the base, on both sides.

    Attributes:
        adapter: What the export's rows run with; None for the base, and for what is merged.
        records: The adapters that the reference runs with.
        is_in_weights: Whether they are in quantized weights, so that there is no reference without them.
    """

    label: str
    adapter: RowAdapter
    reference: Reference
    records: tuple[AdapterRecord, ...] = ()
    is_in_weights: bool = False

    @property
    def group(self) -> str:
        return "adapter" if self.records else "base"


@dataclass(frozen=True)
class Examination:
    """One export's check.

    Attributes:
        cases, skipped: What was found, and what was not compared and why; they grow.
    """

    context: CheckContext
    where: Where
    cases: list[ParityCase] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def session(self) -> AnySession:
        return self.context.session

    def judge(
        self,
        comparison: Comparison,
        probes: Callable[[], Iterable[Probe]] | str,
        *,
        layers_of: str | None = None,
        limits: Tolerances | None = None,
    ) -> ParityCase:
        """Add the case of a comparison, and where it fails the place.

        Args:
            probes: Ways to look at the worst row, the cheapest first; or why a failure is not looked into.
            layers_of: The adapter whose error by layer is taken on the first probe, whether or not the case fails.
            limits: Others than the check's.
        """
        case = compare(comparison, limits or self.context.limits)
        self.cases.append(case)
        if isinstance(probes, str):
            self.where.cannot(case, probes)
        elif layers_of is not None:
            self.where.measure(layers_of, case, probes())
        else:
            self.where.find(case, probes)
        return case

    def judge_rows(
        self, comparison: Comparison, examined: Examined, batches: Sequence[Batch], *, layers_of: str | None = None
    ) -> ParityCase:
        """As `judge`, of outputs over whole `batches`: a failure is looked into on the row with the largest error."""
        probes = functools.partial(
            worst_probes, self.session, examined.adapter, examined.reference,
            batches=batches, expected=comparison.expected, found=comparison.found,
        )  # fmt: skip
        return self.judge(comparison, probes, layers_of=layers_of)

    def judge_alone(self, examined: Examined, batches: Sequence[Batch]) -> Outputs:
        """One adapter (or sum, or the base) for all rows of `batches`, with its effect and its error by layer.

        Returns:
            The reference's outputs.
        """
        expected = run_reference(examined.reference, batches, precisely=True)
        without = self.without(examined, batches) if examined.records and not examined.is_in_weights else None
        found = self.context.run(batches, examined.adapter)
        self.context.turns.take_session()  # the error by layer is looked for without it
        described = "PEFT, unmerged" if examined.records else "the base in PyTorch"
        if self.context.integers is not None:
            described = "PyTorch, its weights as the file has them" if examined.is_in_weights else described + ON_IT
        comparison = Comparison(examined.label, examined.group, described, expected, found, without)
        self.judge_rows(comparison, examined, batches, layers_of=examined.label)
        return expected

    def without(self, examined: Examined, batches: Sequence[Batch]) -> Outputs:
        """The reference without the adapter; with the head that it brings, so that only the pairs' effect counts."""
        reference = examined.reference
        brings_head = any(record.replaced for record in examined.records)
        with reference.without_pairs() if brings_head else reference.without_adapter():
            return run_reference(reference, batches[:_EFFECT_BATCHES])
