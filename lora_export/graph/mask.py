"""What a traced attention mask lets through. The pass runs the nodes that compute the mask: it knows no patterns.

A decoder's mask `[batch, 1, new, total]` is causal if query `q` of a row attends key `k` where both are real tokens and
`k <= past + q`; with a window `w`, if also `k > past + q - w`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.graph.evaluate import Evaluator

# Tokens as shapes: prompts, a step, and a chunk on a cache.
_CASES = ((2, 4, 0), (3, 1, 0), (3, 1, 5), (3, 4, 4))
# An additive mask adds the lowest number of its dtype, or -inf, where nothing is to be attended.
_MASKED = -1e4
# No window is as long: such numbers are ends of slices, or the lowest of a dtype.
_NO_WINDOW = 2**20


@dataclass(frozen=True)
class CausalMask:
    """Lets through what is causal; `window` is the number of last tokens that one attends, None for all."""

    window: int | None = None

    def allows(self, attention_mask: np.ndarray, new: int) -> np.ndarray:
        """`[batch, new, total]`: what each of the last `new` tokens attends, by an attention mask `[batch, total]`."""
        total = attention_mask.shape[1]
        queries, keys = np.arange(total - new, total)[:, None], np.arange(total)
        attended = keys <= queries
        if self.window is not None:
            attended &= keys > queries - self.window
        return attended & (attention_mask[:, None, :] != 0)


def causal_mask(graph: ir.Graph, mask: ir.Value, windows: tuple[int, ...]) -> CausalMask | None:
    """The causal mask that `mask` computes from the inputs of `graph`; None if it is another, or cannot be run.

    Args:
        windows: The sizes of sliding windows to try.
    """
    evaluate = Evaluator.of(graph, mask)
    if evaluate is None:
        return None
    candidates = [CausalMask(), *map(CausalMask, windows)]
    # A window that the config names in words of its own stands in the mask all the same.
    longest = max((*windows, evaluate.largest_number(_NO_WINDOW)))
    for attention_mask, new in _attention_masks(longest):
        attended = attended_by(_of_tokens(evaluate, attention_mask, new))
        if attended is None:
            return None
        real = attention_mask[:, -new:] != 0
        candidates = [each for each in candidates if _agrees(attended, each.allows(attention_mask, new), real)]
    return next(iter(candidates), None)


def is_false_for_real_tokens(graph: ir.Graph, condition: ir.Value) -> bool:
    """Whether `condition`, `[batch, 1, new, 1]`, is false for every token that is no padding, under a causal mask."""
    evaluate = Evaluator.of(graph, condition)
    if evaluate is None:
        return False
    for attention_mask, new in _attention_masks(0):
        found = _of_tokens(evaluate, attention_mask, new)
        if found is None or found.dtype != bool or found.shape != (len(attention_mask), 1, new, 1):
            return False
        if found[:, 0, :, 0][attention_mask[:, -new:] != 0].any():
            return False
    return True


def attended_by(mask: np.ndarray | None) -> np.ndarray | None:
    """`[batch, queries, keys]`: what a mask `[batch, 1, queries, keys]` lets through, which is true, or 0 where it is
    added; None if it is of another form, or adds something else as well."""
    if mask is None or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    if mask.dtype == bool:
        return mask[:, 0]
    added = mask[:, 0].astype(np.float32)
    return added == 0 if np.all((added == 0) | (added < _MASKED)) else None


def _of_tokens(evaluate: Evaluator, attention_mask: np.ndarray, new: int) -> np.ndarray | None:
    """What is computed for the last `new` tokens of an attention mask `[batch, total]`."""
    batch, total = attention_mask.shape
    sizes = {
        "batch_size": batch,
        "sequence_length": new,
        "past_sequence_length": total - new,
        "total_sequence_length": total,
    }
    if any(
        not isinstance(dim, int) and str(dim.value) not in sizes for value in evaluate.inputs for dim in value.shape
    ):
        return None
    return evaluate(sizes, {"attention_mask": attention_mask})


def _attention_masks(longest_window: int) -> Iterator[tuple[np.ndarray, int]]:
    """Attention masks `[batch, total]` with the number of new tokens: without padding, on the left, on the right, and
    between; the last is longer than any window."""
    for batch, new, past in _CASES:
        attention_mask = np.ones((batch, past + new), np.int64)
        yield attention_mask.copy(), new
        attention_mask[0, : (past + new) // 2] = 0
        attention_mask[1, past + new // 2 + 1 :] = 0
        attention_mask[-1, past // 2 : max(past - 1, 0)] = 0
        yield attention_mask, new
    yield np.ones((1, longest_window + 4), np.int64), 2


def _agrees(found: np.ndarray, expected: np.ndarray, real: np.ndarray) -> bool:
    """Whether the real tokens attend the same tokens."""
    if found.shape[1:] != expected.shape[1:] or found.shape[0] not in (1, len(expected)):
        return False
    return np.array_equal(np.broadcast_to(found, expected.shape)[real], expected[real])
