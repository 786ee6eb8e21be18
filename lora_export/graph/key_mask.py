"""Masks that say of each key whether it is attended, whatever the query: padding, found by running the mask's nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.graph.evaluate import Evaluator
from lora_export.graph.mask import attended_by

_ROWS = 3
# The lengths of symbolic axes: all of them different, and all the same.
_LENGTHS = ((5, 7, 4, 6), (4, 4, 4, 4))
# A window is seen on axes that are longer than it. What is larger is no window, but an end of a slice.
_LONGEST_WINDOW, _NO_LENGTH = 1024, 2**31


@dataclass(frozen=True)
class KeyMask:
    """Every query attends the same keys: those where `given` is not 0.

    Attributes:
        given: The graph's input `[batch, keys]`; None where all keys are attended.
    """

    given: ir.Value | None


def key_mask(graph: ir.Graph, mask: ir.Value | None) -> KeyMask | None:
    """The key mask that `mask`, `[batch, 1, queries, keys]`, computes from the inputs of `graph`; None if it is
    another, or cannot be run. No mask is one that lets all through."""
    if mask is None:
        return KeyMask(None)
    evaluate = Evaluator.of(graph, mask)
    if evaluate is None or evaluate.largest_number(_NO_LENGTH) > _LONGEST_WINDOW:
        return None
    # What is run are copies. Two masks could not be told apart, nor a token's number from any other.
    read = {value.name for value in evaluate.inputs if not _is_read_for_its_shape(value)}
    masks = [value for value in graph.inputs if value.name in read]
    if len(masks) > 1 or not all(map(_is_mask, masks)):
        return None
    candidates = [KeyMask(None), *map(KeyMask, masks)]
    for sizes, given in _cases(evaluate):
        attended = attended_by(evaluate(sizes, given))
        if attended is None:
            return None
        candidates = [each for each in candidates if _agrees(attended, each, given)]
        if not candidates:
            return None
    return candidates[0]


def is_false_with_keys(graph: ir.Graph, condition: ir.Value) -> bool:
    """Whether `condition` is false wherever a row has any key to attend."""
    evaluate = Evaluator.of(graph, condition)
    if evaluate is None or evaluate.largest_number(_NO_LENGTH) > _LONGEST_WINDOW:
        return False
    found = (evaluate(sizes, given) for sizes, given in _cases(evaluate))
    return all(each is not None and each.dtype == bool and not each.any() for each in found)


def _is_mask(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT64 and len(value.shape) == 2 and value.name.endswith("attention_mask")


def _is_read_for_its_shape(value: ir.Value) -> bool:
    return all(node.op_type == "Shape" for node, _ in value.uses())


def _cases(evaluate: Evaluator) -> Iterator[tuple[dict[str, int], dict[str, np.ndarray]]]:
    """Sizes and masks to run a mask with, with padding and without; the last sizes are longer than any window."""
    axes = dict.fromkeys(str(dim.value) for value in evaluate.inputs for dim in value.shape if not isinstance(dim, int))
    longest = evaluate.largest_number(_NO_LENGTH) + 3
    for lengths in (*_LENGTHS, (longest,) * 4):
        by_name = iter(lengths * len(axes))
        sizes = {axis: _ROWS if "batch" in axis else next(by_name) for axis in axes}
        for padded in (False, True):
            given = {}
            for value in filter(_is_mask, evaluate.inputs):
                dims = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape]
                given[value.name] = _padded(dims) if padded else np.ones(dims, np.int64)
            yield sizes, given


def _padded(dims: list[int]) -> np.ndarray:
    mask = np.ones(dims, np.int64)
    mask[0, : dims[1] // 2] = 0
    mask[1, dims[1] // 2 + 1 :] = 0
    mask[-1, 1:-1] = 0
    return mask


def _agrees(attended: np.ndarray, expected: KeyMask, given: dict[str, np.ndarray]) -> bool:
    """Whether every query attends the expected keys, `attended` being `[batch or 1, queries, keys]`."""
    if expected.given is None:
        return bool(attended.all())
    keys = given[expected.given.name] != 0
    if attended.shape[0] != len(keys) or attended.shape[2] != keys.shape[1]:
        return False
    return bool((attended == keys[:, None, :]).all())
