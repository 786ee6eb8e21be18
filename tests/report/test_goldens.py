"""Reports as people and CI systems read them, to the byte. `pytest --update-goldens` writes the files anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.report.as_json import render_json
from lora_export.report.junit import render_bench_junit, render_check_junit
from lora_export.report.markdown import render_bench_markdown, render_check_markdown
from lora_export.report.text import render_bench_text, render_check_text

GOLDENS = Path(__file__).parents[1] / "goldens"
REPORTS = {"passing_check": "check", "failing_check": "check", "gated_bench": "bench"}
RENDERERS = {
    ("check", "txt"): render_check_text,
    ("check", "md"): render_check_markdown,
    ("check", "junit.xml"): render_check_junit,
    ("check", "json"): render_json,
    ("bench", "txt"): render_bench_text,
    ("bench", "md"): render_bench_markdown,
    ("bench", "junit.xml"): render_bench_junit,
    ("bench", "json"): render_json,
}
CASES = [(report, kind, suffix) for report, kind in REPORTS.items() for of, suffix in RENDERERS if of == kind]


@pytest.mark.parametrize(("report", "kind", "suffix"), CASES, ids=[f"{report}.{suffix}" for report, _, suffix in CASES])
def test_a_rendering_is_what_it_was(report, kind, suffix, request):
    found = RENDERERS[kind, suffix](request.getfixturevalue(report))
    golden = GOLDENS / f"{report}.{suffix}"
    if request.config.getoption("--update-goldens"):
        golden.write_text(found, encoding="utf-8", newline="\n")
    assert found == golden.read_text(encoding="utf-8"), f"{golden} differs; --update-goldens writes it anew"
