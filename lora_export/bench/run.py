"""`bench`: base, merged, dynamic, mixed rows and another export, timed side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lora_export.artifact import ExportKind, Manifest
from lora_export.base.tasks import SEQ2SEQ
from lora_export.bench import memory
from lora_export.bench.budget import AGAINST
from lora_export.bench.intervals import verdict
from lora_export.bench.latency import ROUNDS, SAMPLE_SECONDS, Race, Session, measure
from lora_export.bench.memory_job import MemoryJob
from lora_export.bench.placement import placements
from lora_export.bench.plan import EXPORT, BenchPlan, PlannedRace
from lora_export.bench.results import BenchReport, Memory, Placement, Workload
from lora_export.bench.swap import measure_swap
from lora_export.bench.warm_up import MOST_SECONDS, RULE
from lora_export.bench.workloads import source_length, workload_inputs
from lora_export.environment import environment, subject
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.runtime.seq2seq_session import open_export
from lora_export.runtime.session import choose_provider

_SETTINGS = {
    "binding": "inputs, adapters and outputs bound on the device",
    "threads": "those of an idle session rest",
    "rounds": f"{ROUNDS}, each with sessions opened anew in another order",
    "samples": f"{SAMPLE_SECONDS * 1e3:g} ms, or one run that takes longer; ratios are of each sample's fastest run",
    "warm-up": RULE,
}
_UNKNOWN_MEMORY = {
    "process": "Memory in the process: unknown, this system has no /proc.",
    "device": "Memory on the GPU: unknown, nvidia-smi does not name the process (a container hides the ids it knows).",
}
Progress = Callable[[str, int, int], None]


def run_bench(plan: BenchPlan, compared: Mapping[str, Path], progress: Progress) -> BenchReport:
    """Open every session once, measure each variant's memory, then time them together, workload by workload.

    Args:
        compared: Folders of the base, and of the merged form where the plan has one, by session.

    Raises:
        InputRefused: The budget limits the memory of a GPU that is not used.
        EnvironmentUnusable: The provider is not usable or would not run the compute, or a memory that the budget
            limits cannot be measured here.
    """
    started = time.monotonic()
    folders = {EXPORT: plan.folder, **compared}
    if plan.options.against is not None:
        folders[AGAINST] = plan.options.against
    choice = choose_provider(plan.options.provider)
    _require_device(plan, choice.name)
    described = environment(choice.name, choice.reason, _SETTINGS | _memory_settings(choice.name))
    opened: dict[str, tuple[Placement, ...]] = {}

    def open_one(name: str) -> Session:
        session = open_export(folders[name], choice.name, stop_spinning=True)
        opened[name] = placements(name, session)
        return session

    openers = {name: partial(open_one, name) for name in dict.fromkeys(c.session for c in plan.races[0].candidates)}
    swaps = ()
    for name, opener in openers.items():  # what cannot run is refused here, before the long measurements
        session = opener()
        if name == EXPORT and plan.manifest.kind is ExportKind.DYNAMIC:
            swaps = measure_swap(session, plan.races[-1].shape[0], plan.budget)
        del session
    peaks, memory_notes = measure_memory(plan, folders, choice.name, progress)
    races = [_race(plan, race) for race in plan.races]
    workloads = measure(openers, races, blocks=plan.options.blocks, progress=partial(progress, "timing"))
    progress("timing", 1, 1)
    return BenchReport(
        subject=subject(plan.folder, plan.manifest),
        environment=described,
        workloads=tuple(workloads),
        swaps=swaps,
        memory=peaks,
        placements=tuple(entry for name in openers for entry in opened[name]),
        notes=(*_notes(plan, choice.name), *memory_notes, *_unsettled(workloads)),
        seconds=time.monotonic() - started,
        against=None if plan.against is None else subject(plan.options.against, plan.against),
    )


def _race(plan: BenchPlan, race: PlannedRace) -> Race:
    """With its inputs: the other export may take them in another dtype."""
    batch, sequence, past = race.shape
    inputs = {}
    for session in dict.fromkeys(candidate.session for candidate in race.candidates):
        graphs = plan.manifest_of(session).graphs
        inputs[session] = workload_inputs(graphs, plan.vocabulary, batch, source_length(graphs, sequence), past)
    return Race(race.shape, inputs, race.candidates, race.comparisons)


def measure_memory(
    plan: BenchPlan, folders: Mapping[str, Path], provider: str, progress: Progress
) -> tuple[tuple[Memory, ...], tuple[str, ...]]:
    """The peaks of one session of each variant, judged, and a note if there is none to be had.

    Raises:
        EnvironmentUnusable: The budget limits one that cannot be measured here.
    """
    variants = dict.fromkeys(candidate.name for race in plan.races for candidate in race.candidates)
    places = ("process", "device") if provider == "cuda" else ("process",)
    found, missing = [], set()
    for done, variant in enumerate(variants):
        progress("measuring memory", done, len(variants))
        timed = [(race.shape, c) for race in plan.races for c in race.candidates if c.name == variant]
        session = timed[0][1].session
        runs = [(shape, candidate.adapters) for shape, candidate in timed]
        peaks = memory.peaks_mb(MemoryJob(str(folders[session]), provider, plan.vocabulary, runs))
        for place in places:
            allowance = plan.budget.memory(place, variant)
            if place in peaks:
                judged = verdict(peaks[place], peaks[place], allowance)
                found.append(Memory(variant, place, peaks[place], allowance, judged))
            elif allowance is not None:
                raise EnvironmentUnusable(
                    "The budget limits a memory that this machine does not tell",
                    where=plan.budget.where,
                    found=f"{variant}: no figure for the {place}",
                    next_step="take the line out, or run where /proc and nvidia-smi tell what a process holds",
                )
            else:
                missing.add(place)
    return tuple(found), tuple(_UNKNOWN_MEMORY[place] for place in sorted(missing))


def _memory_settings(provider: str) -> dict[str, str]:
    settings = {"memory of the process": memory.METHOD["process"]}
    return settings | {"memory of the device": memory.METHOD["device"]} if provider == "cuda" else settings


def _require_device(plan: BenchPlan, provider: str) -> None:
    if provider != "cuda" and plan.budget.memory_mb.get("device"):
        raise InputRefused(
            "The budget limits memory of a GPU, and none is used",
            where=f"{plan.budget.where}: device_memory_mb",
            found=f"provider {provider}",
            next_step="run with --provider cuda, or take the table out",
        )


def _notes(plan: BenchPlan, provider: str) -> tuple[str, ...]:
    notes = []
    if plan.manifest.task in SEQ2SEQ:
        notes.append(
            "A run is the encoder over the source and one step of the decoder on the past; no text is written."
        )

    def note_fusing(what: str, manifest: Manifest) -> None:
        if manifest.provider != provider:
            notes.append(f"{what} is fused for {manifest.provider} and ran on {provider}: not its best speed.")

    note_fusing("The graph", plan.manifest)
    if plan.against is not None:
        note_fusing("The other export's graph", plan.against)
    if plan.budget.where:
        short = "" if plan.options.max_ratio is None else f"; --max-ratio {plan.options.max_ratio:g} for what it leaves"
        notes.append(f"Budget: {plan.budget.where}{short}.")
    return tuple(notes)


def _unsettled(workloads: list[Workload]) -> tuple[str, ...]:
    """A note that names the variants whose warm-up was cut short, if there are any."""
    found = []
    for workload in workloads:
        for variant in workload.variants:
            n_cut = sum(not warm.settled for warm in variant.warm_ups)
            if n_cut:
                found.append(f"{variant.name}, {workload.name} ({n_cut} of {len(variant.warm_ups)} rounds)")
    if not found:
        return ()
    return (f"The warm-up was cut short after {MOST_SECONDS:g} s, before times had settled: {'; '.join(found)}.",)
