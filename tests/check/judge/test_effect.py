"""The share of an adapter's effect: exact on hand-made numbers, right on noisy ones."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.check.judge.effect import effect_share

ROUNDING = 2**-10


def made(noise: float, scale: float = 1.0, n: int = 400, seed: int = 0):
    """Reference, export and reference without the adapter, `[n, 8]`: an effect of size 1 that the export has `scale` of."""
    rng = np.random.default_rng(seed)
    without, effect = rng.standard_normal((n, 8)) * 5, rng.standard_normal((n, 8))
    found = without + scale * effect + noise * rng.standard_normal((n, 8))
    return without + effect, found, without


def test_equal_outputs_have_all_of_it_and_may_be_off_by_the_rounding_alone():
    share = effect_share(*made(noise=0), rounding=ROUNDING)
    assert share.value == pytest.approx(1, abs=1e-12)
    assert share.tolerance == pytest.approx(ROUNDING, abs=1e-12)


def test_it_is_the_slope_of_a_fit_by_least_squares():
    expected, found, without = made(noise=0.3, scale=0.7)
    effect, arrived = (expected - without).ravel(), (found - without).ravel()
    slope = np.linalg.lstsq(effect[:, None], arrived, rcond=None)[0][0]
    assert effect_share(expected, found, without, rounding=0.0).value == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.5, 0.99, 1.01, 2.0])
def test_a_wrong_scale_is_seen_through_errors_larger_than_it(scale):
    share = effect_share(*made(noise=0.03, scale=scale), rounding=ROUNDING)
    assert share.value == pytest.approx(scale, abs=2e-3)
    assert abs(share.value - 1) > share.tolerance


def test_noise_alone_stays_within_the_tolerance():
    for noise in (1e-3, 1e-2, 0.1, 0.5):
        for seed in range(50):
            share = effect_share(*made(noise, seed=seed), rounding=ROUNDING)
            assert abs(share.value - 1) <= share.tolerance, (noise, seed)


def test_noise_that_the_effect_and_the_export_share_is_allowed_for():
    """The reference's own rounding without the adapter is in both differences, and moves the slope by its square."""
    for seed in range(20):
        expected, found, without = made(noise=0.2, seed=seed)
        rounded = without + 0.2 * np.random.default_rng(seed + 99).standard_normal(without.shape)
        share = effect_share(expected, found, rounded, rounding=ROUNDING)
        assert abs(share.value - 1) <= share.tolerance


def test_an_effect_in_another_direction_is_no_effect():
    expected, _, without = made(noise=0)
    share = effect_share(expected, without + np.roll(expected - without, 1, axis=0), without, rounding=ROUNDING)
    assert abs(share.value - 1) > share.tolerance <= 0.51


def test_without_an_effect_nothing_arrives():
    expected, found, _ = made(noise=0)
    share = effect_share(expected, found, expected, rounding=ROUNDING)
    assert (share.value, share.tolerance) == (0, 0.5)


def test_only_the_first_positions_are_looked_at_where_the_reference_without_has_no_more():
    expected, found, without = made(noise=0)
    found[100:] += 7
    assert effect_share(expected, found, without[:100], rounding=ROUNDING).value == pytest.approx(1, abs=1e-12)


def test_what_a_damage_bends_is_not_taken_for_rounding_where_that_is_known():
    expected, found, without = made(noise=0.001, scale=1.01, n=16)
    bent = found + 0.03 * (expected - without) ** 2
    share = effect_share(expected, bent, without, rounding=ROUNDING)
    known = effect_share(expected, bent, without, rounding=ROUNDING, noise=0.002)
    assert share.value == known.value and known.tolerance < 0.005 < share.tolerance
    assert effect_share(expected, found, without, rounding=ROUNDING, noise=9.0) == effect_share(
        expected, found, without, rounding=ROUNDING
    )


def test_one_number_tells_nothing_of_its_own_rounding():
    """A slope goes through one point exactly, so what is left says nothing; the known rounding does."""
    expected, found, without = np.array([[5e-4]]), np.array([[5e-4 + 1e-7]]), np.zeros((1, 1))
    share = effect_share(expected, found, without, rounding=1e-4, noise=1e-7)
    assert share.value == pytest.approx(1 + 2e-4) and abs(share.value - 1) < share.tolerance < 1e-3
    assert effect_share(expected, found, without, rounding=1e-4).tolerance == pytest.approx(0.5, abs=1e-3)
    dropped = effect_share(expected, without, without, rounding=1e-4)
    assert abs(dropped.value - 1) > dropped.tolerance
