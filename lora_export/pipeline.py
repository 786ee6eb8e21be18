"""The main path. Data flows one way, through values that are not changed:

    request ─► plan (refusals) ─► resolve (PEFT reads the adapters) ─► finished weightless graphs (all cached)
            ─► write, one weight at a time ─► side files ─► manifest ─► the folder appears

and from the folder: check (unmerged PEFT against ONNX Runtime), bench (paired latencies), add_adapter and
remove_adapters. A fleet exports one graph and packs the adapters of a list for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.adapters.pack import choose_sites
from lora_export.artifact import REPORTS, ExportKind, Manifest, write_manifest
from lora_export.bench.plan import BenchOptions, BenchPlan, plan_bench
from lora_export.bench.results import BenchReport
from lora_export.bench.run import Bench, run_measurements
from lora_export.carried import copy_carried
from lora_export.changing import changing
from lora_export.check.context import CheckOptions
from lora_export.check.opened import opened_check
from lora_export.check.results import CheckReport
from lora_export.check.run import run_cases
from lora_export.export.again import merged_again
from lora_export.export.contracts import contract_of
from lora_export.export.genai import write_settings
from lora_export.export.graphs import FinishedGraph, finished_graphs
from lora_export.export.integers import Maker
from lora_export.export.lifecycle import AddOptions, add_to, remove_from
from lora_export.export.options import ExportOptions
from lora_export.export.outputs import Meter, planned_bytes
from lora_export.export.plan import Plan, Request, make_plan
from lora_export.export.quantizing import quantize_graphs, require_possible
from lora_export.export.recall import Recalled, keep, recalled, record_key
from lora_export.export.records import Sources, adapter_records, hashed_sources, hashes_of, write_config
from lora_export.export.resolve import Resolved, resolve
from lora_export.export.targets import target_modules
from lora_export.extract.results import ExtractReport
from lora_export.extract.run import ExtractRequest, run_extract
from lora_export.fleet.options import FleetOptions
from lora_export.fleet.outcomes import FleetReport
from lora_export.fleet.remote import placed
from lora_export.fleet.run import run_fleet
from lora_export.folders import held, own_folder
from lora_export.graph.bind import write_graphs
from lora_export.integrity.signature import sign, signer_with
from lora_export.integrity.sources import SourceOverrides, locate_sources
from lora_export.progress import Progress, Remark, mute, silent
from lora_export.report.extract_html import write_extract_reports
from lora_export.report.fleet import write_fleet_reports
from lora_export.report.write import write_reports, write_reproduction, written_if_stopped
from lora_export.staging import refuse_existing, require_disk, staging

_NOT_MOVED = SourceOverrides()


def export(request: Request, options: ExportOptions, *, progress: Progress = silent, remark: Remark = mute) -> Manifest:
    """Export a merged or a dynamic graph to `options.out` and return its manifest.

    Raises:
        LoraExportError: Refused or failed; nothing is left behind.
    """
    refuse_existing(options.out, overwrite=options.overwrite)
    signer = signer_with(options.sign_key) if options.sign_key is not None else None
    key = record_key(request, options)
    earlier = recalled(key, request)
    plan = make_plan(request) if earlier is None else earlier.plan
    for sentence in plan.remarks:
        remark(sentence)
    require_disk(options.out.parent, plan.n_bytes)
    with hashed_sources(plan) as hashed:
        built = _build(plan, options, earlier, progress=progress, remark=remark)
        if earlier is None:
            keep(key, request, options, found=(plan, built.resolved))
        with staging(options.out, overwrite=options.overwrite, n_bytes=built.n_bytes) as folder:
            manifest = _write(built, folder, options, hashed=hashed, progress=progress)
            if signer is not None:
                sign(folder, signer)
    return manifest


@dataclass(frozen=True)
class _Built:
    """What an export writes: finished graphs without weights, and what their weights are made of.

    Attributes:
        resolved: The base's parameters and the adapters, the base as integers if it is quantized.
        n_bytes: About as many are written.
    """

    plan: Plan
    resolved: Resolved
    graphs: Mapping[str, FinishedGraph]
    n_bytes: int


def _build(
    plan: Plan, options: ExportOptions, earlier: Recalled | None, *, progress: Progress, remark: Remark
) -> _Built:
    """PEFT reads the adapters; the graphs are made, or come from the cache (`earlier`: what they were planned with)."""
    progress("reading adapters", 0, 1)
    zeros = options.zeros_for_missing_head
    resolved = resolve(plan, zeros_for_missing_head=zeros) if earlier is None else earlier.resolved
    require_possible(plan, resolved)
    targets = target_modules(options.targets, resolved.model)
    choice = choose_sites(resolved.adapters if plan.request.mode == "dynamic" else (), targets)
    n_bytes = planned_bytes(plan, resolved, choice)
    progress("building the graph", 0, 1)
    graphs = None if earlier is None else earlier.graphs
    if graphs is None:
        graphs = finished_graphs(plan, resolved, choice, use_cache=options.use_cache, remark=remark)
    models = {name: graph.model for name, graph in graphs.items()}
    resolved = resolved.quantized(quantize_graphs(models, plan, resolved, remark=remark))
    return _Built(plan, resolved, graphs, n_bytes)


def _write(
    built: _Built, folder: Path, options: ExportOptions, *, hashed: Callable[[], Sources], progress: Progress
) -> Manifest:
    """Write graphs, weights, adapters, side files and the manifest, which waits for the sources' hashes."""
    plan, resolved, required = built.plan, built.resolved, options.required_inputs
    models = {name: graph.model for name, graph in built.graphs.items()}
    inputs = {name: graph.adapter_inputs for name, graph in built.graphs.items()}
    meter, maker = Meter(progress, built.n_bytes), Maker(resolved.parameters)
    written = write_graphs(models, folder, maker, adapter_inputs=inputs, on_weight=meter, required=required)
    contracts = {
        name: contract_of(model, written.adapter_inputs[name], required=required) for name, model in models.items()
    }
    sources = hashed()
    records = adapter_records(plan, resolved, sources, graphs=contracts, folder=folder)
    files = written.sha256 | hashes_of(records, folder)
    files |= write_config(plan, folder) | copy_carried(plan.carried, folder)
    files |= write_settings(plan, folder, contracts, required=required)
    manifest = Manifest(
        kind=ExportKind.DYNAMIC if plan.request.mode == "dynamic" else ExportKind.MERGED,
        task=plan.task,
        dtype=plan.dtype,
        provider=plan.request.provider,
        base=sources.base,
        adapters=records,
        graphs=contracts,
        files=dict(sorted(files.items())),
        pad_token_id=plan.pad_token_id,
        quantization=resolved.parameters.quantization,
        given_graph=sources.graph,
        sentence_embedding=None if plan.head is None else plan.head.embedding,
    )
    write_manifest(folder, manifest)
    return manifest


def add_adapter(
    folder: Path,
    adapters: Sequence[tuple[str, str | None]],
    overrides: SourceOverrides = _NOT_MOVED,
    *,
    options: AddOptions = AddOptions(),  # noqa: B008 a value that does not change
    progress: Progress = silent,
    remark: Remark = mute,
) -> Manifest:
    """Pack more adapters for the dynamic export in `folder`, without exporting its graph again.

    Raises:
        InputRefused: The export is merged, the base is not the one it was made from, an adapter's name is taken, or
            an adapter needs a module that the graph has no inputs for. The export is as it was.
    """
    with changing(folder) as change:
        return add_to(change, adapters, overrides, options=options, progress=progress, remark=remark)


def remove_adapters(
    folder: Path, names: Sequence[str], *, sign_key: Path | None = None, remark: Remark = mute
) -> Manifest:
    """Take adapters out of the dynamic export in `folder`: their entries of the manifest, and their files.

    Args:
        sign_key: Private key (PEM); without one, a signature of the folder as it was is removed.

    Raises:
        InputRefused: The export is merged.
        UsageProblem: It has no such adapter; nothing was removed.
    """
    with changing(folder) as change:
        return remove_from(change, names, sign_key, remark=remark)


def check(
    folder: Path,
    overrides: SourceOverrides = _NOT_MOVED,
    options: CheckOptions = CheckOptions(),  # noqa: B008 a value that does not change
    *,
    progress: Progress = silent,
    remark: Remark = mute,
) -> tuple[CheckReport, dict[str, Path]]:
    """Compare the export in `folder` with unmerged PEFT; the report, and the files it was written to.

    Args:
        remark: Told what will be compared, before it is.

    Raises:
        LoraExportError: The export, its base or an adapter cannot be used; a failed gate is a result, not an error.
            What was compared before anything is raised is written as a partial report.
    """
    with held(folder, to_read=True):
        running = opened_check(folder, overrides, options)
        for sentence in running.described:
            remark(sentence)

        def write(stopped: str | None = None) -> tuple[CheckReport, dict[str, Path]]:
            report, reports = running.report(stopped), folder / REPORTS
            return report, write_reports(report, reports) | write_reproduction(running.reproduction, reports)

        with written_if_stopped(write, lambda: bool(running.examination.cases)):
            run_cases(running, progress)
        return write()


def plan_check(
    folder: Path,
    overrides: SourceOverrides = _NOT_MOVED,
    options: CheckOptions = CheckOptions(),  # noqa: B008 a value that does not change
) -> tuple[str, ...]:
    """What `check` would compare, a sentence each; nothing is compared and nothing written.

    Raises:
        LoraExportError: As `check`, before its first comparison.
    """
    return opened_check(folder, overrides, options).described


def bench(
    folder: Path,
    overrides: SourceOverrides = _NOT_MOVED,
    options: BenchOptions = BenchOptions(),  # noqa: B008 a value that does not change
    *,
    progress: Progress = silent,
) -> tuple[BenchReport, dict[str, Path]]:
    """Time the export in `folder` against its base and its merged form, exported for the comparison beside it.

    Raises:
        LoraExportError: The export, its base, an adapter, the budget or the other export cannot be used; a failed gate
            is a result, not an error. What was measured before anything is raised is written as a partial report.
    """
    plan = plan_bench(folder, options)
    base, adapters = locate_sources(plan.manifest, overrides)
    with held(folder, to_read=True), own_folder(folder.resolve().parent, ".bench-") as temporary:
        compared = export_compared(plan, base, adapters, out=temporary, progress=progress)
        running = Bench(plan, compared)

        def write(stopped: str | None = None) -> tuple[BenchReport, dict[str, Path]]:
            report = running.report(stopped)
            return report, write_reports(report, folder / REPORTS)

        with written_if_stopped(write, lambda: running.has_results):
            run_measurements(running, progress)
        return write()


def export_compared(
    plan: BenchPlan, base: Path, adapters: Mapping[str, Path], *, out: Path, progress: Progress
) -> dict[str, Path]:
    """Export the base, and of a dynamic export one adapter folded in, as the export was; the folders under `out`."""
    for done, (label, folded) in enumerate(plan.compared.items()):
        progress("exporting what to compare with", done, len(plan.compared))
        request = merged_again(plan.manifest, base, adapters, folded=folded)
        export(request, ExportOptions(out / label, zeros_for_missing_head=True))
    return {label: out / label for label in plan.compared}


def extract_adapter(
    request: ExtractRequest, out: Path, *, overwrite: bool = False, progress: Progress = silent
) -> tuple[ExtractReport, dict[str, Path]]:
    """Turn a full fine-tune of a base into an adapter in folder `out`; the report, and the files it was written to.

    Raises:
        LoraExportError: Refused or failed; nothing is left behind.
    """
    return run_extract(request, out, write_extract_reports, overwrite=overwrite, progress=progress)


def fleet(
    source: Path, base: str, options: FleetOptions, *, progress: Progress = silent
) -> tuple[FleetReport, dict[str, Path | str]]:
    """Make or renew the fleet of what `source` lists, in a folder or at an address; the report, and where it is.

    Raises:
        LoraExportError: As `run_fleet`; an adapter that is refused, differs or breaks its worker is a result.
    """

    def made(request: Request, out: Path, targets: tuple[str, ...]) -> Manifest:
        return export(request, ExportOptions(out, targets=targets), progress=progress)

    with placed(options.out, progress) as place:
        here = replace(options, out=place.folder)
        report = run_fleet(source, base, here, place=place, export=made, progress=progress)
        report = replace(report, folder=str(options.out))
        return report, place.published(write_fleet_reports(report, place.folder / REPORTS))
