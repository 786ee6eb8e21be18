"""`Bank`: the adapters of a graph at one moment; `Shelf`: the banks that an export's graphs run with now.

A bank does not change. It keeps what it stacked by the adapter objects, not by their names. So what was stacked of an
old adapter is never taken for a new one of the same name, whichever thread comes first.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from lora_export.contract import GATE_INPUT, AdapterInputKind, GraphContract
from lora_export.errors import UsageProblem, nearest
from lora_export.runtime.arrays import numpy_dtype, to_ort_value
from lora_export.runtime.composition import Compositions, Values
from lora_export.runtime.held_adapter import HeldAdapter
from lora_export.runtime.invocation import gate_of, invocation_of, refuse_unknown_past
from lora_export.runtime.residency import Residency
from lora_export.runtime.stacking import RowSpec, Tensors, classes_by_row, default_inputs, default_of, stack_rows

# One entry of `adapters`: a name, nothing (the base), or a blend of names with weights.
RowAdapter = str | None | Mapping[str, float]


def _nothing() -> Mapping:
    return MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Bank:
    """The adapters of one graph: a value, which any thread may read.

    Attributes:
        contract: The graph's.
        provider: "cpu" or "cuda", where `values` are.
        defaults: The stored defaults of replaced Linears, by input name.
        merged: The adapters in the graph's own weights, which cannot be chosen.
        adapters: By name.
        residency: What bounds the memory of their tensors; None for no bound.
    """

    contract: GraphContract
    provider: str
    defaults: Tensors
    merged: tuple[str, ...] = ()
    adapters: Mapping[str, HeldAdapter] = field(default_factory=_nothing)
    residency: Residency | None = None
    # The banks that are made of this one have it too.
    compositions: Compositions | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.compositions is None:
            max_bytes = None if self.residency is None else self.residency.max_bytes
            made = Compositions(self.contract, self.provider, self.defaults, max_bytes=max_bytes)
            object.__setattr__(self, "compositions", made)

    def with_adapter(
        self,
        name: str,
        tensors: Tensors,
        invocation_tokens: Sequence[int] | None = None,
        *,
        read_again: Callable[[], Tensors] | None = None,
    ) -> Bank:
        """This bank and adapter `name`, in place of the one that has that name, if any.

        Args:
            read_again: As in `HeldAdapter`.

        Raises:
            UsageProblem: The adapter does not fit into `residency`.
        """
        held = HeldAdapter(name, tensors, invocation_tokens, read_again=read_again, residency=self.residency)
        return replace(self, adapters=MappingProxyType({**self.adapters, name: held}))

    def without(self, name: str) -> Bank:
        """This bank without adapter `name`.

        Raises:
            UsageProblem: It has no such adapter.
        """
        self._require(name)
        return replace(self, adapters=MappingProxyType(_without(self.adapters, name)))

    def rows(self, adapters: Sequence[RowAdapter] | RowAdapter, batch: int) -> tuple[RowSpec, ...]:
        """What the rows of a batch run; a single entry where all run the same.

        Raises:
            UsageProblem: An unknown adapter, or the number of entries is not the batch size.
        """
        if adapters is None or isinstance(adapters, str | Mapping):
            adapters = [adapters]
        elif len(adapters) != batch:
            raise UsageProblem(
                "`adapters` must have one entry for each row",
                expected=f"{batch} entries, or a single one for all rows",
                found=f"{len(adapters)} entries",
            )
        rows = tuple(self._row(entry) for entry in adapters)
        return rows[:1] if len(set(rows)) == 1 else rows

    def stacked(self, rows: Sequence[RowSpec]) -> dict[str, np.ndarray]:
        """The adapter inputs of `rows` as arrays; inputs that equal their default are left out, where they may be."""
        defaults = default_inputs(self.contract, self.defaults) if self.contract.adapter_inputs_required else {}
        return defaults | stack_rows(self.contract, _tensors_of(rows), rows, defaults=self.defaults)

    @contextlib.contextmanager
    def lent(self, rows: tuple[RowSpec, ...]) -> Iterator[Values]:
        """As `stacked`, on the device, for one run: they stay as they are until it is over."""
        with self.compositions.of(rows) as values:
            yield {**self.constant_inputs, **values} if self.contract.adapter_inputs_required else values

    @property
    def constant_inputs(self) -> Values:
        """The adapter inputs that a run needs whatever it runs, at their defaults on the device."""
        return self._on_device_defaults if self.contract.adapter_inputs_required else {}

    def values(self, rows: tuple[RowSpec, ...]) -> Values:
        """Every adapter input but the gate on the device, at its default too, in memory that nobody changes."""
        return {**self._on_device_defaults, **self.compositions.alone(rows)}

    @functools.cached_property
    def _on_device_defaults(self) -> Values:
        arrays = default_inputs(self.contract, self.defaults)
        return {name: to_ort_value(array, self.provider) for name, array in arrays.items()}

    def gate(self, ids: np.ndarray, rows: Sequence[RowSpec]) -> np.ndarray:
        """The gate of prompts `[batch, sequence]` in the contract's dtype, `[batch, sequence, 1]`."""
        invocations = [invocation_of(row) for row in rows] * (len(ids) if len(rows) == 1 else 1)
        return gate_of(np.asarray(ids), invocations).astype(numpy_dtype(self.contract.gate.dtype))

    def with_gate(
        self, inputs: Mapping[str, np.ndarray], rows: Sequence[RowSpec], n_past: int = 0
    ) -> Mapping[str, np.ndarray]:
        """`inputs` and the gate, if `rows` need one and it is not among them.

        Args:
            n_past: How many tokens are in a cache that is not among `inputs`.

        Raises:
            UsageProblem: An activated LoRA continues a cache, or is blended with another adapter.
        """
        if GATE_INPUT in inputs:
            return inputs
        if not any(invocation_of(row) for row in rows):
            return inputs if self.required_gate is None else {**inputs, GATE_INPUT: self.required_gate}
        refuse_unknown_past(inputs, n_past)
        return {**inputs, GATE_INPUT: self.gate(inputs["input_ids"], rows)}

    @property
    def required_gate(self) -> np.ndarray | None:
        """The gate that leaves every adapter active, `[1, 1, 1]`; None where the graph has that itself, or no gate."""
        gate = self.contract.gate
        return default_of(gate, {}) if gate is not None and self.contract.adapter_inputs_required else None

    def classes(self, rows: Sequence[RowSpec]) -> dict[str, list[int]]:
        """The number of each row's classes by the name of their size; empty where all rows have as many."""
        if len(rows) == 1 or not any(entry.kind is AdapterInputKind.WEIGHT for entry in self.contract.adapter_inputs):
            return {}
        return classes_by_row(self.contract, _tensors_of(rows), rows, defaults=self.defaults)

    def _row(self, entry: RowAdapter) -> RowSpec:
        blend = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
        for name in blend:
            self._require(name)
        return tuple((self.adapters[name], float(weight)) for name, weight in blend.items() if weight != 0)

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            merged = ", ".join(self.merged)
            other = "use one of these names, or load its file first"
            raise UsageProblem(
                f"No adapter {name!r} is loaded",
                found=", ".join(self.adapters) or (f"a merged graph (of {merged})" if merged else "none"),
                next_step="leave it out: every run has what is folded in"
                if merged
                else nearest(name, list(self.adapters)) or other,
            )


class Shelf:
    """The banks that an export's graphs run with now, by graph.

    A change makes new banks and puts all of them in place in one assignment: who reads `banks` once sees all of it or
    nothing of it.
    """

    def __init__(self, banks: Mapping[str, Bank]) -> None:
        self._banks: Mapping[str, Bank] = MappingProxyType(dict(banks))
        self._changing = threading.Lock()

    @property
    def banks(self) -> Mapping[str, Bank]:
        """The banks as they are now; a later change makes another mapping."""
        return self._banks

    def put(
        self,
        name: str,
        tensors: Mapping[str, Tensors],
        invocation_tokens: Sequence[int] | None = None,
        *,
        readers: Mapping[str, Callable[[], Tensors]] = MappingProxyType({}),
    ) -> None:
        """Put adapter `name` into the bank of every graph in `tensors`; `readers` read them again."""
        self._change(
            tensors,
            lambda graph, bank: bank.with_adapter(
                name, tensors[graph], invocation_tokens, read_again=readers.get(graph)
            ),
        )

    def remove(self, name: str, graphs: Iterable[str]) -> None:
        """Take adapter `name` from the banks of `graphs`.

        Raises:
            UsageProblem: One of them has no such adapter; no bank has changed then.
        """
        self._change(graphs, lambda _, bank: bank.without(name))

    def _change(self, graphs: Iterable[str], change: Callable[[str, Bank], Bank]) -> None:
        with self._changing:
            before, changed = self._banks, {}
            try:
                for graph in graphs:
                    changed[graph] = change(graph, before[graph])
            except BaseException:
                _forget(changed, before)
                raise
            self._banks = MappingProxyType({**before, **changed})
        _forget(before, changed)


def _forget(banks: Mapping[str, Bank], others: Mapping[str, Bank]) -> None:
    """Let the adapters of `banks` that `others` do not have count no longer."""
    for graph in set(banks) & set(others):
        if (residency := banks[graph].residency) is not None:
            for gone in set(banks[graph].adapters.values()) - set(others[graph].adapters.values()):
                residency.forget(gone)


def _tensors_of(rows: Sequence[RowSpec]) -> dict[HeldAdapter, Tensors]:
    return {adapter: adapter.tensors for row in rows for adapter, _ in row}


def _without(mapping: Mapping, name: str) -> dict:
    return {key: value for key, value in mapping.items() if key != name}
