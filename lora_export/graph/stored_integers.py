"""The weights that a written graph multiplies by as small integers, read off its file as `MatMulNBits` is specified.

`check` trusts what is read here. No code is shared with what quantizes, so that neither repeats a mistake of the other.

    Y = A · Wᵀ,  W[n, k] = scales[n, k // block_size] · (B[n, k] − zero_points[n, k // block_size])

`B` is `[N, blocks, block_size · bits / 8]` bytes, of which each holds 8 / bits numbers, the first in the lowest bits.
Zeros are packed likewise, a row of blocks after the other, or are floats; where there are none, each is 2**(bits − 1).
An embedding's table is stored alike where other tools read it by `GatherBlockQuantized`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.graph.sites import module_of

_OPERATOR, LOOKUP = ("MatMulNBits", "com.microsoft"), ("GatherBlockQuantized", "com.microsoft")
_INTEGERS = re.compile(r"_Q[248]$")
_AXES = {"gather_axis": 0, "quantize_axis": 1}
_LEVEL = "accuracy_level"
# MatMulNBits may round its other operand to 8-bit integers.
_INT8_LEVEL = 4


@dataclass(frozen=True)
class StoredInteger:
    """One stored weight, `[out, in]`.

    Attributes:
        parameters: The paths in the base of what it is: one, or projections of one input below each other.
        integers: `[out, in]`, unsigned.
        scales, zeros: `[out, blocks]`, float64.
        has_zeros: Whether the file has zeros.
    """

    parameters: tuple[str, ...]
    bits: int
    block_size: int
    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    has_zeros: bool

    @cached_property
    def values(self) -> np.ndarray:
        """What it stands for, `[out, in]`, float32: one rounding."""
        return (self.by_element(self.scales) * (self.integers - self.by_element(self.zeros))).astype(np.float32)

    def apart(self, sizes: Sequence[int]) -> Iterator[StoredInteger]:
        """One for each of its parameters, of `sizes` rows."""
        ends = np.cumsum(sizes)
        for parameter, start, end in zip(self.parameters, ends - np.array(sizes), ends, strict=True):
            arrays = (each[start:end] for each in (self.integers, self.scales, self.zeros))
            yield StoredInteger((parameter,), self.bits, self.block_size, *arrays, self.has_zeros)

    def by_element(self, of_blocks: np.ndarray) -> np.ndarray:
        """A number a block, `[out, blocks]`, as one an element, `[out, in]`."""
        return np.repeat(of_blocks, self.block_size, axis=1)[:, : self.integers.shape[1]]


def rounds_activations(graph: Path) -> bool:
    """Whether any product of the graph in this file may round its other operand to 8-bit integers.

    One whose zeros are floats does not, at any level.
    """
    nodes = ir.load(graph).graph.all_nodes()
    return any(
        _is_quantized(node) and node.attributes.get_int(_LEVEL, 0) >= _INT8_LEVEL and not _has_float_zeros(node)
        for node in nodes
    )


def _has_float_zeros(node: ir.Node) -> bool:
    zeros = node.inputs[3] if len(node.inputs) > 3 else None
    return zeros is not None and zeros.dtype is not None and zeros.dtype.is_floating_point()


def without_rounded_activations(model: ir.Model) -> ir.Model:
    """`model` (changed in place) with products that leave their other operand as it is."""
    for node in model.graph.all_nodes():
        if _is_quantized(node):
            node.attributes.pop(_LEVEL, None)
    return model


def stored_integers(graph: Path) -> Iterator[StoredInteger]:
    """The quantized weights of the graph in this file, one at a time; of projections packed into one, that."""
    seen = set()
    for node in ir.load(graph).graph.all_nodes():
        if _is_quantized(node):
            read = tuple(value.name if value is not None else "" for value in node.inputs[1:4])
            if read not in seen:
                yield read_integers(node)
            seen.add(read)


def stored_tables(graph: Path) -> Iterator[StoredInteger]:
    """The tables of embeddings that the graph in this file looks up as integers, by the path of the node's module."""
    for node in ir.load(graph).graph.all_nodes():
        if is_lookup(node) and (module := module_of(node)):
            yield read_table(node, module)


def is_lookup(node: ir.Node) -> bool:
    """Whether `node` looks rows up in a table `[vocabulary, dim]` of blocks along `dim`, packed in bytes."""
    if (node.op_type, node.domain) != LOOKUP:
        return False
    data, (gather, quantize) = _table_of(node), (node.attributes.get_int(n, d) for n, d in _AXES.items())
    return data is not None and data.dtype == ir.DataType.UINT8 and gather == 0 and quantize in (1, -1)


def _table_of(node: ir.Node) -> ir.Value | None:
    """The initializer that `node` looks up in, reshaped or not."""
    value = node.inputs[0]
    producer = value.producer()
    value = producer.inputs[0] if producer is not None and producer.op_type == "Reshape" else value
    return value if value.is_initializer() else None


def read_table(node: ir.Node, module: str = "", rows: slice = slice(None)) -> StoredInteger:
    """The table of a node that `is_lookup`, or some of its rows."""
    bits, block_size = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
    parts = (_table_of(node), *node.inputs[2:4])
    n_out = node.inputs[2].shape[0]
    return _stored((f"{module}.weight",), parts, rows, n_out=n_out, n_in=None, bits=bits, block_size=block_size)


def _is_quantized(node: ir.Node) -> bool:
    return (node.op_type, node.domain) == _OPERATOR


def read_integers(node: ir.Node, rows: slice = slice(None)) -> StoredInteger:
    """The weight of a `MatMulNBits` node, or some of its rows `[out]`."""
    n_out, n_in, block_size = (node.attributes.get_int(name) for name in ("N", "K", "block_size"))
    bits, parameters = node.attributes.get_int("bits", 4), tuple(_INTEGERS.sub("", node.inputs[1].name).split("+"))
    return _stored(parameters, node.inputs[1:4], rows, n_out=n_out, n_in=n_in, bits=bits, block_size=block_size)


def _stored(
    parameters: tuple[str, ...],
    parts: Sequence[ir.Value | None],
    rows: slice,
    *,
    n_out: int,
    n_in: int | None,
    bits: int,
    block_size: int,
) -> StoredInteger:
    """Some rows of the weight whose integers, scales and, if it has such, zeros are `parts`.

    Args:
        n_in: Where the last block may be longer than the weight; None where it is not.
    """
    packed, scales, *rest = (None if p is None else p.const_value.numpy().reshape(n_out, -1)[rows] for p in parts)
    zeros = rest[0] if rest else None
    scales = scales.astype(np.float64)
    if zeros is None:
        numbers = np.full(scales.shape, float(1 << (bits - 1)))
    else:
        numbers = _numbers(zeros, bits) if zeros.dtype == np.uint8 else zeros
        numbers = numbers[:, : scales.shape[1]].astype(np.float64)
    integers = _numbers(packed, bits)[:, :n_in]
    return StoredInteger(parameters, bits, block_size, integers, scales, numbers, zeros is not None)


def _numbers(rows: np.ndarray, bits: int) -> np.ndarray:
    """`[rows, bytes]` as `[rows, numbers]`."""
    mask = (1 << bits) - 1
    return np.stack([(rows >> shift) & mask for shift in range(0, 8, bits)], axis=-1).reshape(len(rows), -1)
