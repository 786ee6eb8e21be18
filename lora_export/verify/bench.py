"""`bench`: base, merged, dynamic and mixed rows, timed side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_export.artifact import Kind, Manifest, read_manifest
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.runtime.seq2seq_session import open_export
from lora_export.verify.bench_results import BenchReport
from lora_export.verify.environment import environment, subject
from lora_export.verify.latency import Candidate, Race, Session, measure, measure_swap
from lora_export.verify.workloads import source_length, workload_inputs

_USUAL_SHAPES = {
    Task.TEXT_GENERATION: ((1, 128, 0), (4, 1, 128)),
    Task.IMAGE_CLASSIFICATION: ((1, 0, 0), (8, 0, 0)),
    Task.ZERO_SHOT_IMAGE_CLASSIFICATION: ((1, 32, 0), (8, 64, 0)),
    Task.TEXT2TEXT_GENERATION: ((1, 64, 16), (8, 64, 16)),
    Task.SPEECH_RECOGNITION: ((1, 0, 16), (4, 0, 16)),
}
_USUAL_TEXT_SHAPES = ((1, 32, 0), (4, 128, 0), (16, 64, 0))
_BINDING = "inputs, adapters and outputs bound on the device"
_THREADS = "those of an idle session rest"


@dataclass(frozen=True)
class BenchRequest:
    """What to time.

    Attributes:
        folder: The export.
        base: The base alone, exported the same way.
        merged: The base with a dynamic export's first adapter folded in; None if there is no such thing.
        shapes: (batch, sequence, past); empty for the task's usual ones.
        blocks: ABBA blocks for each workload.
        max_ratio: Allowed ratio to the base; None to report only.
    """

    folder: Path
    base: Path
    merged: Path | None
    provider: str | None
    shapes: tuple[tuple[int, int, int], ...]
    blocks: int
    max_ratio: float | None


def run_bench(request: BenchRequest, progress: Callable[[str, int, int], None]) -> BenchReport:
    """Open one session for each variant and time them together, workload by workload.

    Raises:
        EnvironmentUnusable: The provider is not usable, or would not run the compute.
    """
    started = time.monotonic()
    manifest = read_manifest(request.folder)
    folders = {"base": request.base, "export": request.folder}
    if request.merged is not None:
        folders["merged"] = request.merged
    openers = {
        name: partial(open_export, folder, request.provider, stop_spinning=True) for name, folder in folders.items()
    }
    sessions, memory = _open_one_by_one(openers)
    export = sessions["export"]
    described = environment(export.provider, export.provider_reason, {"binding": _BINDING, "threads": _THREADS})
    task = Task(manifest.task)
    vocabulary = json.loads((request.folder / "config.json").read_text(encoding="utf-8")).get("vocab_size", 2)
    shapes = [
        (batch, source_length(manifest.graphs, sequence), past)
        for batch, sequence, past in request.shapes or _USUAL_SHAPES.get(task, _USUAL_TEXT_SHAPES)
    ]
    races = [
        Race(shape, workload_inputs(manifest.graphs, vocabulary, *shape), candidates(manifest, shape[0]))
        for shape in shapes
    ]
    swap = measure_swap(export, shapes[-1][0]) if manifest.kind is Kind.DYNAMIC else None
    notes = _notes(export, manifest)
    del export
    sessions.clear()  # the rounds open their own
    workloads = measure(
        openers, races, blocks=request.blocks, max_ratio=request.max_ratio, progress=partial(progress, "timing")
    )
    progress("timing", 1, 1)
    return BenchReport(
        subject=subject(request.folder, manifest),
        environment=described,
        workloads=tuple(workloads),
        swap=swap,
        memory_mb=memory,
        notes=notes,
        seconds=time.monotonic() - started,
    )


def _open_one_by_one(
    openers: Mapping[str, Callable[[], Session]],
) -> tuple[dict[str, Session], dict[str, float]]:
    """The sessions, and the anonymous memory that each took, megabytes."""
    sessions, memory = {}, {}
    for name, opener in openers.items():
        before = _resident_anonymous_mb()
        sessions[name] = opener()
        memory[name] = _resident_anonymous_mb() - before
    return sessions, memory


def candidates(manifest: Manifest, batch: int) -> list[Candidate]:
    """What to time of an export for a batch of this size, the base first."""
    names = [record.name for record in manifest.adapters]
    found = [Candidate("base", "the base alone, exported the same way", "base")]
    if manifest.kind is Kind.MERGED:
        if names:
            found.append(Candidate("merged", f"{' + '.join(names)} folded into the weights", "export"))
        return found
    if names:
        found.append(Candidate("merged", f"{names[0]} folded into the weights", "merged"))
    found.append(Candidate("dynamic, no adapter", "every adapter input at its default", "export"))
    if names:
        found.append(Candidate("dynamic", f"{names[0]} for every row", "export", names[0]))
    if batch > 1 and len(names) > 1:
        rows = [names[row % len(names)] for row in range(batch)]
        found.append(Candidate("mixed rows", f"{len(set(rows))} adapters, another in each row", "export", rows))
    return found


def _notes(export: Session, manifest: Manifest) -> tuple[str, ...]:
    notes = []
    if manifest.task in SEQ2SEQ:
        notes.append(
            "A run is the encoder over the source and one step of the decoder on the past; no text is written."
        )
    if manifest.provider != export.provider:
        notes.append(f"The graph is fused for {manifest.provider} and ran on {export.provider}: not its best speed.")
    return tuple(notes)


def _resident_anonymous_mb() -> float:
    """This process's anonymous resident memory, megabytes (mapped files do not count); 0 where unknown."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)
