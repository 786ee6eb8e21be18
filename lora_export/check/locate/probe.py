"""One row looked into: the reference with hooks, and each graph of the export once, every module an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_export.check.divergence_results import ComparedValue, LayerErrors
from lora_export.check.locate.layers import BatchRow, Match, compare_value, compare_values, match
from lora_export.check.reference.module_calls import WHOLE, ModuleCall, recorded
from lora_export.check.reference.unmerged import Reference
from lora_export.check.turns import Turns
from lora_export.contract import graph_file
from lora_export.graph.module_values import WrittenGraph
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.intermediates import run_for_values

# An output of the encoder's graph has another name in the reference.
_ENCODED = {"last_hidden_state": "encoder_last_hidden_state"}


@dataclass(frozen=True)
class GraphRun:
    """One run of one graph of the export: all that it is fed, and which of its numbers are the row's."""

    session: AdapterSession
    feeds: Mapping[str, np.ndarray]
    row: BatchRow


@dataclass(frozen=True)
class Probe:
    """What to look into: a row in the reference, and the runs of the export's graphs, in order, that compute it.

    Attributes:
        inputs: The reference's, `[1, …]`.
        described: The row, in words.
    """

    reference: Reference
    inputs: Mapping[str, np.ndarray]
    runs: tuple[GraphRun, ...]
    described: str


@dataclass(frozen=True)
class SeenGraph:
    """One graph's values, compared.

    Attributes:
        compared: Inputs, parts and outputs of modules, in the order in which PyTorch computes them, with `matches`.
        outputs: The outputs of the graph that the reference has too, and those of the reference, `[1, …]`.
    """

    run: GraphRun
    graph: WrittenGraph
    matches: tuple[Match, ...]
    compared: tuple[ComparedValue, ...]
    outputs: tuple[ComparedValue, ...]
    expected: Mapping[str, np.ndarray]
    found: Mapping[str, np.ndarray]
    turns: Turns

    @property
    def stem(self) -> str:
        return self.run.session.graph

    def more(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Further values of the same run."""
        session = self.run.session
        model = self.graph.with_outputs(names)
        self.turns.take_session()
        return run_for_values(model, session.folder, session.provider, feeds=self.run.feeds, names=names)


@dataclass(frozen=True)
class Seen:
    """All graphs of a probe."""

    probe: Probe
    graphs: tuple[SeenGraph, ...]
    calls: tuple[ModuleCall, ...]
    limit: float

    @property
    def differs(self) -> bool:
        """Whether an output of the export differs on this row."""
        return any(output.diverges for graph in self.graphs for output in graph.outputs)

    def with_limit(self, limit: float) -> Seen:
        """The same, judged by another limit inside; outputs stay as they were judged."""
        graphs = []
        for graph in self.graphs:
            compared = tuple(replace(value, diverges=not value.error_relative <= limit) for value in graph.compared)
            graphs.append(replace(graph, compared=compared))
        return replace(self, graphs=tuple(graphs), limit=limit)

    def layer_errors(self, name: str) -> LayerErrors:
        modules = [value for graph in self.graphs for value in graph.compared if value.what == WHOLE]
        seen = {value.module for value in modules}
        weighted = [call.module for call in self.calls if call.part == WHOLE and call.weight is not None]
        not_seen = tuple(dict.fromkeys(module for module in weighted if module not in seen))
        return LayerErrors(name, self.probe.described, tuple(modules), not_seen)


def look(probe: Probe, limit: float) -> Seen:
    """Run both sides and compare; what differs by more than `limit`, relative to the largest value, diverges.

    Memory: the outputs of all modules for the batch that is fed, once on either side: of a transformer some
    20 numbers of its width a layer and token, far less than the layer's weights for the 96 tokens of an example.
    """
    with recorded(probe.reference.module) as recording:
        outputs = probe.reference.run(dict(probe.inputs))
    turns = probe.reference.turns
    graphs = tuple(_look(run, recording.calls, outputs, limit=limit, turns=turns) for run in probe.runs)
    return Seen(probe, graphs, tuple(recording.calls), limit)


def _look(
    run: GraphRun,
    calls: Sequence[ModuleCall],
    outputs: Mapping[str, np.ndarray],
    *,
    limit: float,
    turns: Turns,
) -> SeenGraph:
    session = run.session
    graph = WrittenGraph(session.folder / graph_file(session.graph))
    matches = match(graph.sites(), calls, graph.producers.keys() | graph.inputs)
    names = _ENCODED if "encoder" in session.graph else {}
    expected = {name: outputs[names.get(name, name)] for name in graph.outputs if names.get(name, name) in outputs}
    wanted = list(dict.fromkeys([*(v for p in matches for v in p.values if v in graph.producers), *expected]))
    turns.take_session()
    values = run_for_values(graph.with_outputs(wanted), session.folder, session.provider, feeds=run.feeds, names=wanted)
    compared = compare_values(graph, session.graph, matches, values={**run.feeds, **values}, row=run.row, limit=limit)
    final = [
        compare_value(
            graph,
            session.graph,
            "",
            what=name,
            value=name,
            expected=tensor,
            found=values[name],
            row=run.row,
            limit=limit,
            terms=_terms_of(tensor, calls),
        )
        for name, tensor in expected.items()
    ]
    found = {name: values[name] for name in expected}
    return SeenGraph(run, graph, tuple(matches), tuple(compared), tuple(final), expected, found, turns)


def _terms_of(output: np.ndarray, calls: Sequence[ModuleCall]) -> float | None:
    """The size of the terms of a model's output, if a linear map of its own gives it; None if none does."""
    makers = (call for call in reversed(calls) if call.terms is not None and call.output.shape == output.shape)
    return next((call.terms for call in makers if np.array_equal(call.output, output)), None)
