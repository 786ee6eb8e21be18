"""What things hold and what would be done with them: `inspect` and `--dry-run`, as values. Nothing is written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from lora_export.adapters.folder import CONFIG as ADAPTER_CONFIG
from lora_export.adapters.folder import AdapterFolder, open_adapter
from lora_export.adapters.foreign import ForeignAdapter, locate_adapter, name_of, read_foreign
from lora_export.adapters.pack import choose_sites
from lora_export.adapters.support import options_in_use, tuner_verdict
from lora_export.artifact import MANIFEST, SIGNATURE, Manifest, read_manifest
from lora_export.base.checkpoint import Checkpoint, locate
from lora_export.base.gguf_file import GgufFiles
from lora_export.base.stored import SAFETENSORS_DTYPES
from lora_export.base.tasks import tasks_of
from lora_export.contract import SINGLE
from lora_export.errors import InputRefused, LoraExportError
from lora_export.export.given_graph import given_graph
from lora_export.export.origin import quantized_training
from lora_export.export.outputs import planned_bytes, planned_files
from lora_export.export.plan import Request, make_plan
from lora_export.export.quantizing import require_possible
from lora_export.export.resolve import resolve
from lora_export.export.targets import target_modules
from lora_export.integrity.signature import signer_with
from lora_export.named import ANY, expanded, holds_no
from lora_export.reading import CONFIG
from lora_export.runtime.session import choose_provider
from lora_export.staging import refuse_existing

# One of these is in every folder that `inspect` takes.
_MARKS = (MANIFEST, ADAPTER_CONFIG, CONFIG)
# Peak memory besides the largest tensor: libraries, the traced graph.
_FIXED_MEMORY_BYTES = 700_000_000


def fuse_provider(requested: str | None) -> tuple[str, str]:
    """The provider to fuse a graph for, and why; naming one needs no GPU."""
    if requested is not None:
        return requested, "asked for"
    choice = choose_provider(None)
    is_cpu = choice.name == "cpu"
    return choice.name, "no usable GPU here; --provider cuda fuses for one elsewhere" if is_cpu else choice.reason


def describe_plan(request: Request, out: Path, targets: tuple[str, ...] = (), *, sign_key: Path | None = None) -> dict:
    """What an export would do: read, folded, served, refused, written; bytes, memory and disk.

    Raises:
        LoraExportError: What the export itself would raise before it writes.
    """
    signed = sign_key is not None and bool(signer_with(sign_key))
    plan = make_plan(request)
    resolved, said = resolve(plan), list(plan.remarks)
    require_possible(plan, resolved)
    served = resolved.adapters if request.mode == "dynamic" else ()
    sites = choose_sites(served, target_modules(targets, resolved.model))
    item = 4 if plan.dtype == "float32" else 2
    # A parameter made of several stored tensors (merged experts) is larger than each of them.
    largest = max((item * math.prod(shape) for shape in resolved.parameters.shapes.values()), default=0)
    graph = None
    if plan.given_graph is not None:
        given_graph(plan.given_graph, resolved, sites, is_merged=request.mode == "merge", remark=said.append)
        graph = {"path": str(plan.given_graph.path), "bytes": plan.given_graph.n_bytes}
    adapters = []
    for folder, adapter in zip(plan.folders, resolved.adapters, strict=True):
        adapters.append(
            _adapter_fields(folder)
            | {
                "pairs": len(adapter.pairs),
                "ranks": list(adapter.ranks),
                "scales": sorted({pair.scale for pair in adapter.pairs.values()}),
                "replaced": list(adapter.replaced),
                "merged_by_peft": list(adapter.layers),
                "conversion_errors": dict(adapter.conversion_errors),
                "becomes": "folded into the weights" if request.mode == "merge" else "inputs of the graph",
            }
        )
    try:
        refuse_existing(out, overwrite=False)
        out_state = "free"
    except LoraExportError as error:
        out_state = error.what
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    return {
        "mode": request.mode,
        "task": plan.task,
        "dtype": plan.dtype,
        "provider": request.provider,
        "quantization": None if request.quantization is None else request.quantization.described,
        "graph": graph,
        "remarks": said,
        "read": _base_fields(plan.checkpoint),
        "adapters": adapters,
        "inputs": {"pairs": len(sites.lora_modules), "replaced_modules": list(sites.replaced_modules)},
        "write": {
            "folder": str(out),
            "state": out_state,
            "files": list(planned_files(plan, resolved, signed=signed)),
            "weight_bytes": planned_bytes(plan, resolved, sites),
            "disk_free_bytes": shutil.disk_usage(parent).free,
        },
        "memory_bytes": _FIXED_MEMORY_BYTES + 3 * largest,
    }


def _base_fields(checkpoint: Checkpoint) -> dict:
    tensors = checkpoint.files.tensors
    by_dtype: dict[str, int] = {}
    for info in tensors.values():
        name = SAFETENSORS_DTYPES.get(info.dtype, info.dtype)
        by_dtype[name] = by_dtype.get(name, 0) + math.prod(info.shape)
    return {
        "what": "base",
        "path": str(checkpoint.files.source if isinstance(checkpoint.files, GgufFiles) else checkpoint.path),
        "architectures": checkpoint.config.get("architectures") or [],
        "model_type": checkpoint.config.get("model_type"),
        "tasks": list(tasks_of(checkpoint.config.get("model_type"))),
        "tensors": len(tensors),
        "parameters_by_dtype": by_dtype,
        "quantization": checkpoint.quantization,
        "files": sorted({str(info.file.name) for info in tensors.values()}),
    }


def _adapter_fields(folder: AdapterFolder) -> dict:
    fields = {
        "what": "adapter",
        "name": folder.name,
        "path": str(folder.path),
        "base": folder.base,
        "task_type": folder.config.get("task_type"),
        "trained_on": quantized_training(folder),
        "tensors": len(folder.shapes),
        "parameters": sum(map(math.prod, folder.shapes.values())),
    }
    if folder.config.get("peft_type") != "LORA":
        tuner = folder.config.get("peft_type")
        found = {mode: tuner_verdict(folder.config, mode) for mode in ("merge", "dynamic")}
        said = {mode: f"{verdict} (tuner {tuner}: {note})" for mode, (verdict, note) in found.items()}
        return fields | {"options": []} | said
    try:
        uses = options_in_use(folder.config)
    except InputRefused as error:
        return fields | {"options": [], "merge": f"refused: {error.what}", "dynamic": f"refused: {error.what}"}
    options = [
        {
            "option": use.option.name,
            "value": use.value,
            "merge": use.verdict("merge"),
            "dynamic": use.verdict("dynamic"),
            "note": use.option.note,
            "instead": use.option.way_out,
        }
        for use in uses
    ]
    verdicts = {
        mode: "refused: " + ", ".join(o["option"] for o in options if o[mode] == "refused")
        if any(o[mode] == "refused" for o in options)
        else "yes"
        for mode in ("merge", "dynamic")
    }
    return fields | {"options": options} | verdicts


def _foreign_fields(adapter: ForeignAdapter, path: Path) -> dict:
    tensors = [tensor for parts in adapter.tensors.values() for tensor in parts.values()]
    return {
        "what": "adapter",
        "name": name_of(path),
        "path": str(path),
        "format": adapter.dialect,
        "base": adapter.mlx.get("model"),
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "modules": sorted(adapter.tensors),
        "ranks": sorted({adapter.rank(name) for name in adapter.tensors}),
    }


def inspect_path(given: str) -> dict:
    """What is at `given`: an export, an adapter, or a base, in that order of precedence.

    Raises:
        InputRefused: It is none of them.
    """
    is_file = expanded(given).is_file()
    if is_file and Path(given).suffix.lower() == ".gguf":
        return _base_fields(Checkpoint.open(locate(given, kind="base")))
    path = locate_adapter(given) if is_file else locate(given, kind=ANY).path
    if (path / MANIFEST).is_file():
        return describe_export(path, read_manifest(path))
    if (foreign := read_foreign(path)) is not None:
        return _foreign_fields(foreign, path)
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter_fields(open_adapter(path, given))
    if (path / CONFIG).is_file():
        return _base_fields(Checkpoint.open(locate(given, kind="base")))
    raise holds_no(ANY, path, *_MARKS, expected=f"{', '.join(_MARKS[:-1])} or {_MARKS[-1]} in it")


def describe_export(folder: Path, manifest: Manifest) -> dict:
    """An exported folder: what it serves, how large it is."""
    return {
        "what": "export",
        "path": str(folder),
        "kind": manifest.kind,
        "task": manifest.task,
        "dtype": manifest.dtype,
        "provider": manifest.provider,
        "quantization": None if manifest.quantization is None else manifest.quantization.described,
        "quantized_weights": 0 if manifest.quantization is None else len(manifest.quantization.weights),
        "base": manifest.base.given,
        "given_graph": None if manifest.given_graph is None else manifest.given_graph.given,
        "adapters": [
            {
                "name": record.name,
                "ranks": list(record.ranks),
                "scales": list(record.scales),
                "targets": len(record.targets),
                "replaced": list(record.replaced),
                **({"file": record.file} if SINGLE in manifest.graphs else {"files": dict(record.files)}),
                "weight": record.weight,
                "conversion_errors": record.conversion_errors,
                "preprocessing": record.preprocessing,
            }
            for record in manifest.adapters
        ],
        **_graph_fields(manifest),
        "signed": (folder / SIGNATURE).is_file(),
        "bytes": {name: (folder / name).stat().st_size for name in manifest.files if (folder / name).is_file()},
    }


def _graph_fields(manifest: Manifest) -> dict:
    """Inputs and outputs of the only graph, or of each of `graphs`."""
    found = {
        graph: {
            "inputs": {spec.name: list(spec.dims) for spec in contract.inputs},
            "outputs": {spec.name: list(spec.dims) for spec in contract.outputs},
            "adapter_inputs": len(contract.adapter_inputs),
        }
        for graph, contract in manifest.graphs.items()
    }
    return found.get(SINGLE) or {"graphs": found}
