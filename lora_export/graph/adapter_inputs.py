"""Give a traced graph the optional inputs that carry adapters.

Contract (`y`, `x` are a module's output and input, `i` a row of the batch):

1. LoRA pair: `y[i] = W x[i] + (x[i] A[i]) B[i]`, A `[rows, in, rank]`, B `[rows, rank, out]`, scale folded into B.
2. Replaced Linear: `y[i] = x[i] W[i] + b[i]`, W `[rows, in, out]`, b `[rows, 1, out]`; `out` may differ from the
   base's, so nothing downstream keeps a static size for it.

`rows` is 1 or the batch size. Only MatMul, Add, Mul-free shape arithmetic: stock operators on any provider. This pass
owns the model it is given and must run before fusion, which drops the module paths. Inputs get no default here: a
constant default would be packed by the fusions as if it were a weight (`attach_defaults` runs after them).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.contract import AdapterInput, AdapterInputKind
from lora_export.errors import InputRefused
from lora_export.graph.sites import Site, find_sites
from lora_export.recipe import RECIPE, Recipe

ROWS = "rows"


@dataclass(frozen=True)
class SiteChoice:
    """What adapters may bring to the graph: modules with a LoRA pair, and modules replaced as a whole."""

    lora_modules: tuple[str, ...]
    replaced_modules: tuple[str, ...]


def add_adapter_inputs(model: ir.Model, choice: SiteChoice) -> tuple[ir.Model, tuple[AdapterInput, ...]]:
    """Add the inputs of `choice` to `model` (changed in place and returned) and describe them.

    Raises:
        InputRefused: A module is no linear map of this graph, or its input has an unsupported layout.
    """
    graph = model.graph
    described: list[AdapterInput] = []
    lora_sites = find_sites(graph, choice.lora_modules)
    replaced_sites = find_sites(graph, choice.replaced_modules)
    for module, sites in lora_sites.items():
        inputs = _lora_inputs(sites[0])
        for site in sites:
            _add_pair(graph, site, *inputs)
        described += _register(graph, module, (AdapterInputKind.LORA_A, AdapterInputKind.LORA_B), inputs)
    for module, sites in replaced_sites.items():
        bias = _bias_of(sites[0])
        inputs = _replacement_inputs(sites[0], bias)
        for site in sites:
            _replace_linear(graph, site, inputs)
        described += _register(graph, module, (AdapterInputKind.WEIGHT, AdapterInputKind.BIAS), inputs)
    return model, tuple(described)


def _register(
    graph: ir.Graph, module: str, kinds: Iterable[AdapterInputKind], values: Iterable[ir.Value]
) -> list[AdapterInput]:
    described = []
    for kind, value in zip(kinds, values, strict=False):
        graph.inputs.append(value)
        dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        described.append(AdapterInput(value.name, module, kind, str(value.dtype.numpy()), dims))
    return described


def _graph_input(name: str, dtype: ir.DataType, dims: list) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


def _lora_inputs(site: Site) -> tuple[ir.Value, ir.Value]:
    # One rank symbol a module: adapters differ in rank by module, and ONNX Runtime reuses buffers by symbol.
    rank, dtype = f"{site.module}.rank", site.weight.dtype
    return (
        _graph_input(f"{site.module}.lora_A.weight", dtype, [ROWS, site.in_features, rank]),
        _graph_input(f"{site.module}.lora_B.weight", dtype, [ROWS, rank, site.out_features]),
    )


def _replacement_inputs(site: Site, bias: ir.Value | None) -> tuple[ir.Value, ...]:
    out, dtype = f"{site.module}.out_features", site.weight.dtype
    weight = _graph_input(f"{site.module}.weight", dtype, [ROWS, site.in_features, out])
    if bias is None:
        return (weight,)
    return weight, _graph_input(f"{site.module}.bias", dtype, [ROWS, 1, out])


class _Tape:
    """Appends nodes right after a given node, keeping their order; propagates the module path for diagnostics."""

    def __init__(self, graph: ir.Graph, after: ir.Node) -> None:
        self._graph, self._last, self._scopes = graph, after, dict(after.metadata_props)

    def op(self, op_type: str, inputs: list[ir.Value], shape, dtype: ir.DataType | None, **attributes) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, metadata_props=self._scopes)
        node.outputs[0].shape = None if shape is None else ir.Shape(shape)
        node.outputs[0].dtype = dtype
        self._graph.insert_after(self._last, node)
        self._last = node
        return node.outputs[0]

    def ints(self, values: list[int]) -> ir.Value:
        tensor = ir.tensor(np.array(values, np.int64))
        return self.op("Constant", [], [len(values)], ir.DataType.INT64, value=tensor)


def _batch_input(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The graph input whose rows `value` holds: a dual encoder has texts and images, each with a batch of its own."""
    leading = "" if value.shape is None or not len(value.shape) else str(value.shape[0])
    return next((entry for entry in graph.inputs if str(entry.shape[0]) in leading), graph.inputs[0])


def _has_row_axis(batch: object, value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 3 and value.shape[0] == batch


def _with_row_axis(graph: ir.Graph, tape: _Tape, site: Site) -> ir.Value:
    """The site's input as `[batch, tokens, in]`.

    1. Already so: as it is.
    2. Flattened (`[batch·sequence, in]`, GPT-2), pooled (`[batch, in]`), windowed or with more axes: reshaped, rows
       being contiguous.
    3. The batch in another place than the first axis: refused, rows are not contiguous.
    """
    value = site.input
    rows = _batch_input(graph, value)
    if _has_row_axis(rows.shape[0], value):
        return value
    batch = str(getattr(rows.shape[0], "value", ""))
    if value.shape is None or batch not in str(value.shape[0]):
        raise InputRefused(
            "A module's input does not start with the batch axis, so adapters cannot be told apart by row",
            where=site.module,
            expected="[batch, …, in_features]",
            found=str(value.shape),
            next_step="merge the adapter instead",
        )
    size = tape.op("Shape", [rows], [1], ir.DataType.INT64, start=0, end=1)
    tail = tape.ints([-1, site.in_features])
    shape = tape.op("Concat", [size, tail], [3], ir.DataType.INT64, axis=0)
    dims = [rows.shape[0], None, site.in_features]
    return tape.op("Reshape", [value, shape], dims, value.dtype)


def _add_pair(graph: ir.Graph, site: Site, a: ir.Value, b: ir.Value) -> None:
    output, users = site.output, tuple(site.output.uses())
    is_graph_output = output.is_graph_output()
    dims = _output_dims(site)
    tape = _Tape(graph, site.node)
    x = _with_row_axis(graph, tape, site)
    # The broadcast of `rows` against the batch is the batch, which shape inference cannot know.
    rows_and_tokens = list(x.shape[:2])
    low = tape.op("MatMul", [x, a], [*rows_and_tokens, a.shape[2]], output.dtype or x.dtype)
    delta = tape.op("MatMul", [low, b], [*rows_and_tokens, site.out_features], x.dtype)
    if x is not site.input:
        like = tape.op("Shape", [output], None, ir.DataType.INT64)
        delta = tape.op("Reshape", [delta, like], dims, x.dtype)
    total = tape.op("Add", [output, delta], dims, x.dtype)
    for user, index in users:
        user.replace_input_with(index, total)
    if is_graph_output:
        _move_graph_output(graph, output, total)


def _output_dims(site: Site) -> list | None:
    if site.output.shape is not None:
        return list(site.output.shape)
    if site.input.shape is None:
        return None
    return [*list(site.input.shape)[:-1], site.out_features]


def _move_graph_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    name, old.name = old.name, f"{old.name}_without_adapter"
    new.name, new.type = name, old.type
    graph.outputs[list(graph.outputs).index(old)] = new


def _bias_of(site: Site) -> ir.Value | None:
    if site.node.op_type == "Gemm":
        return site.node.inputs[2] if len(site.node.inputs) > 2 else None
    add = _bias_add(site)
    return None if add is None else next(v for v in add.inputs if v is not site.output)


def _bias_add(site: Site) -> ir.Node | None:
    for node, _ in site.output.uses():
        if node.op_type == "Add" and any(v.is_initializer() and v.name == f"{site.module}.bias" for v in node.inputs):
            return node
    return None


def _replace_linear(graph: ir.Graph, site: Site, inputs: tuple[ir.Value, ...]) -> None:
    add = _bias_add(site) if site.node.op_type == "MatMul" else None
    last = add or site.node
    replaced, users = last.outputs[0], tuple(last.outputs[0].uses())
    is_graph_output = replaced.is_graph_output()
    tape = _Tape(graph, last)
    x = _with_row_axis(graph, tape, site)
    out = inputs[0].shape[2]
    y = tape.op("MatMul", [x, inputs[0]], [*list(x.shape[:2]), out], x.dtype)
    if len(inputs) == 2:
        y = tape.op("Add", [y, inputs[1]], [*list(x.shape[:2]), out], x.dtype)
    if x is not site.input:
        leading = tape.op("Shape", [site.input], None, ir.DataType.INT64, start=0, end=-1)
        shape = tape.op("Concat", [leading, tape.ints([-1])], None, ir.DataType.INT64, axis=0)
        y = tape.op("Reshape", [y, shape], [*list(site.input.shape)[:-1], out], x.dtype)
    for user, index in users:
        user.replace_input_with(index, y)
    if is_graph_output:
        _move_graph_output(graph, replaced, y)
    _forget_last_axis_downstream(y, site.out_features, out)


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


def attach_defaults(graph: ir.Graph, adapter_inputs: Iterable[AdapterInput]) -> None:
    """Make every adapter input optional, in place (after fusion).

    A LoRA input gets a rank-0 constant. A replaced Linear's input becomes an unbound initializer made of the base's
    own tensor of the same name, which is bound like any other weight.
    """
    by_name = {value.name: value for value in graph.inputs}
    for entry in adapter_inputs:
        value = by_name[entry.name]
        if entry.kind in (AdapterInputKind.LORA_A, AdapterInputKind.LORA_B):
            shape = tuple(dim if isinstance(dim, int) else int(dim == ROWS) for dim in entry.dims)
            value.const_value = ir.tensor(np.zeros(shape, value.dtype.numpy()), name=value.name)
        else:
            recipe = Recipe((entry.name,), transposed=entry.kind is AdapterInputKind.WEIGHT)
            value.metadata_props[RECIPE] = recipe.to_json()
        graph.initializers[value.name] = value
