"""What was examined and where: facts and tables that both reports end with."""

from __future__ import annotations

from lora_export.report import format as fmt
from lora_export.report.tables import Cell, Column, Table, TableRow, fraction
from lora_export.verdict import Environment, Subject


def size_table(subject: Subject) -> Table:
    """Bytes on disk, largest file first, and their sum."""
    columns = (Column("File", numeric=False), Column("Size"))
    most = max(subject.n_bytes.values(), default=0)
    files = sorted(subject.n_bytes.items(), key=lambda entry: (-entry[1], entry[0]))
    rows = [TableRow((Cell(name), Cell(fmt.byte_size(size), bar=fraction(size, most)))) for name, size in files]
    if len(rows) > 1:
        rows.append(TableRow((Cell("all files"), Cell(fmt.byte_size(sum(subject.n_bytes.values()))))))
    return Table("Bytes on disk", columns, tuple(rows))


def subject_facts(subject: Subject) -> tuple[tuple[str, str], ...]:
    """Label and value of what was examined."""
    return (
        ("Export", subject.folder),
        ("Kind", subject.kind),
        ("Task", subject.task),
        ("Data type", subject.dtype),
        ("Base", subject.base),
        ("Adapters", ", ".join(subject.adapters) or "none"),
        ("Fused for", subject.fused_for),
        ("Graph SHA-256", subject.graph_sha256),
    )


def against_facts(other: Subject | None) -> tuple[tuple[str, str], ...]:
    """Label and value of the other export that was timed; empty if there was none."""
    if other is None:
        return ()
    wanted = ("Export", "Kind", "Data type", "Base", "Adapters", "Fused for", "Graph SHA-256")
    return tuple((f"Against: {label}", value) for label, value in subject_facts(other) if label in wanted)


def environment_facts(environment: Environment) -> tuple[tuple[str, str], ...]:
    """Label and value of where it was examined."""
    reason = f" ({environment.provider_reason})" if environment.provider_reason else ""
    return (
        ("Started", environment.started_at),
        ("Provider", f"{environment.provider}{reason}"),
        ("Device", environment.device),
        ("Processor", f"{environment.cpu}, {fmt.counted(environment.n_cores, 'core')}"),
        ("Platform", environment.platform),
        ("Python", environment.python),
    )


def pair_table(caption: str, heading: str, pairs: dict[str, str]) -> Table:
    columns = (Column(heading, numeric=False), Column("Value", numeric=False))
    return Table(caption, columns, tuple(TableRow((Cell(key), Cell(value))) for key, value in sorted(pairs.items())))
