"""Values of the graph against PyTorch's: rows of a batch, real positions, NaN, infinities, sizes, and ties."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_export.check.locate.layers import BatchRow, difference, match
from lora_export.check.reference.module_calls import ModuleCall
from lora_export.graph.module_values import ModuleSite

ALL = BatchRow(0, 1)


def test_the_difference_is_the_largest_and_relative_to_the_largest_value():
    expected = np.float32([[1, -4], [2, 0]])
    assert difference(expected, expected, ALL) == (0, 0)
    assert difference(expected, (expected + np.float32([0, 0.5])).reshape(4), ALL) == (0.5, 0.125)


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ([1.0, 2.0], [1.0, math.nan]),
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.inf]),
        ([1.0, -math.inf], [1.0, math.inf]),
        ([1.0, -math.inf], [1.0, 0.0]),  # a mask that masks nothing
        ([1.0, 0.0], [1.0, -3.4e38]),
    ],
)
def test_numbers_that_are_not_finite_on_one_side_differ(expected, found):
    assert all(map(math.isnan, difference(np.float32(expected), np.float32(found), ALL)))


def test_what_masks_use_for_never_is_the_same():
    expected, found = np.float32([2, -math.inf, math.nan]), np.float32([2.5, -3.4e38, math.nan])
    assert difference(expected, found, ALL) == (0.5, 0.25)


def test_another_size_differs():
    assert difference(np.zeros((2, 4)), np.zeros((2, 0)), ALL) == (math.inf, math.inf)


def test_padded_positions_do_not_count():
    real = np.array([True, True, False])
    expected, found = np.zeros((1, 3, 2)), np.zeros((1, 3, 2))
    found[:, 2] = math.nan
    expected[:, 0] = 1
    assert difference(expected, found, BatchRow(0, 1, real)) == (1, 1)
    scores = np.zeros((1, 4, 3, 3))
    scores[..., 2, :] = scores[..., 2] = 9
    assert difference(np.zeros((1, 4, 3, 3)), scores, BatchRow(0, 1, real))[0] == 0


def test_a_row_is_found_in_its_batch():
    row = BatchRow(1, 3)
    assert row.of_graph(np.arange(6).reshape(3, 2)).tolist() == [[2, 3]]
    assert row.of_graph(np.arange(12).reshape(6, 2)).tolist() == [[4, 5], [6, 7]]  # batch and tokens in one axis
    assert row.of_graph(np.arange(2).reshape(1, 2)).tolist() == [[0, 1]]  # the same for all rows
    assert row.of_graph(np.zeros((3, 4, 0))).shape == (1, 4, 0)


def test_a_step_on_a_cache_is_the_end_of_the_whole():
    row = BatchRow(0, 1, np.ones(5, bool), n_last=2)
    assert row.of_reference(np.arange(10).reshape(1, 5, 2)).tolist() == [[[6, 7], [8, 9]]]
    assert row.of_reference(np.zeros((1, 4, 5, 3))).shape == (1, 4, 2, 3)
    assert row.of_reference(np.zeros((5, 7, 3))).shape == (2, 7, 3)  # a bias by position, without a row axis
    assert row.of_reference(np.zeros((1, 7, 3))).shape == (1, 7, 3)  # as long as the source, not the targets


def call(module: str, output: float, *, is_lookup: bool = False, weight: int = 1, part: str = "output") -> ModuleCall:
    array = np.full((1, 1), output, np.float32)
    return ModuleCall(module, part, "", array, "", array, None, weight, is_lookup)


def site(module: str, output: str, position: int, *, is_lookup: bool = False, parts=None, scale=1.0) -> ModuleSite:
    return ModuleSite(module, module, is_lookup, position, None, output, parts or {}, scale=scale)


def test_uses_are_paired_with_calls_in_order():
    sites = [site("m", "first", 0), site("m", "second", 5), site("m", "third", 7)]
    found = match(sites, [call("m", 1), call("n", 9), call("m", 2)], set())
    assert [(p.value, float(p.expected.item())) for p in found] == [("first", 1), ("second", 2)]


def test_a_tied_weight_belongs_to_whom_it_is_read_as():
    sites = [site("embed", "e", 0, is_lookup=True), site("embed", "logits", 9, scale=0.5)]
    calls = [call("embed", 1, is_lookup=True, weight=7), call("other", 2, weight=8), call("head", 3, weight=7)]
    assert [(p.call.module, float(p.expected.item())) for p in match(sites, calls, set())] == [
        ("embed", 1),
        ("head", 1.5),
    ]


def test_parts_are_compared_only_where_pytorch_has_them():
    sites = [site("m", "y", 3, parts={"base": "wx", "lora_A": "xa", "lora_B": "xab"})]
    whole, base = call("m", 6), call("m", 1, part="base")
    assert [p.what for p in match(sites, [base, whole], set())] == ["output"]
    pairs = [call("m", 2, part="lora_A"), call("m", 3, part="lora_B")]
    assert [p.what for p in match(sites, [base, *pairs, whole], set())] == ["base", "lora_A", "lora_B", "output"]


# Few numbers, which may be near zero by chance.


@pytest.mark.parametrize(("terms", "scale"), [(None, 1.0), (0.25, 0.25), (40.0, 40.0)])
def test_the_error_of_one_number_is_measured_against_what_went_into_it(terms, scale):
    """A cosine of 5e-4 that is off by 7.5e-8 is off by a rounding of its terms, not by 1.5e-4 of itself."""
    error, relative = difference(np.array([[5e-4]]), np.array([[5e-4 + 7.5e-8]]), ALL, terms=terms)
    assert (error, relative) == pytest.approx((7.5e-8, 7.5e-8 / scale), rel=1e-6)


def test_the_error_of_many_numbers_is_measured_against_the_largest():
    expected = np.linspace(1e-4, 5e-4, 8)
    assert difference(expected, expected + 1e-6, ALL, terms=40.0)[1] == pytest.approx(2e-3, rel=1e-6)


def test_one_number_many_times_is_one_number():
    expected = np.full(8, 5e-4)
    assert difference(expected, expected + 1e-6, ALL, terms=40.0)[1] == pytest.approx(1e-6 / 40, rel=1e-6)
    assert difference(np.zeros(8), np.zeros(8) + 1e-6, ALL, terms=40.0)[1] > 1, "what ought to be nothing is exact"


def test_padding_does_not_make_few_numbers_many():
    real = np.zeros(16, bool)
    real[:2] = True
    expected = np.full((1, 16, 1), 5e-4)
    assert difference(expected, expected + 1e-6, BatchRow(0, 1, real))[1] == pytest.approx(1e-6, rel=1e-6)
