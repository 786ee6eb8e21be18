"""Activated LoRA: which tokens of a row an adapter is active for. NumPy only.

An activated LoRA is trained to be active from an invocation on, a fixed sequence of tokens, and leaves the base as it
is before it, so that a cache filled by the base stays valid. Source: Greenewald et al., Activated LoRA (arXiv
2504.12397); PEFT's `calculate_alora_offsets`: the last occurrence counts, and without one the adapter stays inactive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lora_export.contract import GATE_INPUT, PAST
from lora_export.errors import UsageProblem
from lora_export.runtime.stacking import RowSpec


def last_occurrence(ids: np.ndarray, tokens: Sequence[int]) -> int | None:
    """Where `tokens` last start in `ids` `[sequence]`; None if they do not occur."""
    if len(tokens) > len(ids):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(tokens))
    starts = np.flatnonzero((windows == np.asarray(tokens)).all(axis=1))
    return int(starts[-1]) if len(starts) else None


def gate_of(ids: np.ndarray, invocations: Sequence[Sequence[int] | None]) -> np.ndarray:
    """The gate `[batch, sequence, 1]`, float32: 1 where a row's adapter is active.

    Args:
        ids: `[batch, sequence]`, from the first token on; padding on either side does not matter.
        invocations: The invocation of each row's adapter; None for one that is always active, or none.
    """
    gate = np.ones((*ids.shape, 1), np.float32)
    for row, tokens in enumerate(invocations):
        if tokens is not None:
            start = last_occurrence(ids[row], tokens)
            gate[row, : ids.shape[1] if start is None else start] = 0
    return gate


def invocation_of(row: RowSpec) -> tuple[int, ...] | None:
    """The invocation that a row waits for; None for adapters that are always active.

    Raises:
        UsageProblem: The row blends an activated LoRA with another adapter.
    """
    found = [adapter.invocation for adapter, _ in row if adapter.invocation]
    if found and len(row) > 1:
        raise UsageProblem(
            "A row blends an activated LoRA with another adapter, but a row has one gate",
            found=", ".join(f"{adapter} × {weight}" for adapter, weight in row),
            next_step="run it alone in its row",
        )
    return found[0] if found else None


def refuse_unknown_past(inputs: Mapping[str, np.ndarray], n_past: int = 0) -> None:
    """Raise UsageProblem if a decoder's `inputs` continue a cache: what came before decides what is active.

    Args:
        n_past: How many tokens are in a cache that is not among `inputs`.
    """
    if n_past or any(array.shape[2] > 0 for name, array in inputs.items() if name.startswith(PAST)):
        raise UsageProblem(
            "An activated LoRA continues a cache, and what came before decides whether it is active",
            where=f"input {GATE_INPUT}",
            next_step=f"pass {GATE_INPUT}: the last column of session.gate(prompt_ids, adapters)",
        )
