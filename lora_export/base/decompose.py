"""Make torch.onnx decompose operator by operator what it has no ONNX function for.

torch.onnx decomposes an exported program by tracing it once more, as a whole, which takes half the time of an export.
A Transformers model needs that for a few operators only, which have a one-to-one counterpart; with any other,
and with anything that writes in place, the whole is decomposed as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from lora_export.compat import borrow_if_there, replaced

_aten = torch.ops.aten
_CASTS = frozenset({_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout})
_SAME = frozenset({_aten.detach.default, _aten.lift_fresh_copy.default})
_COUNTERPARTS = {
    _aten.__and__.Tensor: _aten.bitwise_and.Tensor,
    _aten.__or__.Tensor: _aten.bitwise_or.Tensor,
    _aten.reshape.default: _aten.view.default,
    _aten.contiguous.default: _aten.clone.default,
    _aten.min.other: _aten.minimum.default,
    _aten.max.other: _aten.maximum.default,
}
# Writes into a tensor that nothing else reads, as T5's buckets of positions are added up.
_WRITES = {_aten.add_.Tensor: _aten.add.Tensor}
_COMPUTED = frozenset({_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor})
# torch.onnx removes these itself, afterwards.
_ASSERTIONS = frozenset(
    {
        _aten.sym_constrain_range_for_size.default,
        _aten._assert_async.default,
        _aten._assert_async.msg,
        _aten._assert_scalar.default,
        _aten._assert_tensor_metadata.default,
    }
)
_Decompose = Callable[[ExportedProgram, object], ExportedProgram]


@contextlib.contextmanager
def decomposed_by_operator() -> Iterator[None]:
    """While open, torch.onnx's exporter uses `decompose` where it can, on a torch that is built as we know it."""
    original: _Decompose | None = borrow_if_there("decompose_with_registry")
    implemented = borrow_if_there("get_onnx_implemented_overloads")
    if original is None or implemented is None:
        yield
        return

    def patched(program: ExportedProgram, registry: object) -> ExportedProgram:
        if decompose(program, frozenset(implemented(registry))):
            return program
        return original(program, registry)

    with replaced("decompose_with_registry", patched):
        yield


def decompose(program: ExportedProgram, implemented: frozenset) -> bool:
    """Rewrite `program` in place so that all its operators are `implemented`, if that can be done one by one.

    Returns:
        False, and the program is as it was, if it has an operator with no one-to-one counterpart, one that
        writes into what others read or has no known shape, a submodule, or a cast as an output.
    """
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    known = implemented | _CASTS | _SAME | _ASSERTIONS | _COUNTERPARTS.keys() | _WRITES.keys()
    overloads = [node.target for node in calls if isinstance(node.target, torch._ops.OperatorBase)]
    has_submodules = any(isinstance(module, torch.fx.GraphModule) for module in program.graph_module.children())
    # An output must stay the node that the program's signature names.
    gives_output = any(user.op == "output" for node in calls if node.target in _CASTS | _SAME for user in node.users)
    writes = any(_is_mutable(node) and not _writes_unseen(node) for node in calls)
    rewritten = [node for node in calls if node.target in _CASTS | _COUNTERPARTS.keys()]
    is_described = all("val" in value.meta for node in rewritten for value in (node, *node.args[:1]))
    if has_submodules or gives_output or writes or not is_described or not known.issuperset(overloads):
        return False
    for node in calls:
        if node.target in _CASTS and _dtype(node) != _dtype(node.args[0]):
            node.target, node.kwargs = _aten._to_copy.default, {"dtype": _dtype(node)}
            node.args = node.args[:1]
        elif node.target in _CASTS | _SAME:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
        elif node.target in _COUNTERPARTS:
            _replace_by_counterpart(program.graph, node)
        elif node.target in _WRITES:
            node.target = _WRITES[node.target]
    program.graph.lint()
    program.graph_module.recompile()
    return True


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _writes_unseen(node: Node) -> bool:
    """Whether `node` may as well give a new tensor: what it writes into was computed, and is read by it alone."""
    if node.target not in _WRITES:
        return False
    written = node.args[0]
    values = [read.meta.get("val") for read in (written, node)]
    is_same = all(isinstance(value, torch.Tensor) for value in values) and values[0].dtype == values[1].dtype
    return written.target in _COMPUTED and is_same and set(written.users) == {node} and written not in node.args[1:]


def _replace_by_counterpart(graph: Graph, node: Node) -> None:
    if node.target is _aten.contiguous.default:
        node.args, node.kwargs = node.args[:1], {"memory_format": torch.contiguous_format}
    elif node.target is _aten.reshape.default and not node.args[0].meta["val"].is_contiguous():
        # A view needs rows that lie one behind the other; ONNX has no such notion and drops the copy.
        with graph.inserting_before(node):
            copy = graph.call_function(_aten.clone.default, node.args[:1], {"memory_format": torch.contiguous_format})
        copy.meta = {
            **node.args[0].meta,
            "val": torch.empty_like(node.args[0].meta["val"], memory_format=torch.contiguous_format),
        }
        node.replace_input_with(node.args[0], copy)
    node.target = _COUNTERPARTS[node.target]


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype
