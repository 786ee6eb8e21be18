"""Fleets of a few small files at an address: what a run does there, without graphs and adapters."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lora_export.artifact import sha256_of
from lora_export.fleet import remote
from lora_export.fleet.remote import mirrored
from lora_export.fleet.state import RECORDS

ADDRESS = "memory://store/served"
FIRST = {"model.onnx": "graph", "a": "1", "b": "2", "c": "3"}
SECOND = {"model.onnx": "graph", "a": "1", "b": "other", "d": "4"}
THIRD = {"model.onnx": "graph", "a": "another", "b": "2", "c": "3", "d": "5"}


def silent(stage: str, done: int, total: int) -> None:
    pass


def there(address: str) -> dict[str, bytes]:
    system, root = fsspec.core.url_to_fs(address)
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}


def write_files(folder: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return f"file://{folder}"


def make_folder(folder: Path, **files: str) -> None:
    """A manifest of `files` in `folder`, as far as an upload reads it."""
    folder.mkdir(parents=True)
    hashes = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in files.items()}
    write_files(folder, {"lora_export.json": json.dumps({"files": hashes}), "reports/fleet.json": "{}", **files})


def as_if_whole(monkeypatch) -> None:
    """Folders of `make_folder` are exports."""

    def read(folder):
        return Files(json.loads((folder / "lora_export.json").read_text())["files"])

    def verify(folder):
        files = read(folder).files
        return Passed(all((folder / name).is_file() and sha256_of(folder / name) == files[name] for name in files))

    monkeypatch.setattr(remote, "read_manifest", read)
    monkeypatch.setattr(remote, "verify", verify)
    graph = ("model.onnx",)
    monkeypatch.setattr(remote, "files_without", lambda manifest, _: [name for name in graph if name in manifest.files])


@dataclass(frozen=True)
class Files:
    files: dict[str, str]
    adapters: tuple = ()


@dataclass(frozen=True)
class Passed:
    passed: bool


def bring(cache: Path, files: dict[str, str], address: str = ADDRESS) -> None:
    """What a fleet of `files` does at the address: each appears as it is done, and then the folder is published."""
    with mirrored(address, cache, silent) as mirror:
        made = cache / "made"
        shutil.rmtree(made, ignore_errors=True)
        make_folder(made, **files, **dict.fromkeys(RECORDS, "{}"))
        mirror.appear(made, {name: sha256_of(made / name) for name in files})
        mirror.arrived()
        shutil.rmtree(mirror.folder, ignore_errors=True)
        made.rename(mirror.folder)
        mirror.published({})


CALLS = ("pipe_file", "put_file", "cp_file", "rm_file", "rm")


@contextlib.contextmanager
def gone_after(n_calls: int, kind: type = MemoryFileSystem, names: tuple[str, ...] = CALLS):
    """A store answers none of these calls after so many, as for a run that is killed; how many came."""
    counted = itertools.count(1)
    lock, n = threading.RLock(), [0]

    def counting(real):
        def call(*arguments, **options):
            with lock:
                n[0] = next(counted)
                if n[0] > n_calls:
                    raise ConnectionError("the store is gone")
                return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(kind, name, counting(getattr(kind, name)))
        yield n
