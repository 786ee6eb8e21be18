"""`bench`: base, merged, dynamic and mixed rows, timed side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_export.artifact import Kind, Manifest
from lora_export.base.tasks import Task
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.verify.environment import environment, subject
from lora_export.verify.latency import Subject, measure, measure_swap
from lora_export.verify.results import BenchReport
from lora_export.verify.workloads import random_inputs

_USUAL_SHAPES = {
    Task.TEXT_GENERATION: ((1, 128, 0), (4, 1, 128)),
    Task.IMAGE_CLASSIFICATION: ((1, 0, 0), (8, 0, 0)),
}
_USUAL_TEXT_SHAPES = ((1, 32, 0), (4, 128, 0), (16, 64, 0))


@dataclass(frozen=True)
class BenchRequest:
    """What to time.

    Attributes:
        folder: The export.
        base: The base alone, exported the same way.
        merged: The base with the export's first adapter folded in (equal to `base` if it has none).
        shapes: (batch, sequence, past); empty for the task's usual ones.
        blocks: ABBA blocks for each workload.
        max_ratio: Allowed ratio to the base; None to report only.
    """

    folder: Path
    base: Path
    merged: Path
    provider: str | None
    shapes: tuple[tuple[int, int, int], ...]
    blocks: int
    max_ratio: float | None


def run_bench(request: BenchRequest, progress: Callable[[str, int, int], None]) -> BenchReport:
    """Open one session for each variant and time them together, workload by workload.

    Raises:
        EnvironmentUnusable: The provider is not usable, or would not run the compute.
    """
    memory: dict[str, float] = {}

    def opened(label: str, folder: Path) -> AdapterSession:
        before = _resident_anonymous_mb()
        session = AdapterSession(folder, request.provider)
        memory[label] = _resident_anonymous_mb() - before
        return session

    base = opened("base", request.base)
    export = opened("export", request.folder)
    manifest = export.manifest
    merged = opened("merged", request.merged) if manifest.kind is Kind.DYNAMIC else export
    task = Task(manifest.task)
    vocabulary = json.loads((request.folder / "config.json").read_text(encoding="utf-8")).get("vocab_size", 2)
    shapes = request.shapes or _USUAL_SHAPES.get(task, _USUAL_TEXT_SHAPES)
    workloads, inputs = [], {}
    for done, shape in enumerate(shapes):
        inputs = random_inputs(manifest.contract, vocabulary, *shape)
        subjects = _subjects(base, merged, export, manifest, shape[0])

        def step(block: int, blocks: int, done: int = done) -> None:
            progress("timing", done * blocks + block, len(shapes) * blocks)

        workloads.append(
            measure(subjects, inputs, shape, blocks=request.blocks, max_ratio=request.max_ratio, progress=step)
        )
    progress("timing", 1, 1)
    bound = "inputs, adapters and outputs bound on the device"
    return BenchReport(
        subject=subject(request.folder, manifest),
        environment=environment(export.provider, export.provider_reason, {"binding": bound}),
        workloads=tuple(workloads),
        swap=measure_swap(export, inputs) if manifest.kind is Kind.DYNAMIC else None,
        memory_mb=memory,
        notes=_notes(export, manifest),
        seconds=0.0,
    )


def _subjects(
    base: AdapterSession, merged: AdapterSession, export: AdapterSession, manifest: Manifest, batch: int
) -> list[Subject]:
    first = manifest.adapters[0].name if manifest.adapters else None
    found = [Subject("base", "the base alone, exported the same way", base)]
    if first is not None:
        found.append(Subject("merged", f"{first} folded into the weights", merged))
    if manifest.kind is Kind.MERGED:
        return found
    found.append(Subject("dynamic, no adapter", "every adapter input at its default", export))
    if first is not None:
        found.append(Subject("dynamic", f"{first} for every row", export, first))
    names = [record.name for record in manifest.adapters]
    if batch > 1 and len(names) > 1:
        rows = [names[row % len(names)] for row in range(batch)]
        found.append(Subject("mixed rows", f"{len(set(rows))} adapters, another in each row", export, rows))
    return found


def _notes(export: AdapterSession, manifest: Manifest) -> tuple[str, ...]:
    notes = []
    if manifest.provider != export.provider:
        notes.append(f"The graph is fused for {manifest.provider} and ran on {export.provider}: not its best speed.")
    if export.provider == "cpu":
        notes.append("Measured on a CPU: says nothing about a GPU.")
    return tuple(notes)


def _resident_anonymous_mb() -> float:
    """This process's anonymous resident memory, megabytes (mapped files do not count); 0 where unknown."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)
