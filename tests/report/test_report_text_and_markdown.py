"""What people read on a terminal and in a job summary."""

from __future__ import annotations

import html
import re
from dataclasses import replace

import pytest

from lora_export.bench.results import BenchReport
from lora_export.check.results import CheckReport, Measured
from lora_export.report.bench_tables import latency_table, ratio_table
from lora_export.report.check_tables import case_table
from lora_export.report.markdown import render_bench_markdown, render_check_markdown
from lora_export.report.text import WIDTH, render_bench_text, render_check_text
from lora_export.verdict import Verdict

REPORTS = (
    "passing_check", "failing_check", "empty_check", "stopped_check",
    "gated_bench", "ungated_bench", "compared_bench", "stopped_bench",
)  # fmt: skip


def _text(report: CheckReport | BenchReport) -> str:
    return render_check_text(report) if isinstance(report, CheckReport) else render_bench_text(report)


def _markdown(report: CheckReport | BenchReport) -> str:
    return render_check_markdown(report) if isinstance(report, CheckReport) else render_bench_markdown(report)


@pytest.mark.parametrize("name", REPORTS)
def test_text_fits_and_holds_no_control_codes(name: str, request: pytest.FixtureRequest) -> None:
    text = _text(request.getfixturevalue(name))
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert text.replace("\n", "").isprintable()
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_verdict_stands_first(
    passing_check: CheckReport, failing_check: CheckReport, gated_bench: BenchReport, ungated_bench: BenchReport
) -> None:
    assert render_check_text(passing_check).startswith("✓ PASS: Parity check passed\n")
    assert render_check_text(failing_check).startswith("✕ FAIL: Parity check failed\n")
    assert render_bench_text(gated_bench).startswith("✕ FAIL: Latency exceeds the allowance\n")
    assert render_bench_text(ungated_bench).startswith("· NOT GATED: Latency was measured, not gated\n")
    assert render_check_markdown(failing_check).startswith("## ✕ Parity check failed\n\n**Fail.** 2 of 8")


def test_ambiguous_bench(gated_bench: BenchReport) -> None:
    workload = replace(gated_bench.workloads[0], ratios=gated_bench.workloads[0].ratios[:2])
    report = replace(gated_bench, workloads=(workload,), swaps=())
    assert report.verdict is Verdict.AMBIGUOUS
    text = render_bench_text(report)
    assert text.startswith("? AMBIGUOUS: Latency is undecided\nOf 3 gated figures, 1 is undecided;")
    assert "so more blocks are needed to decide." in " ".join(text.split())


def test_check_names_each_case_and_reason(failing_check: CheckReport) -> None:
    text = " ".join(render_check_text(failing_check).split())
    for case in failing_check.cases:
        assert case.name.split(" & ")[0] in text
        assert all(failure in text for failure in case.failures)
    assert "94.1% → 50.8%" in text


def test_columns_are_aligned(passing_check: CheckReport) -> None:
    lines = render_check_text(passing_check).splitlines()
    header = next(line for line in lines if line.startswith("  Case "))
    row = next(line for line in lines if line.startswith("  topic  "))
    assert row.index("3.0e-07") + len("3.0e-07") == header.index("Relative") + len("Relative")
    assert len(row) == len(header)


def test_nearest_to_the_limit_is_named(passing_check: CheckReport) -> None:
    text = " ".join(render_check_text(passing_check).split())
    assert "nearest to its limit is the relative error of “mixed rows”, with 62% of what is allowed" in text


def test_nearest_to_the_limit_is_the_largest_over_all_measures(passing_check: CheckReport) -> None:
    """An error at 6 % says nothing while another measure stands at 59 %."""
    text = " ".join(render_check_text(replace(passing_check, cases=passing_check.cases[:2])).split())
    assert "nearest to its limit is the error over PyTorch's rounding of “topic”, with 59% of what is allowed" in text


def test_the_measure_that_decides_is_shown_with_its_limit(passing_check: CheckReport) -> None:
    """In half precision nothing limits the relative error, which is then far above float32's limit."""
    values = {"error": (3e-2, None), "kl": (4e-4, 1e-3), "top1": (1.0, 0.99)}
    measures = tuple(Measured.of(name, *figures) for name, figures in values.items())
    report = replace(passing_check, cases=(replace(passing_check.cases[0], measures=measures),))
    for text in (render_check_text(report), render_check_markdown(report)):
        assert "KL 4.0e-04 ≤ 1.0e-03" in text and "40%" in text and "≤ 1.0e-04" not in text


def test_text_and_markdown_say_what_each_variant_was(gated_bench: BenchReport) -> None:
    for text in (render_bench_text(gated_bench), render_bench_markdown(gated_bench)):
        assert "- dynamic: adapter given as inputs" in text and "- mixed rows: one adapter a row" in text


def test_a_ratio_of_too_few_blocks_decides_nothing(stopped_bench: BenchReport) -> None:
    ratio = replace(stopped_bench.workloads[0].ratios[0], confidence=0.75, verdict=Verdict.AMBIGUOUS)
    workload = replace(stopped_bench.workloads[0], ratios=(ratio,))
    text = " ".join(render_bench_text(replace(stopped_bench, workloads=(workload,))).split())
    assert "its 75.0% interval is 1.012× to 1.048×, of too few blocks to decide on the allowance of 1.050×." in text


@pytest.mark.parametrize(("name", "headline"), [
    ("stopped_check", "Parity check stopped before its end"), ("stopped_bench", "The bench was stopped before its end"),
])  # fmt: skip
def test_a_partial_report_says_so_at_its_top(name: str, headline: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(name)
    assert report.verdict is Verdict.AMBIGUOUS and report.partial
    text = " ".join(_text(report).split())
    assert text.startswith(f"? AMBIGUOUS: {headline}") and f"! Partial report: stopped by {report.stopped}." in text
    assert _markdown(report).startswith(f"## ? {headline}") and "\n\n> **Partial report: stopped by " in _markdown(
        report
    )


def test_nothing_compared_is_no_praise(empty_check: CheckReport) -> None:
    assert "Nothing was compared" in render_check_text(empty_check)
    assert "says nothing about the export" in render_check_text(empty_check)


def test_terminal_escapes_are_taken_out(passing_check: CheckReport) -> None:
    case = replace(passing_check.cases[0], name="red\x1b[31m\nname")
    text = render_check_text(replace(passing_check, cases=(case,)))
    assert "\x1b" not in text and "red\ufffd[31m name" in text


def test_bench_text_says_what_swaps_cost(gated_bench: BenchReport, ungated_bench: BenchReport) -> None:
    text = render_bench_text(gated_bench)
    assert re.search(r"held by the session +12\.3 µs +12\.0 µs to 13\.1 µs +3 +50\.0 µs +pass", text)
    assert "12.3 µs to one held by the session (median over 3 swaps)" in render_bench_markdown(gated_bench)
    assert "Changing the adapter was not measured: that takes a dynamic export of two." in render_bench_text(
        ungated_bench
    )


def test_every_kind_of_gate_is_named_where_it_fails(compared_bench: BenchReport) -> None:
    text = " ".join(render_bench_text(compared_bench).split())
    assert text.startswith("✕ FAIL: Latency, adapter swap, memory and difference exceed the allowance")
    assert "Of 7 gated figures, 5 are above the allowance and 1 is undecided" in text
    assert "“pooled − against, 8 × 128 tokens” has no figure to hold against its allowance" in text
    known = replace(compared_bench, differences=())
    text_of_known = " ".join(render_bench_text(known).split())
    assert "“adapter held by the session” takes the most of its allowance, 123%" in text_of_known
    assert "dynamic ÷ against, 8 × 128 tokens: fail" in text
    assert (
        "The median is 12.3 µs; its 75.0% interval is 12.0 µs to 13.1 µs, wholly above the allowance of 10.0 µs."
        in text
    )
    assert "The peak is 912.0 MB, above the allowance of 900.0 MB." in text
    assert "differ by at most 1.5e-06, 2.0e-07 of the largest value, above the allowance of 1.0e-07." in text
    assert "none has the shape of one of this export's." in text and "base − against, 8 × 128 tokens" in text
    assert "Against: Export yesterday/topic-kind" in text


def test_operators_are_told_by_provider(gated_bench: BenchReport) -> None:
    for text in (render_bench_text(gated_bench), render_bench_markdown(gated_bench)):
        assert "base: 3 operators on CPUExecutionProvider (3 Shape)" in text


def test_memory_alone_does_not_say_latency(compared_bench: BenchReport) -> None:
    report = replace(compared_bench, workloads=(), swaps=(), differences=())
    assert render_bench_text(report).startswith("✕ FAIL: Memory exceeds the allowance\nOf 1 gated figure, 1 is above")


@pytest.mark.parametrize(("name", "what"), [("passing_check", "parity"), ("gated_bench", "latency")])
@pytest.mark.parametrize(("fused_for", "more"), [("cpu", ""), ("cuda", "; the graph is fused for CUDA")])
def test_a_cpu_run_is_labelled_before_its_numbers(
    name: str, what: str, fused_for: str, more: str, request: pytest.FixtureRequest
) -> None:
    report = request.getfixturevalue(name)
    report = replace(report, subject=replace(report.subject, fused_for=fused_for))
    label = f"{what} only on CPU: says nothing about the GPU{more}"
    assert report.scope == label
    assert _text(report).splitlines().index(f"! {label}") < 5
    assert f"\n\n> **{label}**\n\n" in _markdown(report)


def test_a_gpu_run_is_not_labelled(gpu_check: CheckReport) -> None:
    assert gpu_check.scope is None
    assert "only on CPU" not in _text(gpu_check) + _markdown(gpu_check)


def _cells(markdown: str) -> set[tuple[str, ...]]:
    lines = [html.unescape(line) for line in markdown.splitlines() if line.startswith("|")]
    return {tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines}


def test_markdown_holds_the_numbers_of_the_tables(failing_check: CheckReport, gated_bench: BenchReport) -> None:
    tables = [case_table(failing_check), ratio_table(gated_bench), *map(latency_table, gated_bench.workloads)]
    rows = _cells(render_check_markdown(failing_check)) | _cells(render_bench_markdown(gated_bench))
    for table in tables:
        for row in table.narrow().rows:
            assert any(all(cell.text in found for cell, found in zip(row.cells[2:], cells[2:], strict=True))
                       for cells in rows if len(cells) == len(row.cells))  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_markdown_tables_are_whole_and_escaped(name: str, request: pytest.FixtureRequest) -> None:
    markdown = _markdown(request.getfixturevalue(name))
    assert "<script" not in markdown and "<b>" not in markdown
    width = None
    for line in markdown.splitlines():
        n_cells = len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert n_cells is None or width is None or n_cells == width
        width = n_cells
