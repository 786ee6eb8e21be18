"""Whether a provider can run a finished graph: ONNX Runtime's CPU provider multiplies and adds no bfloat16."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.errors import InputRefused, some_of
from lora_export.graph.sites import module_of


def refuse_bfloat16(model: ir.Model, provider: str) -> None:
    """Refuse a graph for the CPU that computes in bfloat16, as a model's own code may do in any dtype (Falcon's ALiBi).

    Raises:
        InputRefused: It does; the operators and their modules are named.
    """
    if provider != "cpu":
        return
    found = [
        f"{node.op_type} in {module_of(node) or 'the model'}"
        for node in model.graph.all_nodes()
        if node.op_type not in ("Cast", "Constant") and any(v.dtype is ir.DataType.BFLOAT16 for v in node.outputs)
    ]
    if found:
        raise InputRefused(
            "The model's own code computes in bfloat16, which ONNX Runtime's CPU provider does not run",
            where=some_of(sorted(set(found)), 3),
            next_step="export for --provider cuda",
        )
