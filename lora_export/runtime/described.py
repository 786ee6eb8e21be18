"""What ONNX Runtime says that a graph takes and gives, and whether the manifest says so too."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from lora_export.agreement import require_agreement_in
from lora_export.contract import GraphContract, TensorSpec
from lora_export.errors import InputRefused

_DTYPES = {"float": "float32", "double": "float64"}


def require_described(session: ort.InferenceSession, contract: GraphContract, folder: Path, *, graph: str) -> None:
    """Refuse a `contract` that is not that of `session`, the graph `graph` of the export in `folder`.

    Raises:
        InputRefused: A field of the manifest says otherwise than the graph; it is named.
    """
    optional = session.get_overridable_initializers()
    inputs = [_spec(value) for value in (*session.get_inputs(), *optional)]
    outputs = [_spec(value) for value in session.get_outputs()]
    names = {value.name for value in optional}
    require_agreement_in(folder, graph, contract, inputs=inputs, outputs=outputs, optional=names)


def declared_in(graph: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs that the ONNX file `graph` must be fed, and its outputs; nothing is optimized for it.

    Raises:
        InputRefused: ONNX Runtime cannot open it.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's have no base of their own
        raise InputRefused(
            "ONNX Runtime cannot open the graph",
            where=str(graph),
            found=str(error),
            next_step="give a graph of ONNX's and ONNX Runtime's own operators, with its data file beside it",
        ) from error
    return tuple(map(_spec, session.get_inputs())), tuple(map(_spec, session.get_outputs()))


def _spec(value: ort.NodeArg) -> TensorSpec:
    """An input or output as ONNX Runtime describes it; a size without a name is None."""
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(value.name, _DTYPES.get(dtype, dtype), tuple(value.shape))
