"""Where marks stand: axes, dots, tolerances and intervals."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from lora_export.bench.results import BenchReport
from lora_export.check.results import CheckReport, Measured
from lora_export.report.bench_plots import MOST_DOTS, latency_plot, ratio_plot, thinned
from lora_export.report.check_plots import parity_plot
from lora_export.report.svg import Axis


def _marks(image: str, style: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(image).iter() if element.get("class") == style]


def _at(element: ET.Element, attribute: str) -> float:
    return float(element.get(attribute, "nan").rstrip("%"))


def test_logarithmic_axis() -> None:
    axis = Axis(1e-8, 1e2, log=True)
    assert axis.percent(1e-8) == 2 and axis.percent(1e2) == 98 and axis.percent(1e-3) == 50
    assert axis.percent(0.0) == 2 and axis.percent(1e9) == 98
    ticks = axis.ticks()
    assert len(ticks) == 11 and [text for _, text in ticks if text][:2] == ["1e-08", "1e-06"]


@pytest.mark.parametrize(("low", "high", "labels"), [
    (0.97, 1.19, ["1.00", "1.05", "1.10", "1.15"]),
    (11.6, 15.2, ["12", "13", "14", "15"]),
    (0.0, 480.0, ["0", "100", "200", "300", "400"]),
])  # fmt: skip
def test_linear_axis(low: float, high: float, labels: list[str]) -> None:
    assert [text for _, text in Axis(low, high).ticks()] == labels


def test_axis_without_extent() -> None:
    assert Axis(3.0, 3.0).percent(3.0) == 50
    assert Axis(3.0, 3.0).ticks()


def test_parity_plot_shows_how_much_of_its_limit_each_measure_takes(passing_check: CheckReport) -> None:
    topic = replace(passing_check, cases=(passing_check.cases[1],))
    image = parity_plot(topic)
    (nearest,), (limit,), others = (_marks(image, style) for style in ("error", "limit", "other"))
    # 1.18 of at most 2, on an axis from a thousandth to ten times the limit.
    assert _at(nearest, "cx") == pytest.approx(2 + 96 * (math.log10(0.59) + 3) / 4, abs=0.01)
    assert _at(limit, "x1") == pytest.approx(2 + 96 * 3 / 4, abs=0.01)
    assert len(others) == 6 and all(_at(other, "cx") < _at(nearest, "cx") for other in others)
    assert "error over PyTorch's rounding" in image and ">59% ✓<" in image


def test_a_failed_case_has_its_dot_beyond_the_band_whatever_measure_failed(failing_check: CheckReport) -> None:
    """A dot inside the band that is marked as failed would say two things."""
    passing = failing_check.cases[1]
    measures = tuple(Measured.of(m.name, 9.0 if m.name == "rounding" else m.value, m.limit) for m in passing.measures)
    case = replace(passing, measures=measures, failures=("the error is 9 × what PyTorch itself loses",))
    image = parity_plot(replace(failing_check, cases=(case,)))
    (dot,), (band,) = _marks(image, "error"), _marks(image, "allowed")
    assert _at(dot, "cx") > _at(band, "x") + _at(band, "width")
    assert len(_marks(image, "label failed")) == 1 and ">450% ✕<" in image


def test_parity_plot_of_special_values(failing_check: CheckReport, empty_check: CheckReport) -> None:
    image = parity_plot(failing_check)
    assert len(_marks(image, "error")) == 7
    assert [note.text for note in _marks(image, "note")] == ["the relative error is NaN"]
    assert len(_marks(image, "label failed")) == 2
    tokens = replace(failing_check.cases[0], measures=())
    assert "nothing limits it" not in parity_plot(replace(failing_check, cases=(tokens,)))
    both = replace(failing_check, cases=(tokens, failing_check.cases[0]))
    assert [note.text for note in _marks(parity_plot(both), "note")] == ["nothing limits it"]
    assert parity_plot(empty_check) == ""


def test_latency_plot_leaves_stragglers_off_the_scale(gated_bench: BenchReport) -> None:
    workload = gated_bench.workloads[0]
    image = latency_plot(workload, 1)
    assert len(_marks(image, "box")) == len(_marks(image, "median")) == 4
    assert len(_marks(image, "sample")) == 3 * MOST_DOTS + 60
    assert "1 run off the scale" in image
    medians = [_at(mark, "x1") for mark in _marks(image, "median")]
    assert medians == sorted(medians)


def test_latency_plot_of_a_variant_without_runs(ungated_bench: BenchReport) -> None:
    workload = ungated_bench.workloads[0]
    assert [note.text for note in _marks(latency_plot(workload, 1), "note")] == ["no runs"]
    assert latency_plot(replace(workload, variants=workload.variants[1:]), 1) == ""


def test_thinned_keeps_the_ends() -> None:
    samples = tuple(float(n) for n in range(1000, 0, -1))
    assert len(thinned(samples)) == MOST_DOTS
    assert (thinned(samples)[0], thinned(samples)[-1]) == (1.0, 1000.0)
    assert thinned((2.0, 1.0)) == [1.0, 2.0]


def test_ratio_plot_shows_intervals_around_one(gated_bench: BenchReport, ungated_bench: BenchReport) -> None:
    image = ratio_plot(gated_bench)
    (equal,) = _marks(image, "equal")
    spans = [mark for mark in _marks(image, "interval") if mark.get("y1") == mark.get("y2")]
    assert len(spans) == 4 and len(_marks(image, "limit")) == 3
    ungated = spans[2]
    assert _at(ungated, "x1") < _at(equal, "x1") < _at(ungated, "x2")
    failed, limit = spans[3], _marks(image, "limit")[2]
    assert _at(limit, "x1") < _at(failed, "x1")
    assert len(_marks(image, "label failed")) == len(_marks(image, "label ambiguous")) == 1
    assert ratio_plot(ungated_bench) == ""


def test_ratio_that_is_no_number_is_said(gated_bench: BenchReport) -> None:
    workload = gated_bench.workloads[0]
    broken = replace(workload.ratios[0], median=math.nan, low=math.nan, high=math.inf)
    image = ratio_plot(replace(gated_bench, workloads=(replace(workload, ratios=(broken,)),)))
    assert [note.text for note in _marks(image, "note")] == ["median NaN, interval NaN to ∞"]
