"""Optimize a weightless graph and fuse it into ONNX Runtime's operators for a provider.

Constant folding, common-subexpression elimination and most fusions are onnxscript's and Transformers'. Ours are the two
that must work without weights: packing sibling projections, and reading a tied weight transposed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes import common as common_passes

from lora_export.base.recipe import Recipe
from lora_export.base.sparing import sparing
from lora_export.compat import borrow, borrow_if_there
from lora_export.graph.batch_transposes import take_batch_transposes_apart
from lora_export.graph.grouped_attention import group_attention
from lora_export.graph.reshapes import drop_undone_reshapes
from lora_export.graph.shape_sums import start_ranges_at_sums
from lora_export.graph.unbound import is_matrix_transpose, prepare_weights, recipe_of, set_recipe
from lora_export.quiet import quiet


def fuse(model: ir.Model, provider: str, windows: tuple[int, ...] = ()) -> ir.Model:
    """`model` (changed in place and returned) optimized and fused for `provider`, "cpu" or "cuda".

    Args:
        windows: The sizes of sliding windows that the base's config names.
    """
    from onnxscript.optimizer import optimize_ir

    fuse_for_onnxruntime = borrow("fuse_for_onnxruntime")
    unfuse_mixed_dtype_skip_norms = borrow("_unfuse_mixed_dtype_skip_norms")
    prepare_weights(model)
    with quiet(), sparing(), _operator_checked_first():
        # Folding a Resize (interpolated position embeddings) evaluates it element by element in Python.
        optimize_ir(model, should_fold=lambda node: False if node.op_type == "Resize" else None)
        fuse_for_onnxruntime(model, provider)
        # Its last step but a few fuses again what it had taken apart: T5 in float16, whose residual is float32.
        unfuse_mixed_dtype_skip_norms(model)
    take_batch_transposes_apart(model)
    group_attention(model, provider, windows)
    drop_undone_reshapes(model)
    if provider == "cuda":
        pack_siblings(model)
        start_ranges_at_sums(model)
    read_tied_weights_transposed(model)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.TopologicalSortPass()(model)
    return model


@contextlib.contextmanager
def _operator_checked_first() -> Iterator[None]:
    """Let onnxscript's matcher compare a node's operator before all else.

    As it is, a rule with several outputs rescans the graph for every node, also for those it can never match, which
    makes fusing quadratic in the number of layers. A node whose operator differs from that of the pattern's first
    output fails either way, so the graph that comes out is the same.
    """
    matcher = borrow_if_there("SimplePatternMatcher")
    result = borrow_if_there("MatchResult")
    if matcher is None or result is None:
        yield
        return
    original = matcher.match

    def match(self, model: ir.Model, graph: object, node: ir.Node, **options: object) -> object:
        if not self.pattern.output_nodes[0].op.matches(node.op_type):
            return result().fail("another operator")
        return original(self, model, graph, node, **options)

    matcher.match = match
    try:
        yield
    finally:
        matcher.match = original


def pack_siblings(model: ir.Model) -> ir.Model:
    """Turn the MatMuls that read one input with unbound weights `[in, out_i]` into one MatMul and a Split.

    Query, key and value projections, or an MLP's gate and up: one launch on a GPU instead of three. On a CPU it does
    not pay, as taking the parts apart again is a pass over memory: 1.06 to 1.17 × the time of three MatMuls (384
    wide, 4 × 128 tokens, two cores). The packed weight's recipe concatenates the others', so nothing is
    read here. The sum of `out_i` is the packed width.
    """
    graph = model.graph
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        siblings = [node for node, index in value.uses() if index == 0 and _is_packable(node)]
        if len(siblings) >= 2:
            _pack(graph, value, siblings)
    return model


def _is_packable(node: ir.Node) -> bool:
    if node.op_type != "MatMul" or node.domain != "":
        return False
    weight = node.inputs[1]
    recipe = recipe_of(weight) if weight.is_initializer() and not weight.is_graph_input() else None
    return recipe is not None and len(weight.shape) == 2 and len(tuple(weight.uses())) == 1


def _pack(graph: ir.Graph, value: ir.Value, siblings: list[ir.Node]) -> None:
    weights = [node.inputs[1] for node in siblings]
    recipes = [recipe_of(weight) for weight in weights]
    if len({(recipe.transposed, weight.shape[0]) for recipe, weight in zip(recipes, weights, strict=True)}) != 1:
        return
    sizes = [weight.shape[1] for weight in weights]
    packed = ir.Value(
        name="+".join(weight.name for weight in weights),
        type=ir.TensorType(weights[0].dtype),
        shape=ir.Shape([weights[0].shape[0], sum(sizes)]),
    )
    set_recipe(packed, Recipe(tuple(p for recipe in recipes for p in recipe.parameters), recipes[0].transposed, 1))
    graph.initializers[packed.name] = packed
    split_sizes = ir.Value(
        name=f"{packed.name}.sizes", const_value=ir.tensor(np.array(sizes, np.int64)), shape=ir.Shape([len(sizes)])
    )
    split_sizes.dtype = ir.DataType.INT64
    graph.register_initializer(split_sizes)
    matmul = ir.node("MatMul", [value, packed])
    split = ir.node("Split", [matmul.outputs[0], split_sizes], attributes={"axis": -1}, num_outputs=len(siblings))
    matmul.outputs[0].dtype = weights[0].dtype
    if value.shape is not None:
        matmul.outputs[0].shape = ir.Shape([*value.shape[:-1], sum(sizes)])
    order = {id(node): position for position, node in enumerate(graph)}
    first = min(siblings, key=lambda node: order[id(node)])
    outputs = [node.outputs[0] for node in siblings]
    replace_nodes_and_values(graph, first, siblings, [matmul, split], outputs, split.outputs)
    for weight in weights:
        del graph.initializers[weight.name]


def read_tied_weights_transposed(model: ir.Model) -> ir.Model:
    """Rewrite `MatMul(x, Transpose(weight))` of an unbound weight to `FusedMatMul(x, weight, transB=1)`.

    The weight is stored once, in the layout its other use (an embedding) needs. Without this, ONNX Runtime folds the
    Transpose when it loads the graph and holds the weight twice.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "MatMul" or node.domain != "":
            continue
        transpose = node.inputs[1].producer()
        if transpose is None or not is_matrix_transpose(transpose) or recipe_of(transpose.inputs[0]) is None:
            continue
        fused = ir.node(
            "FusedMatMul", [node.inputs[0], transpose.inputs[0]], attributes={"transB": 1}, domain="com.microsoft"
        )
        replace_nodes_and_values(graph, node, [node], [fused], node.outputs, fused.outputs)
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    return model
