"""`AdapterSession`: run a graph of an exported folder, with a different adapter for each row of a batch if need be.

Needs onnxruntime and numpy only; torch, transformers and PEFT need not be installed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from lora_export.artifact import Manifest, read_manifest
from lora_export.contract import GATE_INPUT, SINGLE, AdapterInputKind, data_file, graph_file
from lora_export.errors import UsageProblem
from lora_export.runtime.adapter_file import read_adapter, require_fit, require_unchanged
from lora_export.runtime.arrays import lowest, numpy_dtype, to_array, to_ort_value
from lora_export.runtime.bank import RowSpec, classes_by_row, stack_rows
from lora_export.runtime.invocation import gate_of, invocation_of, refuse_unknown_past
from lora_export.runtime.session import choose_provider, open_session

# One entry of `adapters`: a name, nothing (the base), or a blend of names with weights.
RowAdapter = str | None | Mapping[str, float]

# Stacked compositions kept on the device: enough for the few that a host alternates between.
_KEPT_COMPOSITIONS = 8


class AdapterSession:
    """An ONNX Runtime session of an export, with its adapters loaded.

    Args:
        folder: The exported folder.
        provider: "cpu" or "cuda"; None for CUDA if usable, else the CPU (see `provider_reason`).
        n_threads: Threads within an operator; None for ONNX Runtime's choice.
        stop_spinning: Let the CPU's threads rest as soon as a run is over. By default they wait for the next one on
            the core for a while, which is best for one session and takes the cores from a second one.
        graph: Which graph of an export of several; `Seq2SeqSession` runs all of an encoder-decoder.

    Raises:
        UsageProblem: The export has no such graph, or it has several and none is named.
        InputRefused: The folder is no export, or an adapter file is not the one that was exported.
        EnvironmentUnusable: The provider is not usable.
    """

    def __init__(
        self,
        folder: str | Path,
        provider: str | None = None,
        *,
        n_threads: int | None = None,
        stop_spinning: bool = False,
        graph: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self._contract = self.manifest.contract if graph is None else self.manifest.contract_of(graph)
        self.graph = graph or SINGLE
        choice = choose_provider(provider)
        self.provider, self.provider_reason = choice.name, choice.reason
        path = self.folder / graph_file(self.graph)
        self.session = open_session(path, self.provider, n_threads=n_threads, stop_spinning=stop_spinning)
        self._adapters: dict[str, dict[str, np.ndarray]] = {}
        self._invocations: dict[str, tuple[int, ...]] = {}
        self._compositions: OrderedDict[tuple[RowSpec, ...], dict[str, ort.OrtValue]] = OrderedDict()
        self._defaults = self._read_defaults()
        for record in self.manifest.adapters:
            file = record.files.get(self.graph)
            if file is not None:
                require_unchanged(self.folder / file, self.manifest.files.get(file))
                self.load(self.folder / file, record.name, invocation_tokens=record.invocation_tokens)
            elif record.files:  # it touches other graphs only
                self.hold(record.name, {})

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._adapters)

    def load(self, path: str | Path, name: str | None = None, *, invocation_tokens: Sequence[int] | None = None) -> str:
        """Load an `.onnx_adapter` file made for this graph and return its name (default: the file's).

        Args:
            invocation_tokens: Of an activated LoRA (its manifest entry has them); without, it is active for all tokens.

        Raises:
            InputRefused: The file is no adapter, or its tensors are not those of this graph's inputs.
        """
        path = Path(path)
        name = name or path.stem
        self.hold(name, self.read(path))
        if invocation_tokens:
            self._invocations[name] = tuple(invocation_tokens)
        return name

    def read(self, path: Path) -> dict[str, np.ndarray]:
        """The tensors in an `.onnx_adapter` file made for this graph, without loading it.

        Raises:
            InputRefused: The file is no adapter, or its tensors are not those of this graph's inputs.
        """
        tensors = read_adapter(path)
        require_fit(path, tensors, self._contract)
        return tensors

    def hold(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Load what `read` gave as adapter `name`; with no tensors, the adapter leaves this graph as its base is."""
        self._adapters[name] = dict(tensors)
        self._invocations.pop(name, None)
        self._compositions.clear()

    def unload(self, name: str) -> None:
        """Forget adapter `name`.

        Raises:
            UsageProblem: It is not loaded.
        """
        self._require_loaded(name)
        del self._adapters[name]
        self._compositions.clear()

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        adapters: Sequence[RowAdapter] | RowAdapter = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run one batch.

        Args:
            inputs: The graph's own inputs by name, `[batch, …]`.
            adapters: One entry a row (a name, None for the base, or {name: weight}), or one entry for all rows.
            outputs: Names of the outputs to return; all by default.

        Returns:
            Outputs by name. Where rows have heads of different sizes, scores beyond a row's own classes are the
            lowest finite number.

        Raises:
            UsageProblem: An unknown adapter, the number of entries is not the batch size, an input is missing, inputs
                differ in rows (texts and images) where adapters do, or an activated LoRA continues a cache and its
                gate is not among `inputs` (see `gate`).
        """
        self._require_inputs(inputs)
        batch = len(next(iter(inputs.values())))
        rows = self._rows(adapters, batch)
        _require_equal_rows(inputs, rows)
        inputs = self._with_gate(inputs, rows)
        # Held until the run is over: on the CPU a binding reads the arrays' own memory.
        held = {name: to_ort_value(array, self.provider) for name, array in inputs.items()}
        binding = self.session.io_binding()
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self._composition(rows).items():
            binding.bind_ortvalue_input(name, value)
        names = list(outputs or [output.name for output in self.session.get_outputs()])
        for name in names:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        results = {name: to_array(value) for name, value in zip(names, binding.get_outputs(), strict=True)}
        return self._mask_padded_classes(results, rows)

    def bind_adapters(self, binding: ort.IOBinding, adapters: Sequence[RowAdapter] | RowAdapter, batch: int) -> None:
        """Bind the adapters of a batch to `binding`, for hosts that bind inputs and outputs themselves."""
        for name, value in self._composition(self._rows(adapters, batch)).items():
            binding.bind_ortvalue_input(name, value)

    def gate(self, input_ids: np.ndarray, adapters: Sequence[RowAdapter] | RowAdapter) -> np.ndarray | None:
        """The `lora_gate` of a prompt, `[batch, sequence, 1]`; None where the graph has no such input.

        `run` makes it itself for a prompt. A step that continues a cache needs it from the host: the last column, as
        an activated LoRA that was invoked stays active. So does a host that binds inputs itself.

        Args:
            input_ids: `[batch, sequence]`, the whole prompt.
        """
        if self._contract.gate is None:
            return None
        return self._gate(input_ids, self._rows(adapters, len(input_ids)))

    def feeds(
        self, inputs: Mapping[str, np.ndarray], adapters: Sequence[RowAdapter] | RowAdapter = None
    ) -> dict[str, np.ndarray]:
        """All that `run` feeds the graph for a batch: its own inputs, the gate and the adapters, as arrays."""
        self._require_inputs(inputs)
        rows = self._rows(adapters, len(next(iter(inputs.values()))))
        stacked = stack_rows(self._contract, self._adapters, rows, self._defaults)
        return {**self._with_gate(inputs, rows), **{name: v for name, v in stacked.items() if name not in inputs}}

    def stacked(self, adapters: Sequence[RowAdapter] | RowAdapter, batch: int) -> dict[str, np.ndarray]:
        """The adapter inputs of a batch as arrays, for hosts with another runtime; absent inputs keep their default."""
        return stack_rows(self._contract, self._adapters, self._rows(adapters, batch), self._defaults)

    def _rows(self, adapters: Sequence[RowAdapter] | RowAdapter, batch: int) -> tuple[RowSpec, ...]:
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

    def _row(self, entry: RowAdapter) -> RowSpec:
        blend = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
        for name in blend:
            self._require_loaded(name)
        return tuple((name, float(weight)) for name, weight in blend.items() if weight != 0)

    def _gate(self, ids: np.ndarray, rows: tuple[RowSpec, ...]) -> np.ndarray:
        invocations = [invocation_of(row, self._invocations) for row in rows] * (len(ids) if len(rows) == 1 else 1)
        return gate_of(np.asarray(ids), invocations).astype(numpy_dtype(self._contract.gate.dtype))

    def _with_gate(self, inputs: Mapping[str, np.ndarray], rows: tuple[RowSpec, ...]) -> Mapping[str, np.ndarray]:
        if GATE_INPUT in inputs or not any(invocation_of(row, self._invocations) for row in rows):
            return inputs
        refuse_unknown_past(inputs)
        return {**inputs, GATE_INPUT: self._gate(inputs["input_ids"], rows)}

    def _require_inputs(self, inputs: Mapping[str, np.ndarray]) -> None:
        own = [spec.name for spec in self._contract.inputs]
        missing = [name for name in own if name not in inputs]
        unknown = set(inputs) - set(own) - {entry.name for entry in self._contract.adapter_inputs}
        if missing or unknown:
            raise UsageProblem(
                "The inputs are not those of the graph",
                where=", ".join([*(f"{name} is missing" for name in missing), *(f"{n} is unknown" for n in unknown)]),
                expected=", ".join(own),
            )

    def _require_loaded(self, name: str) -> None:
        if name not in self._adapters:
            merged = ", ".join(record.name for record in self.manifest.adapters if not record.files)
            raise UsageProblem(
                f"No adapter {name!r} is loaded",
                found=", ".join(self._adapters) or (f"a merged graph (of {merged})" if merged else "none"),
                next_step="use one of these names, or load its file first",
            )

    def _composition(self, rows: tuple[RowSpec, ...]) -> dict[str, ort.OrtValue]:
        if rows in self._compositions:
            self._compositions.move_to_end(rows)
            return self._compositions[rows]
        stacked = stack_rows(self._contract, self._adapters, rows, self._defaults)
        values = {name: to_ort_value(array, self.provider) for name, array in stacked.items()}
        self._compositions[rows] = values
        if len(self._compositions) > _KEPT_COMPOSITIONS:
            self._compositions.popitem(last=False)
        return values

    def _read_defaults(self) -> dict[str, np.ndarray]:
        found = {}
        for entry in self._contract.adapter_inputs:
            if entry.default is not None:
                dtype = numpy_dtype(entry.dtype)
                found[entry.name] = np.fromfile(
                    self.folder / data_file(self.graph),
                    dtype,
                    entry.default.length // dtype.itemsize,
                    offset=entry.default.offset,
                ).reshape(entry.default.shape)
        return found

    def _mask_padded_classes(self, results: dict[str, np.ndarray], rows: tuple[RowSpec, ...]) -> dict[str, np.ndarray]:
        if len(rows) == 1 or not any(e.kind is AdapterInputKind.WEIGHT for e in self._contract.adapter_inputs):
            return results
        sizes = classes_by_row(self._contract, self._adapters, rows, self._defaults)
        for spec in self._contract.outputs:
            if spec.name in results and spec.dims[-1] in sizes:
                for row, n_classes in enumerate(sizes[spec.dims[-1]]):
                    array = results[spec.name]
                    array[row, ..., n_classes:] = lowest(array.dtype)
        return results


def _require_equal_rows(inputs: Mapping[str, np.ndarray], rows: Sequence[RowSpec]) -> None:
    """A dual encoder's texts and images may differ in number, but not where each row has an adapter of its own."""
    sizes = {name: len(array) for name, array in inputs.items()}
    if len(rows) > 1 and len(set(sizes.values())) > 1:
        raise UsageProblem(
            "Adapters that differ by row need as many rows in every input",
            found=", ".join(f"{name}: {size}" for name, size in sizes.items()),
            next_step="name one adapter for the whole batch, or repeat the shorter input",
        )
