"""Ways in which an exported graph is known to go wrong, each as a surgery on the finished ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lora_export.contract import GATE_INPUT, GraphContract

_MASKS = ("attention_mask", "encoder_attention_mask")


@dataclass(frozen=True)
class GraphDamage:
    """One way of being wrong.

    Attributes:
        options: The adapter options (`adapter_options.py`) that it is done to.
        change: Alters the graph in place; whether there was anything to damage.
        dtypes: The dtypes of exports that it is done to; empty for all.
        not_on: Architectures that it does nothing to.
    """

    name: str
    change: Callable[[onnx.ModelProto, GraphContract], bool]
    options: tuple[str, ...] = ("lora",)
    dtypes: tuple[str, ...] = ()
    not_on: tuple[str, ...] = ()


class _Prelude:
    """Nodes in front of a graph, and a wrong value for an input of it that all its users then read."""

    def __init__(self, model: onnx.ModelProto, name: str = "damage") -> None:
        self._graph, self._nodes, self._name = model.graph, [], name

    def op(self, op_type: str, inputs: Sequence[str], **attributes: int) -> str:
        name = f"{self._name}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name

    def ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def like(self, name: str, value: float) -> str:
        """`value` in the dtype of an input."""
        dtype = next(entry.type.tensor_type.elem_type for entry in self._graph.input if entry.name == name)
        return self._constant(np.array(value, helper.tensor_dtype_to_np_dtype(dtype)))

    def _constant(self, array: np.ndarray) -> str:
        name = f"{self._name}_constant_{len(self._nodes)}"
        self._nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        return name

    def slice(self, name: str, start: int, end: int, axis: int) -> str:
        return self.op("Slice", [name, self.ints(start), self.ints(end), self.ints(axis)])

    def put_in_place(self, name: str, wrong: str) -> None:
        """Let every node that reads `name` read `wrong`."""
        for node in self._graph.node:
            for index, read in enumerate(node.input):
                if read == name:
                    node.input[index] = wrong

    def done(self, before: str = "") -> bool:
        """Put the nodes in front of all, or of the first one of an operator; whether there are any."""
        start = next((i for i, node in enumerate(self._graph.node) if before in ("", node.op_type)), 0)
        for index, node in enumerate(self._nodes, start):
            self._graph.node.insert(index, node)
        return bool(self._nodes)


_TO_THE_END = np.iinfo(np.int64).max


def _past_length(prelude: _Prelude, contract: GraphContract) -> str | None:
    """The number of tokens in the cache, `[1]`; None for a graph without one."""
    if not contract.past:
        return None
    # Not by the cache's own length: a buffer may be longer than what is in it.
    total, new = (prelude.op("Shape", [name], start=1, end=2) for name in ("attention_mask", "input_ids"))
    return prelude.op("Sub", [total, new])


def padding_read(model: onnx.ModelProto, contract: GraphContract) -> bool:
    """The attention mask is all ones: padding is read like text."""
    prelude = _Prelude(model)
    for name in (spec.name for spec in contract.inputs if spec.name in _MASKS):
        ones = prelude.op("Add", [prelude.op("Mul", [name, prelude.like(name, 0)]), prelude.like(name, 1)])
        prelude.put_in_place(name, ones)
    return prelude.done()


def past_one_short(model: onnx.ModelProto, contract: GraphContract) -> bool:
    """The newest token of the cache is not read: masked, or where the cache has no mask, cut off."""
    prelude = _Prelude(model)
    caches = [spec.name for spec in contract.inputs if spec.name.startswith("past_key_values.")]
    if any(".decoder." in name for name in caches):
        for name in caches:
            if ".decoder." in name:
                prelude.put_in_place(name, prelude.slice(name, 0, -1, 2))
        return prelude.done()
    length = _past_length(prelude, contract)
    if length is None:
        return False
    mask = "attention_mask"
    total = prelude.op("Squeeze", [prelude.op("Shape", [mask], start=1, end=2)])
    zero, one = prelude.like(mask, 0), prelude.like(mask, 1)
    is_newest = prelude.op("Equal", [prelude.op("Range", [zero, total, one]), prelude.op("Sub", [length, one])])
    prelude.put_in_place(mask, prelude.op("Where", [is_newest, zero, mask]))
    return prelude.done()


def positions_after_a_past(model: onnx.ModelProto, contract: GraphContract) -> bool:
    """Positions are one too far once there is a past."""
    prelude = _Prelude(model)
    length = _past_length(prelude, contract)
    if length is None or all(spec.name != "position_ids" for spec in contract.inputs):
        return False
    off = prelude.op("Min", [length, prelude.ints(1)])
    prelude.put_in_place("position_ids", prelude.op("Add", ["position_ids", off]))
    prelude.done()
    # An attention that turns its queries and keys itself takes the rows of these tables, which are made further on.
    attention = "GroupQueryAttention"
    tables = {name for node in model.graph.node if node.op_type == attention for name in node.input[7:9] if name}
    shifted = _Prelude(model, "table")
    for table in sorted(tables):
        rows = [table, off, shifted.ints(_TO_THE_END), shifted.ints(0)]
        shifted.put_in_place(table, shifted.op("Slice", rows))
    shifted.done(before=attention)
    return True


def neighbours_row(model: onnx.ModelProto, contract: GraphContract) -> bool:
    """Every row of a mixed batch reads the adapter of the row before it."""
    prelude = _Prelude(model)
    for entry in contract.adapter_inputs:
        parts = prelude.slice(entry.name, -1, _TO_THE_END, 0), prelude.slice(entry.name, 0, -1, 0)
        prelude.put_in_place(entry.name, prelude.op("Concat", parts, axis=0))
    return prelude.done()


def gate_ignored(model: onnx.ModelProto, contract: GraphContract) -> bool:
    """An activated LoRA is active for all tokens."""
    prelude = _Prelude(model)
    if contract.gate is not None:
        off = prelude.op("Mul", [GATE_INPUT, prelude.like(GATE_INPUT, 0)])
        prelude.put_in_place(GATE_INPUT, prelude.op("Add", [off, prelude.like(GATE_INPUT, 1)]))
    return prelude.done()


def gate_one_late(model: onnx.ModelProto, contract: GraphContract) -> bool:
    """An activated LoRA begins one token after its invocation does."""
    prelude = _Prelude(model)
    if contract.gate is not None:
        parts = prelude.slice(GATE_INPUT, 0, 1, 1), prelude.slice(GATE_INPUT, 0, -1, 1)
        prelude.put_in_place(GATE_INPUT, prelude.op("Concat", parts, axis=1))
    return prelude.done()


GRAPH_DAMAGES = (
    # CLIP's texts are padded on the right only, and its attention is causal.
    GraphDamage("padding read", padding_read, not_on=("CLIP",)),
    GraphDamage("cache read one short", past_one_short),
    GraphDamage("positions off by one after a cache", positions_after_a_past),
    GraphDamage("a row reads its neighbour's adapter", neighbours_row, ("lora", "modules_to_save", "bias", "dora")),
    GraphDamage("gate ignored", gate_ignored, ("alora",)),
    GraphDamage("gate one token late", gate_one_late, ("alora",)),
)
