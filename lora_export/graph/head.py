"""The head of a decoder: what it reads, and an optional input that says for how many of the last tokens it is run.

A prompt of 1,024 tokens with a vocabulary of 49,152 has 200 MB of logits a row in float32, and generation reads one
token's. So the last hidden states are cut before the head:

    hidden [batch, sequence, size] → Slice(hidden, start = −k) → [batch, min(k, sequence), size] → head → logits

With k = 0, the default, all are kept. Other exports of Transformers' decoders give the input this name, too. The head
must compute each token by itself: `_BY_TOKEN` operators on weights, constants and adapter inputs. A gate has a number a
token, so it is cut as well.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.contract import GATE_INPUT, LOGITS_TO_KEEP
from lora_export.graph.tape import Tape

_LOGITS = "logits"
_BY_TOKEN = frozenset({"MatMul", "FusedMatMul", "Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Neg"})
_INT64 = ir.DataType.INT64


def last_hidden(graph: ir.Graph) -> ir.Value | None:
    """What the head reads: the input of the last multiplication by a weight before `logits`."""
    value = next((each for each in graph.outputs if each.name == _LOGITS), None)
    while value is not None and value.producer() is not None:
        node = value.producer()
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits") and node.inputs[1].producer() is None:
            hidden = node.inputs[0]
            return hidden if hidden.shape is not None and len(hidden.shape) == 3 and hidden.producer() else None
        value = next((each for each in node.inputs if each is not None and each.const_value is None), None)
    return None


def dependents(value: ir.Value) -> set[ir.Node]:
    """All nodes that depend on `value`."""
    found: set[ir.Node] = set()
    waiting = [node for node, _ in value.uses()]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [user for output in node.outputs for user, _ in output.uses()]
    return found


def keep_last_logits(model: ir.Model) -> ir.Model:
    """Give `model` (changed in place and returned), a decoder, the input where its head goes by token."""
    graph = model.graph
    hidden = last_hidden(graph)
    head = set() if hidden is None else dependents(hidden)
    if not head or not _goes_by_token(head, hidden):
        return model
    n_kept = ir.Value(name=LOGITS_TO_KEEP, shape=ir.Shape([]), type=ir.TensorType(_INT64))
    n_kept.const_value = ir.tensor(np.array(0, np.int64), name=LOGITS_TO_KEEP)
    graph.inputs.append(n_kept)
    graph.initializers[LOGITS_TO_KEEP] = n_kept
    tape = Tape(graph, hidden.producer())
    # −k, computed of a shape: ONNX Runtime then computes it on the CPU, where Slice reads it, not on a GPU.
    length = tape.op("Shape", [hidden], [1], _INT64, start=1, end=2)
    start = tape.op("Sub", [length, tape.op("Add", [length, n_kept], [1], _INT64)], [1], _INT64)
    bounds = [start, tape.ints([np.iinfo(np.int64).max]), tape.ints([1])]
    for value in (hidden, *(each for each in graph.inputs if each.name == GATE_INPUT)):
        users = [(node, index) for node, index in value.uses() if node in head]
        if users:
            kept = tape.op("Slice", [value, *bounds], [value.shape[0], None, value.shape[2]], value.dtype)
            for node, index in users:
                node.replace_input_with(index, kept)
    for node in head:
        (output,) = node.outputs
        output.shape = ir.Shape([output.shape[0], "num_logits", output.shape[2]])
    return model


def _goes_by_token(head: set[ir.Node], hidden: ir.Value) -> bool:
    """Whether the nodes of `head`, which depend on `hidden`, give the logits and nothing else, token by token."""
    for node in head:
        if node.op_type not in _BY_TOKEN or len(node.outputs) != 1:
            return False
        (output,) = node.outputs
        if output.shape is None or len(output.shape) != 3 or (output.is_graph_output() and output.name != _LOGITS):
            return False
        others = [value for value in node.inputs if value is not None and value is not hidden]
        if any(value.producer() not in head and not _is_by_no_token(value, hidden) for value in others):
            return False
    return not hidden.is_graph_output()


def _is_by_no_token(value: ir.Value, hidden: ir.Value) -> bool:
    """Whether `value` is a weight, a constant or an adapter's input."""
    producer = value.producer()
    if producer is not None:
        return producer.op_type == "Constant" or (
            producer.op_type == "Transpose" and _is_by_no_token(producer.inputs[0], hidden)
        )
    return not value.is_graph_input() or (len(value.shape) == 3 and value.shape[0] != hidden.shape[0])
