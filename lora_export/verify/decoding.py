"""Parity of a decoder as it is used: padding on the left, a cache filled step by step, greedy generation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_export.contract import GATE_INPUT
from lora_export.runtime.adapter_session import AdapterSession, RowAdapter
from lora_export.runtime.generate import empty_cache, generate
from lora_export.verify.check_results import ParityCase
from lora_export.verify.compare import Outputs, compare, noise_of
from lora_export.verify.examples import Batch, Batcher, Examples
from lora_export.verify.invoked import with_invocation
from lora_export.verify.ragged import ragged
from lora_export.verify.reference import Reference
from lora_export.verify.runs import run_reference
from lora_export.verify.tolerances import Tolerances

_ROWS = 4
GREEDY_TOKENS = 32
_PROMPT_TOKENS = 12


def decoding_cases(
    label: str,
    adapter: RowAdapter,
    session: AdapterSession,
    reference: Reference,
    batcher: Batcher,
    examples: Examples,
    gates: Tolerances,
) -> list[ParityCase]:
    """Left padding, cached steps (a chunk, then single tokens) and greedy agreement of one adapter."""
    invocation = session.manifest.adapter(adapter).invocation_tokens if isinstance(adapter, str) else None
    batch = with_invocation(_ragged(batcher.batch(examples.rows[-_ROWS:], padding_side="left")), invocation)
    expected = run_reference(reference, [batch], precisely=True)
    whole = session.run(batch.inputs | empty_cache(session, _ROWS), adapter)["logits"].astype(np.float32)
    stepped = _in_steps(session, batch, adapter)
    described = "PEFT, unmerged, without a cache"

    def case(suffix: str, values: np.ndarray) -> ParityCase:
        found = Outputs("logits", (values,), (batch.real,))
        return compare(f"{label}: {suffix}", "decoding", described, expected, found, gates)

    cached = case("cached steps", stepped)
    prompts = [
        ids[real][: _PROMPT_TOKENS * (row + 1) // _ROWS].tolist() + list(invocation or ())
        for row, (ids, real) in enumerate(zip(batch.inputs["input_ids"], batch.real, strict=True))
    ]
    found = generate(session, prompts, adapter, max_new_tokens=GREEDY_TOKENS)
    behind = [_behind(reference, *pair) for pair in zip(prompts, found, strict=True)]
    return [
        case("padded on the left", whole),
        cached,
        greedy_case(label, behind, noise_of(cached, expected.positions(), gates), gates),
    ]


def _ragged(batch: Batch) -> Batch:
    inputs = ragged(batch.inputs)
    return replace(batch, inputs=inputs, real=inputs["attention_mask"].astype(bool))


def _in_steps(session: AdapterSession, batch: Batch, adapter: RowAdapter) -> np.ndarray:
    """The logits of `batch` from half of it as a prefill, then two tokens, then one by one, on a growing cache."""
    length = batch.inputs["input_ids"].shape[1]
    middle = length // 2
    cuts = [0, middle, min(middle + 2, length), *range(min(middle + 2, length) + 1, length + 1)]
    cache = empty_cache(session, len(batch.labels))
    gate = session.gate(batch.inputs["input_ids"], adapter)
    by_token = batch.inputs if gate is None else batch.inputs | {GATE_INPUT: gate}
    found = []
    for start, end in itertools.pairwise(cuts):
        if start == end:
            continue
        inputs = {name: array[:, start:end] for name, array in by_token.items()}
        inputs["attention_mask"] = batch.inputs["attention_mask"][:, :end]
        results = session.run(inputs | cache, adapter)
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
        found.append(results["logits"].astype(np.float32))
    return np.concatenate(found, axis=1)


def greedy_case(label: str, behind: Sequence[np.ndarray], noise: float | None, gates: Tolerances) -> ParityCase:
    """Greedy tokens of rows in one padded batch with a cache: each must be PyTorch's best after those before it.

    A token within twice the `noise` of PyTorch's best is a tie and agrees; what follows it is judged after it, so one
    tie does not make the rest of a row wrong.

    Args:
        behind: How far each token's logit is below the best in PyTorch, `[tokens]` for each row.
        noise: What rounding may move a logit by; None where nothing tells, and only PyTorch's own best agrees.
    """
    agreement = float((np.concatenate(behind) <= 2 * (noise or 0)).mean())
    failures = ()
    if agreement < gates.top1:
        failures = (f"{agreement:.1%} of {GREEDY_TOKENS} greedy tokens agree; {gates.top1:.1%} are expected",)
    return ParityCase(
        name=f"{label}: {GREEDY_TOKENS} greedy tokens",
        group="decoding",
        reference="PEFT, unmerged, each prompt alone, without a cache",
        error=0.0 if agreement == 1 else float("nan"),
        error_relative=0.0 if agreement == 1 else float("nan"),
        tolerance=None,
        n_rows=len(behind),
        top1=agreement,
        top1_tolerance=gates.top1,
        failures=failures,
    )


def _behind(reference: Reference, prompt: list[int], continuation: list[int]) -> np.ndarray:
    """How far each token's logit is below the reference's best, `[tokens]`, in one forward pass without padding."""
    tokens = np.array([prompt + continuation], np.int64)
    logits = reference.run({"input_ids": tokens}, n_generated=len(continuation))["logits"][0, len(prompt) - 1 : -1]
    return logits.max(axis=-1) - logits[np.arange(len(continuation)), continuation]
