"""The embedding of a text as an output of the graph: pooling, linear layers and length 1, after the hidden states.

All of it is computed in float32, also where the graph's dtype is narrower: sums over many tokens overflow float16. The
formulas are those of `lora_export.sentence`; a text without a token in its mask gets zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lora_export.errors import InputRefused
from lora_export.graph.tape import Tape
from lora_export.sentence import SENTENCE_EMBEDDING, Activation, Dense, Pooling, SentenceEmbedding

_STATES, _MASK = "last_hidden_state", "attention_mask"
# From this opset on, the axes of every `Reduce…` are an input; before, those of `ReduceSum` alone.
_AXES_AS_INPUT = 18
_F32, _I64 = ir.DataType.FLOAT, ir.DataType.INT64
# As sentence-transformers and PyTorch have them.
_LEAST_SUM, _LEAST_LENGTH = 1e-9, 1e-12


def add_sentence_embedding(
    model: ir.Model, embedding: SentenceEmbedding, weights: Sequence[Mapping[str, np.ndarray]]
) -> ir.Model:
    """Give `model` (changed in place and returned) the output `sentence_embedding` `[batch, size]`.

    Args:
        weights: `weight` `[out, in]` and `bias` `[out]` of each linear layer, in order.

    Raises:
        InputRefused: The graph gives no hidden states, takes no mask, gives an embedding already, or a layer is of
            another size.
    """
    graph = model.graph
    if any(value.name == SENTENCE_EMBEDDING for value in graph.outputs):
        raise InputRefused(
            f"The graph gives a {SENTENCE_EMBEDDING} of its own",
            where="--pooling",
            expected="a graph that gives hidden states alone",
            next_step="leave --pooling out",
        )
    states = next((value for value in graph.outputs if value.name == _STATES), None)
    mask = next((value for value in graph.inputs if value.name == _MASK), None)
    if states is None or mask is None:
        raise InputRefused(
            "The base has no states to pool: a pooled embedding is one of a text encoder",
            where="--pooling",
            expected=f"a graph with the output {_STATES} and the input {_MASK}",
            found=", ".join(value.name for value in (*graph.inputs, *graph.outputs))[:300],
            next_step="leave --pooling out",
        )
    pool = _Pool(Tape(graph, None), states, mask, opset=model.opset_imports.get("", _AXES_AS_INPUT))
    parts = [pool.by(way) for way in embedding.pooling]
    vector = parts[0] if len(parts) == 1 else pool.together(parts)
    linear = iter(weights)
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    for layer in embedding.layers:
        vector = pool.normalized(vector) if layer is None else pool.dense(vector, layer, next(linear))
    vector = pool.cast(vector, states.dtype)
    if vector is states or vector.is_graph_output():
        vector = pool.op("Identity", [vector], vector.shape)
    vector.name = SENTENCE_EMBEDDING
    graph.outputs.append(vector)
    return model


class _Pool:
    """The nodes of a pooling, at the graph's end."""

    def __init__(self, tape: Tape, states: ir.Value, mask: ir.Value, *, opset: int) -> None:
        self._tape, self._mask, self._opset = tape, mask, opset
        self._batch, self._tokens, self._size = states.shape[0], states.shape[1], states.shape[2]
        self._states = self.cast(states, _F32)
        self._real = self.cast(mask, _F32)

    def op(self, name: str, inputs: list[ir.Value], shape, dtype: ir.DataType = _F32, **attributes) -> ir.Value:
        return self._tape.op(name, inputs, shape, dtype, **attributes)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in `dtype`."""
        return value if value.dtype is dtype else self.op("Cast", [value], value.shape, dtype, to=dtype)

    def by(self, way: Pooling) -> ir.Value:
        """`[batch, size]`, pooled one way."""
        if way is Pooling.MAX:
            return self._largest()
        if way in (Pooling.CLS, Pooling.LAST_TOKEN):
            return self._of_one(last=way is Pooling.LAST_TOKEN)
        weights = self._real
        if way is Pooling.WEIGHTED_MEAN:
            weights = self.op("Mul", [weights, self.cast(self._places(), _F32)], self._mask.shape)
        total = self._weighted_sum(weights)
        count = self._summed(weights)
        if way is Pooling.MEAN_SQRT_LEN:
            count = self.op("Sqrt", [count], count.shape)
        return self.op("Div", [total, count], total.shape)

    def _weighted_sum(self, weights: ir.Value) -> ir.Value:
        """Σ weights · states over tokens, as a product of matrices."""
        row = self.op("Unsqueeze", [weights, self._tape.ints([1])], [self._batch, 1, self._tokens])
        product = self.op("MatMul", [row, self._states], [self._batch, 1, self._size])
        return self.op("Squeeze", [product, self._tape.ints([1])], [self._batch, self._size])

    def _summed(self, weights: ir.Value) -> ir.Value:
        total = self.op("ReduceSum", [weights, self._tape.ints([1])], [self._batch, 1], keepdims=1)
        return self.op("Max", [total, self._number(_LEAST_SUM)], [self._batch, 1])

    def _places(self) -> ir.Value:
        """`[batch, tokens]`: 1, 2, 3 … from the first token of a row's mask on."""
        size = self.op("Shape", [self._mask], [1], _I64, start=1, end=2)
        end = self.op("Add", [self.op("Squeeze", [size], [], _I64), self._tape.scalar(1)], [], _I64)
        places = self.op("Range", [self._tape.scalar(1), end, self._tape.scalar(1)], [self._tokens], _I64)
        first = self.op("ArgMax", [self._real], [self._batch, 1], _I64, axis=1, keepdims=1)
        return self.op("Sub", [places, first], self._mask.shape, _I64)

    def _largest(self) -> ir.Value:
        real = self.cast(self._mask, ir.DataType.BOOL)
        is_real = self.op("Unsqueeze", [real, self._tape.ints([2])], [self._batch, self._tokens, 1], ir.DataType.BOOL)
        lowest = self._number(np.finfo(np.float32).min)
        kept = self.op("Where", [is_real, self._states, lowest], [self._batch, self._tokens, self._size])
        found = self._reduced("ReduceMax", kept, [self._batch, self._size], keepdims=0)
        return self._unless_empty(found)

    def _of_one(self, *, last: bool) -> ir.Value:
        """The state of the first or the last token of the mask."""
        place = self.op("ArgMax", [self._real], [self._batch, 1], _I64, axis=1, keepdims=1, select_last_index=int(last))
        found = self.op("GatherND", [self._states, place], [self._batch, self._size], batch_dims=1)
        return self._unless_empty(found)

    def _unless_empty(self, vector: ir.Value) -> ir.Value:
        """Zeros for a row without a token."""
        has_any = self._reduced("ReduceMax", self._real, [self._batch, 1], keepdims=1)
        return self.op("Mul", [vector, has_any], vector.shape)

    def together(self, parts: list[ir.Value]) -> ir.Value:
        """One vector of several."""
        size = len(parts) * self._size if isinstance(self._size, int) else None
        return self.op("Concat", parts, [self._batch, size], axis=-1)

    def dense(self, vector: ir.Value, layer: Dense, weights: Mapping[str, np.ndarray]) -> ir.Value:
        """`activation(W x + b)`."""
        if isinstance(vector.shape[-1], int) and vector.shape[-1] != layer.in_features:
            raise InputRefused(
                "A Dense does not take what is pooled",
                where=layer.sha256,
                expected=f"{vector.shape[-1]} features",
                found=f"{layer.in_features} features",
                next_step="save the sentence-transformers folder again",
            )
        shape = [self._batch, layer.out_features]
        found = self.op("MatMul", [vector, self._stored(np.ascontiguousarray(weights["weight"].T))], shape)
        if layer.bias:
            found = self.op("Add", [found, self._stored(weights["bias"])], shape)
        if layer.activation is Activation.IDENTITY:
            return found
        if layer.activation is Activation.GELU:
            return self.op("Gelu", [found], shape, domain="com.microsoft")
        return self.op("Relu" if layer.activation is Activation.RELU else str(layer.activation), [found], shape)

    def normalized(self, vector: ir.Value) -> ir.Value:
        """Of length 1; zeros stay."""
        length = self._reduced("ReduceL2", vector, [self._batch, 1], keepdims=1)
        length = self.op("Max", [length, self._number(_LEAST_LENGTH)], [self._batch, 1])
        return self.op("Div", [vector, length], vector.shape)

    def _reduced(self, name: str, value: ir.Value, shape: list, *, keepdims: int) -> ir.Value:
        """`value` reduced over its second axis."""
        if self._opset < _AXES_AS_INPUT:
            return self.op(name, [value], shape, axes=[1], keepdims=keepdims)
        return self.op(name, [value, self._tape.ints([1])], shape, keepdims=keepdims)

    def _number(self, value: float) -> ir.Value:
        return self._tape.constant(np.array(value, np.float32))

    def _stored(self, array: np.ndarray) -> ir.Value:
        """An initializer, so that it is written to the data file."""
        graph = self._mask.graph
        name = f"{SENTENCE_EMBEDDING}.{sum(each.startswith(SENTENCE_EMBEDDING) for each in graph.initializers)}"
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(_F32))
        value.const_value = ir.tensor(array, name=name)
        graph.initializers[name] = value
        return value
