"""The order in which a cache keeps its tokens: each row's real tokens side by side, padding after them.

GroupQueryAttention wants this order. Hosts pad where they like. So a Gather at the graph's entry brings the new tokens
into the order, and one at its exit brings the last hidden states back into the order that the host gave. No layer has
any.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.graph.head import dependents

# The inputs by token, `[batch, sequence, …]`.
_BY_TOKEN = ("input_ids", "position_ids", "lora_gate")
_INT64, _INT32 = ir.DataType.INT64, ir.DataType.INT32


class TokenOrder:
    """Nodes at the head of `graph` that compute the order from `attention_mask` `[batch, total]`.

    All that is computed of `hidden`, the last hidden states `[batch, sequence, …]`, is in the order in which the tokens
    were given, such as logits, and a gate on the head's pair.

    Attributes:
        lengths: int32 `[batch]`: the number of a row's tokens in the cache after this run, padding among the new ones
            included, minus one: GroupQueryAttention's `seqlens_k`. What padding leaves in the cache lies after the
            row's tokens, and the next run writes over it.
        sizes: int64 `[2]`: the batch and the new tokens.
        total: int32 scalar: the number of columns of `attention_mask`, computed from its shape and so on the CPU.
    """

    def __init__(self, graph: ir.Graph, hidden: ir.Value) -> None:
        self._graph, self._nodes = graph, []
        given_order = dependents(hidden)
        inputs = {value.name: value for value in graph.inputs}
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        self._batch_sequence = list(ids.shape)
        self.sizes = self._op("Shape", [ids], [2], _INT64)
        new = self._op("Shape", [ids], [1], _INT64, start=1, end=2)
        total = self._op("Shape", [mask], [1], _INT64, start=1, end=2)
        past = self._op("Sub", [total, new], [1], _INT64)
        zero, axis = self._ints([0]), self._ints([1])
        of_past = self._op("Slice", [mask, zero, past, axis], [ids.shape[0], None], _INT64)
        of_new = self._op("Slice", [mask, past, total, axis], self._batch_sequence, _INT64)
        # Summed with the new tokens: CUDA has no sum over nothing, and no number is copied to a GPU.
        every = self._op("ConstantOfShape", [self.sizes], self._batch_sequence, _INT64, value=ir.tensor([1]))
        counted = self._op("Concat", [of_past, every], list(mask.shape), _INT64, axis=1)
        n_tokens = self._op("ReduceSum", [counted, axis], [ids.shape[0]], _INT64, keepdims=0)
        last = self._op("Sub", [n_tokens, axis], [ids.shape[0]], _INT64)
        self.lengths = self._op("Cast", [last], [ids.shape[0]], _INT32, to=_INT32)
        scalar = self._op("Squeeze", [total], [], _INT64)
        self.total = self._op("Cast", [scalar], [], _INT32, to=_INT32)
        self._make_indices(of_new, new, axis)
        self._reorder_inputs(inputs, given_order)
        self._restore(hidden)

    def _make_indices(self, of_new: ir.Value, new: ir.Value, axis: ir.Value) -> None:
        """`[batch, sequence]`: where each token of the order comes from, and where each given token went, a padding
        token to the real one before it."""
        dims = self._batch_sequence
        from_start = self._op("CumSum", [of_new, self._scalar(1)], dims, _INT64)
        self._places = self._op("Sub", [from_start, axis], dims, _INT64)  # -1, the last, before all real ones
        to_end = self._op("CumSum", [of_new, self._scalar(1)], dims, _INT64, reverse=1)
        # The largest first: real tokens in the order given, then padding, which is 0.
        ranks = self._op("Mul", [of_new, to_end], dims, _INT64)
        self._sources = self._op("TopK", [ranks, new], dims, _INT64, n_outputs=2, axis=1, largest=1, sorted=1)

    def _reorder_inputs(self, inputs: dict[str, ir.Value], given_order: set[ir.Node]) -> None:
        own = given_order.union(self._nodes)
        for name in _BY_TOKEN:
            value = inputs.get(name)
            users = [(node, index) for node, index in value.uses() if node not in own] if value is not None else []
            users = [(node, index) for node, index in users if node.op_type != "Shape"]
            if not users:
                continue
            whole = value
            if len(value.shape) == 3:  # The gate may be one number a row, or one in all.
                shape = self._op("Concat", [self.sizes, self._ints([1])], [3], _INT64, axis=0)
                whole = self._op("Expand", [value, shape], [*self._batch_sequence, 1], value.dtype)
            if len(value.shape) == 2:
                ordered = self._op("GatherElements", [whole, self._sources], list(value.shape), value.dtype, axis=1)
            else:
                ordered = self._gather(whole, self._sources)
            for node, index in users:
                node.replace_input_with(index, ordered)
        first = next(iter(self._graph))
        self._graph.insert_before(first, self._nodes)
        self._nodes = []

    def _restore(self, hidden: ir.Value) -> None:
        users = tuple(hidden.uses())
        restored = self._gather(hidden, self._places)
        for node, index in users:
            node.replace_input_with(index, restored)
        self._graph.insert_after(hidden.producer(), self._nodes)
        self._nodes = []

    def _gather(self, value: ir.Value, indices: ir.Value) -> ir.Value:
        by_token = self._op("Unsqueeze", [indices, self._ints([2])], [*self._batch_sequence, 1], _INT64)
        return self._op("GatherND", [value, by_token], list(value.shape), value.dtype, batch_dims=1)

    def _op(
        self, op_type: str, inputs: list[ir.Value], shape: list, dtype, n_outputs: int = 1, **attributes
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, num_outputs=n_outputs)
        self._nodes.append(node)
        value = node.outputs[-1]
        value.shape, value.dtype = ir.Shape(shape), dtype
        return value

    def _ints(self, values: list[int]) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _scalar(self, value: int) -> ir.Value:
        return self._constant(np.array(value, np.int64))

    def _constant(self, array: np.ndarray) -> ir.Value:
        return self._op("Constant", [], list(array.shape), _INT64, value=ir.tensor(array))
