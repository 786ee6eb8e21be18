"""JUnit XML: what strict readers accept, with every case, figure and reason."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from lora_export.bench.results import BenchReport
from lora_export.check.results import CheckReport
from lora_export.report.junit import render_bench_junit, render_check_junit
from lora_export.verdict import Verdict

REPORTS = (
    "passing_check", "failing_check", "empty_check", "stopped_check",
    "gated_bench", "ungated_bench", "compared_bench", "stopped_bench",
)  # fmt: skip

# Jenkins' junit-10.xsd, as far as it is used: required and optional attributes, and children in any order.
STRICT = {
    "testsuites": ("", "name time tests failures errors", "testsuite"),
    "testsuite": ("name tests failures errors", "time skipped timestamp hostname id package group file log url",
                  "properties testcase system-out system-err"),
    "properties": ("", "", "property"),
    "property": ("name value", "", ""),
    "testcase": ("name", "time classname group", "skipped error failure system-out system-err"),
    "failure": ("", "type message", ""),
    "error": ("", "type message", ""),
    "skipped": ("", "type message", ""),
    "system-out": ("", "", ""),
}  # fmt: skip
# Its SUREFIRE_TIME.
TIME = re.compile(r"(([0-9]{0,3},)*[0-9]{3}|[0-9]{0,3})*(\.[0-9]{0,3})?")


def _render(report: CheckReport | BenchReport) -> str:
    return render_check_junit(report) if isinstance(report, CheckReport) else render_bench_junit(report)


def _suite(report: CheckReport | BenchReport):
    (suite,) = JUnitXml.fromstring(_render(report).encode())
    return suite


def _cases(report: CheckReport | BenchReport) -> dict[tuple[str, str], object]:
    return {(case.classname, case.name): case for case in _suite(report)}


@pytest.mark.parametrize("name", REPORTS)
def test_the_strict_schema_is_kept(name: str, request: pytest.FixtureRequest) -> None:
    root = ET.fromstring(_render(request.getfixturevalue(name)).encode())
    assert root.tag == "testsuites"
    for element in root.iter():
        required, optional, children = (set(words.split()) for words in STRICT[element.tag])
        assert required <= set(element.attrib) <= required | optional, element.tag
        assert {child.tag for child in element} <= children, element.tag
        assert element.tag == "testcase" or TIME.fullmatch(element.get("time", "0"))


@pytest.mark.parametrize("name", REPORTS)
def test_counts_are_those_of_the_cases(name: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(name)
    suite = _suite(report)
    found = (suite.tests, suite.failures, suite.errors, suite.skipped)
    suite.update_statistics()
    assert found == (suite.tests, suite.failures, suite.errors, suite.skipped)
    assert (suite.failures > 0) is (report.verdict is Verdict.FAIL)
    assert len(_cases(report)) == suite.tests, "two cases share a name"


def test_a_failed_comparison_tells_why(failing_check: CheckReport) -> None:
    cases = _cases(failing_check)
    for case in failing_check.cases:
        results = cases[f"lora-export.check.{case.group}", case.name].result
        assert [type(result) for result in results] == ([] if case.passed else [Failure])
        for result in results:
            assert result.message.startswith(" ".join(case.failures)) and result.type == "fail"
            assert ("First difference: layer.0.query" in result.message) == (case.name == "swapped <b>names</b>")
            assert ("reproduce.py shows it" in result.message) == (case.name == "swapped <b>names</b>")
            assert result.text.startswith("\n".join(case.failures))


def test_figures_are_at_full_precision(passing_check: CheckReport, gated_bench: BenchReport) -> None:
    properties = {entry.name: entry.value for entry in _suite(passing_check).properties()}
    assert properties["adapter/topic/largest_error"] == "1.5e-06" and properties["adapter/topic/error"] == "3e-07"
    assert properties["adapter/topic/accuracy_exported"] == "0.941"
    assert "base/base/effect" not in properties
    assert properties["graph sha-256"] == passing_check.subject.graph_sha256
    assert properties["version onnxruntime"] == "1.23.0" and properties["verdict"] == "pass"
    assert "error_limit=0.0001\n" in _cases(passing_check)["lora-export.check.adapter", "topic"].system_out
    variant = gated_bench.workloads[0].variants[1]
    case = _cases(gated_bench)["lora-export.bench.8 × 128 tokens", "merged"]
    assert f"median_ms={variant.median_ms!r}\n" in case.system_out
    assert case.time == pytest.approx(variant.median_ms / 1e3, abs=1e-6)


def test_what_was_not_compared_is_skipped(passing_check: CheckReport) -> None:
    (result,) = _cases(passing_check)["lora-export.check.not compared", "Decoding"].result
    assert isinstance(result, Skipped) and result.message == "Decoding: the task has no cache."


def test_a_check_of_nothing_fails(empty_check: CheckReport) -> None:
    (result,) = _cases(empty_check)["lora-export.check.check", "comparisons"].result
    assert isinstance(result, Failure) and "holds no comparison" in result.message


@pytest.mark.parametrize("name", ["stopped_check", "stopped_bench"])
def test_what_stopped_the_measurements_is_an_error_beside_what_was_measured(
    name: str, request: pytest.FixtureRequest
) -> None:
    report = request.getfixturevalue(name)
    suite = _suite(report)
    (error,) = [result for case in suite for result in case.result if isinstance(result, Error)]
    assert error.text == report.stopped and error.message.startswith(f"Partial report: stopped by {report.stopped}.")
    assert (suite.errors, suite.failures) == (1, 0) and suite.tests > 2


def test_every_variant_has_its_verdict(gated_bench: BenchReport, hostile: str) -> None:
    cases = _cases(gated_bench)
    first, second = "lora-export.bench.8 × 128 tokens", "lora-export.bench.1 × 1 on 512 tokens"
    assert not cases[first, "merged"].result and not cases[first, "dynamic"].result
    (undecided,) = cases[first, "mixed rows"].result
    assert isinstance(undecided, Skipped) and undecided.type == "ambiguous"
    assert "so more blocks are needed to decide" in undecided.message
    (failed,) = cases[second, hostile].result
    assert isinstance(failed, Failure)
    assert failed.message.startswith(f"{hostile} ÷ merged: The median ratio is 1.154×;")
    assert "ratio_allowance=1.05" in cases[second, hostile].system_out


def test_another_export_swaps_and_memory_have_cases_of_their_own(compared_bench: BenchReport) -> None:
    cases = _cases(compared_bench)
    (failed,) = cases["lora-export.bench.8 × 128 tokens", "dynamic ÷ against"].result
    assert isinstance(failed, Failure) and failed.message.startswith("dynamic ÷ against: The median ratio is 1.060×;")
    assert not cases["lora-export.bench.8 × 128 tokens", "dynamic"].result, "its ratio to the base passes"
    assert "ratio_allowance=1.02" in cases["lora-export.bench.8 × 128 tokens", "dynamic ÷ against"].system_out
    (failed,) = cases["lora-export.bench.swap", "adapter held by the session"].result
    assert isinstance(failed, Failure) and "wholly above the allowance of 10.0 µs" in failed.message
    (failed,) = cases["lora-export.bench.memory", "dynamic, on the GPU"].result
    assert isinstance(failed, Failure) and "above the allowance of 900.0 MB" in failed.message
    assert "peak_mb=912.0\nallowance_mb=900.0" in cases["lora-export.bench.memory", "dynamic, on the GPU"].system_out


def test_a_cpu_run_is_labelled(passing_check: CheckReport, gpu_check: CheckReport) -> None:
    label = "parity only on CPU: says nothing about the GPU"
    root = ET.fromstring(_render(passing_check).encode())
    assert root.findtext("testsuite/system-out") == label
    assert {entry.name: entry.value for entry in _suite(passing_check).properties()}["scope"] == label
    assert "only on CPU" not in _render(gpu_check)


def test_what_xml_cannot_hold_is_replaced(passing_check: CheckReport) -> None:
    case = replace(passing_check.cases[0], name="a\x00b\ufffe\udc80\x1b", failures=("]]> & <x> \uffff",))
    text = render_check_junit(replace(passing_check, cases=(case,)))
    (suite,) = JUnitXml.fromstring(text.encode())
    found = next(iter(suite))
    assert found.name == "a\ufffdb\ufffd?\ufffd" and found.result[0].message == "]]> & <x> \ufffd"
