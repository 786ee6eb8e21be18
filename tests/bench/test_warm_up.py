"""Warm-up on a clock that the runs themselves move: it ends when their time has settled, or says that it has not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import pytest

from lora_export.bench.warm_up import MOST_SECONDS, SHARE, WINDOW_SECONDS, warm_up


class Machine:
    """Runs that take the given seconds, one after the other; the last of them for ever."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now, self._seconds = 0.0, seconds

    def run(self) -> None:
        self.now += next(self._seconds)

    def warm_up(self):
        return warm_up(self.run, lambda: self.now)


def test_steady_runs_need_three_windows():
    warm, fastest = Machine(repeat(0.01)).warm_up()
    assert warm.settled and fastest == pytest.approx(0.01)
    assert warm.n_runs in (15, 16, 17, 18) and warm.seconds == pytest.approx(3 * WINDOW_SECONDS, abs=0.031)


def test_it_goes_on_while_runs_become_faster():
    """Each of 60 runs is 2 % faster than the one before: 10 % a window, and more than 3 % until the last of them."""
    falling = [0.01 * 0.98**n for n in range(60)]
    warm, fastest = Machine(chain(falling, repeat(falling[-1]))).warm_up()
    assert warm.settled and fastest == pytest.approx(falling[-1])
    assert warm.n_runs > 60


def test_a_busy_neighbour_does_not_keep_it_going():
    """Every second run takes twice as long, in turns of no period: the fastest runs of the windows agree all the same."""
    noise = (0.002 if n * n % 7 < 3 else 0.001 for n in range(10**6))
    warm, _ = Machine(noise).warm_up()
    assert warm.settled and warm.seconds < 4 * WINDOW_SECONDS


def test_what_does_not_settle_is_cut_and_says_so():
    growing = (0.001 * 1.001**n for n in range(10**6))
    warm, _ = Machine(growing).warm_up()
    assert not warm.settled
    assert MOST_SECONDS <= warm.seconds < MOST_SECONDS + 2 * WINDOW_SECONDS


def test_slow_runs_get_the_windows_that_can_agree():
    warm, _ = Machine(repeat(5.0)).warm_up()
    assert warm.settled and warm.n_runs == 9


@pytest.mark.parametrize(("step", "settled"), [(SHARE * 0.9, True), (SHARE * 1.2, False)])
def test_the_share_is_that_of_the_windows(step, settled):
    """Slow runs alternate window by window, three runs each."""
    seconds = (1.0 + step * (n // 3 % 2) for n in range(10**6))
    run: Callable = Machine(seconds).warm_up
    assert run()[0].settled is settled
