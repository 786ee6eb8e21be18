"""Does `check` catch what it must, and does it pass what is right? Exports damaged on purpose, and sound ones.

    python ci/benchmarks/mutations.py                                        # all; writes results/mutations.json
    python ci/benchmarks/mutations.py --architecture llama --damage alpha    # some; only prints, unless --record

Every damage (`damages.py`, `graph_damages.py`) is done to every export that it applies to (`subjects.py`), the
manifest's hash rewritten as if the tool had been wrong, and `check` is run: it is caught if the verdict is "fail" or
the export is refused. Then 200 sound exports of other seeds, ranks, scales and strengths must all pass
(`sound_exports.py`). the docs' table is written with the result. The exit code is 1 if a damage was missed or a sound
export failed.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import torch
import transformers
from adapter_values import read_trained
from architectures import CATALOGUE, make_base
from damages import Damage
from graph_damages import GraphDamage
from mutation_results import (
    EVERY,
    RESULT,
    Cell,
    among_recorded,
    markdown,
    measures_of,
    write_result,
)
from readme_tables import write_into_readme
from sound_exports import SoundExport, sound_exports
from stored_tensors import change_graph
from subjects import ARCHITECTURES, DTYPES, Subject, base_arrays, checked, copy_of, export_subject, subjects
from trained_adapters import make_adapter
from wrong_exports import write_values

from lora_export.artifact import ExportKind, read_manifest
from lora_export.check.results import CheckReport
from lora_export.errors import InputRefused, LoraExportError
from lora_export.verdict import Verdict

_RANKS = (3, 6)
N_SOUND = 200


def run_subject(subject: Subject, damages: Sequence[Damage | GraphDamage], base: Path, folder: Path) -> Iterator[Cell]:
    """Every one of `damages` that applies to `subject`.

    Raises:
        RuntimeError: The sound export fails, so that a damage would prove nothing.
    """
    chosen = [damage for damage in damages if _applies(damage, subject)]
    if not chosen:
        return
    made = folder / subject.architecture / subject.option.name
    adapters = [make_adapter(subject.base, subject.option, base, rank, made / f"rank-{rank}") for rank in _RANKS]
    used = adapters[: 1 if subject.kind is ExportKind.MERGED else None]
    sound = made / f"{subject.dtype}-{subject.kind}"
    export_subject(subject, base, used, sound)
    report = checked(sound)
    if isinstance(report, LoraExportError) or report.verdict is not Verdict.PASS:
        raise RuntimeError(f"the sound export of {subject} fails, so nothing is proven by its damages: {report}")
    values = base_arrays(subject, base)
    trained = tuple(read_trained(path, values, conv1d=subject.architecture == "GPT-2") for path in adapters)
    for damage in chosen:
        started = time.monotonic()
        wrong = copy_of(sound, made / "damaged")
        if not _do(damage, wrong, trained, len(used)):
            continue
        found = checked(wrong)
        case, measures, error = _judged(found)
        yield Cell(
            damage.name, subject.option.name, subject.architecture, str(report.subject.task), subject.dtype,
            str(subject.kind), case, measures, error, _largest_error(report), round(time.monotonic() - started, 2),
        )  # fmt: skip


def _applies(damage: Damage | GraphDamage, subject: Subject) -> bool:
    is_for_it = subject.option.name in damage.options and subject.architecture not in damage.not_on
    return is_for_it and (not damage.dtypes or subject.dtype in damage.dtypes)


def _do(damage: Damage | GraphDamage, folder: Path, trained: tuple, n_used: int) -> bool:
    """Damage the export in `folder`; whether there was anything to damage."""
    if isinstance(damage, Damage):
        wrong = damage.change(trained)
        return wrong is not None and write_values(folder, trained[:n_used], wrong[:n_used])
    graphs = read_manifest(folder).graphs
    damaged = [change_graph(folder, name, partial(damage.change, contract=graphs[name])) for name in graphs]
    return any(damaged)


def _judged(found: CheckReport | LoraExportError) -> tuple[str, tuple[str, ...], float | None]:
    """The first failed case, all failed measures, the largest error."""
    if isinstance(found, LoraExportError):
        return "refused", ("refused",), None
    failed = [case for case in found.cases if not case.passed]
    measures = dict.fromkeys(measure for case in failed for measure in measures_of(case))
    return failed[0].name if failed else "", tuple(measures), _largest_error(found)


def _largest_error(report: CheckReport) -> float | None:
    values = (case.value("error", "features") for case in report.cases)
    largest = max(value for value in values if value is not None and not math.isnan(value))
    return largest if math.isfinite(largest) else None


def unavailable(base: Path, folder: Path) -> dict[str, str]:
    """The dtypes that are not exported for the CPU provider, and why."""
    found = {}
    for dtype in DTYPES:
        subject = next(subjects(ARCHITECTURES[:1], (dtype,)))
        try:
            export_subject(subject, base, [], folder / f"bare-{dtype}")
        except InputRefused as error:
            found[dtype] = error.what
    return found


@click.command()
@click.option("--architecture", "architectures", multiple=True, help="Part of an architecture's name; repeatable.")
@click.option("--damage", "names", multiple=True, help="Part of a damage's name; repeatable.")
@click.option("--sound", "n_sound", type=int, help="How many sound exports; 200 if not given, none with a part.")
@click.option("--record", is_flag=True, help="Write the result of a part, too, among the rest.")
def main(architectures: tuple[str, ...], names: tuple[str, ...], n_sound: int | None, record: bool) -> None:
    """Damage exports and check them, or the part of them that is named."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    is_whole = not architectures and not names
    rows = [name for name in ARCHITECTURES if _named(name, architectures)]
    damages = [damage for damage in EVERY if _named(damage.name, names)]
    n_sound = n_sound if n_sound is not None else (N_SOUND if is_whole else 0)
    cells: list[Cell] = []
    sound: list[SoundExport] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bases = {name: make_base(CATALOGUE[name], folder / name / "base") for name in ARCHITECTURES}
        not_run = unavailable(bases[ARCHITECTURES[0]], folder)
        dtypes = [dtype for dtype in DTYPES if dtype not in not_run]
        for dtype, why in not_run.items():
            click.echo(f"{dtype} is not run by the CPU provider: {why}")
        for subject in subjects(rows, dtypes):
            for cell in run_subject(subject, damages, bases[subject.architecture], folder):
                cells.append(cell)
                click.echo(_line(cell))
        for entry in sound_exports(n_sound, bases, dtypes, folder / "sound"):
            sound.append(entry)
            click.echo(entry.line())
    click.echo("\n" + markdown(cells, sound))
    if is_whole or record:
        recorded = (cells, sound) if is_whole else among_recorded(cells, sound)
        write_result(*recorded, not_run)
        write_into_readme("mutations", markdown(*recorded))
        click.echo(f"wrote {RESULT} and the docs' table")
    missed = [cell for cell in cells if not cell.caught]
    for cell in missed:
        click.echo("missed: " + _line(cell))
    if missed or not all(entry.passed for entry in sound):
        raise SystemExit(1)


def _named(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


def _line(cell: Cell) -> str:
    outcome = f"caught by {', '.join(cell.measures)} in {cell.case!r}" if cell.caught else "MISSED"
    where = f"{cell.architecture:<15} {cell.option:<16} {cell.dtype:<8} {cell.kind:<8}"
    error = "inf" if cell.error is None else f"{cell.error:.0e}"
    return f"{where} {cell.damage:<36} {cell.seconds:5.1f} s  error {error}  {outcome}"


if __name__ == "__main__":
    main()
