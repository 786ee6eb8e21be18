"""Linear maps by an unbound weight become `MatMulNBits`, which reads the weight in blocks of small integers.

Nothing is read here: each weight's recipe becomes those of its parts. Quantized are

1. `MatMul(x, W)` of an unbound weight `[in, out]`;
2. `FusedMatMul(x, W, transB=1)` of one `[out, in]` that is also looked up in (a head tied to an embedding): the lookup
   keeps its floats, and the head gets integers of its own;
3. `Gemm(x, W, b)`, of either layout, factors aside.

A checkpoint's own integers are taken where their grid is known, and of several weights side by side where all have one
grid. A weight stays as it is where anything else multiplies by it: an adapter input's default, a weight inside a packed
`Attention`, experts in three axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes import common as common_passes

from lora_export.base.recipe import Part, Quantized, Recipe
from lora_export.graph.sites import module_of
from lora_export.graph.unbound import recipe_of, set_recipe
from lora_export.quantization import Grid, Quantization

# As ONNX Runtime's quantizer names them: `<weight>_Q4`, `<weight>_scales`, `<weight>_zero_points`.
_SCALES, _ZEROS = "_scales", "_zero_points"


@dataclass(frozen=True)
class _Stored:
    """A weight's parts, and the parameters of the base that they are."""

    parts: tuple[ir.Value, ...]
    parameters: tuple[str, ...]


def quantize_weights(model: ir.Model, how: Quantization, grid_of: Callable[[str], Grid | None]) -> tuple[str, ...]:
    """Rewrite `model` (changed in place) and return the parameters of the base that it stores as integers.

    Args:
        grid_of: How the integers of a parameter lie; None for one that stays in floats.
    """
    graph, done = model.graph, {}
    for node in list(graph):
        weight = _weight_of(node)
        recipe = None if weight is None else recipe_of(weight)
        parameters = () if recipe is None else _parameters(node, weight, recipe)
        grids = set(map(grid_of, parameters))
        if len(grids) != 1 or None in grids:
            continue
        (grid,) = grids
        is_out_in = bool(node.attributes.get_int("transB", 0))
        key = (parameters, is_out_in)
        if key not in done:
            parts = _parts(graph, weight, recipe, name="+".join(parameters), is_out_in=is_out_in, how=how.on(grid))
            done[key] = _Stored(parts, parameters)
        _replace(
            graph,
            node,
            done[key].parts,
            how=how.on(grid),
            shape=list(reversed(weight.shape)) if is_out_in else list(weight.shape),
        )
    common_passes.RemoveUnusedNodesPass()(model)
    graph.opset_imports.setdefault("com.microsoft", 1)
    return tuple(dict.fromkeys(path for stored in done.values() for path in stored.parameters))


def _parameters(node: ir.Node, weight: ir.Value, recipe: Recipe) -> tuple[str, ...]:
    """What `weight` is as `node` multiplies by it: of one that is looked up in too, the node's own module's weight.

    None where the node does not tell its module.
    """
    if all(user.op_type != "Gather" for user, _ in weight.uses()):
        return recipe.parameters
    module = module_of(node)
    return (f"{module}.weight",) if module else ()


def _weight_of(node: ir.Node) -> ir.Value | None:
    """The weight of a linear map that can be quantized; None for any other node."""
    is_linear = (node.op_type, node.domain) in (("MatMul", ""), ("Gemm", "")) or _is_transposing(node)
    if not is_linear or (node.op_type == "Gemm" and not _is_plain(node)):
        return None
    weight = node.inputs[1]
    is_own = weight is not None and weight.is_initializer() and not weight.is_graph_input()
    return weight if is_own and len(weight.shape) == 2 else None


def _is_transposing(node: ir.Node) -> bool:
    """Whether `node` is a `FusedMatMul` that transposes its weight and nothing else."""
    given = {name for name, attribute in node.attributes.items() if attribute.value not in (0, 1.0)}
    return (node.op_type, node.domain) == ("FusedMatMul", "com.microsoft") and given <= {"transB"}


def _is_plain(node: ir.Node) -> bool:
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    is_vector = bias is None or (bias.shape is not None and len(bias.shape) == 1)
    return factors == [1.0, 1.0] and not node.attributes.get_int("transA", 0) and is_vector


def _parts(
    graph: ir.Graph, weight: ir.Value, recipe: Recipe, *, name: str, is_out_in: bool, how: Quantization
) -> tuple[ir.Value, ...]:
    """The unbound integers, scales and, where blocks have one, zeros of `weight`, `name`."""
    n_in, n_out = (weight.shape[1], weight.shape[0]) if is_out_in else tuple(weight.shape)
    if is_out_in:
        recipe = replace(recipe, transposed=not recipe.transposed, axis=1 - recipe.axis)
    blocks = -(-n_in // how.block_size)
    dtype = weight.dtype
    made = {
        Part.INTEGERS: (f"_Q{how.bits}", [n_out, blocks, how.block_size * how.bits // 8], ir.DataType.UINT8),
        Part.SCALES: (_SCALES, [n_out, blocks], dtype),
        Part.ZEROS: (_ZEROS, [n_out, -(-blocks * how.bits // 8)], ir.DataType.UINT8),
    }
    if how.has_float_zeros:
        made[Part.ZEROS] = (_ZEROS, [n_out, blocks], dtype)
    if how.symmetric:
        del made[Part.ZEROS]
    found = []
    for part, (suffix, shape, element) in made.items():
        value = ir.Value(name=f"{name}{suffix}", type=ir.TensorType(element), shape=ir.Shape(shape))
        quantized = Quantized.of(how, part, str(dtype.numpy()))
        set_recipe(value, replace(recipe, quantized=quantized))
        graph.initializers[value.name] = value
        found.append(value)
    return tuple(found)


def _replace(graph: ir.Graph, node: ir.Node, parts: tuple[ir.Value, ...], *, how: Quantization, shape: list) -> None:
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    inputs = [node.inputs[0], *parts]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    attributes = {"K": int(shape[0]), "N": int(shape[1]), "bits": how.bits, "block_size": how.block_size}
    if how.accuracy_level:
        attributes["accuracy_level"] = how.accuracy_level
    quantized = ir.node(
        "MatMulNBits", inputs, attributes=attributes, domain="com.microsoft", name=node.name,
        metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    output, before = quantized.outputs[0], node.outputs[0]
    output.shape, output.type = before.shape, before.type
    replace_nodes_and_values(graph, node, [node], [quantized], node.outputs, quantized.outputs)
