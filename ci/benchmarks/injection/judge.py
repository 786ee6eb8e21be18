"""What a folder holds after a fault: the old export, the new one, or neither; and what was left beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_SIGNATURE = "model.sig"


def digest(folder: Path, *, with_reports: bool = True) -> str | None:
    """Of every file and folder in `folder`, by name and content; None where there is no folder.

    A signature and what lies in `reports/` differ each time that they are made, so only their being there counts.
    """
    if not folder.exists():
        return None
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith("reports") and not with_reports:
            continue
        differs = name == _SIGNATURE or name.startswith("reports/")
        content = path.read_bytes() if path.is_file() and not differs else b""
        found.update(f"{name}\0{path.is_dir()}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return found.hexdigest()


def listing(folders: Iterable[Path]) -> list[str]:
    """What lies in `folders`, each with the folder's name."""
    return sorted(
        f"{path.parent.name}/{path.name}" for folder in folders if folder.is_dir() for path in folder.iterdir()
    )


def noticed(folder: Path, key: Path | None) -> str | None:
    """What `verify` says is wrong; None if nothing."""
    from lora_export.errors import InputRefused
    from lora_export.integrity.verify import verify

    try:
        problems = verify(folder, signature_key=key).problems
    except InputRefused as error:
        return error.what
    return problems[0].detail or problems[0].kind if problems else None
