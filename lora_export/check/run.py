"""`check`: unmerged PEFT against ONNX Runtime, case by case."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_export.artifact import AdapterRecord, ExportKind
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.check.cases.decoding import decoding_cases
from lora_export.check.cases.mixed_rows import merged_against_dynamic, row_cases, sequence_cases
from lora_export.check.cases.seq2seq import seq2seq_decoding_cases
from lora_export.check.cases.side_outputs import side_output_cases
from lora_export.check.context import Bench, CheckRequest, run_reference
from lora_export.check.inputs.examples import Batch, Batcher, built_in_examples
from lora_export.check.inputs.invoked import with_invocation
from lora_export.check.inputs.seq2seq_examples import Seq2SeqBatcher
from lora_export.check.judge.compare import Outputs, compare
from lora_export.check.judge.tolerances import tolerances
from lora_export.check.locate.probes import with_feeds, worst_probes
from lora_export.check.locate.where import Where
from lora_export.check.reference.unmerged import Reference
from lora_export.check.results import CheckReport, ParityCase
from lora_export.contract import AdapterInputKind
from lora_export.environment import environment, lack_of_memory, subject
from lora_export.errors import UsageProblem
from lora_export.runtime.adapter_session import RowAdapter
from lora_export.runtime.seq2seq_session import open_export

AnyBatcher = Batcher | Seq2SeqBatcher

_BATCH_SIZE = 8
_MIXED_ROWS = 8
# An effect that is not seen in so many batches is none.
_EFFECT_BATCHES = 8


def run_check(
    request: CheckRequest, progress: Callable[[str, int, int], None]
) -> tuple[CheckReport, Mapping[str, bytes]]:
    """Run every case that the export allows; the report, and the files that reproduce what failed by name.

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
    where = Where(bench.gates, request.folder)
    if manifest.kind is ExportKind.MERGED and request.merged is not None:
        raise UsageProblem(
            "--merged compares a merged export with a dynamic one, and this one is merged",
            where=str(request.folder),
            next_step="name the dynamic export first: lora-export check DYNAMIC --merged MERGED",
        )
    if manifest.kind is ExportKind.MERGED:
        cases = _merged_cases(bench, batcher, data, skipped, where, progress)
    else:
        cases = _dynamic_cases(bench, batcher, data, skipped, where, progress)
    inputs = [f"{name or 'default'}: {examples.description}" for name, examples in data.items()]
    report = CheckReport(
        subject=subject(request.folder, manifest),
        environment=described,
        data=tuple(inputs or [batcher.noise_description]),
        cases=tuple(cases),
        gates=gates.gates,
        skipped=tuple(skipped),
        seconds=time.monotonic() - started,
        layers=tuple(where.layers),
        divergence=where.divergence,
    )
    return report, where.files


def _merged_cases(
    bench: Bench, batcher: AnyBatcher, data, skipped: list[str], where: Where, progress
) -> list[ParityCase]:
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
    found = bench.run(batches, None)
    case = compare(label, group, described, expected, found, bench.gates, without=without)
    where.measure(label, case, worst_probes(bench.session, None, reference, batches, expected, found))
    return [case, *_decoding_cases(bench, label, None, reference, batcher, data, where)]


def _decoding_cases(
    bench: Bench, label: str, adapter: RowAdapter, reference: Reference, batcher: AnyBatcher, data, where: Where
) -> list[ParityCase]:
    """What only a decoder does; none for other tasks."""
    if bench.task is Task.TEXT_GENERATION:
        return decoding_cases(label, adapter, bench.session, reference, batcher, data[None], bench.gates, where)
    if bench.task in SEQ2SEQ:
        examples = data.get(None)
        return seq2seq_decoding_cases(label, adapter, bench.session, reference, batcher, examples, bench.gates, where)
    return side_output_cases(label, adapter, bench, reference, where)


def _dynamic_cases(
    bench: Bench, batcher: AnyBatcher, data, skipped: list[str], where: Where, progress
) -> list[ParityCase]:
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
        probes = worst_probes(bench.session, record.name, reference, batches, expected, found)
        where.measure(record.name, cases[-1], probes)
        alone[record.name] = run_reference(reference, [bench.mixed], precisely=True)
        cases += _decoding_cases(bench, record.name, record.name, reference, batcher, data, where)
        if not has_own_head and done == 0:
            cases.append(_body_case(bench, reference, record, where))
    progress("checking", len(records), len(records) + 1)
    if has_own_head:
        reference = bench.reference([], None)
        alone[None] = run_reference(reference, [bench.mixed], precisely=True)
        expected = run_reference(reference, bench.own[None], precisely=True)
        found = bench.run(bench.own[None], None)
        cases.append(compare("base", "base", "the base in PyTorch", expected, found, bench.gates))
        probes = worst_probes(bench.session, None, reference, bench.own[None], expected, found)
        where.measure("base", cases[-1], probes)
        cases += side_output_cases("base", None, bench, reference, where)
    else:
        skipped.append("The base's own scores: its checkpoint has no head, so rows without an adapter score zero.")
    cases += row_cases(bench, alone, where)
    cases += sequence_cases(bench, where)
    if bench.request.merged is not None:
        cases.append(merged_against_dynamic(bench, where))
    else:
        skipped.append("Merged against dynamic: no merged export was named (--merged).")
    return cases


def _without(reference: Reference, batches: Sequence[Batch], records: Sequence[AdapterRecord], bench: Bench) -> Outputs:
    """The reference without the adapter; with the head that it brings, so that only the pairs' effect counts."""
    brings_head = any(record.replaced for record in records)
    with reference.without_pairs() if brings_head else reference.without_adapter():
        return run_reference(reference, batches[:_EFFECT_BATCHES])


def _body_case(bench: Bench, reference: Reference, record: AdapterRecord, where: Where) -> ParityCase:
    """The base's body, seen through the head of an adapter whose pairs are off, where the base has no head."""
    with reference.without_pairs():
        expected = run_reference(reference, bench.own[None], precisely=True)
    heads = {
        entry.name
        for entry in bench.session.manifest.contract.adapter_inputs
        if entry.kind in (AdapterInputKind.WEIGHT, AdapterInputKind.BIAS) and entry.name in record.replaced
    }
    name = expected.name

    def feeds(batch: Batch) -> dict[str, np.ndarray]:
        stacked = bench.session.stacked(record.name, len(batch.labels))
        return batch.inputs | {key: value for key, value in stacked.items() if key in heads}

    values = [bench.session.session.run([name], feeds(batch))[0].astype(np.float32) for batch in bench.own[None]]
    found = Outputs(name, tuple(values), expected.real, expected.labels)
    described = f"PEFT with {record.name}'s head and its pairs off"
    case = compare("base", "base", described, expected, found, bench.gates)
    probes = worst_probes(bench.session, record.name, reference, bench.own[None], expected, found)
    with reference.without_pairs():
        probe = next(probes)
        only_head = {key: array for key, array in probe.runs[0].feeds.items() if key in heads | probe.inputs.keys()}
        where.measure("base", case, [with_feeds(probe, only_head)])
    return case
