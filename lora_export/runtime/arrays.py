"""NumPy arrays to ONNX Runtime values and back, bfloat16 included, which NumPy has no type for without ml_dtypes."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype that a contract names, e.g. "float16" or "bfloat16"."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def onnx_element_type(name: str) -> type | int:
    """As ONNX Runtime's bindings take a dtype that a contract names: NumPy's, or ONNX's number for bfloat16."""
    return _ONNX_BFLOAT16 if name == "bfloat16" else np.dtype(name).type


def to_ort_value(array: np.ndarray, device: str) -> ort.OrtValue:
    """`array` as a value on `device` ("cpu" or "cuda"); on the CPU it shares the array's memory and keeps it alive."""
    array = np.ascontiguousarray(array)
    if array.dtype.name != "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy(array, device, 0)
    # A CPU value; a binding copies it to where the graph runs.
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_BFLOAT16)


def to_array(value: ort.OrtValue) -> np.ndarray:
    """A CPU value as an array, which keeps its memory."""
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = value.shape()
    n_bytes = 2 * math.prod(shape)
    raw = np.frombuffer(ctypes.string_at(value.data_ptr(), n_bytes), np.uint16)
    return raw.reshape(shape).view(numpy_dtype("bfloat16")).copy()


def memory_of(value: ort.OrtValue) -> np.ndarray:
    """The memory of a CPU value, which must outlive what is returned, as an array of bytes in its shape.

    The last axis holds the bytes of the value's last axis.
    """
    shape = value.shape()
    itemsize = value.tensor_size_in_bytes() // max(1, math.prod(shape))
    raw = (ctypes.c_uint8 * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    return np.frombuffer(raw, np.uint8).reshape(*shape[:-1], shape[-1] * itemsize)


def run_arrays(
    session: ort.InferenceSession, device: str, feeds: Mapping[str, np.ndarray], *, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The outputs `names` of a session on `device` for `feeds`, in any dtype: `InferenceSession.run` takes and returns
    no bfloat16."""
    # Held until the run is over: on the CPU a binding reads the arrays' own memory.
    held = {name: to_ort_value(array, device) for name, array in feeds.items()}
    return run_values(session, held, names)


def run_values(
    session: ort.InferenceSession, values: Mapping[str, ort.OrtValue], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """As `run_arrays`, of values that are on the device."""
    binding = session.io_binding()
    for name in names:
        binding.bind_output(name)
    return run_bound(session, binding, values, names=names)


def run_bound(
    session: ort.InferenceSession, binding: ort.IOBinding, values: Mapping[str, ort.OrtValue], *, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """As `run_values`, on a `binding` whose first bound outputs are `names`."""
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    session.run_with_iobinding(binding)
    return dict(zip(names, map(to_array, binding.get_outputs()[: len(names)]), strict=True))


def lowest(dtype: np.dtype) -> float:
    """The lowest finite number of a floating dtype."""
    if dtype.name == "bfloat16":
        import ml_dtypes

        return float(ml_dtypes.finfo(dtype).min)
    return float(np.finfo(dtype).min)
