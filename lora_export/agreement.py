"""Whether a contract, as a manifest has it, is that of its graph: names, dtypes, sizes and stored defaults."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from lora_export.artifact import MANIFEST
from lora_export.contract import (
    PAST,
    ROWS,
    SINGLE,
    AdapterInput,
    CacheLayout,
    Dim,
    GraphContract,
    TensorSpec,
    data_file,
    graph_file,
)
from lora_export.errors import InputRefused

_GROUPED = b"GroupQueryAttention"
_N_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}


def require_agreement(
    contract: GraphContract,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    optional: Collection[str],
    where: str,
    data_bytes: int | None = None,
) -> None:
    """Refuse a contract that says of its graph what the graph itself does not.

    Args:
        inputs: All inputs of the graph, adapter inputs included, as the graph declares them.
        optional: The names among them that the graph has a default for.
        where: The manifest, and the place of the contract in it.
        data_bytes: The size of the graph's data file; None where it holds none.

    Raises:
        InputRefused: A field differs; it is named, with what the graph has.
    """
    for part, said, found in (
        ("inputs", contract.inputs, inputs),
        ("outputs", contract.outputs, outputs),
        ("optional_inputs", contract.optional_inputs, inputs),
        ("adapter_inputs", contract.adapter_inputs, inputs),
    ):
        declared = {spec.name: spec for spec in found}
        for place, entry in enumerate(said):
            field = f"{where}.{part}[{place}]"
            if entry.name not in declared:
                _refuse(f"{field}.name", _some(declared), entry.name)
            spec = declared[entry.name]
            if entry.dtype != spec.dtype:
                _refuse(f"{field}.dtype", spec.dtype, entry.dtype)
            if not _equal(entry.dims, spec.dims):
                _refuse(f"{field}.dims", list(spec.dims), list(entry.dims))
            if isinstance(entry, AdapterInput):
                _require_kind(entry, field, data_bytes or 0)
                said_required = contract.adapter_inputs_required
                if said_required is (entry.name in optional):
                    has = f"{entry.name} has {'a default' if said_required else 'no default'}"
                    _refuse(f"{where}.adapter_inputs_required", has, said_required)
    known = {entry.name for entry in (*contract.inputs, *contract.optional_inputs, *contract.adapter_inputs)}
    for spec in inputs:
        if spec.name not in known:
            _refuse(f"{where}.inputs", spec.name, "no such entry")


def require_agreement_in(
    folder: Path,
    graph: str,
    contract: GraphContract,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    optional: Collection[str],
) -> None:
    """`require_agreement` for the graph `graph` of the export in `folder`, by its manifest and its data file.

    Raises:
        InputRefused: A field differs; it is named, with what the graph has.
    """
    data = folder / data_file(graph)
    where = f"{folder / MANIFEST}: {'contract' if graph == SINGLE else f'graphs.{graph}'}"
    n_bytes = data.stat().st_size if data.is_file() else None
    require_agreement(contract, inputs, outputs, optional=optional, where=where, data_bytes=n_bytes)
    has_cache = any(spec.name.startswith(PAST) for spec in inputs)
    # A name of an operator stands in a graph's file as it is, and weights are elsewhere.
    is_grouped = has_cache and _GROUPED in (folder / graph_file(graph)).read_bytes()
    layout = CacheLayout.TOKENS if is_grouped else CacheLayout.COLUMNS
    require_cache_layout(contract, layout if has_cache else None, where=where)


def require_cache_layout(contract: GraphContract, found: CacheLayout | None, *, where: str) -> None:
    """Refuse a contract whose cache is laid out otherwise than the graph's.

    Args:
        found: That of the graph; None for one without a cache.

    Raises:
        InputRefused: They differ. A decoder's contract that says nothing means COLUMNS.
    """
    said = contract.cache_layout or (CacheLayout.COLUMNS if contract.past else None)
    if said != found:
        _refuse(f"{where}.cache_layout", found or "null, as the graph has no cache", said or "null")


def _some(declared: dict[str, TensorSpec]) -> str:
    names = list(declared)
    return f"one of the graph's {len(names)}, such as {', '.join(names[:3])}"


def _equal(said: Sequence[Dim], found: Sequence[Dim | None]) -> bool:
    """An axis without a name in the graph (None) is of any name."""
    if len(said) != len(found):
        return False
    return all(a == b or (b is None and isinstance(a, str)) for a, b in zip(said, found, strict=True))


def _require_kind(entry: AdapterInput, field: str, data_bytes: int) -> None:
    name, dims = entry.spec.name(entry.module), entry.spec.dims
    if entry.name != name or len(entry.dims) != len(dims):
        _refuse(f"{field}.kind", f"a kind that is called {entry.name!r} and has {len(entry.dims)} dims", entry.kind)
    if entry.default is None:
        return
    default, sizes = entry.default, tuple(1 if dim == ROWS else dim for dim in entry.dims)
    n_bytes = math.prod(default.shape) * _N_BYTES[entry.dtype]
    fits = len(default.shape) == len(sizes) and all(
        isinstance(size, str) or size == found for size, found in zip(sizes, default.shape, strict=True)
    )
    if not fits:
        _refuse(f"{field}.default.shape", list(sizes), list(default.shape))
    if default.length != n_bytes:
        _refuse(f"{field}.default.length", n_bytes, default.length)
    if default.offset + default.length > data_bytes:
        _refuse(f"{field}.default.offset", f"at most {data_bytes - default.length}", default.offset)


def _refuse(where: str, expected: object, found: object) -> None:
    raise InputRefused(
        "The export's manifest does not describe its graph",
        where=where,
        expected=str(expected),
        found=str(found),
        next_step="fetch the folder again, or export again",
    )
