"""The published schema: reports of every kind are valid, broken ones are not, and it names every field there is."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable

import pytest
from jsonschema import Draft202012Validator

from lora_export import verdict as results
from lora_export.bench import results as bench_results
from lora_export.check import divergence_results
from lora_export.check import results as check_results
from lora_export.check.context import CheckOptions
from lora_export.check.judge import tolerances
from lora_export.check.judge.formulas import COST_FORMULAS, FORMULAS
from lora_export.report import check_tables, measure_words
from lora_export.report.as_json import json_value, render_json, report_schema

REPORTS = (
    "passing_check",
    "failing_check",
    "empty_check",
    "gated_bench",
    "ungated_bench",
    "compared_bench",
    "gpu_check",
    "stopped_check",
    "stopped_bench",
)
SCHEMA = report_schema()
VALIDATOR = Draft202012Validator(SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)


def test_the_schema_is_the_second() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == "urn:lora-export:report:2"
    assert SCHEMA["$defs"]["check"]["properties"]["schema"] == {"const": results.REPORT_SCHEMA} == {"const": 2}


@pytest.mark.parametrize("name", REPORTS)
def test_reports_are_valid(name: str, request: pytest.FixtureRequest) -> None:
    VALIDATOR.validate(json.loads(render_json(request.getfixturevalue(name))))


@pytest.mark.parametrize(
    ("definition", "kind", "derived"),
    [
        ("environment", results.Environment, set()),
        ("subject", results.Subject, set()),
        ("case", check_results.ParityCase, {"passed"}),
        ("rounding", check_results.Rounding, set()),
        ("limit", tolerances.Limit, set()),
        ("measured", check_results.Measured, set()),
        ("both_sides", check_results.BothSides, set()),
        ("variant", bench_results.Variant, set()),
        ("ratio", bench_results.Ratio, set()),
        ("workload", bench_results.Workload, {"name"}),
        ("warm_up", bench_results.WarmUp, set()),
        ("swap", bench_results.Swap, set()),
        ("compared_value", divergence_results.ComparedValue, set()),
        ("layer_errors", divergence_results.LayerErrors, set()),
        ("reproduction", divergence_results.Reproduction, set()),
        ("divergence", divergence_results.Divergence, set()),
        ("memory", bench_results.Memory, set()),
        ("difference", bench_results.Difference, set()),
        ("placement", bench_results.ProviderOperators, set()),
        ("check", check_results.CheckReport, {"report", "verdict", "scope", "partial"}),
        ("bench", bench_results.BenchReport, {"report", "verdict", "scope", "partial"}),
    ],
)
def test_every_field_is_described_and_required(definition: str, kind: type, derived: set[str]) -> None:
    described = SCHEMA["$defs"][definition]
    fields = {field.name for field in dataclasses.fields(kind)} | derived
    assert set(described["properties"]) == set(described["required"]) == fields
    assert described["additionalProperties"] is False


def test_every_measure_has_words_and_a_formula() -> None:
    assert (
        list(measure_words.WORDS)
        == list(tolerances.MEASURES)
        == [*FORMULAS, "weights", "scales", "clipping", *COST_FORMULAS]
    )
    for words in measure_words.WORDS.values():
        assert words.title and words.noun and words.text(1.0)


def test_groups_of_cases_are_those_with_a_heading() -> None:
    assert set(SCHEMA["$defs"]["case"]["properties"]["group"]["enum"]) == set(check_tables._GROUPS)


def _set(*path: object) -> Callable[[dict], None]:
    """An edit: all but the last entry of `path` lead to the place, the last is the value."""

    def edit(report: dict) -> None:
        *way, key, value = path
        for step in way:
            report = report[step]
        report[key] = value

    return edit


def _drop(*path: object) -> Callable[[dict], None]:
    def edit(report: dict) -> None:
        for step in path[:-1]:
            report = report[step]
        del report[path[-1]]

    return edit


BROKEN = {
    "no kind": ("passing_check", _drop("report")),
    "another kind": ("passing_check", _set("report", "latency")),
    "another version": ("passing_check", _set("schema", 1)),
    "version as text": ("gated_bench", _set("schema", "1")),
    "a field too many": ("passing_check", _set("score", 7)),
    "a bench called check": ("gated_bench", _set("report", "check")),
    "a check that says pass over a failed case": ("failing_check", _set("verdict", "pass")),
    "a check that says pass over no case": ("empty_check", _set("verdict", "pass")),
    "a check that says fail over passed cases": ("passing_check", _set("verdict", "fail")),
    "an ambiguous check": ("passing_check", _set("verdict", "ambiguous")),
    "passed in spite of failures": ("failing_check", _set("cases", -1, "passed", True)),
    "failed without a reason": ("passing_check", _set("cases", 0, "passed", False)),
    "a case without its error": ("passing_check", _drop("cases", 0, "largest_error")),
    "an error as text": ("passing_check", _set("cases", 0, "largest_error", "1e-6")),
    "a measure without its limit": ("passing_check", _drop("cases", 0, "measures", 0, "limit")),
    "a measure as text": ("passing_check", _set("cases", 0, "measures", 0, "value", "1e-6")),
    "a partial check that says pass": ("stopped_check", _set("verdict", "pass")),
    "a partial check without a reason": ("stopped_check", _set("stopped", None)),
    "a whole check with a reason": ("passing_check", _set("stopped", "RuntimeError")),
    "a partial bench that says pass": ("stopped_bench", _set("verdict", "pass")),
    "a group nobody knows": ("passing_check", _set("cases", 0, "group", "others")),
    "an error by layer without its module": ("passing_check", _drop("layers", 0, "modules", 0, "module")),
    "a difference without a sentence": ("failing_check", _set("divergence", "sentence", "")),
    "a script without its tolerance": ("failing_check", _drop("divergence", "reproduction", "tolerance")),
    "a hash cut short": ("passing_check", _set("subject", "graph_sha256", "9f2c")),
    "no provider": ("passing_check", _drop("environment", "provider")),
    "a time that is none": ("gated_bench", _set("environment", "started_at", "yesterday")),
    "a verdict nobody knows": ("gated_bench", _set("workloads", 0, "ratios", 0, "verdict", "maybe")),
    "samples that are no list": ("gated_bench", _set("workloads", 0, "variants", 0, "samples_ms", 1.5)),
    "a batch of none": ("gated_bench", _set("workloads", 0, "batch", 0)),
    "a swap without its samples": ("gated_bench", _set("swaps", 0, "samples_us", [])),
    "a swap of another kind": ("gated_bench", _set("swaps", 0, "name", "thrown")),
    "memory as text": ("gated_bench", _set("memory", 0, "peak_mb", "212 MB")),
    "memory of nowhere": ("gated_bench", _set("memory", 0, "place", "cloud")),
    "a placement without its provider": ("gated_bench", _drop("placements", 0, "provider")),
    "a warm-up of no runs": ("gated_bench", _set("workloads", 0, "variants", 0, "warm_ups", 0, "n_runs", 0)),
    "another export cut short": ("compared_bench", _drop("against", "folder")),
    "a difference without what was compared": ("compared_bench", _drop("differences", 0, "outputs")),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_reports_are_not_valid(name: str, request: pytest.FixtureRequest) -> None:
    source, edit = BROKEN[name]
    report = copy.deepcopy(json_value(request.getfixturevalue(source)))
    VALIDATOR.validate(report)
    edit(report)
    assert not VALIDATOR.is_valid(report)


@pytest.mark.parametrize("name", ["bert-dynamic", "llama-dynamic", "classifier-merged"])
def test_reports_of_real_exports_are_valid(name: str, exports, own, short_timing) -> None:
    """What check and bench write of a real export, in every file that a program reads."""
    from lora_export.bench.plan import BenchOptions
    from lora_export.integrity.sources import SourceOverrides
    from lora_export.pipeline import bench, check

    folder = own(exports[name])
    checked, check_files = check(folder, SourceOverrides(), CheckOptions(provider="cpu", n_rows=4))
    benched, bench_files = bench(folder, SourceOverrides(), BenchOptions("cpu", [(2, 4, 0)], blocks=6))
    for report, files in ((checked, check_files), (benched, bench_files)):
        found = json.loads(files["json"].read_text("utf-8"))
        VALIDATOR.validate(found)
        assert found == json_value(report)
        assert found["scope"] in ("parity only on CPU: says nothing about the GPU",
                                  "latency only on CPU: says nothing about the GPU")  # fmt: skip
        for suffix in ("html", "md", "junit.xml"):
            assert found["scope"] in files[suffix].read_text("utf-8"), suffix
