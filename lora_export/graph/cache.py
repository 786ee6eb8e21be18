"""Finished weightless graphs, kept under the user's cache directory by everything that decides them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import platformdirs

from lora_export.folders import own_folder, own_temporary_folder
from lora_export.graph.unbound import load_weightless, save_weightless


def cache_folder() -> Path:
    """`$LORA_EXPORT_CACHE`, or `lora-export` under the user's cache directory."""
    override = os.environ.get("LORA_EXPORT_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("lora-export"))


def cache_key(facts: Mapping[str, object]) -> str:
    """A name for a graph decided by `facts` (JSON values), by the code of this package and by what runs it."""
    text = json.dumps({**facts, "code": _code_digest(), "runs_on": _runs_on()}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _code_digest() -> str:
    """Of every file of the package: a graph that an older build made is never read."""
    package = Path(__file__).parent.parent
    files = sorted(path for path in package.rglob("*.py"))
    parts = [part for file in files for part in (file.relative_to(package).as_posix().encode(), file.read_bytes())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _runs_on() -> dict[str, str]:
    """What decides a graph beside the libraries that `artifact.versions` names: Python, whose bytecode is traced, and
    NumPy, which folds constants."""
    return {"python": platform.python_version(), "numpy": version("numpy"), "ml_dtypes": version("ml_dtypes")}


def cached_graph(key: str, build: Callable[[], ir.Model], *, use_cache: bool) -> ir.Model:
    """The graph `key`, read if it is kept, else built and kept. A cache that cannot be written costs only time.

    A file's name holds a hash of its key and its content: what is damaged, or was put there by another, is removed.
    """
    if use_cache and (kept := _kept(key)) is not None:
        return kept
    # A graph just built and one read back give their later nodes other names, so both go through the file.
    with own_temporary_folder() as folder:
        built = folder / "built.onnx"
        save_weightless(build(), built)
        if use_cache:
            _keep(built, key)
        return load_weightless(built)


def _kept(key: str) -> ir.Model | None:
    with contextlib.suppress(OSError):  # of a cache that cannot be read
        for path in sorted(cache_folder().glob(f"{key}.*.onnx")):
            if path.name == _name(key, path.read_bytes()):
                return load_weightless(path)
            path.unlink(missing_ok=True)
    return None


def _name(key: str, content: bytes) -> str:
    return f"{key}.{hashlib.sha256(key.encode() + content).hexdigest()[:32]}.onnx"


def _keep(built: Path, key: str) -> None:
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with own_folder(folder, ".partial-") as own:
            shutil.copyfile(built, own / built.name)
            (own / built.name).replace(folder / _name(key, built.read_bytes()))
