"""One attention, measured alone on the provider: what a decoder's graph could be made of.

Today's MatMul, Softmax, MatMul with keys and values expanded; ONNX's `Attention` (opset 23); `GroupQueryAttention` with
a separate and a shared cache. 32 query heads, 8 key and value heads of size 64.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from gpu.stage import Stage
from gpu.timing import bound, noted, race, ratio_lines
from lora_export.runtime.arrays import to_ort_value
from lora_export.runtime.session import open_session

_HEADS, _KV_HEADS, _SIZE, _LENGTH = 32, 8, 64, 4096
# (rows, new tokens, past).
SHAPES = ((1, 1, 512), (8, 1, 512), (8, 1, 2048), (32, 1, 512), (1, 512, 0), (8, 512, 0), (4, 16, 256))
_TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT}


def run(stage: Stage) -> dict:
    """Time every form at each shape, in float16 and float32."""
    found: dict = {"races": []}
    for dtype in ("float16", "float32"):
        for shape in SHAPES[:2] if stage.small else SHAPES:
            runs, failed, outputs = {}, {}, {}
            for name, build in FORMS.items():
                with noted(failed, name):
                    run = _run(stage, *build(dtype, *shape), shape, dtype)
                    run()
                    runs[name], outputs[name] = run, _heads_first(run.outputs["y"].numpy(), shape)
            reference = next(iter(runs))
            result = race(runs, [(name, reference) for name in runs if name != reference], stage.blocks)
            result |= {"dtype": dtype, "rows": shape[0], "new": shape[1], "past": shape[2], "failed": failed}
            result["largest_difference"] = {
                name: float(np.abs(y - outputs[reference]).max()) for name, y in outputs.items() if name != reference
            }
            found["races"].append(result)
            lines = [*ratio_lines(result), f"  largest difference: {result['largest_difference']}"]
            stage.say(f"{dtype} {shape[0]} rows, {shape[1]} new, past {shape[2]}", lines, failed)
            stage.save(found)
    return found


def _heads_first(y: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """`[rows, heads, new, size]` in float32, from that or `[rows, new, heads × size]`."""
    rows, new, _ = shape
    y = y.astype(np.float32)
    return y if y.ndim == 4 else y.reshape(rows, new, _HEADS, _SIZE).transpose(0, 2, 1, 3)


def _graph(nodes, inputs, outputs, opset: int, initializers=()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "attention", inputs, outputs, list(initializers))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _values(dtype: str, rows: int, new: int, past: int, *, packed: bool) -> list:
    """Query, key, value and the past as graph inputs; 3-D `[rows, new, heads × size]` if packed, else 4-D."""
    kind = _TYPES[dtype]

    def value(name: str, heads: int, length: int, *, flat: bool):
        dims = [rows, length, heads * _SIZE] if flat else [rows, heads, length, _SIZE]
        return helper.make_tensor_value_info(name, kind, dims)

    return [
        value("q", _HEADS, new, flat=packed),
        value("k", _KV_HEADS, new, flat=packed),
        value("v", _KV_HEADS, new, flat=packed),
        value("past_k", _KV_HEADS, past, flat=False),
        value("past_v", _KV_HEADS, past, flat=False),
    ]


def _cache(dtype: str, rows: int, length: int) -> list:
    kind = _TYPES[dtype]
    dims = [rows, _KV_HEADS, length, _SIZE]
    return [helper.make_tensor_value_info(name, kind, dims) for name in ("present_k", "present_v")]


def _mask(dtype: str, rows: int, new: int, past: int, kind: int | None = None):
    return helper.make_tensor_value_info("mask", kind or _TYPES[dtype], [rows, 1, new, past + new])


def expanded(dtype: str, rows: int, new: int, past: int) -> tuple[onnx.ModelProto, bool]:
    """What the graph holds today: concatenate, expand, MatMul, Add, Softmax, MatMul."""
    inputs = [*_values(dtype, rows, new, past, packed=False), _mask(dtype, rows, new, past)]
    total, groups = past + new, _HEADS // _KV_HEADS
    shape5 = helper.make_tensor("shape5", TensorProto.INT64, [5], [rows, _KV_HEADS, groups, total, _SIZE])
    shape4 = helper.make_tensor("shape4", TensorProto.INT64, [4], [rows, _HEADS, total, _SIZE])
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
    scale = helper.make_tensor("scale", _TYPES[dtype], [], [_SIZE**-0.5])
    nodes = []
    for side in "kv":
        nodes += [
            helper.make_node("Concat", [f"past_{side}", side], [f"present_{side}"], axis=2),
            helper.make_node("Unsqueeze", [f"present_{side}", "axis"], [f"{side}5"]),
            helper.make_node("Expand", [f"{side}5", "shape5"], [f"{side}e"]),
            helper.make_node("Reshape", [f"{side}e", "shape4"], [f"{side}4"]),
        ]
    nodes += [
        helper.make_node("Transpose", ["k4"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Mul", ["s", "scale"], ["ss"]),
        helper.make_node("Add", ["ss", "mask"], ["sm"]),
        helper.make_node("Softmax", ["sm"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v4"], ["y"]),
    ]
    y = helper.make_tensor_value_info("y", _TYPES[dtype], [rows, _HEADS, new, _SIZE])
    return _graph(nodes, inputs, [y, *_cache(dtype, rows, total)], 20, [shape5, shape4, axis, scale]), False


def standard(dtype: str, rows: int, new: int, past: int) -> tuple[onnx.ModelProto, bool]:
    """ONNX's `Attention` of opset 23 with a boolean mask and the past."""
    inputs = [*_values(dtype, rows, new, past, packed=False), _mask(dtype, rows, new, past, TensorProto.BOOL)]
    names = ["q", "k", "v", "mask", "past_k", "past_v"]
    node = helper.make_node("Attention", names, ["y", "present_k", "present_v"])
    y = helper.make_tensor_value_info("y", _TYPES[dtype], [rows, _HEADS, new, _SIZE])
    return _graph([node], inputs, [y, *_cache(dtype, rows, past + new)], 23), False


def causal(dtype: str, rows: int, new: int, past: int) -> tuple[onnx.ModelProto, bool]:
    """The same without a mask, causal."""
    inputs = _values(dtype, rows, new, past, packed=False)
    names = ["q", "k", "v", "", "past_k", "past_v"]
    node = helper.make_node("Attention", names, ["y", "present_k", "present_v"], is_causal=1)
    y = helper.make_tensor_value_info("y", _TYPES[dtype], [rows, _HEADS, new, _SIZE])
    return _graph([node], inputs, [y, *_cache(dtype, rows, past + new)], 23), False


def grouped(dtype: str, rows: int, new: int, past: int, *, shared: bool = False) -> tuple[onnx.ModelProto, bool]:
    """`GroupQueryAttention` with a cache of its own for past and present."""
    length = _LENGTH if shared else past
    inputs = _values(dtype, rows, new, length, packed=True)
    inputs += [
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [rows]),
        helper.make_tensor_value_info("total", TensorProto.INT32, [1]),
    ]
    names = ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total"]
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "present_k", "present_v"], domain="com.microsoft",
        num_heads=_HEADS, kv_num_heads=_KV_HEADS,
    )  # fmt: skip
    y = helper.make_tensor_value_info("y", _TYPES[dtype], [rows, new, _HEADS * _SIZE])
    return _graph([node], inputs, [y, *_cache(dtype, rows, length if shared else past + new)], 20), shared


def grouped_shared(dtype: str, rows: int, new: int, past: int) -> tuple[onnx.ModelProto, bool]:
    """`GroupQueryAttention` whose past and present are one buffer of the longest length."""
    return grouped(dtype, rows, new, past, shared=True)


FORMS = {
    "expanded": expanded,
    "Attention 23, mask": standard,
    "Attention 23, causal": causal,
    "GQA, separate cache": grouped,
    "GQA, shared cache": grouped_shared,
}


def _drawn(name: str, shape: tuple[int, int, int], dims: list[int], dtype: str) -> np.ndarray:
    """The same numbers for every form, laid out as `dims` say; a shared cache holds them at its start."""
    rows, new, past = shape
    heads = _HEADS if name == "q" else _KV_HEADS
    length = past if name.startswith("past") else new
    rng = np.random.default_rng(["q", "k", "v", "past_k", "past_v"].index(name))
    array = rng.standard_normal((rows, heads, length, _SIZE), np.float32).astype(dtype)
    if len(dims) == 3:
        return array.transpose(0, 2, 1, 3).reshape(dims)
    if dims[2] == length:
        return array
    cache = np.zeros(dims, dtype)
    cache[:, :, :length] = array
    return cache


def _run(stage: Stage, model: onnx.ModelProto, shared: bool, shape: tuple[int, int, int], dtype: str):
    rows, new, past = shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        session = open_session(path, stage.provider, stop_spinning=True)
    inputs, outputs = {}, {}
    for value in session.get_inputs():
        where = "cpu" if value.name == "total" else stage.provider
        if value.name == "mask":
            array = np.tril(np.ones((new, past + new), bool), past)[None, None].repeat(rows, 0)
            if value.type != "tensor(bool)":
                array = np.where(array, 0, -10000).astype(dtype)
        elif value.name == "seqlens_k":
            array = np.full(rows, past + new - 1, np.int32)
        elif value.name == "total":
            array = np.array([past + new], np.int32)
        else:
            array = _drawn(value.name, shape, list(value.shape), dtype)
        inputs[value.name] = to_ort_value(array, where)
    for output in model.graph.output:
        dims = [axis.dim_value for axis in output.type.tensor_type.shape.dim]
        if shared and output.name.startswith("present"):
            outputs[output.name] = inputs[output.name.replace("present", "past")]
        else:
            element = np.dtype(dtype).type
            outputs[output.name] = ort.OrtValue.ortvalue_from_shape_and_type(dims, element, stage.provider, 0)
    return bound(session, inputs, outputs)
