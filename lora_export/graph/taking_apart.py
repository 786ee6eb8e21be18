"""Packed projections of a written graph as values of their own, to look at.

A product by weights side by side, `a.weight+b.weight`, has sums behind it (biases, what adapters add), and then a
`Split`, or `GroupQueryAttention`, which takes queries, keys and values apart itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.graph.attention_node import GROUPED
from lora_export.graph.sites import NAME_SCOPES
from lora_export.graph.tape import Tape

_WEIGHT = ".weight"


def take_apart(model: ir.Model) -> ir.Model:
    """`model` (changed in place and returned) with its packed products split at once, and what was added to the whole
    added to each part."""
    for node in list(model.graph):
        if node.op_type == GROUPED and node.inputs[1] is None:
            for index, part in enumerate(_parts(model.graph, node, _sizes_of_heads(node)) or ()):
                node.replace_input_with(index, part)
        elif node.op_type == "Split" and node.inputs[0].producer() and node.inputs[0].producer().op_type == "Add":
            parts = _parts(model.graph, node, _sizes_of_parts(node))
            for old, new in zip(node.outputs, parts or (), strict=False):
                name, old.name = old.name, f"{old.name}[packed]"
                new.name = name
                old.replace_all_uses_with(new)
            if parts is not None:
                model.graph.remove(node, safe=True)
    return model


def _sizes_of_heads(attention: ir.Node) -> list[int]:
    """Of queries, keys and values; empty if the graph does not say how wide they are together."""
    heads = [attention.attributes.get_int(name) for name in ("num_heads", "kv_num_heads", "kv_num_heads")]
    product = _chain(attention.inputs[0])[0]
    if product is None or len(product.inputs) < 2:
        return []
    width = product.attributes.get_int("N") if "N" in product.attributes else product.inputs[1].shape[1]
    return [width // sum(heads) * n for n in heads]


def _sizes_of_parts(split: ir.Node) -> list[int]:
    sizes = ir.convenience.get_const_tensor(split.inputs[1]) if len(split.inputs) > 1 else None
    return [] if sizes is None else [int(size) for size in sizes.numpy()]


def _chain(value: ir.Value) -> tuple[ir.Node | None, list[ir.Node]]:
    """The product that `value` is, and the sums behind it, in order."""
    sums: list[ir.Node] = []
    while value.producer() is not None and value.producer().op_type == "Add":
        sums.insert(0, value.producer())
        value = sums[0].inputs[0]
    return value.producer(), sums


def _parts(graph: ir.Graph, reader: ir.Node, sizes: Sequence[int]) -> list[ir.Value] | None:
    """What `reader` reads first, in parts of `sizes`; None if that is no product that was packed here."""
    product, sums = _chain(reader.inputs[0])
    names = (product.inputs[1].name or "").split("+") if product is not None and len(product.inputs) > 1 else []
    if not sizes or len(names) != len(sizes):
        return None
    split = _Splitting(graph, sizes, [name.removesuffix(_WEIGHT) for name in names])
    parts = split(product.outputs[0])
    for each in sums:
        pairs = zip(parts, split.terms(each.inputs[1]), split.modules, strict=True)
        added = [
            ir.node("Add", [part, term], metadata_props=_metadata(module), name=f"{each.name}[{module}]")
            for part, term, module in pairs
        ]
        graph.insert_before(reader, added)
        parts = split.named([node.outputs[0] for node in added], each.outputs[0])
    return parts


@dataclass(frozen=True)
class _Splitting:
    """How values of `graph` are split: into the parts of `modules`, of `sizes`."""

    graph: ir.Graph
    sizes: Sequence[int]
    modules: Sequence[str]

    def __call__(self, whole: ir.Value) -> list[ir.Value]:
        node = whole.producer()
        parts = Tape(self.graph, node).split(whole, self.sizes)
        parts[0].producer().name = f"{node.name}[parts]"
        return self.named(parts, whole)

    def terms(self, whole: ir.Value) -> list[ir.Value]:
        """What is added to each part."""
        node = whole.producer()
        is_joined = node.op_type == "Concat" and len(node.inputs) == len(self.sizes)
        return list(node.inputs) if is_joined else self(whole)

    def named(self, parts: Sequence[ir.Value], whole: ir.Value) -> list[ir.Value]:
        """`parts`, called after what they are parts of in the file, each of the type of the whole."""
        for part, module in zip(parts, self.modules, strict=True):
            part.name, part.dtype = f"{whole.name}[{module.rpartition('.')[2]}]", whole.dtype
        return list(parts)


def _metadata(module: str) -> dict[str, str]:
    return {NAME_SCOPES: repr(["", module, ""])}
