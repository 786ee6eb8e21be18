"""Paired latencies: the interval against brute force, the ratio under drift, the verdicts."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_export.bench.intervals import median_interval, paired_ratio, verdict
from lora_export.bench.results import Variant
from lora_export.verdict import Verdict


def coverage(n: int, k: int) -> float:
    """How often the k-th smallest and k-th largest of n enclose the median: every pattern of above and below."""
    hits = sum(k <= sum(pattern) <= n - k for pattern in itertools.product((0, 1), repeat=n))
    return hits / 2**n


@pytest.mark.parametrize("n", range(6, 15))
def test_the_interval_is_the_narrowest_that_covers(n):
    values = list(range(100, 100 + n))
    low, high, covered = median_interval(values)
    k = values.index(low) + 1
    assert high == values[n - k]
    assert covered == pytest.approx(coverage(n, k)) and covered >= 0.95
    assert n - k <= k + 1 or coverage(n, k + 1) < 0.95, "a narrower interval covers, too"


def test_thirty_blocks_give_the_10th_and_21st():
    values = [float(i) for i in range(1, 31)]
    random.Random(1).shuffle(values)
    low, high, covered = median_interval(values)
    assert (low, high) == (10, 21)
    assert covered == pytest.approx(0.957, abs=5e-4)


@pytest.mark.parametrize("n", range(1, 6))
def test_too_few_values_give_the_extremes_and_say_what_they_cover(n):
    low, high, covered = median_interval(list(range(n)))
    assert (low, high) == (0, n - 1)
    assert covered == pytest.approx(1 - 2 / 2**n) and covered < 0.95


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=60))
def test_the_interval_holds_the_median(values):
    low, high, _ = median_interval(values)
    assert low <= statistics.median(values) <= high


@pytest.mark.parametrize(
    ("low", "high", "allowance", "expected"),
    [
        (1.2, 1.3, 1.1, Verdict.FAIL),
        (1.0, 1.1, 1.1, Verdict.PASS),
        (1.05, 1.2, 1.1, Verdict.AMBIGUOUS),
        (1.1, 1.2, 1.1, Verdict.AMBIGUOUS),
        (9.0, 9.9, None, Verdict.NOT_GATED),
    ],
)
def test_verdicts(low, high, allowance, expected):
    assert verdict(low, high, allowance) is expected


def variant(name: str, samples: list[float]) -> Variant:
    return Variant(name, name, (math.nan,) * len(samples), tuple(samples), statistics.median(samples), 0.0)


def blocks(true_ratio: float, n: int, seed: int, drift: float = 0.0, noise: float = 0.0, spikes: float = 0.0):
    """n blocks base, other, other, base on a machine whose speed drifts linearly, with noise and spikes."""
    rng = random.Random(seed)
    base, other = [], []
    for index in range(4 * n):
        speed = 1 + drift * index / (4 * n) + rng.gauss(0, noise) + (rng.random() < spikes) * rng.random()
        (base if index % 4 in (0, 3) else other).append(10 * speed * (1 if index % 4 in (0, 3) else true_ratio))
    return variant("base", base), variant("other", other)


def test_linear_drift_cancels():
    """The machine becomes half as fast during the measurement; the ratio is exact all the same."""
    base, other = blocks(1.07, 30, seed=0, drift=1.0)
    found = paired_ratio(other, base, None)
    assert found.median == pytest.approx(1.07, abs=1e-3)
    assert found.low == pytest.approx(1.07, abs=1e-3) and found.high == pytest.approx(1.07, abs=1e-3)


def test_a_ratio_carries_its_blocks_and_names():
    base = variant("base", [1.0, 3.0, 2.0, 2.0])
    other = variant("other", [2.0, 4.0, 3.0, 5.0])
    found = paired_ratio(other, base, 3.0)
    assert (found.variant, found.against, found.allowance) == ("other", "base", 3.0)
    assert found.block_ratios == (6 / 4, 8 / 4) and found.median == 1.75


@pytest.mark.parametrize("allowance", [0.5, 3.0])
def test_too_few_blocks_decide_nothing(allowance):
    """Five, of a bench that was stopped, have no interval of 95 %: neither wholly above nor wholly below says enough."""
    base, other = blocks(1.5, 5, seed=1)
    assert paired_ratio(other, base, allowance).verdict is Verdict.AMBIGUOUS
    assert paired_ratio(other, base, None).verdict is Verdict.NOT_GATED
    base, other = blocks(1.5, 6, seed=1)
    assert paired_ratio(other, base, allowance).verdict is (Verdict.FAIL if allowance < 1 else Verdict.PASS)


def test_false_alarms_are_rare_and_real_slowdowns_are_found():
    """5 % drift, 1.5 % noise, 5 % spikes, 30 blocks, an allowance of 2 %."""
    trials = 300

    def failing(true_ratio: float) -> float:
        found = 0
        for seed in range(trials):
            base, other = blocks(true_ratio, 30, seed, drift=0.05, noise=0.015, spikes=0.05)
            found += paired_ratio(other, base, 1.02).verdict is Verdict.FAIL
        return found / trials

    assert failing(1.0) <= 0.01
    assert failing(1.05) >= 0.9
    assert failing(1.10) >= 0.99


def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    hits, trials = 0, 300
    for seed in range(trials):
        base, other = blocks(1.03, 30, seed, noise=0.02)
        found = paired_ratio(other, base, None)
        hits += found.low <= 1.03 <= found.high
    assert (
        abs(hits / trials - found.confidence) < 3 * math.sqrt(found.confidence * (1 - found.confidence) / trials) + 0.01
    )
