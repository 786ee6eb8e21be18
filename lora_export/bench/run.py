"""`bench`: base, merged, dynamic, mixed rows and another export, timed side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lora_export.artifact import ExportKind
from lora_export.base.tasks import SEQ2SEQ
from lora_export.bench import memory
from lora_export.bench.budget import AGAINST
from lora_export.bench.differences import Outputs, compared, difference, outputs_of, unlike
from lora_export.bench.intervals import verdict
from lora_export.bench.latency import ROUNDS, SAMPLE_SECONDS, Race, Session, Timings, measure
from lora_export.bench.memory_job import MemoryJob
from lora_export.bench.other_export import fused_for_another
from lora_export.bench.placement import placements
from lora_export.bench.plan import BASE, EXPORT, BenchPlan, PlannedRace
from lora_export.bench.results import BenchReport, Difference, Memory, ProviderOperators, Swap, Workload, workload_name
from lora_export.bench.swap import measure_swap
from lora_export.bench.warm_up import MOST_SECONDS, RULE
from lora_export.bench.workloads import source_length, workload_inputs
from lora_export.contract import SINGLE
from lora_export.environment import environment, subject
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.progress import Progress
from lora_export.runtime.seq2seq_session import open_export
from lora_export.runtime.session import choose_provider
from lora_export.sentence import SENTENCE_EMBEDDING

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


class Bench:
    """A bench in progress: what is timed, where, and what was measured so far.

    Args:
        compared: Folders of the base, and of the merged form where the plan has one, by session.

    Raises:
        InputRefused: The budget limits the memory of a GPU that is not used.
        EnvironmentUnusable: The provider is not usable.
    """

    def __init__(self, plan: BenchPlan, compared: Mapping[str, Path]) -> None:
        self.started = time.monotonic()
        self.plan = plan
        self.folders = {EXPORT: plan.folder, **compared}
        if plan.options.against is not None:
            self.folders[AGAINST] = plan.options.against
        choice = choose_provider(plan.options.provider)
        _require_device(plan, choice.name)
        self.provider = choice.name
        self.environment = environment(choice.name, choice.reason, _SETTINGS | _memory_settings(choice.name))
        self.sessions = tuple(dict.fromkeys(candidate.session for candidate in plan.races[0].candidates))
        self.operators: dict[str, tuple[ProviderOperators, ...]] = {}
        self.swaps: tuple[Swap, ...] = ()
        self.memory: list[Memory] = []
        self.memory_notes: tuple[str, ...] = ()
        self.differences: tuple[Difference, ...] = ()
        self.timings = Timings([_race(plan, race) for race in plan.races])

    @property
    def has_results(self) -> bool:
        return bool(self.swaps or self.memory or self.timings.workloads())

    def open(self, name: str) -> Session:
        """A session by name; its operators by provider are kept."""
        if name == AGAINST:
            session = self.plan.against.open(self.provider)
        else:
            session = open_export(self.folders[name], self.provider, stop_spinning=True)
        self.operators[name] = placements(name, session)
        return session

    def report(self, stopped: str | None = None) -> BenchReport:
        """What was measured; `stopped` says what ended the bench before its last measurement."""
        plan, workloads = self.plan, self.timings.workloads()
        return BenchReport(
            subject=subject(plan.folder, plan.manifest),
            environment=self.environment,
            workloads=tuple(workloads),
            swaps=self.swaps,
            memory=tuple(self.memory),
            placements=tuple(entry for name in self.sessions for entry in self.operators.get(name, ())),
            notes=(
                *unlike(self.differences),
                *_notes(plan, self.provider),
                *self.memory_notes,
                *_unsettled(workloads),
            ),
            seconds=time.monotonic() - self.started,
            against=None if plan.against is None else plan.against.subject(plan.manifest.task),
            stopped=stopped,
            differences=self.differences,
        )


def run_measurements(bench: Bench, progress: Progress) -> None:
    """Open every session once, measure each variant's memory, then time them together, workload by workload; what was
    measured is in `bench` as soon as it is known.

    Raises:
        EnvironmentUnusable: The provider would not run the compute, or a memory that the budget limits cannot be
            measured here.
    """
    plan = bench.plan
    races = [race for race, _ in bench.timings.by_race]
    outputs: dict[tuple[int, str], Outputs] = {}
    for name in bench.sessions:  # what cannot run is refused here, before the long measurements
        session = bench.open(name)
        if plan.against is not None:
            outputs |= _outputs(bench, name, session, races=races)
        if name == EXPORT and plan.manifest.kind is ExportKind.DYNAMIC:
            bench.swaps = measure_swap(session, plan.races[-1].shape[0], plan.budget)
        del session
    if plan.against is not None:
        bench.differences = _differences(plan, races, outputs)
    bench.memory_notes = measure_memory(plan, bench.folders, bench.provider, progress=progress, found=bench.memory)
    openers = {name: partial(bench.open, name) for name in bench.sessions}
    show = partial(progress, "timing")
    measure(openers, races, blocks=plan.options.blocks, progress=show, timings=bench.timings)
    progress("timing", 1, 1)


def _outputs(bench: Bench, name: str, session: Session, *, races: Sequence[Race]) -> dict[tuple[int, str], Outputs]:
    """By race and candidate, of those that run in this session and are compared with the other or are it."""
    return {
        (number, each.name): outputs_of(session, each, race.inputs[name], where=str(bench.folders[name]))
        for number, race in enumerate(races)
        for each in race.candidates
        if each.session == name and (each.session == AGAINST or each in compared(race))
    }


def _differences(
    plan: BenchPlan, races: Sequence[Race], outputs: Mapping[tuple[int, str], Outputs]
) -> tuple[Difference, ...]:
    """An allowance is for the variant whose ratio is reported; the base is compared for information."""
    found = []
    for number, race in enumerate(races):
        for each in compared(race):
            allowance = None if each.session == BASE else plan.budget.difference
            ours, theirs = outputs[number, each.name], outputs[number, AGAINST]
            found.append(
                difference(workload_name(*race.shape), each.name, ours=ours, theirs=theirs, allowance=allowance)
            )
    return tuple(found)


def _race(plan: BenchPlan, race: PlannedRace) -> Race:
    """With its inputs: the other export may take them in another dtype."""
    batch, sequence, past = race.shape
    inputs = {}
    for session in dict.fromkeys(candidate.session for candidate in race.candidates):
        graphs = plan.graphs_of(session)
        inputs[session] = workload_inputs(graphs, plan.vocabulary, (batch, source_length(graphs, sequence), past))
    return Race(race.shape, inputs, race.candidates, race.comparisons)


def measure_memory(
    plan: BenchPlan, folders: Mapping[str, Path], provider: str, *, progress: Progress, found: list[Memory]
) -> tuple[str, ...]:
    """Add the peaks of one session of each variant, judged, to `found`; a note where there is none to be had.

    Raises:
        EnvironmentUnusable: The budget limits one that cannot be measured here.
    """
    variants = dict.fromkeys(candidate.name for race in plan.races for candidate in race.candidates)
    places = ("process", "device") if provider == "cuda" else ("process",)
    missing = set()
    for done, variant in enumerate(variants):
        progress("measuring memory", done, len(variants))
        timed = [(race.shape, c) for race in plan.races for c in race.candidates if c.name == variant]
        session = timed[0][1].session
        runs = [(shape, candidate.adapters, candidate.is_changing) for shape, candidate in timed]
        peaks = memory.peaks_mb(_memory_job(plan, folders, session, provider=provider, runs=runs))
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
    return tuple(_UNKNOWN_MEMORY[place] for place in sorted(missing))


def _memory_job(
    plan: BenchPlan, folders: Mapping[str, Path], session: str, *, provider: str, runs: Sequence
) -> MemoryJob:
    if session == AGAINST:
        return plan.against.memory_job(provider, plan.vocabulary, runs)
    return MemoryJob(str(folders[session]), provider, plan.vocabulary, runs)


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
    notes += _notes_on_embedding(plan)
    notes += fused_for_another("The graph", plan.manifest, provider)
    if plan.against is not None:
        notes += plan.against.notes(provider)
    if plan.budget.where:
        short = "" if plan.options.max_ratio is None else f"; --max-ratio {plan.options.max_ratio:g} for what it leaves"
        notes.append(f"Budget: {plan.budget.where}{short}.")
    return tuple(notes)


def _notes_on_embedding(plan: BenchPlan) -> list[str]:
    """Which outputs a run gives, where the graph makes an embedding; and that the other does less or more than that."""
    embedding, notes = plan.manifest.sentence_embedding, []
    if embedding is not None:
        others = ", ".join(spec.name for spec in plan.manifest.contract.outputs if spec.name != SENTENCE_EMBEDDING)
        notes.append(f"A run gives {others} and {SENTENCE_EMBEDDING} ({embedding.described}), of every variant.")
    if plan.against is not None and SINGLE in plan.against.graphs:
        gives = SENTENCE_EMBEDDING in (spec.name for spec in plan.against.graphs[SINGLE].outputs)
        if embedding is not None and not gives:
            notes.append(f"The other graph gives no {SENTENCE_EMBEDDING}: it does less where its host makes that.")
        elif embedding is None and gives:
            notes.append(
                f"The other graph gives a {SENTENCE_EMBEDDING}, which this one leaves to its host: it does more."
            )
    return notes


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
