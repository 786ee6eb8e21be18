"""The report of an `extract` for a terminal."""

from __future__ import annotations

from lora_export.extract.results import ExtractReport
from lora_export.report import extract_tables as tables
from lora_export.report import format as fmt
from lora_export.report.tables import Table


def render_extract_text(report: ExtractReport) -> str:
    """The extraction as text, summary first; ends with a line break."""
    blocks = [
        tables.extract_summary(report),
        *(_aligned(t) for t in (tables.pair_table(report), tables.whole_table(report), tables.left_out_table(report))),
        "\n".join(report.notes),
        f"{report.folder}: {fmt.byte_size(report.n_bytes)}, the fine-tune {fmt.byte_size(report.n_bytes_tuned)}",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _aligned(table: Table) -> str:
    if not table.rows:
        return ""
    table = table.narrow()
    lines = [[column.title for column in table.columns]]
    lines += [[fmt.plain(cell.text) for cell in row.cells] for row in table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    signs = [">" if column.numeric else "<" for column in table.columns]
    rows = ["  ".join(f"{text:{s}{w}}" for text, s, w in zip(line, signs, widths, strict=True)) for line in lines]
    return "\n".join([table.caption, *(f"  {row}".rstrip() for row in rows)])


def describe_text(value: dict) -> str:
    """`extract.describe_extraction` for people."""
    pairs = ", ".join(f"{module} (at most {rank})" for module, rank in list(value["pairs"].items())[:4])
    more = f" and {len(value['pairs']) - 4} more" if len(value["pairs"]) > 4 else ""
    lines = [
        f"would extract an adapter for {value['task']} to {value['folder']}; wrote nothing",
        f"equal    {fmt.counted(value['n_equal'], 'tensor')}",
        f"pairs    {len(value['pairs'])}: {pairs}{more}{', with biases' if value['biases'] else ''}",
        *(f"whole    {module} ({why})" for module, why in value["wholes"].items()),
        *(f"left out {path}" for path in value["left_out"]),
        *(f"note     {note}" for note in value["notes"]),
        f"write    at least {fmt.byte_size(value['bytes'])}",
    ]
    return "\n".join(lines)
