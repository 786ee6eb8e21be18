"""Optimize a weightless graph and fuse it into ONNX Runtime's operators for a provider.

Constant folding, common-subexpression elimination and most fusions are onnxscript's and Transformers'. Ours are those
of attention, and those that must work without weights: packed projections, and a tied weight read transposed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes import common as common_passes

from lora_export.base.recipe import Recipe
from lora_export.base.sparing import sparing
from lora_export.compat import borrow, borrow_if_there, replaced
from lora_export.graph.batch_transposes import take_batch_transposes_apart
from lora_export.graph.encoder_attention import simplify_attention
from lora_export.graph.grouped_attention import group_attention
from lora_export.graph.pack import pack_siblings
from lora_export.graph.packed_pairs import add_before_splitting
from lora_export.graph.reshapes import drop_undone_reshapes
from lora_export.graph.shape_sums import start_ranges_at_sums
from lora_export.graph.unbound import is_matrix_transpose, prepare_weights, recipe_of
from lora_export.quiet import quiet


def fuse(
    model: ir.Model,
    provider: str,
    windows: tuple[int, ...] = (),
    *,
    longest: Sequence[int] = (),
    holds_weights: bool = True,
    may_pack: Callable[[Recipe], bool] = lambda recipe: True,
) -> ir.Model:
    """`model` (changed in place and returned) optimized and fused for `provider`, "cpu" or "cuda".

    Args:
        windows: The sizes of sliding windows that the base's config names.
        longest: The most tokens of a text, by the base's config: `base.trace.longest_texts`.
        holds_weights: Whether an attention may hold its projections' weights, which are then floats.
        may_pack: Which weights of a decoder's projections may be packed, by their recipe.
    """
    from onnxscript.optimizer import optimize_ir

    fuse_for_onnxruntime = borrow("fuse_for_onnxruntime")
    unfuse_mixed_dtype_skip_norms = borrow("_unfuse_mixed_dtype_skip_norms")
    prepare_weights(model)
    with quiet(), sparing(), _operator_checked_first(), _zero_and_one_are_exact():
        # Folding a Resize (interpolated position embeddings) evaluates it element by element in Python.
        optimize_ir(model, should_fold=lambda node: False if node.op_type == "Resize" else None)
        fuse_for_onnxruntime(model, provider)
        # Its last step but a few fuses again what it had taken apart: T5 in float16, whose residual is float32.
        unfuse_mixed_dtype_skip_norms(model)
    take_batch_transposes_apart(model)
    common_passes.RemoveUnusedNodesPass()(drop_undone_reshapes(model))  # so that attention finds its projections
    group_attention(model, provider, windows, longest=longest, may_pack=may_pack)
    simplify_attention(model, provider, holds_weights=holds_weights)
    drop_undone_reshapes(model)
    if provider == "cuda":
        add_before_splitting(pack_siblings(model, may_pack))
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
    original, result = borrow_if_there("match"), borrow_if_there("MatchResult")
    if original is None or result is None:
        yield
        return

    def match(self, model: ir.Model, graph: object, node: ir.Node, **options: object) -> object:
        if not self.pattern.output_nodes[0].op.matches(node.op_type):
            return result().fail("another operator")
        return original(self, model, graph, node, **options)

    with replaced("match", match):
        yield


@contextlib.contextmanager
def _zero_and_one_are_exact() -> Iterator[None]:
    """Let a 0 or 1 in onnxscript's patterns match nothing else.

    As it is, 1e-8 is a 0 and 1.00001 a 1: `variance + 1e-8` loses its epsilon as "x + 0", and the norm of a padding
    token, whose embedding is zero, becomes infinite.
    """
    original = borrow("_match_constant")

    def match_constant(self, pattern: object, value: ir.Value) -> bool:
        constant = value.const_value
        if pattern.value in (0, 1) and constant is not None and constant.size == 1:
            found = constant.numpy().item()
            if found != pattern.value:
                return self.fail(f"{found} is not {pattern.value}")
        return original(self, pattern, value)

    with replaced("_match_constant", match_constant):
        yield


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
            "FusedMatMul", [node.inputs[0], transpose.inputs[0]], attributes={"transB": 1}, domain="com.microsoft",
            metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        replace_nodes_and_values(graph, node, [node], [fused], node.outputs, fused.outputs)
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    return model
