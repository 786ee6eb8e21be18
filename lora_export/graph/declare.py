"""Declare the adapter inputs of a graph: named, shaped and typed as the table of `contract.py` says."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lora_export.contract import AdapterInput, AdapterInputKind, spec_of
from lora_export.packed import PackedPart, packed_name


class DeclaredInputs:
    """The adapter inputs that `graph` has been given so far; to declare one more changes the graph in place."""

    def __init__(self, graph: ir.Graph, *, packs_siblings: bool = False) -> None:
        """
        Args:
            packs_siblings: Modules that share an input share a pair.
        """
        self.graph, self.packs_siblings = graph, packs_siblings
        self._values: dict[tuple[str, AdapterInputKind], ir.Value] = {}
        self._by_module: dict[str, list[AdapterInput]] = {}

    def declare(
        self,
        kind: AdapterInputKind,
        module: str,
        dtype: ir.DataType,
        *,
        base_has_default: bool = True,
        parts: Sequence[PackedPart] = (),
        **sizes: int,
    ) -> ir.Value:
        """A new input of the graph, for every use of `module`.

        Args:
            dtype: The graph's, for a kind without a dtype of its own.
            parts: The modules that `module` stands for, if it stands for several.
            sizes: The axes of the kind that the module decides; the others vary.
        """
        spec = spec_of(kind)
        dims, name = spec.dims_of(module, sizes), spec.name(module)
        dtype = dtype if spec.dtype is None else ir.DataType[spec.dtype.upper()]
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))
        self.graph.inputs.append(value)
        self._values[module, kind] = value
        entry = AdapterInput(
            name, module, kind, str(dtype.numpy()), dims, base_has_default=base_has_default, parts=tuple(parts)
        )
        self._by_module.setdefault(module, []).append(entry)
        return value

    def declare_pair(
        self, module: str, dtype: ir.DataType, in_features: int, *, out_features: int
    ) -> tuple[ir.Value, ir.Value]:
        """A `[rows, in_features, rank]` and B `[rows, rank, out_features]`."""
        return (
            self.declare(AdapterInputKind.LORA_A, module, dtype, in_features=in_features),
            self.declare(AdapterInputKind.LORA_B, module, dtype, out_features=out_features),
        )

    def declare_packed_pair(
        self, parts: Sequence[PackedPart], dtype: ir.DataType, in_features: int
    ) -> tuple[ir.Value, ir.Value]:
        """A `[rows, in_features, rank]` and B `[rows, rank, Σ out_features]` of several modules."""
        module, out = packed_name(part.module for part in parts), sum(part.out_features for part in parts)
        return (
            self.declare(AdapterInputKind.LORA_A, module, dtype, parts=parts, in_features=in_features),
            self.declare(AdapterInputKind.LORA_B, module, dtype, parts=parts, out_features=out),
        )

    def value(self, kind: AdapterInputKind, module: str) -> ir.Value | None:
        """What was declared; None if it was not."""
        return self._values.get((module, kind))

    @property
    def entries(self) -> tuple[AdapterInput, ...]:
        """All that were declared, module by module."""
        return tuple(entry for entries in self._by_module.values() for entry in entries)
