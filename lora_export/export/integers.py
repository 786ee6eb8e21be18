"""Weights as blocks of small integers, by ONNX Runtime's own quantizers, and back.

Each method is ONNX Runtime's function, called for one weight: the numbers are those that its quantizer of whole graphs
writes. RTN and k-quant treat every block alone, so a weight is handed over in pieces. HQQ stops when the mean error of
the whole weight no longer falls, so it has to see all of it, in float32 and some ten times: that is its memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from lora_export.base.recipe import Part, Quantized, Recipe
from lora_export.compat import borrow
from lora_export.quantization import Method
from lora_export.quiet import quiet

# Columns are quantized by so many numbers at a time, so that no second copy of a large weight is made. K-quant has some
# ten arrays of as many in hand.
_CHUNK_ELEMENTS = {Method.RTN: 1 << 22, Method.K_QUANT: 1 << 19}
_QUANTIZERS = {4: "quantize_matmul_4bits", 8: "quantize_matmul_8bits"}


def quantized(weight: np.ndarray, how: Quantized) -> dict[Part, np.ndarray]:
    """`weight` `[in, out]`, float32, float16 or bfloat16, as `MatMulNBits` reads it.

    Scales have the weight's dtype, and so have zeros that are floats. bfloat16 is quantized in float32, as ONNX Runtime
    does with RTN; its other methods take none, and are used likewise.
    """
    if how.method is Method.HQQ:
        return _by_hqq(weight, how)
    n_in, n_out = weight.shape
    blocks = -(-n_in // how.block_size)
    quantize = _by_k_quant if how.method is Method.K_QUANT else _by_rtn
    step = max(1, _CHUNK_ELEMENTS[how.method] // (blocks * how.block_size))
    pieces = []
    for start in range(0, n_out, step):
        columns = weight[:, start : start + step]
        chunk = np.zeros((blocks * how.block_size, columns.shape[1]), _element(how))
        chunk[:n_in] = columns
        pieces.append(quantize(chunk, how, n_in))
    integers, scales, zeros = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    found = {Part.INTEGERS: integers, Part.SCALES: scales.astype(weight.dtype), Part.ZEROS: zeros}
    return {part: array for part, array in found.items() if part is not Part.ZEROS or not how.symmetric}


def _element(how: Quantized) -> np.dtype:
    return np.dtype(np.float32 if how.dtype == "bfloat16" else how.dtype)


def _by_rtn(chunk: np.ndarray, how: Quantized, n_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_out, blocks, per_byte = chunk.shape[1], len(chunk) // how.block_size, 8 // how.bits
    integers = np.zeros((n_out, blocks, how.block_size // per_byte), np.uint8)
    scales = np.zeros((n_out, blocks), chunk.dtype)
    zeros = np.zeros((n_out, -(-blocks // per_byte)), np.uint8)
    borrow(_QUANTIZERS[how.bits])(integers, chunk, scales, zeros, how.block_size, n_out, n_in, how.symmetric)
    return integers, scales, zeros


def _by_k_quant(chunk: np.ndarray, how: Quantized, n_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with quiet():  # a block whose numbers are all alike divides by zero, and keeps its first scale
        found = borrow("quant_tensor_k_quant_cpu")(chunk.T, how.bits, how.block_size)
    integers, scales, zeros = (each.reshape(chunk.shape[1], len(chunk) // how.block_size, -1) for each in found)
    packed = in_bytes(integers.astype(np.uint8), how.bits), in_bytes(zeros[..., 0], how.bits)
    return packed[0], scales[..., 0].astype(chunk.dtype), packed[1]


def _by_hqq(weight: np.ndarray, how: Quantized) -> dict[Part, np.ndarray]:
    """On one thread: where the steps end hangs on a mean, whose rounding hangs on the number of threads."""
    n_out, blocks = weight.shape[1], -(-weight.shape[0] // how.block_size)
    with quiet(), _one_thread():
        quantizer = borrow("HQQWeightOnlyQuantizer")(None)
        given = torch.from_numpy(weight.astype(_element(how), copy=False)).T
        numbers, scales, zeros = quantizer.quantize_internal(given, bits=how.bits, group_size=how.block_size)
    numbers = numbers.numpy().astype(np.uint8).reshape(n_out, blocks, -1)
    parts = {Part.INTEGERS: in_bytes(numbers, how.bits)}
    of_blocks = {Part.SCALES: scales, Part.ZEROS: zeros}
    return parts | {part: each.numpy().reshape(n_out, blocks).astype(weight.dtype) for part, each in of_blocks.items()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dequantized(parts: Mapping[Part, np.ndarray], how: Quantized, n_in: int) -> np.ndarray:
    """The weight `[in, out]` that `parts` stand for, in float32."""
    scales = parts[Part.SCALES].astype(np.float32)
    integers = _unpacked(parts[Part.INTEGERS], how.bits).reshape(*scales.shape, how.block_size)
    zeros = np.float32(1 << (how.bits - 1))
    if how.method is Method.HQQ:
        zeros = parts[Part.ZEROS][..., None].astype(np.float32)
    elif Part.ZEROS in parts:
        zeros = _unpacked(parts[Part.ZEROS], how.bits)[:, : scales.shape[1], None].astype(np.float32)
    values = (integers.astype(np.float32) - zeros) * scales[..., None]
    return np.ascontiguousarray(values.reshape(len(scales), -1)[:, :n_in].T)


def in_bytes(numbers: np.ndarray, bits: int) -> np.ndarray:
    """The last axis of integers as one of bytes, the first of two in the low four bits."""
    if bits == 8:
        return numbers
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros_like(numbers[..., :1])], axis=-1)
    return numbers[..., ::2] | (numbers[..., 1::2] << 4)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The last axis of bytes as one of integers; of two in a byte, the low four bits come first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


class Source(Protocol):
    """See `weights.Parameters`."""

    def make_weight(self, recipe: Recipe, dtype: str) -> np.ndarray: ...

    def own_integers(self, path: str, how: Quantized) -> Mapping[Part, np.ndarray]: ...


@dataclass
class Maker:
    """Makes stored weights, quantized ones too; the parts of the last of these are kept, as they are asked for in turn.

    Attributes:
        source: Of weights in floats, and of a checkpoint's own integers.
    """

    source: Source
    _last: Recipe | None = None
    _parts: Mapping[Part, np.ndarray] | None = None

    def __call__(self, recipe: Recipe, dtype: str) -> np.ndarray:
        if recipe.quantized is None:
            return self.source.make_weight(recipe, dtype)
        if self._last != recipe.before:
            self._last, self._parts = recipe.before, None
            self._parts = self._quantized(recipe.before, recipe.quantized)
        return self._parts[recipe.quantized.part]

    def _quantized(self, recipe: Recipe, how: Quantized) -> Mapping[Part, np.ndarray]:
        """Projections that are packed side by side are quantized one by one, as HQQ looks at a whole weight."""
        if how.method is Method.AS_STORED:
            found = [self.source.own_integers(path, how) for path in recipe.parameters]
        else:
            alone = [replace(recipe, parameters=(path,)) for path in recipe.parameters]
            found = [quantized(self.source.make_weight(each, how.dtype), how) for each in alone]
        return {part: np.concatenate([parts[part] for parts in found]) for part in found[0]}


def as_served(weight: np.ndarray, how: Quantized) -> np.ndarray:
    """What a graph multiplies by where it stores `weight` `[in, out]` quantized, in float32."""
    return dequantized(quantized(weight, how), how, len(weight))
