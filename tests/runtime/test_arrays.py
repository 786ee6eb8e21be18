"""NumPy arrays go through a session in every dtype that a contract names, bfloat16 included."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from lora_export.runtime.arrays import numpy_dtype, run_arrays


def identity(kind: int) -> ort.InferenceSession:
    values = [helper.make_tensor_value_info(name, kind, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_a_session_runs_on_arrays_of_every_dtype(dtype):
    x = np.arange(6).reshape(3, 2).astype(numpy_dtype(dtype))
    found = run_arrays(
        identity(getattr(TensorProto, {"float32": "FLOAT"}.get(dtype, dtype.upper()))), "cpu", {"x": x}, names=["y"]
    )
    assert found["y"].dtype == x.dtype and (found["y"] == x).all()


def test_onnxruntime_s_own_run_takes_no_bfloat16():
    """Why `run_arrays` is used wherever a graph may be in bfloat16."""
    with pytest.raises(RuntimeError, match="can't be converted"):
        identity(TensorProto.BFLOAT16).run(None, {"x": np.zeros((1, 2), numpy_dtype("bfloat16"))})
