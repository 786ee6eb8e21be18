"""Whether the manifest describes the graph that ONNX Runtime has opened."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from lora_export.agreement import require_agreement_in
from lora_export.contract import GraphContract, TensorSpec

_DTYPES = {"float": "float32"}


def require_described(session: ort.InferenceSession, contract: GraphContract, folder: Path, graph: str) -> None:
    """Refuse a `contract` that is not that of `session`, the graph `graph` of the export in `folder`.

    Raises:
        InputRefused: A field of the manifest says otherwise than the graph; it is named.
    """
    optional = session.get_overridable_initializers()
    inputs = [_spec(value) for value in (*session.get_inputs(), *optional)]
    outputs = [_spec(value) for value in session.get_outputs()]
    names = {value.name for value in optional}
    require_agreement_in(folder, graph, contract, inputs, outputs, optional=names)


def _spec(value: ort.NodeArg) -> TensorSpec:
    """An input or output as ONNX Runtime describes it; a size without a name is None."""
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(value.name, _DTYPES.get(dtype, dtype), tuple(value.shape))
