"""Inputs that invoke an activated LoRA: its tokens written into real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_export.check.inputs.examples import Batch
from lora_export.runtime.invocation import last_occurrence

# One row in so many stays without: there the adapter must do nothing.
_ROWS_WITHOUT = 4


def with_invocation(batch: Batch, tokens: Sequence[int] | None, share: float = 0.5) -> Batch:
    """`batch` with `tokens` in place of some of each row's own, `share` of the way into it.

    A row that has them already, or that is shorter, stays as it is; so does every fourth.

    Args:
        tokens: None for an adapter that is active for all tokens: `batch` itself.
    """
    if tokens is None:
        return batch
    ids = batch.inputs["input_ids"].copy()
    for row in range(len(ids)):
        places = batch.real[row].nonzero()[0]
        is_left_out = row % _ROWS_WITHOUT == _ROWS_WITHOUT - 1
        if is_left_out or len(places) <= len(tokens) or last_occurrence(ids[row], tokens) is not None:
            continue
        start = int((len(places) - len(tokens)) * share)
        ids[row, places[start : start + len(tokens)]] = tokens
    return replace(batch, inputs=batch.inputs | {"input_ids": ids})
