"""The tables of a `check`."""

from __future__ import annotations

from lora_export.check.judge.tolerances import MEASURES, limits_from_below
from lora_export.check.results import CheckReport, ParityCase
from lora_export.report import format as fmt
from lora_export.report.summary import case_verdict
from lora_export.report.tables import Cell, Column, Row, Table, verdict_cell

_GROUPS = {
    "base": "Base without an adapter",
    "adapter": "One adapter at a time",
    "rows": "Adapters mixed within a batch",
    "sequence": "Adapters changed between runs",
    "decoding": "Decoding with a cache",
    "merged-dynamic": "Merged against dynamic",
}


def cases_by_group(report: CheckReport) -> dict[str, list[ParityCase]]:
    """Cases by the heading of their group, in order of first appearance."""
    found: dict[str, list[ParityCase]] = {}
    for case in report.cases:
        found.setdefault(_GROUPS.get(case.group, case.group), []).append(case)
    return found


def case_table(report: CheckReport, *, with_accuracy: bool = True) -> Table:
    """Every comparison: largest differences of the outputs, KL in nats, shares as percentages."""
    columns = (
        Column("Case", numeric=False),
        Column("Result", numeric=False),
        Column("Error"),
        Column("Relative"),
        Column("÷ rounding"),
        Column("Effect"),
        Column("Effect ÷ error", wide=True),
        Column("Effect share", wide=True),
        Column("KL"),
        Column("Top-1"),
        Column("Accuracy"),
        Column("Rows", wide=True),
    )
    rows = tuple(Row(_case_cells(case), group) for group, cases in cases_by_group(report).items() for case in cases)
    table = Table("All comparisons", columns, rows)
    wanted = [i for i, column in enumerate(columns) if with_accuracy or column.title != "Accuracy"]
    return table.keep(wanted).filled()


def _case_cells(case: ParityCase) -> tuple[Cell, ...]:
    return (
        Cell(case.name, f"against {case.reference}" if case.reference else ""),
        verdict_cell(case_verdict(case)),
        Cell(fmt.scientific(case.error)),
        _limited(fmt.scientific(case.error_relative), "≤", fmt.scientific(case.tolerance)),
        _limited(fmt.factor(case.rounding_ratio), "≤", fmt.factor(case.rounding_ratio_maximum)),
        Cell(fmt.scientific(case.effect)),
        _limited(fmt.multiple(case.effect_ratio), "≥", fmt.multiple(case.effect_ratio_minimum)),
        _limited(fmt.share(case.effect_share), "±", fmt.scientific(case.effect_share_tolerance)),
        _limited(fmt.scientific(case.kl), "≤", fmt.scientific(case.kl_tolerance)),
        _limited(fmt.share(case.top1), "≥", fmt.share(case.top1_tolerance)),
        Cell(_accuracies(case)),
        Cell(str(case.n_rows)),
    )


def _accuracies(case: ParityCase) -> str:
    if case.accuracy_reference is None and case.accuracy_exported is None:
        return fmt.MISSING
    return f"{fmt.share(case.accuracy_reference)} → {fmt.share(case.accuracy_exported)}"


def accuracy_table(report: CheckReport) -> Table:
    """Accuracy on labelled data where it was measured; the difference in percentage points."""
    columns = (
        Column("Case", numeric=False), Column("PyTorch"), Column("ONNX Runtime"), Column("Difference"), Column("Rows"),
    )  # fmt: skip
    rows = []
    for case in report.cases:
        reference, exported = case.accuracy_reference, case.accuracy_exported
        if reference is None and exported is None:
            continue
        difference = None if reference is None or exported is None else exported - reference
        texts = (case.name, fmt.share(reference), fmt.share(exported), fmt.points(difference), str(case.n_rows))
        rows.append(Row(tuple(map(Cell, texts))))
    return Table("Accuracy on labelled data (difference in percentage points)", columns, tuple(rows))


def perplexity_table(report: CheckReport) -> Table:
    """Perplexity on the data of a language model, and PyTorch's at a wider dtype (on the first batches)."""
    columns = (
        Column("Case", numeric=False), Column("PyTorch"), Column("ONNX Runtime"), Column("Relative difference"),
        Column("PyTorch, wider dtype"),
    )  # fmt: skip
    rows = []
    for case in report.cases:
        if case.perplexity_reference is None:
            continue
        cells = (
            Cell(case.name),
            Cell(fmt.significant(case.perplexity_reference)),
            Cell(fmt.significant(case.perplexity_exported)),
            _limited(fmt.scientific(case.perplexity_difference), "≤", fmt.scientific(case.perplexity_tolerance)),
            Cell(fmt.significant(case.rounding.perplexity if case.rounding else None)),
        )
        rows.append(Row(cells))
    return Table("Perplexity", columns, tuple(rows)).filled()


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
            theirs, mine = (getattr(case.rounding, f"{name}_{side}") for side in ("reference", "exported"))
            if theirs is not None:
                rows.append(Row((Cell(title), Cell(text(theirs)), Cell(text(mine))), case.name))
    return Table("Distance from PyTorch at a wider dtype", columns, tuple(rows))


def gate_table(report: CheckReport) -> Table:
    """The limits, and why."""
    columns = (Column("Measure", numeric=False), Column("Limit"), Column("Reason", numeric=False))
    rows = []
    for gate in report.gates:
        sign = "≥" if limits_from_below(gate.measure) else "≤"
        limit = fmt.MISSING if gate.limit is None else f"{sign} {gate.limit:g}"
        rows.append(Row((Cell(gate.measure, MEASURES[gate.measure]), Cell(limit), Cell(gate.reason))))
    return Table("Gates", columns, tuple(rows))


def _limited(text: str, sign: str, limit: str) -> Cell:
    return Cell(text, "" if limit == fmt.MISSING else f"{sign} {limit}")
