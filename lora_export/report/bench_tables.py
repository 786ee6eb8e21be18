"""The tables of a `bench`."""

from __future__ import annotations

import math

from lora_export.bench.results import BenchReport, ProviderOperators, Ratio, Workload
from lora_export.contract import SINGLE
from lora_export.report import format as fmt
from lora_export.report.allowances import SWAP_NAMES, difference_name, memory_name, ratio_name
from lora_export.report.tables import Cell, Column, Table, TableRow, fraction, verdict_cell
from lora_export.report.widths import is_wide
from lora_export.verdict import Verdict

_SHOWN_KINDS = 4


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
        rows.append(TableRow(cells))
    return Table(f"Latency of {workload.name}", columns, tuple(rows))


def variant_sentences(report: BenchReport) -> tuple[str, ...]:
    """What runs in each variant: which adapter "dynamic" was."""
    found = {f"{v.name}: {v.description}": None for workload in report.workloads for v in workload.variants}
    return tuple(found)


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
    rows = tuple(
        TableRow(_ratio_cells(ratio), workload.name) for workload in report.workloads for ratio in workload.ratios
    )
    return Table("Latency ratios", columns, rows)


def _ratio_cells(ratio: Ratio) -> tuple[Cell, ...]:
    texts = (
        fmt.ratio(ratio.median),
        ("wide: " if is_wide(ratio) else "") + fmt.interval(ratio.low, ratio.high),
        fmt.share(ratio.confidence),
        fmt.ratio(ratio.allowance),
        str(len(ratio.block_ratios)),
    )
    return (Cell(ratio_name(ratio)), verdict_cell(ratio.verdict), *map(Cell, texts))


def swap_table(report: BenchReport) -> Table:
    columns = (Column("Adapter", numeric=False), Column("Median"), Column("Interval"), Column("Swaps"))
    rows = []
    for swap in report.swaps:
        interval = f"{fmt.microseconds(swap.low_us)} to {fmt.microseconds(swap.high_us)}"
        texts = (SWAP_NAMES[swap.name], fmt.microseconds(swap.median_us), interval, str(len(swap.samples_us)))
        rows.append((tuple(map(Cell, texts)), fmt.microseconds(swap.allowance_us), swap.verdict))
    return _with_verdicts("Changing the adapter", columns, rows)


def memory_table(report: BenchReport) -> Table:
    """Peaks of one session, by where it holds them."""
    columns = (Column("Variant", numeric=False), Column("Peak"))
    most = max((m.peak_mb for m in report.memory if math.isfinite(m.peak_mb)), default=0)
    rows = [
        (
            (Cell(memory_name(memory)), Cell(fmt.megabytes(memory.peak_mb), bar=fraction(memory.peak_mb, most))),
            fmt.megabytes(memory.allowance_mb),
            memory.verdict,
        )
        for memory in report.memory
    ]
    return _with_verdicts("Memory of one session", columns, rows)


def _with_verdicts(
    caption: str, columns: tuple[Column, ...], rows: list[tuple[tuple[Cell, ...], str, Verdict]]
) -> Table:
    """Rows with their allowance and verdict; without these columns where no row has any."""
    if all(verdict is Verdict.NOT_GATED for _, _, verdict in rows):
        return Table(caption, columns, tuple(TableRow(cells) for cells, _, _ in rows))
    columns = (*columns, Column("Allowance"), Column("Result", numeric=False))
    with_all = [TableRow((*cells, Cell(allowance), verdict_cell(verdict))) for cells, allowance, verdict in rows]
    return Table(caption, columns, tuple(with_all))


def difference_table(report: BenchReport) -> Table:
    """How far the other's outputs lie from this export's, by workload."""
    columns = (
        Column("Outputs on the same inputs", numeric=False),
        Column("Compared", numeric=False),
        Column("Largest difference"),
        Column("÷ largest value"),
    )
    rows = [
        (
            (
                Cell(difference_name(each)),
                Cell(", ".join(each.outputs) or fmt.MISSING),
                Cell(fmt.scientific(each.largest)),
                Cell(fmt.scientific(each.share)),
            ),
            fmt.scientific(each.allowance),
            each.verdict,
        )
        for each in report.differences
    ]
    return _with_verdicts("Is it the same model?", columns, rows)


def placement_table(report: BenchReport) -> Table:
    """Operators of each timed session by the execution provider that runs them."""
    columns = (
        Column("Session", numeric=False),
        Column("Provider", numeric=False),
        Column("Operators"),
        Column("Most frequent", numeric=False),
    )
    rows = tuple(
        TableRow((Cell(_session_name(p)), Cell(p.provider), Cell(str(p.n_operators)), Cell(most_frequent(p))))
        for p in report.placements
    )
    return Table("Operators by provider", columns, rows)


def placement_sentences(report: BenchReport) -> tuple[str, ...]:
    """The same table, a sentence for each row."""
    return tuple(
        f"{_session_name(p)}: {fmt.counted(p.n_operators, 'operator')} on {p.provider} ({most_frequent(p)})"
        for p in report.placements
    )


def _session_name(placement: ProviderOperators) -> str:
    return placement.session if placement.graph == SINGLE else f"{placement.session}, {placement.graph}"


def most_frequent(placement: ProviderOperators) -> str:
    """The kinds of which there are most, and how many other kinds there are; the JSON has them all."""
    kinds = [f"{n} {kind}" for kind, n in placement.operators.items()]
    rest = len(kinds) - _SHOWN_KINDS
    return ", ".join(kinds[:_SHOWN_KINDS]) + (f" and {fmt.counted(rest, 'other kind')}" if rest > 0 else "")
