"""What a traced attention mask lets through, found by running the nodes that compute it: no pattern is relied on.

A decoder's mask `[batch, 1, new, total]` is causal if query `q` of a row attends key `k` where both are real tokens and
`k <= past + q`; with a window `w`, if also `k > past + q - w`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.convenience import extract

# Tokens as shapes: prompts, a step, and a chunk on a cache.
_CASES = ((2, 4, 0), (3, 1, 0), (3, 1, 5), (3, 4, 4))
# An additive mask adds the lowest number of its dtype, or -inf, where nothing is to be attended.
_MASKED = -1e4
# A constant of more numbers is a table, whose axes have sizes of their own.
_FEW = 16
# No window is as long: such numbers are ends of slices, or the lowest of a dtype.
_NO_WINDOW = 2**20
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


class MaskEvaluator:
    """Runs a copy of the nodes that compute a mask.

    Attributes:
        inputs: What they read of the graph's inputs, copies too.
    """

    def __init__(self, model: ir.Model) -> None:
        self.inputs, self._nodes = tuple(model.graph.inputs), tuple(model.graph)
        self._evaluator = ReferenceEvaluator(ir.to_proto(model))

    @classmethod
    def of(cls, graph: ir.Graph, value: ir.Value) -> MaskEvaluator | None:
        """For the nodes of `graph` that compute `value`; None where they read a weight or have no reference."""
        read = _read_by(value)
        inputs = [each for each in read if each.producer() is None]
        has_domains = any(node.domain for node in {each.producer() for each in read} - {None})
        if has_domains or any(each not in graph.inputs for each in inputs):
            return None
        try:
            model = ir.Model(extract(graph, inputs, [value]), ir_version=10)
            model.opset_imports.update(graph.opset_imports)
            return cls(model)
        except _CANNOT_RUN:
            return None

    def largest_number(self, below: int) -> int:
        """The largest whole number below `below` among the constants, 0 if there is none: no window is larger."""
        constants = (ir.convenience.get_const_tensor(value) for node in self._nodes for value in node.inputs if value)
        arrays = (tensor.numpy().reshape(-1) for tensor in constants if tensor is not None and tensor.size <= _FEW)
        numbers = (abs(float(number)) for array in arrays for number in array)
        return max((int(number) for number in numbers if number < below), default=0)

    def __call__(self, sizes: Mapping[str, int], given: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The mask as its nodes compute it; None if they cannot be run here.

        Args:
            sizes: Of the symbolic axes of inputs, by name.
            given: The inputs that are not zeros; those that the mask does not read are left out.
        """
        feeds = {}
        for value in self.inputs:
            dims = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape]
            feeds[value.name] = given[value.name] if value.name in given else np.zeros(dims, value.dtype.numpy())
        try:
            (found,) = self._evaluator.run(None, feeds)
        except _CANNOT_RUN:
            return None
        return found


def causal_mask(graph: ir.Graph, mask: ir.Value, windows: tuple[int, ...]) -> CausalMask | None:
    """The causal mask that `mask` computes from the inputs of `graph`; None if it is another, or cannot be run.

    Args:
        windows: The sizes of sliding windows to try.
    """
    evaluate = MaskEvaluator.of(graph, mask)
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
    evaluate = MaskEvaluator.of(graph, condition)
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


def _of_tokens(evaluate: MaskEvaluator, attention_mask: np.ndarray, new: int) -> np.ndarray | None:
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
