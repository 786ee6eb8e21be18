"""Numbers and names as text."""

from __future__ import annotations

import math

import pytest

from lora_export.report import format as fmt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fmt.scientific(1.5e-06), "1.5e-06"),
        (fmt.scientific(0.0), "0"),
        (fmt.scientific(None), "–"),
        (fmt.scientific(math.nan), "NaN"),
        (fmt.scientific(-math.inf), "-∞"),
        (fmt.multiple(100.0), "100×"),
        (fmt.multiple(8.1e05), "8.1e+05×"),
        (fmt.multiple(math.inf), "∞×"),
        (fmt.multiple(math.nan), "NaN"),
        (fmt.ratio(1.0309), "1.031×"),
        (fmt.interval(0.98, 1.02), "0.980× to 1.020×"),
        (fmt.share(0.941), "94.1%"),
        (fmt.share(1.0), "100.0%"),
        (fmt.share(0.99996), "99.996%"),
        (fmt.share(1 - 1e-12), "<100%"),
        (fmt.points(-0.433), "-43.3"),
        (fmt.points(0.0), "0.0"),
        (fmt.points(math.nan), "NaN"),
        (fmt.milliseconds(12.341), "12.34 ms"),
        (fmt.milliseconds(0.84), "0.840 ms"),
        (fmt.microseconds(12.34), "12.3 µs"),
        (fmt.microseconds(1830), "1.83 ms"),
        (fmt.rate(664.23), "664.2"),
        (fmt.rate(12345.6), "12346"),
        (fmt.megabytes(212.44), "212.4 MB"),
        (fmt.byte_size(912), "912 B"),
        (fmt.byte_size(90_523_776), "90.5 MB"),
        (fmt.byte_size(3 * 10**15), "3000.0 TB"),
        (fmt.duration(41.26), "41.3 s"),
        (fmt.duration(131), "2 min 11 s"),
        (fmt.counted(1, "case"), "1 case"),
        (fmt.counted(0, "case"), "0 cases"),
        (fmt.listed(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_text(text: str, expected: str) -> None:
    assert text == expected


def test_plain_is_one_printable_line() -> None:
    assert fmt.plain("a\nb\x1b[31mc\u202ed\udc80é→") == "a b\ufffd[31mc\ufffdd?é→"


def test_quantile() -> None:
    assert fmt.quantile((4.0, 1.0, 3.0, 2.0), 0.5) == 2.5
    assert fmt.quantile((7.0,), 0.95) == 7.0
    assert math.isnan(fmt.quantile((), 0.5))
