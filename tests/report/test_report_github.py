"""Annotations: GitHub's syntax and escapes, the worst first, never more than it shows."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lora_export.bench.results import BenchReport
from lora_export.check.results import CheckReport
from lora_export.report.github import annotations
from lora_export.report.layer_tables import where_sentences
from lora_export.verdict import Verdict


def _parsed(command: str) -> tuple[str, str, str]:
    """Name, title and message of a workflow command, read as actions/runner's `ActionCommand.TryParseV2` does."""
    assert "\n" not in command and "\r" not in command
    name, properties, message = re.fullmatch(r"::([a-z]+) ([^:]*)::(.*)", command).groups()
    (pair,) = properties.split(",")
    key, title = pair.split("=", 1)
    assert key == "title"
    for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        title = title.replace(code, char)
    for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
        message = message.replace(code, char)
    return name, title, message


def test_one_for_each_failure(failing_check: CheckReport) -> None:
    found = list(map(_parsed, annotations(failing_check)))
    failed = [case for case in failing_check.cases if not case.passed]
    assert [name for name, _, _ in found] == ["error", "error"]
    assert [title for _, title, _ in found] == [f"lora-export check: {case.name}" for case in failed]
    assert [message for _, _, message in found] == [
        " ".join((*case.failures, *where_sentences(failing_check, case.name))) for case in failed
    ]
    assert "First difference: layer.0.query: MatMul node_1" in found[0][2] and "reproduce.py" not in found[0][2]


def test_an_undecided_ratio_warns_after_the_failures(gated_bench: BenchReport, hostile: str) -> None:
    (failed, undecided) = map(_parsed, annotations(gated_bench))
    assert failed[0] == "error" and failed[1].startswith(f"lora-export bench: {hostile} ÷ merged, 1 × 1")
    assert undecided[0] == "warning" and "more blocks are needed" in undecided[2]


def test_nothing_where_all_passed(passing_check: CheckReport, ungated_bench: BenchReport) -> None:
    assert annotations(passing_check) == annotations(ungated_bench) == []


def test_a_check_of_nothing_is_an_error(empty_check: CheckReport) -> None:
    ((name, title, message),) = map(_parsed, annotations(empty_check))
    assert (name, title) == ("error", "lora-export check: nothing was compared") and "no comparison" in message


@pytest.mark.parametrize("text", ["a%b", "a\nb", "a\r\n::warning::b", "::set-output name=x::y", "a:b,c", "%0A", "%3A"])
def test_escapes(text: str, failing_check: CheckReport) -> None:
    case = replace(failing_check.cases[-1], name=text, failures=(text,))
    (command,) = annotations(replace(failing_check, cases=(case,)))
    assert _parsed(command) == ("error", f"lora-export check: {text}", text)


@pytest.mark.parametrize(("n", "shown", "rest"), [(9, 9, None), (10, 10, None), (11, 9, "2 more"), (40, 9, "31 more")])
def test_never_more_than_github_shows(n: int, shown: int, rest: str | None, failing_check: CheckReport) -> None:
    cases = tuple(replace(failing_check.cases[-1], name=f"case {i}") for i in range(n))
    found = annotations(replace(failing_check, cases=cases))
    assert len(found) == min(n, 10)
    assert all(f"case {i}" in found[i] for i in range(shown))
    assert rest is None or _parsed(found[-1]) == ("error", "lora-export check", f"{rest}; see reports/check.html")


def test_the_rest_is_no_worse_than_it_is(gated_bench: BenchReport) -> None:
    workload = gated_bench.workloads[0]
    ratio = next(ratio for ratio in workload.ratios if ratio.verdict is Verdict.AMBIGUOUS)
    report = replace(gated_bench, workloads=(replace(workload, ratios=(ratio,) * 12),))
    assert {_parsed(command)[0] for command in annotations(report)} == {"warning"}
