"""The tables of a `check`."""

from __future__ import annotations

from dataclasses import replace

from lora_export.check.judge.tolerances import MEASURES
from lora_export.check.results import COST, CheckReport, Measured, ParityCase
from lora_export.report import format as fmt
from lora_export.report.measure_words import (
    WORDS,
    against_limit,
    limit_text,
    measures_by_title,
    sign_of,
    value_text,
)
from lora_export.report.summary import case_verdict
from lora_export.report.tables import Cell, Column, Table, TableRow, verdict_cell

_GROUPS = {
    "base": "Base without an adapter",
    "adapter": "One adapter at a time",
    "rows": "Adapters mixed within a batch",
    "sequence": "Adapters changed between runs",
    "decoding": "Decoding with a cache",
    "merged-dynamic": "Merged against dynamic",
    "weights": "Quantized weights",
    "deployed": "As deployed, activations rounded to 8 bits",
    COST: "What quantization costs, a gate where a limit is given",
}


def cases_by_group(report: CheckReport) -> dict[str, list[ParityCase]]:
    """Cases by the heading of their group, in order of first appearance."""
    found: dict[str, list[ParityCase]] = {}
    for case in report.cases:
        found.setdefault(_GROUPS.get(case.group, case.group), []).append(case)
    return found


def case_table(report: CheckReport) -> Table:
    """Every comparison: the measure that takes the most of its limit, then all measures, each with its limit."""
    columns = (
        Column("Case", numeric=False),
        Column("Result", numeric=False),
        Column("Nearest to its limit", numeric=False),
        Column("Limit used"),
        *(Column(title, wide=WORDS[names[0]].wide) for title, names in measures_by_title().items()),
        Column("Largest error", wide=True),
        Column("Largest effect", wide=True),
        Column("Accuracy"),
        Column("Rows", wide=True),
    )
    groups = cases_by_group(report).items()
    rows = tuple(TableRow(_case_cells(case), group) for group, cases in groups for case in cases)
    return Table("All comparisons", columns, rows).filled()


def case_tables(report: CheckReport) -> tuple[Table, Table]:
    """The same as two tables for a page, which cuts one of fifteen columns: what decides each case, and its measures.

    The accuracies have a table of their own there.
    """
    table = case_table(report)
    titles = [column.title for column in table.columns]
    measures = [i for i, title in enumerate(titles) if title in measures_by_title()]
    decides = [i for i, title in enumerate(titles) if i not in measures and title != "Accuracy"]
    with_limits = replace(table.keep([0, *measures] if measures else []), caption="Every measure and its limit")
    return table.keep(decides), with_limits if measures else replace(with_limits, rows=())


def _case_cells(case: ParityCase) -> tuple[Cell, ...]:
    nearest = case.nearest
    return (
        Cell(case.name, f"against {case.reference}" if case.reference else ""),
        verdict_cell(case_verdict(case)),
        Cell(fmt.MISSING if nearest is None else against_limit(nearest)),
        Cell(fmt.MISSING if nearest is None else fmt.used(nearest.used)),
        *(_measured_cell(case.measured(*names)) for names in measures_by_title().values()),
        Cell(fmt.scientific(case.largest_error)),
        Cell(fmt.scientific(case.largest_effect)),
        Cell(_accuracies(case)),
        Cell(str(case.n_rows)),
    )


def _measured_cell(measured: Measured | None) -> Cell:
    return Cell(fmt.MISSING) if measured is None else Cell(value_text(measured), limit_text(measured))


def _accuracies(case: ParityCase) -> str:
    if case.accuracy is None:
        return fmt.MISSING
    return f"{fmt.share(case.accuracy.reference)} → {fmt.share(case.accuracy.exported)}"


def accuracy_table(report: CheckReport) -> Table:
    """Accuracy on labelled data where it was measured; the difference in percentage points."""
    columns = (
        Column("Case", numeric=False), Column("PyTorch"), Column("ONNX Runtime"), Column("Difference"), Column("Rows"),
    )  # fmt: skip
    rows = []
    for case in report.cases:
        if case.accuracy is not None:
            reference, exported = case.accuracy.reference, case.accuracy.exported
            difference = fmt.points(exported - reference)
            texts = (case.name, fmt.share(reference), fmt.share(exported), difference, str(case.n_rows))
            rows.append(TableRow(tuple(map(Cell, texts))))
    return Table("Accuracy on labelled data (difference in percentage points)", columns, tuple(rows))


def perplexity_table(report: CheckReport) -> Table:
    """Perplexity on the data of a language model, and PyTorch's at a wider dtype (on the first batches)."""
    columns = (
        Column("Case", numeric=False), Column("PyTorch"), Column("ONNX Runtime"), Column("Relative difference"),
        Column("PyTorch, wider dtype"),
    )  # fmt: skip
    rows = []
    for case in report.cases:
        if case.perplexity is None or case.group == COST:
            continue
        cells = (
            Cell(case.name),
            Cell(fmt.significant(case.perplexity.reference)),
            Cell(fmt.significant(case.perplexity.exported)),
            _measured_cell(case.measured("perplexity")),
            Cell(fmt.significant(case.rounding.perplexity if case.rounding else None)),
        )
        rows.append(TableRow(cells))
    return Table("Perplexity", columns, tuple(rows)).filled()


_COST_COLUMNS = (
    ("KL, nats", "cost_kl"), ("Same first choice", "cost_top1"), ("Perplexity", "cost_perplexity"),
    ("Effect kept", "cost_effect"),
)  # fmt: skip


def cost_table(report: CheckReport) -> Table:
    """Of a quantized export as it runs, against PEFT on the base's floats; the perplexity of both."""
    columns = (Column("Case", numeric=False), *(Column(title) for title, _ in _COST_COLUMNS))
    rows = []
    for case in report.cases:
        if case.group == COST:
            cells = {name: _measured_cell(case.measured(name)) for _, name in _COST_COLUMNS}
            if (both := case.perplexity) is not None:
                shown = f"{fmt.significant(both.reference)} → {fmt.significant(both.exported)}"
                cells["cost_perplexity"] = Cell(shown, cells["cost_perplexity"].note)
            rows.append(TableRow((Cell(case.name), *cells.values())))
    return Table("What quantization costs, against PEFT on the base's floats", columns, tuple(rows)).filled()


_ROUNDING_MEASURES = (
    ("root mean square error", "rms", fmt.scientific),
    ("largest error", "error", fmt.scientific),
    ("mean KL, nats", "kl", fmt.scientific),
    ("same first choice", "top1", fmt.share),
)


def rounding_table(report: CheckReport) -> Table:
    """What PyTorch loses by rounding at the export's dtype, and what the export loses, both against a wider dtype."""
    columns = (Column("Measure", numeric=False), Column("PyTorch"), Column("ONNX Runtime"))
    rows = []
    for case in report.cases:
        for title, name, text in _ROUNDING_MEASURES if case.rounding is not None else ():
            pytorch, exported = (getattr(case.rounding, f"{name}_{side}") for side in ("reference", "exported"))
            if pytorch is not None:
                rows.append(TableRow((Cell(title), Cell(text(pytorch)), Cell(text(exported))), case.name))
    return Table("Distance from PyTorch at a wider dtype", columns, tuple(rows))


def limit_table(report: CheckReport) -> Table:
    """The limits, and why."""
    columns = (Column("Measure", numeric=False), Column("Limit"), Column("Reason", numeric=False))
    rows = []
    for limit in report.limits:
        shown = fmt.MISSING if limit.limit is None else f"{sign_of(limit.measure)} {limit.limit:g}"
        rows.append(TableRow((Cell(limit.measure, MEASURES[limit.measure].meaning), Cell(shown), Cell(limit.reason))))
    return Table("Limits", columns, tuple(rows))
