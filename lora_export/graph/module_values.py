"""Find the modules of the base in a written graph, and look into it: values by module, and the graph with more outputs.

A fused graph has lost part of its module paths, but its weights keep the names of the checkpoint. Where a module's
weight is read, the module is computed:

1. The anchor is the node that reads `<module>.weight`: a product, a lookup, a convolution or a normalization. Of
   projections packed into one product, `a.weight+b.weight`, each has its part of the Split behind it, once
   `take_apart` has put it there. A pair that they share has a Split behind its product of B.
2. The module's output is where the chain of its own nodes ends: those that add the product of its pair or its bias,
   scale it by its gain, and reshape it. A node is the module's own if it reads one of the module's tensors, or carries
   the module's path.
3. A fused operator may add the module's bias together with what belongs to the next module. No value of the graph is
   then the output with its bias: `bias_is_pending`.
4. A module without an anchor (a normalization that was not fused, its weight folded into a constant) is where its
   path ends: the last value of its nodes that others read.
5. A skip normalization may add the product of a pair as if it were a residual. The module's output is then the sum that
   the normalization gives as a further output. Where it gives none, the output is the sum of two values: `addend`.
6. A product may have a factor: `scale`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from lora_export.contract import ADAPTER_INPUT_KINDS, AdapterInputKind, spec_of
from lora_export.graph.sites import NAME_SCOPES
from lora_export.graph.stored_integers import without_rounded_activations
from lora_export.graph.taking_apart import take_apart

# Operator → the input that is data; the weight is the other of the first two, or the third of skip normalizations.
_ANCHORS = {
    "MatMul": 0, "MatMulNBits": 0, "FusedMatMul": 0, "Gemm": 0, "FusedGemm": 0, "Conv": 0, "FusedConv": 0, "Gather": 1,
    "LayerNormalization": 0, "SimplifiedLayerNormalization": 0, "RMSNormalization": 0,
    "SkipLayerNormalization": None, "SkipSimplifiedLayerNormalization": None,
}  # fmt: skip
# The output of a skip normalization that holds the sum it normalizes.
_SKIP_SUM = 3
_FOLLOWED = frozenset({"Add", "Mul", "Reshape", "Cast", "Unsqueeze", "Squeeze", "Sum"})
_SHARED_B = f".{spec_of(AdapterInputKind.LORA_B).suffix}"
_PAIR = (AdapterInputKind.LORA_A, AdapterInputKind.LORA_B)
# A name that two values would have had ends with a number; a pair's is not a weight of the base.
_NOT_OF_BASE = "".join(rf"(?<!\.{kind})" for kind in _PAIR)
_INTEGERS = re.compile(r"_Q[248]$")  # of a quantized weight, as ONNX Runtime's quantizer names them
_WEIGHT = re.compile(rf"(?P<module>.+?){_NOT_OF_BASE}\.weight(_\d+)?")
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True)
class GraphNode:
    """One node: names of its values ("" for one left out), the path of the module it was traced in, if known, and the
    factor of a product."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: str | None
    scale: float = 1.0


@dataclass(frozen=True)
class ModuleSite:
    """One use of a module in the graph.

    Attributes:
        module: The module's path, from the path of its node, else from its weight's name (a tied weight has one name).
        named: The module in the weight's name; empty in case 4.
        is_lookup: Whether it is an embedding's lookup.
        position: Where in the graph its output is complete.
        input, output: Values; no input where the graph does not have it by itself.
        parts: Values inside an adapted module: "base" (before the adapter), "lora_A" and "lora_B"; of a pair that
            modules share, no "lora_A" is one module's.
        bias_is_pending: Case 3.
        base_has_bias: Whether the anchor adds the module's bias.
        addend: Case 5.
        scale: Case 6.
        shares_pair: Whether its pair is one of several modules.
    """

    module: str
    named: str
    is_lookup: bool
    position: int
    input: str | None
    output: str
    parts: Mapping[str, str]
    bias_is_pending: bool = False
    base_has_bias: bool = False
    addend: str | None = None
    scale: float = 1.0
    shares_pair: bool = False

    @property
    def has_pair(self) -> bool:
        """Whether the parts are those of a pair."""
        return AdapterInputKind.LORA_A in self.parts or self.shares_pair


class WrittenGraph:
    """A graph file as values by name; its weights are not read. Its products leave activations as they are, where the
    file lets them be rounded to integers: what they should be is then known to float rounding."""

    def __init__(self, path: Path, *, is_to_run: bool = False) -> None:
        """
        Args:
            is_to_run: The graph is run as it is, and not looked into: its packed projections stay packed.
        """
        model = without_rounded_activations(ir.load(path))
        self._model = model if is_to_run else take_apart(model)
        graph = self._model.graph
        self.nodes = tuple(_node(node) for node in graph)
        self.inputs = frozenset(value.name for value in graph.inputs)
        self.constants = frozenset(graph.initializers)
        self.outputs = tuple(value.name for value in graph.outputs)
        self._types = {value.name: value.dtype for node in graph for value in node.outputs}

    @cached_property
    def producers(self) -> dict[str, int]:
        """Position of the node that gives a value."""
        return {value: index for index, node in enumerate(self.nodes) for value in node.outputs if value}

    @cached_property
    def consumers(self) -> dict[str, list[int]]:
        """Positions of the nodes that read a value."""
        found: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for value in dict.fromkeys(filter(None, node.inputs)):
                found.setdefault(value, []).append(index)
        return found

    def node_of(self, value: str) -> GraphNode | None:
        """The node that gives `value`; None for an input or a constant."""
        index = self.producers.get(value)
        return None if index is None else self.nodes[index]

    def may_be_float(self, value: str) -> bool:
        """Whether `value` holds floats, or the file does not say."""
        return self._types.get(value) is None or self._types[value] in _FLOATS

    def with_outputs(self, values: Iterable[str]) -> bytes:
        """The model with `values` as further outputs, serialized; its weights stay where they are.

        Args:
            values: Names of values of nodes; those that are outputs already are left as they are.
        """
        graph, names = self._model.graph, set(self.outputs)
        by_name = {value.name: value for node in graph for value in node.outputs}
        added = [by_name[name] for name in dict.fromkeys(values) if name in by_name and name not in names]
        graph.outputs.extend(added)
        try:
            return ir.serde.serialize_model(self._model).SerializeToString()
        finally:
            del graph.outputs[len(self.outputs) :]

    def sites(self) -> list[ModuleSite]:
        """The uses of all modules that are found, in the order of the graph."""
        found = [site for index in range(len(self.nodes)) for site in self._anchored(index)]
        anchored = {site.module for site in found}
        return sorted([*found, *self._by_path(anchored)], key=lambda site: site.position)

    def _anchored(self, index: int) -> list[ModuleSite]:
        node = self.nodes[index]
        if node.op_type not in _ANCHORS:
            return []
        data, weight = _operands(node)
        whole = _INTEGERS.sub("", weight)
        owners = [_WEIGHT.fullmatch(part) for part in whole.split("+")]
        if weight not in self.constants | self.inputs or not all(owners):
            return []
        if data is not None and data not in self.producers and node.op_type != "Gather" and data not in self.inputs:
            return []
        named = [owner["module"] for owner in owners]
        if len(named) == 1:
            module = node.module if _fits(node.module) else named[0]
            return [self._site(module, named[0], node, start=node.outputs[0], data=data)]
        split = next((self.nodes[i] for i in self.consumers[node.outputs[0]] if self.nodes[i].op_type == "Split"), None)
        if split is None or len(split.outputs) != len(named):
            return []
        return [
            self._site(name, name, node, start=value, data=data)
            for name, value in zip(named, split.outputs, strict=True)
        ]

    def _site(self, module: str, named: str, node: GraphNode, *, start: str, data: str | None) -> ModuleSite:
        chain = [start]
        while own := [value for value in self._following(chain[-1], module) if value not in chain]:
            chain.append(own[0])
        output = chain[-1]
        readers = [self.nodes[index] for index in self.consumers.get(output, ())]
        pending = any(f"{module}.bias" in reader.inputs and reader.op_type not in _FOLLOWED for reader in readers)
        parts = {"base": start} if output != start else {}
        for part in _PAIR:
            reading = [self.nodes[index] for index in self.consumers.get(spec_of(part).name(module), ())]
            products = [reader.outputs[0] for reader in reading if reader.op_type == "MatMul"]
            # Of a module called several times, the one that belongs to this call.
            before = [value for value in products if self.producers[value] <= self.producers[output]]
            if products:
                parts[str(part)] = (before or products)[-1]
        shared = self._part_of_shared(*chain[:2]) if len(chain) > 1 else None
        if shared is not None:
            parts[AdapterInputKind.LORA_B] = shared
        total, addend = self._skip_sum(output, parts.get(AdapterInputKind.LORA_B))
        pending = pending and total is None
        output = total or output
        has_bias = f"{module}.bias" in node.inputs
        position = max(self.producers[value] for value in (output, addend) if value)
        facts = (position, data, output, parts, pending, has_bias, addend, node.scale, shared is not None)
        return ModuleSite(module, named, node.op_type == "Gather", *facts)

    def _part_of_shared(self, base: str, output: str) -> str | None:
        """What is added to `base`, if it is a module's part of a pair that it shares with others."""
        other = next((value for value in self.node_of(output).inputs if value != base), None)
        split = None if other is None else self.node_of(other)
        product = self.node_of(split.inputs[0]) if split is not None and split.op_type == "Split" else None
        is_pair = product is not None and any(name.endswith(_SHARED_B) and "+" in name for name in product.inputs)
        return other if is_pair else None

    def _skip_sum(self, output: str, product: str | None) -> tuple[str | None, str | None]:
        """Case 5: the sum, or the value to be added; neither where the product of the pair is added by itself."""
        for index in self.consumers.get(output, ()):
            node = self.nodes[index]
            if node.op_type in _ANCHORS and _ANCHORS[node.op_type] is None and product is not None:
                other = next((value for value in node.inputs[:2] if value != output), None)
                if other is not None and self._is_made_of(other, product):
                    total = node.outputs[_SKIP_SUM] if len(node.outputs) > _SKIP_SUM else ""
                    return (total, None) if total else (None, other)
        return None, None

    def _is_made_of(self, value: str, product: str) -> bool:
        """Whether `value` is `product`, reshaped or not."""
        while value != product:
            node = self.node_of(value)
            if node is None or node.op_type != "Reshape":
                return False
            value = node.inputs[0]
        return True

    def _following(self, value: str, module: str) -> list[str]:
        """The values that the module's own nodes make of one of its values."""
        readers = [self.nodes[index] for index in self.consumers.get(value, ())]
        return [n.outputs[0] for n in readers if n.op_type in _FOLLOWED and self._is_own(n, module)]

    def _is_own(self, node: GraphNode, module: str) -> bool:
        return node.module == module or any(spec.name(module) in node.inputs for spec in ADAPTER_INPUT_KINDS)

    def _readers(self, index: int) -> set[int]:
        return {reader for value in self.nodes[index].outputs for reader in self.consumers.get(value, ())}

    def _by_path(self, anchored: set[str]) -> list[ModuleSite]:
        """Case 4."""
        paths: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            if _fits(node.module) and node.module not in anchored:
                paths.setdefault(node.module, []).append(index)
        found = []
        for module, own in paths.items():
            last = [index for index in own if not self._readers(index) <= set(own)]
            if last and self.may_be_float(self.nodes[last[-1]].outputs[0]):
                found.append(ModuleSite(module, "", False, last[-1], None, self.nodes[last[-1]].outputs[0], {}))
        return found


def _fits(module: str | None) -> bool:
    return bool(module) and not module.startswith("_")


def _node(node: ir.Node) -> GraphNode:
    scopes = node.metadata_props.get(NAME_SCOPES)
    entries = ast.literal_eval(scopes) if scopes else []
    module = entries[-2] if len(entries) >= 2 else None
    names = (tuple("" if v is None else v.name or "" for v in values) for values in (node.inputs, node.outputs))
    scale = node.attributes.get_float("alpha", 1.0) if node.op_type == "FusedMatMul" else 1.0
    return GraphNode(node.name or "", node.op_type, *names, module, scale)


def _operands(node: GraphNode) -> tuple[str | None, str]:
    """The data and the weight; of a skip normalization the data is the sum, where the graph has it as an output."""
    data = _ANCHORS[node.op_type]
    if data is not None:
        return node.inputs[data], node.inputs[1 - data]
    total = node.outputs[_SKIP_SUM] if len(node.outputs) > _SKIP_SUM else ""
    return total or None, node.inputs[2]
