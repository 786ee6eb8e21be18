"""What an earlier run of a fleet found, so that what did not change is not done again; and one fleet a folder.

    OUT/reports/fleet/outcomes.jsonl   one line for each adapter that the export was last made with
    OUT/reports/fleet/graph.json       what its graph was made from

Until a run ends, its work lies in `.OUT.fleet` beside OUT, where a run that was stopped is taken up again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lora_export.artifact import REPORTS
from lora_export.errors import EnvironmentUnusable
from lora_export.fleet.outcomes import AdapterOutcome
from lora_export.folders import lock, put_back
from lora_export.staging import write_whole

_KEPT = "fleet"
_OUTCOMES, _GRAPH = "outcomes.jsonl", "graph.json"
# Names of what a fleet keeps of an earlier run, from its folder.
RECORDS = tuple(f"{REPORTS}/{_KEPT}/{name}" for name in (_OUTCOMES, _GRAPH))


def work_folder(out: Path) -> Path:
    """Where a run works before it publishes."""
    return out.absolute().parent / f".{out.name}.fleet"


def before(out: Path) -> Path:
    """Where the fleet that is replaced lies for a moment."""
    return work_folder(out) / "before"


def take_up(out: Path) -> None:
    """Put back the fleet of a run that was stopped in that moment; of one that was stopped later, forget it."""
    put_back(out, before(out))


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Only one fleet at a time works on `out`.

    Raises:
        EnvironmentUnusable: Another does.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".{out.name}.fleet.lock"
    with path.open("w", encoding="utf-8") as file:
        if not lock(file.fileno(), wait=False):
            raise EnvironmentUnusable(
                "Another fleet is being made in this folder",
                where=str(out),
                found=f"{path} is locked",
                next_step="wait for it, or name another folder with -o",
            )
        yield


def hash_of(facts: object) -> str:
    """sha256 of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def kept_graph(folder: Path) -> Mapping[str, object]:
    """What the graph in `folder` was made from; empty if that is not known."""
    try:
        return json.loads((folder / REPORTS / _KEPT / _GRAPH).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def keep_graph(folder: Path, facts: Mapping[str, object]) -> None:
    _write(folder / REPORTS / _KEPT / _GRAPH, json.dumps(facts, indent=2, sort_keys=True) + "\n")


def kept_outcomes(folder: Path) -> dict[str, AdapterOutcome]:
    """What is known of adapters, by name; a line that cannot be read is left out, so its adapter is done again."""
    try:
        lines = (folder / REPORTS / _KEPT / _OUTCOMES).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    found = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            outcome = AdapterOutcome.from_dict(json.loads(line))
            found[outcome.name] = outcome
    return found


def add_outcome(folder: Path, outcome: AdapterOutcome) -> None:
    """Keep what became of one adapter, as soon as that is known."""
    path = folder / REPORTS / _KEPT / _OUTCOMES
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(outcome))


def keep_outcomes(folder: Path, outcomes: Iterable[AdapterOutcome]) -> None:
    """Keep these and no others."""
    _write(folder / REPORTS / _KEPT / _OUTCOMES, "".join(map(_line, outcomes)))


def _line(outcome: AdapterOutcome) -> str:
    return json.dumps(outcome.to_dict(), sort_keys=True) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
