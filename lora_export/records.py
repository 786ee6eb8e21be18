"""What an export writes beside its graph: the adapters' files, the config, and the records of the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_export.adapters.factors import Adapter
from lora_export.adapters.folder import AdapterFolder
from lora_export.adapters.pack import pack, write_onnx_adapter
from lora_export.artifact import ADAPTERS, AdapterRecord, Manifest, SourceRecord, sha256_of
from lora_export.base.stored import weight_files
from lora_export.contract import GraphContract, adapter_file
from lora_export.errors import InputRefused, some_of
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
    """Write the base's `config.json` with the labels of the exported head and its vocabulary; sha256 by file name."""
    fields = plan.checkpoint.config | {"id2label": plan.config.id2label, "label2id": plan.config.label2id}
    if "vocab_size" in fields:
        fields["vocab_size"] = plan.config.vocab_size
    path = folder / "config.json"
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {path.name: sha256_of(path)}


def served_record(
    source: AdapterFolder,
    adapter: Adapter,
    n_labels: int,
    graphs: Mapping[str, GraphContract],
    base: ParameterSource,
    folder: Path,
    convert_rank: float | None = None,
) -> AdapterRecord:
    """Pack `adapter` into `folder/adapters/`, a file for each of `graphs` that takes any of it, and describe it.

    Raises:
        InputRefused: It needs modules that no graph has inputs for.
    """
    packed = {}
    for graph, contract in graphs.items():
        elsewhere = {module for other in graphs.values() if other is not contract for module in other.modules}
        packed[graph] = pack(adapter, contract, base.base, elsewhere)
    (folder / ADAPTERS).mkdir(exist_ok=True)
    files = {}
    for graph, tensors in packed.items():
        if tensors or len(graphs) == 1:
            files[graph] = f"{ADAPTERS}/{adapter_file(adapter.name, graph)}"
            write_onnx_adapter(folder / files[graph], tensors)
    is_converted = source.config.get("peft_type") not in ("LORA", "ADALORA", "TRAINABLE_TOKENS")
    record = _record(source, adapter, n_labels, files)
    return replace(record, convert_rank=convert_rank if is_converted else None)


def merged_record(source: AdapterFolder, adapter: Adapter, n_labels: int, weight: float) -> AdapterRecord:
    """Describe an adapter that was folded into the graph, with its weight in the sum."""
    return replace(_record(source, adapter, n_labels, {}), weight=weight)


def require_gated(adapter: Adapter, manifest: Manifest) -> None:
    """Refuse an activated LoRA where the graph has no gate on one of its pairs: it would be active for all tokens.

    A graph has gates where the activated adapters that it was exported with have pairs.

    Raises:
        InputRefused: Pairs of the adapter have no gate; their modules are named.
    """
    if adapter.invocation_tokens is None:
        return
    gated = {module for record in manifest.adapters if record.invocation_tokens for module in record.targets}
    bare = [module for module in adapter.pairs if module not in gated]
    if bare:
        raise InputRefused(
            f"The export has no gate for the activated LoRA {adapter.name!r}",
            where=some_of(bare, 5),
            expected="modules that an activated LoRA of this export adapts",
            next_step="export again with `lora-export dynamic`, this adapter among the others",
        )


def _record(source: AdapterFolder, adapter: Adapter, n_labels: int, files: dict[str, str]) -> AdapterRecord:
    return AdapterRecord(
        name=adapter.name,
        source=SourceRecord(source.given, None, {}),
        ranks=adapter.ranks,
        scales=tuple(sorted({pair.scale for pair in adapter.pairs.values()})),
        targets=adapter.modules,
        replaced=tuple(adapter.replaced),
        labels=source.labels,
        n_labels=n_labels if adapter.replaced else None,
        files=files,
        conversion_errors=dict(adapter.conversion_errors),
        invocation_tokens=adapter.invocation_tokens,
    )
