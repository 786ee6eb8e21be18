"""Insert nodes into a traced graph, and give a value the axis of rows that adapters are told apart by."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lora_export.errors import InputRefused

_FACTORS = re.compile(r"[^\w.]+")


class Tape:
    """Appends nodes right after a given node, keeping their order; propagates the module path for diagnostics. Without
    a node, they come at the graph's end and are of no module."""

    def __init__(self, graph: ir.Graph, after: ir.Node | None) -> None:
        self._graph, self._last = graph, after
        self._scopes = {} if after is None else dict(after.metadata_props)

    def op(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        shape,
        dtype: ir.DataType | None,
        *,
        domain: str = "",
        **attributes,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, metadata_props=dict(self._scopes))
        node.outputs[0].shape = None if shape is None else ir.Shape(shape)
        node.outputs[0].dtype = dtype
        self._put(node)
        return node.outputs[0]

    def split(self, whole: ir.Value, sizes: Sequence[int]) -> tuple[ir.Value, ...]:
        """`whole`, split along its last axis into parts of `sizes`."""
        node = ir.node(
            "Split", [whole, self.ints(list(sizes))], attributes={"axis": -1}, num_outputs=len(sizes),
            metadata_props=dict(self._scopes),
        )  # fmt: skip
        for part, size in zip(node.outputs, sizes, strict=True):
            part.dtype = whole.dtype
            if whole.shape is not None:
                part.shape = ir.Shape([*list(whole.shape)[:-1], size])
        self._put(node)
        return tuple(node.outputs)

    def _put(self, node: ir.Node) -> None:
        if self._last is None:
            self._graph.append(node)
        else:
            self._graph.insert_after(self._last, node)
        self._last = node

    def constant(self, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array)
        return self.op("Constant", [], list(array.shape), tensor.dtype, value=tensor)

    def ints(self, values: list[int]) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: int) -> ir.Value:
        return self.constant(np.array(value, np.int64))


def batch_input(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The graph input whose rows `value` holds: a dual encoder has texts and images, each with a batch of its own."""
    leading = factors_of(value)
    ranked = [entry for entry in graph.inputs if entry.shape is not None and len(entry.shape)]
    return next((entry for entry in ranked if str(entry.shape[0]) in leading), ranked[0])


def factors_of(value: ir.Value) -> frozenset[str]:
    """The sizes that the first axis of `value` is made of: batch and sequence of `batch*sequence`."""
    if value.shape is None or not len(value.shape):
        return frozenset()
    return frozenset(_FACTORS.split(str(value.shape[0])))


def has_row_axis(graph: ir.Graph, value: ir.Value) -> bool:
    """Whether `value` is `[batch, tokens, features]`."""
    return value.shape is not None and len(value.shape) == 3 and value.shape[0] == batch_input(graph, value).shape[0]


def with_row_axis(graph: ir.Graph, tape: Tape, value: ir.Value, *, features: int, module: str) -> ir.Value:
    """`value`, a module's input or output of `features` numbers a token, as `[batch, tokens, features]`.

    1. Already so: as it is.
    2. Flattened (`[batch·sequence, in]`, GPT-2), pooled (`[batch, in]`), windowed or with more axes: reshaped, rows
       being contiguous.
    3. The batch in another place than the first axis: refused, rows are not contiguous.

    What all rows share has no such axis, see `shared_by_rows.py`.
    """
    if has_row_axis(graph, value):
        return value
    rows = batch_input(graph, value)
    batch = str(getattr(rows.shape[0], "value", ""))
    if not batch or batch not in factors_of(value):
        raise InputRefused(
            "A module's input does not start with the batch axis, so adapters cannot be told apart by row",
            where=module,
            expected="[batch, …, in_features]",
            found=str(value.shape),
            next_step="merge the adapter instead",
        )
    size = tape.op("Shape", [rows], [1], ir.DataType.INT64, start=0, end=1)
    shape = tape.op("Concat", [size, tape.ints([-1, features])], [3], ir.DataType.INT64, axis=0)
    return tape.op("Reshape", [value, shape], [rows.shape[0], None, features], value.dtype)


def reshaped_as(tape: Tape, value: ir.Value, like: ir.Value, *, dims: list | None) -> ir.Value:
    """`value` in the shape that `like` has when the graph runs; `dims` is what is known of it."""
    shape = tape.op("Shape", [like], None, ir.DataType.INT64)
    return tape.op("Reshape", [value, shape], dims, value.dtype)


def put_in_place_of(graph: ir.Graph, old: ir.Value, new: ir.Value, *, users: tuple) -> None:
    """Let `users` (of `old`, from before `new` was made) read `new`, which takes over the name of a graph output."""
    for user, index in users:
        user.replace_input_with(index, new)
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_without_adapter"
        new.name, new.type = name, old.type
        graph.outputs[list(graph.outputs).index(old)] = new
