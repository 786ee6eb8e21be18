"""What an export writes beside its graph: the adapters' files, the config, and the records of the manifest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lora_export.adapters.factors import Adapter
from lora_export.adapters.folder import CONFIG, WEIGHTS
from lora_export.adapters.foreign import source_hashes
from lora_export.adapters.pack import pack, write_onnx_adapter
from lora_export.artifact import ADAPTERS, AdapterRecord, Manifest, SourceRecord, sha256_of
from lora_export.base.sentence_folder import SentenceHead, files_read
from lora_export.base.stored import source_files
from lora_export.contract import GraphContract, adapter_file
from lora_export.errors import InputRefused, some_of
from lora_export.export.padding import padded_fields
from lora_export.export.plan import Plan, local_path
from lora_export.export.resolve import Resolved
from lora_export.export.weights import Parameters
from lora_export.folders import state_of


@dataclass(frozen=True)
class Sources:
    """The base and the adapters of a plan, and the graph if it was given, by sha256 of their files."""

    base: SourceRecord
    adapters: tuple[SourceRecord, ...]
    graph: SourceRecord | None = None


@contextlib.contextmanager
def hashed_sources(plan: Plan) -> Iterator[Callable[[], Sources]]:
    """Hash the sources of a plan on another thread; what is given waits for the result.

    It is called when all is read, and refuses a source that has changed since: what was read is of two files then.
    """
    files = [
        *source_files(plan.checkpoint.located.path),
        *(f.path / name for f in plan.folders for name in (CONFIG, WEIGHTS)),
        *(file for head in plan.own_heads.values() for file in head.files),
    ]
    before = {file: state_of(file) for file in files}
    with ThreadPoolExecutor(max_workers=1) as hashing:
        hashed = hashing.submit(_hash_sources, plan)

        def result() -> Sources:
            found = hashed.result()
            _refuse_changed([file for file in files if state_of(file) != before[file]])
            return found

        yield result


def _refuse_changed(files: Sequence[Path]) -> None:
    if files:
        raise InputRefused(
            "A file was changed while it was read",
            where=some_of([str(file) for file in files], 4),
            next_step="run again when nothing writes to it",
        )


def _hash_sources(plan: Plan) -> Sources:
    located = plan.checkpoint.located
    base_files = source_files(located.path)
    hashes = {file.relative_to(located.path).as_posix(): sha256_of(file) for file in base_files}
    hashes = with_settings(hashes, plan.checkpoint.path, plan.own_heads.get(""))
    base = SourceRecord(local_path(located.given), located.revision, hashes)
    adapters = [
        SourceRecord(
            local_path(f.given), None, with_settings(source_hashes(f.path), f.path, plan.own_heads.get(f.name))
        )
        for f in plan.folders
    ]
    given = plan.given_graph
    graph = None if given is None else SourceRecord(str(given.path), None, given.hashes())
    return Sources(base, tuple(adapters), graph)


def with_settings(hashes: Mapping[str, str], place: Path, head: SentenceHead | None) -> dict[str, str]:
    """The hashes of a source in folder `place`, with those of what is read of the sentence-transformers folder that it
    is or is the Transformer of, by path from there.

    Args:
        head: What was read of how it embeds; None where nothing was.
    """
    below, files = files_read(place, head)
    root = files[0].parent if files else place
    own = {file.relative_to(root).as_posix(): sha256_of(file) for file in files}
    return {(below / name).as_posix(): found for name, found in hashes.items()} | own


def write_config(plan: Plan, folder: Path) -> dict[str, str]:
    """Write the base's `config.json` with the labels of the exported head and its vocabulary; sha256 by file name."""
    fields = padded_fields(plan.checkpoint.config, plan.pad_token_id)
    fields |= {"id2label": plan.config.id2label, "label2id": plan.config.label2id}
    if "vocab_size" in fields:
        fields["vocab_size"] = plan.config.vocab_size
    path = folder / "config.json"
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {path.name: sha256_of(path)}


def adapter_records(
    plan: Plan, resolved: Resolved, sources: Sources, *, graphs: Mapping[str, GraphContract], folder: Path
) -> tuple[AdapterRecord, ...]:
    """The entries of the manifest for a plan's adapters; of a dynamic export, each is packed into `folder/adapters/`.

    Args:
        graphs: The contracts of the export's graphs.

    Raises:
        InputRefused: An adapter needs modules that no graph has inputs for.
    """
    records = []
    for place, (source, adapter) in enumerate(zip(plan.folders, resolved.adapters, strict=True)):
        is_merged = plan.request.mode == "merge"
        files = {} if is_merged else _pack(adapter, graphs, resolved.parameters, folder=folder)
        is_converted = source.config.get("peft_type") not in ("LORA", "ADALORA", "TRAINABLE_TOKENS")
        records.append(
            AdapterRecord(
                name=adapter.name,
                source=sources.adapters[place],
                ranks=adapter.ranks,
                scales=tuple(sorted({pair.scale for pair in adapter.pairs.values()})),
                targets=adapter.modules,
                replaced=tuple(adapter.replaced),
                labels=source.labels,
                n_labels=plan.adapter_configs[place].num_labels if adapter.replaced else None,
                files=files,
                weight=plan.request.weight_of_each[place] if is_merged else 1.0,
                convert_rank=plan.request.convert_rank if is_converted and not is_merged else None,
                conversion_errors=dict(adapter.conversion_errors),
                invocation_tokens=adapter.invocation_tokens,
                residual_base=plan.request.residual_base,
                preprocessing=plan.carried.places.get(adapter.name),
                other_base=plan.other_bases.get(adapter.name),
            )
        )
    return tuple(records)


def _pack(adapter: Adapter, graphs: Mapping[str, GraphContract], base: Parameters, *, folder: Path) -> dict[str, str]:
    """Write a file for each of `graphs` that takes any of `adapter`; their paths in `folder`."""
    packed = {}
    for graph, contract in graphs.items():
        elsewhere = {module for other in graphs.values() if other is not contract for module in other.modules}
        packed[graph] = pack(adapter, contract, base.served, elsewhere=elsewhere)
    (folder / ADAPTERS).mkdir(exist_ok=True)
    files = {}
    for graph, tensors in packed.items():
        if tensors or len(graphs) == 1:
            files[graph] = f"{ADAPTERS}/{adapter_file(adapter.name, graph)}"
            write_onnx_adapter(folder / files[graph], tensors)
    return files


def hashes_of(records: Sequence[AdapterRecord], folder: Path) -> dict[str, str]:
    """sha256 of the adapters' own files by path in `folder`."""
    return {file: sha256_of(folder / file) for record in records for file in record.files.values()}


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
