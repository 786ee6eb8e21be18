"""Masks that say of each key whether it is attended, whatever the query: padding, found by running the mask's nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.graph.mask import MaskEvaluator, attended_by

# Rows of a batch, with padding on the left, on the right, and between; and the lengths that symbolic axes have.
_ROWS, _LENGTHS = 3, ((5, 7, 4, 6), (4, 4, 4, 4))


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
    evaluate = MaskEvaluator.of(graph, mask)
    if evaluate is None:
        return None
    # Those that are run are copies.
    read = {value.name for value in evaluate.inputs if _is_mask(value)}
    candidates = [KeyMask(None), *(KeyMask(value) for value in graph.inputs if value.name in read)]
    for sizes, given in _cases(evaluate):
        attended = attended_by(evaluate(sizes, given))
        if attended is None:
            return None
        candidates = [each for each in candidates if _agrees(attended, each, given)]
    return next(iter(candidates), None)


def is_false_with_keys(graph: ir.Graph, condition: ir.Value) -> bool:
    """Whether `condition` is false wherever a row has any key to attend."""
    evaluate = MaskEvaluator.of(graph, condition)
    if evaluate is None:
        return False
    found = [evaluate(sizes, given) for sizes, given in _cases(evaluate)]
    return all(each is not None and each.dtype == bool and not each.any() for each in found)


def _is_mask(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT64 and len(value.shape) == 2 and value.name.endswith("attention_mask")


def _cases(evaluate: MaskEvaluator) -> Iterator[tuple[dict[str, int], dict[str, np.ndarray]]]:
    """Sizes and inputs to run a mask with. What is no mask has numbers of its own, so that one who reads it is seen."""
    numbers = np.random.default_rng(0)
    axes = dict.fromkeys(str(dim.value) for value in evaluate.inputs for dim in value.shape if not isinstance(dim, int))
    for lengths in _LENGTHS:
        by_name = iter(lengths * len(axes))
        sizes = {axis: _ROWS if "batch" in axis else next(by_name) for axis in axes}
        for padded in (False, True):
            given = {}
            for value in evaluate.inputs:
                dims = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape]
                given[value.name] = numbers.integers(0, 2, dims).astype(value.dtype.numpy())
                if _is_mask(value):
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
