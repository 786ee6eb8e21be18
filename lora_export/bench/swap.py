"""How long it takes to change the adapter of a session's next run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice

from lora_export.bench.budget import Budget
from lora_export.bench.intervals import median_interval, verdict
from lora_export.bench.latency import Session, graph_session
from lora_export.bench.results import Swap

N_BOUND, N_LOADED = 50, 10


def measure_swap(session: Session, batch: int, budget: Budget) -> tuple[Swap, ...]:
    """Microseconds to change the adapter of the next run of `batch` rows in every graph, the run itself left out;
    empty with fewer than two adapters.

    "bound": bind the tensors of an adapter that the session holds. "loaded": read its files, stack and bind them.
    """
    names = session.adapters
    if len(names) < 2:
        return ()
    graphs = [graph_session(session, graph) for graph in session.manifest.graphs]
    bindings = [graph.session.io_binding() for graph in graphs]

    def bind(name: str) -> None:
        for graph, binding in zip(graphs, bindings, strict=True):
            graph.bind_adapters(binding, name, batch)

    def load(name: str) -> None:
        record = session.manifest.adapter(name)
        for graph in graphs:
            if graph.graph in record.files:
                file = session.folder / record.files[graph.graph]
                graph.load(file, name, invocation_tokens=record.invocation_tokens)
        bind(name)

    bind(names[0])
    bind(names[1])  # the first of each stacks its tensors
    ways = (("bound", bind, N_BOUND), ("loaded", load, N_LOADED))
    return tuple(_swap(name, tuple(islice(_times_us(change, names), n)), budget) for name, change, n in ways)


def _times_us(change: Callable[[str], None], names: tuple[str, ...]) -> Iterator[float]:
    """Microseconds of one change after another, to and fro between the first two adapters."""
    while True:
        for name in names[:2]:
            start = time.perf_counter()
            change(name)
            yield (time.perf_counter() - start) * 1e6


def _swap(name: str, samples_us: tuple[float, ...], budget: Budget) -> Swap:
    low, high, confidence = median_interval(samples_us)
    allowance = budget.swap_us.get(name)
    median = statistics.median(samples_us)
    return Swap(name, samples_us, median, low, high, confidence, allowance, verdict(low, high, allowance))
