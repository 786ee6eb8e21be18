"""`Seq2SeqSession`: run an exported encoder-decoder, with a different adapter for each row of a batch if need be.

Needs onnxruntime and numpy only; torch, transformers and PEFT need not be installed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from lora_export.artifact import read_manifest
from lora_export.contract import DECODER, DECODER_WITH_PAST, ENCODER, PAST, PRESENT, adapter_file, present_of
from lora_export.errors import InputRefused, UsageProblem, some_of
from lora_export.runtime.adapter_file import reader_of
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.bank import Bank, RowAdapter, Shelf
from lora_export.runtime.end_tokens import end_tokens_in, has_brought_settings
from lora_export.runtime.generation_config import generation_defaults
from lora_export.runtime.inputs import Given, inputs_of
from lora_export.runtime.residency import Residency, residency_of
from lora_export.runtime.targets import TargetRules, fixed_part, speech_start
from lora_export.runtime.tokenizer import TextTokenizer

_GRAPHS = (ENCODER, DECODER, DECODER_WITH_PAST)
# The encoder's input of a speech model.
SOUNDS = "input_features"
RowAdapters = Sequence[RowAdapter] | RowAdapter


@dataclass(frozen=True)
class DecoderState:
    """What the decoder's next step needs: arrays by input name, and who goes on.

    Attributes:
        fixed: The source's mask (text), and the cross-attention's `past_key_values.{i}.encoder.key|value`.
        cache: `past_key_values.{i}.decoder.key|value`, `[batch, heads, past, head_size]`.
        adapters: Those of the rows.
        decoder: The session of the later steps' graph, with the adapters that the text was begun with.
    """

    fixed: Mapping[str, np.ndarray]
    cache: Mapping[str, np.ndarray]
    adapters: RowAdapters
    decoder: AdapterSession


class Seq2SeqSession:
    """The three ONNX Runtime sessions of an encoder-decoder's export, with its adapters loaded.

    Any thread may call any method at any time, as in `AdapterSession`. All graphs of a run go by the same adapters,
    those that are loaded when it starts, and a text goes on with the adapters that it was begun with.

    Attributes:
        sessions: The sessions by graph. What one of them loads or unloads by itself changes its graph alone.

    Args:
        folder, provider, n_threads, stop_spinning, max_bytes, map_adapters: As in `AdapterSession`.

    Raises:
        UsageProblem: The export is no encoder-decoder's.
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
        max_bytes: int | Residency | None = None,
        map_adapters: bool = False,
    ) -> None:
        self.residency = residency_of(max_bytes, map_adapters=map_adapters)
        how = {"n_threads": n_threads, "stop_spinning": stop_spinning, "max_bytes": self.residency}
        how |= {"map_adapters": map_adapters}
        opened = {graph: AdapterSession(folder, provider, graph=graph, **how) for graph in _GRAPHS}
        self._shelf = Shelf({graph: session.bank for graph, session in opened.items()})
        self.sessions = {graph: session.with_shelf(self._shelf) for graph, session in opened.items()}
        encoder = self.sessions[ENCODER]
        self.folder, self.manifest = encoder.folder, encoder.manifest
        self.provider, self.provider_reason = encoder.provider, encoder.provider_reason
        self._encoder_inputs = [spec.name for spec in self.manifest.graphs[ENCODER].inputs]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self.sessions[ENCODER].adapters

    def snapshot(self) -> Seq2SeqSession:
        """This session with the adapters of now, as `AdapterSession.snapshot`."""
        view = copy.copy(self)
        view._shelf = Shelf(self._shelf.banks)
        view.sessions = {graph: session.with_shelf(view._shelf) for graph, session in self.sessions.items()}
        return view

    @property
    def banks(self) -> Mapping[str, Bank]:
        """The adapters as they are now, by graph: values that no later `load` or `unload` changes."""
        return self._shelf.banks

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What the decoder is given first: the model's start token, and the one it is forced to begin with, if any.

        Of what speech starts with, the part before a language that the model finds by itself.
        """
        return fixed_part(self.rules().start)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return self.rules().eos_ids

    def rules(self, adapter: RowAdapter = None) -> TargetRules:
        """How a target of `adapter` starts and ends: by its own configuration, and the export's where it has none.

        Speech is transcribed without times, in the language that the model hears.
        """
        place = self.preprocessing(adapter)
        defaults = generation_defaults(*dict.fromkeys([place, self.folder]))
        rules = TargetRules.of(defaults)
        if self.manifest.graphs[ENCODER].inputs[0].name == SOUNDS:
            rules = replace(rules, start=speech_start(defaults))
        is_brought, opened = has_brought_settings(place, self.folder, self.manifest), partial(self.tokenizer, adapter)
        return replace(rules, eos_ids=end_tokens_in(place, self.folder, is_brought=is_brought, tokenizer=opened))

    def preprocessing(self, adapter: RowAdapter = None) -> Path:
        """As `AdapterSession.preprocessing`."""
        return self.sessions[ENCODER].preprocessing(adapter)

    def tokenizer(self, adapter: RowAdapter = None) -> TextTokenizer:
        """As `AdapterSession.tokenizer`."""
        return self.sessions[ENCODER].tokenizer(adapter)

    def inputs(self, rows: Sequence[Given], adapter: RowAdapter = None) -> dict[str, np.ndarray]:
        """What `generate` takes for texts or WAV files; see `inputs_of`."""
        return inputs_of(self, rows, adapter)

    def load(self, prefix: str | Path, name: str | None = None) -> str:
        """Load the files `<prefix>.<graph>.onnx_adapter` made for this export and return the adapter's name.

        Args:
            prefix: The files' path without graph and suffix, e.g. `served/adapters/legal`; a graph that the adapter
                does not touch has no file.
            name: Default: the last part of `prefix`.

        Raises:
            InputRefused: There is no file, or the files are not an adapter of these graphs.
        """
        prefix = Path(prefix)
        name = name or prefix.name
        paths = {graph: prefix.parent / adapter_file(prefix.name, graph) for graph in _GRAPHS}
        if not any(path.is_file() for path in paths.values()):
            raise InputRefused(
                "There is no such adapter",
                where=str(prefix),
                expected=f"{paths[ENCODER].name}, {paths[DECODER].name} and so on beside it",
            )
        brought = {graph: self.sessions[graph].read(path) for graph, path in paths.items() if path.is_file()}
        self._require_whole(str(prefix), brought)
        readers = {graph: reader_of(paths[graph]) for graph in brought if self.residency.or_none}
        self._shelf.put(name, {graph: brought.get(graph, {}) for graph in _GRAPHS}, None, readers=readers)
        return name

    def hold(self, name: str, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Load as `name` what `read` of the `sessions` gave, by graph: arrays that must not change any more.

        Raises:
            InputRefused: The tensors of the graphs do not belong together.
        """
        self._require_whole(name, tensors)
        self._shelf.put(name, {graph: tensors.get(graph, {}) for graph in _GRAPHS}, None)

    def _require_whole(self, what: str, brought: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Refuse files of which one lacks what another brings to a module that both graphs have."""
        every = {name for tensors in brought.values() for name in tensors}
        for graph, contract in self.manifest.graphs.items():
            taken = {entry.name for entry in contract.adapter_inputs}
            lacking = sorted((every & taken) - set(brought.get(graph, ())))
            if lacking:
                raise InputRefused(
                    "The adapter's files do not belong together: one graph would run without it",
                    where=f"{what}: {graph}",
                    expected=some_of(lacking, 4),
                    next_step="pack it for this export with `lora-export add`",
                )

    def unload(self, name: str) -> None:
        """Forget adapter `name`.

        Raises:
            UsageProblem: It is not loaded.
        """
        self._shelf.remove(name, _GRAPHS)

    def run(
        self, inputs: Mapping[str, np.ndarray], adapters: RowAdapters = None, outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Encode and decode one batch at given targets (teacher forcing): the decoder's outputs by name.

        Args:
            inputs: The encoder's inputs by name, and `decoder_input_ids` `[batch, target]`.
            adapters, outputs: As in `AdapterSession.run`; outputs are those of the decoder's first step, of which
                `logits` is `[batch, target, vocabulary]`.

        Raises:
            UsageProblem: An unknown adapter, the number of entries is not the batch size, or an input is missing.
        """
        source, targets = self.split(inputs)
        now = self.snapshot()
        return now.sessions[DECODER].run(now.encode(source, adapters) | {"input_ids": targets}, adapters, outputs)

    def begin(self, inputs: Mapping[str, np.ndarray], adapters: RowAdapters = None) -> tuple[np.ndarray, DecoderState]:
        """As `run`: the logits at the given targets, and the state to go on from."""
        source, targets = self.split(inputs)
        now = self.snapshot()
        encoded = now.encode(source, adapters)
        results = now.sessions[DECODER].run(encoded | {"input_ids": targets}, adapters)
        past = {PAST + name.removeprefix(PRESENT): value for name, value in results.items() if name.startswith(PRESENT)}
        fixed = {name: value for name, value in past.items() if ".encoder." in name}
        if "encoder_attention_mask" in encoded:
            fixed["encoder_attention_mask"] = encoded["encoder_attention_mask"]
        cache = {name: value for name, value in past.items() if ".decoder." in name}
        return results["logits"], DecoderState(fixed, cache, adapters, now.sessions[DECODER_WITH_PAST])

    def advance(self, state: DecoderState, targets: np.ndarray) -> tuple[np.ndarray, DecoderState]:
        """The logits at further targets `[batch, n]` with the adapters of `begin`, and the state after them."""
        feeds = {**state.fixed, **state.cache, "input_ids": targets}
        results = state.decoder.run(feeds, state.adapters)
        cache = {name: results[present_of(name)] for name in state.cache}
        return results["logits"], replace(state, cache=cache)

    def generate(
        self,
        inputs: Mapping[str, np.ndarray],
        adapters: RowAdapters = None,
        *,
        max_new_tokens: int,
        start_ids: Sequence[int] | None = None,
        eos_ids: frozenset[int] | None = None,
        suppress: bool = True,
    ) -> list[list[int]]:
        """The greedy target of each row, without its start, up to and without an end token, as the row has it alone.

        Args:
            inputs: The encoder's inputs by name.
            start_ids: Targets that every row starts with, e.g. Whisper's language and task; default: those of `rules`.
            eos_ids: Default: those of `rules`.
            suppress: Whether tokens that a row's configuration forbids are not written, as in Transformers.

        Raises:
            UsageProblem: Neither the call nor a row's configuration says how a target starts.
            InputRefused: The scores of a token are not finite.
        """
        from lora_export.runtime.seq2seq_scheduler import write_targets

        how = {"start_ids": start_ids, "eos_ids": eos_ids, "suppress": suppress}
        return write_targets(self, inputs, adapters, max_new_tokens=max_new_tokens, **how)

    def split(self, inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        if "decoder_input_ids" not in inputs:
            raise UsageProblem(
                "The inputs lack the targets to decode at",
                where="decoder_input_ids is missing",
                expected=", ".join([*self._encoder_inputs, "decoder_input_ids"]),
            )
        source = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        return source, inputs["decoder_input_ids"]

    def encode(self, source: Mapping[str, np.ndarray], adapters: RowAdapters) -> dict[str, np.ndarray]:
        """The decoder's inputs from the source."""
        states = self.sessions[ENCODER].run(source, adapters)["last_hidden_state"]
        mask = {"encoder_attention_mask": source["attention_mask"]} if "attention_mask" in source else {}
        return {"encoder_hidden_states": states, **mask}


def open_export(folder: Path, provider: str | None, *, stop_spinning: bool = False) -> AdapterSession | Seq2SeqSession:
    """The session that runs the export in `folder`, whatever its task."""
    is_seq2seq = DECODER in read_manifest(folder).graphs
    return (Seq2SeqSession if is_seq2seq else AdapterSession)(folder, provider, stop_spinning=stop_spinning)
