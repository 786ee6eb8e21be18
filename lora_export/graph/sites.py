"""Find the nodes that compute a module's linear map.

A node is found by the module path that the exporter recorded on it (`pkg.torch.onnx.name_scopes`, last but one entry)
and by the weight it reads, never by its generated name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.errors import InputRefused, some_of

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
# The last two are in graphs that other tools wrote: a trace has neither before fusion.
_LINEAR = (
    ("MatMul", ""), ("Gemm", ""), ("FusedMatMul", "com.microsoft"), ("MatMulNBits", "com.microsoft"),
)  # fmt: skip
# Operators that add a bias themselves → the input that it is.
BIAS_INSIDE = {"Gemm": 2, "MatMulNBits": 5}


@dataclass(frozen=True)
class Site:
    """One use of a linear module in the graph: `output = input · weight (+ bias)`.

    Attributes:
        module: The module's path in the base model.
        node: The `MatMul` or `FusedMatMul` (bias added by a later node), or `Gemm` or `MatMulNBits` (bias inside).
        weight: The initializer `<module>.weight`; of `MatMulNBits`, its integers.
        in_features, out_features: The map's sizes.
        weight_is_transposed: True if the initializer is `[out, in]` (`nn.Linear`), False if it is `[in, out]`
            (`Conv1D` of GPT-2).
    """

    module: str
    node: ir.Node
    weight: ir.Value
    in_features: int
    out_features: int
    weight_is_transposed: bool

    @property
    def dtype(self) -> ir.DataType:
        """Of the floats that it computes in."""
        return self.node.inputs[2].dtype if self.is_integers else self.weight.dtype

    @property
    def is_integers(self) -> bool:
        """Whether its weight is stored as integers, which nothing can replace."""
        return self.node.op_type == "MatMulNBits"

    @property
    def input(self) -> ir.Value:
        return self.node.inputs[0]

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def output_dims(self) -> list | None:
        """The output's shape, from the input's if it has none; None where neither is known."""
        if self.output.shape is not None:
            return list(self.output.shape)
        if self.input.shape is None:
            return None
        return [*list(self.input.shape)[:-1], self.out_features]


def module_of(node: ir.Node) -> str | None:
    """The path of the module whose `forward` made `node`, or None if the exporter recorded none."""
    scopes = node.metadata_props.get(NAME_SCOPES)
    if scopes is None:
        return None
    entries = ast.literal_eval(scopes)
    return entries[-2] if len(entries) >= 2 else ""


def bias_inside(node: ir.Node) -> ir.Value | None:
    """The bias that the linear map `node` adds itself; None if it adds none."""
    place = BIAS_INSIDE.get(node.op_type)
    return node.inputs[place] if place is not None and len(node.inputs) > place else None


def find_sites(graph: ir.Graph, modules: Iterable[str]) -> dict[str, list[Site]]:
    """The sites of each of `modules`, in graph order; a module called twice (shared layers) has two.

    Raises:
        InputRefused: A module has no linear map in the graph: it is no Linear, or the task's graph never calls it.
    """
    sites = sites_in(graph, modules)
    refuse_unlinked([module for module, found in sites.items() if not found])
    return sites


def sites_in(graph: ir.Graph, modules: Iterable[str]) -> dict[str, list[Site]]:
    """As `find_sites`, with none for a module that has no linear map in this graph."""
    sites: dict[str, list[Site]] = {module: [] for module in modules}
    for node in graph.all_nodes():
        if (node.op_type, node.domain) in _LINEAR:
            module = module_of(node)
            if module in sites and (site := _linear_site(module, node)) is not None:
                sites[module].append(site)
    return sites


def refuse_unlinked(missing: Sequence[str]) -> None:
    """Raise InputRefused if there are modules that no exported graph has a linear map of."""
    if missing:
        raise InputRefused(
            "Adapted modules are not linear maps of the exported graph",
            where=some_of(missing, 6),
            expected="nn.Linear or Conv1D modules that this task's forward pass calls",
            next_step="merge the adapter instead, or export the task that the adapter was trained for (--task)",
        )


def _linear_site(module: str, node: ir.Node) -> Site | None:
    operand = node.inputs[1]
    if node.op_type == "MatMulNBits":
        return Site(module, node, operand, node.attributes.get_int("K"), node.attributes.get_int("N"), True)
    transposed = bool(node.attributes.get_int("transB", 0))
    producer = operand.producer()
    if producer is not None and producer.op_type == "Transpose":
        operand, transposed = producer.inputs[0], not transposed
    # A tied weight has the name of the tensor it is tied to, so the shape decides, not the name.
    if not operand.is_initializer() or operand.const_value is not None or len(operand.shape) != 2:
        return None
    rows, columns = operand.shape
    in_features, out_features = (columns, rows) if transposed else (rows, columns)
    return Site(module, node, operand, in_features, out_features, transposed)
