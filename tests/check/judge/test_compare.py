"""Judging outputs: hand-made cases with known answers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lora_export.check.judge import measures
from lora_export.check.judge.compare import Comparison, Outputs, accuracy, compare
from lora_export.check.judge.measures import mean_kl, scatter_of_ratio, top1_agreement
from lora_export.check.judge.tolerances import MEASURES, Tolerances, holds, tolerances, used
from lora_export.errors import UsageProblem

LIMITS = Tolerances(
    error=1e-3, features=1e-2, rounding=2, kl=1e-3, top1=0.99, perplexity=1e-2, effect=10, effect_share=1e-3
)


def limits_of(**limits: float | None) -> Tolerances:
    """Only these limit."""
    return Tolerances(**(dict.fromkeys(MEASURES) | limits))


def outputs(*values, name: str = "logits", real=None, labels=()) -> Outputs:
    arrays = tuple(np.asarray(value, np.float32) for value in values)
    return Outputs(name, arrays, tuple(real or [None] * len(arrays)), tuple(labels))


def judged(reference, found, without=None, limits=LIMITS):
    return compare(Comparison("case", "adapter", "words", reference, found, without), limits)


def test_equal_outputs_pass():
    case = judged(outputs([[3.0, 1.0]]), outputs([[3.0, 1.0]]))
    assert case.passed and (case.largest_error, case.value("kl"), case.value("top1"), case.n_rows) == (0, 0, 1, 1)


def test_the_error_is_the_largest_and_relative_to_the_largest_reference():
    case = judged(outputs([[8.0, 1.0], [2.0, 4.0]]), outputs([[8.0, 1.5], [2.25, 4.0]]))
    assert (case.largest_error, case.value("error")) == (0.5, 0.5 / 8)
    small = judged(outputs([[0.25, 0.0]]), outputs([[0.25, 0.125]]))
    assert small.value("error") == 0.125, "outputs below one are judged as if they were one"


def test_an_error_above_the_tolerance_fails_with_its_size():
    reference, found = outputs([[1000.0, 0.0]]), outputs([[1000.0, 2.0]])
    assert judged(reference, found).failures == (
        "the error is 2.00e-03 of the output's size; at most 1e-03 is rounding",
    )
    assert judged(outputs([[1000.0, 0.0]]), outputs([[1000.0, 0.99]])).passed


def test_features_have_a_gate_of_their_own():
    assert judged(outputs([[1.0, 0.0]], name="last_hidden_state"), outputs([[1.0, 0.009]])).passed
    case = judged(outputs([[1.0, 0.0]], name="last_hidden_state"), outputs([[1.0, 0.02]]))
    assert not case.passed and case.measured("kl", "top1") is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail(value):
    case = judged(outputs([[1.0, 0.0], [0.0, 1.0]]), outputs([[1.0, value], [0.0, 1.0]]))
    assert case.failures == ("1 exported values are NaN or infinite",)
    assert case.largest_error == math.inf


def test_shapes_that_differ_fail_instead_of_broadcasting():
    case = judged(outputs([[1.0, 0.0, 2.0]]), outputs([[1.0, 0.0]]))
    assert case.failures == ("shapes differ: [1, 3] in the reference, [1, 2] exported",)
    assert not judged(outputs([[1.0, 1.0], [1.0, 1.0]]), outputs([[1.0, 1.0]])).passed


def test_an_adapter_without_effect_fails_even_where_the_numbers_agree():
    """The case that a plain tolerance passes: the adapter was dropped on both sides, or does nothing."""
    base = outputs([[1.0, 0.0]])
    case = judged(outputs([[1.0, 0.0]]), outputs([[1.0, 1e-5]]), without=base)
    assert not case.passed and case.failures[0].startswith("the adapter has no effect here")
    assert case.largest_effect == case.value("effect") == 0


@pytest.mark.parametrize(("times", "passes"), [(10.5, True), (9.5, False)])
def test_the_effect_must_be_ten_times_the_error(times, passes):
    error = 2**-12
    reference, found = outputs([[0.0, times * error]]), outputs([[error, times * error]])
    limits = limits_of(error=1e-2, effect=10)
    case = judged(reference, found, without=outputs([[0.0, 0.0]]), limits=limits)
    assert case.passed is passes and case.value("effect") == times


def test_a_scale_that_is_one_percent_off_fails_with_the_share_that_arrived():
    rng = np.random.default_rng(0)
    base, effect = rng.standard_normal((64, 5)), rng.standard_normal((64, 5))
    reference, found, without = outputs(base + effect), outputs(base + 1.01 * effect), outputs(base)
    case = judged(reference, found, without, limits_of(effect_share=1e-3))
    assert case.failures == ("101.00% of the adapter's effect arrives; 100 % to within 0.10% is expected",)
    assert case.value("effect_share") == pytest.approx(1.01, abs=1e-5) and case.measured("effect").limit is None


def test_no_adapter_has_no_effect_to_show():
    case = judged(outputs([[1.0]]), outputs([[1.0]]))
    assert case.largest_effect is None and case.measured("effect", "effect_share") is None and case.passed


def test_padding_is_not_compared():
    mask = np.array([[True, True, False]])
    reference = outputs([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], real=[mask])
    found = outputs([[[1.0, 2.0], [3.0, 4.0], [-99.0, 99.0]]], real=[mask])
    assert judged(reference, found).largest_error == 0
    wrong = outputs([[[1.0, 2.0], [3.0, 9.0], [5.0, 6.0]]], real=[mask])
    assert judged(reference, wrong).largest_error == 5


def test_pooled_outputs_ignore_the_mask():
    mask = np.array([[True, False], [True, True]])
    assert outputs([[1.0, 2.0], [3.0, 4.0]], real=[mask]).positions().shape == (2, 2)


def test_batches_are_judged_together():
    reference = outputs([[1.0, 0.0]], [[0.0, 1.0], [4.0, 0.0]])
    found = outputs([[1.0, 0.0]], [[0.0, 1.0], [4.0, 1.0]])
    case = judged(reference, found)
    assert (case.n_rows, case.largest_error) == (3, 1.0)


def test_kl_is_the_textbooks():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    shifted = np.stack([np.log(p) + 3, np.log(p)])
    found = np.stack([np.log(q) - 7, np.log(p)])
    assert mean_kl(shifted, found) == pytest.approx(expected / 2, rel=1e-12)
    huge = np.array([[1000.0, 0.0]])
    assert mean_kl(huge, huge) == 0


def test_kl_gates_half_precision():
    limits = limits_of(kl=1e-3)
    case = judged(outputs([[0.0, 0.0]]), outputs([[0.2, 0.0]]), limits=limits)
    assert case.failures[0].startswith("the distributions differ by 4.9") and case.measured("error").limit is None
    assert judged(outputs([[0.0, 0.0]]), outputs([[0.02, 0.0]]), limits=limits).passed


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
    case = judged(outputs(rows), outputs(wrong), limits=limits_of(error=1e-3, top1=0.99))
    assert case.value("top1") == pytest.approx(0.98)
    assert any("the best class agrees in 98.00% of positions" in failure for failure in case.failures)


def test_top1_is_not_measured_by_the_error_that_was_seen():
    """By that, a flip is never beyond the noise."""
    flipped = judged(outputs([[5.0, 0.0]]), outputs([[0.0, 5.0]]), limits=limits_of(top1=0.99))
    assert flipped.measured("top1") is None
    reference = replace(outputs([[5.0, 0.0]]), precise=(np.array([[5.001, 0.0]]),))
    known = judged(reference, outputs([[0.0, 5.0]]), limits=limits_of(top1=0.99, rounding=2))
    assert known.value("top1") == 0 and not known.passed
    tie = replace(outputs([[5.0, 4.999]]), precise=(np.array([[5.001, 4.999]]),))
    assert judged(tie, outputs([[4.999, 5.0]]), limits=limits_of(top1=0.99, rounding=2)).value("top1") == 1


def test_a_limit_given_for_rounding_moves_no_noise():
    reference = replace(outputs([[5.0, 4.9]]), precise=(np.array([[5.001, 4.9]]),))
    limits = replace(limits_of(top1=0.99, rounding=1000), noise=2)
    assert judged(reference, outputs([[4.9, 5.0]]), limits=limits).value("top1") == 0


def rounded(n: int, *, by: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, by, (n, 4))


@pytest.mark.parametrize(("times", "passes"), [(1.0, True), (1.9, True), (2.2, False)])
def test_the_error_may_be_twice_pytorchs_own_against_a_wider_dtype(times, passes):
    precise = np.random.default_rng(1).normal(size=(1200, 4))
    reference = replace(outputs(precise + rounded(1200, by=1e-3)), precise=(precise,))
    found = outputs(precise + rounded(1200, by=1e-3 * times, seed=2))
    case = judged(reference, found, limits=limits_of(rounding=2))
    assert case.passed is passes and case.value("rounding") == pytest.approx(times, rel=0.1)
    expected = float(np.sqrt(((found.values[0].astype(np.float64) - precise) ** 2).mean()))
    assert case.rounding.rms_exported == pytest.approx(expected)
    assert case.rounding.kl_exported == pytest.approx(mean_kl(precise, found.values[0].astype(np.float64)))
    if not passes:
        assert "× what PyTorch itself loses by rounding at this dtype; at most 2 ×" in case.failures[0]


def test_few_positions_leave_more_to_chance():
    """By a simulation: what the same rounding on both sides exceeds once in ten thousand."""
    rng = np.random.default_rng(0)
    for n in (16, 100, 1000):
        ratios = np.sqrt(rng.chisquare(n, 400_000) / rng.chisquare(n, 400_000))
        assert np.quantile(ratios, 0.9999) == pytest.approx(scatter_of_ratio(n), rel=0.08), n


def test_pytorchs_luck_does_not_count_as_no_rounding():
    """Where the reference hits the wider dtype exactly, rounding the output alone is still allowed."""
    precise = np.full((2000, 4), 1.0)
    reference = replace(outputs(precise), precise=(precise,))
    limits = replace(limits_of(rounding=2), epsilon=2.0**-10)
    assert judged(reference, outputs(precise + 2.0**-12), limits=limits).passed
    assert not judged(reference, outputs(precise + 2.0**-10), limits=limits).passed


def test_the_wider_dtype_may_cover_the_first_batches_only():
    first, second = np.ones((2, 3)), np.full((2, 3), 7.0)
    reference = replace(outputs(first, second), precise=(first + 0.5,))
    case = judged(reference, outputs(first + 1, second), limits=limits_of(rounding=2))
    assert (case.rounding.error_reference, case.rounding.error_exported, case.value("rounding")) == (0.5, 0.5, 1)


def test_perplexity_is_the_textbooks_over_real_targets():
    logits = np.log(np.array([[[0.5, 0.5, 1e-9], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]]))
    targets = np.array([[0, 2, -1]])
    mask = np.ones((1, 3), bool)
    reference = replace(outputs(logits, real=[mask]), targets=(targets,))
    case = judged(reference, outputs(logits - 3, real=[mask]), limits=limits_of(perplexity=1e-5))
    assert case.perplexity.reference == pytest.approx((0.5 * 0.8) ** -0.5, rel=1e-6) and case.passed
    wrong = judged(reference, outputs(logits[:, ::-1].copy(), real=[mask]), limits=limits_of(perplexity=1e-2))
    assert not wrong.passed and "the perplexity is" in wrong.failures[0]


def test_no_target_is_no_perplexity():
    mask = np.ones((1, 1), bool)
    reference = replace(outputs([[[1.0, 2.0]]], real=[mask]), targets=(np.array([[-1]]),))
    assert judged(reference, outputs([[[1.0, 2.0]]], real=[mask])).perplexity is None


def test_a_reference_that_is_no_number_fails():
    case = judged(outputs([[np.nan, 1.0]]), outputs([[1.0, 1.0]]))
    assert not case.passed and "the error is nan" in case.failures[0]


def test_accuracy_counts_labelled_rows():
    found = outputs([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], labels=[(0, 0, None)])
    assert accuracy(found) == 0.5
    assert accuracy(outputs([[1.0, 0.0]], labels=[(None,)])) is None
    assert accuracy(outputs([[1.0, 0.0]])) is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_every_dtype_and_provider_has_gates_that_gate(dtype, provider):
    limits = tolerances(dtype, provider, quantized=True)
    assert limits.weights < 0.02 and limits.scales < 0.02
    assert limits.error is not None or limits.kl is not None
    assert 0.9 < limits.top1 <= 1 and 0 < limits.effect_share < 0.01 and 1 < limits.rounding <= 4
    assert {limit.measure: limit.limit for limit in limits.recorded} == {
        name: getattr(limits, name) for name in MEASURES
    }
    assert all(limit.reason and not limit.overridden for limit in limits.recorded)
    if dtype == "float32":
        assert limits.error <= 1e-3 and limits.effect >= 10


def test_a_limit_can_be_given_and_is_recorded_as_such():
    limits = tolerances("float16", "cpu", {"top1": 0.97})
    given = next(limit for limit in limits.recorded if limit.measure == "top1")
    assert limits.top1 == 0.97 and given.overridden and given.reason.startswith("given; the table says 0.99")


@pytest.mark.parametrize(("measure", "value", "limit", "share"), [
    ("error", 3.1e-5, 1e-4, 0.31), ("kl", 2e-3, 1e-3, 2), ("kl", 0, 0, 0), ("kl", 1e-9, 0, math.inf),
    ("top1", 0.9996, 0.999, 0.4), ("top1", 0.998, 0.999, 2), ("top1", 1, 1, 0), ("top1", 0.9, 1, math.inf),
    ("effect", 40, 10, 0.25), ("effect", 5, 10, 2), ("effect", math.inf, 10, 0), ("effect", 0, 10, math.inf),
    ("effect_share", 1.00005, 1e-4, 0.5), ("effect_share", 0.9998, 1e-4, 2), ("error", math.nan, 1e-4, math.inf),
])  # fmt: skip
def test_how_much_of_its_limit_a_measure_takes(measure, value, limit, share):
    assert used(measure, value, limit) == pytest.approx(share)
    assert holds(measure, value, limit) is (share <= 1)


def test_the_nearest_measure_is_the_one_that_takes_the_most_of_its_limit():
    reference = replace(outputs([[5.0, 0.0]]), precise=(np.array([[5.001, 0.0]]),))
    case = judged(reference, outputs([[5.0002, 0.0]]), limits=limits_of(error=1e-3, kl=1, top1=0.99))
    assert case.nearest.name == "error" and case.nearest.used == pytest.approx(0.04, rel=1e-2)
    assert judged(reference, outputs([[5.0, 0.0]]), limits=limits_of()).nearest is None


def test_flattened_rows_are_counted_as_they_were():
    flat = outputs([[1.0, 2.0, 3.0, 4.0]], name="rows")
    assert compare(Comparison("mixed", "rows", "words", flat, flat, n_rows=2), LIMITS).n_rows == 2


def test_a_limit_for_no_measure_is_refused():
    with pytest.raises(UsageProblem, match="for a measure that there is not") as refused:
        tolerances("float32", "cpu", {"top-1": 0.9})
    assert refused.value.found == "top-1" and "top1" in refused.value.expected


def near_zero(value: float, error: float, n_rows: int = 1):
    """One logit a row, near zero by chance, off by `error`; PyTorch itself happens to be exact."""
    expected = outputs(np.full((n_rows, 1), value))
    precise = (np.full((n_rows, 1), value, np.float64),)
    return replace(expected, precise=precise), outputs(np.full((n_rows, 1), value + error))


def test_one_logit_near_zero_is_judged_by_the_size_of_logits():
    limits = tolerances("float32", "cpu")
    reference, found = near_zero(5e-4, 2e-7)
    case = judged(reference, found, without=outputs([[0.4]]), limits=limits)
    assert case.passed, case.failures
    # A tenth of a logit is no rounding, however few there are.
    assert not judged(*near_zero(5e-4, 0.1), without=outputs([[0.4]]), limits=limits).passed


def test_measures_do_not_depend_on_how_many_positions_are_widened_at_once(monkeypatch):
    numbers = np.random.default_rng(4)
    precise = numbers.normal(size=(11, 9))
    pytorch, exported = ((precise + numbers.normal(size=(11, 9)) * 1e-3).astype(np.float32) for _ in range(2))
    without, targets = (precise - 0.1).astype(np.float32)[:7], np.array([[1, 8, -1, 3, 4, 5, 6, 7, 0, 1, 2]])
    expected = Outputs(
        "logits", (pytorch[None],), (np.ones((1, 11)) == 1,), targets=(targets,), precise=(precise[None],)
    )
    found, other = (
        replace(expected, values=(exported[None],)),
        Outputs("logits", (without[None],), (np.ones((1, 7)) == 1,)),
    )
    comparison = Comparison("a", "adapter", "PEFT", expected, found, other)
    whole = compare(comparison, tolerances("float16", "cpu"))
    assert {each.name for each in whole.measures} >= {"error", "rounding", "kl", "top1", "perplexity", "effect_share"}
    monkeypatch.setattr(measures, "_BLOCK", 20)
    in_parts = compare(comparison, tolerances("float16", "cpu"))
    for one, part in zip(whole.measures, in_parts.measures, strict=True):
        assert (part.name, part.value) == (one.name, pytest.approx(one.value, rel=1e-12))
