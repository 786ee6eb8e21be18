"""Paired latencies: every candidate once forwards and once backwards in each block, ratios block by block.

A block runs base, a, b, …, b, a, base. A drift of the machine's speed that is linear within a block cancels in the
ratio of the sums, so only ratios are compared, never milliseconds of different moments.

Other processes add time to some runs and never take any away, so of a sample, which holds several short runs, the
fastest is compared: what a graph costs, it costs in every run. On a busy machine the interval for the median ratio is
many times narrower than with the samples' means (`ci/benchmarks/latency_gate.py` counts what either finds).

Two things would still favour one candidate in every block, and both are taken out:
- Threads of idle sessions: they spin for a while and take the cores from the one that is timed (1.2 × seen between two
  sessions of the same graph on two cores). Sessions must be opened with `stop_spinning`.
- Where a session's memory happens to lie (2 to 5 % between sessions of the same graph). The blocks are spread over
  rounds, each with sessions opened anew, in another order.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.bench.intervals import paired_ratio
from lora_export.bench.results import Variant, WarmUp, Workload
from lora_export.bench.warm_up import warm_up
from lora_export.contract import GATE_INPUT
from lora_export.runtime.adapter_session import AdapterSession, RowAdapter
from lora_export.runtime.arrays import to_ort_value
from lora_export.runtime.cache import with_room, written_in_place
from lora_export.runtime.seq2seq_session import Seq2SeqSession

ROUNDS = 4
# A timed sample repeats a run until it lasts this long, so that the clock and the loop do not count.
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Candidate:
    """One variant to time.

    Attributes:
        session: The session it runs in, a key.
        adapters: Those of the rows.
        is_changing: Whether each row's adapter is the next row's in the run after.
    """

    name: str
    description: str
    session: str
    adapters: RowAdapter | Sequence[RowAdapter] = None
    is_changing: bool = False


@dataclass(frozen=True)
class Comparison:
    """Two candidates whose ratio is of interest, by name, and the largest ratio allowed (None: only reported)."""

    variant: str
    reference: str
    allowance: float | None = None


# What makes up one run: inputs by graph, the graphs in their order.
Inputs = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Race:
    """Candidates to time side by side on inputs of one shape.

    Attributes:
        shape: (batch, sequence, past), as labels.
        inputs: By session: the same values, in the dtypes that it takes.
    """

    shape: tuple[int, int, int]
    inputs: Mapping[str, Inputs]
    candidates: Sequence[Candidate]
    comparisons: Sequence[Comparison]


Session = AdapterSession | Seq2SeqSession


def graph_session(session: Session, graph: str) -> AdapterSession:
    """The session that runs one graph of an export."""
    return session.sessions[graph] if isinstance(session, Seq2SeqSession) else session


def bound_runs(
    session: Session, adapters: RowAdapter | Sequence[RowAdapter], inputs: Inputs, *, is_changing: bool = False
) -> Callable[[], None]:
    """One run of each graph in `inputs`, one after the other, everything bound; as in `Candidate`."""
    bind = changing_run if is_changing else bound_run
    runs = [bind(graph_session(session, graph), adapters, feeds) for graph, feeds in inputs.items()]
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

    Outputs are allocated once, at the sizes of a first run: a timed run allocates and copies nothing. Past and present
    are one buffer where the graph allows it.
    """
    session, device = adapter_session.session, adapter_session.provider
    contract = adapter_session.contract
    names = {value.name for value in session.get_inputs()}
    own = {name: array for name, array in with_room(inputs, contract).items() if name in names}
    if (gate := adapter_session.bank.required_gate) is not None:
        own.setdefault(GATE_INPUT, gate)
    held = {name: to_ort_value(array, device) for name, array in own.items()}
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    batch = len(next(iter(inputs.values())))
    adapter_session.bind_adapters(binding, adapters, batch)
    written = written_in_place(contract, held)
    for output in session.get_outputs():
        if output.name in written:
            binding.bind_ortvalue_output(output.name, written[output.name])
        else:
            binding.bind_output(output.name, device, 0)
    session.run_with_iobinding(binding)
    outputs = dict(zip([o.name for o in session.get_outputs()], binding.get_outputs(), strict=True))
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run.held = held  # the arrays behind the CPU's bindings must outlive them
    run.binding = binding
    return run


def changing_run(
    session: AdapterSession, adapters: Sequence[RowAdapter], inputs: Mapping[str, np.ndarray]
) -> Callable[[], None]:
    """As `bound_run`, but every run puts another mix together first: each row has the next row's adapter."""
    bound, bank = bound_run(session, adapters, inputs), session.bank
    mixes = [bank.rows([*adapters[turn:], *adapters[:turn]], len(adapters)) for turn in range(len(adapters))]
    turns = itertools.cycle(mixes)

    def run() -> None:
        with bank.lent(next(turns)) as lent:
            for name, value in lent.items():
                bound.binding.bind_ortvalue_input(name, value)
            bound()

    run.binding = bound.binding
    return run


@dataclass(frozen=True)
class Timing:
    """What accumulates for one candidate: each sample's milliseconds a run (mean, fastest), each round's warm-up."""

    samples_ms: list[tuple[float, float]]
    warm_ups: list[WarmUp]


class Timings:
    """What accumulates for all candidates of all races while they are timed."""

    def __init__(self, races: Sequence[Race]) -> None:
        self.by_race = [(race, [Timing([], []) for _ in race.candidates]) for race in races]

    def workloads(self) -> list[Workload]:
        """One for each race that has a whole block; samples of a block that was cut short are left out."""
        found = []
        for race, taken in self.by_race:
            n_blocks = min(len(timing.samples_ms) for timing in taken) // 2
            if n_blocks:
                whole = [Timing(timing.samples_ms[: 2 * n_blocks], timing.warm_ups) for timing in taken]
                found.append(_workload(race, whole))
        return found


def measure(
    openers: Mapping[str, Callable[[], Session]],
    races: Sequence[Race],
    *,
    blocks: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    timings: Timings | None = None,
) -> list[Workload]:
    """Time every race, one workload for each.

    Args:
        openers: How to open the sessions that the candidates name; with `stop_spinning`.
        blocks: Number of ABBA blocks for each race, at least 6 (below, no 95 % interval exists).
        timings: Those of `races`, to be filled, for a caller that wants what was taken before a run raised.
    """
    timings = Timings(races) if timings is None else timings
    done = itertools.count(1)
    for number, n_blocks in enumerate(_spread(blocks, ROUNDS)):
        # Each round, another session is opened first.
        names = list(openers)
        turn = number % len(names)
        sessions = {name: openers[name]() for name in [*names[turn:], *names[:turn]]}
        for race, taken in timings.by_race:
            runs = [
                bound_runs(sessions[c.session], c.adapters, race.inputs[c.session], is_changing=c.is_changing)
                for c in race.candidates
            ]
            for _ in take_blocks(runs, n_blocks, taken):
                progress(next(done), blocks * len(races))
        sessions.clear()  # before the next round opens its own
    return timings.workloads()


def _spread(blocks: int, rounds: int) -> list[int]:
    """`blocks` over at most `rounds` rounds, as evenly as it goes."""
    counts = [blocks // rounds + (number < blocks % rounds) for number in range(rounds)]
    return [count for count in counts if count]


def take_blocks(runs: Sequence[Callable[[], None]], n_blocks: int, timings: Sequence[Timing]) -> Iterator[int]:
    """Warm up and time `n_blocks` ABBA blocks of `runs`, yielding after each; what is found is added to the `timings`,
    one for each run."""
    fastest = []
    for run, timing in zip(runs, timings, strict=True):
        warm, seconds = warm_up(run)
        timing.warm_ups.append(warm)
        fastest.append(seconds)
    # The same for all: of more runs, the fastest is faster.
    repeats = max(1, round(SAMPLE_SECONDS / min(fastest)))
    for block in range(n_blocks):
        for index in [*range(len(runs)), *reversed(range(len(runs)))]:
            timings[index].samples_ms.append(_sample_ms(runs[index], repeats))
        yield block


def _workload(race: Race, timings: Sequence[Timing]) -> Workload:
    variants = {
        candidate.name: _variant(candidate, timing, race.shape[0])
        for candidate, timing in zip(race.candidates, timings, strict=True)
    }
    ratios = [paired_ratio(variants[c.variant], variants[c.reference], c.allowance) for c in race.comparisons]
    return Workload(*race.shape, tuple(variants.values()), tuple(ratios))


def _variant(candidate: Candidate, timing: Timing, batch: int) -> Variant:
    samples, fastest = zip(*timing.samples_ms, strict=True)
    median = statistics.median(samples)
    rate, warm_ups = batch / median * 1e3, tuple(timing.warm_ups)
    return Variant(candidate.name, candidate.description, samples, fastest, median, rate, warm_ups)


def _sample_ms(run: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Milliseconds of a run, mean and fastest of `repeats`; short runs go behind one untimed that fills the caches."""
    if repeats > 1:
        run()
    seconds = []
    before = time.perf_counter()
    for _ in range(repeats):
        run()
        after = time.perf_counter()
        seconds.append(after - before)
        before = after
    return statistics.fmean(seconds) * 1e3, min(seconds) * 1e3
