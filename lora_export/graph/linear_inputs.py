"""Adapter inputs of linear modules: pairs, DoRA's gain, biases, and modules replaced as a whole.

`y[i] = (W x[i]) ⊙ g[i] + (x[i] A[i]) B[i] + b[i]`, of which a module has the parts that an adapter needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lora_export.errors import InputRefused
from lora_export.graph.sites import Site
from lora_export.graph.tape import Tape, put_in_place_of, with_row_axis


def add_pair(
    graph: ir.Graph, site: Site, a: ir.Value, b: ir.Value, gain: ir.Value | None, gate: ir.Value | None = None
) -> None:
    """Add `(x A) B` to the output of `site`, which is multiplied by `gain` first; `gate` multiplies `x A`."""
    if gain is not None:
        _take_bias_out(graph, site)
    output, users = site.output, tuple(site.output.uses())
    dims = _output_dims(site)
    tape = Tape(graph, site.node)
    x = with_row_axis(graph, tape, site.input, site.in_features, site.module)
    # The broadcast of `rows` against the batch is the batch, which shape inference cannot know.
    rows_and_tokens = list(x.shape[:2])
    low = tape.op("MatMul", [x, a], [*rows_and_tokens, a.shape[2]], output.dtype or x.dtype)
    if gate is not None:
        low = tape.op("Mul", [low, gate], list(low.shape), low.dtype)
    delta = tape.op("MatMul", [low, b], [*rows_and_tokens, site.out_features], x.dtype)
    base = output
    if gain is not None:
        by_row = [*rows_and_tokens, site.out_features]
        base = output if x is site.input else _reshaped(graph, tape, output, site)
        base = tape.op("Mul", [base, gain], by_row, x.dtype)
        total = tape.op("Add", [base, delta], by_row, x.dtype)
        total = total if x is site.input else _as(tape, total, output, dims)
    else:
        delta = delta if x is site.input else _as(tape, delta, output, dims)
        total = tape.op("Add", [base, delta], dims, x.dtype)
    put_in_place_of(graph, output, total, users)


def _take_bias_out(graph: ir.Graph, site: Site) -> None:
    """Turn a `Gemm` with a bias into one without and an `Add`: a gain multiplies the product, not the bias."""
    if site.node.op_type != "Gemm" or not has_bias(site):
        return
    output, users, bias = site.output, tuple(site.output.uses()), site.node.inputs[2]
    site.node.replace_input_with(2, None)
    total = Tape(graph, site.node).op("Add", [output, bias], _output_dims(site), output.dtype)
    put_in_place_of(graph, output, total, users)


def _reshaped(graph: ir.Graph, tape: Tape, output: ir.Value, site: Site) -> ir.Value:
    if output.shape is None:
        output.shape = ir.Shape(_output_dims(site))
    return with_row_axis(graph, tape, output, site.out_features, site.module)


def _as(tape: Tape, value: ir.Value, like: ir.Value, dims: list | None) -> ir.Value:
    shape = tape.op("Shape", [like], None, ir.DataType.INT64)
    return tape.op("Reshape", [value, shape], dims, value.dtype)


def _output_dims(site: Site) -> list | None:
    if site.output.shape is not None:
        return list(site.output.shape)
    if site.input.shape is None:
        return None
    return [*list(site.input.shape)[:-1], site.out_features]


def uses_of_bias(graph: ir.Graph, module: str) -> tuple[ir.Value | None, list[ir.Node]]:
    """The bias of `module` and the nodes that add it, several where layers share weights; None without a bias."""
    value = graph.initializers.get(f"{module}.bias")
    return value, [] if value is None else [node for node, _ in value.uses()]


def add_bias_input(graph: ir.Graph, module: str, bias: ir.Value, sites: Sequence[Site]) -> None:
    """Let `bias` `[rows, 1, out]` take the place of the module's own bias; with none, it is added to the output.

    1. `Add(y, bias)` reads the input instead.
    2. A bias inside `Gemm` or `LayerNormalization` is taken out and added after it.

    Args:
        sites: Where the module is computed, for one without a bias.

    Raises:
        InputRefused: The bias is inside another operator.
    """
    own, users = uses_of_bias(graph, module)
    for node in users:
        if node.op_type == "Add":
            output = next(value for value in node.inputs if value is not own)
            if output.shape is None and node.outputs[0].shape is not None:
                output.shape = ir.Shape(list(node.outputs[0].shape))  # adding a bias keeps it
            _add_bias(graph, module, bias, node, output, node.outputs[0])
        elif node.op_type in ("Gemm", "LayerNormalization"):
            node.replace_input_with(list(node.inputs).index(own), None)
            _add_bias(graph, module, bias, node, node.outputs[0], node.outputs[0])
        else:
            raise InputRefused(
                "A module's bias is part of an operator that takes one for the whole batch only",
                where=f"{module}.bias ({node.op_type})",
                next_step="merge the adapter instead",
            )
    for site in () if users else sites:
        if site.output.shape is None:
            site.output.shape = ir.Shape(_output_dims(site))
        _add_bias(graph, module, bias, site.node, site.output, site.output)


def _add_bias(
    graph: ir.Graph, module: str, bias: ir.Value, after: ir.Node, output: ir.Value, replaced: ir.Value
) -> None:
    """Add `bias` to `output`, the result of or an input of `after`, in place of `replaced`."""
    users = tuple(replaced.uses())
    tape = Tape(graph, after)
    y = with_row_axis(graph, tape, output, bias.shape[2], module)
    total = tape.op("Add", [y, bias], list(y.shape), y.dtype or bias.dtype)
    if y is not output:
        total = _as(tape, total, output, None if output.shape is None else list(output.shape))
    put_in_place_of(graph, replaced, total, users)


def replace_linear(graph: ir.Graph, site: Site, inputs: tuple[ir.Value, ...]) -> None:
    """Compute `site` from `inputs`, weight `[rows, in, out]` and bias `[rows, 1, out]`, instead of the base's own."""
    add = _bias_add(site) if site.node.op_type == "MatMul" else None
    last = add or site.node
    replaced, users = last.outputs[0], tuple(last.outputs[0].uses())
    tape = Tape(graph, last)
    x = with_row_axis(graph, tape, site.input, site.in_features, site.module)
    out = inputs[0].shape[2]
    y = tape.op("MatMul", [x, inputs[0]], [*list(x.shape[:2]), out], x.dtype)
    if len(inputs) == 2:
        y = tape.op("Add", [y, inputs[1]], [*list(x.shape[:2]), out], x.dtype)
    if x is not site.input:
        leading = tape.op("Shape", [site.input], None, ir.DataType.INT64, start=0, end=-1)
        shape = tape.op("Concat", [leading, tape.ints([-1])], None, ir.DataType.INT64, axis=0)
        y = tape.op("Reshape", [y, shape], [*list(site.input.shape)[:-1], out], x.dtype)
    put_in_place_of(graph, replaced, y, users)
    _forget_last_axis_downstream(y, site.out_features, out)


def _bias_add(site: Site) -> ir.Node | None:
    for node, _ in site.output.uses():
        if node.op_type == "Add" and any(v.is_initializer() and v.name == f"{site.module}.bias" for v in node.inputs):
            return node
    return None


def has_bias(site: Site) -> bool:
    """Whether the linear map of `site` has a bias of its own."""
    if site.node.op_type == "Gemm":
        return len(site.node.inputs) > 2 and site.node.inputs[2] is not None
    return _bias_add(site) is not None


def _forget_last_axis_downstream(value: ir.Value, static: int, symbol: object) -> None:
    """Let what is computed from a replaced head have its variable size instead of the base's."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.shape is not None and len(current.shape) and current.shape[-1] == static:
            current.shape = ir.Shape([*list(current.shape)[:-1], symbol])
        for user, _ in current.uses():
            pending.extend(user.outputs)
