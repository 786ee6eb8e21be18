"""The adapter layers that the LoRA paper's table 1 compares with, in a graph: they lie in the path of every token.

Adapter-H (Houlsby et al., arXiv 1902.00751) puts one after a layer's attention and one after its MLP, before the sum
with the residual; Adapter-L (Lin et al., arXiv 2004.03829) one after the MLP, behind a layer norm of its own. Each is
`y + up(relu(down(y)))`, with biases. Random weights: they are timed, not used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

# Numbers in the adapters at the paper's three sizes, by (batch, tokens).
PARAMETERS = {(32, 512): 500_000, (16, 256): 11_000_000, (1, 128): 11_000_000}
_AFTER = {"L": (".mlp.c_proj.weight",), "H": (".attn.c_proj.weight", ".mlp.c_proj.weight")}


def write_adapter_layers(base: Path, out: Path, kind: str, n_parameters: int) -> Path:
    """The graph of export `base` with adapter layers of `kind`, "L" or "H", as `out/model.onnx`; the weights in `out`
    are hard links to those of `base`."""
    if (out / "model.onnx").exists():
        return out
    model = ir.load(base / "model.onnx")
    products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    places = [node for node in products if (node.inputs[1].name or "").endswith(_AFTER[kind])]
    if not places:
        raise ValueError(f"no projection of {base} is followed by adapters of kind {kind}")
    hidden = places[0].outputs[0].shape[-1]
    size = max(1, round(n_parameters / len(places) / (2 * hidden)))
    for number, node in enumerate(places):
        _insert(model.graph, node, f"adapter.{number}", hidden=hidden, size=size, has_norm=kind == "L")
    out.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.name != "model.onnx" and not (out / file.name).exists():
            (out / file.name).hardlink_to(file)  # ONNX Runtime follows no symbolic link to weights
    ir.save(model, out / "model.onnx")
    return out


def _insert(graph: ir.Graph, after: ir.Node, name: str, *, hidden: int, size: int, has_norm: bool) -> None:
    y, rng = after.outputs[0], np.random.default_rng(0)
    users, dtype, nodes = tuple(y.uses()), y.dtype, []

    def weight(part: str, *dims: int, around: float = 0.0) -> ir.Value:
        array = (rng.standard_normal(dims, np.float32) * 0.02 + around).astype(dtype.numpy())
        value = ir.Value(
            name=f"{name}.{part}", const_value=ir.tensor(array), shape=ir.Shape(dims), type=ir.TensorType(dtype)
        )
        graph.register_initializer(value)
        return value

    def op(op_type: str, *inputs: ir.Value, **attributes) -> ir.Value:
        nodes.append(ir.node(op_type, list(inputs), attributes=attributes))
        nodes[-1].outputs[0].dtype = dtype
        return nodes[-1].outputs[0]

    x = y
    if has_norm:
        x = op("LayerNormalization", y, weight("norm.weight", hidden, around=1.0), weight("norm.bias", hidden), axis=-1)
    low = op("Relu", op("Add", op("MatMul", x, weight("down.weight", hidden, size)), weight("down.bias", size)))
    high = op("Add", op("MatMul", low, weight("up.weight", size, hidden)), weight("up.bias", hidden))
    total = op("Add", y, high)
    total.shape = y.shape
    graph.insert_after(after, nodes)
    for user, index in users:
        user.replace_input_with(index, total)
