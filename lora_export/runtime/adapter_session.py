"""`AdapterSession`: run a graph of an exported folder, with a different adapter for each row of a batch if need be.

Needs onnxruntime and numpy only; torch, transformers and PEFT need not be installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from lora_export.artifact import Manifest, read_manifest
from lora_export.contract import SINGLE, data_file, graph_file
from lora_export.runtime.adapter_file import map_adapter, read_adapter, reader_of, require_fit, require_unchanged
from lora_export.runtime.bank import Bank, RowAdapter, Shelf
from lora_export.runtime.batch import BatchRun, Runs, mask_padded_classes, require_equal_rows
from lora_export.runtime.cache import Cache, output_names
from lora_export.runtime.captured import CapturedRuns
from lora_export.runtime.described import require_described
from lora_export.runtime.host_inputs import completed_inputs
from lora_export.runtime.inputs import Given, inputs_of
from lora_export.runtime.positions import told_if_too_long
from lora_export.runtime.residency import Residency, residency_of
from lora_export.runtime.session import choose_provider, open_session
from lora_export.runtime.stacking import stored_defaults
from lora_export.runtime.tokenizer import TextTokenizer, open_tokenizer, preprocessing_of

if TYPE_CHECKING:
    from lora_export.runtime.generate import Generated, Piece, Prompt
    from lora_export.runtime.sampling import Sampling


class AdapterSession:
    """An ONNX Runtime session of an export, with its adapters loaded.

    Any thread may call any method at any time. A run goes by the adapters that are loaded when it starts: it sees all
    of an adapter as it was then, or none of it. A run that starts after `load` or `unload` has returned sees the
    change; one that started before may end with the old adapters. Calls that belong together, such as the steps of a
    text, go by the same adapters on a `snapshot`.

    Args:
        folder: The exported folder.
        provider: "cpu" or "cuda"; None for CUDA if usable, else the CPU (see `provider_reason`).
        n_threads: Threads within an operator; None for ONNX Runtime's choice.
        stop_spinning: Let the CPU's threads rest as soon as a run is over. By default they wait for the next one on
            the core for a while, which is best for one session and takes the cores from a second one.
        graph: Which graph of an export of several; `Seq2SeqSession` runs all of an encoder-decoder.
        max_bytes: The most bytes of adapters in memory, and in a GPU's bank: those not used the longest are dropped,
            and read from their files again when a run needs them. A `Residency` bounds several sessions together.
        map_adapters: Map the adapters' files, which then take no memory of their own. Others may take their place, but
            they must not be written into.
        cuda_graph: Capture each shape of a batch in a CUDA graph and replay it: see `CapturedRuns`. One run at a time.

    Raises:
        UsageProblem: The export has no such graph, it has several and none is named, or it cannot be captured.
        InputRefused: The folder is no export, its manifest does not describe its graph, or an adapter file is not the
            one that was exported.
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
        max_bytes: int | Residency | None = None,
        map_adapters: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self.contract = self.manifest.contract if graph is None else self.manifest.contract_of(graph)
        self.graph = graph or SINGLE
        choice = choose_provider(provider)
        self.provider, self.provider_reason = choice.name, choice.reason
        how = {"n_threads": n_threads, "stop_spinning": stop_spinning, "cuda_graph": cuda_graph}
        session = open_session(self.folder / graph_file(self.graph), self.provider, **how)
        given = session, self.contract, choice
        self.runs = CapturedRuns(*given, folder=self.folder) if cuda_graph else Runs(*given)
        require_described(self.session, self.contract, self.folder, graph=self.graph)
        merged = tuple(record.name for record in self.manifest.adapters if not record.files)
        defaults = stored_defaults(self.folder / data_file(self.graph), self.contract)
        self.residency = residency_of(max_bytes, map_adapters=map_adapters)
        bank = Bank(self.contract, self.provider, defaults, merged, residency=self.residency.or_none)
        self._shelf = Shelf({self.graph: bank})
        self._tokenizers: dict[Path, TextTokenizer] = {}
        self._read_file = map_adapter if map_adapters else read_adapter
        for record in self.manifest.adapters:
            file = record.files.get(self.graph)
            if file is not None:
                require_unchanged(self.folder / file, self.manifest.files.get(file))
                self.load(self.folder / file, record.name, invocation_tokens=record.invocation_tokens)
            elif record.files:  # it touches other graphs only
                self.hold(record.name, {})

    @property
    def session(self) -> ort.InferenceSession:
        """ONNX Runtime's own, which `runs` run on."""
        return self.runs.session

    @property
    def bank(self) -> Bank:
        """The adapters as they are now: a value that no later `load` or `unload` changes."""
        return self.banks[self.graph]

    @property
    def banks(self) -> Mapping[str, Bank]:
        """The same, by graph."""
        return self._shelf.banks

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self.bank.adapters)

    def snapshot(self) -> AdapterSession:
        """This ONNX Runtime session with the adapters of now; what is loaded or unloaded later is in one of them."""
        return self.with_shelf(Shelf({self.graph: self.bank}))

    def with_shelf(self, shelf: Shelf) -> AdapterSession:
        """This ONNX Runtime session with the adapters of `shelf`, which sessions of other graphs may share."""
        view = copy.copy(self)
        view._shelf = shelf
        return view

    def load(self, path: str | Path, name: str | None = None, *, invocation_tokens: Sequence[int] | None = None) -> str:
        """Load an `.onnx_adapter` file made for this graph and return its name (default: the file's).

        Args:
            invocation_tokens: Of an activated LoRA (its manifest entry has them); without, it is active for all tokens.

        Raises:
            InputRefused: The file is no adapter, or its tensors are not those of this graph's inputs.
        """
        path, name = Path(path), name or Path(path).stem
        reader = {self.graph: reader_of(path)} if self.residency.or_none else {}
        self._shelf.put(name, {self.graph: self.read(path)}, invocation_tokens, readers=reader)
        return name

    def read(self, path: Path) -> dict[str, np.ndarray]:
        """The tensors in an `.onnx_adapter` file made for this graph, without loading it.

        Raises:
            InputRefused: The file is no adapter, or its tensors are not those of this graph's inputs.
        """
        tensors = self._read_file(path)
        require_fit(path, tensors, self.contract)
        return tensors

    def hold(
        self, name: str, tensors: Mapping[str, np.ndarray], invocation_tokens: Sequence[int] | None = None
    ) -> None:
        """Load what `read` gave as `name`: arrays that must not change any more; none is as the base."""
        self._shelf.put(name, {self.graph: tensors}, invocation_tokens)

    def unload(self, name: str) -> None:
        """Forget adapter `name`.

        Raises:
            UsageProblem: It is not loaded.
        """
        self._shelf.remove(name, [self.graph])

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        adapters: Sequence[RowAdapter] | RowAdapter = None,
        outputs: Sequence[str] | None = None,
        *,
        cache: Cache | None = None,
    ) -> dict[str, np.ndarray]:
        """Run one batch.

        Args:
            inputs: The graph's own inputs by name, `[batch, …]`, such as a tokenizer gives: token types, positions and
                an empty cache are filled in where they are left out (`host_inputs`).
            adapters: One entry a row (a name, None for the base, or {name: weight}), or one entry for all rows.
            outputs: Names of the outputs to return; all by default.
            cache: From `cache`: the past of these rows, which the run adds its tokens to. Past and present are then
                not among `inputs` and the outputs.

        Returns:
            Outputs by name. Where rows have heads of different sizes, scores beyond a row's own classes are the
            lowest finite number.

        Raises:
            UsageProblem: An unknown adapter, the number of entries is not the batch size, an input is missing, inputs
                differ in rows (texts and images) where adapters do, a text is longer than the model takes, or an
                activated LoRA continues a cache and its gate is not among `inputs` (see `gate`).
        """
        n_cached = None if cache is None else cache.length
        inputs = completed_inputs(inputs, self.contract, n_cached)
        bank = self.bank
        rows = bank.rows(adapters, len(next(iter(inputs.values()))))
        require_equal_rows(inputs, rows)
        names = list(outputs or output_names(self.contract, cache))
        fed = bank.with_gate(inputs, rows, n_past=n_cached or 0)
        with told_if_too_long(fed, self.folder):
            results = self.runs.run(bank, BatchRun(fed, rows, names, cache))
        mask_padded_classes(results, self.contract, bank.classes(rows))
        return results

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[RowAdapter] | RowAdapter = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] | str = (),
        eos_ids: Collection[int] | None = None,
        max_rows: int = 16,
        stream: Callable[[Piece], None] | None = None,
    ) -> list[Generated]:
        """Go on with prompts, each with its own adapter; a decoder only.

        Args:
            prompts: Texts, token ids, or messages for the chat template, also mixed. Ids need no tokenizer.
            adapters: As in `run`, of those that are loaded when the call starts.
            sampling: How tokens are chosen; greedily by default.
            stop: Texts that end a text, in which they are left out.
            eos_ids: Tokens that end a text; by default those of each row's own settings (`end_tokens_in`).
            max_rows: The most texts at a time; others follow as rows become free.
            stream: Called with each piece of a text as it is written.

        Raises:
            UsageProblem: An adapter is not loaded, a prompt is empty or too long, or the graph is no decoder.
            InputRefused, EnvironmentUnusable: A text is to be read or written, and the tokenizer cannot be used.
        """
        from lora_export.runtime.generate import TextOptions, write_texts

        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        options = TextOptions(max_new_tokens, sampling, stops, eos_ids, max_rows)
        return write_texts(self, prompts, adapters, options=options, stream=stream)

    def tokenizer(self, adapter: RowAdapter = None) -> TextTokenizer:
        """The tokenizer of a decoder's texts, in `preprocessing(adapter)`; see `open_tokenizer` for what it refuses."""
        folder = self.preprocessing(adapter)
        if folder not in self._tokenizers:
            self._tokenizers[folder] = open_tokenizer(folder, self.folder)
        return self._tokenizers[folder]

    def preprocessing(self, adapter: RowAdapter = None) -> Path:
        """The folder with the tokenizer or processor of `adapter`; of the base and of a blend, the export's."""
        return self.folder / preprocessing_of(self.manifest, adapter)

    def inputs(self, rows: Sequence[Given], adapter: RowAdapter = None) -> dict[str, np.ndarray]:
        """What `run` takes for texts, pairs of texts, or image files; see `inputs_of`."""
        return inputs_of(self, rows, adapter)

    def cache(self, batch: int, longest: int) -> Cache:
        """An empty cache for `batch` rows of at most `longest` tokens, padding included, to give to `run`.

        Raises:
            UsageProblem: The graph has no cache.
        """
        return self.runs.cache(batch, longest)

    def bind_adapters(self, binding: ort.IOBinding, adapters: Sequence[RowAdapter] | RowAdapter, batch: int) -> None:
        """Bind the adapters of a batch to `binding`, for hosts that bind inputs and outputs themselves.

        Every adapter input but the gate (see `gate`) is bound, so nothing is left of an adapter that was bound before.
        """
        with self.runs.alone:
            for name, value in (bank := self.bank).values(bank.rows(adapters, batch)).items():
                binding.bind_ortvalue_input(name, value)

    def gate(self, input_ids: np.ndarray, adapters: Sequence[RowAdapter] | RowAdapter) -> np.ndarray | None:
        """The `lora_gate` of a prompt, `[batch, sequence, 1]`; None where the graph has no such input.

        `run` makes it itself for a prompt. A step that continues a cache needs it from the host: the last column, as
        an activated LoRA that was invoked stays active. So does a host that binds inputs itself.

        Args:
            input_ids: `[batch, sequence]`, the whole prompt.
        """
        if self.contract.gate is None:
            return None
        return (bank := self.bank).gate(input_ids, bank.rows(adapters, len(input_ids)))

    def feeds(
        self, inputs: Mapping[str, np.ndarray], adapters: Sequence[RowAdapter] | RowAdapter = None
    ) -> dict[str, np.ndarray]:
        """All that `run` feeds the graph for a batch: its own inputs, the gate and the adapters, as arrays."""
        inputs = completed_inputs(inputs, self.contract)
        bank = self.bank
        rows = bank.rows(adapters, len(next(iter(inputs.values()))))
        stacked = {name: array for name, array in bank.stacked(rows).items() if name not in inputs}
        return {**bank.with_gate(inputs, rows), **stacked}

    def stacked(self, adapters: Sequence[RowAdapter] | RowAdapter, batch: int) -> dict[str, np.ndarray]:
        """The adapter inputs of a batch as arrays, for hosts with another runtime; absent inputs keep their default."""
        return (bank := self.bank).stacked(bank.rows(adapters, batch))
