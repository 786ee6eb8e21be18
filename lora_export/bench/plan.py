"""What a `bench` will time, settled and refused before anything is exported or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.artifact import ExportKind, Manifest, read_manifest
from lora_export.base.tasks import Task
from lora_export.bench.budget import AGAINST, CHANGING, Budget, read_budget
from lora_export.bench.latency import Candidate, Comparison
from lora_export.bench.other_export import OtherExport, read_other_export, vocabulary_of
from lora_export.bench.peer import Peer, is_export, read_peer
from lora_export.bench.shapes import Shape, require_positions, shape_text
from lora_export.bench.workloads import source_length
from lora_export.contract import SINGLE, AdapterInputKind, CacheLayout, GraphContract
from lora_export.errors import InputRefused, UsageProblem
from lora_export.quantization import Method
from lora_export.runtime.session import choose_provider

BASE, EXPORT, MERGED = "base", "export", "merged"
_USUAL_SHAPES = {
    Task.TEXT_GENERATION: ((1, 128, 0), (4, 1, 128)),
    **dict.fromkeys(
        (Task.IMAGE_CLASSIFICATION, Task.SEMANTIC_SEGMENTATION, Task.DEPTH_ESTIMATION), ((1, 0, 0), (8, 0, 0))
    ),
    **dict.fromkeys((Task.CTC, Task.AUDIO_CLASSIFICATION), ((1, 16_000, 0), (4, 16_000, 0))),
    Task.ZERO_SHOT_IMAGE_CLASSIFICATION: ((1, 32, 0), (8, 64, 0)),
    Task.TEXT2TEXT_GENERATION: ((1, 64, 16), (8, 64, 16)),
    Task.SPEECH_RECOGNITION: ((1, 0, 16), (4, 0, 16)),
}
_USUAL_TEXT_SHAPES = ((1, 32, 0), (4, 128, 0), (16, 64, 0))


@dataclass(frozen=True)
class BenchOptions:
    """How to time an export.

    Attributes:
        provider: "cpu" or "cuda"; None for CUDA if usable, else the CPU.
        shapes: (batch, sequence, past) of each workload; the task's usual ones if empty.
        blocks: ABBA blocks for each workload.
        max_ratio: Allowed latency relative to the base, where the budget says nothing; None to report only.
        budget: TOML file of allowances (`bench.budget`).
        against: Another export to time beside this one, or a graph of another tool (a folder or its ONNX file).
    """

    provider: str | None = None
    shapes: Sequence[Shape] = ()
    blocks: int = 30
    max_ratio: float | None = None
    budget: Path | None = None
    against: Path | None = None


@dataclass(frozen=True)
class PlannedRace:
    """Candidates of one shape, the base first, and the ratios to report."""

    shape: Shape
    candidates: tuple[Candidate, ...]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class BenchPlan:
    """What is timed.

    Attributes:
        against: Another export, or the graph of another tool; None if there is none.
        vocabulary: Tokens that every export knows.
    """

    folder: Path
    manifest: Manifest
    against: OtherExport | Peer | None
    options: BenchOptions
    budget: Budget
    vocabulary: int
    races: tuple[PlannedRace, ...]

    @property
    def compared(self) -> dict[str, tuple[str, ...]]:
        """What is exported to compare with, by session: the adapters that are folded into each."""
        folded = foldable(self.manifest) if self.manifest.kind is ExportKind.DYNAMIC else None
        return {BASE: ()} if folded is None else {BASE: (), MERGED: (folded,)}

    def graphs_of(self, session: str) -> Mapping[str, GraphContract]:
        """What a session runs; the base and the merged form take inputs as the export does."""
        return (self.against if session == AGAINST and self.against is not None else self.manifest).graphs


def plan_bench(folder: Path, options: BenchOptions) -> BenchPlan:
    """Read the manifests and the budget.

    Raises:
        InputRefused: The folder is no export, the two do not run the same task on the same inputs, the other takes an
            input that there are no values for, or the budget limits something that is not measured.
    """
    manifest = read_manifest(folder)
    choose_provider(options.provider)
    budget = Budget(max_ratio=options.max_ratio)
    if options.budget is not None:
        budget = read_budget(options.budget, options.max_ratio)
    shapes = options.shapes or _USUAL_SHAPES.get(Task(manifest.task), _USUAL_TEXT_SHAPES)
    other = None if options.against is None else _read_other(folder, manifest, options.against, shapes=shapes)
    require_positions(folder, manifest, shapes)
    _require_runnable(shapes, *(each.graphs for each in (manifest, other) if each is not None))
    lengths = {(n, length, past): (n, source_length(manifest.graphs, length), past) for n, length, past in shapes}
    races = tuple(
        _planned(manifest, other, budget=budget, asked=asked, shape=shape) for asked, shape in lengths.items()
    )
    _require_matches(budget, manifest, dict(zip(lengths, races, strict=True)))
    known = (vocabulary_of(folder), None if other is None else other.vocabulary)
    vocabulary = min(n for n in known if n is not None)
    return BenchPlan(folder, manifest, other, options, budget, vocabulary, races)


def _read_other(folder: Path, manifest: Manifest, against: Path, *, shapes: Sequence[Shape]) -> OtherExport | Peer:
    if is_export(against):
        return read_other_export(against, folder, manifest)
    return read_peer(against, manifest.graphs, shapes)


def _require_runnable(shapes: Sequence[Shape], *others: Mapping[str, GraphContract]) -> None:
    """Refuse what a graph runs row by row, so that there is no one run to time."""
    if not any(graphs[SINGLE].cache_layout is CacheLayout.TOKENS for graphs in others if SINGLE in graphs):
        return
    for shape in shapes:
        batch, sequence, past = shape
        if batch > 1 and sequence > 1 and past > 0:
            raise UsageProblem(
                "Several rows with several new tokens each on a cache are run row by row: there is no one run to time",
                where=f"--shape {shape_text(shape)}",
                next_step=f"time one row (1x{sequence}@{past}) or one new token a row ({batch}x1@{past})",
            )


def foldable(manifest: Manifest) -> str | None:
    """The first adapter of a dynamic export that `merge` takes; None if it takes none.

    It takes no adapter that is active for some tokens only, and none that adds a bias to a module without one. A graph
    that another tool quantized takes none, and none with the integers of a quantized base.
    """
    if manifest.quantization is not None and manifest.quantization.method in (Method.GIVEN, Method.AS_STORED):
        return None
    biases = [entry for entry in manifest.adapter_inputs if entry.kind is AdapterInputKind.BIAS]
    bare = {entry.module for entry in biases if not entry.base_has_default}
    for record in manifest.adapters:
        if record.invocation_tokens is None and not bare.intersection(record.targets):
            return record.name
    return None


def candidates(manifest: Manifest, batch: int) -> list[Candidate]:
    """What to time of an export for a batch of this size, the base first."""
    names = [record.name for record in manifest.adapters]
    found = [Candidate("base", "the base alone, exported the same way", BASE)]
    if manifest.kind is ExportKind.MERGED:
        summed = f"{' + '.join(names)} folded into the weights"
        found.append(Candidate("merged", summed, EXPORT) if names else Candidate("export", "the base alone", EXPORT))
        return found
    folded = foldable(manifest)
    if folded is not None:
        found.append(Candidate("merged", f"{folded} folded into the weights", MERGED))
    found.append(Candidate("dynamic, no adapter", "every adapter input at its default", EXPORT))
    if names:
        served = folded or names[0]
        found.append(Candidate("dynamic", f"{served} for every row", EXPORT, served))
    if batch > 1 and len(names) > 1:
        rows = [names[row % len(names)] for row in range(batch)]
        found.append(Candidate("mixed rows", f"{len(set(rows))} adapters, another in each row", EXPORT, rows))
        changing = "the same, but in every run each row has the next row's adapter of the run before"
        found.append(Candidate(CHANGING, changing, EXPORT, rows, is_changing=True))
    return found


def compared_with_base(found: Sequence[Candidate], allow: Mapping[str, float | None]) -> list[Comparison]:
    """Every candidate but the first against the first, which is the base; `allow` holds allowances by name."""
    return [Comparison(each.name, found[0].name, allow.get(each.name)) for each in found[1:]]


def _planned(
    manifest: Manifest,
    other: OtherExport | Peer | None,
    *,
    budget: Budget,
    asked: Shape,
    shape: Shape,
) -> PlannedRace:
    """`asked` is the shape as the user and the budget name it."""
    found = candidates(manifest, shape[0])
    comparisons = compared_with_base(found, {each.name: budget.ratio(asked, each.name) for each in found})
    if other is not None:
        own = [each for each in found if each.session == EXPORT]
        served_here = next((each for each in own if isinstance(each.adapters, str)), own[0])
        folded = [record.name for record in manifest.adapters] if manifest.kind is ExportKind.MERGED else []
        served = [served_here.adapters] if isinstance(served_here.adapters, str) else folded
        found.append(other.candidate(served))
        comparisons.append(Comparison(served_here.name, AGAINST, budget.ratio(asked, AGAINST)))
        if other.is_of_base:
            comparisons.append(Comparison(found[0].name, AGAINST))
    return PlannedRace(shape, tuple(found), tuple(comparisons))


def _require_matches(budget: Budget, manifest: Manifest, races: Mapping[Shape, PlannedRace]) -> None:
    """Refuse an allowance for what this bench does not measure: it would pass without ever being looked at."""

    def ratios(race: PlannedRace) -> list[str]:
        return [AGAINST if each.reference == AGAINST else each.variant for each in race.comparisons]

    def refuse_unknown(names: Mapping[str, float], known: Sequence[str], part: str, *, what: str) -> None:
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputRefused(
                f"The budget limits {what} that this bench does not measure",
                where=f"{budget.where}: {part}",
                found=unknown[0],
                expected=", ".join(dict.fromkeys(known)) or "none",
                next_step="name it as the report does, or take the line out"
                + (" (or give --against FOLDER)" if unknown[0] == AGAINST else ""),
            )

    refuse_unknown(budget.ratios, [name for race in races.values() for name in ratios(race)], "ratio", what="a variant")
    known = {shape_text(shape): race for shape, race in races.items()}
    refuse_unknown({shape_text(shape): 0 for shape in budget.shape_ratios}, list(known), "ratio", what="a shape")
    for shape, table in budget.shape_ratios.items():
        refuse_unknown(table, ratios(races[shape]), f'ratio."{shape_text(shape)}"', what="a variant")
    swaps = ("bound", "loaded") if manifest.kind is ExportKind.DYNAMIC and len(manifest.adapters) > 1 else ()
    refuse_unknown(budget.swap_us, swaps, "swap_us", what="a swap")
    others = [AGAINST] if AGAINST in (name for race in races.values() for name in ratios(race)) else []
    if budget.difference is not None:
        refuse_unknown({AGAINST: budget.difference}, others, "difference", what="a difference")
    variants = [each.name for race in races.values() for each in race.candidates]
    for place, table in budget.memory_mb.items():
        part = "memory_mb" if place == "process" else "device_memory_mb"
        refuse_unknown(table, variants, part, what="the memory of a variant")
