"""A check of an export whose sources and examples are looked for."""

from __future__ import annotations

from pathlib import Path

from lora_export.artifact import AdapterRecord, Manifest, read_manifest
from lora_export.base.checkpoint import locate
from lora_export.base.sentence_folder import sentence_root
from lora_export.base.tasks import CLASSIFIED
from lora_export.check.context import CheckOptions, CheckRequest
from lora_export.check.inputs.examples import read_examples, require_classes
from lora_export.check.reference.sentence import SentenceReference
from lora_export.check.run import Check, begin_check
from lora_export.integrity.sources import SourceOverrides, locate_sources

# Of a file, unless the user says otherwise.
_MOST_ROWS = 128


def opened_check(folder: Path, overrides: SourceOverrides, options: CheckOptions) -> Check:
    """The check of the export in `folder`, its sources found again; nothing is compared yet.

    Raises:
        LoraExportError: The export, its base or an adapter cannot be used, or not as asked.
    """
    manifest = read_manifest(folder)
    base, adapters = locate_sources(manifest, overrides)
    for name in filter(None, options.data):
        manifest.adapter(name)
    examples = {name: read_examples(path, options.n_rows or _MOST_ROWS) for name, path in options.data.items()}
    for name, rows in examples.items():
        records = manifest.adapters if name is None else [manifest.adapter(name)]
        for n_classes in {classes_of(manifest, record) for record in records}:
            require_classes(rows, n_classes)
    request = CheckRequest(
        folder=folder,
        base=base,
        adapters=adapters,
        provider=options.provider,
        data=examples,
        merged=options.merged,
        tolerances=options.tolerances,
        keep_rows=options.n_rows is not None,
        sentence=_sentence_of(manifest, base, overrides),
    )
    return begin_check(request)


def classes_of(manifest: Manifest, record: AdapterRecord) -> int | None:
    """The classes of the head that an adapter brings, or else the base's; None where the task has no classes."""
    if manifest.task not in CLASSIFIED:
        return None
    (size,) = [spec.dims[-1] for spec in manifest.contract.outputs if spec.name == "logits"]
    found = record.n_labels or (size if isinstance(size, int) else None)
    return None if found == 1 else found  # a number is asked for, as in a regression


def _sentence_of(manifest: Manifest, base: Path, overrides: SourceOverrides) -> SentenceReference | None:
    """What makes an embedding of hidden states, of the folder that the export has it from."""
    embedding = manifest.sentence_embedding
    if embedding is None:
        return None
    place = base
    if embedding.source:  # the user's own folder: a PEFT folder made of it has the adapter alone
        given = overrides.adapters.get(embedding.source, manifest.adapter(embedding.source).source.given)
        place = locate(given, kind="adapter").path
    return SentenceReference.of_folder(embedding, None if embedding.source is None else sentence_root(place))
