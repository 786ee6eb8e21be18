"""Weightless graphs, and records beside them, kept under the user's cache directory by everything that decides them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
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
    if use_cache and (kept := kept_graph(key)) is not None:
        return kept
    # A graph just built and one read back give their later nodes other names, so both go through the file.
    with own_temporary_folder() as folder:
        built = folder / "built.onnx"
        save_weightless(build(), built)
        if use_cache:
            _keep(built.read_bytes(), key, "onnx")
        return load_weightless(built)


def kept_graph(key: str) -> ir.Model | None:
    """The graph `key` if it is kept."""
    path = _kept(key, "onnx")
    return None if path is None else load_weightless(path)


def kept_record(key: str) -> dict | None:
    """The JSON object that was kept under `key`; None if there is none."""
    path = _kept(key, "json")
    return None if path is None else json.loads(path.read_bytes())


def keep_record(key: str, fields: Mapping[str, object]) -> None:
    """Keep `fields`, a JSON object, for `kept_record`."""
    _keep(json.dumps(fields).encode(), key, "json")


def _kept(key: str, kind: str) -> Path | None:
    with contextlib.suppress(OSError):  # of a cache that cannot be read
        for path in sorted(cache_folder().glob(f"{key}.*.{kind}")):
            if path.name == _name(key, path.read_bytes(), kind):
                return path
            path.unlink(missing_ok=True)
    return None


def _name(key: str, content: bytes, kind: str) -> str:
    return f"{key}.{hashlib.sha256(key.encode() + content).hexdigest()[:32]}.{kind}"


def _keep(content: bytes, key: str, kind: str) -> None:
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with own_folder(folder, ".partial-") as own:
            (own / kind).write_bytes(content)
            (own / kind).replace(folder / _name(key, content, kind))
