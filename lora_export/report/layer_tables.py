"""Where a `check` differs, and its error by layer: tables, plot and sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lora_export.check.divergence_results import ComparedValue, Divergence, LayerErrors
from lora_export.check.results import CheckReport
from lora_export.report import format as fmt
from lora_export.report.curves import Curve, curve_plot
from lora_export.report.tables import Cell, Column, Table, TableRow, fraction, verdict_cell
from lora_export.verdict import Verdict

_TITLE = "Error by layer"
_SUMMARY = "Error by layer, in short"
_DESCRIPTION = (
    "Curves over the modules in the order in which PyTorch computes them, on a logarithmic scale: the relative error "
    "of each module's output on one row, thin for each adapter and the base; the largest over all of them, bold. "
    f"The table “{_TITLE}” of each holds the same numbers."
)
# A page that shows more rows than this at once is not read.
_MOST_OPEN = 60
_MOST_UNSEEN = 4


def layer_summary(report: CheckReport) -> Table:
    """One row for each adapter and the base: how many modules were compared, and the largest error."""
    columns = (
        Column("Adapter", numeric=False),
        Column("Modules"),
        Column("Median relative"),
        Column("Largest relative"),
        Column("In", numeric=False),
    )
    rows = []
    for layers in report.layers:
        worst, errors = layers.worst, [module.error_relative for module in layers.modules]
        median = statistics.median(errors) if errors and not any(map(math.isnan, errors)) else math.nan
        figures = (str(len(errors)), fmt.scientific(median), fmt.scientific(worst and worst.error_relative))
        where = fmt.MISSING if worst is None else worst.module
        rows.append(TableRow((Cell(layers.name, layers.row), *map(Cell, figures), Cell(where))))
    return Table(_SUMMARY, columns, tuple(rows))


def layer_table(layers: LayerErrors) -> Table:
    """Every module of one adapter, in the order of the computation."""
    columns = (Column("Module", numeric=False), Column("Error"), Column("Relative"), Column("Node", numeric=False))
    most = max((m.error_relative for m in layers.modules if math.isfinite(m.error_relative)), default=0.0)
    rows = tuple(
        TableRow(
            (
                Cell(module.module),
                Cell(fmt.scientific(module.error)),
                Cell(fmt.scientific(module.error_relative), bar=fraction(module.error_relative, most)),
                Cell(module.op_type, module.node),
            )
        )
        for module in layers.modules
    )
    return Table(f"{_TITLE}: {layers.name}", columns, rows)


def layers_open(report: CheckReport) -> bool:
    """Whether a page shows the tables of all layers at once."""
    return sum(len(layers.modules) for layers in report.layers) <= _MOST_OPEN


def unseen_sentences(report: CheckReport) -> tuple[str, ...]:
    """What is left out of the error by layer, one sentence for each adapter."""
    found = []
    for layers in report.layers:
        if layers.not_seen:
            shown = list(layers.not_seen[:_MOST_UNSEEN])
            rest = len(layers.not_seen) - len(shown)
            names = ", ".join(shown) + (f" and {rest} more" if rest else "")
            found.append(
                f"{layers.name}: no value of the graph is the output of {names}, so they have no error of their own."
            )
    return tuple(found)


def layer_plot(report: CheckReport) -> str:
    """An SVG of relative error against depth; empty where every error is 0, or nothing was compared."""
    curves = [Curve(layers.name, "each", _points(layers.modules)) for layers in report.layers]
    if len(report.layers) > 1:
        curves.append(Curve("largest", "worst", _largest(report.layers)))
    curves = [curve for curve in curves if curve.points]
    x_title = "modules, in the order of the computation"
    return curve_plot(
        "layers", _TITLE, _DESCRIPTION, curves=curves, x_title=x_title, y_title="relative error", log_x=False
    )


def _points(modules: Sequence[ComparedValue]) -> list[tuple[float, float]]:
    """What has a place on a logarithmic axis."""
    errors = enumerate((module.error_relative for module in modules), 1)
    return [(float(place), error) for place, error in errors if math.isfinite(error) and error > 0]


def _largest(all_layers: Sequence[LayerErrors]) -> list[tuple[float, float]]:
    found: dict[float, float] = {}
    for layers in all_layers:
        for place, error in _points(layers.modules):
            found[place] = max(error, found.get(place, 0.0))
    return sorted(found.items())


def divergence_table(divergence: Divergence | None) -> Table:
    """The intermediate tensors around the first diverging node, in the order in which PyTorch computes them."""
    columns = (
        Column("Module", numeric=False),
        Column("What", numeric=False),
        Column("Result", numeric=False),
        Column("Error"),
        Column("Relative"),
        Column("Shape", wide=True),
        Column("Value", numeric=False, wide=True),
    )
    compared = () if divergence is None else divergence.compared
    return Table("Intermediate tensors", columns, tuple(TableRow(_cells(value)) for value in compared))


def _cells(value: ComparedValue) -> tuple[Cell, ...]:
    exported, reference = (" × ".join(map(str, shape)) for shape in (value.exported_shape, value.reference_shape))
    return (
        Cell(value.module or "the model"),
        Cell(value.what),
        verdict_cell(Verdict.FAIL if value.diverges else Verdict.PASS),
        Cell(fmt.scientific(value.error)),
        Cell(fmt.scientific(value.error_relative)),
        Cell(exported, "" if exported == reference else f"PyTorch: {reference}"),
        Cell(value.value, f"{value.op_type} {value.node}".strip()),
    )


def divergence_facts(divergence: Divergence | None) -> tuple[tuple[str, str], ...]:
    """Label and value of the first diverging node; nothing where none was found."""
    if divergence is None or not divergence.found:
        return ()
    return (
        ("Case", divergence.case),
        ("Row", divergence.row),
        ("Module", divergence.module or "the model itself"),
        ("Node", f"{divergence.op_type} {divergence.node} in {divergence.graph}.onnx"),
        ("Gives", divergence.value),
        ("Reads", ", ".join(divergence.reads)),
        ("Agree before it", ", ".join(divergence.agreed)),
        ("Rounding is", f"at most {divergence.limit:.0e} of a tensor's largest value"),
    )


def where_sentences(report: CheckReport, case: str) -> tuple[str, ...]:
    """Where `case` differs first, or why that is not known; nothing for cases that were not looked into."""
    divergence = report.divergence
    if divergence is None or divergence.case != case:
        return ()
    return (f"First difference: {divergence.sentence}" if divergence.found else divergence.sentence,)


def reproduction_sentences(report: CheckReport) -> tuple[str, ...]:
    """How to see the difference without PyTorch; nothing where no script was written."""
    divergence = report.divergence
    if divergence is None or divergence.reproduction is None:
        return ()
    shown = divergence.reproduction
    error, tolerance = fmt.scientific(shown.error), fmt.scientific(shown.tolerance)
    return (
        f"python {report.subject.folder}/{shown.script} shows it with onnxruntime and numpy alone: {shown.output} "
        f"differs by {error}, where {tolerance} is tolerated.",
    )
