"""The main path. Data flows one way, through values that are not changed:

    request ─► plan (refusals) ─► resolve (PEFT reads the adapters) ─► finished weightless graph (cached)
            ─► write, one weight at a time ─► side files ─► manifest ─► the folder appears

and from the folder: check (unmerged PEFT against ONNX Runtime), bench (paired latencies), add (one more adapter).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.artifact import (
    ADAPTERS,
    REPORTS,
    SIGNATURE,
    Kind,
    Manifest,
    read_manifest,
    sha256_of,
    write_manifest,
)
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.carried import copy_carried, plan_added
from lora_export.contract import SINGLE, adapter_file
from lora_export.errors import InputRefused
from lora_export.finished_graph import choose_sites, describe, finished_graphs, target_modules
from lora_export.genai import write_genai_config
from lora_export.graph.bind import write_graphs
from lora_export.plan import Plan, Request, make_plan, resolve
from lora_export.records import hash_adapter, hash_sources, merged_record, require_gated, served_record, write_config
from lora_export.report.write import write_reports, write_reproduction
from lora_export.signature import sign, signer_with
from lora_export.sources import SourceOverrides, locate_sources
from lora_export.staging import refuse_existing, require_disk, staging
from lora_export.verify.bench import run_bench
from lora_export.verify.bench_plan import BASE, MERGED, BenchOptions, BenchPlan, foldable, plan_bench
from lora_export.verify.bench_results import BenchReport
from lora_export.verify.check_results import CheckReport
from lora_export.verify.examples import read_examples
from lora_export.verify.parity import run_check
from lora_export.verify.runs import CheckRequest

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The default progress: none."""


def mute(sentence: str) -> None:
    """The default remark: none."""


@dataclass(frozen=True)
class ExportOptions:
    """How to write an export, as opposed to what (`Request`).

    Attributes:
        targets: Modules to give LoRA inputs besides those that the adapters touch: paths, or their last parts.
        zeros_for_missing_head: Export a head that the checkpoint lacks as zeros (a benchmark's base).
        sign_key: Private key (PEM) to sign the folder with.
    """

    out: Path
    overwrite: bool = False
    use_cache: bool = True
    targets: tuple[str, ...] = ()
    zeros_for_missing_head: bool = False
    sign_key: Path | None = None


def export(
    request: Request, options: ExportOptions, progress: Progress = silent, remark: Callable[[str], None] = mute
) -> Manifest:
    """Export a merged or a dynamic graph to `options.out` and return its manifest.

    Args:
        remark: Given each sentence about what was decided for the user.

    Raises:
        LoraExportError: Refused or failed; nothing is left behind.
    """
    refuse_existing(options.out, overwrite=options.overwrite)
    signer = signer_with(options.sign_key) if options.sign_key is not None else None
    plan = make_plan(request)
    for sentence in plan.remarks:
        remark(sentence)
    n_bytes = bytes_needed(plan)
    require_disk(options.out.parent, n_bytes)
    with ThreadPoolExecutor(max_workers=1) as hashing:
        hashed = hashing.submit(hash_sources, plan)
        progress("reading adapters", 0, 1)
        resolved = resolve(plan, zeros_for_missing_head=options.zeros_for_missing_head)
        targets = target_modules(options.targets, resolved.model)
        choice = choose_sites(resolved.adapters if request.mode == "dynamic" else (), targets)
        progress("building the graph", 0, 1)
        graphs = finished_graphs(plan, resolved, choice, use_cache=options.use_cache)
        with staging(options.out, overwrite=options.overwrite, n_bytes=n_bytes) as folder:
            meter = _Meter(progress, n_bytes)
            models = {name: graph.model for name, graph in graphs.items()}
            optional = {name: graph.adapter_inputs for name, graph in graphs.items()}
            written = write_graphs(models, folder, resolved.source.make_weight, optional, meter)
            contracts = {name: describe(model, written.adapter_inputs[name]) for name, model in models.items()}
            records = []
            for source, adapter, config, weight in zip(
                plan.folders, resolved.adapters, plan.adapter_configs, request.weight_of_each, strict=True
            ):
                if request.mode == "merge":
                    records.append(merged_record(source, adapter, config.num_labels, weight))
                else:
                    described = (source, adapter, config.num_labels, contracts, resolved.source, folder)
                    records.append(served_record(*described, request.convert_rank))
            files = written.sha256 | write_config(plan, folder)
            files |= copy_carried(plan.carried, folder)
            if plan.task is Task.TEXT_GENERATION:
                files |= write_genai_config(folder, plan.config, contracts[SINGLE])
            files |= {file: sha256_of(folder / file) for record in records for file in record.files.values()}
            base, adapters = hashed.result()
            given = {"residual_base": request.residual_base}
            records = [
                replace(record, source=source, preprocessing=plan.carried.places.get(record.name), **given)
                for record, source in zip(records, adapters, strict=True)
            ]
            kind = Kind.DYNAMIC if request.mode == "dynamic" else Kind.MERGED
            files = dict(sorted(files.items()))
            manifest = Manifest(kind, plan.task, plan.dtype, request.provider, base, tuple(records), contracts, files)
            write_manifest(folder, manifest)
            if signer is not None:
                sign(folder, signer)
    return manifest


class _Meter:
    """Counts written bytes for the progress display."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, name: str, n_bytes: int) -> None:
        self._done += n_bytes
        self._progress("writing weights", self._done, self._total)


def bytes_needed(plan: Plan) -> int:
    """Bytes that the exported weights take, before packing and metadata."""
    item = 4 if plan.dtype == "float32" else 2
    sizes = [item * math.prod(info.shape) for info in plan.checkpoint.files.tensors.values()]
    # An encoder and a decoder each have the embedding that they share.
    return sum(sizes) + (max(sizes, default=0) if plan.task in SEQ2SEQ else 0)


def add_adapter(
    folder: Path,
    adapters: Sequence[tuple[str, str | None]],
    overrides: SourceOverrides,
    *,
    convert_rank: float | None = None,
    residual_base: bool = False,
    progress: Progress = silent,
    sign_key: Path | None = None,
) -> Manifest:
    """Pack more adapters for the dynamic export in `folder`, without exporting its graph again.

    A signature of the folder as it was is removed, and made anew with `sign_key` (a private key, PEM).

    Raises:
        InputRefused: The export is merged, the base is not the one it was made from, an adapter's name is taken, or
            an adapter needs a module that the graph has no inputs for.
    """
    signer = signer_with(sign_key) if sign_key is not None else None
    manifest = read_manifest(folder)
    if manifest.kind is not Kind.DYNAMIC:
        raise InputRefused(
            "A merged export holds one task and takes no more adapters",
            where=str(folder),
            next_step="export with `lora-export dynamic` to serve several",
        )
    base, _ = locate_sources(manifest, SourceOverrides(overrides.base), only_base=True)
    how = (manifest.task, manifest.dtype, manifest.provider)
    how_read = {"convert_rank": convert_rank, "residual_base": residual_base}
    plan = make_plan(Request(str(base), tuple(adapters), "dynamic", *how, **how_read))
    taken = [source.name for source in plan.folders if source.name in {r.name for r in manifest.adapters}]
    if taken:
        raise InputRefused(
            f"The export already has an adapter {taken[0]!r}", where=str(folder), next_step="name it with --name"
        )
    progress("reading adapters", 0, 1)
    resolved = resolve(plan)
    for adapter in resolved.adapters:
        require_gated(adapter, manifest)
    records, files = list(manifest.adapters), dict(manifest.files)
    written: list[Path] = []
    try:
        for source, adapter, config in zip(plan.folders, resolved.adapters, plan.adapter_configs, strict=True):
            written += [folder / ADAPTERS / adapter_file(adapter.name, graph) for graph in manifest.graphs]
            described = (source, adapter, config.num_labels, manifest.graphs, resolved.source, folder)
            record = served_record(*described, convert_rank)
            carried = plan_added(folder, adapter.name, source.path)
            written += [folder / file for file in carried.files]
            files |= copy_carried(carried, folder)
            own = {"residual_base": residual_base, "preprocessing": carried.places.get(adapter.name)}
            records.append(replace(record, source=hash_adapter(source), **own))
            files |= {file: sha256_of(folder / file) for file in record.files.values()}
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    manifest = replace(manifest, adapters=tuple(records), files=dict(sorted(files.items())))
    (folder / SIGNATURE).unlink(missing_ok=True)  # it speaks of the folder as it was
    write_manifest(folder, manifest)
    if signer is not None:
        sign(folder, signer)
    return manifest


def check(
    folder: Path,
    overrides: SourceOverrides,
    *,
    provider: str | None = None,
    data: Mapping[str | None, Path] | None = None,
    merged: Path | None = None,
    n_rows: int = 128,
    tolerances: Mapping[str, float] | None = None,
    progress: Progress = silent,
) -> tuple[CheckReport, dict[str, Path]]:
    """Compare the export in `folder` with unmerged PEFT; the report, and the files it was written to.

    Args:
        data: Files of examples by adapter name; the key None serves all others.
        merged: A merged export to compare a dynamic one with.
        n_rows: Most rows of each file.
        tolerances: Limits in place of the table's, by measure (`verify.tolerances.MEASURES`).

    Raises:
        LoraExportError: The export, its base or an adapter cannot be used; a failed gate is a result, not an error.
    """
    manifest = read_manifest(folder)
    base, adapters = locate_sources(manifest, overrides)
    for name in filter(None, data or {}):
        manifest.adapter(name)
    examples = {name: read_examples(path, n_rows) for name, path in (data or {}).items()}
    request = CheckRequest(folder, base, adapters, provider, examples, merged, tolerances or {})
    report, files = run_check(request, progress)
    return report, write_reports(report, folder / REPORTS) | write_reproduction(files, folder / REPORTS)


def bench(
    folder: Path, overrides: SourceOverrides, options: BenchOptions, progress: Progress = silent
) -> tuple[BenchReport, dict[str, Path]]:
    """Time the export in `folder` against its base and its merged form, exported for the comparison beside it.

    Raises:
        LoraExportError: The export, its base, an adapter, the budget or the other export cannot be used; a failed gate
            is a result, not an error.
    """
    plan = plan_bench(folder, options)
    base, adapters = locate_sources(plan.manifest, overrides)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=folder.resolve().parent) as temporary:
        compared = export_compared(plan, base, adapters, Path(temporary), progress)
        report = run_bench(plan, compared, progress)
    return report, write_reports(report, folder / REPORTS)


def export_compared(
    plan: BenchPlan, base: Path, adapters: Mapping[str, Path], out: Path, progress: Progress
) -> dict[str, Path]:
    """Export the base, and of a dynamic export one adapter folded in, as the export was; the folders under `out`."""
    manifest, chosen = plan.manifest, {BASE: ()}
    name = foldable(manifest) if manifest.kind is Kind.DYNAMIC else None
    if name is not None:
        chosen[MERGED] = ((str(adapters[name]), name),)
    residual = any(record.residual_base for record in manifest.adapters)
    how = (manifest.task, manifest.dtype, manifest.provider)
    for done, (label, folded) in enumerate(chosen.items()):
        progress("exporting what to compare with", done, len(chosen))
        request = Request(str(base), folded, "merge", *how, residual_base=residual)
        export(request, ExportOptions(out / label, zeros_for_missing_head=True))
    return {label: out / label for label in chosen}
