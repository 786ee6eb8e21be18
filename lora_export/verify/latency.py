"""Paired latencies: every variant once forwards and once backwards in each block, ratios block by block.

A block runs base, a, b, …, b, a, base. A drift of the machine's speed that is linear within a block cancels in the
ratio of the sums, so only ratios are compared, never milliseconds of different moments. The interval for the median
ratio comes from order statistics: of n blocks, the k-th smallest and k-th largest cover the median with probability
1 − 2·P(Binomial(n, ½) < k), whatever the distribution.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.runtime.adapter_session import AdapterSession, RowAdapter
from lora_export.runtime.arrays import to_ort_value
from lora_export.verify.results import Ratio, Swap, Variant, Verdict, Workload

CONFIDENCE = 0.95
# A timed sample repeats a run until it lasts this long, so that the clock and the loop do not count.
_SAMPLE_SECONDS = 0.02
_WARM_UP_SECONDS = 0.3


@dataclass(frozen=True)
class Subject:
    """One variant to time: its name, what runs, the session and the adapters of the rows."""

    name: str
    description: str
    session: AdapterSession
    adapters: RowAdapter | Sequence[RowAdapter] = None


def bound_run(subject: Subject, inputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
    """A run of `subject` with inputs and outputs bound on its device; returns when the device is done.

    Outputs are allocated once, at the sizes of a first run: a timed run allocates and copies nothing.
    """
    adapter_session = subject.session
    session, device = adapter_session.session, adapter_session.provider
    names = {value.name for value in session.get_inputs()}
    held = {name: to_ort_value(array, device) for name, array in inputs.items() if name in names}
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    batch = len(next(iter(inputs.values())))
    adapter_session.bind_adapters(binding, subject.adapters, batch)
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
    subjects: Sequence[Subject],
    inputs: Mapping[str, np.ndarray],
    shape: tuple[int, int, int],
    *,
    blocks: int,
    max_ratio: float | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Workload:
    """Time `subjects` on `inputs`; the first is the base that the others are compared with.

    Args:
        shape: (batch, sequence, past), as labels.
        blocks: Number of ABBA blocks, at least 6 (below, no 95 % interval exists).
        max_ratio: Allowance for each ratio to the base; None to report only.
    """
    runs = [bound_run(subject, inputs) for subject in subjects]
    repeats = [_warm_up(run) for run in runs]
    order = [*range(len(runs)), *reversed(range(len(runs)))]
    samples: list[list[float]] = [[] for _ in runs]
    for block in range(blocks):
        progress(block, blocks)
        for index in order:
            samples[index].append(_sample_ms(runs[index], repeats[index]))
    batch = shape[0]
    variants = tuple(
        Variant(s.name, s.description, tuple(taken), statistics.median(taken), batch / statistics.median(taken) * 1e3)
        for s, taken in zip(subjects, samples, strict=True)
    )
    ratios = tuple(paired_ratio(variant, variants[0], max_ratio) for variant in variants[1:])
    return Workload(*shape, variants, ratios)


def _warm_up(run: Callable[[], None]) -> int:
    """Run until warm; how many runs make one timed sample."""
    deadline, fastest = time.perf_counter() + _WARM_UP_SECONDS, math.inf
    while (now := time.perf_counter()) < deadline:
        run()
        fastest = min(fastest, time.perf_counter() - now)
    return max(1, round(_SAMPLE_SECONDS / fastest)) if math.isfinite(fastest) else 1


def _sample_ms(run: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats * 1e3


def paired_ratio(variant: Variant, base: Variant, allowance: float | None) -> Ratio:
    """The median over blocks of `variant / base`, with its interval and verdict."""

    def block_sums(samples: tuple[float, ...]) -> list[float]:
        return [first + second for first, second in zip(samples[::2], samples[1::2], strict=True)]

    pairs = zip(block_sums(variant.samples_ms), block_sums(base.samples_ms), strict=True)
    ratios = [mine / theirs for mine, theirs in pairs]
    low, high, confidence = median_interval(ratios)
    return Ratio(
        variant.name,
        base.name,
        statistics.median(ratios),
        low,
        high,
        confidence,
        tuple(ratios),
        allowance,
        verdict(low, high, allowance),
    )


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """`(low, high, coverage)`: the narrowest order-statistics interval for the median that covers `confidence`.

    For 30 values: the 10th and 21st, 95.7 %. With fewer than 6 values no such interval exists: the extremes, with
    what they cover.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < n // 2:
        below = tail + math.comb(n, k) / 2**n
        if 1 - 2 * below < confidence:
            break
        tail, k = below, k + 1
    k = max(k, 1)
    coverage = 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
    return ordered[k - 1], ordered[n - k], coverage


def verdict(low: float, high: float, allowance: float | None) -> Verdict:
    """Fail only if the whole interval exceeds the allowance, pass only if none of it does."""
    if allowance is None:
        return Verdict.NOT_GATED
    if low > allowance:
        return Verdict.FAIL
    return Verdict.PASS if high <= allowance else Verdict.AMBIGUOUS


def measure_swap(session: AdapterSession, inputs: Mapping[str, np.ndarray], n: int = 50) -> Swap | None:
    """Microseconds to change the adapter of the next run, the run itself left out; None with fewer than two adapters.

    `bound_us`: bind the tensors of an adapter that the session holds. `loaded_us`: read its file, stack and bind it.
    """
    names = session.adapters
    if len(names) < 2:
        return None
    batch = len(next(iter(inputs.values())))
    binding = session.session.io_binding()
    bound, loaded = [], []
    for index in range(n + 2):
        name = names[index % 2]
        start = time.perf_counter()
        session.bind_adapters(binding, name, batch)
        bound.append((time.perf_counter() - start) * 1e6)
    for index in range(n // 5):
        name = names[index % 2]
        start = time.perf_counter()
        session.load(session.folder / session.manifest.adapter(name).file, name)
        session.bind_adapters(binding, name, batch)
        loaded.append((time.perf_counter() - start) * 1e6)
    return Swap(statistics.median(bound[2:]), statistics.median(loaded), n)
