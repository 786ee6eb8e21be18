"""What an export writes beside its graph: the adapters' files, the config, and the records of the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lora_export.adapters.factors import Adapter
from lora_export.adapters.pack import pack, write_onnx_adapter
from lora_export.adapters.peft_reader import AdapterFolder
from lora_export.artifact import ADAPTERS, AdapterRecord, SourceRecord, sha256_of
from lora_export.base.stored import weight_files
from lora_export.contract import GraphContract
from lora_export.foreign import source_hashes
from lora_export.plan import Plan, local_path
from lora_export.weights import ParameterSource


def hash_sources(plan: Plan) -> tuple[SourceRecord, tuple[SourceRecord, ...]]:
    """The base and the adapters of a plan, as they were given and by sha256 of their files."""
    base_files = [plan.checkpoint.path / "config.json", *weight_files(plan.checkpoint.path)]
    located = plan.checkpoint.located
    base = SourceRecord(local_path(located.given), located.revision, {f.name: sha256_of(f) for f in base_files})
    return base, tuple(map(hash_adapter, plan.folders))


def hash_adapter(folder: AdapterFolder) -> SourceRecord:
    """An adapter as it was given and by sha256 of its files."""
    return SourceRecord(local_path(folder.given), None, source_hashes(folder.path))


def write_config(plan: Plan, folder: Path) -> dict[str, str]:
    """Write the base's `config.json` with the labels of the exported head; sha256 by file name."""
    fields = plan.checkpoint.config | {"id2label": plan.config.id2label, "label2id": plan.config.label2id}
    path = folder / "config.json"
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {path.name: sha256_of(path)}


def served_record(
    source: AdapterFolder, adapter: Adapter, n_labels: int, contract: GraphContract, base: ParameterSource, folder: Path
) -> AdapterRecord:
    """Pack `adapter` into `folder/adapters/` and describe it.

    Raises:
        InputRefused: It needs modules that the graph has no inputs for.
    """
    tensors = pack(adapter, contract, lambda path: base.parameter(path, torch.float32))
    file = f"{ADAPTERS}/{adapter.name}.onnx_adapter"
    (folder / ADAPTERS).mkdir(exist_ok=True)
    write_onnx_adapter(folder / file, tensors)
    return _record(source, adapter, n_labels, file)


def merged_record(source: AdapterFolder, adapter: Adapter, n_labels: int) -> AdapterRecord:
    """Describe an adapter that was folded into the graph."""
    return _record(source, adapter, n_labels, None)


def _record(source: AdapterFolder, adapter: Adapter, n_labels: int, file: str | None) -> AdapterRecord:
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
