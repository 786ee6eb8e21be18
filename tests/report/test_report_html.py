"""The pages: self-contained, escaped, well-formed, and with the numbers of the tables."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import pytest

from lora_export.bench.results import BenchReport
from lora_export.check.results import CheckReport
from lora_export.report import bench_tables, check_tables, provenance
from lora_export.report.html import render_bench_html, render_check_html
from lora_export.report.tables import Table

REPORTS = (
    "passing_check", "failing_check", "empty_check", "stopped_check",
    "gated_bench", "ungated_bench", "compared_bench", "stopped_bench",
)  # fmt: skip
VOID = {"meta", "link", "br", "img", "input", "hr"}


def _render(report: CheckReport | BenchReport) -> str:
    return render_check_html(report) if isinstance(report, CheckReport) else render_bench_html(report)


class Page(HTMLParser):
    """Rows of all tables, identifiers, tags and text of a page; fails on tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words += data.split()
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] = " ".join((self.rows[-1][-1] + " " + data).split())

    @property
    def text(self) -> str:
        return " ".join(self.words)


def _images(page: str) -> list[str]:
    """Every outermost `<svg>` of a page."""
    found, depth, start = [], 0, 0
    for tag in re.finditer(r"<svg\b|</svg>", page):
        if tag[0] == "<svg":
            start = tag.start() if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            found += [page[start : tag.end()]] if depth == 0 else []
    return found


@pytest.fixture(params=REPORTS)
def page(request: pytest.FixtureRequest) -> str:
    return _render(request.getfixturevalue(request.param))


def test_self_contained(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]", page, re.IGNORECASE)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    for tag, attributes in Page(page).attributes:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href") in (None, "data:,"), tag


def test_document_structure(page: str) -> None:
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>\n")
    assert ("html", {"lang": "en"}) in parsed.attributes
    levels = [int(tag[1]) for tag, _ in parsed.attributes if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert len(parsed.ids) == len(set(parsed.ids))
    referred = {name for _, a in parsed.attributes for key in ("aria-labelledby", "aria-describedby")
                for name in (a.get(key) or "").split()}  # fmt: skip
    assert referred <= set(parsed.ids)


def test_images_are_well_formed_and_described(page: str) -> None:
    for image in _images(page):
        root = ET.fromstring(image)
        if root.get("aria-hidden") == "true":
            continue
        assert root.get("role") == "img"
        title, description = root.find("title"), root.find("desc")
        assert title.text and title.get("id") == root.get("aria-labelledby")
        assert "holds the same numbers" in description.text
        positions = [float(v[:-1]) for e in root.iter() for v in e.attrib.values() if re.fullmatch(r"-?[\d.]+%", v)]
        assert positions and all(0 <= position <= 100 for position in positions)


def test_verdict_in_words(
    passing_check: CheckReport, failing_check: CheckReport, gated_bench: BenchReport, ungated_bench: BenchReport
) -> None:
    for report, word, headline in (
        (passing_check, "PASS", "Parity check passed"),
        (failing_check, "FAIL", "Parity check failed"),
        (gated_bench, "FAIL", "Latency exceeds the allowance"),
        (ungated_bench, "NOT GATED", "Latency was measured, not gated"),
    ):
        text = Page(_render(report)).text
        assert text.startswith(f"{word} – {headline}")
        assert f"{word} {headline}" in text


def test_a_cpu_run_is_labelled_at_the_top(
    passing_check: CheckReport, gpu_check: CheckReport, gated_bench: BenchReport
) -> None:
    for report in (passing_check, gated_bench):
        text = Page(_render(report)).text
        assert text.index(report.scope) < text.index("Duration")
    assert "only on CPU" not in _render(gpu_check)


def test_names_are_escaped(page: str, hostile: str) -> None:
    assert "<b>" not in page
    assert " ".join(hostile.split()) in Page(page).text


def _expect_rows(page: Page, table: Table) -> None:
    for row in table.rows:
        texts = [" ".join(cell.text.split()) for cell in row.cells]
        assert any(
            len(cells) == len(texts) and all(text in cell for text, cell in zip(texts, cells, strict=True))
            for cells in page.rows
        ), texts


def test_check_shows_every_number_and_reason(failing_check: CheckReport) -> None:
    page = Page(render_check_html(failing_check))
    for table in check_tables.case_tables(failing_check):
        _expect_rows(page, table)
    _expect_rows(page, check_tables.accuracy_table(failing_check))
    _expect_rows(page, provenance.size_table(failing_check.subject))
    for case in failing_check.cases:
        assert all(failure in page.text for failure in case.failures)
    assert "against the base in PyTorch" in page.text and "≥ 100×" in page.text


def test_check_shows_what_was_skipped_and_where(passing_check: CheckReport) -> None:
    text = Page(render_check_html(passing_check)).text
    for part in (*passing_check.skipped, *passing_check.data, passing_check.subject.graph_sha256, "AMD EPYC", "0.17.1"):
        assert part in text


def test_bench_shows_every_number(gated_bench: BenchReport) -> None:
    page = Page(render_bench_html(gated_bench))
    tables = [
        bench_tables.ratio_table,
        bench_tables.swap_table,
        bench_tables.memory_table,
        bench_tables.placement_table,
    ]
    for table in (*(make(gated_bench) for make in tables), *map(bench_tables.latency_table, gated_bench.workloads)):
        _expect_rows(page, table)
    assert all(" ".join(note.split()) in page.text for note in gated_bench.notes)
    assert "120 dots are drawn" in page.text and "1 run off the scale" in page.text


def test_bench_says_what_memory_is_and_what_it_was_timed_against(
    gated_bench: BenchReport, compared_bench: BenchReport
) -> None:
    page = Page(render_bench_html(gated_bench))
    assert "the anonymous memory above what it had before" in page.text and "CUDA's context" not in page.text
    assert [
        "base",
        "CUDAExecutionProvider",
        "168",
        "74 MatMul, 60 Add, 24 SkipLayerNormalization, 5 Gather and 2 other kinds",
    ] in page.rows
    page = Page(render_bench_html(compared_bench))
    assert "on the GPU, all that the process holds there" in page.text
    assert {"dynamic ÷ against", "dynamic, on the GPU"} <= {row[0] for row in page.rows}
    assert "yesterday/topic-kind" in page.text and "aa11" * 16 in page.text


def test_missing_parts_leave_no_empty_sections(empty_check: CheckReport, ungated_bench: BenchReport) -> None:
    empty, ungated = Page(render_check_html(empty_check)), Page(render_bench_html(ungated_bench))
    assert not {"findings", "parity", "cases", "accuracy", "skipped", "data"} & set(empty.ids)
    assert not {"findings", "ratio-table", "memory", "placements", "against", "notes"} & set(ungated.ids)
    assert "Changing the adapter was not measured: that takes a dynamic export of two." in ungated.text


def test_tables_of_six_columns_have_the_whole_width(gated_bench: BenchReport) -> None:
    """In half of it, on a screen of 1000 to 1600 pixels, the swaps' allowance and result were cut off."""
    page = render_bench_html(gated_bench)
    for half in re.findall(r'class="columns".*?</section>', page, re.DOTALL):
        heads = re.findall(r"<thead.*?</thead>", half, re.DOTALL)
        assert all(head.count("<th ") <= 2 for head in heads)
        assert 'id="swap"' not in half


def test_a_partial_report_says_so_before_its_numbers(stopped_check: CheckReport, stopped_bench: BenchReport) -> None:
    for report in (stopped_check, stopped_bench):
        text = Page(_render(report)).text
        assert text.startswith("AMBIGUOUS – ")
        assert text.index(f"Partial report: stopped by {report.stopped}.") < text.index("Duration")
    assert "Partial report" not in _render(replace(stopped_check, stopped=None))


def test_size_stays_small(gated_bench: BenchReport) -> None:
    variant = gated_bench.workloads[0].variants[0]
    many = replace(variant, samples_ms=variant.samples_ms * 30)
    workload = replace(gated_bench.workloads[0], variants=(many,) * 6)
    assert len(render_bench_html(replace(gated_bench, workloads=(workload,) * 5))) < 300_000


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_contrast(theme: int) -> None:
    style = files("lora_export.report").joinpath("templates/style.css").read_text("utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    states = ("pass", "fail", "ambiguous", "not-gated")
    pairs = [(ink, paper) for ink in ("ink", "quiet", *states) for paper in ("paper", "ground")]
    pairs += [(state, f"{state}-ground") for state in states] + [("ink", f"{state}-ground") for state in states]
    for ink, paper in pairs:
        lighter, darker = sorted((_luminance(colours[ink]), _luminance(colours[paper])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (ink, paper)
