"""What a traced attention mask lets through, found by running the nodes that compute it: no pattern is relied on.

A decoder's mask `[batch, 1, new, total]` is causal if query `q` of a row attends key `k` where both are real tokens and
`k <= past + q`; with a window `w`, if also `k > past + q - w`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.convenience import extract

# Tokens as shapes: prompts, a step, and a chunk on a cache.
_CASES = ((2, 4, 0), (3, 1, 0), (3, 1, 5), (3, 4, 4))
# An additive mask adds the lowest number of its dtype, or -inf, where nothing is to be attended.
_MASKED = -1e4
# What ONNX's reference evaluator raises for an operator that it has not, or operands that it does not take. The graph
# then keeps its own mask, which is right and slower.
_CANNOT_RUN = (ValueError, TypeError, KeyError, IndexError, NotImplementedError, RuntimeError)


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
    evaluate = _evaluator(graph, mask)
    if evaluate is None:
        return None
    candidates = [CausalMask(), *map(CausalMask, windows)]
    for attention_mask, new in _attention_masks(max(windows, default=0)):
        found = evaluate(attention_mask, new)
        if found is None or found.ndim != 4 or found.shape[1] != 1:
            return None
        attended = found[:, 0] if found.dtype == bool else found[:, 0].astype(np.float32) > _MASKED
        real = attention_mask[:, -new:] != 0
        candidates = [each for each in candidates if _agrees(attended, each.allows(attention_mask, new), real)]
    return next(iter(candidates), None)


def is_false_for_real_tokens(graph: ir.Graph, condition: ir.Value) -> bool:
    """Whether `condition`, `[batch, 1, new, 1]`, is false for every token that is no padding, under a causal mask."""
    evaluate = _evaluator(graph, condition)
    if evaluate is None:
        return False
    for attention_mask, new in _attention_masks(0):
        found = evaluate(attention_mask, new)
        if (
            found is None
            or found.dtype != bool
            or found.ndim != 4
            or found[:, 0, :, 0][attention_mask[:, -new:] != 0].any()
        ):
            return False
    return True


def _evaluator(graph: ir.Graph, value: ir.Value) -> Callable[[np.ndarray, int], np.ndarray | None] | None:
    """Runs the nodes of `graph` that compute `value`, of an attention mask `[batch, total]` and a number of new tokens.

    It gives None where they cannot be run on these. None in its place: they cannot be run at all, or read a weight.
    """
    inputs = [each for each in _read_by(value) if each.producer() is None]
    has_domains = any(node.domain for node in {each.producer() for each in _read_by(value)} - {None})
    if has_domains or any(each not in graph.inputs for each in inputs):
        return None
    try:
        part = extract(graph, inputs, [value])
        model = ir.Model(part, ir_version=10)
        model.opset_imports.update(graph.opset_imports)
        evaluator = ReferenceEvaluator(ir.to_proto(model))
    except _CANNOT_RUN:
        return None

    def evaluate(attention_mask: np.ndarray, new: int) -> np.ndarray | None:
        batch, total = attention_mask.shape
        sizes = {"batch_size": batch, "sequence_length": new, "past_sequence_length": total - new}
        feeds = {}
        for each in part.inputs:
            dims = [dim if isinstance(dim, int) else sizes.get(str(dim.value), total) for dim in each.shape]
            feeds[each.name] = np.zeros(dims, each.dtype.numpy())
        feeds |= {name: attention_mask for name in feeds if name == "attention_mask"}
        try:
            (found,) = evaluator.run(None, feeds)
        except _CANNOT_RUN:
            return None
        return found

    return evaluate


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


def _read_by(value: ir.Value) -> list[ir.Value]:
    """`value`, and all values that it is computed from but constants."""
    found: dict[ir.Value, None] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if each in found or each.const_value is not None:
            continue
        found[each] = None
        if each.producer() is not None:
            waiting += [operand for operand in each.producer().inputs if operand is not None]
    return list(found)
