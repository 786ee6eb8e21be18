"""Every architecture with every adapter option, merged and dynamic: exported from a tiny random base, and checked.

    python ci/benchmarks/matrix.py                                        # all of it; writes results/matrix.json
    python ci/benchmarks/matrix.py --architecture llama --option rslora   # some of it; only prints, unless --record

A cell passes if all gates of `check` do, and is refused if the export exits with 3 and names the option. The exit code
is 1 if a cell did not become what the tables (`architectures.py`, `more_architectures.py`, `adapter_options.py`) say.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
import transformers
from adapter_options import MERGED, OPTIONS, REFUSED, SERVED, AdapterOption
from architectures import CATALOGUE, make_base
from model_types import model_type_table
from more_architectures import MORE
from readme_tables import write_into_readme
from results import RESULTS, write_json
from trained_adapters import make_adapter

from lora_export.artifact import versions
from lora_export.check.context import CheckOptions
from lora_export.check.results import CheckReport
from lora_export.errors import InputRefused
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export
from lora_export.verdict import Verdict

RESULT = RESULTS / "matrix.json"
MODES = ("merge", "dynamic")
_RANKS = (3, 6)
# Those of the catalogue are tried with every option, the others with LoRA alone.
ALL = CATALOGUE | MORE


@dataclass(frozen=True)
class Cell:
    """What became of one export.

    Attributes:
        found: "merged" or "served" where all gates passed, "refused", "failed" (a gate), or "broken" (anything else).
        largest_error: Of all cases, in units of the output.
        smallest_effect: Of all cases with an adapter, the same.
        message: The refusal, the failures, or the exception.
        seconds: Adapters, export and check.
    """

    architecture: str
    option: str
    mode: str
    expected: str
    found: str
    cases: int = 0
    largest_error: float | None = None
    smallest_effect: float | None = None
    message: str = ""
    seconds: float = 0.0

    @property
    def as_expected(self) -> bool:
        return self.found == self.expected


def run_cells(
    architectures: Sequence[str], options: Sequence[AdapterOption], folder: Path, done: Collection[tuple[str, str]] = ()
) -> Iterator[Cell]:
    """The cells of the table, one base at a time, in `folder`, without the (architecture, option) in `done`."""
    for name in architectures:
        chosen = [option for option in options if applies(option, name) and (name, option.name) not in done]
        base = make_base(ALL[name], folder / name / "base") if chosen else folder
        for option in chosen:
            yield from run_option(name, option, base, folder / name / option.name)


def recorded_as_expected() -> set[tuple[str, str]]:
    """The (architecture, option) whose cells in the record are all as the tables expect them."""
    cells = read_result() if RESULT.is_file() else []
    options = {option.name: option for option in OPTIONS}

    def is_right(cell: Cell) -> bool:
        option = options.get(cell.option)
        wanted = None if option is None else expected_of(option, cell.architecture, cell.mode)
        return cell.as_expected and cell.found == wanted

    pairs = {(cell.architecture, cell.option) for cell in cells}
    return pairs - {(cell.architecture, cell.option) for cell in cells if not is_right(cell)}


def applies(option: AdapterOption, architecture: str) -> bool:
    """Whether the table has a cell for `option` on `architecture`."""
    if architecture in MORE:
        return option.name == "lora"
    is_chosen = not option.only or architecture in option.only
    return is_chosen and option.config(CATALOGUE[architecture], _RANKS[0]) is not None


def expected_of(option: AdapterOption, architecture: str, mode: str) -> str:
    """What a cell should become."""
    return REFUSED if ALL[architecture].refused else option.expected(architecture, mode)


def run_option(name: str, option: AdapterOption, base: Path, folder: Path) -> Iterator[Cell]:
    """Architecture `name` with `option`, in either mode, in `folder`."""
    for mode in MODES:
        started = time.monotonic()
        expected = expected_of(option, name, mode)
        named = ALL[name].refused or option.named
        # A future keeps whatever is raised, so that one broken cell does not end the table.
        with ThreadPoolExecutor(max_workers=1) as runner:
            future = runner.submit(_run, name, option, base, folder, mode)
        error = future.exception()
        if error is None:
            found = _judged(future.result(), mode)
        elif isinstance(error, InputRefused) and named and named in str(error):
            found = {"found": REFUSED, "message": error.what}
        else:
            found = {"found": "broken", "message": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        yield Cell(name, option.name, mode, expected, **found, seconds=round(time.monotonic() - started, 2))


def _run(name: str, option: AdapterOption, base: Path, folder: Path, mode: str) -> CheckReport:
    torch.set_num_threads(1)  # per thread of Python
    adapters = [make_adapter(ALL[name], option, base, rank, folder / f"rank-{rank}") for rank in _RANKS]
    chosen = tuple((str(path), None) for path in (adapters[:1] if mode == "merge" else adapters))
    export(Request(str(base), chosen, mode, ALL[name].task, option.dtype, "cpu"), ExportOptions(folder / mode))
    merged = folder / "merge" if mode == "dynamic" and (folder / "merge").is_dir() else None
    report, _ = check(folder / mode, SourceOverrides(), CheckOptions(provider="cpu", merged=merged))
    return report


def _judged(report: CheckReport, mode: str) -> dict:
    passed = MERGED if mode == "merge" else SERVED
    errors = [case.largest_error for case in report.cases if case.largest_error is not None]
    effects = [case.largest_effect for case in report.cases if case.largest_effect is not None]
    return {
        "found": passed if report.verdict is Verdict.PASS else "failed",
        "cases": len(report.cases),
        "largest_error": max(error for error in errors if not math.isnan(error)),
        "smallest_effect": min(effects),
        "message": "; ".join(f"{case.name}: {text}" for case in report.cases for text in case.failures),
    }


def markdown(cells: Sequence[Cell]) -> str:
    """Architectures by options: merged and dynamic largest error, or what became of the cell."""
    found = {cell.option for cell in cells}
    options = [option.name for option in OPTIONS if option.name in found]
    lines = ["| | " + " | ".join(options) + " |", "|---" * (len(options) + 1) + "|"]
    for architecture in dict.fromkeys(cell.architecture for cell in cells):
        row = []
        for option in options:
            pair = [cell for cell in cells if (cell.architecture, cell.option) == (architecture, option)]
            row.append(", ".join(dict.fromkeys(map(_shown, pair))) or "–")
        lines.append(f"| {architecture} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def summary(cells: Sequence[Cell]) -> str:
    """A line for each option: on how many architectures it was merged and served, and the largest error of any."""
    lines = ["| option | merged | served as inputs | refused by name | largest error | smallest effect |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for option in dict.fromkeys(cell.option for cell in cells):
        rows = [cell for cell in cells if cell.option == option]
        counts = [sum(cell.found == found for cell in rows) for found in (MERGED, SERVED, REFUSED)]
        errors = [cell.largest_error for cell in rows if cell.largest_error is not None]
        effects = [cell.smallest_effect for cell in rows if cell.smallest_effect is not None]
        figures = [f"{worst(values):.0e}" if values else "–" for worst, values in ((max, errors), (min, effects))]
        lines.append("| " + " | ".join([option, *map(str, counts), *figures]) + " |")
    unexpected = sum(not cell.as_expected for cell in cells)
    architectures = len({cell.architecture for cell in cells})
    lines.append(f"\n{len(cells)} cells over {architectures} architectures, {unexpected} of them not as expected.")
    return "\n".join(lines) + "\n"


def read_result() -> list[Cell]:
    """What `results/matrix.json` holds."""
    return [Cell(**fields) for fields in json.loads(RESULT.read_text(encoding="utf-8"))["cells"]]


def _shown(cell: Cell) -> str:
    if not cell.as_expected:
        return f"**{cell.mode} {cell.found}**"
    return REFUSED if cell.found == REFUSED else f"{cell.largest_error:.0e}"


def recorded(cells: Sequence[Cell], *, keep_others: bool) -> list[dict]:
    """`cells` as JSON values in the table's order, among those of the last record if they are kept."""
    fields = json.loads(RESULT.read_text(encoding="utf-8"))["cells"] if keep_others and RESULT.is_file() else []
    found = {(cell["architecture"], cell["option"], cell["mode"]): cell for cell in fields}
    found |= {(cell.architecture, cell.option, cell.mode): asdict(cell) for cell in cells}
    pairs = [(name, option) for name in ALL for option in OPTIONS if applies(option, name)]
    order = [(name, option.name, mode) for name, option in pairs for mode in MODES]
    return [found[key] for key in order if key in found]


@click.command()
@click.option("--architecture", "architectures", multiple=True, help="Part of an architecture's name; repeatable.")
@click.option("--option", "options", multiple=True, type=click.Choice([option.name for option in OPTIONS]))
@click.option("--record", is_flag=True, help="Write a part of the matrix, too: its cells in results/matrix.json.")
@click.option("--missing", is_flag=True, help="Only what the record lacks or has otherwise than expected; record it.")
def main(architectures: tuple[str, ...], options: tuple[str, ...], record: bool, missing: bool) -> None:
    """Run the matrix, or the part of it that is named."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    columns = [option for option in OPTIONS if not options or option.name in options]
    rows = [name for name in ALL if not architectures or any(a.lower() in name.lower() for a in architectures)]
    is_whole = not architectures and not options and not missing
    is_recorded = is_whole or record or missing
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for cell in run_cells(rows, columns, Path(folder), recorded_as_expected() if missing else ()):
            cells.append(cell)
            numbers = f"error {cell.largest_error:.1e}, effect {cell.smallest_effect:.1e}" if cell.cases else ""
            flag = "" if cell.as_expected else f"  EXPECTED {cell.expected}"
            click.echo(
                f"{cell.architecture:<18} {cell.option:<17} {cell.mode:<8} {cell.found:<8} {cell.seconds:5.1f} s  "
                f"{numbers or cell.message[:90]}{flag}"
            )
            if not cell.as_expected:
                click.echo(f"    {cell.message}")
            if is_recorded and not is_whole:  # so that what stops it loses nothing
                write_json(RESULT, {"versions": versions(), "cells": recorded(cells, keep_others=True)})
    click.echo("\n" + markdown(cells))
    if is_recorded:
        write_json(RESULT, {"versions": versions(), "cells": recorded(cells, keep_others=not is_whole)})
        write_into_readme("matrix", summary(read_result()))
        write_into_readme("model_types", model_type_table(read_result(), ALL))
        click.echo(f"wrote {RESULT} and the docs' tables")
    if not all(cell.as_expected for cell in cells):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
