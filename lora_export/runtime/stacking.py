"""Stack the adapters of a batch's rows into the inputs of a dynamic graph. NumPy only.

For a row with pairs `(A_k, B_k)` and weights `w_k`, `Σ_k w_k (x A_k) B_k = (x [A_1 … A_n]) [w_1 B_1; …; w_n B_n]`:
a blend is a concatenation along rank. Rows of different ranks are padded with zeros to the largest in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lora_export.contract import AdapterInput, AdapterInputKind, GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import lowest, numpy_dtype

# What one row runs: adapter names with their weights, in a fixed order; empty for the base.
RowSpec = tuple[tuple[str, float], ...]
Tensors = Mapping[str, np.ndarray]


def stack_rows(
    contract: GraphContract, adapters: Mapping[str, Tensors], rows: Sequence[RowSpec], defaults: Tensors
) -> dict[str, np.ndarray]:
    """The inputs for a batch, by name; an input that would equal its default is left out.

    Args:
        adapters: Each adapter's tensors by input name, `[1, …]`.
        rows: One entry a row of the batch; one entry in all serves every row.
        defaults: The stored defaults of replaced Linears, `[1, in, out]` and `[1, 1, out]`.

    Returns:
        `[len(rows), …]` arrays in the contract's dtypes.

    Raises:
        UsageProblem: A blend mixes heads of different sizes.
    """
    stacked: dict[str, np.ndarray] = {}
    for module in contract.modules:
        inputs = contract.of_module(module)
        if AdapterInputKind.LORA_A in inputs:
            pair = inputs[AdapterInputKind.LORA_A], inputs[AdapterInputKind.LORA_B]
            stacked |= _stack_pair(*pair, adapters, rows)
        if AdapterInputKind.TOKEN_IDS in inputs:
            tokens = inputs[AdapterInputKind.TOKEN_IDS], inputs[AdapterInputKind.TOKEN_DELTA]
            stacked |= _stack_tokens(*tokens, adapters, rows)
        whole = [inputs[kind] for kind in _WHOLE if kind in inputs]
        if any(entry.name in adapters[name] for row in rows for name, _ in row for entry in whole):
            for entry in whole:
                stacked[entry.name] = _stack_whole(entry, adapters, rows, _default(entry, defaults))
    return stacked


def default_inputs(contract: GraphContract, defaults: Tensors) -> dict[str, np.ndarray]:
    """What every adapter input but the gate is where no adapter is fed, by name: `[1, …]`, pairs and tokens empty."""
    found = {}
    for entry in contract.adapter_inputs:
        if entry.kind in _EMPTY_AXIS:
            shape = [1, *entry.dims[1:]]
            shape[_EMPTY_AXIS[entry.kind]] = 0
            found[entry.name] = np.zeros(shape, numpy_dtype(entry.dtype))
        elif entry.kind is not AdapterInputKind.GATE:
            found[entry.name] = _default(entry, defaults)
    return found


# The axis of which an input without an adapter has nothing: the rank, the tokens.
_EMPTY_AXIS = {
    AdapterInputKind.LORA_A: 2,
    AdapterInputKind.LORA_B: 1,
    AdapterInputKind.TOKEN_IDS: 1,
    AdapterInputKind.TOKEN_DELTA: 1,
}
# Inputs that an adapter gives as a whole, in place of what the base has.
_WHOLE = (AdapterInputKind.WEIGHT, AdapterInputKind.BIAS, AdapterInputKind.GAIN)


def _default(entry: AdapterInput, defaults: Tensors) -> np.ndarray:
    """What the graph takes where no adapter is fed: stored, or a constant (a gain of 1, the zeros of no bias)."""
    if entry.name in defaults:
        return defaults[entry.name]
    constant = 1 if entry.kind is AdapterInputKind.GAIN else 0
    return np.full((1, 1, entry.dims[-1]), constant, numpy_dtype(entry.dtype))


def _stack_tokens(
    ids: AdapterInput, delta: AdapterInput, adapters: Mapping[str, Tensors], rows: Sequence[RowSpec]
) -> dict[str, np.ndarray]:
    """Tokens of a blend one behind the other, as what is added to a token twice adds up."""
    parts = [[(adapters[name], weight) for name, weight in row if ids.name in adapters[name]] for row in rows]
    n_tokens = max(sum(tensors[ids.name].shape[1] for tensors, _ in row) for row in parts)
    if n_tokens == 0:
        return {}
    stacked_ids = np.full((len(rows), n_tokens), -1, np.int64)
    stacked = np.zeros((len(rows), n_tokens, delta.dims[2]), numpy_dtype(delta.dtype))
    for row, part in enumerate(parts):
        start = 0
        for tensors, weight in part:
            end = start + tensors[ids.name].shape[1]
            stacked_ids[row, start:end] = tensors[ids.name][0]
            stacked[row, start:end] = tensors[delta.name][0] * np.asarray(weight, stacked.dtype)
            start = end
    return {ids.name: stacked_ids, delta.name: stacked}


def _stack_pair(
    a: AdapterInput, b: AdapterInput, adapters: Mapping[str, Tensors], rows: Sequence[RowSpec]
) -> dict[str, np.ndarray]:
    parts = [[(adapters[name], weight) for name, weight in row if a.name in adapters[name]] for row in rows]
    rank = max(sum(tensors[a.name].shape[2] for tensors, _ in row) for row in parts)
    if rank == 0:
        return {}
    dtype = next(tensors[a.name].dtype for row in parts for tensors, _ in row)
    stacked_a = np.zeros((len(rows), a.dims[1], rank), dtype)
    stacked_b = np.zeros((len(rows), rank, b.dims[2]), dtype)
    for row, part in enumerate(parts):
        start = 0
        for tensors, weight in part:
            end = start + tensors[a.name].shape[2]
            stacked_a[row, :, start:end] = tensors[a.name][0]
            stacked_b[row, start:end] = tensors[b.name][0] if weight == 1 else tensors[b.name][0] * weight
            start = end
    return {a.name: stacked_a, b.name: stacked_b}


def _stack_whole(
    entry: AdapterInput, adapters: Mapping[str, Tensors], rows: Sequence[RowSpec], default: np.ndarray
) -> np.ndarray:
    values = [_blend_whole(entry, adapters, row, default) for row in rows]
    widest = max(value.shape[-1] for value in values)
    # A padded class gets the lowest finite score through its bias, so that it never wins.
    fill = lowest(values[0].dtype) if entry.kind is AdapterInputKind.BIAS else 0
    stacked = np.full((len(rows), *values[0].shape[1:-1], widest), fill, values[0].dtype)
    for row, value in enumerate(values):
        stacked[row, ..., : value.shape[-1]] = value[0]
    return stacked


def _blend_whole(entry: AdapterInput, adapters: Mapping[str, Tensors], row: RowSpec, default: np.ndarray) -> np.ndarray:
    """`W = W0 + Σ w_k (W_k − W0)`; an adapter without this tensor contributes `W0`, which is 0 if the base has none."""
    brought = [(adapters[name][entry.name], weight) for name, weight in row if entry.name in adapters[name]]
    if not brought:
        return default
    if len(brought) == 1 and brought[0][1] == 1:
        return brought[0][0]
    sizes = {tensor.shape for tensor, _ in brought}
    if entry.base_has_default:
        sizes.add(default.shape)
    if len(sizes) > 1:
        raise UsageProblem(
            "A row blends heads of different sizes",
            where=entry.name,
            found=", ".join(f"{name} × {weight}" for name, weight in row),
            next_step="blend adapters that were trained for the same classes",
        )
    base = default.astype(np.float32) if entry.base_has_default else np.float32(0)
    total = base + sum(np.float32(weight) * (tensor.astype(np.float32) - base) for tensor, weight in brought)
    return total.astype(brought[0][0].dtype)


def classes_by_row(
    contract: GraphContract, adapters: Mapping[str, Tensors], rows: Sequence[RowSpec], defaults: Tensors
) -> dict[str, list[int]]:
    """For every size that heads decide (`<module>.out_features`), the number of real classes of each row."""
    found = {}
    for entry in contract.adapter_inputs:
        if entry.kind is AdapterInputKind.WEIGHT:
            sizes = [_blend_whole(entry, adapters, row, _default(entry, defaults)).shape[-1] for row in rows]
            found[str(entry.dims[2])] = sizes
    return found
