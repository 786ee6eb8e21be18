"""A graph that another tool wrote, brought into the form that this room's passes take.

ONNX Runtime GenAI's model builder, Optimum and `torch.onnx.export` name inputs and outputs as Transformers does, and
nodes and weights as they like. Which weight is whose is found in `matching.py`, from the numbers.

`GroupQueryAttention` wants a row's tokens side by side. Some tools leave that to their host. Here nodes at the graph's
entry and exit order the tokens (`token_order.py`), so that padding may stand on either side, as in our own graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from lora_export.contract import PAST, PRESENT
from lora_export.errors import InputRefused, some_of
from lora_export.graph.attention_node import GROUPED
from lora_export.graph.grouped_projections import ProjectionPacker
from lora_export.graph.head import last_hidden
from lora_export.graph.token_order import TokenOrder
from lora_export.quiet import quiet

_OF_ADAPTERS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude", ".token_ids", ".token_delta", "lora_gate")
# What adapters are added to: their shapes say where the batch is.
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")
# GroupQueryAttention's inputs: key, value, seqlens_k, total_sequence_length.
_KEY, _VALUE, _LENGTHS, _TOTAL = 1, 2, 5, 6
# `Shape` has had its bounds since then, which the passes use; the oldest of their operators.
_OLDEST_OPSET = 15
# Of a tensor that the tool may read: sizes, and the bias of a product.
_SIZES_BYTES = 1 << 20
_FLOATS = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}  # fmt: skip


def open_given(path: Path) -> ir.Model:
    """The graph in the ONNX file `path`; its weights are read when they are asked for.

    Raises:
        InputRefused: It is no ONNX graph.
    """
    try:
        model = ir.load(path)
    except Exception as error:
        raise InputRefused(
            "The given graph is no ONNX file",
            where=str(path),
            found=f"{type(error).__name__}: {error}"[:200],
            next_step="give the .onnx file, or its folder, as the other tool wrote it",
        ) from error
    if not len(model.graph):
        raise InputRefused("The given graph is empty", where=str(path), next_step="fetch the file again")
    for name in _names(model):
        if isinstance(name, bytes):  # protobuf gives what is no UTF-8 as it is
            raise InputRefused(
                "The given graph has a name that is no text",
                where=str(path),
                found=repr(name)[:80],
                next_step="fetch the file again",
            )
    return model


def _names(model: ir.Model) -> Iterator[str | bytes | None]:
    """Of all values, nodes, operators and domains."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()))
        for node in graph:
            yield from (node.name, node.op_type, node.domain)
            yield from (value.name for value in (*node.inputs, *node.outputs) if value is not None)


def external_files(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """The files that hold the weights of `model`, which was read from `path`.

    Raises:
        InputRefused: One of them is not there, is cut off, or lies elsewhere.
    """
    graphs = [model.graph, *model.graph.subgraphs()]
    ends: dict[str, int] = {}
    for tensor in (value.const_value for graph in graphs for value in graph.initializers.values()):
        if isinstance(tensor, ir.ExternalTensor):
            end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
            ends[tensor.location] = max(ends.get(tensor.location, 0), end)
    outside = [place for place in ends if Path(place).is_absolute() or ".." in Path(place).parts]
    sizes = {path.parent / place: end for place, end in ends.items() if place not in outside}
    missing = [str(file) for file in sizes if not file.is_file()]
    if missing or outside:
        raise InputRefused(
            "The given graph's weights are not beside it",
            where=str(path),
            expected=some_of(missing, 4) or "files in the graph's folder or below it",
            found=None if missing else some_of(outside, 4),
            next_step="fetch the whole folder that the other tool wrote",
        )
    for file, end in sizes.items():
        if file.stat().st_size < end:
            raise InputRefused(
                "A file of the given graph's weights is cut off",
                where=str(file),
                expected=f"{end} bytes or more",
                found=f"{file.stat().st_size} bytes",
                next_step="fetch it again",
            )
    return tuple(sizes)


def float_dtype(model: ir.Model) -> str:
    """The dtype of most of the graph's floats.

    Raises:
        InputRefused: It has none.
    """
    sizes: dict[ir.DataType, int] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype in _FLOATS:
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.const_value.size
    if not sizes:
        raise InputRefused("The given graph holds no weights in floats", next_step="give the graph of a model")
    return _FLOATS[max(sizes, key=sizes.__getitem__)]


def normalized(
    model: ir.Model, where: Path, *, head_size: int | None = None, image: tuple[int, int, int] | None = None
) -> ir.Model:
    """`model` (changed in place and returned) as the passes take it: no functions, weights as initializers, shapes.

    Args:
        head_size: Of a decoder's cache, where the graph leaves it open.
        image: Channels, height and width of the base's images, where the graph leaves them open.

    Raises:
        InputRefused: It is of an operator set without what the passes use.
    """
    opset = model.graph.opset_imports.get("", 0)
    if opset < _OLDEST_OPSET:
        raise InputRefused(
            "The given graph is of an operator set that is too old for adapter inputs",
            where=str(where),
            expected=f"opset {_OLDEST_OPSET} or newer",
            found=f"opset {opset}",
            next_step="export it again with a newer one (Optimum: --opset 17), or convert it (onnx.version_converter)",
        )
    taken = [value.name for value in model.graph.inputs if value.name.endswith(_OF_ADAPTERS)]
    if taken:
        raise InputRefused(
            "The given graph has inputs for adapters already",
            where=str(where),
            found=some_of(taken, 4),
            next_step="give the graph without them; to a dynamic export of this tool `lora-export add` adds adapters",
        )
    if model.functions:
        common_passes.InlinePass()(model)
    common_passes.LiftSubgraphInitializersToMainGraphPass()(model)
    common_passes.LiftConstantsToInitializersPass()(model)
    common_passes.RemoveInitializersFromInputsPass()(model)
    common_passes.IdentityEliminationPass()(model)  # equal weights go by one initializer and an Identity
    products = [node for node in model.graph if node.op_type in _PRODUCTS]
    if not all(_has_shape(value) for node in products for value in (node.inputs[0], node.outputs[0])):
        _infer_shapes(model)
    _fix_cache_sizes(model.graph, head_size)
    for value in model.graph.inputs:
        if value.name == "pixel_values" and image is not None and value.shape is not None and len(value.shape) == 4:
            dims = zip(list(value.shape)[1:], image, strict=True)
            value.shape = ir.Shape([value.shape[0], *(dim if isinstance(dim, int) else size for dim, size in dims)])
    return model


def _has_shape(value: ir.Value) -> bool:
    """Whether `value` has a shape, its first axis with a name or a size."""
    return value.shape is not None and bool(len(value.shape)) and _is_known(value.shape[0])


def _is_known(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, int) or (dim.value is not None and not str(dim.value).startswith("unk_"))


def _infer_shapes(model: ir.Model) -> None:
    """Give the values of `model` (changed in place) shapes by the names of its inputs' axes, as ONNX Runtime's own tool
    infers them: `batch*sequence` for tokens in one axis. Where it cannot, they stay unknown."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    _read_sizes(model.graph)
    try:
        with quiet():
            inferred = SymbolicShapeInference.infer_shapes(_with_plain_products(ir.to_proto(model)), auto_merge=True)
    except Exception:  # an operator that it does not know, or a size that it needs and does not find
        return
    found = {info.name: info.type.tensor_type for info in inferred.graph.value_info}
    for value in (output for node in model.graph for output in node.outputs):
        if value.name in found and not _has_shape(value):
            dims = found[value.name].shape.dim
            value.shape = ir.Shape([dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims])
            value.dtype = value.dtype or ir.DataType(found[value.name].elem_type)


def _read_sizes(graph: ir.Graph) -> None:
    """Hold in memory what may be a shape, in `graph` (changed in place): ONNX Runtime's tool looks for the file of
    weights where it runs."""
    for value in graph.initializers.values():
        if _is_size_in_file(value.const_value):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), dtype=value.dtype, name=value.name)
    for node in graph:
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is not None and _is_size_in_file(attribute.value):
            tensor = attribute.value
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype))


def _is_size_in_file(tensor: object) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _SIZES_BYTES


def _with_plain_products(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` (changed in place) with products of floats in the place of those of integers, whose shapes ONNX Runtime's
    tool does not infer."""
    for number, node in enumerate(proto.graph.node):
        if node.op_type != "MatMulNBits":
            continue
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        weight = onnx.helper.make_tensor_value_info(f"_product.{number}", 1, [sizes["K"], sizes["N"]])
        proto.graph.input.append(weight)
        plain = onnx.helper.make_node("MatMul", [node.input[0], weight.name], list(node.output), name=node.name)
        node.CopyFrom(plain)
    return proto


def _fix_cache_sizes(graph: ir.Graph, head_size: int | None) -> None:
    """Write a cache's sizes where the graph has symbols for them: a host makes an empty one by them."""
    grouped = next((node for node in graph if node.op_type == GROUPED), None)
    if grouped is not None:
        queries, keys = (grouped.attributes.get_int(name) for name in ("num_heads", "kv_num_heads"))
        width = grouped.inputs[0].shape[-1] if grouped.inputs[0].shape is not None else None
        if isinstance(width, int):
            head_size = width // (queries if grouped.inputs[_KEY] is not None else queries + 2 * keys)
    for value in (*graph.inputs, *graph.outputs):
        if value.name.startswith((PAST, PRESENT)) and value.shape is not None and len(value.shape) == 4:
            dims = list(value.shape)
            if not isinstance(dims[3], int) and head_size is not None:
                value.shape = ir.Shape([*dims[:3], head_size])


def without_unused(model: ir.Model) -> None:
    """Remove what nothing reads any more from `model` (changed in place): a head that an input took the place of would
    read that input by its weight's name."""
    common_passes.RemoveUnusedNodesPass()(model)


def order_tokens(model: ir.Model, where: Path) -> None:
    """Let padding stand on either side of a row's tokens in `model` (changed in place), where its attention is
    `GroupQueryAttention`; others mask it column by column. Its projections of floats are packed, also those that were
    taken apart for adapters.

    Raises:
        InputRefused: The graph computes more from its mask than the lengths of rows, or its head is not found.
    """
    graph = model.graph
    grouped = [node for node in graph if node.op_type == GROUPED]
    if not grouped:
        return
    hidden, mask = last_hidden(graph), next((value for value in graph.inputs if value.name == "attention_mask"), None)
    if hidden is None or mask is None or all(value.name != "input_ids" for value in graph.inputs):
        _refuse_order(where, "no head after the last hidden states, no attention_mask, or no input_ids")
    before = set(graph)
    order = TokenOrder(graph, hidden)
    own = set(graph) - before
    packer = ProjectionPacker(graph, order.sizes)
    for node in grouped:
        packed = packer.packed(node.inputs[:3]) if None not in node.inputs[:3] else None
        for index, value in enumerate((packed, None, None) if packed is not None else ()):
            node.replace_input_with(index, value)
        node.replace_input_with(_LENGTHS, order.lengths)
        node.replace_input_with(_TOTAL, order.total)
    common_passes.RemoveUnusedNodesPass()(model)
    others = [node for node, _ in mask.uses() if node not in own]
    if others:
        _refuse_order(where, f"{others[0].op_type} reads attention_mask ({others[0].name})")
    common_passes.TopologicalSortPass()(model)


def _refuse_order(where: Path, found: str) -> None:
    raise InputRefused(
        "The given graph's attention keeps tokens in an order that this tool cannot prove for padded rows",
        where=str(where),
        expected=f"{GROUPED} by the number of a row's tokens, and a head that is one product",
        found=found,
        next_step="leave --graph out: this tool's own graph takes padding on either side",
    )
