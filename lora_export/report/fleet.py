"""The report of a fleet: a page with all adapters, JSON, CSV and JUnit XML."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import math
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from markupsafe import Markup

from lora_export.artifact import ADAPTERS
from lora_export.fleet.outcomes import AdapterOutcome, FleetReport, Outcome
from lora_export.report import format as fmt
from lora_export.report.as_json import render_json
from lora_export.report.pages import page
from lora_export.report.provenance import environment_facts, pair_table
from lora_export.report.scatter import Point, scatter_plot
from lora_export.report.tables import Cell, Column, Table, TableRow, verdict_cell
from lora_export.staging import write_whole
from lora_export.verdict import Verdict

_VERDICTS = {
    Outcome.SERVED: Verdict.PASS,
    Outcome.REFUSED: Verdict.NOT_GATED,
    Outcome.FAILED: Verdict.FAIL,
    Outcome.BROKEN: Verdict.FAIL,
}
# On a terminal; the page has all.
_MOST_REMARKS = 6
# What needs a look first.
_ORDER = (Outcome.FAILED, Outcome.BROKEN, Outcome.REFUSED, Outcome.SERVED)
# Shows the rows whose name holds what is typed; the page's only script, allowed by its hash.
_FILTER = """
const field = document.getElementById("filter");
field.hidden = false;
field.addEventListener("input", () => {
  for (const row of document.querySelectorAll("#all-adapters tbody tr:not(.group)"))
    row.hidden = !row.querySelector("th").textContent.includes(field.value);
});
"""
_DESCRIPTION = (
    "A point for each adapter: how much it changes the base's outputs in PyTorch, and the largest difference between "
    "the export and PyTorch. The table below has both numbers."
)
_FIELDS = {
    "name": str, "outcome": str, "reason": str, "given": str, "largest_error": float, "largest_effect": float,
    "n_rows": int, "n_bytes": int, "seconds": float, "attempts": int, "reused": bool,
    "remarks": str,
}  # fmt: skip


def fleet_verdict(report: FleetReport) -> Verdict:
    """Fail if an adapter differs from PEFT or broke its workers; else pass, what was refused being the list's."""
    return Verdict.FAIL if report.exit_code == 1 else Verdict.PASS


def fleet_summary(report: FleetReport) -> str:
    """The counts in a sentence or two."""
    counts = {outcome: n for outcome, n in report.counted().items() if n}
    said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
    reused = sum(adapter.reused for adapter in report.adapters)
    kept = f" {reused} {'was' if reused == 1 else 'were'} known from an earlier run." if reused else ""
    if report.n_unchanged:
        kept = f" {report.n_unchanged} more {'is as it was' if report.n_unchanged == 1 else 'are as they were'}."
    return f"{fmt.counted(len(report.adapters), 'adapter')}: {said or 'nothing to do'}.{kept}"


def reason_table(report: FleetReport) -> Table:
    """How often each reason was given."""
    reasons = Counter((adapter.outcome, _why(adapter)) for adapter in report.adapters if adapter.reason)
    columns = (Column("Reason", numeric=False), Column("Adapters"))
    ordered = sorted(reasons.items(), key=lambda entry: (_ORDER.index(entry[0][0]), -entry[1]))
    rows = tuple(TableRow((Cell(str(why)), Cell(str(n))), str(outcome)) for (outcome, why), n in ordered)
    return Table("Reasons", columns, rows)


def _why(adapter: AdapterOutcome) -> str:
    """The reason without the adapter's own name, as others give it too."""
    return str(adapter.detail.get("what") or adapter.reason).replace(f"Adapter {adapter.name!r}", "An adapter")


def remark_table(report: FleetReport) -> Table:
    """How often each remark was made on adapters that are not refused."""
    columns = (Column("Remark", numeric=False), Column("Adapters"))
    rows = tuple(TableRow((Cell(said), Cell(str(len(names))))) for said, names in _remarked(report))
    return Table("Remarks", columns, rows)


def _remarked(report: FleetReport) -> list[tuple[str, list[str]]]:
    """Each remark without its adapter's name, as others have it too, and whom it is of; the most frequent first."""
    found: dict[str, list[str]] = {}
    for adapter in report.adapters:
        for remark in adapter.remarks:
            found.setdefault(_of_any(adapter.name, remark), []).append(adapter.name)
    return sorted(found.items(), key=lambda entry: -len(entry[1]))


def _of_any(name: str, remark: str) -> str:
    return remark.replace(f"adapter {name!r}", "an adapter").replace(f"{ADAPTERS}/{name}/", f"{ADAPTERS}/NAME/")


def adapter_table(report: FleetReport) -> Table:
    """Every adapter, what needs a look first."""
    columns = (
        Column("Adapter", numeric=False),
        Column("Outcome", numeric=False),
        Column("Error"),
        Column("Effect"),
        Column("Rows", wide=True),
        Column("Size"),
        Column("Time", wide=True),
        Column("Reason and remarks", numeric=False),
    )
    ordered = sorted(report.adapters, key=lambda adapter: (_ORDER.index(adapter.outcome), adapter.name))
    return Table("All adapters", columns, tuple(TableRow(_cells(adapter)) for adapter in ordered))


def _cells(adapter: AdapterOutcome) -> tuple[Cell, ...]:
    return (
        Cell(adapter.name, "from an earlier run" if adapter.reused else ""),
        verdict_cell(_VERDICTS[adapter.outcome]) if adapter.outcome is not Outcome.REFUSED else Cell("refused"),
        Cell(fmt.scientific(adapter.largest_error)),
        Cell(fmt.scientific(adapter.largest_effect)),
        Cell(str(adapter.n_rows) if adapter.n_rows else fmt.MISSING),
        Cell(fmt.byte_size(adapter.n_bytes) if adapter.n_bytes else fmt.MISSING),
        Cell(fmt.duration(adapter.seconds)),
        Cell(adapter.reason or "", "; ".join(adapter.remarks)),
    )


def effect_plot(report: FleetReport) -> str:
    """Error against effect, a point an adapter."""
    compared = [a for a in report.adapters if _is_positive(a.largest_effect) and a.largest_error is not None]
    smallest = min((a.largest_error for a in compared if _is_positive(a.largest_error)), default=None)
    points = [
        Point(
            a.name, a.largest_effect, a.largest_error or smallest, "error" if a.outcome is Outcome.SERVED else "effect"
        )
        for a in compared
        if smallest is not None and math.isfinite(a.largest_error)
    ]
    return scatter_plot("effects", "Error by effect", _DESCRIPTION, points=points, x_title="effect", y_title="error")


def _is_positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def render_fleet_html(report: FleetReport) -> str:
    """The fleet as a page."""
    slowest = max(report.adapters, key=lambda adapter: adapter.seconds, default=None)
    done = [adapter for adapter in report.adapters if not adapter.reused]
    figures = [(str(outcome).capitalize(), str(n)) for outcome, n in report.counted().items()]
    figures += [
        ("Bytes of adapters", fmt.byte_size(sum(adapter.n_bytes for adapter in report.adapters))),
        ("Duration", fmt.duration(report.seconds)),
    ]
    if slowest is not None:
        figures.append(("Slowest", f"{slowest.name}, {fmt.duration(slowest.seconds)}"))
    if done and report.seconds_packing > 0:
        figures.append(("Adapters a second", f"{len(done) / report.seconds_packing:.1f}"))
    facts = (("List", report.source), ("Folder", report.folder), ("Base", report.base), ("Task", report.task))
    digest = base64.b64encode(hashlib.sha256(_FILTER.encode()).digest()).decode()
    return page(
        "fleet.html",
        report=report,
        verdict=fleet_verdict(report),
        headline=f"A fleet of {fmt.counted(len(report.adapters), 'adapter')}",
        summary=fleet_summary(report),
        figures=figures,
        facts=(*facts, ("Workers", str(report.n_workers)), ("Kinds", str(report.n_kinds))),
        environment_facts=environment_facts(report.environment),
        plot=Markup(effect_plot(report)),
        reasons=reason_table(report),
        remarks=remark_table(report),
        adapters=adapter_table(report),
        versions=pair_table("Versions", "Distribution", report.environment.versions),
        script=Markup(_FILTER),
        script_hash=digest,
    )


def render_fleet_csv(report: FleetReport) -> str:
    """A row for each adapter, in the list's order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_FIELDS)
    writer.writerows(_row(adapter).values() for adapter in report.adapters)
    return text.getvalue()


def _row(adapter: AdapterOutcome) -> dict[str, object]:
    return {name: getattr(adapter, name) for name in _FIELDS} | {"remarks": "; ".join(adapter.remarks) or None}


def render_fleet_parquet(report: FleetReport) -> bytes | None:
    """As `render_fleet_csv`, with types; None without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return None
    types = {float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_(), str: pyarrow.string()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in _FIELDS.items()])
    rows = [_row(adapter) for adapter in report.adapters]
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
    return file.getvalue()


def render_fleet_junit(report: FleetReport) -> str:
    """A test case for each adapter: a failure where it differs or broke its workers, skipped where it was refused."""
    counts = report.counted()
    n_failed = counts[Outcome.FAILED] + counts[Outcome.BROKEN]
    totals = {
        "tests": str(len(report.adapters)),
        "failures": str(n_failed),
        "errors": "0",
        "time": f"{report.seconds:.3f}",
    }
    root = ET.Element("testsuites", {"name": "lora-export fleet", **totals})
    attributes = {"name": "lora-export fleet", **totals, "skipped": str(counts[Outcome.REFUSED])}
    suite = ET.SubElement(root, "testsuite", attributes | {"timestamp": report.environment.started_at})
    for adapter in report.adapters:
        case = {"classname": "lora-export.fleet", "name": fmt.plain(adapter.name), "time": f"{adapter.seconds:.6f}"}
        element = ET.SubElement(suite, "testcase", case)
        if adapter.outcome is not Outcome.SERVED:
            tag = "skipped" if adapter.outcome is Outcome.REFUSED else "failure"
            said = fmt.plain(adapter.reason or str(adapter.outcome))
            ET.SubElement(element, tag, {"type": str(adapter.outcome), "message": said}).text = said
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def render_fleet_text(report: FleetReport) -> str:
    """For a terminal: the counts, then what needs a look."""
    lines = [fleet_summary(report)]
    shown = [adapter for adapter in report.adapters if adapter.outcome is not Outcome.SERVED]
    shown.sort(key=lambda adapter: (_ORDER.index(adapter.outcome), adapter.name))
    lines += [f"  {adapter.outcome:<8}{adapter.name}: {fmt.plain(adapter.reason or '')}" for adapter in shown[:20]]
    if len(shown) > 20:
        lines.append(f"  and {len(shown) - 20} more: see the report")
    remarks = _remarked(report)
    for said, names in remarks[:_MOST_REMARKS]:
        whom = names[0] if len(names) == 1 else fmt.counted(len(names), "adapter")
        lines.append(f"  remark  {fmt.plain(whom)}: {fmt.plain(said)}")
    if len(remarks) > _MOST_REMARKS:
        lines.append(f"  and {len(remarks) - _MOST_REMARKS} other remarks: see the report")
    return "\n".join(lines) + "\n"


def write_fleet_reports(report: FleetReport, folder: Path) -> dict[str, Path]:
    """Write `fleet.html`, `.json`, `.csv`, `.junit.xml` and, with pyarrow, `.parquet`; the paths by suffix."""
    contents = {
        "html": render_fleet_html(report),
        "json": render_json(report),
        "csv": render_fleet_csv(report),
        "junit.xml": render_fleet_junit(report),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = {suffix: write_whole(folder / f"fleet.{suffix}", text) for suffix, text in contents.items()}
    table = folder / "fleet.parquet"
    table.unlink(missing_ok=True)  # an earlier run's, where this one cannot write it
    if (parquet := render_fleet_parquet(report)) is not None:
        written["parquet"] = write_whole(table, parquet)
    return written
