"""What all rows of a batch share, once adapters tell the rows apart: DeBERTa's projections of its table of positions.

A module that is applied to a table, `[1, tokens, in]`, has one result for all rows. With a pair it has a result for
each row. The nodes that read the result were traced for a first axis of 1, or of k where heads were moved into it:

1. `Transpose` that leaves the first axis, `Identity`, `Cast`, arithmetic and products with what has no rows: as is.
2. Arithmetic and products with the batch's own values: they broadcast, and have the batch's axis from there on.
3. `Reshape`: its first size is multiplied by the rows.
4. `Expand` to the same shape: dropped.
5. `Tile` of `[k, …]` to `[batch·k, …]`: each row is repeated, not the whole.

Anything else may mix rows, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import onnx_ir as ir

from lora_export.contract import ROWS
from lora_export.errors import InputRefused
from lora_export.graph.tape import Tape, batch_input, put_in_place_of

_LEFT_AS_IS = ("Identity", "Cast")
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")


@dataclass(frozen=True)
class _Shared:
    """A value whose first axis is `rows · per_row`."""

    value: ir.Value
    per_row: int


def is_shared_by_rows(graph: ir.Graph, value: ir.Value) -> bool:
    """Whether `value` is `[1, tokens, features]`, or `[rows, …]` by this pass, and has no axis of the batch."""
    if value.shape is None or len(value.shape) != 3:
        return False
    return str(value.shape[0]) in ("1", ROWS) and not _has_batch(graph, value)


def let_rows_through(graph: ir.Graph, value: ir.Value, module: str) -> None:
    """Give `value`, the result of `module` with its adapter, and what is computed from it the axis of rows, in place.

    Raises:
        InputRefused: What reads it may mix rows.
    """
    if value.is_graph_output():
        _refuse(module, "an output of the graph")
    value.shape = ir.Shape([ROWS, *list(value.shape)[1:]])
    pending = [_Shared(value, 1)]
    while pending:
        shared = pending.pop()
        for node, index in tuple(shared.value.uses()):
            found = _pass(graph, node, index, shared=shared)
            if found is None or any(each.value.is_graph_output() for each in found):
                _refuse(module, node.op_type)
            pending.extend(found)


def _refuse(module: str, reader: str) -> NoReturn:
    raise InputRefused(
        "A module's result is the same for all rows of the batch, and what reads it may mix rows",
        where=f"{module} ({reader})",
        expected="reshapes, transposes, arithmetic and products, or a repetition over the batch",
        next_step="merge the adapter instead",
    )


def refuse_gate(module: str) -> None:
    """Raise InputRefused: `module`, of an activated adapter, is applied to a table and not to the text's tokens."""
    raise InputRefused(
        "An activated adapter has a pair on a module that is also applied to what is no token of the text",
        where=module,
        expected="modules that are applied to the text's tokens",
        next_step="train the adapter without this module among its targets",
    )


def _pass(graph: ir.Graph, node: ir.Node, index: int, *, shared: _Shared) -> list[_Shared] | None:
    """What has the axis of rows after `node`, nothing if that is the batch's by then; None if `node` may mix rows."""
    result = node.outputs[0]
    if ROWS in _first(result):  # it has the axis already, by another of its inputs
        return []
    if node.op_type in _LEFT_AS_IS or (node.op_type == "Transpose" and node.attributes.get_ints("perm")[0] == 0):
        return _with_rows(result, shared.per_row, shared.value if node.op_type in _LEFT_AS_IS else result)
    if node.op_type in (*_ARITHMETIC, "MatMul"):
        return _broadcast(graph, node, index, shared=shared)
    if node.op_type == "Reshape" and index == 0:
        return _reshape(graph, node, shared)
    if node.op_type == "Expand" and index == 0 and _is_all_ones(node.inputs[1]):
        result.replace_all_uses_with(shared.value)
        graph.remove(node, safe=True)
        return [shared]
    if node.op_type == "Tile" and index == 0:
        return _repeat(graph, node, shared)
    return None


def _with_rows(result: ir.Value, per_row: int, like: ir.Value) -> list[_Shared]:
    """`result`, of the shape of `like` but for its first axis."""
    if like.shape is not None:
        first = ROWS if per_row == 1 else f"{per_row}*{ROWS}"
        result.shape = ir.Shape([first, *list(like.shape)[1:]])
    return [_Shared(result, per_row)]


def _broadcast(graph: ir.Graph, node: ir.Node, index: int, *, shared: _Shared) -> list[_Shared] | None:
    other, result = node.inputs[1 - index], node.outputs[0]
    if other.shape is None or result.shape is None or shared.value.shape is None:
        return None
    rank, other_rank = len(shared.value.shape), len(other.shape)
    is_linear = node.op_type == "MatMul" and other_rank == 2 and index == 0
    if other is shared.value or is_linear or (node.op_type != "MatMul" and other_rank < rank):
        return _with_rows(result, shared.per_row, result)
    if other_rank != rank or shared.per_row != 1:
        return None
    if _first(other) in ("1", ROWS):
        return _with_rows(result, 1, result)
    return [] if _first(other) == _batch(graph, other) else None


def _reshape(graph: ir.Graph, node: ir.Node, shared: _Shared) -> list[_Shared] | None:
    result = node.outputs[0]
    if result.shape is None or not isinstance(result.shape[0], int):
        return None
    per_row = result.shape[0]
    tape = Tape(graph, node)
    first = tape.op("Mul", [_rows(tape, shared), tape.ints([per_row])], [1], ir.DataType.INT64)
    others = tape.op("Slice", [node.inputs[1], tape.ints([1]), tape.ints([len(result.shape)])], None, first.dtype)
    shape = tape.op("Concat", [first, others], [len(result.shape)], ir.DataType.INT64, axis=0)
    reshaped = tape.op("Reshape", [shared.value, shape], None, result.dtype)
    put_in_place_of(graph, result, reshaped, users=tuple(result.uses()))
    graph.remove(node, safe=True)
    return _with_rows(reshaped, per_row, result)


def _repeat(graph: ir.Graph, node: ir.Node, shared: _Shared) -> list[_Shared] | None:
    """`[rows·k, …]` as `[batch·k, …]`, the rows being 1 or the batch."""
    result, before = node.outputs[0], shared.value.shape
    if result.shape is None or before is None:
        return None
    batch = _batch(graph, result)
    once = batch if shared.per_row == 1 else f"{shared.per_row}*{batch}"
    if _first(result) != once or list(result.shape)[1:] != list(before)[1:]:
        return None
    tape, rank = Tape(graph, node), len(before)
    tail = tape.op("Shape", [shared.value], [rank - 1], ir.DataType.INT64, start=1)
    by_row = [_rows(tape, shared), tape.ints([shared.per_row]), tail]
    parted = tape.op("Reshape", [shared.value, _joined(tape, by_row)], None, result.dtype)
    size = tape.op("Shape", [batch_input(graph, result)], [1], ir.DataType.INT64, start=0, end=1)
    spread = tape.op("Expand", [parted, _joined(tape, [size, tape.ints([1] * rank)])], None, result.dtype)
    first = tape.op("Mul", [size, tape.ints([shared.per_row])], [1], ir.DataType.INT64)
    repeated = tape.op("Reshape", [spread, _joined(tape, [first, tail])], list(result.shape), result.dtype)
    put_in_place_of(graph, result, repeated, users=tuple(result.uses()))
    graph.remove(node, safe=True)
    return []


def _rows(tape: Tape, shared: _Shared) -> ir.Value:
    """The number of rows that `shared` has when the graph runs, `[1]`."""
    size = tape.op("Shape", [shared.value], [1], ir.DataType.INT64, start=0, end=1)
    return size if shared.per_row == 1 else tape.op("Div", [size, tape.ints([shared.per_row])], [1], size.dtype)


def _joined(tape: Tape, parts: list[ir.Value]) -> ir.Value:
    return tape.op("Concat", parts, None, ir.DataType.INT64, axis=0)


def _is_all_ones(value: ir.Value) -> bool:
    constant = ir.convenience.get_const_tensor(value)
    return constant is not None and bool(np.all(constant.numpy() == 1))


def _first(value: ir.Value) -> str:
    return "" if value.shape is None or not len(value.shape) else str(value.shape[0])


def _batch(graph: ir.Graph, value: ir.Value) -> str:
    return str(batch_input(graph, value).shape[0])


def _has_batch(graph: ir.Graph, value: ir.Value) -> bool:
    first = [entry.shape[0] for entry in graph.inputs if entry.shape is not None and len(entry.shape)]
    batches = {str(dim) for dim in first if not isinstance(dim, int)} - {ROWS}
    return any(batch in str(dim) for batch in batches for dim in value.shape)
