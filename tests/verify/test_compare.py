"""Judging outputs: hand-made cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_export.verify.compare import Outputs, accuracy, compare, mean_kl, top1_agreement
from lora_export.verify.tolerances import Tolerances, tolerances

GATES = Tolerances(
    relative=1e-3, features=1e-2, kl=1e-3, top1=0.99, effect_ratio=10, effect_share=1e-3, reason="made up"
)


def outputs(*values, name: str = "logits", real=None, labels=()) -> Outputs:
    arrays = tuple(np.asarray(value, np.float32) for value in values)
    return Outputs(name, arrays, tuple(real or [None] * len(arrays)), tuple(labels))


def judged(reference, found, without=None, gates=GATES):
    return compare("case", "adapter", "words", reference, found, gates, without=without)


def test_equal_outputs_pass():
    case = judged(outputs([[3.0, 1.0]]), outputs([[3.0, 1.0]]))
    assert case.passed and (case.error, case.kl, case.top1, case.n_rows) == (0, 0, 1, 1)


def test_the_error_is_the_largest_and_relative_to_the_largest_reference():
    case = judged(outputs([[8.0, 1.0], [2.0, 4.0]]), outputs([[8.0, 1.5], [2.25, 4.0]]))
    assert (case.error, case.error_relative) == (0.5, 0.5 / 8)
    small = judged(outputs([[0.25, 0.0]]), outputs([[0.25, 0.125]]))
    assert small.error_relative == 0.125, "outputs below one are judged as if they were one"


def test_an_error_above_the_tolerance_fails_with_its_size():
    reference, found = outputs([[1000.0, 0.0]]), outputs([[1000.0, 2.0]])
    assert judged(reference, found).failures == (
        "the error is 2.00e-03 of the output's size; at most 1e-03 is rounding",
    )
    assert judged(outputs([[1000.0, 0.0]]), outputs([[1000.0, 0.99]])).passed


def test_features_have_a_gate_of_their_own():
    assert judged(outputs([[1.0, 0.0]], name="last_hidden_state"), outputs([[1.0, 0.009]])).passed
    case = judged(outputs([[1.0, 0.0]], name="last_hidden_state"), outputs([[1.0, 0.02]]))
    assert not case.passed and case.kl is None and case.top1 is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail(value):
    case = judged(outputs([[1.0, 0.0], [0.0, 1.0]]), outputs([[1.0, value], [0.0, 1.0]]))
    assert case.failures == ("1 exported values are NaN or infinite",)
    assert case.error == math.inf


def test_shapes_that_differ_fail_instead_of_broadcasting():
    case = judged(outputs([[1.0, 0.0, 2.0]]), outputs([[1.0, 0.0]]))
    assert case.failures == ("shapes differ: [1, 3] in the reference, [1, 2] exported",)
    assert not judged(outputs([[1.0, 1.0], [1.0, 1.0]]), outputs([[1.0, 1.0]])).passed


def test_an_adapter_without_effect_fails_even_where_the_numbers_agree():
    """The case that a plain tolerance passes: the adapter was dropped on both sides, or does nothing."""
    base = outputs([[1.0, 0.0]])
    case = judged(outputs([[1.0, 0.0]]), outputs([[1.0, 1e-5]]), without=base)
    assert not case.passed and case.failures[0].startswith("the adapter has no effect here")
    assert case.effect == 0


@pytest.mark.parametrize(("times", "passes"), [(10.5, True), (9.5, False)])
def test_the_effect_must_be_ten_times_the_error(times, passes):
    error = 2**-12
    reference, found = outputs([[0.0, times * error]]), outputs([[error, times * error]])
    gates = Tolerances(1e-2, 1e-2, None, 0.0, 10, 1e-3, "made up")
    case = judged(reference, found, without=outputs([[0.0, 0.0]]), gates=gates)
    assert case.passed is passes and case.effect_ratio == times


def test_a_scale_that_is_one_percent_off_fails_with_the_share_that_arrived():
    rng = np.random.default_rng(0)
    base, effect = rng.standard_normal((64, 5)), rng.standard_normal((64, 5))
    case = judged(outputs(base + effect), outputs(base + 1.01 * effect), outputs(base), tolerances("float16", "cpu"))
    assert case.failures == ("101.00% of the adapter's effect arrives; 100 % to within 0.10% is expected",)
    assert case.effect_share == pytest.approx(1.01, abs=1e-5) and case.effect_ratio_minimum is None


def test_no_adapter_has_no_effect_to_show():
    case = judged(outputs([[1.0]]), outputs([[1.0]]))
    assert case.effect is None and case.effect_ratio_minimum is None and case.passed


def test_padding_is_not_compared():
    mask = np.array([[True, True, False]])
    reference = outputs([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], real=[mask])
    found = outputs([[[1.0, 2.0], [3.0, 4.0], [-99.0, 99.0]]], real=[mask])
    assert judged(reference, found).error == 0
    wrong = outputs([[[1.0, 2.0], [3.0, 9.0], [5.0, 6.0]]], real=[mask])
    assert judged(reference, wrong).error == 5


def test_pooled_outputs_ignore_the_mask():
    mask = np.array([[True, False], [True, True]])
    assert outputs([[1.0, 2.0], [3.0, 4.0]], real=[mask]).positions().shape == (2, 2)


def test_batches_are_judged_together():
    reference = outputs([[1.0, 0.0]], [[0.0, 1.0], [4.0, 0.0]])
    found = outputs([[1.0, 0.0]], [[0.0, 1.0], [4.0, 1.0]])
    case = judged(reference, found)
    assert (case.n_rows, case.error) == (3, 1.0)


def test_kl_is_the_textbooks():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    shifted = np.stack([np.log(p) + 3, np.log(p)])
    found = np.stack([np.log(q) - 7, np.log(p)])
    assert mean_kl(shifted, found) == pytest.approx(expected / 2, rel=1e-12)
    huge = np.array([[1000.0, 0.0]])
    assert mean_kl(huge, huge) == 0


def test_kl_gates_half_precision():
    gates = Tolerances(None, 1.0, 1e-3, 0.0, 10, 1e-3, "made up")
    case = judged(outputs([[0.0, 0.0]]), outputs([[0.2, 0.0]]), gates=gates)
    assert case.failures[0].startswith("the distributions differ by 4.9") and case.tolerance is None
    assert judged(outputs([[0.0, 0.0]]), outputs([[0.02, 0.0]]), gates=gates).passed


def test_a_flip_counts_only_where_the_reference_was_sure():
    expected = np.array([[1.0, 0.0], [1.0, 0.999]])
    flipped = np.array([[0.0, 1.0], [0.999, 1.0]])
    assert top1_agreement(expected, flipped, margin=0.01) == 0.5
    assert top1_agreement(expected, flipped, margin=0.0) == 0.0
    assert top1_agreement(expected, expected, margin=0.0) == 1.0


def test_top1_gates():
    rows = np.zeros((100, 3))
    rows[:, 0] = 5
    wrong = rows.copy()
    wrong[:2] = [0, 5, 0]
    gates = Tolerances(None, 1.0, None, 0.99, 10, 1e-3, "made up")
    # Without a relative tolerance the noise is taken from the error itself, so the flips must exceed it.
    case = judged(outputs(rows), outputs(wrong), gates=Tolerances(1e-3, 1.0, None, 0.99, 10, 1e-3, "made up"))
    assert case.top1 == pytest.approx(0.98)
    assert any("the best class agrees in 98.00% of positions" in failure for failure in case.failures)
    assert gates.top1 == 0.99


def test_accuracy_counts_labelled_rows():
    found = outputs([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], labels=[(0, 0, None)])
    assert accuracy(found) == 0.5
    assert accuracy(outputs([[1.0, 0.0]], labels=[(None,)])) is None
    assert accuracy(outputs([[1.0, 0.0]])) is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_every_dtype_and_provider_has_gates_that_gate(dtype, provider):
    gates = tolerances(dtype, provider)
    assert gates.relative is not None or gates.kl is not None
    assert 0.9 < gates.top1 <= 1 and 0 < gates.effect_share < 0.01 and gates.reason
    if dtype == "float32":
        assert gates.relative <= 1e-3 and gates.effect_ratio >= 10
