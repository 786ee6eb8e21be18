"""What is proven of a quantized export beside its graph, and what quantization costs.

The graph is proven like any other: against PyTorch with the weights of the file, with products that round no
activations. That tells nothing of three things: the weights themselves, the rounding of activations, and how good the
result is. They are measured besides:

1. *weights*: each stored number is the nearest of its block's grid to the base's own, or of a merged export to what
   PEFT's merge gives, and the grid has the range of the block;
2. *as deployed*: the file as it is, where it lets activations be rounded to 8-bit integers, against PyTorch that rounds
   them in the same way;
3. *cost*: the file as it is against PEFT on the base's floats. What is too much here is for the user to say.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_export.check.cases.examination import ON_IT, Examination, Examined
from lora_export.check.context import AnySession, run_export, run_reference
from lora_export.check.inputs.examples import Batch
from lora_export.check.inputs.invoked import with_invocation
from lora_export.check.judge.compare import Comparison, Outputs
from lora_export.check.judge.tolerances import INT8, tolerances
from lora_export.check.judge.weights import WeightErrors, weights_case
from lora_export.check.reference.on_integers import linear_weight
from lora_export.check.results import COST
from lora_export.contract import has_own_head
from lora_export.quantization import Method
from lora_export.runtime.adapter_session import RowAdapter

_AS_DEPLOYED = (
    "The graph agrees with PyTorch where its products round no activations, so the difference is in that rounding."
)
_OF_WEIGHTS = "The file's numbers differ from the base's by more than rounding to their block's grid."
_OF_ANOTHER_TOOL = (
    "How the given graph's integers were chosen: another tool did, so their distance from the base's weights is shown "
    "and not limited (--tolerance weights=, scales=, clipping= limit it). What they cost is shown. Whether they are of "
    "the base or of a fine-tune within rounding of it is not told."
)
_COST = "What quantization costs was to be limited, and no node differs: the weights do."
# Measured on so many batches.
_BATCHES = 8


def weight_cases(examination: Examination) -> None:
    """Each quantized weight of the file against the base's own, or against PEFT's merge."""
    context = examination.context
    records = context.session.manifest.adapters if context.is_merged_integers else ()
    reference = context.float_reference(records, merged=True)
    done = context.session.manifest.quantization
    errors = WeightErrors() if done is None else WeightErrors(done.method)
    for stored in context.integers.stored(reference.inner):
        (path,) = stored.parameters
        errors.take(path, stored, linear_weight(reference.inner, path).float().numpy())
    against = "PEFT's merge" if records else "the base"
    rounded = ", as it is stored" if errors.method is Method.AS_STORED else ", rounded to the grid of each block"
    if context.session.manifest.given_graph is not None:
        examination.skipped.append(_OF_ANOTHER_TOOL)
    case = weights_case(errors, context.limits, against + rounded)
    examination.cases.append(case)
    examination.where.cannot(case, _OF_WEIGHTS)


def deployed_case(examination: Examination, examined: Examined, batches: Sequence[Batch]) -> None:
    """One adapter, or the base, as the file runs: with activations that are rounded to 8-bit integers."""
    context = examination.context
    if context.integers is None or context.as_it_is is None:
        return
    reference = examined.reference
    wider = run_reference(reference, batches, precisely=True)
    with reference.rounding_activations():
        expected = run_reference(reference, batches)
        has_effect = examined.records and not examined.is_in_weights
        without = examination.without(examined, batches) if has_effect else None
    precise = wider.precise or wider.values
    expected = expected.with_precise(precise)
    found = run_export(context.deployed, batches, examined.adapter)
    described = f"PEFT{ON_IT}, activations rounded to 8 bits"
    comparison = Comparison(f"{examined.label}, as deployed", "deployed", described, expected, found, without)
    limits = tolerances(INT8, context.session.provider, context.request.tolerances, quantized=True)
    examination.judge(comparison, _AS_DEPLOYED, limits=limits)


def cost_cases(examination: Examination, *, merged: AnySession | None = None) -> None:
    """Each adapter and the base as the file runs them, against PEFT on the base's floats.

    Args:
        merged: A merged export, whose own cost is put beside that of the adapters that it holds.
    """
    context = examination.context
    records = context.session.manifest.adapters
    if context.is_merged_integers:
        _cost(examination, context.deployed, records, adapter=None, described="merged, then quantized")
        return
    for record in records:
        _cost(examination, context.deployed, (record,), adapter=record.name, described="quantized, then adapted")
    if merged is not None:
        _cost(examination, merged, merged.manifest.adapters, adapter=None, described="merged, then quantized")
    if has_own_head(context.session.manifest.adapter_inputs):
        _cost(examination, context.deployed, (), adapter=None, described="")


def _cost(
    examination: Examination, session: AnySession, records: Sequence, *, adapter: RowAdapter, described: str
) -> None:
    context = examination.context
    name = records[0].name if records else None
    batches = (context.own.get(name) or context.own[None])[:_BATCHES]
    if records:
        batches = [with_invocation(batch, records[0].invocation_tokens) for batch in batches]
    reference = context.float_reference(records)
    examined = Examined(name or "base", adapter, reference, tuple(records))
    expected = run_reference(reference, batches)
    without = examination.without(examined, batches) if records else None
    found = run_export(session, batches, adapter)
    label = " + ".join(record.name for record in records) or "base"
    label += f", {described}" if described else ""
    found_without = _found_without(session, batches, records)
    comparison = Comparison(
        label, COST, "PEFT on the base's floats", expected, found, without, found_without=found_without
    )
    examination.judge(comparison, _COST)


def _found_without(session: AnySession, batches: Sequence[Batch], records: Sequence) -> Outputs | None:
    """The export without the adapter; None where it cannot run without, or has no head without."""
    can = session.adapters and all(not record.replaced for record in records)
    return run_export(session, batches, None) if can and records else None
