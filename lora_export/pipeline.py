"""The main path. Data flows one way, through values that are not changed:

    request ─► plan (refusals) ─► resolve (PEFT reads the adapters) ─► finished weightless graph (cached)
            ─► write, one weight at a time ─► side files ─► manifest ─► the folder appears

and from the folder: check (unmerged PEFT against ONNX Runtime), bench (paired latencies), run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_export.adapters.factors import Adapter
from lora_export.adapters.pack import pack, write_onnx_adapter
from lora_export.adapters.peft_reader import AdapterFolder
from lora_export.artifact import (
    ADAPTERS,
    AdapterRecord,
    Kind,
    Manifest,
    SourceRecord,
    carry_files,
    read_manifest,
    refuse_existing,
    sha256_of,
    staging,
    write_manifest,
)
from lora_export.base.checkpoint import weight_files
from lora_export.contract import GraphContract
from lora_export.errors import InputRefused
from lora_export.finished_graph import choose_sites, describe, finished_graph
from lora_export.graph.bind import write_graph
from lora_export.plan import Plan, Request, Resolved, local_path, make_plan, resolve

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    """The default progress: none."""


@dataclass(frozen=True)
class ExportOptions:
    """How to write an export, as opposed to what (`Request`)."""

    out: Path
    overwrite: bool = False
    use_cache: bool = True
    targets: tuple[str, ...] = ()
    zeros_for_missing_head: bool = False


def export(request: Request, options: ExportOptions, progress: Progress = _silent) -> Manifest:
    """Export a merged or a dynamic graph to `options.out` and return its manifest.

    Raises:
        LoraExportError: Refused or failed; nothing is left behind.
    """
    refuse_existing(options.out, overwrite=options.overwrite)
    plan = make_plan(request)
    with ThreadPoolExecutor(max_workers=1) as hashing:
        sources = hashing.submit(_hash_sources, plan)
        progress("reading adapters", 0, 1)
        resolved = resolve(plan, zeros_for_missing_head=options.zeros_for_missing_head)
        choice = choose_sites(resolved.adapters if request.mode == "dynamic" else (), options.targets)
        progress("building the graph", 0, 1)
        model, adapter_inputs = finished_graph(plan, resolved, choice, use_cache=options.use_cache)
        n_bytes = _bytes_needed(plan)
        with staging(options.out, overwrite=options.overwrite, n_bytes=n_bytes) as folder:
            done = 0

            def on_weight(name: str, size: int) -> None:
                nonlocal done
                done += size
                progress("writing weights", done, n_bytes)

            written = write_graph(model, folder, resolved.source.make_weight, adapter_inputs, on_weight)
            contract = describe(model, written.adapter_inputs)
            files = written.sha256 | carry_files(
                plan.checkpoint.path, {f.name: f.path for f in plan.folders}, folder
            )
            files |= _write_config(plan, folder)
            records = tuple(
                _write_adapter(f, a, c.num_labels, contract, resolved, folder, request.mode)
                for f, a, c in zip(plan.folders, resolved.adapters, plan.adapter_configs, strict=True)
            )
            files |= {r.file: sha256_of(folder / r.file) for r in records if r.file}
            base_record, adapter_sources = sources.result()
            records = tuple(
                replace(record, source=source) for record, source in zip(records, adapter_sources, strict=True)
            )
            kind = Kind.DYNAMIC if request.mode == "dynamic" else Kind.MERGED
            manifest = Manifest(
                kind, plan.task, plan.dtype, request.provider, base_record, records, contract, dict(sorted(files.items()))
            )
            write_manifest(folder, manifest)
    return manifest


def _bytes_needed(plan: Plan) -> int:
    item = 4 if plan.dtype == "float32" else 2
    return sum(item * torch.Size(info.shape).numel() for info in plan.checkpoint.files.tensors.values())


def _hash_sources(plan: Plan) -> tuple[SourceRecord, tuple[SourceRecord, ...]]:
    base_files = [plan.checkpoint.path / "config.json", *weight_files(plan.checkpoint.path)]
    located = plan.checkpoint.located
    base = SourceRecord(local_path(located.given), located.revision, {f.name: sha256_of(f) for f in base_files})
    adapters = tuple(_hash_adapter(folder) for folder in plan.folders)
    return base, adapters


def _hash_adapter(folder: AdapterFolder) -> SourceRecord:
    files = ("adapter_config.json", "adapter_model.safetensors")
    return SourceRecord(local_path(folder.given), None, {name: sha256_of(folder.path / name) for name in files})


def _write_config(plan: Plan, folder: Path) -> dict[str, str]:
    fields = plan.checkpoint.config | {"id2label": plan.config.id2label, "label2id": plan.config.label2id}
    path = folder / "config.json"
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {path.name: sha256_of(path)}


def _write_adapter(
    source: AdapterFolder,
    adapter: Adapter,
    n_labels: int,
    contract: GraphContract,
    resolved: Resolved,
    folder: Path,
    mode: str,
) -> AdapterRecord:
    file = None
    if mode == "dynamic":
        file = f"{ADAPTERS}/{adapter.name}.onnx_adapter"
        tensors = pack(adapter, contract, lambda path: resolved.source.parameter(path, torch.float32))
        (folder / ADAPTERS).mkdir(exist_ok=True)
        write_onnx_adapter(folder / file, tensors)
    return AdapterRecord(
        name=adapter.name,
        source=SourceRecord(source.given, None, {}),
        ranks=adapter.ranks,
        scales=tuple(sorted({pair.scale for pair in adapter.lora.values()})),
        targets=tuple(adapter.lora),
        replaced=tuple(adapter.replaced),
        labels=source.labels,
        n_labels=n_labels if adapter.replaced else None,
        file=file,
    )
