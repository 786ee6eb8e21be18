"""`check`: unmerged PEFT against ONNX Runtime, case by case."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_export.artifact import AdapterRecord, Kind
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.contract import AdapterInputKind
from lora_export.runtime.adapter_session import RowAdapter
from lora_export.runtime.seq2seq_session import open_export
from lora_export.verify.check_results import CheckReport, ParityCase
from lora_export.verify.compare import Outputs, compare
from lora_export.verify.decoding import decoding_cases
from lora_export.verify.environment import environment, lack_of_memory, subject
from lora_export.verify.examples import Batch, Batcher, built_in_examples
from lora_export.verify.invoked import with_invocation
from lora_export.verify.reference import Reference
from lora_export.verify.runs import Bench, CheckRequest, run_export, run_reference
from lora_export.verify.seq2seq_decoding import seq2seq_decoding_cases
from lora_export.verify.seq2seq_examples import Seq2SeqBatcher
from lora_export.verify.side_outputs import side_output_cases
from lora_export.verify.tolerances import tolerances

AnyBatcher = Batcher | Seq2SeqBatcher

_BATCH_SIZE = 8
_MIXED_ROWS = 8
# An effect that is not seen in so many batches is none.
_EFFECT_BATCHES = 8


def run_check(request: CheckRequest, progress: Callable[[str, int, int], None]) -> CheckReport:
    """Run every case that the export allows.

    Raises:
        LoraExportError: The export, its base or an adapter cannot be used; a failed gate is a result, not an error.
    """
    started = time.monotonic()
    session = open_export(request.folder, request.provider)
    manifest = session.manifest
    described = environment(session.provider, session.provider_reason, {})
    task = Task(manifest.task)
    if task in SEQ2SEQ:
        batcher = Seq2SeqBatcher(request.folder, manifest)
    else:
        batcher = Batcher(request.folder, task, manifest.contract)
    data = dict(request.data)
    if batcher.takes_text:
        data.setdefault(None, built_in_examples())
    own = {name: batcher.batches(examples, _BATCH_SIZE) for name, examples in data.items()}
    own.setdefault(None, [] if batcher.takes_text else [batcher.noise(_BATCH_SIZE)])
    mixed = batcher.batch(data[None].rows[:_MIXED_ROWS]) if batcher.takes_text else batcher.noise(_MIXED_ROWS)
    invocations = [record.invocation_tokens for record in manifest.adapters if record.invocation_tokens]
    for index, tokens in enumerate(invocations, 1):
        mixed = with_invocation(mixed, tokens, index / (len(invocations) + 1))
    gates = tolerances(manifest.dtype, session.provider, request.tolerances)
    lack = lack_of_memory(manifest, request.folder)
    skipped = [] if lack is None else [lack]
    bench = Bench(request, session, task, gates, lack is None, own, mixed)
    if manifest.kind is Kind.MERGED:
        cases = _merged_cases(bench, batcher, data, skipped, progress)
    else:
        cases = _dynamic_cases(bench, batcher, data, skipped, progress)
    inputs = [f"{name or 'default'}: {examples.description}" for name, examples in data.items()]
    return CheckReport(
        subject=subject(request.folder, manifest),
        environment=described,
        data=tuple(inputs or [batcher.noise_description]),
        cases=tuple(cases),
        gates=gates.gates,
        skipped=tuple(skipped),
        seconds=time.monotonic() - started,
    )


def _merged_cases(bench: Bench, batcher: AnyBatcher, data, skipped: list[str], progress) -> list[ParityCase]:
    records = bench.session.manifest.adapters
    names = [record.name for record in records]
    progress("checking", 0, 1)
    batches = bench.own.get(names[0] if names else None) or bench.own[None]
    n_labels = next((record.n_labels for record in records if record.n_labels), None)
    reference = bench.reference(names, n_labels)
    expected = run_reference(reference, batches, precisely=True)
    without = _without(reference, batches, records, bench) if names else None
    label = " + ".join(names) or "base"
    described = "PEFT, unmerged" if names else "the base in PyTorch"
    group = "adapter" if names else "base"
    cases = [compare(label, group, described, expected, bench.run(batches, None), bench.gates, without=without)]
    return cases + _decoding_cases(bench, label, None, reference, batcher, data)


def _decoding_cases(
    bench: Bench, label: str, adapter: RowAdapter, reference: Reference, batcher: AnyBatcher, data
) -> list[ParityCase]:
    """What only a decoder does; none for other tasks."""
    if bench.task is Task.TEXT_GENERATION:
        return decoding_cases(label, adapter, bench.session, reference, batcher, data[None], bench.gates)
    if bench.task in SEQ2SEQ:
        return seq2seq_decoding_cases(label, adapter, bench.session, reference, batcher, data.get(None), bench.gates)
    return side_output_cases(label, adapter, bench, reference)


def _dynamic_cases(bench: Bench, batcher: AnyBatcher, data, skipped: list[str], progress) -> list[ParityCase]:
    cases: list[ParityCase] = []
    alone: dict[str | None, Outputs] = {}
    records = bench.session.manifest.adapters
    inputs = bench.session.manifest.adapter_inputs
    has_own_head = all(entry.base_has_default for entry in inputs if entry.kind is AdapterInputKind.WEIGHT)
    for done, record in enumerate(records):
        progress("checking", done, len(records) + 1)
        batches = bench.own.get(record.name) or bench.own[None]
        batches = [with_invocation(batch, record.invocation_tokens) for batch in batches]
        reference = bench.reference([record.name], record.n_labels)
        expected = run_reference(reference, batches, precisely=True)
        without = _without(reference, batches, [record], bench)
        found = bench.run(batches, record.name)
        cases.append(compare(record.name, "adapter", "PEFT, unmerged", expected, found, bench.gates, without=without))
        alone[record.name] = run_reference(reference, [bench.mixed], precisely=True)
        cases += _decoding_cases(bench, record.name, record.name, reference, batcher, data)
        if not has_own_head and done == 0:
            cases.append(_body_case(bench, reference, record))
    progress("checking", len(records), len(records) + 1)
    if has_own_head:
        reference = bench.reference([], None)
        alone[None] = run_reference(reference, [bench.mixed], precisely=True)
        expected = run_reference(reference, bench.own[None], precisely=True)
        found = bench.run(bench.own[None], None)
        cases.append(compare("base", "base", "the base in PyTorch", expected, found, bench.gates))
        cases += side_output_cases("base", None, bench, reference)
    else:
        skipped.append("The base's own scores: its checkpoint has no head, so rows without an adapter score zero.")
    cases += _row_cases(bench, alone)
    cases += _sequence_cases(bench)
    if bench.request.merged is not None:
        cases.append(_merged_against_dynamic(bench))
    else:
        skipped.append("Merged against dynamic: no merged export was named (--merged).")
    return cases


def _without(reference: Reference, batches: Sequence[Batch], records: Sequence[AdapterRecord], bench: Bench) -> Outputs:
    """The reference without the adapter; with the head that it brings, so that only the pairs' effect counts."""
    brings_head = any(record.replaced for record in records)
    with reference.without_pairs() if brings_head else reference.without_adapter():
        return run_reference(reference, batches[:_EFFECT_BATCHES])


def _body_case(bench: Bench, reference: Reference, record: AdapterRecord) -> ParityCase:
    """The base's body, seen through the head of an adapter whose pairs are off, where the base has no head."""
    with reference.without_pairs():
        expected = run_reference(reference, bench.own[None], precisely=True)
    heads = {
        entry.name
        for entry in bench.session.manifest.contract.adapter_inputs
        if entry.kind in (AdapterInputKind.WEIGHT, AdapterInputKind.BIAS)
    }
    name = expected.name
    values = []
    for batch in bench.own[None]:
        stacked = bench.session.stacked(record.name, len(batch.labels))
        feeds = batch.inputs | {key: value for key, value in stacked.items() if key in heads}
        values.append(bench.session.session.run([name], feeds)[0].astype(np.float32))
    found = Outputs(name, tuple(values), expected.real, expected.labels)
    return compare("base", "base", f"PEFT with {record.name}'s head and its pairs off", expected, found, bench.gates)


def _row_cases(bench: Bench, alone: Mapping[str | None, Outputs]) -> list[ParityCase]:
    """A batch with another adapter in each row, against each row alone, in PEFT and in ONNX Runtime."""
    names = list(alone)
    n_rows = len(bench.mixed.labels)
    assigned = [names[row % len(names)] for row in range(n_rows)]
    mixed = bench.run([bench.mixed], assigned)
    expected, precise, found, single = [], [], [], []
    for row, name in enumerate(assigned):
        reference = alone[name].values[0][row : row + 1]
        one = Batch(
            {key: value[row : row + 1] for key, value in bench.mixed.inputs.items()},
            None if bench.mixed.real is None else bench.mixed.real[row : row + 1],
            (None,),
        )
        expected.append(reference)
        precise += [values[row : row + 1] for values in alone[name].precise]
        found.append(mixed.values[0][row : row + 1, ..., : reference.shape[-1]])
        single.append(bench.run([one], name).values[0])

    def rows(values: list[np.ndarray]) -> np.ndarray:
        # Heads differ in size, so rows are compared as one long list of numbers, padding left out.
        masks = [None if bench.mixed.real is None else bench.mixed.real[row : row + 1] for row in range(n_rows)]
        flat = [Outputs(mixed.name, (v,), (m,)).positions().reshape(1, -1) for v, m in zip(values, masks, strict=True)]
        return np.concatenate(flat, axis=1)

    label, described = f"{n_rows} mixed rows", "PEFT, each row's adapter"
    n_positions = n_rows if mixed.values[0].ndim < 3 or bench.mixed.real is None else int(bench.mixed.real.sum())
    wider = (rows(precise),) if precise else ()
    peft = Outputs("rows", (rows(expected),), (None,), precise=wider, n_flattened=n_positions)
    together, apart = (Outputs("rows", (rows(values),), (None,)) for values in (found, single))
    return [
        compare(label, "rows", described, peft, together, bench.gates),
        compare(f"{label} alone", "rows", "ONNX Runtime, each row alone", apart, together, bench.gates),
    ]


def _sequence_cases(bench: Bench) -> list[ParityCase]:
    """A → B → A → none in one session, against a fresh session for each."""
    names = list(bench.session.adapters)
    if not names:
        return []
    order: list[str | None] = [names[0], names[-1], names[0], None]
    label = " → ".join(name or "none" for name in order)
    values, fresh = [], []
    for name in order:
        values.append(bench.run([bench.mixed], name).values[0].reshape(1, -1))
    for name in order:
        session = open_export(bench.request.folder, bench.session.provider)
        fresh.append(run_export(session, [bench.mixed], name).values[0].reshape(1, -1))

    def joined(parts: list[np.ndarray]) -> Outputs:
        return Outputs("rows", (np.concatenate(parts, axis=1),), (None,))

    return [compare(label, "sequence", "a fresh session for each", joined(fresh), joined(values), bench.gates)]


def _merged_against_dynamic(bench: Bench) -> ParityCase:
    merged = open_export(bench.request.merged, bench.session.provider)
    names = [record.name for record in merged.manifest.adapters]
    blend = dict.fromkeys(names, 1.0)
    batches = bench.own.get(names[0] if names else None) or bench.own[None]
    expected, found = run_export(merged, batches, None), bench.run(batches, blend or None)
    label = f"merged {' + '.join(names) or 'base'}"
    return compare(label, "merged-dynamic", f"the merged export {bench.request.merged}", expected, found, bench.gates)
