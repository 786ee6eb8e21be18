"""Adapters of a dynamic export that come, are replaced and go, without exporting its graph again.

All that is new is made in a folder of its own, and the export changes at once (`changing`). So an adapter that is
refused leaves the export as it was. One process at a time changes an export.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.artifact import ADAPTERS, AdapterRecord, ExportKind, Manifest, read_manifest, write_manifest
from lora_export.base.sentence_folder import sentence_root
from lora_export.carried import copy_carried, licensed_adapter
from lora_export.changing import Change
from lora_export.errors import InputRefused
from lora_export.export.again import asked_again
from lora_export.export.contracts import require_described
from lora_export.export.plan import Plan, make_plan
from lora_export.export.pooling import same_heads, without_source
from lora_export.export.records import adapter_records, hashed_sources, hashes_of, require_gated
from lora_export.export.resolve import resolve
from lora_export.integrity.signature import sign, signer_with
from lora_export.integrity.sources import SourceOverrides, locate_sources
from lora_export.progress import Progress, Remark
from lora_export.sentence import NONE

if TYPE_CHECKING:
    from model_signing import signing


@dataclass(frozen=True)
class AddOptions:
    """How to read the adapters that are added to an export, and whether to sign it anew.

    Attributes:
        convert_rank, residual_base: As in `Request`.
        sign_key: Private key (PEM); without one, a signature of the folder as it was is removed.
        replace: Whether an adapter takes the place of one that has its name; without, it is refused.
    """

    convert_rank: float | None = None
    residual_base: bool = False
    sign_key: Path | None = None
    replace: bool = False


def add_to(
    change: Change,
    adapters: Sequence[tuple[str, str | None]],
    overrides: SourceOverrides,
    *,
    options: AddOptions,
    progress: Progress,
    remark: Remark,
) -> Manifest:
    """See `pipeline.add_adapter`, which holds the folder."""
    folder = change.place
    signer = signer_with(options.sign_key) if options.sign_key is not None else None
    manifest = _dynamic_manifest(folder, "A merged export holds one task and takes no more adapters")
    require_described(manifest, folder)
    base, _ = locate_sources(manifest, SourceOverrides(overrides.base), only_base=True)
    request = replace(
        asked_again(manifest, base, adapters, mode="dynamic"),
        convert_rank=options.convert_rank,
        residual_base=options.residual_base,
        pooling=NONE,
    )
    plan = make_plan(request, added_to=folder)
    heads, on_texts = same_heads(manifest.sentence_embedding, plan.folders)
    plan = replace(plan, own_heads=heads, remarks=plan.remarks + on_texts)
    replaced = _replaced(plan, manifest, folder, may_replace=options.replace)
    silent = {source.name for source in plan.folders if sentence_root(source.path) is None}
    others = [record for record in manifest.adapters if record not in replaced]
    embedding = without_source(manifest.sentence_embedding, silent & {record.name for record in replaced}, others)
    for sentence in (*plan.remarks, *_staying(replaced)):
        remark(sentence)
    progress("reading adapters", 0, 1)
    with hashed_sources(plan) as sources_when_hashed:
        resolved = resolve(plan).quantized(manifest.quantization)
        for adapter in resolved.adapters:
            require_gated(adapter, manifest)
        records = adapter_records(plan, resolved, sources_when_hashed(), graphs=manifest.graphs, folder=change.made)
        files = hashes_of(records, change.made) | copy_carried(plan.carried, change.made)
    kept = files_without(manifest, replaced)
    by_name = {record.name: record for record in records}
    in_place = tuple(by_name.pop(record.name, record) for record in manifest.adapters)
    files = dict(sorted((kept | files).items()))
    changed = replace(manifest, adapters=(*in_place, *by_name.values()), files=files, sentence_embedding=embedding)
    _publish(change, manifest, changed, signer=signer)
    return changed


def remove_from(change: Change, names: Sequence[str], sign_key: Path | None, *, remark: Remark) -> Manifest:
    """See `pipeline.remove_adapters`, which holds the folder."""
    signer = signer_with(sign_key) if sign_key is not None else None
    what = "A merged export has its adapters in its weights, and none can be taken out"
    manifest = _dynamic_manifest(change.place, what)
    gone = [manifest.adapter(name) for name in dict.fromkeys(names)]
    for sentence in _staying(gone):
        remark(sentence)
    left = tuple(record for record in manifest.adapters if record not in gone)
    embedding = without_source(manifest.sentence_embedding, [record.name for record in gone], left)
    changed = replace(manifest, adapters=left, files=files_without(manifest, gone), sentence_embedding=embedding)
    _publish(change, manifest, changed, signer=signer)
    return changed


def _dynamic_manifest(folder: Path, what: str) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.kind is not ExportKind.DYNAMIC:
        raise InputRefused(
            what,
            where=str(folder),
            next_step="export with `lora-export dynamic` to serve several",
        )
    return manifest


def _replaced(plan: Plan, manifest: Manifest, folder: Path, *, may_replace: bool) -> list[AdapterRecord]:
    added = {source.name for source in plan.folders}
    taken = [record for record in manifest.adapters if record.name in added]
    if taken and not may_replace:
        raise InputRefused(
            f"The export already has an adapter {taken[0].name!r}",
            where=str(folder),
            next_step="give the new one another name with --name, or put it in the old one's place with --replace",
        )
    return taken


def _staying(gone: Sequence[AdapterRecord]) -> list[str]:
    whole = [record.name for record in gone if record.preprocessing == "."]
    return [f"the export's tokenizer stays the one that adapter {name!r} brought" for name in whole]


def files_without(manifest: Manifest, gone: Sequence[AdapterRecord]) -> dict[str, str]:
    """The manifest's files but those that belong to the adapters `gone` alone."""
    packed = {file for record in gone for file in record.files.values()}
    places = tuple(f"{ADAPTERS}/{record.name}/" for record in gone)
    every, names = [record.name for record in manifest.adapters], {record.name for record in gone}
    return {
        file: sha256
        for file, sha256 in manifest.files.items()
        if file not in packed and not file.startswith(places) and licensed_adapter(file, every) not in names
    }


def _publish(change: Change, before: Manifest, after: Manifest, *, signer: signing.Config | None) -> None:
    write_manifest(change.made, after)
    change.gone.update(before.files.keys() - after.files.keys())
    change.publish(partial(sign, signer=signer) if signer is not None else lambda folder: None)
