"""What `mutations.py` found: a cell for each damaged export, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from damages import DAMAGES
from graph_damages import GRAPH_DAMAGES
from results import RESULTS
from sound_exports import SoundExport
from subjects import DTYPES

from lora_export.artifact import versions
from lora_export.check.results import ParityCase

RESULT = RESULTS / "mutations.json"
EVERY = (*DAMAGES, *GRAPH_DAMAGES)
# What a failure says, and the measure that it is of.
_MEASURES = {
    "NaN or infinite": "not finite",
    "shapes differ": "shapes",
    "what PyTorch itself loses": "error over rounding",
    "the error is": "error",
    "the perplexity is": "perplexity",
    "the distributions differ": "KL",
    "the best class agrees": "top-1",
    "the adapter has no effect": "effect",
    "of the adapter's effect arrives": "share of the effect",
    "greedy tokens agree": "greedy tokens",
}


@dataclass(frozen=True)
class Cell:
    """What `check` said of one damaged export.

    Attributes:
        case: The first case that failed; "" where none did, "refused" where the export was.
        measures: All that failed in any case.
        error, sound_error: The largest error over the output's size in any case, and that before the damage; infinite
            as None.
        seconds: Damage and check.
    """

    damage: str
    option: str
    architecture: str
    task: str
    dtype: str
    kind: str
    case: str
    measures: tuple[str, ...]
    error: float | None
    sound_error: float | None
    seconds: float

    @property
    def caught(self) -> bool:
        return bool(self.case)

    @property
    def key(self) -> tuple[str, ...]:
        """What was damaged, and how."""
        return (self.damage, self.option, self.architecture, self.dtype, self.kind)


def measures_of(case: ParityCase) -> Iterator[str]:
    """The measures that `case` failed by.

    Raises:
        LookupError: A failure is of no measure that this script knows.
    """
    for failure in case.failures:
        known = [measure for phrase, measure in _MEASURES.items() if phrase in failure]
        if not known:
            raise LookupError(f"name the measure of this failure in _MEASURES: {failure}")
        yield known[0]


def markdown(cells: Sequence[Cell], sound: Sequence[SoundExport]) -> str:
    """Damages by dtype, how many of how many were caught, and by what; and the sound exports in a sentence."""
    dtypes = [dtype for dtype in DTYPES if any(cell.dtype == dtype for cell in cells)]
    lines = ["| damage | " + " | ".join(dtypes) + " | caught by |", "|---|" + "---:|" * len(dtypes) + "---|"]
    for damage in (damage.name for damage in EVERY):
        rows = [cell for cell in cells if cell.damage == damage]
        if rows:
            counts = [_counted([cell for cell in rows if cell.dtype == dtype]) for dtype in dtypes]
            measures = dict.fromkeys(measure for cell in rows for measure in cell.measures)
            lines.append(f"| {damage} | " + " | ".join(counts) + f" | {', '.join(sorted(measures))} |")
    totals = [_counted([cell for cell in cells if cell.dtype == dtype]) for dtype in dtypes]
    lines.append("| all | " + " | ".join(totals) + " | |")
    alarms = sum(not entry.passed for entry in sound)
    return "\n".join(lines) + f"\n\nOf {len(sound)} sound exports {alarms} failed.\n"


def _sound(entry: dict) -> SoundExport:
    return SoundExport(**entry | {name: tuple(entry[name]) for name in ("ranks", "alphas")})


def _counted(cells: Sequence[Cell]) -> str:
    return f"{sum(cell.caught for cell in cells)} of {len(cells)}" if cells else "–"


def write_result(cells: Sequence[Cell], sound: Sequence[SoundExport], not_run: dict[str, str]) -> None:
    """`results/mutations.json`, a line for each cell and each sound export."""
    head = json.dumps({"versions": versions(), "not_run": not_run}, indent=1)[:-2]
    rows = {"cells": [asdict(cell) for cell in cells], "sound": [asdict(entry) for entry in sound]}
    parts = [f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in of) + "\n ]" for name, of in rows.items()]
    RESULT.write_text(head + ",\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def among_recorded(cells: Sequence[Cell], sound: Sequence[SoundExport]) -> tuple[Sequence[Cell], Sequence[SoundExport]]:
    """These and what was recorded of others before."""
    if not RESULT.is_file():
        return cells, sound
    old_cells, old_sound = read_result()
    by_export = {cell.key: cell for cell in (*old_cells, *cells)}
    return list(by_export.values()), list({entry.seed: entry for entry in (*old_sound, *sound)}.values())


def read_result() -> tuple[list[Cell], list[SoundExport]]:
    """What `results/mutations.json` holds."""
    fields = json.loads(RESULT.read_text(encoding="utf-8"))
    cells = [Cell(**entry | {"measures": tuple(entry["measures"])}) for entry in fields["cells"]]
    return cells, [_sound(entry) for entry in fields["sound"]]
