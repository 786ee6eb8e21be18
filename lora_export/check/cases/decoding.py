"""Parity of a decoder as it is used: padding on the left, a cache filled step by step, greedy generation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_export.check.cases.examination import Examination, Examined
from lora_export.check.context import run_reference
from lora_export.check.inputs.batcher import Batcher
from lora_export.check.inputs.examples import Batch, Examples
from lora_export.check.inputs.invoked import with_invocation
from lora_export.check.inputs.ragged import ragged
from lora_export.check.judge.compare import Comparison, Outputs
from lora_export.check.judge.formulas import noise_of
from lora_export.check.judge.measures import output_scale
from lora_export.check.judge.tolerances import Tolerances
from lora_export.check.locate.probe import Probe
from lora_export.check.locate.probes import step_probe
from lora_export.check.reference.unmerged import Reference
from lora_export.check.results import Measured, ParityCase
from lora_export.contract import GATE_INPUT, present_of
from lora_export.runtime.adapter_session import AdapterSession, RowAdapter
from lora_export.runtime.generate import empty_cache, generate

_ROWS = 4
GREEDY_TOKENS = 32
_PROMPT_TOKENS = 12
# First and last position of a step, what it starts from, and its logits `[batch, new, n]`.
Step = tuple[int, int, object, np.ndarray]
_NO_CACHE = "Steps on a cache, and generation: the given graph has none."
_NO_GREEDY = (
    "The cached steps of given tokens agree with PyTorch, so the tokens that a generation chooses are looked into no "
    "further: their inputs are its own."
)


def decoding_cases(examination: Examination, examined: Examined, batcher: Batcher, *, examples: Examples) -> None:
    """Left padding, cached steps (a chunk, then single tokens) and greedy agreement of one adapter."""
    session, adapter, reference = examination.session, examined.adapter, examined.reference
    if not session.contract.past:
        examination.skipped.append(_NO_CACHE)
        return
    limits = examination.context.limits
    invocation = session.manifest.adapter(adapter).invocation_tokens if isinstance(adapter, str) else None
    batch = with_invocation(_ragged(batcher.batch(examples.rows[-_ROWS:], padding_side="left")), invocation)
    expected = run_reference(reference, [batch], precisely=True)
    whole = session.run(batch.inputs | empty_cache(session, len(batch.labels)), adapter)["logits"]
    padded = decoding_comparison(f"{examined.label}: padded on the left", expected, whole, batch=batch)
    examination.judge_rows(padded, examined, [batch])
    cached = judge_cached_steps(
        examination, examined, batch,
        expected=expected,
        steps=lambda: _steps(session, batch, adapter),
        probe=lambda row, step: _probe(session, examined, batch, row=row, step=step),
    )  # fmt: skip
    prompts = [
        ids[real][: _PROMPT_TOKENS * (row + 1) // _ROWS].tolist() + list(invocation or ())
        for row, (ids, real) in enumerate(zip(batch.inputs["input_ids"], batch.real, strict=True))
    ]
    found = generate(session, prompts, adapter, max_new_tokens=GREEDY_TOKENS)
    behind = [_behind(reference, *pair) for pair in zip(prompts, found, strict=True)]
    noise = noise_of(cached.rounding, expected.positions(), limits)
    add_greedy_case(examination, greedy_case(examined.label, behind, noise, limits=limits))


def decoding_comparison(name: str, expected: Outputs, logits: np.ndarray, *, batch: Batch) -> Comparison:
    """The logits of one batch, however the export was run for them, against one pass of PEFT without a cache."""
    found = Outputs("logits", (logits.astype(np.float32),), (batch.real,))
    return Comparison(name, "decoding", "PEFT, unmerged, without a cache", expected, found)


def add_greedy_case(examination: Examination, case: ParityCase) -> None:
    """Add a case that was judged by its tokens; it is not looked into."""
    examination.cases.append(case)
    examination.where.cannot(case, _NO_GREEDY)


def _ragged(batch: Batch) -> Batch:
    inputs = ragged(batch.inputs)
    return replace(batch, inputs=inputs, real=inputs["attention_mask"].astype(bool))


def _steps(session: AdapterSession, batch: Batch, adapter: RowAdapter) -> Iterator[Step]:
    """Half of `batch` as a prefill, then two tokens, then one by one, on a growing cache.

    Yields:
        First and last position of a step, what the graph is given, and its logits.
    """
    length = batch.inputs["input_ids"].shape[1]
    middle = length // 2
    cuts = [0, middle, min(middle + 2, length), *range(min(middle + 2, length) + 1, length + 1)]
    cache = empty_cache(session, len(batch.labels))
    gate = session.gate(batch.inputs["input_ids"], adapter)
    by_token = batch.inputs if gate is None else batch.inputs | {GATE_INPUT: gate}
    for start, end in itertools.pairwise(cuts):
        if start == end:
            continue
        inputs = {name: array[:, start:end] for name, array in by_token.items()}
        inputs["attention_mask"] = batch.inputs["attention_mask"][:, :end]
        results = session.run(inputs | cache, adapter)
        yield start, end, inputs | cache, results["logits"].astype(np.float32)
        cache = {name: results[present_of(name)] for name in cache}


def _probe(session: AdapterSession, examined: Examined, batch: Batch, *, row: int, step: Step) -> Probe:
    """A row's step, on the cache that the export made up to there."""
    start, end, inputs, _ = step
    described = f"row {row + 1} of {len(batch.real)}, positions {start} to {end - 1} on a cache of {start}"
    return step_probe(
        session,
        examined.adapter,
        examined.reference,
        batch=batch,
        row=row,
        step=(start, end, inputs),
        described=described,
    )


def judge_cached_steps(
    examination: Examination,
    examined: Examined,
    batch: Batch,
    *,
    expected: Outputs,
    steps: Callable[[], Iterator[Step]],
    probe: Callable[[int, Step], Probe],
) -> ParityCase:
    """Judge the logits of `steps`; they are taken again up to the first that fails, to look into it.

    Args:
        probe: How to look into a row's step.
    """
    stepped = np.concatenate([logits for *_, logits in steps()], axis=1)

    def probes() -> Iterator[Probe]:
        row, position = first_failing(expected.values[0], stepped, batch.real, limits=examination.context.limits)
        yield probe(row, next(step for step in steps() if step[1] > position))

    comparison = decoding_comparison(f"{examined.label}: cached steps", expected, stepped, batch=batch)
    return examination.judge(comparison, probes)


def first_failing(expected: np.ndarray, found: np.ndarray, real: np.ndarray, *, limits: Tolerances) -> tuple[int, int]:
    """Row and position of the first logits, `[batch, position, n]`, that differ by more than rounding; of the largest
    difference, if none does."""
    difference = np.abs(expected.astype(np.float64) - found).max(axis=-1)
    error = np.where(real, np.where(np.isfinite(difference), difference, np.inf), 0.0)
    limit = limits.features if limits.error is None else limits.error
    fails = error > limit * output_scale(expected[real])
    position = int(fails.any(axis=0).argmax()) if fails.any() else int(error.max(axis=0).argmax())
    return int(error[:, position].argmax()), position


def greedy_case(label: str, behind: Sequence[np.ndarray], noise: float | None, *, limits: Tolerances) -> ParityCase:
    """Greedy tokens of rows in one padded batch with a cache: each must be PyTorch's best after those before it.

    A token within twice the `noise` of PyTorch's best is a tie and agrees; what follows it is judged after it, so one
    tie does not make the rest of a row wrong.

    Args:
        behind: How far each token's logit is below the best in PyTorch, `[tokens]` for each row.
        noise: What rounding may move a logit by; None where nothing tells: then ties count as flips, without a limit.
    """
    agreement = float((np.concatenate(behind) <= 2 * (noise or 0)).mean())
    measured = Measured.of("top1", agreement, None if noise is None else limits.top1)
    failures = ()
    if measured.failed:
        failures = (f"{agreement:.1%} of {GREEDY_TOKENS} greedy tokens agree; {limits.top1:.1%} are expected",)
    return ParityCase(
        name=f"{label}: {GREEDY_TOKENS} greedy tokens",
        group="decoding",
        reference="PEFT, unmerged, each prompt alone, without a cache",
        n_rows=len(behind),
        measures=(measured,),
        failures=failures,
    )


def _behind(reference: Reference, prompt: list[int], continuation: list[int]) -> np.ndarray:
    """How far each token's logit is below the reference's best, `[tokens]`, in one forward pass without padding."""
    tokens = np.array([prompt + continuation], np.int64)
    logits = reference.run({"input_ids": tokens}, n_generated=len(continuation))["logits"][0, len(prompt) - 1 : -1]
    return logits.max(axis=-1) - logits[np.arange(len(continuation)), continuation]
