"""`check`: unmerged PEFT against ONNX Runtime, case by case."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_export.artifact import AdapterRecord, ExportKind, Manifest, read_manifest
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.check.cases.decoding import decoding_cases
from lora_export.check.cases.examination import ON_IT, Examination, Examined
from lora_export.check.cases.mixed_rows import (
    merged_against_dynamic,
    own_rows,
    require_same_adapters,
    row_cases,
    sequence_case,
)
from lora_export.check.cases.quantized import cost_cases, deployed_case, weight_cases
from lora_export.check.cases.seq2seq import seq2seq_decoding_cases
from lora_export.check.cases.side_outputs import side_output_cases
from lora_export.check.context import (
    CheckContext,
    CheckRequest,
    integer_base,
    main_of,
    main_outputs,
    read_in_floats,
    rounds,
    run_as_hosts_do,
    run_reference,
    with_float_activations,
)
from lora_export.check.inputs.examples import Batch, Examples
from lora_export.check.inputs.invoked import with_invocation
from lora_export.check.inputs.prepared import AnyBatcher, prepare
from lora_export.check.judge.compare import Comparison, Outputs
from lora_export.check.judge.tolerances import INT8, Limit, tolerances
from lora_export.check.judge.weights import limits_of_integers
from lora_export.check.locate.probe import Probe
from lora_export.check.locate.probes import with_feeds, worst_probes
from lora_export.check.locate.where import Where
from lora_export.check.results import CheckReport
from lora_export.check.turns import Turns, in_turn
from lora_export.contract import AdapterInputKind, has_own_head
from lora_export.environment import environment, lack_of_memory, memory_of_references, subject
from lora_export.errors import UsageProblem
from lora_export.progress import Progress
from lora_export.runtime.arrays import run_arrays
from lora_export.runtime.seq2seq_session import open_export
from lora_export.verdict import Environment

_MIXED_ROWS = 8


@dataclass(frozen=True)
class Check:
    """A check in progress.

    Attributes:
        data: Examples by adapter name; the key None serves all others.
        started: When, by `time.monotonic`.
        n_bytes: What session and references need.
    """

    examination: Examination
    batcher: AnyBatcher
    data: Mapping[str | None, Examples]
    environment: Environment
    started: float
    n_bytes: int

    @property
    def reproduction(self) -> Mapping[str, bytes]:
        """The files that reproduce what failed, by name."""
        return self.examination.where.files

    @property
    def described(self) -> tuple[str, ...]:
        """What will be compared, a sentence each."""
        context = self.examination.context
        names = [record.name for record in context.session.manifest.adapters]
        inputs = [f"on {examples.description}" + (f" ({name})" if name else "") for name, examples in self.data.items()]
        on = "" if context.integers is None else ON_IT
        wider = "and a wider dtype " if context.with_precise else ""
        positions = sum(_n_positions(batch) for batches in context.own.values() for batch in batches)
        return (
            f"compares {', '.join(names) or 'the base'} with unmerged PEFT{on} at {context.session.manifest.dtype} "
            f"{wider}on {context.session.provider}",
            *(inputs or [f"on {self.batcher.noise_description}"]),
            f"{positions} positions; about {self.n_bytes / 1e9:.1f} GB beside the libraries",
            *self.examination.skipped,
        )

    def report(self, stopped: str | None = None) -> CheckReport:
        """What was found; `stopped` says what ended the check before its last case."""
        found, context = self.examination, self.examination.context
        inputs = [f"{name or 'default'}: {examples.description}" for name, examples in self.data.items()]
        return CheckReport(
            subject=subject(context.request.folder, context.session.manifest),
            environment=self.environment,
            data=tuple(inputs or [self.batcher.noise_description]),
            cases=tuple(found.cases),
            limits=(*context.limits.recorded, *_limits_as_deployed(context)),
            skipped=tuple(found.skipped),
            seconds=time.monotonic() - self.started,
            layers=tuple(found.where.layers),
            divergence=found.where.divergence,
            stopped=stopped,
        )


def _limits_as_deployed(context: CheckContext) -> list[Limit]:
    if context.as_it_is is None:
        return []
    recorded = tolerances(INT8, context.session.provider).recorded
    return [replace(each, reason=f"as deployed: {each.reason}") for each in recorded if each.limit is not None]


def _n_positions(batch: Batch) -> int:
    return len(batch.labels) if batch.real is None else int(batch.real.sum())


def begin_check(request: CheckRequest) -> Check:
    """Open the export and read its inputs; nothing is compared yet.

    Raises:
        LoraExportError: The export cannot be used, or not as asked.
    """
    started = time.monotonic()
    session = open_export(request.folder, request.provider)
    manifest = session.manifest
    session = in_turn(session, turns := Turns.of(session))
    if manifest.kind is ExportKind.MERGED and request.merged is not None:
        raise UsageProblem(
            "--merged compares a merged export with a dynamic one, and this one is merged",
            where=str(request.folder),
            next_step="name the dynamic export first: lora-export check DYNAMIC --merged MERGED",
        )
    if request.merged is not None:
        require_same_adapters(manifest, read_manifest(request.merged), request.merged)
    prepared = prepare(request.folder, manifest, request.data, keep_rows=request.keep_rows)
    integers = integer_base(session)
    limits = tolerances(manifest.dtype, session.provider, request.tolerances, quantized=integers is not None)
    if manifest.quantization is not None:
        limits = limits_of_integers(limits, manifest.quantization.method, request.tolerances)
    lack = lack_of_memory(manifest, request.folder)
    mixed = _mixed_batch(prepared.batcher, prepared.data, manifest)
    exact = with_float_activations(session, turns) if rounds(session) else session
    context = CheckContext(
        request, exact, Task(manifest.task), limits, lack is None, prepared.batches, mixed,
        as_it_is=session if exact is not session else None, integers=integers, turns=turns,
    )  # fmt: skip
    where = Where(limits, request.folder)
    unknown = [
        f"Whether {record.name!r} was trained on this base: it records {record.other_base}, and the export was made "
        f"from {manifest.base.given}. Their shapes fit."
        for record in manifest.adapters
        if record.other_base is not None
    ]
    unknown += read_in_floats(request.base)
    examination = Examination(context, where, skipped=unknown if lack is None else [*unknown, lack])
    n_bytes = memory_of_references(manifest, request.folder, precisely=lack is None)
    seen = environment(session.provider, session.provider_reason, {})
    return Check(examination, prepared.batcher, prepared.data, seen, started, n_bytes)


def _mixed_batch(batcher: AnyBatcher, data: Mapping[str | None, Examples], manifest: Manifest) -> Batch:
    """A batch whose rows get another adapter each; every activated one is invoked at another place in it."""
    mixed = batcher.batch(data[None].rows[:_MIXED_ROWS]) if batcher.takes_text else batcher.noise(_MIXED_ROWS)
    invocations = [record.invocation_tokens for record in manifest.adapters if record.invocation_tokens]
    for index, tokens in enumerate(invocations, 1):
        mixed = with_invocation(mixed, tokens, index / (len(invocations) + 1))
    return mixed


def run_cases(check: Check, progress: Progress) -> None:
    """Run every case that the export allows; what was found is in `check` as soon as each is done.

    Raises:
        LoraExportError: The base or an adapter cannot be used; a failed case is a result, not an error.
    """
    run = _merged_cases if check.examination.session.manifest.kind is ExportKind.MERGED else _dynamic_cases
    with run_as_hosts_do(check.examination.session.manifest):
        run(check, progress)


def _merged_cases(check: Check, progress: Progress) -> None:
    context = check.examination.context
    records = context.session.manifest.adapters
    names = [record.name for record in records]
    progress("checking", 0, 1)
    n_labels = next((record.n_labels for record in records if record.n_labels), None)
    is_in_weights = context.is_merged_integers and bool(names)
    reference = context.reference(names, n_labels)
    examined = Examined(" + ".join(names) or "base", None, reference, records, is_in_weights)
    batches = context.own.get(names[0] if names else None) or context.own[None]
    check.examination.judge_alone(examined, batches)
    _further_cases(check, examined)
    if context.integers is not None:
        deployed_case(check.examination, examined, batches)
        weight_cases(check.examination)
        cost_cases(check.examination)


def _further_cases(check: Check, examined: Examined) -> None:
    """What only a decoder does; of other tasks, what the graph gives beside its main output."""
    task = check.examination.context.task
    if task is Task.TEXT_GENERATION:
        decoding_cases(check.examination, examined, check.batcher, examples=check.data[None])
    elif task in SEQ2SEQ:
        seq2seq_decoding_cases(check.examination, examined, check.batcher, examples=check.data.get(None))
    else:
        side_output_cases(check.examination, examined)


def _dynamic_cases(check: Check, progress: Progress) -> None:
    examination, context = check.examination, check.examination.context
    alone: dict[int, Outputs] = {}
    records = context.session.manifest.adapters
    base_answers = has_own_head(context.session.manifest.adapter_inputs)
    for done, record in enumerate(records):
        progress(f"checking {record.name}", done, len(records) + 1)
        alone |= _adapter_cases(check, record, with_body=not base_answers and done == 0)
    progress("checking the base and mixed rows", len(records), len(records) + 1)
    if base_answers:
        base = Examined("base", None, context.reference([], None))
        alone |= _judged_alone(examination, base, context.own[None])
        deployed_case(examination, base, context.own[None])
        side_output_cases(examination, base)
    else:
        examination.skipped.append(
            'The base\'s own scores: its checkpoint has no head, so rows without an adapter score zero. The row "base" '
            "is its body, seen through the head of the first adapter."
        )
    row_cases(examination, alone)
    sequence_case(examination)
    if context.integers is not None:
        weight_cases(examination)
        merged = context.request.merged
        cost_cases(examination, merged=merged and context.open(merged))
    elif context.request.merged is not None:
        merged_against_dynamic(examination)
    else:
        examination.skipped.append("Merged against dynamic: no merged export was named (--merged).")


def _adapter_cases(check: Check, record: AdapterRecord, *, with_body: bool) -> dict[int, Outputs]:
    """One adapter's own cases; its rows of the mixed batch, by its reference, which is gone afterwards."""
    examination, context = check.examination, check.examination.context
    examined = Examined(record.name, record.name, context.reference([record.name], record.n_labels), (record,))
    batches = context.own.get(record.name) or context.own[None]
    batches = [with_invocation(batch, record.invocation_tokens) for batch in batches]
    alone = _judged_alone(examination, examined, batches)
    deployed_case(examination, examined, batches)
    _further_cases(check, examined)
    if with_body:
        _body_case(examination, examined, record)
    return alone


def _judged_alone(examination: Examination, examined: Examined, batches: Sequence[Batch]) -> dict[int, Outputs]:
    """Judge one alone; its rows of the mixed batch, which is the first of `batches` or run for them."""
    expected = examination.judge_alone(examined, batches)
    context, first = examination.context, batches[0].inputs
    mixed = context.mixed.inputs
    is_first = first.keys() == mixed.keys() and all(np.array_equal(first[key], mixed[key]) for key in first)
    whole = expected.first() if is_first else run_reference(examined.reference, [context.mixed], precisely=True)
    return own_rows(context, examined.adapter, whole)


def _body_case(examination: Examination, examined: Examined, record: AdapterRecord) -> None:
    """The base's body, seen through the head of an adapter whose pairs are off, where the base has no head."""
    context, reference = examination.context, examined.reference
    batches, session = context.own[None], context.session
    kinds = (AdapterInputKind.WEIGHT, AdapterInputKind.BIAS)
    inputs = session.manifest.contract.adapter_inputs
    heads = {entry.name for entry in inputs if entry.kind in kinds and entry.name in record.replaced}
    others = session.stacked(None, 1)  # none, but where a graph wants all of its inputs

    def feeds(batch: Batch) -> dict[str, np.ndarray]:
        stacked = session.stacked(record.name, len(batch.labels))
        return others | batch.inputs | {key: value for key, value in stacked.items() if key in heads}

    def probes() -> list[Probe]:
        probe = next(worst_probes(session, record.name, reference, batches=batches, expected=expected, found=found))
        only_head = {key: array for key, array in probe.runs[0].feeds.items() if key in heads | probe.inputs.keys()}
        return [with_feeds(probe, others | only_head)]

    with reference.without_pairs():
        expected = run_reference(reference, batches, precisely=True)
        names = main_outputs(spec.name for spec in session.manifest.contract.outputs)
        runs = [run_arrays(session.session, session.provider, feeds(batch), names=names) for batch in batches]
        values = [main_of(run, names).astype(np.float32) for run in runs]
        found = Outputs(expected.name, tuple(values), expected.real, expected.labels)
        described = f"PEFT with {record.name}'s head and its pairs off"
        examination.judge(Comparison("base", "base", described, expected, found), probes, layers_of="base")
