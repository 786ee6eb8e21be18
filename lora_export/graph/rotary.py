"""Rotary position embedding inside GroupQueryAttention: the operator turns queries and keys by tables.

A `RotaryEmbedding` before the attention reads a cosine and a sine for every token, computed from `position_ids`. Inside
the operator, a row's token number `p` (from 0, padding left out, as the contract says of `position_ids`) takes row `p`
of tables `[positions, half]`. The tables are the traced nodes once more, of the positions 0, 1, 2 …: ONNX Runtime folds
them when it loads the graph. They stand in for the traced values where

1. queries and keys are turned by the same values;
2. these values are computed from `position_ids` alone, and a token's depend on its own position only, whatever the
   length of the text: the pass runs the nodes to find out;
3. the base's config says how many positions there are, and the tables are not too large. ONNX Runtime refuses a longer
   text then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.graph.evaluate import Evaluator, read_by
from lora_export.graph.heads import before_heads, merged_heads

_ROTARY, _POSITIONS = "RotaryEmbedding", "position_ids"
# Of all tables together: those of 131,072 positions of heads of 128 in float32.
_MOST_BYTES = 1 << 26
# With fewer rows a table costs nothing, and a text may be longer than the config says, as in PyTorch.
_LEAST_POSITIONS = 1 << 12
# A cosine may differ by its last bit with its place in an array.
_SAME = 1e-6
# The operator's own rules of a head's size and of a table's width.
_HEAD_MULTIPLE, _HALF_MULTIPLE = 16, 8


@dataclass(frozen=True)
class Rotation:
    """Tables of cosines and sines, `[positions, half]`, and whether a pair of numbers stands side by side in a head."""

    cos: ir.Value
    sin: ir.Value
    is_interleaved: bool


class Rotary:
    """The rotations of a graph; its tables are made once for all layers.

    Args:
        longest: How many tokens a text may have, the best first: the first whose tables are not too large counts. Where
            there is none, nothing is changed.
    """

    def __init__(self, graph: ir.Graph, longest: Sequence[int]) -> None:
        self._graph, self._longest, self._n_bytes = graph, longest, 0
        self._found: dict[tuple[ir.Value, ...], tuple[ir.Value, ir.Value] | None] = {}

    def of(self, query: ir.Value, key: ir.Value) -> Rotation | None:
        """How `query` and `key`, `[batch, heads, sequence, size]`, were turned; None where they were not, or in a way
        that the operator does not know."""
        turned = [_turned(states) for states in (query, key)]
        if None in turned or query.shape[3] % _HEAD_MULTIPLE:
            return None
        nodes = [each.node for each in turned]
        if len({(*node.inputs[1:], _is_interleaved(node)) for node in nodes}) != 1:
            return None
        tables = self._tables(*nodes[0].inputs[1:])
        return None if tables is None else Rotation(*tables, _is_interleaved(nodes[0]))

    def _tables(self, places: ir.Value, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        key = (places, cos, sin)
        if key not in self._found:
            row_bytes = sum(each.shape[1] * each.dtype.itemsize for each in (cos, sin))
            fitting = (max(n, _LEAST_POSITIONS) for n in self._longest)
            n_rows = next((n for n in fitting if self._n_bytes + n * row_bytes <= _MOST_BYTES), None)
            by_token = n_rows and all(_is_by_token(self._graph, places, each, n_rows=n_rows) for each in (cos, sin))
            self._found[key] = self._made(cos, sin, n_rows=n_rows) if by_token else None
            self._n_bytes += n_rows * row_bytes if by_token else 0
        return self._found[key]

    def _made(self, *values: ir.Value, n_rows: int) -> tuple[ir.Value, ir.Value]:
        """The nodes of `values` once more, of the positions 0 to `n_rows` - 1."""
        read = dict.fromkeys(each for value in values for each in read_by(value))
        order = [node for node in self._graph if any(output in read for output in node.outputs)]
        *bounds, axis = (_constant(each) for each in (0, n_rows, 1, [0]))
        positions = ir.node("Range", bounds)
        rows = ir.node("Unsqueeze", [positions.outputs[0], axis])
        images = {each: rows.outputs[0] for each in read if each.is_graph_input() and each.name == _POSITIONS}
        made = [*(each.producer() for each in (*bounds, axis)), positions, rows]
        for node in order:
            operands = [images.get(value, value) for value in node.inputs]
            attributes, n_outputs = list(node.attributes.values()), len(node.outputs)
            copy = ir.Node(node.domain, node.op_type, operands, attributes, num_outputs=n_outputs)
            images |= dict(zip(node.outputs, copy.outputs, strict=True))
            made.append(copy)
        self._graph.insert_before(next(iter(self._graph)), made)
        for value in values:
            images[value].dtype = value.dtype
            images[value].shape = ir.Shape([n_rows, value.shape[1]])
        return tuple(images[value] for value in values)


def _constant(value: int | list[int]) -> ir.Value:
    return ir.node("Constant", [], attributes={"value": ir.tensor(np.array(value, np.int64))}).outputs[0]


@dataclass(frozen=True)
class _Turned:
    """The node that turns states, and the whole of what it turns, with heads in one axis or in two."""

    node: ir.Node
    source: ir.Value


def _turned(states: ir.Value) -> _Turned | None:
    """How `states`, `[batch, heads, sequence, size]`, were turned: all of a head, or its first numbers."""
    merged = before_heads(states)
    node, size = (states if merged is None else merged).producer(), states.shape[3]
    if _is_rotary(node):
        return _Turned(node, node.inputs[0]) if 2 * node.inputs[2].shape[-1] == size else None
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or merged is not None:
        return None
    first, rest = (value.producer() for value in node.inputs)
    if not _is_rotary(first) or rest is None or node.attributes.get_int("axis") not in (-1, 3):
        return None
    n_turned, sliced = 2 * first.inputs[2].shape[-1], first.inputs[0].producer()
    is_first = sliced is not None and _slice_of_heads(sliced) == (0, n_turned)
    same = is_first and _slice_of_heads(rest) == (n_turned, size) and sliced.inputs[0] is rest.inputs[0]
    return _Turned(first, rest.inputs[0]) if same else None


def _is_rotary(node: ir.Node | None) -> bool:
    """Whether `node` turns pairs of all numbers that it is given, by a table that the attention can read."""
    if node is None or (node.op_type, node.domain) != (_ROTARY, "com.microsoft") or len(node.inputs) != 4:
        return False
    half, attributes = node.inputs[2].shape[-1], node.attributes
    is_plain = attributes.get_float("scale", 1.0) == 1.0 and not attributes.get_int("is_packed_batching", 0)
    return is_plain and half % _HALF_MULTIPLE == 0 and attributes.get_int("rotary_embedding_dim", 0) in (0, 2 * half)


def _slice_of_heads(node: ir.Node) -> tuple[int, int] | None:
    """From where to where `node` cuts the last axis of `[batch, heads, sequence, size]`; None if it does not."""
    if node.op_type != "Slice" or node.inputs[0].shape is None or len(node.inputs[0].shape) != 4:
        return None
    given = [ir.convenience.get_const_tensor(value) for value in node.inputs[1:]]
    if len(given) < 3 or any(each is None or each.size != 1 for each in given):
        return None
    start, end, axis, *step = (int(each.numpy().reshape(-1)[0]) for each in given)
    size = node.inputs[0].shape[3]
    return (start, min(end, size)) if axis in (-1, 3) and step in ([], [1]) else None


def unturned(nodes: list[ir.Node], states: ir.Value) -> ir.Value:
    """What `states`, `[batch, heads, sequence, size]`, were before they were turned, `[batch, sequence, heads·size]`.

    Args:
        nodes: New nodes are appended to it.
    """
    before = _turned(states).source
    return before if len(before.shape) == 3 else merged_heads(nodes, before)


def _is_interleaved(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("interleaved", 0))


def _is_by_token(graph: ir.Graph, places: ir.Value, table: ir.Value, *, n_rows: int) -> bool:
    """Condition 2 for `table` `[tokens, half]`, of which each token reads the row that `places` `[batch, sequence]`
    names: in short texts and long ones, each gets what it has among all positions."""
    evaluate, place = Evaluator.of(graph, table), Evaluator.of(graph, places)
    if evaluate is None or place is None or {value.name for value in evaluate.inputs} - {_POSITIONS}:
        return False
    rng, whole = np.random.default_rng(0), np.arange(n_rows)[None]
    samples = [whole, np.zeros((1, 1), np.int64), np.array([[0, 1, 2], [1, 0, 0]])]
    samples += [rng.integers(0, most, (3, 5)) for most in (16, 256, n_rows)]
    found = [_rows_read(evaluate, place, ids) for ids in samples]
    if any(rows is None for rows in found):
        return False
    pairs = zip(samples, found, strict=True)
    return all(np.allclose(found[0][0][ids], rows, rtol=0, atol=_SAME) for ids, rows in pairs)


def _rows_read(evaluate: Evaluator, place: Evaluator, ids: np.ndarray) -> np.ndarray | None:
    """`[batch, sequence, half]`: the rows that the tokens at `ids` read; None if that cannot be told."""
    table, rows = (each(_sizes(ids), {_POSITIONS: ids}) for each in (evaluate, place))
    if table is None or rows is None or table.ndim != 2 or rows.shape != ids.shape:
        return None
    return table[rows] if rows.size and rows.min() >= 0 and rows.max() < len(table) else None


def _sizes(ids: np.ndarray) -> dict[str, int]:
    rows, tokens = ids.shape
    return {
        "batch_size": rows, "sequence_length": tokens, "past_sequence_length": 0, "total_sequence_length": tokens,
    }  # fmt: skip
