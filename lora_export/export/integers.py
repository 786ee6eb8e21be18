"""Weights as blocks of small integers, by ONNX Runtime's own quantizer, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_export.base.recipe import Part, Quantized, Recipe
from lora_export.compat import borrow

# Columns are quantized by so many numbers at a time, so that no second copy of a large weight is made.
_CHUNK_ELEMENTS = 1 << 22
_QUANTIZERS = {4: "quantize_matmul_4bits", 8: "quantize_matmul_8bits"}


def quantized(weight: np.ndarray, how: Quantized) -> dict[Part, np.ndarray]:
    """`weight` `[in, out]`, float32, float16 or bfloat16, as `MatMulNBits` reads it.

    Scales have the weight's dtype; bfloat16 is quantized in float32, as ONNX Runtime does.
    """
    n_in, n_out = weight.shape
    blocks, per_byte = -(-n_in // how.block_size), 8 // how.bits
    element = np.float32 if how.dtype == "bfloat16" else np.dtype(how.dtype)
    integers = np.zeros((n_out, blocks, how.block_size // per_byte), np.uint8)
    scales = np.zeros((n_out, blocks), element)
    zeros = np.zeros((n_out, -(-blocks // per_byte)), np.uint8)
    quantize = borrow(_QUANTIZERS[how.bits])
    step = max(1, _CHUNK_ELEMENTS // (blocks * how.block_size))
    for start in range(0, n_out, step):
        columns = slice(start, min(start + step, n_out))
        chunk = np.zeros((blocks * how.block_size, columns.stop - columns.start), element)
        chunk[:n_in] = weight[:, columns]
        size = (how.block_size, chunk.shape[1], n_in)
        quantize(integers[columns], chunk, scales[columns], zeros[columns], *size, how.symmetric)
    found = {Part.INTEGERS: integers, Part.SCALES: scales.astype(weight.dtype), Part.ZEROS: zeros}
    return {part: array for part, array in found.items() if part is not Part.ZEROS or not how.symmetric}


def dequantized(parts: Mapping[Part, np.ndarray], how: Quantized, n_in: int) -> np.ndarray:
    """The weight `[in, out]` that `parts` stand for, in float32."""
    scales = parts[Part.SCALES].astype(np.float32)
    integers = _unpacked(parts[Part.INTEGERS], how.bits).reshape(*scales.shape, how.block_size)
    zeros = np.float32(1 << (how.bits - 1))
    if Part.ZEROS in parts:
        zeros = _unpacked(parts[Part.ZEROS], how.bits)[:, : scales.shape[1], None].astype(np.float32)
    values = (integers.astype(np.float32) - zeros) * scales[..., None]
    return np.ascontiguousarray(values.reshape(len(scales), -1)[:, :n_in].T)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The last axis of bytes as one of integers; of two in a byte, the low four bits come first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


@dataclass
class Maker:
    """Makes stored weights, quantized ones too; the parts of the last of these are kept, as they are asked for in turn.

    Attributes:
        make: Makes a weight in floats.
    """

    make: Callable[[Recipe, str], np.ndarray]
    _last: Recipe | None = None
    _parts: Mapping[Part, np.ndarray] | None = None

    def __call__(self, recipe: Recipe, dtype: str) -> np.ndarray:
        if recipe.quantized is None:
            return self.make(recipe, dtype)
        if self._last != recipe.before:
            self._last, self._parts = recipe.before, None
            self._parts = quantized(self.make(recipe.before, recipe.quantized.dtype), recipe.quantized)
        return self._parts[recipe.quantized.part]


def as_served(weight: np.ndarray, how: Quantized) -> np.ndarray:
    """What a graph multiplies by where it stores `weight` `[in, out]` quantized, in float32."""
    return dequantized(quantized(weight, how), how, len(weight))
