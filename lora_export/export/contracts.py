"""What an exported graph's contract is, and whether a manifest says the same of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from lora_export.agreement import require_agreement_in
from lora_export.artifact import Manifest
from lora_export.contract import AdapterInput, GraphContract, TensorSpec, graph_file
from lora_export.graph.grouped_attention import cache_layout


def contract_of(model: ir.Model, adapter_inputs: Sequence[AdapterInput], *, required: bool = False) -> GraphContract:
    """The contract of a graph: its own inputs and outputs, and the adapter inputs, which may be `required`."""
    of_adapters = {entry.name for entry in adapter_inputs}
    inputs, outputs = _specs(model)
    own = [spec for spec in inputs if spec.name not in of_adapters]
    optional = tuple(spec for spec in own if spec.name in model.graph.initializers)
    needed = tuple(spec for spec in own if spec not in optional)
    return GraphContract(needed, outputs, tuple(adapter_inputs), cache_layout(model), optional, required)


def _specs(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs of a graph, adapter inputs included, and its outputs."""

    def spec(value: ir.Value) -> TensorSpec:
        dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        return TensorSpec(value.name, str(value.dtype.numpy()), dims)

    return tuple(map(spec, model.graph.inputs)), tuple(map(spec, model.graph.outputs))


def require_described(manifest: Manifest, folder: Path) -> None:
    """Refuse an export in `folder` whose manifest does not describe its graphs: adapters are packed by it.

    Raises:
        InputRefused: A field of the manifest says otherwise than its graph.
    """
    for graph, contract in manifest.graphs.items():
        model = ir.load(folder / graph_file(graph))
        inputs, outputs = _specs(model)
        optional = model.graph.initializers.keys()
        require_agreement_in(folder, graph, contract, inputs=inputs, outputs=outputs, optional=optional)
