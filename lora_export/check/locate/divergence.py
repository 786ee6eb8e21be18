"""The first node of a graph that computes something else than PyTorch.

1. Values are taken in PyTorch's order: each module's input, the parts of an adapted one, its output. The first that
   differs, while all before it agree, bounds the search: the node lies between it and the agreeing values before it.
2. The module is named that computed the differing value. Where a module's output differs and its input agrees, it is
   this module. Where an input differs, it is the module that gave that input in PyTorch: an attention's core, a
   residual sum. Where only an output of the graph differs, it is the model itself.
3. Where several nodes lie between, the results of all of PyTorch's operations in that module (its attention one by one)
   are sought among the graph's values. Those that are found agree, too, and the search goes on from them.
4. Of the nodes that are left, the first whose known inputs all agree is named. If it is the only one left, it is known
   for sure.

A value may differ while everything computed from it agrees: a key's bias, say. Such a value is passed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.check.divergence_results import ComparedValue, Divergence
from lora_export.check.locate.layers import INPUT, BatchRow, difference
from lora_export.check.locate.probe import Seen, SeenGraph
from lora_export.check.reference.module_calls import WHOLE, Recording, recorded
from lora_export.graph.module_values import GraphNode, WrittenGraph

_SHOWN_BEFORE, _SHOWN_AFTER = 6, 4
_MOST_AXES = 4
_FINER = 0.1
# Operators that arrange numbers; of a `Where`, PyTorch's attention has none.
_KEEPING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Cast", "Identity", "Where", "Split"})


@dataclass(frozen=True)
class _Found:
    """The first differing value: its graph, its place in what was compared, and PyTorch's module that computes it."""

    graph: SeenGraph
    index: int
    value: ComparedValue
    module: str


def locate(seen: Seen, case: str) -> Divergence:
    """The first diverging node on a row whose outputs differ.

    Where no value inside differs by more than the limit, one by a tenth of it is sought, as it may grow into the
    outputs' difference; then the difference is taken to arise after the last value.
    """
    found = _first(seen)
    if found is None:
        finer = seen.with_limit(_FINER * seen.limit)
        found = _first(finer)
        seen = seen if found is None else finer
    found = found or _last(seen)
    graph = found.graph.graph
    known = {value.value for value in found.graph.compared[: found.index] if not value.diverges}
    others = (*found.graph.compared, *found.graph.outputs)
    known |= {value.value for value in others if not value.diverges and _precedes(graph, value, found)}
    known.discard(found.value.value)
    between = _between(graph, found.value.value, known)
    if len(between) > 1:
        known |= _matched(seen, found, between)
        between = _between(graph, found.value.value, known)
    node = _named(graph, between, known)
    agreed = tuple(name for name in dict.fromkeys(name for n in between for name in n.inputs) if name in known)
    start = max(0, found.index - _SHOWN_BEFORE)
    return Divergence(
        case=case,
        row=seen.probe.described,
        limit=seen.limit,
        sentence=_sentence(found, node, between),
        graph=found.graph.stem,
        module=found.module,
        node=node.name,
        op_type=node.op_type,
        value=node.outputs[0],
        reads=tuple(filter(None, node.inputs)),
        agreed=agreed,
        between=len(between),
        compared=(*found.graph.compared[start : found.index + 1 + _SHOWN_AFTER], *found.graph.outputs),
    )


def _first(seen: Seen) -> _Found | None:
    points = [(graph, index) for graph in seen.graphs for index in range(len(graph.compared))]
    for place, (graph, index) in enumerate(points):
        value = graph.compared[index]
        if not value.diverges or graph.graph.node_of(value.value) is None or _is_inside_agreeing(graph, index):
            continue
        rest = [g.compared[i] for g, i in points[place + 1 :]]
        others = [later for later in rest if later.module != value.module and later.value != value.value]
        if others and not any(later.diverges for later in others):
            continue
        call = graph.matches[index].call
        return _Found(graph, index, value, call.input_from if value.what == INPUT else value.module)
    return None


def _is_inside_agreeing(graph: SeenGraph, index: int) -> bool:
    """Whether a value is a part of an adapted module whose output agrees: computed otherwise, to the same end."""
    call = graph.matches[index].call
    outputs = [c for p, c in zip(graph.matches, graph.compared, strict=True) if p.call is call and p.what == WHOLE]
    return graph.compared[index].what not in (INPUT, WHOLE) and not any(output.diverges for output in outputs)


def _last(seen: Seen) -> _Found:
    """A differing output, all that could be compared inside agreeing."""
    differing = ((graph, output) for graph in seen.graphs for output in graph.outputs if output.diverges)
    graph, output = next(differing)
    return _Found(graph, len(graph.compared), output, "")


def _precedes(graph: WrittenGraph, value: ComparedValue, found: _Found) -> bool:
    """Whether the graph computes `value` before the differing one: siblings in PyTorch have no order."""
    place = graph.producers.get(value.value)
    return place is not None and place < graph.producers[found.value.value]


def _between(graph: WrittenGraph, value: str, known: Collection[str]) -> list[GraphNode]:
    """The nodes that compute `value` from what is known, in the order of the graph; those of floating values only."""
    found: set[int] = set()
    pending = [graph.producers[value]]
    while pending:
        index = pending.pop()
        if index in found:
            continue
        found.add(index)
        for name in filter(None, graph.nodes[index].inputs):
            producer = graph.producers.get(name)
            if producer is not None and name not in known and graph.may_be_float(name):
                pending.append(producer)
    return [graph.nodes[index] for index in sorted(found)]


def _named(graph: WrittenGraph, between: Sequence[GraphNode], known: Collection[str]) -> GraphNode:
    """The first node that reads a value that agrees and none that may not; side branches (masks) have no such value."""
    sources = {*known, *graph.inputs}
    reached: set[str] = set()
    for node in between:
        if not sources.isdisjoint(node.inputs) or not reached.isdisjoint(node.inputs):
            reached |= set(node.outputs)
    unsure = reached - set(known)
    for node in between:
        if not sources.isdisjoint(node.inputs) and unsure.isdisjoint(node.inputs):
            return node
    return between[0]


def _matched(seen: Seen, found: _Found, between: Sequence[GraphNode]) -> set[str]:
    """The values of nodes `between` that equal a result of PyTorch inside the module."""
    graph = found.graph.graph
    nodes = {node.outputs[0]: node for node in between if graph.may_be_float(node.outputs[0])}
    nodes.pop(found.value.value, None)
    values = found.graph.more(tuple(nodes)) if nodes else {}
    reference = seen.probe.reference
    with reference.eager_attention(), recorded(reference.module, within=found.module) as recording:
        reference.run(dict(seen.probe.inputs))
    results = _Results(recording, found.graph.run.row, seen.limit)
    return {
        output
        for name, value in values.items()
        if value.dtype.kind == "f" or value.dtype.name == "bfloat16"
        if results.take(value, keep=nodes[name].op_type in _KEEPING)
        for output in nodes[name].outputs
    }


class _Results:
    """PyTorch's results, of which each is that of one node: a node that leaves its input as it was (the addition of a
    mask that masks nothing) must not pass for the one before it."""

    def __init__(self, recording: Recording, row: BatchRow, limit: float) -> None:
        self._row, self._limit = row, limit
        self._left = list(recording.results)
        self._all = [*recording.results, *recording.views]

    def take(self, value: np.ndarray, *, keep: bool) -> bool:
        """Whether `value` is one of the results that are left, up to reshape and transposition; it is then taken.

        Args:
            keep: For a node that only arranges numbers: any result will do, and none is taken.
        """
        value = self._row.of_graph(value)
        for place, result in enumerate(self._all if keep else self._left):
            if self._equal(value, result):
                if not keep:
                    del self._left[place]
                return True
        return False

    def _equal(self, value: np.ndarray, result: np.ndarray) -> bool:
        shapes = {tensor.shape: tensor for tensor in (result, self._row.of_reference(result))}
        return any(
            difference(arranged.reshape(value.shape), value, self._row, terms=0.0)[1] <= self._limit
            for tensor in shapes.values()
            if tensor.size == value.size
            for arranged in _arrangements(tensor)
        )


def _arrangements(tensor: np.ndarray) -> Iterable[np.ndarray]:
    yield tensor
    plain = tensor.squeeze()
    if 2 <= plain.ndim <= _MOST_AXES:
        for order in itertools.islice(itertools.permutations(range(plain.ndim)), 1, None):
            yield plain.transpose(order)


def _sentence(found: _Found, node: GraphNode, between: Sequence[GraphNode]) -> str:
    value = found.value
    where = f"{found.module or 'the model itself'}: {node.op_type} {node.name}"
    if len(between) == 1:
        what = "the product of A" if value.what == "lora_A" else "its output"
        if value.exported_shape != value.reference_shape and value.error == float("inf"):
            shapes = f"{list(value.exported_shape)} exported, {list(value.reference_shape)} in PyTorch"
            return f"{where} is the first node that differs from PyTorch: the shape of {what} is {shapes}."
        return f"{where} is the first node that differs from PyTorch: all that it reads agrees, {what} does not."
    return (
        f"{where} is the first node whose output is nothing that PyTorch computes there, from inputs that agree; "
        f"{value.value} ({value.op_type} {value.node}), {len(between) - 1} nodes further on, is known to differ."
    )
