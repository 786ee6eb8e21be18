"""A worker's work: it reads adapters, packs them and compares them, each when it is told to."""

from __future__ import annotations

from lora_export.errors import EnvironmentUnusable, LoraExportError
from lora_export.export.plan import make_plan
from lora_export.export.resolve import resolve
from lora_export.fleet.answering import Work
from lora_export.fleet.assignments import Assignment, Trial
from lora_export.fleet.outcomes import AdapterOutcome, Outcome
from lora_export.fleet.sources import refusal
from lora_export.fleet.workbench import Workbench


def work() -> Work:
    """The outcome of each assignment, with what was opened for the one before where it is the same fleet's."""
    benches: dict[str, Workbench] = {}  # opened for the first adapter, whose time has that on top

    def outcome(assignment: Assignment) -> AdapterOutcome:
        if isinstance(assignment, Trial):
            return _read(assignment)
        key = repr(assignment.job)
        if key not in benches:
            benches.clear()
            benches[key] = Workbench(assignment.job)
        return benches[key].outcome(assignment)

    return outcome


def _read(trial: Trial) -> AdapterOutcome:
    try:
        resolve(make_plan(trial.request))
    except EnvironmentUnusable:
        raise
    except LoraExportError as error:
        return refusal(trial.name, trial.given, error)
    return AdapterOutcome(trial.name, trial.given, Outcome.SERVED)
