"""Parity of an encoder-decoder as it is used: padding on the left, a cache filled step by step, greedy targets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lora_export.check.cases.decoding import (
    GREEDY_TOKENS,
    Step,
    add_greedy_case,
    decoding_comparison,
    greedy_case,
    judge_cached_steps,
)
from lora_export.check.cases.examination import Examination, Examined
from lora_export.check.context import run_reference
from lora_export.check.inputs.examples import Batch, Examples
from lora_export.check.inputs.ragged import ragged
from lora_export.check.inputs.seq2seq_examples import Seq2SeqBatcher
from lora_export.check.judge.formulas import noise_of
from lora_export.check.locate.probe import Probe
from lora_export.check.locate.probes import seq2seq_step_probe, whole_probe
from lora_export.check.reference.unmerged import Reference
from lora_export.runtime.adapter_session import RowAdapter
from lora_export.runtime.seq2seq_session import Seq2SeqSession

_ROWS = 4


def seq2seq_decoding_cases(
    examination: Examination, examined: Examined, batcher: Seq2SeqBatcher, *, examples: Examples | None
) -> None:
    """Left padding (text), cached steps (a chunk, then single tokens) and greedy agreement of one adapter.

    Args:
        examples: The texts; None to decode noise.
    """
    session, adapter, reference = examination.session, examined.adapter, examined.reference
    limits = examination.context.limits
    text = None if examples is None else examples.rows[-_ROWS:]
    batch = batcher.noise(_ROWS) if text is None else batcher.batch(text, padding_side="left")
    if text is not None:
        batch = replace(batch, inputs=ragged(batch.inputs))
    expected = run_reference(reference, [batch], precisely=True)
    if text is not None:
        whole = session.run(batch.inputs, adapter)["logits"]
        padded = decoding_comparison(f"{examined.label}: padded on the left", expected, whole, batch=batch)
        examination.judge_rows(padded, examined, [batch])
    cached = judge_cached_steps(
        examination, examined, batch,
        expected=expected,
        steps=lambda: _steps(session, batch, adapter),
        probe=lambda row, step: _probe(session, examined, batch, row=row, step=step),
    )  # fmt: skip
    sources = {name: array for name, array in batch.inputs.items() if name != "decoder_input_ids"}
    # What the graph alone says: the reference is one pass of the model, without the configuration's rules.
    alone = {"start_ids": (batcher.start_id,), "eos_ids": frozenset(), "suppress": False}
    generated = session.generate(sources, adapter, max_new_tokens=GREEDY_TOKENS, **alone)
    rows = zip(_rows(sources), generated, strict=True)
    behind = [_behind(reference, source, batcher.start_id, targets=targets) for source, targets in rows]
    noise = noise_of(cached.rounding, expected.positions(), limits)
    add_greedy_case(examination, greedy_case(examined.label, behind, noise, limits=limits))


def _behind(reference: Reference, source: dict[str, np.ndarray], start: int, *, targets: list[int]) -> np.ndarray:
    """How far each target's logit is below the reference's best, `[targets]`, in one forward pass."""
    inputs = source | {"decoder_input_ids": np.array([[start, *targets[:-1]]], np.int64)}
    logits = reference.run(inputs)["logits"][0]
    return logits.max(axis=-1) - logits[np.arange(len(targets)), targets]


def _steps(session: Seq2SeqSession, batch: Batch, adapter: RowAdapter) -> Iterator[Step]:
    """Half of the targets at once, then two, then one by one, on a growing cache.

    Yields:
        First and last position of a step, the state that it starts from (None for the first), and its logits.
    """
    targets = batch.inputs["decoder_input_ids"]
    length = targets.shape[1]
    middle = max(1, length // 2)
    cuts = sorted({0, middle, min(middle + 2, length), *range(min(middle + 2, length), length + 1)})
    logits, state = session.begin(batch.inputs | {"decoder_input_ids": targets[:, :middle]}, adapter)
    yield 0, middle, None, logits
    for start, end in itertools.pairwise(cuts[1:]):
        logits, following = session.advance(state, targets[:, start:end])
        yield start, end, state, logits
        state = following


def _probe(session: Seq2SeqSession, examined: Examined, batch: Batch, *, row: int, step: Step) -> Probe:
    """A row's step, on the cache that the export made up to there; the first step is a pass of its own."""
    start, end, state, _ = step
    described = f"row {row + 1} of {len(batch.real)}, targets {start} to {end - 1} on a cache of {start}"
    if state is not None:
        return seq2seq_step_probe(
            session, examined.reference, batch, row=row, step=(start, end, state), described=described
        )
    targets = {"decoder_input_ids": batch.inputs["decoder_input_ids"][:, :end]}
    begun = replace(batch, inputs=batch.inputs | targets, real=batch.real[:, :end])
    return whole_probe(session, examined.adapter, examined.reference, batch=begun, row=row, described=described)


def _rows(sources: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each source alone, its padding kept: BART counts positions from the padding's start."""
    n_rows = len(next(iter(sources.values())))
    return [{name: array[row : row + 1] for name, array in sources.items()} for row in range(n_rows)]
