"""The standard `Attention` as Transformers' exporter writes it: its options, and what is read of it."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

# ONNX Runtime's operator for a decoder's attention.
GROUPED = "GroupQueryAttention"
_PLAIN = {"softcap": 0.0, "is_causal": 0, "qk_matmul_output_mode": 0}


def is_plain(node: ir.Node) -> bool:
    """Whether heads and sizes are known, and no option is set that ONNX Runtime's own operators have not, or have
    under another name."""
    known = all(
        value is not None and value.shape is not None and isinstance(value.shape[axis], int)
        for value in node.inputs[:3]
        for axis in (1, 3)
    )
    return known and all(
        node.attributes[name].value == value for name, value in _PLAIN.items() if name in node.attributes
    )


def attended(node: ir.Node, is_of_padding: Callable[[ir.Value], bool]) -> ir.Value:
    """The result of an `Attention`, or what the exporter makes of it: zeros for tokens that attend nothing.

    Args:
        is_of_padding: Whether a condition is true for nothing but padding.
    """
    users = [user for user, _ in node.outputs[0].uses()]
    chosen = len(users) == 1 and users[0].op_type == "Where" and users[0].inputs[2] is node.outputs[0]
    if chosen and _is_zero(users[0].inputs[1]) and is_of_padding(users[0].inputs[0]):
        return users[0].outputs[0]
    return node.outputs[0]


def _is_zero(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and not tensor.numpy().any()
