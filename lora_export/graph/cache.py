"""Finished weightless graphs, kept under the user's cache directory by everything that decides them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir
import platformdirs

from lora_export.graph.unbound import load_weightless, save_weightless


def cache_folder() -> Path:
    """`$LORA_EXPORT_CACHE`, or `lora-export` under the user's cache directory."""
    override = os.environ.get("LORA_EXPORT_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("lora-export"))


def cache_key(facts: Mapping[str, object]) -> str:
    """A name for a graph decided by `facts` (JSON values) and by the code of this package that makes graphs."""
    text = json.dumps({**facts, "code": _code_digest()}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _code_digest() -> str:
    package = Path(__file__).parent.parent
    rooms = [path for room in ("base", "graph") for path in (package / room).glob("*.py")]
    files = sorted([*rooms, package / "export" / "graphs.py", package / "contract.py"])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def cached_graph(key: str, build: Callable[[], ir.Model], *, use_cache: bool) -> ir.Model:
    """The graph `key`, read if it is kept, else built and kept. A cache that cannot be written costs only time."""
    path = cache_folder() / f"{key}.onnx"
    if use_cache and path.exists():
        try:
            return load_weightless(path)
        except (ValueError, KeyError, TypeError, OSError, ir.serde.SerdeError):
            path.unlink(missing_ok=True)
        except Exception as error:
            # protobuf's DecodeError has no public home; any other error is a bug and is not swallowed.
            if type(error).__name__ != "DecodeError":
                raise
            path.unlink(missing_ok=True)
    # A graph just built and one read back give their later nodes other names, so both go through the file.
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built.onnx"
        save_weightless(build(), built)
        if use_cache:
            _keep(built, path)
        return load_weightless(built)


def _keep(built: Path, path: Path) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex}.onnx")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, temporary)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
