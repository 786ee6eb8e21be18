"""Paired latencies: every candidate once forwards and once backwards in each block, ratios block by block.

A block runs base, a, b, …, b, a, base. A drift of the machine's speed that is linear within a block cancels in the
ratio of the sums, so only ratios are compared, never milliseconds of different moments.

Two things would still favour one candidate in every block, and both are taken out:
- Threads of idle sessions: they spin for a while and take the cores from the one that is timed (1.2 × seen between two
  sessions of the same graph on two cores). Sessions must be opened with `stop_spinning`.
- Where a session's memory happens to lie (2 to 5 % between sessions of the same graph). The blocks are spread over
  rounds, each with sessions opened anew, in another order.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.runtime.adapter_session import AdapterSession, RowAdapter
from lora_export.runtime.arrays import to_ort_value
from lora_export.runtime.seq2seq_session import Seq2SeqSession
from lora_export.verify.bench_results import Swap, Variant, Workload
from lora_export.verify.intervals import paired_ratio

ROUNDS = 4
# A timed sample repeats a run until it lasts this long, so that the clock and the loop do not count.
_SAMPLE_SECONDS = 0.02
_WARM_UP_SECONDS = 0.15


@dataclass(frozen=True)
class Candidate:
    """One variant to time: its name, what runs, the session it runs in (a key) and the adapters of the rows."""

    name: str
    description: str
    session: str
    adapters: RowAdapter | Sequence[RowAdapter] = None


@dataclass(frozen=True)
class Race:
    """Candidates on the same inputs; the first is the base that the others are compared with.

    Attributes:
        shape: (batch, sequence, past), as labels.
        inputs: By graph: those that make up one run, in their order.
    """

    shape: tuple[int, int, int]
    inputs: Mapping[str, Mapping[str, np.ndarray]]
    candidates: Sequence[Candidate]


Session = AdapterSession | Seq2SeqSession


def graph_session(session: Session, graph: str) -> AdapterSession:
    """The session that runs one graph of an export."""
    return session.sessions[graph] if isinstance(session, Seq2SeqSession) else session


def bound_runs(
    session: Session, adapters: RowAdapter | Sequence[RowAdapter], inputs: Mapping[str, Mapping[str, np.ndarray]]
) -> Callable[[], None]:
    """One run of each graph in `inputs`, one after the other, everything bound."""
    runs = [bound_run(graph_session(session, graph), adapters, feeds) for graph, feeds in inputs.items()]
    if len(runs) == 1:
        return runs[0]

    def run() -> None:
        for each in runs:
            each()

    return run


def bound_run(
    adapter_session: AdapterSession, adapters: RowAdapter | Sequence[RowAdapter], inputs: Mapping[str, np.ndarray]
) -> Callable[[], None]:
    """A run with inputs, adapters and outputs bound on the session's device; returns when the device is done.

    Outputs are allocated once, at the sizes of a first run: a timed run allocates and copies nothing.
    """
    session, device = adapter_session.session, adapter_session.provider
    names = {value.name for value in session.get_inputs()}
    held = {name: to_ort_value(array, device) for name, array in inputs.items() if name in names}
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    batch = len(next(iter(inputs.values())))
    adapter_session.bind_adapters(binding, adapters, batch)
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)
    session.run_with_iobinding(binding)
    outputs = dict(zip([o.name for o in session.get_outputs()], binding.get_outputs(), strict=True))
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run.held = held  # the arrays behind the CPU's bindings must outlive them
    return run


def measure(
    openers: Mapping[str, Callable[[], Session]],
    races: Sequence[Race],
    *,
    blocks: int,
    max_ratio: float | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Workload]:
    """Time every race, one workload for each.

    Args:
        openers: How to open the sessions that the candidates name; with `stop_spinning`.
        blocks: Number of ABBA blocks for each race, at least 6 (below, no 95 % interval exists).
        max_ratio: Allowance for each ratio to the base; None to report only.
    """
    samples = [[[] for _ in race.candidates] for race in races]
    done = itertools.count(1)
    for number, n_blocks in enumerate(_spread(blocks, ROUNDS)):
        # Each round, another session is opened first.
        names = list(openers)
        turn = number % len(names)
        sessions = {name: openers[name]() for name in [*names[turn:], *names[:turn]]}
        for race, taken in zip(races, samples, strict=True):
            for _ in _take_blocks(race, sessions, n_blocks, taken):
                progress(next(done), blocks * len(races))
        sessions.clear()  # before the next round opens its own
    return [_workload(race, taken, max_ratio) for race, taken in zip(races, samples, strict=True)]


def _spread(blocks: int, rounds: int) -> list[int]:
    """`blocks` over at most `rounds` rounds, as evenly as it goes."""
    counts = [blocks // rounds + (number < blocks % rounds) for number in range(rounds)]
    return [count for count in counts if count]


def _take_blocks(
    race: Race, sessions: Mapping[str, Session], n_blocks: int, samples: list[list[float]]
) -> Iterator[int]:
    """Time `n_blocks` ABBA blocks, yielding after each; milliseconds a run are added to each candidate's `samples`."""
    runs = [bound_runs(sessions[c.session], c.adapters, race.inputs) for c in race.candidates]
    repeats = [_warm_up(run) for run in runs]
    for block in range(n_blocks):
        for index in [*range(len(runs)), *reversed(range(len(runs)))]:
            samples[index].append(_sample_ms(runs[index], repeats[index]))
        yield block


def _workload(race: Race, samples: Sequence[Sequence[float]], max_ratio: float | None) -> Workload:
    batch = race.shape[0]
    variants = tuple(
        Variant(c.name, c.description, tuple(taken), statistics.median(taken), batch / statistics.median(taken) * 1e3)
        for c, taken in zip(race.candidates, samples, strict=True)
    )
    ratios = tuple(paired_ratio(variant, variants[0], max_ratio) for variant in variants[1:])
    return Workload(*race.shape, variants, ratios)


def _warm_up(run: Callable[[], None]) -> int:
    """Run until warm; how many runs make one timed sample."""
    deadline, fastest = time.perf_counter() + _WARM_UP_SECONDS, math.inf
    while (now := time.perf_counter()) < deadline:
        run()
        fastest = min(fastest, time.perf_counter() - now)
    return max(1, round(_SAMPLE_SECONDS / fastest)) if math.isfinite(fastest) else 1


def _sample_ms(run: Callable[[], None], repeats: int) -> float:
    """Milliseconds a run; short runs are timed several at once, behind one untimed that fills the caches."""
    if repeats > 1:
        run()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats * 1e3


def measure_swap(session: Session, batch: int, n: int = 50) -> Swap | None:
    """Microseconds to change the adapter of the next run of `batch` rows in every graph, the run itself left out; None
    with fewer than two adapters.

    `bound_us`: bind the tensors of an adapter that the session holds. `loaded_us`: read its files, stack and bind them.
    """
    names = session.adapters
    if len(names) < 2:
        return None
    graphs = [graph_session(session, graph) for graph in session.manifest.graphs]
    bindings = [graph.session.io_binding() for graph in graphs]
    bound, loaded = [], []
    for index in range(n + 2):
        name = names[index % 2]
        start = time.perf_counter()
        for graph, binding in zip(graphs, bindings, strict=True):
            graph.bind_adapters(binding, name, batch)
        bound.append((time.perf_counter() - start) * 1e6)
    for index in range(n // 5):
        name = names[index % 2]
        files = session.manifest.adapter(name).files
        start = time.perf_counter()
        for graph, binding in zip(graphs, bindings, strict=True):
            if graph.graph in files:
                graph.load(session.folder / files[graph.graph], name)
            graph.bind_adapters(binding, name, batch)
        loaded.append((time.perf_counter() - start) * 1e6)
    return Swap(statistics.median(bound[2:]), statistics.median(loaded), n)
