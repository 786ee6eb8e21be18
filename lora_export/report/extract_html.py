"""The report of an `extract`: a self-contained HTML page and JSON beside it."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from lora_export.extract.results import ExtractReport
from lora_export.report import extract_tables as tables
from lora_export.report.as_json import render_json
from lora_export.report.pages import page
from lora_export.report.provenance import pair_table
from lora_export.verdict import Verdict


def render_extract_html(report: ExtractReport) -> str:
    """The extraction as a page."""
    hashes = {f"{which}: {name}": digest for which, files in report.sha256.items() for name, digest in files.items()}
    return page(
        "extract.html",
        verdict=Verdict.NOT_GATED,
        headline="A full fine-tune as an adapter",
        report=report,
        summary=tables.extract_summary(report),
        figures=tables.extract_figures(report),
        facts=tables.extract_facts(report),
        plot=Markup(tables.error_plot(report)),
        rank_sentence=tables.rank_sentence(report),
        pairs=tables.pair_table(report),
        wholes=tables.whole_table(report),
        left_out=tables.left_out_table(report),
        hashes=pair_table("SHA-256", "File", hashes),
        versions=pair_table("Versions", "Distribution", report.versions),
    )


def write_extract_reports(report: ExtractReport, folder: Path) -> dict[str, Path]:
    """Write `extract.html` and `extract.json`; the paths by suffix. Both are rendered before either is written."""
    contents = {"html": render_extract_html(report), "json": render_json(report)}
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for suffix, text in contents.items():
        written[suffix] = folder / f"extract.{suffix}"
        written[suffix].write_text(text, encoding="utf-8", newline="\n")
    return written
