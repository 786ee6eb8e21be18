"""Find again the base and adapters of an export, as its manifest recorded them, and make sure they are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.adapters.foreign import locate_adapter, peft_folder
from lora_export.adapters.renamed import folder_with_todays_names
from lora_export.artifact import Manifest, SourceRecord, sha256_of
from lora_export.base.checkpoint import locate
from lora_export.base.sentence_folder import says_embedding
from lora_export.errors import InputRefused
from lora_export.named import near
from lora_export.sentence import MODULES, transformer_files


@dataclass(frozen=True)
class SourceOverrides:
    """Where the base and adapters are now, if they have moved (`--base`, `--adapter NAME=PATH`)."""

    base: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)


def locate_sources(
    manifest: Manifest, overrides: SourceOverrides, *, only_base: bool = False
) -> tuple[Path, dict[str, Path]]:
    """The base's folder and each adapter's, with every recorded hash compared.

    Raises:
        InputRefused: One is not where it was, or is not the one that was exported.
        UsageProblem: An override names an adapter that the export does not have.
    """
    for name in overrides.adapters:
        manifest.adapter(name)
    base = locate_source(manifest.base, overrides.base, "base", hint="--base PATH")
    adapters = {}
    for record in () if only_base else manifest.adapters:
        hint = f"--adapter {record.name}=PATH"
        path = locate_source(record.source, overrides.adapters.get(record.name), "adapter", hint=hint)
        folder = peft_folder(str(path), str(base), manifest.task)
        adapters[record.name] = folder_with_todays_names(folder, base, manifest.task)
    return base, adapters


def locate_source(source: SourceRecord, override: str | None, kind: str, *, hint: str) -> Path:
    """The folder of a base or adapter (`kind`), each file of it compared with its recorded hash.

    Args:
        hint: The option that says where it is now, for messages.

    Raises:
        InputRefused: It is not where it was, or is not the one that was exported.
    """
    given = override or (f"{source.given}@{source.revision}" if source.revision else source.given)
    try:
        path = locate_adapter(given) if kind == "adapter" else locate(given, kind=kind).path
    except InputRefused as error:
        raise InputRefused(
            f"The export's {kind} is not where it was",
            where=given,
            next_step=(near(given) if override else None) or f"say where it is now with {hint}",
        ) from error
    folder = path.parent if path.is_file() else path
    if any(name.startswith(f"{path.name}/") for name in source.files):  # below a folder of sentence-transformers
        folder = path.parent
    files = source.files
    if MODULES in files and not says_embedding(files) and not (folder / MODULES).is_file():
        folder, files = path, transformer_files(files)  # the Transformer's folder alone: nothing else was read
    _require_same(folder, files, kind=kind, next_step=f"name the original with {hint}")
    return path


def locate_graph_source(source: SourceRecord) -> Path:
    """The graph of another tool that an export was made from, each of its files compared with its recorded hash.

    Raises:
        InputRefused: It is not where it was, or is not the one that was exported.
    """
    path = Path(source.given)
    _require_same(path.parent, source.files, kind="graph", next_step="put it back where it was")
    return path


def _require_same(folder: Path, files: Mapping[str, str], *, kind: str, next_step: str) -> None:
    for name, expected in files.items():
        file = folder / name
        found = sha256_of(file) if file.is_file() else None
        if found != expected:
            raise InputRefused(
                f"This {kind} is not the one that was exported",
                where=str(file),
                expected=f"sha256 {expected}",
                found=f"sha256 {found}" if found else "no such file",
                next_step=f"{next_step}, or export again",
            )
