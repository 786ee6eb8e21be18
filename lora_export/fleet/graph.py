"""The graph of a fleet: with the inputs that all kinds of its adapters need, and without adapters."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lora_export.adapters.folder import AdapterFolder
from lora_export.artifact import Manifest, read_manifest, versions, write_manifest
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.errors import InputRefused, some_of
from lora_export.export.lifecycle import files_without
from lora_export.export.plan import Request, local_path
from lora_export.fleet import state
from lora_export.fleet.assignments import Trial
from lora_export.fleet.embedding import FleetEmbedding
from lora_export.fleet.options import FleetOptions
from lora_export.fleet.outcomes import AdapterOutcome, Outcome
from lora_export.fleet.pool import Pool
from lora_export.fleet.sources import Opened
from lora_export.integrity.sources import locate_source

# Makes an export of a request in a folder, with more targets.
Export = Callable[[Request, Path, tuple[str, ...]], Manifest]
# Of one kind; where so many cannot be read, the kind is left out, and each of its adapters has its own refusal.
_MOST_TRIED = 3


@dataclass(frozen=True)
class FleetGraph:
    """A fleet's graph.

    Attributes:
        bare: A folder with the graph whose manifest has no adapters.
        source: The export that it is of: the fleet that is there, or one in the work folder.
        facts: What it was made from, see `state.keep_graph`.
    """

    bare: Path
    source: Path
    manifest: Manifest
    facts: Mapping[str, object]

    @cached_property
    def files(self) -> dict[str, str]:
        """sha256 by name of what `source` has besides adapters."""
        return files_without(self.manifest, self.manifest.adapters)

    @cached_property
    def key(self) -> str:
        """Changes with the graph, its weights and the libraries."""
        return state.hash_of([*(self.manifest.files[name] for name in self.manifest.graph_files), versions()])


def graph_for(
    opened: Sequence[Opened],
    base: str,
    options: FleetOptions,
    *,
    embedding: FleetEmbedding,
    pool: Pool,
    export: Export,
) -> FleetGraph:
    """The graph that serves all of `opened`: of the fleet that is there, of a run that was stopped, or exported now.

    Raises:
        LoraExportError: None of the adapters can be read on the base, or the base cannot be exported.
    """
    work = state.work_folder(options.out)
    asked = {"task": options.task, "dtype": options.dtype, "provider": options.provider, "targets": options.targets}
    asked |= embedding.facts
    how_hash, kinds = state.hash_of([asked, versions()]), sorted({each.kind for each in opened})
    for folder in (options.out, work / "export"):
        kept = state.kept_graph(folder)
        if kept.get("how") == how_hash and set(kinds) <= set(kept["kinds"]):
            manifest = read_manifest(folder)
            locate_source(manifest.base, base, "base", hint="BASE")
            return FleetGraph(_bare(folder, manifest, work), folder, manifest, kept)
    shutil.rmtree(work / "export", ignore_errors=True)
    chosen = _readable(opened, base, options, pool=pool)
    adapters = tuple((str(folder.path), folder.name) for folder in chosen)
    how = (options.task, options.dtype, options.provider)
    request = Request(base, adapters, "dynamic", *how, base_files_stay=True, pooling=embedding.pooling)
    manifest = export(request, work / "export", options.targets)
    if Task(manifest.task) in SEQ2SEQ:
        shutil.rmtree(work, ignore_errors=True)
        raise InputRefused(
            "A fleet serves tasks of one graph",
            found=f"{manifest.task}, which has {len(manifest.graphs)}",
            next_step="export its adapters with `lora-export dynamic` and `add`",
        )
    facts = {"how": how_hash, "kinds": kinds}
    state.keep_graph(work / "export", facts)
    return FleetGraph(_bare(work / "export", manifest, work), work / "export", manifest, facts)


def _readable(opened: Sequence[Opened], base: str, options: FleetOptions, *, pool: Pool) -> list[AdapterFolder]:
    """An adapter of each kind that PEFT reads on the base, found by workers: an adapter may take a process with it."""
    by_kind: dict[str, list[Opened]] = defaultdict(list)
    for each in opened:
        by_kind[each.kind].append(each)
    found: dict[str, AdapterFolder] = {}
    refused: dict[str, AdapterOutcome] = {}
    how, here = (options.task, options.dtype, options.provider), local_path(base)
    for place in range(_MOST_TRIED):
        tried = {kind: those[place] for kind, those in by_kind.items() if kind not in found and place < len(those)}
        trials = [
            Trial(Request(here, ((str(each.folder.path), kind[:16]),), "dynamic", *how), kind, each.entry.given)
            for kind, each in tried.items()
        ]
        for outcome in pool.outcomes(trials):
            if outcome.outcome is Outcome.SERVED:
                found[outcome.name] = tried[outcome.name].folder
            else:
                refused[tried[outcome.name].entry.name] = outcome
    if not found:
        raise InputRefused(
            "No adapter of the list can be exported on this base",
            where=some_of([f"{name}: {outcome.reason}" for name, outcome in refused.items()], 3),
            next_step="see `lora-export inspect ADAPTER --base BASE` for one of them",
        )
    return [found[kind] for kind in by_kind if kind in found]  # in the list's order, whichever worker was first


def _bare(folder: Path, manifest: Manifest, work: Path) -> Path:
    """The export in `folder` as one without adapters: links to its files, and a manifest that names none of them."""
    bare = work / "graph"
    shutil.rmtree(bare, ignore_errors=True)
    bare.mkdir(parents=True)
    files = files_without(manifest, manifest.adapters)
    for name in files:
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        (bare / name).symlink_to((folder / name).resolve())
    write_manifest(bare, replace(manifest, adapters=(), files=files))
    return bare
