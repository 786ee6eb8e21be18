"""A base, an adapter and two exports to damage the files of."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Subjects:
    """Folders.

    Attributes:
        encoder: A dynamic export of an encoder with a tokenizer.
        writer: A dynamic export of a decoder with one.
    """

    base: Path
    adapter: Path
    encoder: Path
    writer: Path


def make_subjects(root: Path) -> Subjects:
    """Tiny ones in `root`; what is there stays."""
    found = {name: tuple(root / name / part for part in ("base", "one", "out")) for name in ("writer", "encoder")}
    if not all(out.exists() for _, _, out in found.values()):
        _make(root)
    return Subjects(*found["writer"][:2], found["encoder"][2], found["writer"][2])


def _make(root: Path) -> None:
    from adapter_options import OPTIONS
    from architectures import CATALOGUE, make_base
    from trained_adapters import make_adapter

    from lora_export.export.plan import Request
    from lora_export.pipeline import ExportOptions, export

    lora = next(option for option in OPTIONS if option.name == "lora")
    for name, architecture in (("writer", CATALOGUE["Llama"]), ("encoder", CATALOGUE["BERT, features"])):
        base, out = root / name / "base", root / name / "out"
        adapter = root / name / "one"
        if not (base / "model.safetensors").exists():
            make_base(architecture, base)
        make_adapter(architecture, lora, base, 4, adapter)
        if not out.exists():
            export(Request(str(base), ((str(adapter), "one"),), "dynamic", provider="cpu"), ExportOptions(out))


def linked(source: Path, folder: Path, name: str) -> Path:
    """A folder with the files of `source` but `name`, which is to be written; that one's path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file.resolve())
    return folder / name
