"""A check of an export whose sources and examples are looked for."""

from __future__ import annotations

from pathlib import Path

from lora_export.artifact import read_manifest
from lora_export.check.context import CheckOptions, CheckRequest
from lora_export.check.inputs.examples import read_examples
from lora_export.check.run import Check, begin_check
from lora_export.integrity.sources import SourceOverrides, locate_sources


def opened_check(folder: Path, overrides: SourceOverrides, options: CheckOptions) -> Check:
    """The check of the export in `folder`, its sources found again; nothing is compared yet.

    Raises:
        LoraExportError: The export, its base or an adapter cannot be used, or not as asked.
    """
    manifest = read_manifest(folder)
    base, adapters = locate_sources(manifest, overrides)
    for name in filter(None, options.data):
        manifest.adapter(name)
    examples = {name: read_examples(path, options.n_rows) for name, path in options.data.items()}
    request = CheckRequest(
        folder=folder,
        base=base,
        adapters=adapters,
        provider=options.provider,
        data=examples,
        merged=options.merged,
        tolerances=options.tolerances,
    )
    return begin_check(request)
