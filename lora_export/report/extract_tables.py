"""The words, tables and plot of an `extract`."""

from __future__ import annotations

from collections.abc import Iterable

from lora_export.extract.results import ExtractReport, ModuleResult
from lora_export.report import format as fmt
from lora_export.report.curves import Curve, curve_plot
from lora_export.report.tables import Cell, Column, Table, TableRow, fraction

_MOST_POINTS = 60
_DESCRIPTION = (
    "Curves on logarithmic scales: the relative error that remains of each module's difference against the rank of its "
    "pair, thin; the median and the largest over all modules, bold. The table “Pairs” holds the errors at their ranks."
)


def remaining(error: float) -> str:
    """A relative error: 45.1%, and below a thousandth 3.2e-07."""
    return fmt.share(error) if error >= 1e-3 else fmt.scientific(error)


def extract_summary(report: ExtractReport) -> str:
    """What was extracted and how near it is, in one sentence or two."""
    differ = report.n_tensors - report.n_equal
    sentence = f"{differ} of {fmt.counted(report.n_tensors, 'tensor')} differ. "
    if report.modules:
        worst = max(report.modules, key=lambda module: module.error)
        sentence += (
            f"{fmt.counted(len(report.modules), 'LoRA pair')} ({report.asked}) leave {remaining(report.error)} of "
            f"the difference, {remaining(worst.error)} at worst ({fmt.plain(worst.module)}). "
        )
    if report.wholes:
        sentence += f"{fmt.counted(len(report.wholes), 'module')} saved whole. "
    if report.left_out:
        sentence += f"{fmt.counted(len(report.left_out), 'parameter')} left as the base has them. "
    return sentence.strip()


def extract_figures(report: ExtractReport) -> tuple[tuple[str, str], ...]:
    ranks = sorted({module.rank for module in report.modules})
    shown = "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return (
        ("Remaining error", remaining(report.error)),
        ("Ranks", shown),
        ("Adapter", fmt.byte_size(report.n_bytes)),
        ("Fine-tune", fmt.byte_size(report.n_bytes_tuned)),
        ("Duration", fmt.duration(report.seconds)),
    )


def extract_facts(report: ExtractReport) -> tuple[tuple[str, str], ...]:
    return (
        ("Adapter", report.folder),
        ("Asked for", report.asked),
        ("Task", report.task),
        ("Base", report.base),
        ("Fine-tune", report.tuned),
        ("Started", report.started_at),
    )


def pair_table(report: ExtractReport) -> Table:
    """Every pair: rank, what it could be, how large the difference is, what remains of it."""
    columns = (
        Column("Module", numeric=False),
        Column("Shape", wide=True),
        Column("Rank"),
        Column("Full rank", wide=True),
        Column("‖ΔW‖"),
        Column("Remaining error"),
    )
    most = max((module.error for module in report.modules), default=0.0)
    rows = tuple(
        TableRow(
            (
                Cell(module.module, "" if module.kind == "linear" else "embedding"),
                Cell(" × ".join(map(str, module.shape))),
                Cell(str(module.rank)),
                Cell(str(module.full_rank)),
                Cell(f"{module.norm:.3g}"),
                Cell(remaining(module.error), bar=fraction(module.error, most)),
            )
        )
        for module in report.modules
    )
    return Table("Pairs", columns, rows)


def whole_table(report: ExtractReport) -> Table:
    columns = (Column("Module", numeric=False), Column("Why", numeric=False), Column("Elements"))
    rows = tuple(TableRow((Cell(w.module), Cell(w.why), Cell(f"{w.n_elements:,}"))) for w in report.wholes)
    return Table("Saved whole, exactly", columns, rows)


def left_out_table(report: ExtractReport) -> Table:
    columns = (Column("Parameter", numeric=False), Column("Kind", numeric=False), Column("‖ΔW‖ ÷ ‖W0‖"))
    rows = tuple(
        TableRow((Cell(x.parameter), Cell(x.kind), Cell(fmt.MISSING if x.change is None else remaining(x.change))))
        for x in report.left_out
    )
    return Table("Left out: the base's values stay", columns, rows)


def error_plot(report: ExtractReport) -> str:
    """An SVG of error against rank; empty without a pair."""
    if not report.modules:
        return ""
    curves = [Curve(module.module, "each", _points(enumerate(module.curve))) for module in report.modules]
    if len(report.modules) > 1:
        curves.append(Curve("largest", "worst", _points(zip(report.ranks, report.worst_curve(), strict=True))))
        curves.append(Curve("median", "middle", _points(zip(report.ranks, report.median_curve(), strict=True))))
    curves = [curve for curve in curves if curve.points]
    return curve_plot(
        "rank", "Remaining error by rank", _DESCRIPTION, curves=curves, x_title="rank", y_title="‖ΔW − BA‖ ÷ ‖ΔW‖"
    )


def _points(pairs: Iterable[tuple[int, float]]) -> list[tuple[float, float]]:
    """Points with a place on logarithmic axes, evenly thinned over the logarithm of the rank, first and last kept."""
    points = [(float(rank), error) for rank, error in pairs if rank and error > 0]
    chosen = {round(len(points) ** (n / (_MOST_POINTS - 1))) - 1 for n in range(_MOST_POINTS)}
    return [points[n] for n in sorted(chosen) if n < len(points)]


def rank_sentence(report: ExtractReport) -> str:
    """How far the curves reach."""
    incomplete: list[ModuleResult] = [module for module in report.modules if not module.complete]
    if not incomplete:
        return "Every curve ends at full rank, where what remains is the rounding of float32."
    return (
        f"The curves of {fmt.counted(len(incomplete), 'large module')} end where their decomposition was stopped; "
        "--exact takes them to full rank."
    )
