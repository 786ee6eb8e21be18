"""One linear with a LoRA pair, in the forms that a dynamic graph could hold: 24 layers of 1024 → 1024, rank 8, float16.

`x W` alone is the base. Then as the graphs are today (`MatMul`, `MatMul`, `Add`), with `Gemm`, and with the pair folded
into the weight at every run. Then three linears that share an input: three pairs, or one packed pair with a
block-diagonal B. Each with and without a CUDA graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpu.stage import Stage
from gpu.timing import Device, noted, race, ratio_lines
from lora_export.runtime.session import open_session

_SIZE, _RANK, _LAYERS = 1024, 8, 24
SHAPES = ((1, 1), (1, 128), (16, 256), (32, 512))
# Initializers, inputs and nodes of one layer; its output's name.
_Layer = Callable[["_Builder", str, int], str]


class _Builder:
    """A chain of layers under construction."""

    def __init__(self) -> None:
        self.nodes, self.arrays, self.weights = [], {}, {}
        self._rng = np.random.default_rng(0)

    def _drawn(self, dims: tuple[int, ...]) -> np.ndarray:
        return (self._rng.standard_normal(dims, np.float32) * 0.02).astype(np.float16)

    def weight(self, name: str, *dims: int) -> str:
        self.weights[name] = self._drawn(dims)
        return name

    def operand(self, name: str, *dims: int) -> str:
        """An adapter tensor: an input of the graph."""
        self.arrays[name] = self._drawn(dims)
        return name

    def node(self, op: str, inputs: list[str], **attributes) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        self.weights[name] = array
        return name


def base(b: _Builder, x: str, i: int) -> str:
    return b.node("MatMul", [x, b.weight(f"w{i}", _SIZE, _SIZE)])


def added(b: _Builder, x: str, i: int) -> str:
    """As the graphs are today."""
    low = b.node("MatMul", [x, b.operand(f"a{i}", 1, _SIZE, _RANK)])
    high = b.node("MatMul", [low, b.operand(f"b{i}", 1, _RANK, _SIZE)])
    return b.node("Add", [base(b, x, i), high])


def gemm(b: _Builder, x: str, i: int) -> str:
    """`Gemm(x A, B, C = x W)` on two axes: no node that only adds."""
    flat = b.node("Reshape", [x, b.constant("flat", np.array([-1, _SIZE]))])
    low = b.node("MatMul", [flat, b.operand(f"a{i}", _SIZE, _RANK)])
    y = b.node(
        "Gemm", [low, b.operand(f"b{i}", _RANK, _SIZE), b.node("MatMul", [flat, b.weight(f"w{i}", _SIZE, _SIZE)])]
    )
    return b.node("Reshape", [y, b.node("Shape", [x])])


def folded(b: _Builder, x: str, i: int) -> str:
    """`x (W + A B)`: for one adapter in all rows."""
    pair = b.node("MatMul", [b.operand(f"a{i}", _SIZE, _RANK), b.operand(f"b{i}", _RANK, _SIZE)])
    return b.node("MatMul", [x, b.node("Add", [b.weight(f"w{i}", _SIZE, _SIZE), pair])])


def folded_gemm(b: _Builder, x: str, i: int) -> str:
    """`x Gemm(A, B, C = W)`."""
    a, high = b.operand(f"a{i}", _SIZE, _RANK), b.operand(f"b{i}", _RANK, _SIZE)
    return b.node("MatMul", [x, b.node("Gemm", [a, high, b.weight(f"w{i}", _SIZE, _SIZE)])])


def _three(b: _Builder, packed: str) -> str:
    parts = [f"{packed}_{side}" for side in "qkv"]
    b.nodes.append(helper.make_node("Split", [packed], parts, axis=-1, num_outputs=3))
    return b.node("Add", [b.node("Add", parts[:2]), parts[2]])


def packed_base(b: _Builder, x: str, i: int) -> str:
    """Three linears as one product, split and summed."""
    return _three(b, b.node("MatMul", [x, b.weight(f"w{i}", _SIZE, 3 * _SIZE)]))


def three_pairs(b: _Builder, x: str, i: int) -> str:
    """Three linears, three pairs, as the graphs are today."""
    found = []
    for side in "qkv":
        low = b.node("MatMul", [x, b.operand(f"a{side}{i}", 1, _SIZE, _RANK)])
        high = b.node("MatMul", [low, b.operand(f"b{side}{i}", 1, _RANK, _SIZE)])
        found.append(b.node("Add", [b.node("MatMul", [x, b.weight(f"w{side}{i}", _SIZE, _SIZE)]), high]))
    return b.node("Add", [b.node("Add", found[:2]), found[2]])


def packed_pair(b: _Builder, x: str, i: int) -> str:
    """One product, one packed A, one block-diagonal B."""
    low = b.node("MatMul", [x, b.operand(f"a{i}", 1, _SIZE, 3 * _RANK)])
    high = b.node("MatMul", [low, b.operand(f"b{i}", 1, 3 * _RANK, 3 * _SIZE)])
    return _three(b, b.node("Add", [b.node("MatMul", [x, b.weight(f"w{i}", _SIZE, 3 * _SIZE)]), high]))


ONE = {"base": base, "MatMul, MatMul, Add": added, "Gemm": gemm, "folded": folded, "folded by Gemm": folded_gemm}
THREE = {"packed base": packed_base, "three pairs": three_pairs, "packed pair": packed_pair}


def run(stage: Stage) -> dict:
    """Time every form at each shape, with and without a CUDA graph."""
    found: dict = {"races": []}
    for shape in SHAPES[:2] if stage.small else SHAPES:
        for forms in (ONE, THREE):
            for capture in (False, True):
                runs, failed = {}, {}
                for name, layer in forms.items():
                    with noted(failed, name):
                        run = _run(stage, layer, shape, capture=capture)
                        run()
                        runs[name] = run
                reference = next(iter(forms))
                result = race(runs, [(name, reference) for name in runs if name != reference], stage.blocks)
                result |= {"batch": shape[0], "sequence": shape[1], "cuda_graph": capture, "failed": failed}
                found["races"].append(result)
                title = f"{shape[0]} x {shape[1]}{', CUDA graph' if capture else ''}"
                stage.say(title, ratio_lines(result), failed)
                stage.save(found)
    return found


def _run(stage: Stage, layer: _Layer, shape: tuple[int, int], *, capture: bool) -> Callable[[], None]:
    builder, x = _Builder(), "x"
    for i in range(2 if stage.small else _LAYERS):
        x = layer(builder, x, i)
    dims = [*shape, _SIZE]
    kind = TensorProto.FLOAT16
    inputs = [helper.make_tensor_value_info("x", kind, dims)]
    inputs += [helper.make_tensor_value_info(name, kind, array.shape) for name, array in builder.arrays.items()]
    weights = [numpy_helper.from_array(array, name) for name, array in builder.weights.items()]
    graph = helper.make_graph(builder.nodes, "pairs", inputs, [helper.make_tensor_value_info(x, kind, dims)], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        session = open_session(path, stage.provider, stop_spinning=True, cuda_graph=capture)
    device = Device(stage.provider)
    drawn = np.random.default_rng(1).standard_normal(dims, np.float32).astype(np.float16)
    return device.bound_run(session, device.values({"x": drawn, **builder.arrays}), {x: (tuple(dims), np.float16)})
