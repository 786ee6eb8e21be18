"""Warm-up until a run's time has settled: first runs allocate, fill caches, wake the clock, for how long nobody knows.

Runs are taken in windows. It is over when the fastest runs of three windows in a row lie within 3 % of each other, or
when two seconds have passed: the report says so, since latencies that still change are no steady state.

A window is judged by its fastest run, not by its median: other processes only ever add time, and on a shared core the
medians of windows of a settled run lie 10 to 40 % apart, its fastest runs 2 to 3 %. What warms up slows every run of a
window, the fastest too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from lora_export.bench.results import WarmUp

WINDOW_SECONDS, WINDOW_RUNS = 0.05, 3  # a window is this long and holds this many runs, whichever takes longer
AGREEING_WINDOWS, SHARE = 3, 0.03
MOST_SECONDS = 2.0

RULE = (
    f"until the fastest runs of {AGREEING_WINDOWS} windows in a row agree within {SHARE:.0%}, at most "
    f"{MOST_SECONDS:g} s; a window is {WINDOW_SECONDS * 1e3:g} ms and at least {WINDOW_RUNS} runs"
)


def warm_up(run: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> tuple[WarmUp, float]:
    """Run until the time of a run has settled; how it went, and the seconds of the fastest run.

    Slow runs get the windows that can agree, however long these take.
    """
    start, n_runs, fastest = clock(), 0, []
    while True:
        n, seconds = _window(run, clock)
        n_runs += n
        fastest.append(seconds)
        spent, latest = clock() - start, fastest[-AGREEING_WINDOWS:]
        settled = len(latest) == AGREEING_WINDOWS and max(latest) <= (1 + SHARE) * min(latest)
        if settled or (spent >= MOST_SECONDS and len(latest) == AGREEING_WINDOWS):
            return WarmUp(n_runs, spent, settled), min(fastest)


def _window(run: Callable[[], None], clock: Callable[[], float]) -> tuple[int, float]:
    """How many runs one window holds, and the seconds of its fastest."""
    n, fastest = 0, math.inf
    begin = before = clock()
    while before - begin < WINDOW_SECONDS or n < WINDOW_RUNS:
        run()
        after = clock()
        n, fastest, before = n + 1, min(fastest, after - before), after
    return n, fastest
