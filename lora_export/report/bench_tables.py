"""The tables of a `bench`."""

from __future__ import annotations

import math

from lora_export.report import format as fmt
from lora_export.report.summary import ratio_name
from lora_export.report.tables import Cell, Column, Row, Table, fraction, verdict_cell
from lora_export.verify.bench_results import BenchReport, Ratio, Workload


def latency_table(workload: Workload) -> Table:
    """Time of one run by variant, from the raw samples."""
    columns = (
        Column("Variant", numeric=False),
        Column("Median"),
        Column("5% of runs below"),
        Column("95% of runs below"),
        Column("Fastest", wide=True),
        Column("Slowest", wide=True),
        Column("Rows per second" if workload.sequence else "Images per second"),
        Column("Runs"),
    )
    rows = []
    for variant in workload.variants:
        marks = [fmt.milliseconds(fmt.quantile(variant.samples_ms, at)) for at in (0.05, 0.95, 0, 1)]
        figures = (fmt.milliseconds(variant.median_ms), *marks, fmt.rate(variant.rows_per_second))
        cells = (Cell(variant.name, variant.description), *map(Cell, figures), Cell(str(len(variant.samples_ms))))
        rows.append(Row(cells))
    return Table(f"Latency of {workload.name}", columns, tuple(rows))


def ratio_table(report: BenchReport) -> Table:
    """Paired latency ratios with their intervals."""
    columns = (
        Column("Ratio", numeric=False),
        Column("Result", numeric=False),
        Column("Median"),
        Column("Interval"),
        Column("Confidence"),
        Column("Allowance"),
        Column("Blocks"),
    )
    rows = tuple(Row(_ratio_cells(ratio), workload.name) for workload in report.workloads for ratio in workload.ratios)
    return Table("Latency ratios", columns, rows)


def _ratio_cells(ratio: Ratio) -> tuple[Cell, ...]:
    texts = (
        fmt.ratio(ratio.median),
        fmt.interval(ratio.low, ratio.high),
        fmt.share(ratio.confidence),
        fmt.ratio(ratio.allowance),
        str(len(ratio.block_ratios)),
    )
    return (Cell(ratio_name(ratio)), verdict_cell(ratio.verdict), *map(Cell, texts))


def swap_table(report: BenchReport) -> Table:
    columns = (Column("Adapter", numeric=False), Column("Median"), Column("Swaps"))
    swap = report.swap
    times = {"held by the session": swap.bound_us, "read from its file first": swap.loaded_us} if swap else {}
    rows = [Row((Cell(name), Cell(fmt.microseconds(time)), Cell(str(swap.n)))) for name, time in times.items() if swap]
    return Table("Changing the adapter", columns, tuple(rows))


def memory_table(report: BenchReport) -> Table:
    """Resident anonymous memory of one session."""
    columns = (Column("Variant", numeric=False), Column("Memory"))
    most = max(filter(math.isfinite, report.memory_mb.values()), default=0)
    rows = tuple(
        Row((Cell(name), Cell(fmt.megabytes(size), bar=fraction(size, most))))
        for name, size in report.memory_mb.items()
    )
    return Table("Memory of one session", columns, rows)
