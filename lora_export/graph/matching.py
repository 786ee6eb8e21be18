"""Whose numbers a given graph's weights are. The numbers decide; names decide only between modules with equal numbers.

A weight of a linear map is held against the base's as `[out, in]`, however it is stored:

1. as `[in, out]` or `[out, in]`, in the graph's dtype: it must be the base's to the last bit, after one rounding to
   that dtype;
2. as blocks of integers (`MatMulNBits`): each number must be within a few steps of the base's, and all of the matrix
   within a fifth of its norm. A step is a block's largest number over half of the grid. A fine-tune may be as near;
3. projections below each other, as a query, key and value in one: each part as above;
4. some rows of a module, as Phi-3's gate and up, which are one module, in a product each (`joining.py`).

An embedding's table is compared as a whole. What is matched is then named (`given_names.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lora_export.graph.stored_integers import LOOKUP, is_lookup, read_integers, read_table
from lora_export.graph.unbound import is_matrix_transpose

# Of integers: the most steps between a number and the base's, and the largest part of the norm.
_MOST_STEPS, _LARGEST_PART = 3.0, 0.2
_CHUNK_ROWS = 4096
_WORDS = re.compile(r"[./]+")
_FLOAT_PRODUCTS = (
    ("MatMul", ""), ("Gemm", ""), ("FusedMatMul", "com.microsoft"), ("Attention", "com.microsoft"),
)  # fmt: skip
# MatMulNBits' inputs that are a weight, and how their names end.
PARTS = {1: "_Q{bits}", 2: "_scales", 3: "_zero_points"}


@dataclass(frozen=True)
class BaseMatrix:
    """A module of the base with a matrix: `nn.Linear`, `Conv1D`, or an embedding's table as `[vocabulary, dim]`.

    Attributes:
        is_in_out: Whether the base stores it `[in, out]` (`Conv1D`).
    """

    module: str
    n_in: int
    n_out: int
    is_in_out: bool = False
    is_table: bool = False


# Rows of a module's matrix as `[out, in]` in a dtype.
ReadRows = Callable[[BaseMatrix, slice, str], np.ndarray]


@dataclass(eq=False)
class GivenWeight:
    """One matrix of a given graph.

    Attributes:
        value: The initializer; of integers, the packed ones, or of a table of them, its scales.
        is_out_in: Whether floats are stored `[out, in]`.
        nodes: The nodes that read it so.
        modules: Whose numbers it holds, in order; empty where that is not known.
    """

    value: ir.Value
    n_in: int
    n_out: int
    is_out_in: bool
    nodes: list[ir.Node] = field(default_factory=list)
    modules: tuple[BaseMatrix, ...] = ()

    @property
    def node(self) -> ir.Node:
        return self.nodes[0]

    @property
    def is_integers(self) -> bool:
        return self.node.op_type in ("MatMulNBits", LOOKUP[0])

    @property
    def is_table(self) -> bool:
        return self.node.op_type in ("Gather", LOOKUP[0])

    @property
    def is_product(self) -> bool:
        """Whether adapters can be added beside it: it is multiplied by in a node of its own."""
        return self.node.op_type in ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")

    @property
    def dtype(self) -> str:
        """Of the floats that it is compared in."""
        return "float32" if self.is_integers else str(self.value.dtype.numpy())

    def rows(self, start: int, stop: int) -> np.ndarray:
        """`[stop − start, in]`."""
        if self.is_integers:
            rows = slice(start, stop)
            return (read_table(self.node, rows=rows) if self.is_table else read_integers(self.node, rows)).values
        array = self.value.const_value.numpy()
        return array[start:stop] if self.is_out_in else array[:, start:stop].T

    def off(self, start: int, expected: np.ndarray) -> float | None:
        """How far the rows from `start` on are from those of the base, `expected` `[n, in]`: a sum of squares, 0 for
        floats; None if they are not the base's."""
        found = self.rows(start, start + len(expected))
        if not self.is_integers:
            return 0.0 if np.array_equal(found, expected) else None
        bits, block = self.node.attributes.get_int("bits", 4), self.node.attributes.get_int("block_size", 128)
        padding = -expected.shape[1] % block
        blocks = np.pad(np.abs(expected), ((0, 0), (0, padding))).reshape(len(expected), -1, block)
        steps = np.repeat(blocks.max(axis=2) / (1 << (bits - 1)), block, axis=1)[:, : expected.shape[1]]
        off = np.abs(found - expected)
        is_near = (off <= _MOST_STEPS * steps + np.finfo(np.float32).tiny).all()
        return float(np.square(off).sum()) if is_near else None


def given_weights(graph: ir.Graph) -> list[GivenWeight]:
    """The matrices of `graph`, in its order. What a branch of it reads is left out."""
    found: dict[tuple[ir.Value, bool, bool], GivenWeight] = {}
    for node in graph:
        for value, is_out_in in _matrices(node):
            n_out, n_in = (value.shape[0], value.shape[1]) if is_out_in else (value.shape[1], value.shape[0])
            if node.op_type == "MatMulNBits":
                n_in, n_out = node.attributes.get_int("K"), node.attributes.get_int("N")
            elif is_lookup(node):
                n_out, n_in = node.inputs[2].shape[0], read_table(node, rows=slice(0, 1)).integers.shape[1]
            key = (value, is_out_in, is_lookup(node) or node.op_type == "Gather")
            weight = found.setdefault(key, GivenWeight(value, n_in, n_out, is_out_in))
            weight.nodes.append(node)
    return list(found.values())


def _matrices(node: ir.Node) -> Iterator[tuple[ir.Value, bool]]:
    """The weights that `node` reads as matrices, and whether each lies `[out, in]`."""
    kind = (node.op_type, node.domain)
    if kind == ("MatMulNBits", "com.microsoft"):
        if all(value is not None and value.const_value is not None for value in node.inputs[1:3]):
            yield node.inputs[1], True
    elif is_lookup(node):
        yield node.inputs[2], True  # by its scales: the integers may be those of a product, too
    elif kind == ("Gather", ""):
        if _is_matrix(node.inputs[0]):
            yield node.inputs[0], True
    elif kind in _FLOAT_PRODUCTS and not _has_factor(node):
        is_out_in, value = bool(node.attributes.get_int("transB", 0)), node.inputs[1]
        if value is not None and value.producer() is not None and is_matrix_transpose(value.producer()):
            is_out_in, value = not is_out_in, value.producer().inputs[0]
        if value is not None and _is_matrix(value):
            yield value, is_out_in


def _has_factor(node: ir.Node) -> bool:
    """Whether a `Gemm` or `FusedMatMul` does more than multiply, transpose its weight and add a bias."""
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    others = [node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")]
    return node.op_type in ("Gemm", "FusedMatMul") and (factors != [1.0, 1.0] or any(others))


def _is_matrix(value: ir.Value | None) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None or value.is_graph_input():
        return False
    return len(value.shape) == 2 and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Matcher:
    """Finds whose numbers weights hold; what it has read of the base it reads again only to be sure."""

    def __init__(self, matrices: Sequence[BaseMatrix], read: ReadRows) -> None:
        self._matrices, self._read = matrices, read
        self._first: dict[tuple[str, str], np.ndarray] = {}

    def match(self, weights: Sequence[GivenWeight]) -> None:
        """Give each of `weights` its modules, if they are found."""
        for weight in weights:
            weight.modules = self._modules_of(weight)

    def parts_of(self, matrix: BaseMatrix, weights: Sequence[GivenWeight]) -> list[GivenWeight]:
        """Those of `weights` that are together the rows of `matrix`, from the first on, and multiply one input; none
        where rows are missing, or fit several."""
        found: list[GivenWeight] = []
        start = 0
        while start < matrix.n_out:
            may = [w for w in weights if w not in found and w.n_in == matrix.n_in and w.n_out <= matrix.n_out - start]
            begin = [w for w in may if w.off(0, self._read(matrix, slice(start, start + 1), w.dtype)) is not None]
            beside = [w for w in begin if not found or w.node.inputs[0] is found[0].node.inputs[0]]
            rows = {weight: slice(start, start + weight.n_out) for weight in beside}
            fitting = [w for w, each in rows.items() if self._off(w, 0, matrix, rows=each) is not None]
            if len(fitting) != 1:
                return []
            found.append(fitting[0])
            start += fitting[0].n_out
        return found if len(found) > 1 else []  # a whole one that `match` gave to nobody fits several modules

    def _modules_of(self, weight: GivenWeight) -> tuple[BaseMatrix, ...]:
        found: list[BaseMatrix] = []
        start = 0
        while start < weight.n_out:
            chosen = _chosen({m: off for m, off in self._fitting(weight, start).items() if m not in found}, weight)
            if chosen is None:
                return ()
            found.append(chosen)
            start += chosen.n_out
        return tuple(found)

    def _fitting(self, weight: GivenWeight, start: int) -> dict[BaseMatrix, float]:
        """The modules whose numbers the rows from `start` on hold, each with how far off they are."""
        left = weight.n_out - start
        may = [m for m in self._matrices if m.n_in == weight.n_in and m.is_table == weight.is_table]
        may = [m for m in may if (m.n_out == weight.n_out if weight.is_table else m.n_out <= left)]
        begin = [m for m in may if self._begins(weight, start, m)]
        found = {m: self._off(weight, start, m, rows=slice(0, m.n_out)) for m in begin}
        return {m: off for m, off in found.items() if off is not None}

    def _begins(self, weight: GivenWeight, start: int, matrix: BaseMatrix) -> bool:
        """Whether the first row fits, which is told soonest."""
        key = (matrix.module, weight.dtype)
        if key not in self._first:
            self._first[key] = self._read(matrix, slice(0, 1), weight.dtype)
        return weight.off(start, self._first[key]) is not None

    def _off(self, weight: GivenWeight, start: int, matrix: BaseMatrix, *, rows: slice) -> float | None:
        """How far the weight's rows from `start` on are from those of `matrix`; None if they are not the same."""
        total = of_base = 0.0
        for row in range(rows.start, rows.stop, _CHUNK_ROWS):
            expected = self._read(matrix, slice(row, min(row + _CHUNK_ROWS, rows.stop)), weight.dtype)
            off = weight.off(start + row - rows.start, expected)
            if off is None:
                return None
            total += off
            of_base += float(np.square(expected.astype(np.float32)).sum()) if weight.is_integers else 0.0
        return total if total <= _LARGEST_PART**2 * of_base or not weight.is_integers else None


def _chosen(fits: Mapping[BaseMatrix, float], weight: GivenWeight) -> BaseMatrix | None:
    """The module whose numbers are nearest. Of several with equal numbers, the one whose path has most words in common
    with the weight and its node; None where that tells none, or where nodes of several read them."""
    nearest = [each for each, off in fits.items() if off == min(fits.values())]
    if len(nearest) < 2:
        return nearest[0] if nearest else None
    words = {word for name in (weight.value.name, weight.node.name) for word in _WORDS.split(name or "")}
    shared = {each: len(words.intersection(each.module.split("."))) for each in nearest}
    best = [each for each, n in shared.items() if n == max(shared.values())]
    return best[0] if len(best) == 1 and len(weight.nodes) == 1 else None
