"""Stack the adapters of a batch's rows into the inputs of a dynamic graph. NumPy only.

The table of `contract.py` says of each kind of input how a row's adapters are blended, and how rows of different sizes
are padded. For a row with pairs `(A_k, B_k)` and weights `w_k`,
`Σ_k w_k (x A_k) B_k = (x [A_1 … A_n]) [w_1 B_1; …; w_n B_n]`: a blend is a concatenation along rank, and ranks 4 and 8
blend into rank 12. A blend of changed tokens is a concatenation along tokens: a token that is there twice gets the sum.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import assert_never

import numpy as np

from lora_export.contract import LOWEST, AdapterInput, AdapterInputKind, Blend, GraphContract
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import lowest, numpy_dtype

# What one row runs: adapters with their weights, in a fixed order; empty for the base.
RowSpec = tuple[tuple[Hashable, float], ...]
Tensors = Mapping[str, np.ndarray]


def stack_rows(
    contract: GraphContract, adapters: Mapping[Hashable, Tensors], rows: Sequence[RowSpec], *, defaults: Tensors
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
    brought = {name for row in rows for adapter, _ in row for name in adapters[adapter]}
    stacked = {}
    for entry in fed_entries(contract, brought):
        default = default_of(entry, defaults)
        array = _padded(entry, [blended(entry, adapters, row, default=default) for row in rows])
        if array.size:  # rank 0 and no tokens are the default
            stacked[entry.name] = array
    return stacked


def fed_entries(contract: GraphContract, brought: Collection[str]) -> list[AdapterInput]:
    """The inputs that are fed where adapters bring those named; all others keep their default."""
    # Where one of a module's differs from the base, all do: a head's bias has the size of its weight.
    changed = {e.module for e in contract.adapter_inputs if is_task_vector(e) and e.name in brought}
    return [
        entry
        for entry in _brought_by_adapters(contract)
        if (entry.module in changed if is_task_vector(entry) else entry.name in brought)
    ]


def default_inputs(contract: GraphContract, defaults: Tensors) -> dict[str, np.ndarray]:
    """What every adapter input but the gate is where no adapter is fed, by name: `[1, …]`, pairs and tokens empty."""
    return {entry.name: default_of(entry, defaults) for entry in _brought_by_adapters(contract)}


def default_of(entry: AdapterInput, defaults: Tensors) -> np.ndarray:
    """What the graph takes where no adapter is fed, `[1, …]`: stored, or a constant."""
    if entry.name in defaults:
        return defaults[entry.name]
    return np.full(*entry.spec.constant(entry.dims), numpy_dtype(entry.dtype))


def stored_defaults(data: Path, contract: GraphContract) -> dict[str, np.ndarray]:
    """What the graph's data file holds for adapter inputs that are not fed."""
    found = {}
    for entry in contract.adapter_inputs:
        if entry.default is not None:
            dtype = numpy_dtype(entry.dtype)
            values = np.fromfile(data, dtype, entry.default.length // dtype.itemsize, offset=entry.default.offset)
            found[entry.name] = values.reshape(entry.default.shape)
    return found


def _brought_by_adapters(contract: GraphContract) -> list[AdapterInput]:
    return [entry for entry in contract.adapter_inputs if entry.spec.blend is not Blend.FROM_PROMPT]


def is_task_vector(entry: AdapterInput) -> bool:
    """Whether it takes the place of a tensor of the base, and so has its size or another head's."""
    return entry.spec.blend is Blend.TASK_VECTORS


def blended(
    entry: AdapterInput, adapters: Mapping[Hashable, Tensors], row: RowSpec, *, default: np.ndarray
) -> np.ndarray:
    """What `row` is fed, `[1, …]`, of its own size."""
    brought = [(adapters[name][entry.name], weight) for name, weight in row if entry.name in adapters[name]]
    blend, axis = entry.spec.blend, entry.spec.axis
    if not brought:
        return default
    if len(brought) == 1 and (brought[0][1] == 1 or blend is Blend.CONCATENATE):
        return brought[0][0]
    match blend:
        case Blend.CONCATENATE:
            return np.concatenate([tensor for tensor, _ in brought], axis)
        case Blend.CONCATENATE_WEIGHTED:
            parts = [tensor if weight == 1 else (tensor * weight).astype(tensor.dtype) for tensor, weight in brought]
            return np.concatenate(parts, axis)
        case Blend.TASK_VECTORS:
            return _added_task_vectors(entry, brought, default, row=row)
        case Blend.FROM_PROMPT:
            raise ValueError(f"{entry.name} is made of the prompt, not of adapters")
    assert_never(blend)


def _added_task_vectors(
    entry: AdapterInput, brought: Sequence[tuple[np.ndarray, float]], default: np.ndarray, *, row: RowSpec
) -> np.ndarray:
    """`W = W0 + Σ w_k (W_k − W0)`; an adapter without this tensor contributes `W0`, which is 0 if the base has none."""
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


def _padded(entry: AdapterInput, values: Sequence[np.ndarray]) -> np.ndarray:
    """The rows' `values`, `[1, …]` each, as one array `[rows, …]`, filled up to the largest along the kind's axis."""
    if len({value.shape for value in values}) == 1:
        return np.concatenate(values)
    dtype = values[0].dtype
    shape = np.max([value.shape for value in values], axis=0)
    stacked = np.full((len(values), *shape[1:]), filler_of(entry, dtype), dtype)
    for row, value in enumerate(values):
        stacked[(row, *map(slice, value.shape[1:]))] = value[0]
    return stacked


def filler_of(entry: AdapterInput, dtype: np.dtype) -> float:
    """What a smaller row is filled up with."""
    return lowest(dtype) if entry.spec.fill == LOWEST else entry.spec.fill


def classes_by_row(
    contract: GraphContract, adapters: Mapping[Hashable, Tensors], rows: Sequence[RowSpec], *, defaults: Tensors
) -> dict[str, list[int]]:
    """For every size that heads decide (`<module>.out_features`), the number of real classes of each row."""
    found = {}
    for entry in contract.adapter_inputs:
        if entry.kind is AdapterInputKind.WEIGHT:
            default = default_of(entry, defaults)
            found[str(entry.dims[2])] = [blended(entry, adapters, row, default=default).shape[-1] for row in rows]
    return found
