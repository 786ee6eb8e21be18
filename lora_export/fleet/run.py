"""A fleet: one graph for all adapters of a list, each packed, compared with PEFT and recorded.

    list ─► headers ─► one export with an adapter of each kind ─► workers: pack, compare
         ─► a folder with those that are served ─► OUT

An adapter that cannot be exported, differs from PEFT or breaks its worker is recorded and left out. What an earlier run
found of unchanged adapters is kept while the graph is the same.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.adapters.folder import AdapterFolder
from lora_export.artifact import REPORTS, Manifest, read_manifest, record_from, sha256_of, write_manifest
from lora_export.base.checkpoint import Located, locate
from lora_export.environment import environment, n_cores
from lora_export.errors import EnvironmentUnusable, InputRefused, some_of
from lora_export.export.origin import another_base, quantized_training, remark_on
from lora_export.export.plan import local_path
from lora_export.export.pooling import task_for
from lora_export.fleet import state
from lora_export.fleet.assignments import Job, Packing, broken
from lora_export.fleet.embedding import FleetEmbedding, settled
from lora_export.fleet.graph import Export, FleetGraph, graph_for
from lora_export.fleet.options import FleetOptions
from lora_export.fleet.outcomes import AdapterOutcome, FleetReport, Outcome
from lora_export.fleet.places import Place
from lora_export.fleet.pool import Pool
from lora_export.fleet.roster import is_address, read_roster
from lora_export.fleet.sources import Opened, open_all
from lora_export.folders import link, put_in_place
from lora_export.progress import Progress
from lora_export.runtime.session import choose_provider
from lora_export.sentence import AUTO, SentenceEmbedding

# What a worker runs.
WORK = "lora_export.fleet.worker:work"


def run_fleet(
    source: Path, base: str, options: FleetOptions, *, place: Place, export: Export, progress: Progress
) -> FleetReport:
    """Make or renew the fleet of `source` in `options.out`, the folder of `place`.

    Raises:
        LoraExportError: The list, the base or the machine cannot be used, or all adapters are refused. An earlier fleet
            is as it was.
    """
    started = time.monotonic()
    entries = read_roster(source)[: options.limit]
    _refuse_others(options.out)
    provider = choose_provider(options.provider)
    options = replace(options, provider=provider.name, task=task_for(options.task, options.pooling))
    work = state.work_folder(options.out)
    with state.locked(options.out):
        state.take_up(options.out)
        opened, refused = open_all(entries, base, options.task, fetched=work / "fetched", progress=progress)
        embedding, opened, others = settled(opened, base, options.pooling, earlier=_embedding_of(options.out))
        refused += others
        if not opened:
            _refuse_all(refused)
        with contextlib.closing(options.engine(WORK)) as engine:
            n_workers = options.workers(len(opened), engine.n_cpus)
            n_threads = max(1, engine.n_cpus // n_workers) if options.ray is None else 1
            with Pool(engine, n_workers=n_workers, limits=options.limits(n_workers), broken=broken) as pool:
                graph = graph_for(opened, base, options, embedding=embedding, pool=pool, export=export)
                packing = time.monotonic()
                job = Job(
                    graph.bare, local_path(base), options.provider,
                    n_rows=options.n_rows, n_threads=n_threads, limits=options.tolerances, embeds_as=embedding.root,
                )  # fmt: skip
                found = {
                    outcome.name: (outcome, folder)
                    for outcome, folder in _appearing(
                        _outcomes(graph, job, opened, options=options, pool=pool, progress=progress), graph, place
                    )
                }
                seconds_packing = time.monotonic() - packing
        by_name = {outcome.name: (outcome, work) for outcome in refused} | found
        in_order = [by_name[entry.name] for entry in entries]
        place.arrived()
        outcomes = tuple(outcome for outcome, _ in in_order if not (options.only_changed and outcome.reused))
        manifest = _publish(graph, options.out, in_order, embedding=embedding)
        return FleetReport(
            folder=str(options.out),
            source=str(source),
            base=manifest.base.given,
            task=manifest.task,
            environment=environment(provider.name, provider.reason, {}),
            n_workers=n_workers,
            n_kinds=len({each.kind for each in opened}),
            adapters=outcomes,
            seconds=time.monotonic() - started,
            seconds_packing=seconds_packing,
            n_unchanged=len(in_order) - len(outcomes),
        )


def describe_fleet(source: Path, base: str, options: FleetOptions) -> dict:
    """What `run_fleet` would do, by headers alone; nothing is fetched or written."""
    entries = read_roster(source)[: options.limit]
    _refuse_others(options.out)
    here = [entry for entry in entries if not entry.is_address]
    task = task_for(options.task, options.pooling)
    opened, refused = open_all(here, base, task, fetched=Path(), progress=lambda *_: None)
    embedding = FleetEmbedding()
    if options.pooling != AUTO or len(here) == len(entries):  # else adapters that are not here have a say
        embedding, opened, others = settled(opened, base, options.pooling, earlier=_embedding_of(options.out))
        refused += others
    return {
        "folder": str(options.out),
        "adapters": len(entries),
        "kinds": len({each.kind for each in opened}),
        "embedding": embedding.described,
        "refused": {outcome.name: outcome.reason for outcome in refused},
        "not_here": [entry.name for entry in entries if entry.is_address],
        "bytes": sum(path.stat().st_size for each in opened for path in each.folder.path.glob("*.safetensors")),
        "workers": options.n_workers if options.ray is not None else options.workers(len(entries), n_cores()),
    }


def _embedding_of(out: Path) -> SentenceEmbedding | None:
    """What the fleet in `out` makes of a text, if there is one; an address is looked at when it is fetched."""
    if is_address(out):
        return None
    return read_manifest(out).sentence_embedding if state.kept_graph(out) else None


def _refuse_others(out: Path) -> None:
    """A folder that holds something else than a fleet is not touched; an address is looked at when it is fetched."""
    if is_address(out):
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not state.kept_graph(out):
        raise InputRefused(
            "The output folder holds something that is no fleet",
            where=str(out),
            expected="a folder that `lora-export fleet` made, or none",
            next_step="name another folder with -o",
        )


def _refuse_all(refused: Sequence[AdapterOutcome]) -> None:
    """
    Raises:
        InputRefused: In their names.
        EnvironmentUnusable: Likewise, where some could not be read.
    """
    if broken := [outcome for outcome in refused if outcome.outcome is Outcome.BROKEN]:
        raise EnvironmentUnusable(
            "No adapter of the list can be read",
            where=some_of([f"{outcome.name}: {outcome.reason}" for outcome in broken], 3),
            next_step="look at the disk or the network that they come from",
        )
    raise InputRefused(
        "No adapter of the list can be exported",
        where=some_of([f"{outcome.name}: {outcome.reason}" for outcome in refused], 3),
        next_step="see `lora-export inspect ADAPTER` for one of them",
    )


def _outcomes(
    graph: FleetGraph,
    job: Job,
    opened: Sequence[Opened],
    *,
    options: FleetOptions,
    pool: Pool,
    progress: Progress,
) -> Iterator[tuple[AdapterOutcome, Path]]:
    """What becomes of each adapter, and where its files lie: kept from an earlier run, or as the workers have it."""
    work = state.work_folder(options.out)
    places = ((options.out, state.kept_outcomes(options.out)), (work / "packed", state.kept_outcomes(work)))
    used = locate(job.base, kind="base")
    assignments: list[Packing] = []
    for each in opened:
        files = (dict(each.hashes), dict(each.carried), each.data_sha256)
        facts = [graph.key, *files, options.n_rows, dict(options.tolerances), *_said_of(each.folder, used)]
        key, name = state.hash_of(facts), each.entry.name
        kept = ((old[name], folder) for folder, old in places if name in old and _still_holds(old[name], key, folder))
        outcome, folder = next(kept, (None, None))
        if outcome is not None:
            yield outcome.again(each.entry.given), folder
            continue
        what = (name, str(each.folder.path), each.entry.given, key, each.hashes, each.entry.data)
        assignments.append(Packing(job, *what, into=work / "packed"))
    for done, outcome in enumerate(pool.outcomes(assignments), 1):
        state.add_outcome(work, outcome)
        yield outcome, work / "packed"
        progress("packing and comparing", done, len(assignments))


def _said_of(folder: AdapterFolder, used: Located) -> list[str]:
    """What an adapter's folder says of the base that it was trained on, on which its remarks go."""
    other, trained = another_base(folder, used), quantized_training(folder)
    return [each for each in (other and remark_on(folder.name, other, used.given), trained) if each is not None]


def _appearing(
    outcomes: Iterator[tuple[AdapterOutcome, Path]], graph: FleetGraph, place: Place
) -> Iterator[tuple[AdapterOutcome, Path]]:
    """The same; `place` takes up what is served, and the graph with the first."""
    is_first = True
    for outcome, folder in outcomes:
        if outcome.outcome is Outcome.SERVED:
            if is_first:
                place.appear(graph.source, graph.files)
            is_first = False
            place.appear(folder, outcome.files)
        yield outcome, folder


def _still_holds(outcome: AdapterOutcome, key: str, folder: Path) -> bool:
    """Whether an earlier outcome is of the same inputs, and its files are still in `folder`."""
    if outcome.key != key or outcome.outcome is Outcome.BROKEN:
        return False
    files = outcome.files if outcome.outcome is Outcome.SERVED else {}
    return all((folder / file).is_file() and sha256_of(folder / file) == digest for file, digest in files.items())


def _publish(
    graph: FleetGraph, out: Path, found: Sequence[tuple[AdapterOutcome, Path]], *, embedding: FleetEmbedding
) -> Manifest:
    """Make the folder anew, of links to files that are there, and put it in the place of the one before it.

    Args:
        found: Every adapter's outcome, and the folder that has its files.
    """
    outcomes = [outcome for outcome, _ in found]
    if all(outcome.outcome is Outcome.REFUSED for outcome in outcomes):
        _refuse_all(outcomes)
    work = state.work_folder(out)
    served = [(outcome, folder) for outcome, folder in found if outcome.outcome is Outcome.SERVED]
    made_of_texts = embedding.recorded(graph.manifest.sentence_embedding, {outcome.name for outcome, _ in served})
    files = dict(graph.files)
    made = work / "next"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for path in filter(Path.is_file, (out / REPORTS).rglob("*")):
        link(path, made / path.relative_to(out))
    for name in files:
        link(graph.source / name, made / name)
    for outcome, folder in served:
        for name in outcome.files:
            link(folder / name, made / name)
        files |= outcome.files
    records = tuple(record_from(outcome.record) for outcome, _ in served)
    manifest = replace(
        graph.manifest, adapters=records, files=dict(sorted(files.items())), sentence_embedding=made_of_texts
    )
    write_manifest(made, manifest)
    state.keep_graph(made, graph.facts)
    state.keep_outcomes(made, outcomes)
    put_in_place(made, out, state.before(out))
    shutil.rmtree(work, ignore_errors=True)
    return manifest
