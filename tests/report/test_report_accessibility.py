"""The pages in a real browser, as desktop, phone, dark and print: axe-core finds nothing, nothing scrolls sideways.

`ci/report_accessibility` installs what is needed and runs this.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lora_export.report.extract_html import render_extract_html
from lora_export.report.fleet import render_fleet_html
from lora_export.report.html import render_bench_html, render_check_html

ROOT = Path(__file__).parents[2]
EXAMINE = ROOT / "ci/accessibility/examine.mjs"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
REPORTS = {
    "passing_check": render_check_html,
    "failing_check": render_check_html,
    "empty_check": render_check_html,
    "gpu_check": render_check_html,
    "stopped_check": render_check_html,
    "gated_bench": render_bench_html,
    "ungated_bench": render_bench_html,
    "compared_bench": render_bench_html,
    "noisy_bench": render_bench_html,
    "mixed_fleet": render_fleet_html,
    "extraction": render_extract_html,
}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed"),
    pytest.mark.skipif(
        not (ROOT / "ci/accessibility/node_modules").is_dir(),
        reason="axe-core is not installed; ci/report_accessibility installs it",
    ),
]


def examine(*pages: Path) -> tuple[int, list[dict]]:
    """Exit code and violations."""
    done = subprocess.run(["node", EXAMINE, CHROMIUM, *pages], capture_output=True, text=True, timeout=300)
    assert f"{len(pages)} pages in 7 views" in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_no_violation(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pages = []
    for name, render in REPORTS.items():
        pages.append(tmp_path / f"{name}.html")
        pages[-1].write_text(render(request.getfixturevalue(name)), encoding="utf-8")
    assert examine(*pages) == (0, [])


def test_violations_are_seen(passing_check, tmp_path: Path) -> None:
    """The same page with faint text, a picture without words, and something too wide for a phone."""
    page = render_check_html(passing_check)
    page = page.replace("--quiet: #545d66", "--quiet: #b4bdc6")
    page = page.replace("<main>", '<main><div style="width: 700px">wide</div><img src="data:,">')
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    code, found = examine(tmp_path / "page.html")
    seen = {(violation["rule"], violation["view"]) for violation in found}
    assert code == 1
    assert {("color-contrast", "desktop"), ("image-alt", "phone-dark"), ("reflow", "phone")} <= seen
    assert ("color-contrast", "desktop-dark") not in seen and ("reflow", "desktop") not in seen
