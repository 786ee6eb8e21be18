"""A ratio whose interval is wide is called so, with what narrows it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_export.bench.results import BenchReport, Ratio
from lora_export.report.html import render_bench_html
from lora_export.report.markdown import render_bench_markdown
from lora_export.report.text import render_bench_text
from lora_export.report.widths import is_wide, wide_sentence
from lora_export.verdict import Verdict


def ratio(low: float, high: float, verdict: Verdict = Verdict.NOT_GATED, *, n_blocks: int = 8) -> Ratio:
    median = 1.002
    return Ratio("merged", "base", median, low, high, 0.99, (median,) * n_blocks, None, verdict)


@pytest.mark.parametrize(("low", "high", "wide"), [(0.960, 1.085, True), (0.982, 1.072, False), (1.0, 1.1, False)])
def test_wide_is_more_than_a_tenth_of_the_median(low, high, wide):
    assert is_wide(ratio(low, high)) is wide


def with_ratios(report: BenchReport, *ratios: Ratio) -> BenchReport:
    return replace(report, workloads=(replace(report.workloads[0], ratios=ratios),))


def test_what_to_do_is_told_with_a_number_of_blocks(gated_bench):
    narrow, wide = ratio(0.982, 1.072), ratio(0.960, 1.085)
    report = with_ratios(gated_bench, narrow, wide)
    said = wide_sentence(report)
    assert said == (
        "The interval of 1 ratio of 2 is wide: its ends lie more than 10% apart, so the median tells no difference as "
        "small as that. End other work on this machine and run again; with as much noise, --blocks 13 would do."
    )
    for text in (render_bench_text(report), render_bench_html(report), render_bench_markdown(report)):
        assert said in " ".join(text.replace("\\", "").split())
        assert text.count("wide: 0.960× to 1.085×") == 1 and "wide: 0.982×" not in text
    twice = wide_sentence(with_ratios(report, wide, ratio(0.9, 1.1, Verdict.AMBIGUOUS, n_blocks=30)))
    assert twice.startswith("Intervals of 2 ratios of 2 are wide: their ends") and "--blocks 120 would do" in twice


@pytest.mark.parametrize("verdict", [Verdict.PASS, Verdict.FAIL])
def test_a_gate_that_decided_needs_no_narrower_interval(verdict, gated_bench):
    assert wide_sentence(with_ratios(gated_bench, ratio(0.9, 1.1, verdict))) == ""
    assert wide_sentence(with_ratios(gated_bench, ratio(0.99, 1.01))) == ""
