"""Probes of the cases of a check: one row of a batch, alone or within it, and one step of a decoder on its cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lora_export.check.inputs.examples import Batch
from lora_export.check.judge.compare import Outputs
from lora_export.check.locate.layers import BatchRow
from lora_export.check.locate.probe import GraphRun, Probe
from lora_export.check.reference.unmerged import Reference
from lora_export.contract import DECODER, DECODER_WITH_PAST, ENCODER, CacheLayout
from lora_export.runtime.adapter_session import AdapterSession, RowAdapter
from lora_export.runtime.generate import empty_cache
from lora_export.runtime.seq2seq_session import DecoderState, Seq2SeqSession

Session = AdapterSession | Seq2SeqSession
Adapters = Sequence[RowAdapter] | RowAdapter


def worst_probes(
    session: Session,
    adapters: RowAdapter,
    reference: Reference,
    *,
    batches: Sequence[Batch],
    expected: Outputs,
    found: Outputs,
) -> Iterator[Probe]:
    """The row with the largest error: alone, then within its batch."""
    index, row = worst_row(expected, found)
    number = sum(len(batch.labels) for batch in batches[:index]) + row + 1
    described = f"row {number} of {expected.n_rows}, which has the largest error"
    return row_probes(session, adapters, reference, batch=batches[index], row=row, described=described)


def worst_row(expected: Outputs, found: Outputs) -> tuple[int, int]:
    """Batch and row of the largest difference over real positions; of the first number that is not finite."""
    largest, place = -1.0, (0, 0)
    for batch, (values, others, real) in enumerate(zip(expected.values, found.values, expected.real, strict=True)):
        for row in range(len(values)):
            error = _row_error(values[row], others[row], None if real is None else real[row])
            if error > largest:
                largest, place = error, (batch, row)
    return place


def _row_error(expected: np.ndarray, found: np.ndarray, real: np.ndarray | None) -> float:
    if expected.shape != found.shape:
        return math.inf
    difference = np.abs(expected.astype(np.float64) - found)
    if real is not None and difference.ndim == 2 and len(difference) == len(real):
        difference = difference[real]
    return math.inf if not np.isfinite(difference).all() else float(difference.max(initial=0))


def row_of(batch: Batch, row: int) -> Batch:
    """One row of a batch, its padding kept."""
    inputs = {name: array[row : row + 1] for name, array in batch.inputs.items()}
    real = None if batch.real is None else batch.real[row : row + 1]
    return Batch(inputs, real, batch.labels[row : row + 1])


def row_probes(
    session: Session, adapters: Adapters, reference: Reference, *, batch: Batch, row: int, described: str
) -> Iterator[Probe]:
    """Row `row` of `batch` alone; then within its batch, for what only shows there.

    Args:
        adapters: One for all rows.
    """
    yield whole_probe(session, adapters, reference, batch=row_of(batch, row), row=0, described=f"{described}, alone")
    yield whole_probe(
        session,
        adapters,
        reference,
        batch=batch,
        row=row,
        described=f"{described}, in its batch of {len(batch.labels)}",
    )


def whole_probe(
    session: Session, adapters: Adapters, reference: Reference, *, batch: Batch, row: int, described: str
) -> Probe:
    """Row `row` of `batch`, which runs as a whole, from an empty cache."""
    one = row_of(batch, row)
    n_rows = len(batch.labels)
    if isinstance(session, Seq2SeqSession):
        source, encoded, targets = _encoded(session, batch, adapters)
        encoder, decoder = session.sessions[ENCODER], session.sessions[DECODER]
        mask = one.inputs["attention_mask"][0] == 1 if "attention_mask" in one.inputs else None
        runs = (
            GraphRun(encoder, encoder.feeds(source, adapters), BatchRow(row, n_rows, mask)),
            GraphRun(
                decoder, decoder.feeds(encoded | {"input_ids": targets}, adapters), BatchRow(row, n_rows, _real(one))
            ),
        )
    else:
        inputs = batch.inputs | empty_cache(session, n_rows)
        runs = (
            GraphRun(
                session,
                session.feeds(inputs, adapters),
                BatchRow(row, n_rows, _real(one), tokens_first=_puts_tokens_first(session)),
            ),
        )
    return Probe(reference, one.inputs, runs, described)


def _puts_tokens_first(session: AdapterSession) -> bool:
    return session.manifest.contract.cache_layout is CacheLayout.TOKENS


def with_feeds(probe: Probe, feeds: Mapping[str, np.ndarray]) -> Probe:
    """The probe of one graph, fed otherwise."""
    (run,) = probe.runs
    return Probe(probe.reference, probe.inputs, (GraphRun(run.session, feeds, run.row),), probe.described)


def step_probe(
    session: AdapterSession,
    adapter: RowAdapter,
    reference: Reference,
    *,
    batch: Batch,
    row: int,
    step: tuple[int, int, Mapping[str, np.ndarray]],
    described: str,
) -> Probe:
    """A step of a decoder on the cache that the export made, against PyTorch on the whole sequence up to its end.

    Args:
        step: First and last position (the latter not included) in the batch, and all that the graph is fed.
    """
    start, end, inputs = step
    one = row_of(batch, row)
    real = one.real[0, :end]
    rows = BatchRow(row, len(batch.labels), real, end - start, tokens_first=_puts_tokens_first(session))
    if rows.tokens_first and start > 0 and end - start > 1:  # run row by row
        inputs = {name: array[row : row + 1] for name, array in inputs.items()}
        rows = replace(rows, index=0, n_rows=1)
    whole = {name: array[:, :end] for name, array in one.inputs.items()}
    return Probe(reference, whole, (GraphRun(session, session.feeds(inputs, adapter), rows),), described)


def seq2seq_step_probe(
    session: Seq2SeqSession,
    reference: Reference,
    batch: Batch,
    *,
    row: int,
    step: tuple[int, int, DecoderState],
    described: str,
) -> Probe:
    """As `step_probe`, of an encoder-decoder's later steps; their first is a `whole_probe`."""
    start, end, state = step
    one = row_of(batch, row)
    decoder = session.sessions[DECODER_WITH_PAST]
    targets = batch.inputs["decoder_input_ids"][:, start:end]
    feeds = decoder.feeds({**state.fixed, **state.cache, "input_ids": targets}, state.adapters)
    rows = BatchRow(row, len(batch.labels), one.real[0, :end], end - start)
    inputs = one.inputs | {"decoder_input_ids": one.inputs["decoder_input_ids"][:, :end]}
    return Probe(reference, inputs, (GraphRun(decoder, feeds, rows),), described)


def _real(one: Batch) -> np.ndarray | None:
    return None if one.real is None else one.real[0]


def _encoded(session: Seq2SeqSession, batch: Batch, adapters: Adapters):
    source, targets = session.split(batch.inputs)
    return source, session.encode(source, adapters), targets
