"""Threads in an order that a test chooses, and threads that switch as often as they can."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lora_export.runtime.adapter_session import AdapterSession

WAIT_S = 20


class Pause:
    """A function that waits at its `nth` call, before it begins or after it is done, until `resume` is set."""

    def __init__(self, function: Callable, *, after: bool, nth: int = 1) -> None:
        self.function, self.after, self.nth = function, after, nth
        self.reached, self.resume = threading.Event(), threading.Event()
        self.n_calls = 0

    def __call__(self, *args, **named):
        self.n_calls += 1
        waits = self.n_calls == self.nth
        if waits and not self.after:
            self.wait()
        result = self.function(*args, **named)
        if waits and self.after:
            self.wait()
        return result

    def wait(self) -> None:
        self.reached.set()
        assert self.resume.wait(WAIT_S), "the other thread did not come to its end"


def during(pause: Pause, call: Callable, meanwhile: Callable[[], None]):
    """What `call` returns on a thread of its own if `meanwhile` happens while it waits at `pause`."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        try:
            assert pause.reached.wait(WAIT_S), "the call never came to its pause"
            meanwhile()
        finally:
            pause.resume.set()
        return future.result(WAIT_S)


class Runner:
    """An ONNX Runtime session whose `run_with_iobinding` is another function."""

    def __init__(self, session, run: Callable) -> None:
        self.get_inputs, self.get_outputs, self.io_binding = session.get_inputs, session.get_outputs, session.io_binding
        self.run_with_iobinding = run


def calling_at(session: AdapterSession, nth: int, act: Callable[[], None]) -> None:
    """Make `session` call `act` after its `nth` run."""
    run, n_runs = session.session.run_with_iobinding, iter(range(1, 1000))

    def counted(binding) -> None:
        run(binding)
        if next(n_runs) == nth:
            act()

    session.runs = session.runs.on(Runner(session.session, counted))


def under_load(run: Callable, changes: Sequence[Callable[[], object]], n_runs: int = 20, n_rounds: int = 20) -> list:
    """The results of `run` on three threads, while a fourth makes one of `changes` after another.

    Each thread runs `n_runs` times or more, until all changes were made `n_rounds` times.
    """
    running, changed = threading.Event(), threading.Event()

    def change() -> None:
        n_done = 0
        try:
            while n_done < n_rounds or running.is_set():
                for act in changes:
                    act()
                n_done += 1
                if n_done == n_rounds:
                    changed.set()
        finally:
            changed.set()

    def run_on() -> list:
        results = []
        while len(results) < n_runs or not changed.is_set():
            results.append(run())
        return results

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    running.set()
    try:
        with ThreadPoolExecutor(4) as pool:
            changing = pool.submit(change)
            runs = [pool.submit(run_on) for _ in range(3)]
            try:
                results = [result for each in runs for result in each.result(WAIT_S)]
            finally:
                running.clear()
            changing.result(WAIT_S)
    finally:
        sys.setswitchinterval(before)
    return results


def versions_of(found: np.ndarray, versions: Sequence[np.ndarray]) -> list[int]:
    """Which of `versions` `found` is."""
    same = [found.shape == each.shape and np.allclose(found, each, atol=1e-5) for each in versions]
    return [index for index, equal in enumerate(same) if equal]
